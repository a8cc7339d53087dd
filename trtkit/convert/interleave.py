"""The weight layout of TensorRT-LLM's CUTLASS kernels for integer weights and float activations, in both directions.

Most checkpoints hold weights as they are, and the engine build brings them into this layout. A checkpoint of
`W4A16_GPTQ` or `W8A16_GPTQ`, the algorithms with a zero point, holds it already, so it fits the GPUs that it was made
for and no others.

Source of the layout: TensorRT-LLM, tensorrt_llm/quantization/functional.py (preprocess_weights_for_mixed_gemm) and its
twin in C++, cutlass_preprocessors.cpp. Of the tensors: the same file, postprocess_weight_only_groupwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from trtkit.convert.cast import Array
from trtkit.convert.number_formats import IntegerWeight
from trtkit.errors import InputError

_ROWS = {
    (16, 8): (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15),
    (16, 4): (0, 1, 8, 9, 16, 17, 24, 25, 2, 3, 10, 11, 18, 19, 26, 27,
              4, 5, 12, 13, 20, 21, 28, 29, 6, 7, 14, 15, 22, 23, 30, 31),
    (8, 4): (0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23,
             8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31),
}  # fmt: skip
"""(bits of an activation, bits of a weight) -> the old row that each new row of a block takes."""

_WITHIN = {8: (0, 2, 1, 3), 4: (0, 2, 4, 6, 1, 3, 5, 7)}
"""Bits of a weight -> the order within the 32 bits that a thread turns into floats at once."""

_COLUMNS = 8
"""What the number of output features must be a multiple of."""


@dataclass(frozen=True)
class _Layout:
    """How the weights of one kernel lie.

    Attributes:
        rows: the order of input features within a block of `len(rows)`.
        within: the order within 32 bits.
        columns: how many output features are interleaved; 1 for none.
        tile: how many input features of one output feature lie together where they are.
        plain: nothing of all that: signed codes, one output feature after the other.
    """

    bits: int
    rows: tuple[int, ...]
    within: tuple[int, ...]
    columns: int
    tile: int
    plain: bool


def interleave(codes: Array, bits: int, activation_bits: int, sm: int) -> Array:
    """Weights in the order and encoding in which the kernel reads them.

    Args:
        codes: signed integers, int8 (K, N) or, of E experts, (E, K, N): input features first.
        bits: 4 or 8, of a weight.
        activation_bits: 16 (float16, bfloat16) or 8 (float8, with 4-bit weights only).
        sm: compute capability of the GPU as one number, 89 for 8.9.

    Returns:
        int8 (K, N * bits / 8) or (E, K, N * bits / 8). The shape is nominal: what lies where is the kernel's business.

    Raises:
        InputError: a shape, a width or a GPU that the kernel does not take.
    """
    stack = codes if codes.ndim == 3 else codes[None]
    experts, inputs, outputs = stack.shape
    layout = _layout(bits, activation_bits, sm, experts=codes.ndim == 3)
    _check(inputs, outputs, layout)
    shape = (*codes.shape[:-1], outputs * bits // 8)
    if layout.plain:
        return _pack(np.ascontiguousarray(stack.transpose(0, 2, 1)).view(np.uint8), bits).reshape(shape)
    blocks = stack.reshape(experts, -1, len(layout.rows), outputs)[:, :, layout.rows]
    columns = blocks.reshape(experts, inputs, outputs).transpose(0, 2, 1)
    tiles = columns.reshape(experts, -1, layout.columns, inputs // layout.tile, layout.tile).transpose(0, 1, 3, 2, 4)
    words = tiles.reshape(-1, len(layout.within))[:, layout.within]
    return _pack(words.view(np.uint8) + np.uint8(1 << (bits - 1)), bits).reshape(shape)


def deinterleave(packed: Array, bits: int, activation_bits: int, sm: int) -> Array:
    """The inverse of `interleave`.

    Args:
        packed: (K, N * bits / 8) or (E, K, N * bits / 8), of any dtype of one byte.

    Returns:
        int8 (K, N) or (E, K, N).

    Raises:
        InputError: as `interleave`.
    """
    stack = packed.view(np.uint8) if packed.ndim == 3 else packed.view(np.uint8)[None]
    experts, inputs, outputs = stack.shape[0], stack.shape[1], stack.shape[2] * 8 // bits
    layout = _layout(bits, activation_bits, sm, experts=packed.ndim == 3)
    _check(inputs, outputs, layout)
    stream = _unpack(stack.reshape(-1), bits)
    if layout.plain:
        columns = (stream << (8 - bits)).view(np.int8).reshape(experts, outputs, inputs) >> (8 - bits)
        return np.ascontiguousarray(columns.transpose(0, 2, 1)).reshape(*packed.shape[:-1], outputs)
    words = (stream - np.uint8(1 << (bits - 1))).view(np.int8)
    words = words.reshape(-1, len(layout.within))[:, _inverse(layout.within)]
    tiles = words.reshape(experts, -1, inputs // layout.tile, layout.columns, layout.tile).transpose(0, 1, 3, 2, 4)
    blocks = tiles.reshape(experts, outputs, inputs).transpose(0, 2, 1)
    rows = blocks.reshape(experts, -1, len(layout.rows), outputs)[:, :, _inverse(layout.rows)]
    return np.ascontiguousarray(rows).reshape(*packed.shape[:-1], outputs)


@dataclass(frozen=True)
class Rounded:
    """What the dtype of a checkpoint could not hold of a quantised weight: how many of its scales and zeros changed."""

    scales: int = 0
    zeros: int = 0


def gptq_tensors(weight: IntegerWeight, dtype: np.dtype[Any], sm: int) -> tuple[dict[str, Array], Rounded]:
    """A weight as a linear of `W4A16_GPTQ` (4 bits) or `W8A16_GPTQ` (8 bits) holds it.

    Args:
        weight: (N, K), with zeros or without.
        dtype: float16 or bfloat16, the checkpoint's.
        sm: the GPU that it is for, 89 for 8.9.

    Returns:
        `weight`, dtype (K, N * bits / 16): bytes of `interleave`, in the guise of floats;
        `weights_scaling_factor`, dtype (K / group, N);
        `zero`, dtype (K / group, N): -zeros * scale, so that a value is code * scale + zero;
        and how many of the last two the dtype had to round.

    Raises:
        InputError: the kernel does not take the shape or the GPU; a scale overflows; the inputs are scaled or
            quantised, which this format does not know.
    """
    if weight.prequant is not None or weight.input_scale is not None:
        raise InputError(
            f"W{weight.bits}A16_GPTQ knows neither scaled nor quantised inputs",
            "use W4A16_AWQ, W4A8_AWQ or SmoothQuant",
        )
    packed = interleave(weight.codes.T, weight.bits, 16, sm)
    scales = _narrow(weight.scales.T, dtype)
    # From the scale as it is stored, as TensorRT-LLM does: the kernel adds what it multiplied with the stored one.
    exact = scales.astype(np.float32) * (0.0 if weight.zeros is None else -weight.zeros.T.astype(np.float32))
    zeros = _narrow(exact + 0.0, dtype)  # no negative zeros
    rounded = Rounded(
        int(np.count_nonzero(scales.astype(np.float32) != weight.scales.T)),
        int(np.count_nonzero(zeros.astype(np.float32) != exact)),
    )
    return {"weight": packed.view(dtype), "weights_scaling_factor": scales, "zero": zeros}, rounded


def gptq_values(weight: Array, scales: Array, zero: Array, bits: int, sm: int) -> Array:
    """The inverse of `gptq_tensors`: what the kernel multiplies with, in float32.

    Args:
        weight: 16-bit floats (K, N * bits / 16).
        scales: (K / group, N).
        zero: like `scales`.

    Returns:
        float32 (N, K): code * scale + zero.
    """
    codes = deinterleave(np.ascontiguousarray(weight).view(np.int8), bits, 16, sm)
    groups = codes.reshape(scales.shape[0], -1, codes.shape[1]).astype(np.float32)
    groups *= scales[:, None].astype(np.float32)
    groups += zero[:, None].astype(np.float32)
    return np.ascontiguousarray(groups.reshape(codes.shape).T)


def _narrow(values: Array, dtype: np.dtype[Any]) -> Array:
    with np.errstate(over="ignore"):
        narrow = np.ascontiguousarray(values.astype(dtype))
    if not np.isfinite(narrow.astype(np.float32)).all():
        raise InputError(f"a scale of a quantised weight overflows {dtype.name}", "convert to bfloat16")
    return narrow


def _layout(bits: int, activation_bits: int, sm: int, *, experts: bool) -> _Layout:
    if (activation_bits, bits) not in _ROWS:
        raise InputError(
            f"TensorRT-LLM has no kernel for {bits}-bit weights with {activation_bits}-bit activations",
            "it has weights of 4 or 8 bits with 16, and weights of 4 bits with 8",
        )
    if sm >= 120 or (experts and sm >= 90):  # kernels of the GPUs before them
        sm = 80
    plain = sm in (100, 103)
    if not (75 <= sm <= 90 or plain):
        raise InputError(f"sm {sm}: no weight layout is known for this GPU", "known: 75 to 90, 100, 103, 120 and later")
    columns = activation_bits // bits if sm < 90 else 1
    tile = 1024 // activation_bits
    return _Layout(bits, _ROWS[activation_bits, bits], _WITHIN[bits], columns, tile if columns > 1 else 1, plain)


def _check(inputs: int, outputs: int, layout: _Layout) -> None:
    multiple = max(len(layout.rows), layout.tile)
    if inputs % multiple or outputs % _COLUMNS:
        raise InputError(
            f"a linear of {inputs} inputs and {outputs} outputs does not fit TensorRT-LLM's {layout.bits}-bit kernel",
            f"inputs must be a multiple of {multiple}, outputs of {_COLUMNS}, on each GPU: choose a smaller TP",
        )


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(i) for i in range(len(order)))


def _pack(values: Array, bits: int) -> Array:
    """Bytes that hold a code each, or its lower four bits, as int8: of two, the first in the lower half."""
    flat = values.reshape(-1)
    return (flat if bits == 8 else (flat[0::2] & 15) | (flat[1::2] << 4)).view(np.int8)


def _unpack(packed: Array, bits: int) -> Array:
    """The inverse of `_pack`: uint8, one code each; four bits are the lower ones."""
    if bits == 8:
        return packed
    values = np.empty(2 * packed.size, np.uint8)
    values[0::2] = packed & 15
    values[1::2] = packed >> 4
    return values
