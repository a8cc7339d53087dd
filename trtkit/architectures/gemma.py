"""Gemma, Gemma 2 and the text models of Gemma 3.

Names and rules: tensorrt_llm/models/gemma/convert.py, config.py and model.py. Norms are stored plus one, which
TRT-LLM's RmsNorm does not add; the embedding is stored as it is, for the network scales it by sqrt(hidden_size).
GemmaConfig splits the embedding along the vocabulary whenever TP > 1, whatever the checkpoint says.
"""

from __future__ import annotations

from typing import Any

from trtkit.architectures.rules import (
    Architecture,
    Config,
    Weight,
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
    unexpected,
)
from trtkit.errors import InputError

_HF = "model.layers.{layer}."
_TRT = "transformer.layers.{layer}."
_GEMMA2, _GEMMA3 = "Gemma2ForCausalLM", "Gemma3ForCausalLM"
_MODEL_TYPES = {"GemmaForCausalLM": "gemma", _GEMMA2: "gemma2", _GEMMA3: "gemma3_text"}
_SLIDING, _FULL = "sliding_attention", "full_attention"
_ACTIVATION = "gelu_pytorch_tanh"


def _attention_bias(config: Config) -> bool:
    return bool(config["attn_bias"])


def _inner_norms(config: Config) -> bool:
    return config["architecture"] in (_GEMMA2, _GEMMA3)


def _query_norms(config: Config) -> bool:
    return bool(config["architecture"] == _GEMMA3)


def _norm(name: str, source: str, extent: str = "hidden", **options: Any) -> Weight:
    return replicated(name, source, extent, plus=1.0, **options)


WEIGHTS = (
    embedding("model.embed_tokens.weight"),
    _norm(f"{_TRT}input_layernorm.weight", f"{_HF}input_layernorm.weight"),
    separate_qkv(f"{_TRT}attention.qkv.weight", *(f"{_HF}self_attn.{which}_proj.weight" for which in "qkv"), "hidden"),
    separate_qkv(
        f"{_TRT}attention.qkv.bias", *(f"{_HF}self_attn.{which}_proj.bias" for which in "qkv"), when=_attention_bias
    ),
    _norm(f"{_TRT}attention.q_layernorm.weight", f"{_HF}self_attn.q_norm.weight", "head", when=_query_norms),
    _norm(f"{_TRT}attention.k_layernorm.weight", f"{_HF}self_attn.k_norm.weight", "head", when=_query_norms),
    row(f"{_TRT}attention.dense.weight", f"{_HF}self_attn.o_proj.weight", "hidden", "q"),
    replicated(f"{_TRT}attention.dense.bias", f"{_HF}self_attn.o_proj.bias", "hidden", when=_attention_bias),
    _norm(f"{_TRT}post_layernorm.weight", f"{_HF}post_attention_layernorm.weight"),
    _norm(f"{_TRT}pre_feedforward_layernorm.weight", f"{_HF}pre_feedforward_layernorm.weight", when=_inner_norms),
    column(f"{_TRT}mlp.fc.weight", f"{_HF}mlp.gate_proj.weight", "intermediate", "hidden"),
    column(f"{_TRT}mlp.gate.weight", f"{_HF}mlp.up_proj.weight", "intermediate", "hidden"),
    row(f"{_TRT}mlp.proj.weight", f"{_HF}mlp.down_proj.weight", "hidden", "intermediate"),
    _norm(f"{_TRT}post_feedforward_layernorm.weight", f"{_HF}post_feedforward_layernorm.weight", when=_inner_norms),
    _norm("transformer.ln_f.weight", "model.norm.weight", stage="last"),
    *lm_head("lm_head.weight", "model.embed_tokens.weight"),
)


def checkpoint_config(hf: Config) -> dict[str, Any]:
    _check_activation(hf)
    must_be(hf, "use_bidirectional_attention", False, False)
    architecture = hf["architectures"][0]
    config = {
        **decoder_config({**hf, "head_dim": integer(hf, "head_dim", 256)}),
        **rope_config(hf),
        "intermediate_size": integer(hf, "intermediate_size"),
        "max_position_embeddings": integer(hf, "max_position_embeddings"),
        "hidden_act": _ACTIVATION,
        "norm_epsilon": number(hf, "rms_norm_eps"),
        "attn_bias": flag(hf, "attention_bias"),
        "mlp_bias": False,
        "tie_word_embeddings": flag(hf, "tie_word_embeddings", True),
        "inter_layernorms": architecture in (_GEMMA2, _GEMMA3),
    }
    if architecture == _GEMMA2:
        config |= {
            "query_pre_attn_scalar": integer(hf, "query_pre_attn_scalar", 256),
            "final_logit_softcapping": _softcapping(hf, "final_logit_softcapping", 30.0),
            "attn_logit_softcapping": _softcapping(hf, "attn_logit_softcapping", 50.0),
            # TRT-LLM takes the windows at run time (max_attention_window_size): notes for whoever sets that. Not called
            # `layer_types`, which its runtimes read as kinds of their own (see qwen.window_config).
            "sliding_window": _window(hf),
            "sliding_window_layers": [n for n, kind in enumerate(_layer_types(hf, pattern=2)) if kind == _SLIDING],
        }
    elif architecture == _GEMMA3:
        config |= _gemma3_config(hf)
    return config


