"""Llama and Mistral.

Names and rules: tensorrt_llm/models/llama/convert.py and tensorrt_llm/models/llama/config.py. Mind that TRT-LLM calls
the activated half of the gated MLP `fc` (Hugging Face: gate_proj) and the other half `gate` (up_proj).
"""

from __future__ import annotations

from typing import Any

from trtkit.architectures.rules import (
    Architecture,
    Config,
    column,
    embedding,
    lm_head,
    replicated,
    row,
    separate_qkv,
)
from trtkit.architectures.settings import (
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


def _attention_bias(config: Config) -> bool:
    return bool(config.get("attn_bias"))


def _mlp_bias(config: Config) -> bool:
    return bool(config.get("mlp_bias"))


WEIGHTS = (
    embedding("model.embed_tokens.weight"),
    replicated(f"{_TRT}input_layernorm.weight", f"{_HF}input_layernorm.weight", "hidden"),
    separate_qkv(f"{_TRT}attention.qkv.weight", *(f"{_HF}self_attn.{which}_proj.weight" for which in "qkv"), "hidden"),
    separate_qkv(
        f"{_TRT}attention.qkv.bias", *(f"{_HF}self_attn.{which}_proj.bias" for which in "qkv"), when=_attention_bias
    ),
    row(f"{_TRT}attention.dense.weight", f"{_HF}self_attn.o_proj.weight", "hidden", "q"),
    replicated(f"{_TRT}attention.dense.bias", f"{_HF}self_attn.o_proj.bias", "hidden", when=_attention_bias),
    replicated(f"{_TRT}post_layernorm.weight", f"{_HF}post_attention_layernorm.weight", "hidden"),
    column(f"{_TRT}mlp.fc.weight", f"{_HF}mlp.gate_proj.weight", "intermediate", "hidden"),
    column(f"{_TRT}mlp.fc.bias", f"{_HF}mlp.gate_proj.bias", "intermediate", when=_mlp_bias),
    column(f"{_TRT}mlp.gate.weight", f"{_HF}mlp.up_proj.weight", "intermediate", "hidden"),
    column(f"{_TRT}mlp.gate.bias", f"{_HF}mlp.up_proj.bias", "intermediate", when=_mlp_bias),
    row(f"{_TRT}mlp.proj.weight", f"{_HF}mlp.down_proj.weight", "hidden", "intermediate"),
    replicated(f"{_TRT}mlp.proj.bias", f"{_HF}mlp.down_proj.bias", "hidden", when=_mlp_bias),
    replicated("transformer.ln_f.weight", "model.norm.weight", "hidden", stage="last"),
    *lm_head("lm_head.weight", "model.embed_tokens.weight"),
)


def checkpoint_config(hf: Config) -> dict[str, Any]:
    must_be(hf, "hidden_act", "silu")
    config = {
        **decoder_config(hf),
        **rope_config(hf),
        "intermediate_size": integer(hf, "intermediate_size"),
        "max_position_embeddings": integer(hf, "max_position_embeddings"),
        "hidden_act": "silu",
        "norm_epsilon": number(hf, "rms_norm_eps"),
        "attn_bias": flag(hf, "attention_bias"),
        "mlp_bias": flag(hf, "mlp_bias"),
        "tie_word_embeddings": flag(hf, "tie_word_embeddings"),
        "residual_mlp": False,
        "disable_weight_only_quant_plugin": False,
    }
    if hf.get("sliding_window") is not None:
        # TRT-LLM takes the window at run time (max_attention_window_size); here it is a note for whoever sets that.
        config["sliding_window"] = integer(hf, "sliding_window")
    return config


def huggingface_config(config: Config) -> dict[str, Any]:
    mistral = config["architecture"] == "MistralForCausalLM"
    result = {
        **huggingface_decoder(config, "mistral" if mistral else "llama"),
        **huggingface_rope(config),
        "intermediate_size": config["intermediate_size"],
        "max_position_embeddings": config["max_position_embeddings"],
        "hidden_act": config["hidden_act"],
        "rms_norm_eps": config["norm_epsilon"],
        "attention_bias": config["attn_bias"],
        "mlp_bias": config["mlp_bias"],
        "tie_word_embeddings": config["tie_word_embeddings"],
    }
    if mistral:
        result["sliding_window"] = config.get("sliding_window")
    return result


ARCHITECTURE = Architecture(
    checkpoint_config=checkpoint_config,
    huggingface_config=huggingface_config,
    weights=WEIGHTS,
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
