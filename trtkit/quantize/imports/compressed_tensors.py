"""Checkpoints of llm-compressor, in the format compressed-tensors: integers packed or not, and float8.

Format (vllm-project/compressed-tensors, src/compressed_tensors/compressors/pack_quantized and naive_quantized): of K
inputs and N outputs, `weight_scale` is (N, K / group), (N, 1) or (1,). "pack-quantized" holds `weight_packed` int32
(N, ceil(K * bits / 32)), consecutive inputs in a word from the lowest bits on, with the middle of the range at zero;
`weight_shape` (N, K); and of asymmetric weights `weight_zero_point`, packed alike along the outputs. "int-quantized"
and "float-quantized" hold `weight` int8 or float8 e4m3 (N, K), and `input_scale` (1,) where inputs have a static scale.
A value is (code - zero) * scale, all signed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trtkit.convert.cast import Array
from trtkit.convert.number_formats import Float8Weight, IntegerWeight
from trtkit.quantize.imports import compressed_tensors_config
from trtkit.quantize.imports import tensors as checked
from trtkit.quantize.imports.patterns import match
from trtkit.quantize.imports.scheme import LinearFormat, Scheme
from trtkit.quantize.imports.tensors import Tensors
from trtkit.safetensors_io import Reader, TensorEntry

METHOD = "compressed-tensors"
SUFFIXES = (
    "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale",
    "input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point", "k_scale", "v_scale",
    "q_scale",
)  # fmt: skip
"""What this format keeps of a linear or its attention, besides weight and bias."""

_FOREIGN = ("weight_g_idx", "weight_global_scale", "input_global_scale")
"""What a linear has in the variants that are not imported."""


def parse(config: Mapping[str, Any], file: Path) -> Scheme:
    """What a quantisation config says.

    Args:
        config: config.json's `quantization_config` or, in old checkpoints, `compression_config`.
        file: where it is from.

    Raises:
        InputError: something that is not imported, or a malformed key.
    """
    return compressed_tensors_config.parse(METHOD, config, file)


def format_of(module: str, scheme: Scheme) -> LinearFormat | None:
    """What the config says of a linear, None for nothing.

    In upstream's order (compressed_tensors/utils/match.py, match_targets): names, patterns, then the class.
    """
    if any(_matches(module, pattern) for pattern in scheme.excluded):
        return None
    for target, linear in scheme.targets:
        if target == "*" or _matches(module, target):
            return linear
    return None


def check(module: str, scheme: Scheme, tensors: Tensors, reader: Reader) -> LinearFormat | None:
    """The format of a module as its tensors have it, looked at without reading its weight; None: not quantised.

    Raises:
        InputError: a tensor is missing, or is not what the config says.
    """
    linear = format_of(module, scheme)
    if not checked.quantised(module, scheme, tensors, ("weight_packed", "weight_scale", *_FOREIGN), linear is None):
        return None
    assert linear is not None  # noqa: S101 - `quantised` refuses excluded modules
    for suffix in _FOREIGN:
        if f"{module}.{suffix}" in tensors:
            raise scheme.refuse(f"'{module}' has a tensor {suffix}, which none of the formats that are imported has")
    if linear.kind == "int" and (linear.bits == 4 or f"{module}.weight_packed" in tensors):
        outputs, inputs = _check_packed(module, scheme, tensors, linear, reader)
    else:
        stored = checked.need(scheme, tensors, f"{module}.weight", ("I8" if linear.kind == "int" else "F8_E4M3",))
        outputs, inputs = stored.shape
    _check_scales(module, scheme, tensors, linear, (outputs, inputs))
    if linear.inputs == "static":
        checked.need(scheme, tensors, f"{module}.input_scale", checked.FLOATS, *checked.SCALAR)
    _check_symmetric(module, scheme, tensors, linear, reader)
    return linear


def read(module: str, scheme: Scheme, tensors: Tensors, reader: Reader) -> IntegerWeight | Float8Weight | None:
    """The weight of a module, None where it is not quantised.

    Raises:
        InputError: as `check`, or a scale that is no finite number.
    """
    linear = check(module, scheme, tensors, reader)
    if linear is None:
        return None
    scales = checked.floats(reader, tensors[f"{module}.weight_scale"])
    input_scale = None
    if linear.inputs == "static":
        input_scale = checked.scalar(reader, tensors[f"{module}.input_scale"])
    if linear.kind == "float8":
        return Float8Weight(reader.tensor(tensors[f"{module}.weight"]), scales.reshape(-1), input_scale)
    if f"{module}.weight_packed" in tensors:
        outputs, inputs = _shape(tensors[f"{module}.weight_shape"], reader)
        words = reader.tensor(tensors[f"{module}.weight_packed"])
        codes = np.ascontiguousarray(checked.signed(checked.unpack(words, linear.bits)[:, :inputs], linear.bits))
    else:
        codes = reader.tensor(tensors[f"{module}.weight"])
        outputs = codes.shape[0]
    if linear.scales == "tensor":
        scales = np.full((outputs, 1), scales.reshape(-1)[0], np.float32)
    zeros = None if linear.symmetric else _zeros(tensors[f"{module}.weight_zero_point"], outputs, linear, reader)
    return IntegerWeight(codes, scales, zeros, linear.bits, input_scale=input_scale)


def read_kv_scales(attention: str, scheme: Scheme, tensors: Tensors, reader: Reader) -> tuple[float, float] | None:
    """The scales of keys and values in the cache (real = stored * scale), None where the files have none.

    Args:
        attention: name of the attention module, `model.layers.0.self_attn`.

    Raises:
        InputError: only one is there, or no finite number.
    """
    # Old releases named them after the outputs of the projections.
    for names in (("k_scale", "v_scale"), ("k_proj.output_scale", "v_proj.output_scale")):
        found = [f"{attention}.{name}" for name in names]
        if scheme.kv_cache is not None and any(name in tensors for name in found):
            entries = [checked.need(scheme, tensors, name, checked.FLOATS, *checked.SCALAR) for name in found]
            return checked.scalar(reader, entries[0]), checked.scalar(reader, entries[1])
    return None


def _matches(module: str, pattern: str) -> bool:
    return match(pattern[3:], module) if pattern.startswith("re:") else pattern == module


def _check_packed(
    module: str, scheme: Scheme, tensors: Tensors, linear: LinearFormat, reader: Reader
) -> tuple[int, int]:
    checked.refuse_twice(module, scheme, tensors)
    packed = checked.need(scheme, tensors, f"{module}.weight_packed", ("I32",))
    shape = checked.need(scheme, tensors, f"{module}.weight_shape", ("I64", "I32"), (2,))
    outputs, inputs = _shape(shape, reader)
    if packed.shape != (outputs, -(-inputs * linear.bits // 32)):
        raise checked.wrong(packed, f"of shape {list(packed.shape)} does not hold the {outputs} x {inputs} weights")
    return outputs, inputs


def _check_scales(module: str, scheme: Scheme, tensors: Tensors, linear: LinearFormat, shape: tuple[int, int]) -> None:
    outputs, inputs = shape
    shapes: tuple[tuple[int, ...], ...] = {
        "tensor": checked.SCALAR, "channel": ((outputs, 1), (outputs,)), "group": ((outputs, -1),),
    }[linear.scales]  # fmt: skip
    scales = checked.need(scheme, tensors, f"{module}.weight_scale", checked.FLOATS, *shapes)
    if linear.scales == "group":
        checked.groups(scales, 1, inputs, linear.group_size)
    if not linear.symmetric:
        groups = scales.shape[-1] if len(scales.shape) == 2 else 1
        packed = -(-outputs * linear.bits // 32)
        zeros = checked.need(scheme, tensors, f"{module}.weight_zero_point", ("I32", "I8"))
        if zeros.shape != (packed if zeros.dtype.itemsize == 4 else outputs, groups):
            raise checked.wrong(zeros, f"of shape {list(zeros.shape)} does not hold {outputs} x {groups} zero points")


def _check_symmetric(module: str, scheme: Scheme, tensors: Tensors, linear: LinearFormat, reader: Reader) -> None:
    """Old checkpoints keep the zero points of symmetric weights and inputs, which must then be zero."""
    for suffix in ("weight_zero_point", "input_zero_point"):
        entry = tensors.get(f"{module}.{suffix}")
        if entry is None or (suffix == "weight_zero_point" and not linear.symmetric):
            continue
        if reader.tensor(entry).astype(np.float32).any():
            raise scheme.refuse(f"tensor '{entry.name}' is not zero, though the config says symmetric")


def _shape(entry: TensorEntry, reader: Reader) -> tuple[int, int]:
    outputs, inputs = (int(extent) for extent in reader.tensor(entry))
    if not (0 < outputs < 1 << 31 and 0 < inputs < 1 << 31):
        raise checked.wrong(entry, f"holds no shape of a weight: {outputs} x {inputs}")
    return outputs, inputs


def _zeros(entry: TensorEntry, outputs: int, linear: LinearFormat, reader: Reader) -> Array | None:
    """int8 (N, K / group). Old releases stored them so, newer ones pack them along the outputs."""
    zeros = reader.tensor(entry)
    if entry.dtype.itemsize == 4:
        zeros = checked.signed(checked.unpack(zeros.T, linear.bits)[:, :outputs], linear.bits).T
    return checked.zeros_or_none(zeros)
