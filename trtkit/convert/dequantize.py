"""What a quantised linear computes with, from the tensors that a checkpoint has of it.

Whatever multiplies the inputs is multiplied into the weight here, so that a plain linear with the result does the same;
how the inputs themselves are rounded is said by `InputRounding`.

Formulas: TensorRT-LLM, tensorrt_llm/quantization/layers.py and modeling_utils.py (preprocess_perlayer_weights).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from trtkit.convert.cast import Array
from trtkit.convert.number_formats import FLOAT8, FLOAT8_MAX, IntegerWeight, unpack_int4
from trtkit.convert.quantization import Format

Tensors = Mapping[str, Array]
"""Suffix -> tensor of one linear, whole."""


@dataclass(frozen=True)
class InputRounding:
    """How the inputs of a linear are quantised.

    Attributes:
        kind: to integers of 8 bits or to float8 e4m3.
        scale: real = quantised * scale; None where every token has its own.
        prequant: (K,) what the inputs are multiplied with before, float32; None for all ones.
    """

    kind: Literal["int8", "fp8"]
    scale: float | None
    prequant: Array | None = None


def dequantize(form: Format, tensors: Tensors, dtype: np.dtype[Any]) -> Array:
    """The weight, float32 (N, K) or (experts, N, K), that gives the same outputs for unscaled inputs.

    Args:
        dtype: that of the model, in which the kernels for int4 hold the scales of groups.
    """
    if form.weight_only:
        return _as_built(form, tensors["weight"])
    weight = _grid(form, tensors, dtype)
    scale = tensors.get("prequant_scaling_factor")
    if scale is not None:
        weight = weight * scale.astype(np.float32)
    if "smoother" in tensors:
        weight = weight / tensors["smoother"].astype(np.float32)
    return weight


def input_rounding(form: Format, tensors: Tensors) -> InputRounding | None:
    """How the inputs are rounded; None where they keep their 16 bits."""
    if form.inputs == "16 bits":
        return None
    prequant = tensors.get("prequant_scaling_factor")
    if "smoother" in tensors:
        prequant = 1 / tensors["smoother"].astype(np.float32).reshape(-1)
    scale = tensors.get("activation_scaling_factor")
    kind: Literal["int8", "fp8"] = "int8" if form.inputs.startswith("int8") else "fp8"
    wide = None if prequant is None else prequant.astype(np.float32)
    return InputRounding(kind, None if scale is None else float(scale[0]), wide)


def _grid(form: Format, tensors: Tensors, dtype: np.dtype[Any]) -> Array:
    weight = tensors["weight"]
    if form.bits == 4:
        return _int4(form, tensors, dtype)
    scale = tensors.get("weights_scaling_factor", tensors.get("per_channel_scale"))
    factors = np.ones(1, np.float32) if scale is None else scale.astype(np.float32)
    if form.name == "int8_sq_plugin":
        factors = factors.reshape(-1, 1)
    elif factors.size > 1 or weight.ndim > 2:
        factors = factors.reshape(*weight.shape[:-2], -1, 1)
    return weight.astype(np.float32) * factors


def _int4(form: Format, tensors: Tensors, dtype: np.dtype[Any]) -> Array:
    weight, scales = tensors["weight"], tensors["weights_scaling_factor"].astype(np.float32)
    outer = tensors.get("weights_scaling_factor_2")
    if outer is None:
        scales = scales.astype(dtype).astype(np.float32)
    else:  # the kernel has the quotient, in float16 whatever the model's dtype is
        scales = (scales / outer).astype(np.float16).astype(np.float32)
    codes = unpack_int4(weight) if weight.ndim == 2 else np.stack([unpack_int4(each) for each in weight])
    flat = IntegerWeight(codes.reshape(-1, codes.shape[-1]), scales.reshape(-1, scales.shape[-1]))
    values = flat.dequantize().reshape(codes.shape)
    if "zero" in tensors:
        zero = tensors["zero"].astype(np.float32).T  # (N, groups), already multiplied with the scale
        values += np.repeat(zero, codes.shape[-1] // zero.shape[-1], axis=-1)
    # The kernel of W4A8 multiplies in float8: what codes and scales make is rounded to it first.
    return values if outer is None else round_float8(values) * outer.astype(np.float32)


def _as_built(form: Format, weight: Array) -> Array:
    codes, scale = built_codes(form, weight)
    return codes * scale


def built_codes(form: Format, weight: Array) -> tuple[Array, Array]:
    """What trtllm-build makes of a plain weight (..., N, K): whole numbers, float32 (..., N, K), and a scale per output
    channel, float32 (..., N, 1), as the weight's dtype holds it. Halves are rounded away from zero.

    Formula: cutlass_preprocessors.cpp, symmetric_quantize.
    """
    levels = 128 if form.bits == 8 else 8
    wide = weight.astype(np.float32)
    scale = np.abs(wide).max(axis=-1, keepdims=True) / levels
    divisor = np.where(scale == 0, np.float32(1), scale)
    codes = wide / divisor
    codes = np.clip(np.trunc(codes + np.copysign(np.float32(0.5), codes)), -levels, levels - 1)
    return codes, scale.astype(weight.dtype).astype(np.float32)


def round_float8(values: Array) -> Array:
    """Float32 values rounded to float8 e4m3, beyond its range to its largest value."""
    return np.clip(values, -FLOAT8_MAX, FLOAT8_MAX).astype(FLOAT8).astype(np.float32)