def _gemma3_config(hf: Config) -> dict[str, Any]:
    must_be(hf, "attn_logit_softcapping", None)
    if hf["rope_scaling"] is not None:
        # attention.py makes both rotary tables, the global and the local one, with the same scaling.
        raise InputError(
            f"config.json: TRT-LLM's {_GEMMA3} does not run rope type {hf['rope_scaling']['rope_type']!r}: it would "
            "scale the sliding-window layers too",
            "use a model without rope scaling (Gemma 3 270M or 1B), or the llmapi runtime",
        )
    declared = integer(hf, "sliding_window_pattern", 6)
    types = _layer_types(hf, declared)
    pattern = types.index(_FULL) + 1 if _FULL in types else max(declared, len(types) + 1)
    if types != _alternating(len(types), pattern):
        raise InputError(
            f"config.json: TRT-LLM's {_GEMMA3} does not run these layer_types",
            "only every n-th layer may have full attention",
        )
    return {
        "query_pre_attn_scalar": integer(hf, "query_pre_attn_scalar", 256),
        "final_logit_softcapping": _softcapping(hf, "final_logit_softcapping", None),
        "rope_local_base_freq": number(hf, "rope_local_base_freq", 10000.0),
        "sliding_window": _window(hf),
        # Releases up to 1.0 read the first spelling, later ones the second.
        "sliding_window_pattern": pattern,
        "_sliding_window_pattern": pattern,
    }


def _check_activation(hf: Config) -> None:
    """Gemma's first configs say "gelu" and mean the tanh approximation, as transformers and TRT-LLM take it."""
    for key in ("hidden_act", "hidden_activation"):
        value = hf.get(key)
        if value is not None and not (value == "gelu" and key == "hidden_act"):
            must_be(hf, key, _ACTIVATION)


def _softcapping(hf: Config, key: str, default: float | None) -> float | None:
    """A softcapping: null turns it off, a missing key means transformers' default."""
    value = hf.get(key, default)
    return None if value is None else number({key: value}, key)


def _window(hf: Config) -> int:
    return integer(hf, "sliding_window", 4096)


def _alternating(layers: int, pattern: int) -> list[str]:
    """Types of layers of which every `pattern`-th has full attention."""
    return [_SLIDING if (layer + 1) % pattern else _FULL for layer in range(layers)]


def _layer_types(hf: Config, pattern: int) -> list[str]:
    layers = integer(hf, "num_hidden_layers")
    types = hf.get("layer_types")
    if types is None:
        return _alternating(layers, pattern)
    if not isinstance(types, list) or len(types) != layers or not all(kind in (_SLIDING, _FULL) for kind in types):
        raise unexpected("layer_types", types, f"{layers} of {_SLIDING} and {_FULL}")
    return types


def huggingface_config(config: Config) -> dict[str, Any]:
    architecture = config["architecture"]
    result = {
        **huggingface_decoder(config, _MODEL_TYPES[architecture]),
        "intermediate_size": config["intermediate_size"],
        "max_position_embeddings": config["max_position_embeddings"],
        "hidden_act" if architecture == "GemmaForCausalLM" else "hidden_activation": _ACTIVATION,
        "rms_norm_eps": config["norm_epsilon"],
        "attention_bias": config["attn_bias"],
        "tie_word_embeddings": config["tie_word_embeddings"],
    }
    if architecture != _GEMMA3:
        result |= huggingface_rope(config)
    for key in ("query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping", "sliding_window"):
        if key in config:
            result[key] = config[key]
    if architecture == _GEMMA2:
        windowed, layers = set(config["sliding_window_layers"]), range(config["num_hidden_layers"])
        result["layer_types"] = [_SLIDING if layer in windowed else _FULL for layer in layers]
    elif architecture == _GEMMA3:
        pattern = config.get("_sliding_window_pattern") or config["sliding_window_pattern"]
        result["layer_types"] = _alternating(config["num_hidden_layers"], pattern)
        result |= {"rope_theta": config["rotary_base"], "rope_local_base_freq": config["rope_local_base_freq"]}
    return result


ARCHITECTURE = Architecture(
    checkpoint_config=checkpoint_config,
    huggingface_config=huggingface_config,
    weights=WEIGHTS,
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    split_embedding=True,
    notes="sliding windows are set at run time; no rope scaling for Gemma 3; with TP the embedding is split",
)
