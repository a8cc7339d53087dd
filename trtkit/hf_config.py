"""config.json of a source, in one spelling: transformers 4 and 5 write the same model differently.

Source: transformers 5.23, modeling_rope_utils.py and the models' configuration classes, which read both spellings.
Version 5 moved `rope_theta`, `rope_scaling` and `partial_rotary_factor` into `rope_parameters`, one dict per layer type
where layers differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trtkit import architectures
from trtkit.errors import InputError
from trtkit.untrusted import printable, read_json

DEFAULT_ROPE_THETA = 10000.0
OTHER_ROPE_THETA = {"gemma3_text": 1000000.0, "mixtral": 1000000.0}
MAX_LAYERS = 100_000
"""More than any model has. Families go through the layers, and nobody shall count to a billion for them."""
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")
"""Families' names for the number of layers."""

_QUANTIZED = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Where ModelOpt, AutoGPTQ and AutoAWQ put what config.json does not say."""

_ROPE_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor"),
}
_ROPE_NUMBERS = (
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "attention_factor",
    "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
)  # fmt: skip
_ROPE_LISTS = ("short_factor", "long_factor")


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a source folder, normalised.

    Raises:
        InputError: it is missing or malformed, or a model that trtkit does not convert.
    """
    file = path / "config.json"
    if not file.is_symlink() and not file.exists() and (path / "adapter_config.json").exists():
        raise InputError(
            f"{path} holds an adapter (adapter_config.json), not a whole model",
            "merge it into its base model (merge_and_unload of the package peft) and save that",
        )
    raw = read_json(file)
    names = raw.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise InputError(f"{file}: key 'architectures' is missing or no list of names", "add the model's class name")
    if not names[0].isidentifier() or len(names[0]) > 100:
        raise InputError(f"{file}: architecture '{printable(names[0])}' is no class name", "download the file again")
    if isinstance(raw.get("text_config"), dict) and names[0] not in architectures.FAMILIES:
        raise InputError(
            f"{file}: {names[0]} is a model of several modalities (its text model is nested in 'text_config')",
            "trtkit converts text models: use a text-only checkpoint of this family",
        )
    for key in LAYER_COUNTS:
        if type(count := raw.get(key)) is int and count > MAX_LAYERS:
            raise InputError(
                f"{file}: {key} is {printable(count, 30)}, no model has so many", "download the file again"
            )
    try:
        architectures.get(names[0])
        return normalize_config(raw)
    except InputError as error:  # which know the key, not the folder
        raise InputError(f"{file}: {error.cause.removeprefix('config.json: ')}", error.fix) from error


def quantized_in(path: Path, config: Mapping[str, Any]) -> tuple[Path, str] | None:
    """The file that says that the weights of a source are quantised already, and in brackets how if it says so there;
    None where nothing does.

    Args:
        config: config.json as it stands in `path`, or normalised.
    """
    for key in ("quantization_config", "compression_config"):
        if (found := config.get(key)) is not None:
            method = printable(found.get("quant_method", "unknown") if isinstance(found, dict) else found)
            return path / "config.json", f" ({method})"
    for name in _QUANTIZED:
        if (path / name).exists():
            return path / name, ""
    return None


def refuse_quantized(path: Path, config: Mapping[str, Any]) -> None:
    """For what needs plain weights.

    Raises:
        InputError: those of the source are quantised already.
    """
    if found := quantized_in(path, config):
        raise InputError(f"{found[0]}: the weights are quantised already{found[1]}", "use the original model")


