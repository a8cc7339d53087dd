"""Changes of dtype, rounded to nearest even as torch does, with an account of what they did to the values."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from trtkit.errors import InputError
from trtkit.safetensors_io import TensorEntry

Array = npt.NDArray[Any]

_EXACT, _ROUNDED, _FLUSHED, _OVERFLOW = range(4)
"""What becomes of a value. Only finite values are told apart from exact ones: NaN and infinity stay what they are."""


_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_CHUNK = 1 << 20
"""Elements converted at once. Threads take turns after each step, so small ones cost more than they save."""


@dataclass
class CastReport:
    """What changes of dtype did to finite values.

    Attributes:
        rounded: elements whose value changed, those below included.
        flushed: nonzero elements that became zero.
        saturated: elements beyond the range that became the largest finite value.
    """

    rounded: int = 0
    flushed: int = 0
    saturated: int = 0

    def add(self, other: CastReport) -> None:
        self.rounded += other.rounded
        self.flushed += other.flushed
        self.saturated += other.saturated


def cast(
    values: Array,
    dtype: np.dtype[Any],
    entry: TensorEntry,
    report: CastReport,
    *,
    plus: float = 0.0,
    saturate: bool = False,
    scratch: Array | None = None,
) -> Array:
    """`values + plus` in another dtype (the sum in float32); the same array when nothing changes.

    Args:
        values: float16, bfloat16 or float32.
        entry: the tensor they are from, for messages.
        report: is added to.
        saturate: finite values beyond the range become the largest finite one instead of an error.
        scratch: bytes that the result may lie in, if there are enough; otherwise it has memory of its own.

    Raises:
        InputError: a finite value would become infinite; names the tensor and the value.
    """
    if plus:
        values = values.astype(np.float32) + np.float32(plus)
    if values.dtype == dtype:
        return values
    if values.dtype.itemsize == 2:
        result = _by_table(values, dtype, entry, report, saturate, scratch)
    else:
        result = _from_float32(values, dtype, entry, report, saturate)
    return result


def _by_table(
    values: Array,
    dtype: np.dtype[Any],
    entry: TensorEntry,
    report: CastReport,
    saturate: bool,
    scratch: Array | None,
) -> Array:
    """A 16-bit float has so few values that each can be looked up. Where all but a few follow one simple rule, that is
    faster still, and only the rest is looked up."""
    table = _table(values.dtype, dtype, saturate)
    bits = np.ascontiguousarray(values).view(np.uint16).reshape(-1)
    nbytes = bits.size * dtype.itemsize
    result = np.empty(bits.size, dtype) if scratch is None or scratch.size < nbytes else scratch[:nbytes].view(dtype)
    lookup = result.view(table.results.dtype)
    for start in range(0, len(bits), _CHUNK):
        chunk, out = bits[start : start + _CHUNK], lookup[start : start + _CHUNK]
        if values.dtype == _BFLOAT16 and dtype == np.float16:
            rest = _bfloat16_to_float16(chunk, out)
            chunk = chunk[rest]
            out[rest] = table.results[chunk]
        else:
            # No index is out of range; `wrap` only skips the check.
            np.take(table.results, chunk, mode="wrap", out=out)
        if not table.always_exact:
            _account(chunk, table, dtype, entry, report, saturate)
    return result.reshape(values.shape)


def _bfloat16_to_float16(bits: Array, out: Array) -> Array:
    """Converts what is a normal number in both, from 2^-14 up to 2^16: the exponent's bias falls from 127 to 15, and
    the significand gets 3 more bits. The indices of all others."""
    np.bitwise_and(bits, 0x7FFF, out=out)
    np.subtract(out, 0x3880, out=out)  # smaller numbers wrap around to large ones
    rest = np.flatnonzero(out >= 0x4780 - 0x3880)
    np.add(out, 0x3880 - ((127 - 15) << 7), out=out)
    np.left_shift(out, 3, out=out)
    np.bitwise_or(out, bits & 0x8000, out=out)
    return rest


def _account(
    bits: Array, table: _Table, dtype: np.dtype[Any], entry: TensorEntry, report: CastReport, saturate: bool
) -> None:
    kinds = table.kinds[bits]
    if not kinds.any():
        return
    rounded, flushed, overflow = np.bincount(kinds, minlength=4)[1:]
    if overflow and not saturate:
        raise _overflow(bits[kinds == _OVERFLOW].view(table.source), dtype=dtype.name, entry=entry)
    report.rounded += int(rounded + flushed + overflow)
    report.flushed += int(flushed)
    report.saturated += int(overflow)


@dataclass(frozen=True)
class _Table:
    """A change of dtype, spelt out for every 16-bit pattern.

    Attributes:
        source: dtype of the patterns.
        results: `[65536]`, in bits: uint16 or uint32.
        kinds: uint8 `[65536]`.
    """

    source: np.dtype[Any]
    results: Array
    kinds: Array
    always_exact: bool


@cache
def _table(source: np.dtype[Any], dtype: np.dtype[Any], saturate: bool) -> _Table:
    wide = np.arange(1 << 16, dtype=np.uint16).view(source).astype(np.float32)
    results, kinds = _round(wide, dtype)
    if saturate:
        results = np.where(kinds == _OVERFLOW, np.copysign(_largest(dtype), wide).astype(dtype), results)
    bits = results.astype(dtype).view(np.dtype(f"u{dtype.itemsize}"))
    return _Table(source, bits, kinds, not kinds.any())


def _from_float32(values: Array, dtype: np.dtype[Any], entry: TensorEntry, report: CastReport, saturate: bool) -> Array:
    result, kinds = _round(values, dtype)
    if kinds.any():
        rounded, flushed, overflow = np.bincount(kinds.reshape(-1), minlength=4)[1:]
        if overflow:
            beyond = kinds == _OVERFLOW
            if not saturate:
                raise _overflow(values[beyond], dtype=dtype.name, entry=entry)
            result[beyond] = np.copysign(_largest(dtype), values[beyond]).astype(dtype)
        report.rounded += int(rounded + flushed + overflow)
        report.flushed += int(flushed)
        report.saturated += int(overflow)
    return result


def _round(wide: Array, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """Float32 values in another dtype, and what became of each."""
    with np.errstate(over="ignore", invalid="ignore"):
        result = wide.astype(dtype)
    back = result.astype(np.float32)
    changed = back != wide
    kinds = changed.astype(np.uint8)  # _ROUNDED where they differ
    if changed.any():
        kinds[np.isnan(wide)] = _EXACT
        kinds[changed & (back == 0)] = _FLUSHED
        kinds[np.isinf(back) & np.isfinite(wide)] = _OVERFLOW
    return result, kinds


def _largest(dtype: np.dtype[Any]) -> Any:
    return np.float32(ml_dtypes.finfo(dtype).max)


def _overflow(values: Array, *, dtype: str, entry: TensorEntry) -> InputError:
    largest = float(np.abs(values.astype(np.float32)).max())
    return InputError(
        f"{entry.path}: tensor '{entry.name}' holds {largest:.3g}, which overflows {dtype}",
        "convert to bfloat16, whose range is that of float32, or clip such values with --saturate",
    )
