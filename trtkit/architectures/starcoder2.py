"""StarCoder2.

Names and rules: tensorrt_llm/models/gpt/convert.py, tensorrt_llm/models/gpt/config.py and
tensorrt_llm/models/gpt/model.py (variant `starcoder2`).
"""

from __future__ import annotations

from typing import Any

from trtkit.architectures.rules import (
    Architecture,
    Config,
    column,
    embedding,
    layer_norm,
    lm_head,
    replicated,
    row,
    separate_qkv,
)
from trtkit.architectures.settings import (
    choice,
    decoder_config,
    flag,
    huggingface_decoder,
    huggingface_rope,
    integer,
    must_be,
    number,
    rope_config,
)

_HF = "model.layers.{layer}."
_TRT = "transformer.layers.{layer}."


def _has_bias(config: Config) -> bool:
    return bool(config["bias"])


WEIGHTS = (
    embedding("model.embed_tokens.weight"),
    *layer_norm(f"{_TRT}input_layernorm", f"{_HF}input_layernorm"),
    separate_qkv(f"{_TRT}attention.qkv.weight", *(f"{_HF}self_attn.{which}_proj.weight" for which in "qkv"), "hidden"),
    separate_qkv(
        f"{_TRT}attention.qkv.bias", *(f"{_HF}self_attn.{which}_proj.bias" for which in "qkv"), when=_has_bias
    ),
    row(f"{_TRT}attention.dense.weight", f"{_HF}self_attn.o_proj.weight", "hidden", "q"),
    replicated(f"{_TRT}attention.dense.bias", f"{_HF}self_attn.o_proj.bias", "hidden", when=_has_bias),
    *layer_norm(f"{_TRT}post_layernorm", f"{_HF}post_attention_layernorm"),
    column(f"{_TRT}mlp.fc.weight", f"{_HF}mlp.c_fc.weight", "intermediate", "hidden"),
    column(f"{_TRT}mlp.fc.bias", f"{_HF}mlp.c_fc.bias", "intermediate", when=_has_bias),
    row(f"{_TRT}mlp.proj.weight", f"{_HF}mlp.c_proj.weight", "hidden", "intermediate"),
    replicated(f"{_TRT}mlp.proj.bias", f"{_HF}mlp.c_proj.bias", "hidden", when=_has_bias),
    *layer_norm("transformer.ln_f", "model.norm", stage="last"),
    *lm_head("lm_head.weight", "model.embed_tokens.weight"),
)


def checkpoint_config(hf: Config) -> dict[str, Any]:
    must_be(hf, "partial_rotary_factor", 1.0, default=1.0)
    scaling = hf["rope_scaling"] or {}
    must_be({**hf, "rope_type": scaling.get("rope_type")}, "rope_type", "linear", default="linear")
    config = {
        **decoder_config(hf),
        **rope_config(hf),
        "gpt_variant": "starcoder2",
        "intermediate_size": integer(hf, "intermediate_size"),
        "max_position_embeddings": integer(hf, "max_position_embeddings"),
        "hidden_act": choice(hf, "hidden_act", ("gelu_pytorch_tanh", "gelu"), default="gelu_pytorch_tanh"),
        "norm_epsilon": number(hf, "norm_epsilon", 1e-5),
        "bias": flag(hf, "use_bias", True),
        "rotary_pct": 1.0,
        "q_scaling": 1.0,
        "embedding_scale": None,
        "apply_query_key_layer_scaling": False,
        "qk_layernorm": False,
        "inner_layernorm": False,
        "norm_before_bmm1": False,
        "tie_word_embeddings": flag(hf, "tie_word_embeddings", True),
    }
    if hf.get("sliding_window") is not None:
        # As for Mistral, a note: TRT-LLM takes the window at run time (max_attention_window_size).
        config["sliding_window"] = integer(hf, "sliding_window")
    return config


def huggingface_config(config: Config) -> dict[str, Any]:
    return {
        **huggingface_decoder(config, "starcoder2"),
        **huggingface_rope(config),
        "intermediate_size": config["intermediate_size"],
        "max_position_embeddings": config["max_position_embeddings"],
        "hidden_act": config["hidden_act"],
        "norm_epsilon": config["norm_epsilon"],
        "use_bias": config["bias"],
        "sliding_window": config.get("sliding_window"),
        "tie_word_embeddings": config["tie_word_embeddings"],
    }


ARCHITECTURE = Architecture(
    checkpoint_config=checkpoint_config,
    huggingface_config=huggingface_config,
    weights=WEIGHTS,
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    notes="the sliding window is a run-time setting of the engine (max_attention_window_size)",
)