def normalize_config(raw: dict[str, Any]) -> dict[str, Any]:
    """A Hugging Face config with one spelling for what transformers 4 and 5 spell differently, whatever the family.

    - `dtype` (4: torch_dtype), without the prefix "torch.".
    - `rope_theta` (also: within rope_parameters; GPT-NeoX in 4: rotary_emb_base). 10000 where nothing is said (Gemma 3
      and Mixtral: a million).
    - `rope_scaling` is None when nothing is scaled (5 writes `rope_type: default`), else it carries both `type` and
      `rope_type`, and `original_max_position_embeddings` for the types that count from it.
    - `partial_rotary_factor` (also: within rope_parameters; GPT-NeoX in 4: rotary_pct), None where nothing is said:
      its default is the family's.
    - `rope_local_base_freq`: base of the sliding-window layers of models whose layers differ (5: nested in
      rope_parameters, whose `full_attention` then gives the other keys), else None.
    - `num_local_experts` (some families in 4: num_experts), where there are experts.

    All other keys stay as they are.

    Raises:
        InputError: rope parameters that are malformed, or that differ between layers in more than their base.
    """
    config = dict(raw)
    dtype = _first(raw.get("dtype"), raw.get("torch_dtype"))
    config["dtype"] = dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype
    experts = _first(raw.get("num_local_experts"), raw.get("num_experts"))
    if experts is not None:
        config["num_local_experts"] = experts
    parameters, local = _per_layer_type(_mapping(raw, "rope_parameters"))
    rope = _mapping(raw, "rope_scaling") or parameters
    config["rope_theta"] = _first(
        rope.get("rope_theta"), parameters.get("rope_theta"), raw.get("rope_theta"), raw.get("rotary_emb_base"),
        OTHER_ROPE_THETA.get(str(raw.get("model_type")), DEFAULT_ROPE_THETA),
    )  # fmt: skip
    config["partial_rotary_factor"] = _first(
        rope.get("partial_rotary_factor"), parameters.get("partial_rotary_factor"), raw.get("partial_rotary_factor"),
        raw.get("rotary_pct"),
    )  # fmt: skip
    config["rope_local_base_freq"] = _first(local.get("rope_theta"), raw.get("rope_local_base_freq"))
    config["rope_scaling"] = _scaling(rope, raw)
    return config


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _mapping(raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = raw.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _malformed(f"rope parameters are {printable(repr(value))}, expected a mapping")
    return value


def _per_layer_type(parameters: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rope parameters of the layers with full attention (or of all), and of those with a sliding window."""
    if not any(isinstance(value, dict) for value in parameters.values()):
        return parameters, {}
    other = sorted(parameters.keys() - {"full_attention", "sliding_attention"})
    if other:
        raise InputError(
            f"config.json: rope parameters of layer type '{printable(other[0])}' are not ones that trtkit converts",
            "known layer types: full_attention, sliding_attention",
        )
    full, local = _mapping(parameters, "full_attention"), _mapping(parameters, "sliding_attention")
    if _kind(local) is not None:
        raise InputError(
            f"config.json: rope type '{_kind(local)}' of the sliding-window layers is not one that TRT-LLM runs",
            "it scales the layers with full attention only",
        )
    return full, local


def _kind(rope: Mapping[str, Any]) -> str | None:
    """The type of scaling, None for no scaling."""
    kind = rope.get("rope_type", rope.get("type"))
    if kind is not None and not (isinstance(kind, str) and kind.isidentifier() and len(kind) < 50):
        raise _malformed(f"rope type is {printable(repr(kind))}, expected a name")
    if kind == "su":  # Phi-3's first name for it
        return "longrope"
    return None if kind == "default" else kind


def _scaling(rope: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = _kind(rope)
    if kind is None:
        return None
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    scaling |= {"type": kind, "rope_type": kind}
    if kind in ("llama3", "yarn", "longrope"):
        # In transformers' order: Phi-3 says it beside rope_scaling; without a word the model was never extended.
        key = "original_max_position_embeddings"
        original = _first(raw.get(key), scaling.get(key), raw.get("max_position_embeddings"))
        if original is not None:
            scaling[key] = original
    _check_scaling(kind, scaling)
    return scaling


def _check_scaling(kind: str, scaling: Mapping[str, Any]) -> None:
    for key in _ROPE_NEEDS.get(kind, ()):
        if scaling.get(key) is None:
            raise _malformed(f"rope type '{kind}' lacks '{key}'")
    for key in _ROPE_NUMBERS:
        if scaling.get(key) is not None and not _is_number(scaling[key]):
            raise _malformed(f"rope parameter '{key}' is {printable(repr(scaling[key]))}, expected a number")
    for key in _ROPE_LISTS:
        values = scaling.get(key)
        if values is not None and not (isinstance(values, list) and values and all(map(_is_number, values))):
            raise _malformed(f"rope parameter '{key}' is {printable(repr(values))}, expected a list of numbers")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 2**63 and math.isfinite(value)


def _malformed(cause: str) -> InputError:
    return InputError(f"config.json: {cause}", "download the file again")
