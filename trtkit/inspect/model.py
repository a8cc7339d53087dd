"""What a config.json says about a model, in one vocabulary for sources, checkpoints and engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtkit.errors import TrtkitError
from trtkit.untrusted import printable, read_json

Config = Mapping[str, Any]

_QUANTIZED_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
_BITS = {"fp8": 8, "fbgemm_fp8": 8, "mxfp8": 8, "mxfp4": 4, "nvfp4": 4, "int8": 8, "w8a": 8, "w4a": 4}


@dataclass(frozen=True)
class Problem:
    """Something that is wrong, in the two lines of an error."""

    cause: str
    fix: str

    @classmethod
    def of(cls, error: TrtkitError) -> Problem:
        return cls(error.cause, error.fix)


@dataclass(frozen=True)
class Quantization:
    """How weights are quantised. What is not said is None.

    Attributes:
        method: quant_method of a Hugging Face source (`awq`, `gptq`, `fp8`, ...), quant_algo of a TRT-LLM config.
        bits: of a weight.
        group_size: weights that share a scale; None also for one scale per channel or tensor.
        kv_cache: algorithm of the key/value cache.
    """

    method: str | None
    bits: int | None
    group_size: int | None
    kv_cache: str | None


@dataclass(frozen=True)
class ModelFacts:
    """Sizes and settings of a model. What its config does not say is None.

    Attributes:
        intermediate_size: width of the MLP; in a mixture, of one expert.
        rope_scaling: kind of scaling, such as `llama3`; None for none.
        rope_factor: how many times longer it makes the context.
        tied_embeddings: the output projection is the token embedding.
        experts, experts_per_token: None for models without a mixture.
    """

    layers: int | None
    hidden_size: int | None
    intermediate_size: int | None
    heads: int | None
    kv_heads: int | None
    head_size: int | None
    vocabulary: int | None
    context: int | None
    rope_scaling: str | None
    rope_factor: float | None
    tied_embeddings: bool | None
    experts: int | None
    experts_per_token: int | None


def facts_of_checkpoint(config: Config) -> ModelFacts:
    """The facts in a TRT-LLM config: that of a checkpoint, or an engine's `pretrained_config`.

    Experts: `moe` of TensorRT-LLM, tensorrt_llm/layers/moe.py, MoeConfig.
    """
    moe = _mapping(config.get("moe"))
    rope = _mapping(config.get("rotary_scaling"))
    experts = _count(moe.get("num_experts"))
    return ModelFacts(
        layers=_count(config.get("num_hidden_layers")),
        hidden_size=_count(config.get("hidden_size")),
        intermediate_size=(experts and _count(config.get("moe_intermediate_size")))
        or _count(config.get("intermediate_size")),
        heads=_count(config.get("num_attention_heads")),
        kv_heads=_count(config.get("num_key_value_heads")),
        head_size=_count(config.get("head_size")),
        vocabulary=_count(config.get("vocab_size")),
        context=_count(config.get("max_position_embeddings")),
        rope_scaling=_text(rope.get("rope_type", rope.get("type"))),
        rope_factor=_number(rope.get("factor")),
        tied_embeddings=_flag(config.get("tie_word_embeddings")),
        experts=experts,
        experts_per_token=_count(moe.get("top_k")) if experts else None,
    )


def facts_of_huggingface(raw: Config) -> ModelFacts:
    """The facts in any Hugging Face config.json, as far as its keys have usual names.

    Of a model of several modalities those of its text model, which is nested in `text_config`.
    """
    config = {**raw, **_mapping(raw.get("text_config"))}

    def size(*names: str) -> int | None:
        return next((found for name in names if (found := _count(config.get(name))) is not None), None)

    rope = _mapping(config.get("rope_scaling")) or _mapping(config.get("rope_parameters"))
    kind = _text(rope.get("rope_type", rope.get("type")))
    hidden, heads = size("hidden_size", "n_embd", "d_model"), size("num_attention_heads", "n_head", "num_heads")
    experts = size("num_local_experts", "num_experts", "n_routed_experts")
    return ModelFacts(
        layers=size("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
        hidden_size=hidden,
        intermediate_size=(experts and size("moe_intermediate_size"))
        or size("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
        heads=heads,
        kv_heads=size("num_key_value_heads", "num_kv_heads") or heads,
        head_size=size("head_dim") or (hidden // heads if hidden and heads else None),
        vocabulary=size("vocab_size"),
        context=size("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"),
        rope_scaling=None if kind == "default" else kind,
        rope_factor=_number(rope.get("factor")),
        tied_embeddings=_flag(config.get("tie_word_embeddings")),
        experts=experts,
        experts_per_token=size("num_experts_per_tok", "experts_per_token") if experts else None,
    )


def quantization_of_checkpoint(config: Config) -> Quantization | None:
    """Quantisation of a TRT-LLM config (TensorRT-LLM, tensorrt_llm/models/modeling_utils.py, QuantConfig)."""
    given = _mapping(config.get("quantization"))
    method, kv_cache = _text(given.get("quant_algo")), _text(given.get("kv_cache_quant_algo"))
    if method in (None, "NO_QUANT") and kv_cache is None:
        return None
    grouped = any(word in (method or "") for word in ("AWQ", "GPTQ", "PER_GROUP", "NVFP4"))
    return Quantization(method, _bits(method), _count(given.get("group_size")) if grouped else None, kv_cache)


def quantization_of_source(folder: Path, raw: Config) -> Quantization | None:
    """Quantisation of a Hugging Face source, None where nothing says that its weights are quantised.

    Keys: transformers, utils/quantization_config.py (AWQ, GPTQ, bitsandbytes, fp8, compressed-tensors, mxfp4); NVIDIA
    ModelOpt, hf_quant_config.json; AutoGPTQ, quantize_config.json; AutoAWQ, quant_config.json.
    """
    for key in ("quantization_config", "compression_config"):
        if raw.get(key) is not None:
            return _described(_mapping(raw[key]))
    for name in _QUANTIZED_FILES:
        if (folder / name).exists():
            return _described(read_json(folder / name))
    return None


def _described(given: Config) -> Quantization:
    inner = {**given, **_mapping(given.get("quantization"))}
    group = _mapping(next(iter(_mapping(inner.get("config_groups")).values()), None))
    weights = _mapping(group.get("weights"))
    method, algorithm = _text(inner.get("quant_method")), _text(inner.get("quant_algo"))
    name = f"{method} {algorithm}" if method and algorithm else method or algorithm
    bits = next(
        (
            found
            for key in ("bits", "w_bit", "weight_bits", "num_bits")
            if (found := _count(inner.get(key)) or _count(weights.get(key)))
        ),
        4 if inner.get("load_in_4bit") is True else 8 if inner.get("load_in_8bit") is True else None,
    )
    block = inner.get("weight_block_size")
    size = inner.get("group_size", inner.get("q_group_size", weights.get("group_size")))
    if size is None and isinstance(block, list) and block:
        size = block[0]
    kv_cache = _mapping(inner.get("kv_cache_scheme"))
    kv = _text(inner.get("kv_cache_quant_algo")) or (_scheme(kv_cache) if kv_cache else None)
    return Quantization(name, bits or _bits(name), _count(size), kv)


def _scheme(given: Config) -> str:
    """A compressed-tensors scheme in a word, such as FP8 for `{"num_bits": 8, "type": "float"}`."""
    return f"{'FP' if given.get('type') == 'float' else 'INT'}{_count(given.get('num_bits')) or ''}"


def _bits(name: str | None) -> int | None:
    """Bits of a weight, from the name of a method whose name tells."""
    return next((bits for word, bits in _BITS.items() if word in (name or "").lower()), None)


def _mapping(value: Any) -> Config:
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 < value < 2**40 else None


def _number(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and 0 < value < 2**40 else None


def _flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _text(value: Any) -> str | None:
    return printable(value, 60) if isinstance(value, str) else None
