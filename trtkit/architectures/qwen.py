"""What the Qwen families have in common: TRT-LLM runs them all with one class.

Names and rules: tensorrt_llm/models/qwen/model.py, config.py and convert.py. The class tells the families apart by
`qwen_type`, has no bias on the attention's output and ignores `attention_bias`: its own key is `attn_bias`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trtkit.architectures.rules import (
    Config,
    Stacked,
    Weight,
    column,
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
    unexpected,
)
from trtkit.errors import InputError
from trtkit.untrusted import printable

HF = "model.layers.{layer}."
TRT = "transformer.layers.{layer}."
IGNORED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)


def _attention_bias(config: Config) -> bool:
    return bool(config["attn_bias"])


ATTENTION = (
    replicated(f"{TRT}input_layernorm.weight", f"{HF}input_layernorm.weight", "hidden"),
    separate_qkv(
        f"{TRT}attention.qkv.weight",
        *(f"{HF}self_attn.{which}_proj.weight" for which in "qkv"),
        "hidden",
    ),
    separate_qkv(
        f"{TRT}attention.qkv.bias",
        *(f"{HF}self_attn.{which}_proj.bias" for which in "qkv"),
        when=_attention_bias,
    ),
    row(f"{TRT}attention.dense.weight", f"{HF}self_attn.o_proj.weight", "hidden", "q"),
)
"""Attention with its norm; biases (Qwen 2) are those of query, key and value only."""

HEAD_NORMS = (
    replicated(f"{TRT}attention.q_layernorm.weight", f"{HF}self_attn.q_norm.weight", "head"),
    replicated(f"{TRT}attention.k_layernorm.weight", f"{HF}self_attn.k_norm.weight", "head"),
)
"""Qwen 3's norms of each query and key head."""

DENSE = (
    column(f"{TRT}mlp.fc.weight", f"{HF}mlp.gate_proj.weight", "intermediate", "hidden"),
    column(f"{TRT}mlp.gate.weight", f"{HF}mlp.up_proj.weight", "intermediate", "hidden"),
    row(f"{TRT}mlp.proj.weight", f"{HF}mlp.down_proj.weight", "hidden", "intermediate"),
)
"""The gated MLP of the families without experts. TRT-LLM's `fc` is the activated half."""

_EXPERT = f"{HF}mlp.experts.{{expert}}."

EXPERTS = (
    replicated(f"{TRT}mlp.router.weight", f"{HF}mlp.gate.weight", "experts", "hidden", float32=True),
    joined_columns(
        f"{TRT}mlp.fc.weight",
        (f"{_EXPERT}up_proj.weight", f"{_EXPERT}gate_proj.weight"),
        "moe",
        "hidden",
        experts=True,
    ),
    row(f"{TRT}mlp.proj.weight", f"{_EXPERT}down_proj.weight", "hidden", "moe", experts=True),
)
"""The mixture of experts; TRT-LLM's fused experts have the activated half (`gate_proj`) below."""

STACKED = (
    Stacked(
        r"(model\.layers\.\d+\.mlp\.experts\.)gate_up_proj",
        (r"\1{expert}.gate_proj.weight", r"\1{expert}.up_proj.weight"),
    ),
    Stacked(r"(model\.layers\.\d+\.mlp\.experts\.)down_proj", (r"\1{expert}.down_proj.weight",)),
)
"""All experts of a layer in one tensor, as transformers 5 can save them (transformers, conversion_mapping.py)."""


def weights(*layer: Weight) -> tuple[Weight, ...]:
    """A family's weight map from the tensors of its layers."""
    return (
        embedding("model.embed_tokens.weight"),
        *layer,
        replicated(f"{TRT}post_layernorm.weight", f"{HF}post_attention_layernorm.weight", "hidden"),
        replicated("transformer.ln_f.weight", "model.norm.weight", "hidden", stage="last"),
        *lm_head("lm_head.weight", "model.embed_tokens.weight"),
    )


def qwen_config(hf: Config, qwen_type: str, *, attention_bias: bool) -> dict[str, Any]:
    """The checkpoint keys that all Qwen families have.

    Raises:
        InputError: settings that TRT-LLM's Qwen class cannot express.
    """
    must_be(hf, "hidden_act", "silu", "silu")
    return {
        **decoder_config(hf),
        **rope_config(hf),
        "qwen_type": qwen_type,
        "max_position_embeddings": integer(hf, "max_position_embeddings"),
        "norm_epsilon": number(hf, "rms_norm_eps"),
        "attn_bias": attention_bias,
        "mlp_bias": False,
        "tie_word_embeddings": flag(hf, "tie_word_embeddings"),
        "seq_length": integer(hf, "seq_length", 8192),
        "use_logn_attn": False,
        "disable_weight_only_quant_plugin": False,
    }


