"""Mixtral.

Names and rules: tensorrt_llm/models/llama/convert.py and config.py (TRT-LLM runs Mixtral with its Llama class) and
tensorrt_llm/layers/moe.py. An expert's w1 is the activated half of its gated MLP, w3 the other one, w2 the way back; a
rank's experts are stacked, with w3 above w1. transformers 5 can also save all experts of a layer in one tensor
(transformers, conversion_mapping.py), with w1 above w3.
"""

from __future__ import annotations

from typing import Any

from trtkit.architectures.rules import (
    Architecture,
    Config,
    Stacked,
    embedding,
    joined_columns,
    lm_head,
    replicated,
    row,
    separate_qkv,
)
from trtkit.architectures.settings import (
    decoder_config,
    experts_config,
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
_EXPERT = f"{_HF}block_sparse_moe.experts.{{expert}}."

WEIGHTS = (
    embedding("model.embed_tokens.weight"),
    replicated(f"{_TRT}input_layernorm.weight", f"{_HF}input_layernorm.weight", "hidden"),
    separate_qkv(
        f"{_TRT}attention.qkv.weight",
        *(f"{_HF}self_attn.{which}_proj.weight" for which in "qkv"),
        "hidden",
    ),
    row(f"{_TRT}attention.dense.weight", f"{_HF}self_attn.o_proj.weight", "hidden", "q"),
    replicated(f"{_TRT}post_layernorm.weight", f"{_HF}post_attention_layernorm.weight", "hidden"),
    replicated(f"{_TRT}mlp.router.weight", f"{_HF}block_sparse_moe.gate.weight", "experts", "hidden", float32=True),
    joined_columns(
        f"{_TRT}mlp.fc.weight",
        (f"{_EXPERT}w3.weight", f"{_EXPERT}w1.weight"),
        "intermediate",
        "hidden",
        experts=True,
    ),
    row(f"{_TRT}mlp.proj.weight", f"{_EXPERT}w2.weight", "hidden", "intermediate", experts=True),
    replicated("transformer.ln_f.weight", "model.norm.weight", "hidden", stage="last"),
    *lm_head("lm_head.weight", "model.embed_tokens.weight"),
)


def checkpoint_config(hf: Config) -> dict[str, Any]:
    must_be(hf, "hidden_act", "silu", "silu")
    config = {
        **decoder_config(hf),
        **rope_config(hf),
        "intermediate_size": integer(hf, "intermediate_size"),
        "max_position_embeddings": integer(hf, "max_position_embeddings"),
        "hidden_act": "swiglu",
        "norm_epsilon": number(hf, "rms_norm_eps"),
        "attn_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": flag(hf, "tie_word_embeddings"),
        "residual_mlp": False,
        "disable_weight_only_quant_plugin": False,
        "moe": experts_config(hf, renormalize=True),
    }
    if hf.get("sliding_window") is not None:
        # Of all layers. TRT-LLM takes it at run time (max_attention_window_size): a note for whoever sets that.
        config["sliding_window"] = integer(hf, "sliding_window")
    return config


def huggingface_config(config: Config) -> dict[str, Any]:
    return {
        **huggingface_decoder(config, "mixtral"),
        **huggingface_rope(config),
        "intermediate_size": config["intermediate_size"],
        "max_position_embeddings": config["max_position_embeddings"],
        "hidden_act": "silu",
        "rms_norm_eps": config["norm_epsilon"],
        "tie_word_embeddings": config["tie_word_embeddings"],
        "sliding_window": config.get("sliding_window"),
        "num_local_experts": config["moe"]["num_experts"],
        "num_experts_per_tok": config["moe"]["top_k"],
    }


ARCHITECTURE = Architecture(
    checkpoint_config=checkpoint_config,
    huggingface_config=huggingface_config,
    weights=WEIGHTS,
    sizes=lambda config: {"experts": config["moe"]["num_experts"]},
    renames=((r"^(model\.layers\.\d+\.)mlp\.(gate\.|experts\.)", r"\1block_sparse_moe.\2"),),
    stacked=(
        Stacked(
            r"(model\.layers\.\d+\.block_sparse_moe\.experts\.)gate_up_proj",
            (r"\1{expert}.w1.weight", r"\1{expert}.w3.weight"),
        ),
        Stacked(r"(model\.layers\.\d+\.block_sparse_moe\.experts\.)down_proj", (r"\1{expert}.w2.weight",)),
    ),
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    notes="expert parallelism; sliding windows are set at run time",
)
