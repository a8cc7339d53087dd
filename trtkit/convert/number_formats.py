"""Numbers of fewer bits: weights as integers on a grid or as 8-bit floats, and how int4 lies in bytes.

A linear's weight is `(out_features, in_features)`, written (N, K) here. Nothing is fitted in this module: scales come
from whoever quantises or from a file.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from trtkit.convert.cast import Array

FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
FLOAT8_MAX = 448.0
INT4_MIN, INT4_MAX = -8, 7


@dataclass(frozen=True)
class IntegerWeight:
    """A weight on a grid of integers: value = (codes - zeros) * scales, for each group of inputs.

    Attributes:
        codes: int8 (N, K): -8 to 7 (4 bits) or -128 to 127 (8 bits).
        scales: float32 (N, K / group size); one group (N, 1) is a scale per output channel.
        zeros: int8, shape of `scales`; None where zero is zero.
        bits: 4 or 8.
        prequant: (K,), what the inputs are multiplied with before; None for all ones.
        input_scale: the static scale of quantised inputs (real = quantised * scale); None where they are not quantised
            or each token gets its own.
    """

    codes: Array
    scales: Array
    zeros: Array | None = None
    bits: int = 4
    prequant: Array | None = None
    input_scale: float | None = None

    @property
    def group_size(self) -> int:
        return int(self.codes.shape[1] // self.scales.shape[1])

    def dequantize(self) -> Array:
        """float32 (N, K), without `prequant`: what the kernel multiplies the scaled inputs with."""
        rows, columns = self.codes.shape
        values = self.codes.reshape(rows, -1, self.group_size).astype(np.float32)
        if self.zeros is not None:
            values -= self.zeros[:, :, None].astype(np.float32)
        values *= self.scales[:, :, None].astype(np.float32)
        return values.reshape(rows, columns)


@dataclass(frozen=True)
class Float8Weight:
    """A weight in float8 e4m3: value = values * scales.

    Attributes:
        values: float8_e4m3fn (N, K).
        scales: float32: (1,) for the whole tensor, or (N,) per output channel.
        input_scale: the static scale of quantised inputs; None where each token gets its own.
    """

    values: Array
    scales: Array
    input_scale: float | None = None

    def dequantize(self) -> Array:
        """float32 (N, K)."""
        return self.values.astype(np.float32) * self.scales.astype(np.float32).reshape(-1, 1)


def pack_int4(codes: Array) -> Array:
    """Two's-complement int4 codes, int8 (N, K), as int8 (N/2, K): the even output row in the low four bits.

    Format: Model-Optimizer, modelopt/torch/export/quant_utils.py (pack_int4_in_uint8).
    """
    low, high = codes[0::2].astype(np.uint8), codes[1::2].astype(np.uint8)
    return ((low & 15) | (high << 4)).view(np.int8)


def unpack_int4(packed: Array) -> Array:
    """The inverse of `pack_int4`: int8 (N/2, K), or the same bytes as uint8, to codes int8 (N, K)."""
    signed = packed.view(np.int8)
    codes = np.empty((2 * signed.shape[0], *signed.shape[1:]), np.int8)
    codes[0::2] = (signed << 4) >> 4
    codes[1::2] = signed >> 4
    return codes