def dense_config(hf: Config) -> dict[str, Any]:
    """The checkpoint keys of the families without experts: their MLP, and which layers have a sliding window."""
    return {
        "intermediate_size": integer(hf, "intermediate_size"),
        "hidden_act": "silu",
        **window_config(hf, late_layers),
    }


def mixture_config(hf: Config) -> dict[str, Any]:
    """The checkpoint keys of the families with experts.

    `normalization_mode` follows the model's norm_topk_prob. TRT-LLM's own converter writes 0 for every Qwen, which is
    wrong for Qwen 3's; the model class reads the key, so that the right value is enough.

    Raises:
        InputError: layers without experts, which TRT-LLM's Qwen class does not have.
    """
    must_be(hf, "decoder_sparse_step", 1, 1)
    must_be(hf, "mlp_only_layers", [], [])
    width = integer(hf, "moe_intermediate_size")
    return {
        "intermediate_size": integer(hf, "intermediate_size", width),
        "moe_intermediate_size": width,
        "hidden_act": "swiglu",
        "moe": experts_config(hf, renormalize=flag(hf, "norm_topk_prob")),
    }


def mixture_sizes(config: Config) -> dict[str, int]:
    """Further extents of the families with experts."""
    return {
        "experts": config["moe"]["num_experts"],
        "moe": config["moe_intermediate_size"],
        "shared": config["moe_shared_expert_intermediate_size"],
    }


def late_layers(hf: Config) -> list[int]:
    """The layers that have a window where the config does not list them: all from `max_window_layers` on."""
    first = hf.get("max_window_layers", 28)
    if type(first) is not int or first < 0:
        raise unexpected("max_window_layers", first, "a number of layers")
    return list(range(first, integer(hf, "num_hidden_layers")))


def window_config(hf: Config, unlisted: Callable[[Config], list[int]]) -> dict[str, Any]:
    """The checkpoint keys of sliding windows, none where no layer has one.

    TRT-LLM takes windows at run time, one per layer (max_attention_window_size); here they are notes for whoever sets
    that. The layers are not called `layer_types` as in Hugging Face's config, since TRT-LLM's runtimes read that key as
    kinds of their own: the Python one counts layers of type `attention` (tensorrt_llm/runtime/generation.py), the C++
    one warns of the others (cpp/tensorrt_llm/runtime/gptJsonConfig.cpp).

    Args:
        unlisted: gives the layers that have a window where the config does not list them.

    Raises:
        InputError: windows that make no sense; names the key.
    """
    if not flag(hf, "use_sliding_window") or not hf.get("sliding_window"):
        return {}
    window, layers = integer(hf, "sliding_window"), integer(hf, "num_hidden_layers")
    kinds = hf.get("layer_types")
    if kinds is None:
        windowed = unlisted(hf)
    elif isinstance(kinds, list) and len(kinds) == layers:
        other = [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]
        if other:
            kind = printable(repr(other[0]))
            raise InputError(
                f"config.json: layer type {kind} is not one that TRT-LLM's {hf['architectures'][0]} runs",
                "known: full_attention, sliding_attention",
            )
        windowed = [layer for layer, kind in enumerate(kinds) if kind == "sliding_attention"]
    else:
        raise unexpected("layer_types", kinds, f"a list of {layers} types of layers")
    return {"sliding_window": window, "sliding_window_layers": windowed} if windowed else {}


def huggingface_qwen(config: Config) -> dict[str, Any]:
    """The inverse of `qwen_config`."""
    return {
        **huggingface_decoder(config, config["qwen_type"]),
        **huggingface_rope(config),
        "intermediate_size": config["intermediate_size"],
        "max_position_embeddings": config["max_position_embeddings"],
        "hidden_act": "silu",
        "rms_norm_eps": config["norm_epsilon"],
        "tie_word_embeddings": config["tie_word_embeddings"],
    }


def huggingface_mixture(config: Config) -> dict[str, Any]:
    """The inverse of `mixture_config`."""
    return {
        "moe_intermediate_size": config["moe_intermediate_size"],
        "num_experts": config["moe"]["num_experts"],
        "num_experts_per_tok": config["moe"]["top_k"],
        "norm_topk_prob": config["moe"]["normalization_mode"] == 1,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def huggingface_window(config: Config) -> dict[str, Any]:
    """The inverse of `window_config`, for classes that list the layers' types."""
    windowed = config.get("sliding_window_layers") or []
    layers = config["num_hidden_layers"]
    return {
        "use_sliding_window": bool(windowed),
        "sliding_window": config.get("sliding_window"),
        "max_window_layers": min(windowed, default=layers),
        "layer_types": ["sliding_attention" if layer in windowed else "full_attention" for layer in range(layers)],
    }
