"""Llama and Mistral.

Names and rules: tensorrt_llm/models/llama/convert.py and tensorrt_llm/models/llama/config.py. Mind that TRT-LLM calls
the activated half of the gated MLP `fc` (Hugging Face: gate_proj) and the other half `gate` (up_proj).
"""

from __future__ import annotations

from typing import Any

from trtkit.architectures.rules import (
    Architecture,
    Config,
    Part,
    Weight,
    column,
    flag,
    fused_qkv,
    integer,
    number,
    replicated,
    row,
)
from trtkit.errors import InputError

_HF = "model.layers.{layer}."
_TRT = "transformer.layers.{layer}."


def _attention_bias(config: Config) -> bool:
    return bool(config["attn_bias"])


def _mlp_bias(config: Config) -> bool:
    return bool(config["mlp_bias"])


def _tied(config: Config) -> bool:
    return bool(config["tie_word_embeddings"])


def _untied(config: Config) -> bool:
    return not config["tie_word_embeddings"]


def _qkv(kind: str, *rest: str, **options: Any) -> Weight:
    names = (f"{_HF}self_attn.{which}_proj.{kind}" for which in "qkv")
    return fused_qkv(f"{_TRT}attention.qkv.{kind}", *names, *rest, **options)


def _lm_head(source: str, when: Any) -> Weight:
    return Weight("lm_head.weight", (Part(source, ("vocab", "hidden"), "vocab"),), "last", when)


ROPE_TYPES = ("linear", "dynamic", "llama3", "yarn", "longrope")
EMBEDDING = "model.embed_tokens.weight"

WEIGHTS = (
    Weight("transformer.vocab_embedding.weight", (Part(EMBEDDING, ("vocab", "hidden"), "embedding"),), "first"),
    replicated(f"{_TRT}input_layernorm.weight", f"{_HF}input_layernorm.weight", "hidden"),
    _qkv("weight", "hidden"),
    _qkv("bias", when=_attention_bias),
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
    # Always written, even when tied: a checkpoint without it loads, but larger layouts leave it uninitialised.
    _lm_head("lm_head.weight", _untied),
    _lm_head(EMBEDDING, _tied),
)


def checkpoint_config(hf: Config) -> dict[str, Any]:
    if hf.get("hidden_act") != "silu":
        raise InputError(
            f"config.json: TRT-LLM's Llama does not run hidden_act '{hf.get('hidden_act')}'", "only 'silu'"
        )
    hidden, heads = integer(hf, "hidden_size"), integer(hf, "num_attention_heads")
    if hf.get("head_dim") is None and hidden % heads:
        raise InputError(
            f"config.json: hidden_size {hidden} is no multiple of num_attention_heads {heads}", "add head_dim"
        )
    config = {
        "architecture": hf["architectures"][0],
        "vocab_size": integer(hf, "vocab_size"),
        "hidden_size": hidden,
        "num_hidden_layers": integer(hf, "num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": integer(hf, "num_key_value_heads", heads),
        "head_size": integer(hf, "head_dim", hidden // heads),
        "intermediate_size": integer(hf, "intermediate_size"),
        "max_position_embeddings": integer(hf, "max_position_embeddings"),
        "hidden_act": "silu",
        "norm_epsilon": number(hf, "rms_norm_eps"),
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": number(hf, "rope_theta"),
        "rotary_scaling": _rope_scaling(hf["rope_scaling"]),
        "attn_bias": flag(hf, "attention_bias"),
        "mlp_bias": flag(hf, "mlp_bias"),
        "tie_word_embeddings": flag(hf, "tie_word_embeddings"),
        "residual_mlp": False,
        "disable_weight_only_quant_plugin": False,
    }
    if config["num_attention_heads"] % config["num_key_value_heads"]:
        kv_heads = config["num_key_value_heads"]
        raise InputError(
            f"config.json: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}", ""
        )
    if hf.get("sliding_window") is not None:
        # TRT-LLM takes the window at run time (max_attention_window_size); here it is a note for whoever sets that.
        config["sliding_window"] = integer(hf, "sliding_window")
    return config


def _rope_scaling(scaling: dict[str, Any] | None) -> dict[str, Any] | None:
    if scaling is not None and scaling["rope_type"] not in ROPE_TYPES:
        known = ", ".join(ROPE_TYPES)
        raise InputError(
            f"config.json: rope type {scaling['rope_type']!r} is not one that TRT-LLM runs", f"known: {known}"
        )
    return scaling


def huggingface_config(config: Config) -> dict[str, Any]:
    scaling = config["rotary_scaling"]
    result = {
        "architectures": [config["architecture"]],
        "model_type": "mistral" if config["architecture"] == "MistralForCausalLM" else "llama",
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "num_hidden_layers": config["num_hidden_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "num_key_value_heads": config["num_key_value_heads"],
        "head_dim": config["head_size"],
        "intermediate_size": config["intermediate_size"],
        "max_position_embeddings": config["max_position_embeddings"],
        "hidden_act": config["hidden_act"],
        "rms_norm_eps": config["norm_epsilon"],
        "rope_theta": config["rotary_base"],
        "rope_scaling": dict(scaling) if scaling else None,
        "attention_bias": config["attn_bias"],
        "mlp_bias": config["mlp_bias"],
        "tie_word_embeddings": config["tie_word_embeddings"],
    }
    if result["model_type"] == "mistral":
        result["sliding_window"] = config.get("sliding_window")
    return result


ARCHITECTURE = Architecture(
    huggingface_names=("LlamaForCausalLM", "MistralForCausalLM"),
    checkpoint_config=checkpoint_config,
    huggingface_config=huggingface_config,
    weights=WEIGHTS,
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
