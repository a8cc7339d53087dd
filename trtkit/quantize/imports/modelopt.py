"""Checkpoints of NVIDIA's Model-Optimizer in the Hugging Face layout: FP8, INT4 AWQ, W4A8, SmoothQuant, INT8.

Format (Model-Optimizer, modelopt/torch/export: unified_export_hf.py, quant_utils.py, convert_hf_config.py): of K inputs
and N outputs, `weight` float8 e4m3 (N, K), int8 (N, K), or uint8 (N / 2, K) of two outputs' int4 each; `weight_scale`
float32, one element, (N,) or (N, K / group); `input_scale` float32, one element, where inputs are quantised;
`pre_quant_scale` (K,), what inputs are multiplied with; `weight_scale_2`, W4A8's scale of the float8 that its int4
become. A value is code * weight_scale.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from trtkit.convert.number_formats import Float8Weight, IntegerWeight, unpack_int4
from trtkit.quantize.imports import tensors as checked
from trtkit.quantize.imports.scheme import LinearFormat, Scheme, key, names, one_of, refusal
from trtkit.quantize.imports.tensors import Tensors
from trtkit.safetensors_io import Reader
from trtkit.untrusted import printable, read_json

METHOD = "modelopt"
CONFIG = "hf_quant_config.json"
SUFFIXES = (
    "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale", "k_scale", "v_scale", "k_bias", "v_bias",
)  # fmt: skip
"""What this format keeps of a linear, besides weight and bias."""

_MIXED = "MIXED_PRECISION"
_LINEARS: dict[str, LinearFormat] = {
    "FP8": LinearFormat("float8", 8, "tensor", inputs="static", input_kind="float8"),
    "FP8_PER_CHANNEL_PER_TOKEN": LinearFormat("float8", 8, "channel", inputs="dynamic", input_kind="float8"),
    "W4A16_AWQ": LinearFormat("int", 4, "group"),
    "W4A8_AWQ": LinearFormat("int", 4, "group", inputs="static", input_kind="float8"),
    "W8A8_SQ_PER_CHANNEL": LinearFormat("int", 8, "channel", inputs="static", input_kind="int8"),
    "W8A16": LinearFormat("int", 8, "channel"),
}
"""quant_algo -> how its linears lie. Groups have the size that the tensors say, which config.json leaves out."""


def parse(config: Mapping[str, Any], file: Path) -> Scheme:
    """What a quantisation config says.

    Args:
        config: `quantization` of hf_quant_config.json, or config.json's `quantization_config`.
        file: where it is from.

    Raises:
        InputError: something that is not imported, or a malformed key.
    """
    algo = key(config, "quant_algo", str, "", file)
    targets: tuple[tuple[str, LinearFormat], ...] = ()  # of a checkpoint whose KV cache alone is quantised
    if algo == _MIXED:
        layers = key(config, "quantized_layers", dict, {}, file) or _layers(file)
        if not layers:
            raise refusal(file, f"{_MIXED} without quantized_layers does not say which linear lies how")
        targets = tuple(
            (name, _linear(key(layers, name, dict, {}, file), file, f"'{printable(name)}' with ")) for name in layers
        )
    elif algo:
        targets = (("*", _linear(config, file, "")),)
    excluded = names(config, "exclude_modules", file) or names(config, "ignore", file)
    return Scheme(METHOD, file, targets, excluded, _kv_cache(config, file))


def _layers(file: Path) -> dict[str, Any]:
    """The formats of the layers from quant_cfg.json, where older releases put them."""
    other = file.parent / "quant_cfg.json"
    return key(read_json(other), "quantized_layers", dict, {}, other) if other.is_file() else {}


def _linear(section: Mapping[str, Any], file: Path, place: str) -> LinearFormat:
    algo = key(section, "quant_algo", str, "", file)
    linear = _LINEARS[one_of(algo, tuple(_LINEARS), f"{place}quant_algo", file)]
    if key(section, "has_zero_point", bool, False, file):
        raise refusal(file, f"{place}{algo} with zero points is not one that Model-Optimizer writes or trtkit imports")
    size = key(section, "group_size", int, 0, file)
    if linear.scales != "group" or not size:
        return linear
    if size < 0:
        raise refusal(file, f"{place}group size {printable(size)}, expected a positive number")
    return LinearFormat(linear.kind, linear.bits, "group", size, inputs=linear.inputs, input_kind=linear.input_kind)


def _kv_cache(config: Mapping[str, Any], file: Path) -> Literal["FP8", "INT8"] | None:
    scheme = config.get("kv_cache_scheme")
    if isinstance(scheme, dict):  # config.json spells FP8 as its settings, and others by their name
        plain = {"num_bits": scheme.get("num_bits"), "type": scheme.get("type"), "dynamic": scheme.get("dynamic")}
        if plain != {"num_bits": 8, "type": "float", "dynamic": False}:
            raise refusal(file, f"kv_cache_scheme {printable(scheme)} is not one that trtkit imports")
        return "FP8"
    name = key(config, "kv_cache_quant_algo", str, key(config, "kv_cache_scheme", str, "", file), file)
    for known in ("FP8", "INT8"):
        if name == known:
            return known
    if name:
        raise refusal(file, f"a KV cache of {printable(name)} is not one that trtkit imports (it imports FP8 and INT8)")
    return None


def format_of(module: str, scheme: Scheme) -> LinearFormat | None:
    """What the config says of a linear, None for nothing: of names listed with `*`, any that matches counts."""
    if any(fnmatch.fnmatchcase(module, pattern) for pattern in scheme.excluded):
        return None
    return next((linear for target, linear in scheme.targets if target in ("*", module)), None)


def check(module: str, scheme: Scheme, tensors: Tensors, reader: Reader) -> LinearFormat | None:
    """The format of a module as its tensors have it, looked at without reading its weight; None: not quantised.

    Raises:
        InputError: a tensor is missing, or is not what the config says.
    """
    linear = format_of(module, scheme)
    marks = ("weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")
    if not checked.quantised(module, scheme, tensors, marks, linear is None):
        return None
    assert linear is not None  # noqa: S101 - `quantised` refuses excluded modules
    kind = "F8_E4M3" if linear.kind == "float8" else "U8" if linear.bits == 4 else "I8"
    weight = checked.need(scheme, tensors, f"{module}.weight", (kind, "I8") if linear.bits == 4 else (kind,))
    outputs, inputs = weight.shape[0] * 8 // linear.bits, weight.shape[1]
    shapes: tuple[tuple[int, ...], ...] = {
        "tensor": checked.SCALAR, "channel": ((outputs,), (outputs, 1)), "group": ((outputs, -1),),
    }[linear.scales]  # fmt: skip
    scales = checked.need(scheme, tensors, f"{module}.weight_scale", checked.FLOATS, *shapes)
    if linear.scales == "group":
        checked.groups(scales, 1, inputs, linear.group_size)
    has_inputs = linear.inputs == "static"
    needed = {"input_scale": has_inputs, "weight_scale_2": has_inputs and linear.bits == 4}
    for suffix, is_needed in needed.items():
        if is_needed:
            checked.need(scheme, tensors, f"{module}.{suffix}", checked.FLOATS, *checked.SCALAR)
        elif f"{module}.{suffix}" in tensors:
            raise scheme.refuse(f"'{module}' has a tensor {suffix}, which its quant_algo does not have")
    if f"{module}.pre_quant_scale" in tensors:
        if linear.kind == "float8":
            raise scheme.refuse(f"'{module}' has a tensor pre_quant_scale, which its quant_algo does not have")
        checked.need(scheme, tensors, f"{module}.pre_quant_scale", checked.FLOATS, (inputs,))
    if linear.scales != "group":
        return linear
    size = inputs // scales.shape[1]
    return LinearFormat(linear.kind, linear.bits, "group", size, inputs=linear.inputs, input_kind=linear.input_kind)


def read(module: str, scheme: Scheme, tensors: Tensors, reader: Reader) -> IntegerWeight | Float8Weight | None:
    """The weight of a module, None where it is not quantised.

    Raises:
        InputError: as `check`, or a scale that is no finite number.
    """
    linear = check(module, scheme, tensors, reader)
    if linear is None:
        return None
    weight = reader.tensor(tensors[f"{module}.weight"])
    scales = checked.floats(reader, tensors[f"{module}.weight_scale"])
    input_scale = None
    if linear.inputs == "static":
        input_scale = checked.scalar(reader, tensors[f"{module}.input_scale"])
    if linear.kind == "float8":
        return Float8Weight(weight, scales.reshape(-1), input_scale)
    prequant = tensors.get(f"{module}.pre_quant_scale")
    return IntegerWeight(
        codes=unpack_int4(weight) if linear.bits == 4 else weight,
        scales=scales.reshape(scales.shape[0], -1),
        bits=linear.bits,
        prequant=None if prequant is None else checked.floats(reader, prequant),
        input_scale=input_scale,
    )


def read_second_scale(module: str, scheme: Scheme, tensors: Tensors, reader: Reader) -> float | None:
    """W4A8's scale of the float8 that a module's int4 become on the way into the kernel, None in other formats.

    It does not change the values that `read` gives, but the checkpoint needs it (`weights_scaling_factor_2`).

    Raises:
        InputError: as `check`, or no finite number.
    """
    linear = check(module, scheme, tensors, reader)
    if linear is None or linear.bits != 4 or linear.inputs is None:
        return None
    return checked.scalar(reader, tensors[f"{module}.weight_scale_2"])


def read_kv_scales(attention: str, scheme: Scheme, tensors: Tensors, reader: Reader) -> tuple[float, float] | None:
    """The scales of keys and values in the cache (real = stored * scale), None where the files have none.

    Args:
        attention: name of the attention module, `model.layers.0.self_attn`.

    Raises:
        InputError: only one is there, one is no finite number, or the cache also has offsets.
    """
    for name in (f"{attention}.k_proj.k_bias", f"{attention}.v_proj.v_bias"):
        if name in tensors:
            raise scheme.refuse(f"tensor '{name}': a KV cache with offsets is not one that trtkit imports")
    found = [f"{attention}.k_proj.k_scale", f"{attention}.v_proj.v_scale"]
    if scheme.kv_cache is None or not any(name in tensors for name in found):
        return None
    entries = [checked.need(scheme, tensors, name, checked.FLOATS, *checked.SCALAR) for name in found]
    return checked.scalar(reader, entries[0]), checked.scalar(reader, entries[1])
