"""Changes of dtype, rounded to nearest even as torch does, with an account of what they did to the values."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from trtkit.errors import InputError
from trtkit.safetensors_io import TensorEntry

Array = npt.NDArray[Any]

_EXACT, _ROUNDED, _FLUSHED, _OVERFLOW = range(4)
"""What becomes of a value. Only finite values are told apart from exact ones: NaN and infinity stay what they are."""


_CHUNK = 1 << 17
"""Elements looked up at once: their indices and what comes of them stay in the processor's cache."""


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
) -> Array:
    """`values + plus` in another dtype (the sum in float32); the same array when nothing changes.

    Args:
        values: float16, bfloat16 or float32.
        entry: the tensor they are from, for messages.
        report: is added to.
        saturate: finite values beyond the range become the largest finite one instead of an error.

    Raises:
        InputError: a finite value would become infinite; names the tensor and the value.
    """
    if plus:
        values = values.astype(np.float32) + np.float32(plus)
    if values.dtype == dtype:
        return values
    if values.dtype.itemsize == 2:
        result = _by_table(values, dtype, entry, report, saturate)
    else:
        result = _from_float32(values, dtype, entry, report, saturate)
    return result


def _by_table(values: Array, dtype: np.dtype[Any], entry: TensorEntry, report: CastReport, saturate: bool) -> Array:
    """A 16-bit float has so few values that looking each up is the fastest exact way."""
    table = _table(values.dtype, dtype, saturate)
    bits = np.ascontiguousarray(values).view(np.uint16).reshape(-1)
    result = np.empty(bits.shape, dtype)
    lookup = result.view(table.results.dtype)
    for start in range(0, len(bits), _CHUNK):
        chunk = bits[start : start + _CHUNK]
        _account(chunk, table, dtype, entry, report, saturate)
        # No index is out of range; `wrap` only skips the check.
        np.take(table.results, chunk, mode="wrap", out=lookup[start : start + _CHUNK])
    return result.reshape(values.shape)


def _account(
    bits: Array, table: _Table, dtype: np.dtype[Any], entry: TensorEntry, report: CastReport, saturate: bool
) -> None:
    if table.always_exact:
        return
    magnitude = bits & 0x7FFF
    # Zero wraps around to the largest number, out of the way.
    suspects = np.subtract(magnitude, 1, dtype=np.uint16) < table.exact_from - 1
    if table.exact_to < magnitude.max(initial=0):
        suspects |= magnitude > table.exact_to
    if not suspects.any():
        return
    rounded, flushed, overflow = np.bincount(table.kinds[bits[suspects]], minlength=4)[1:]
    if overflow and not saturate:
        beyond = bits[table.kinds[bits] == _OVERFLOW]
        raise _overflow(beyond.view(table.source), dtype=dtype.name, entry=entry)
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
        exact_from, exact_to: all magnitudes from the one to the other, both included, are exact.
    """

    source: np.dtype[Any]
    results: Array
    kinds: Array
    exact_from: int
    exact_to: int
    always_exact: bool


@cache
def _table(source: np.dtype[Any], dtype: np.dtype[Any], saturate: bool) -> _Table:
    wide = np.arange(1 << 16, dtype=np.uint16).view(source).astype(np.float32)
    results, kinds = _round(wide, dtype)
    if saturate:
        results = np.where(kinds == _OVERFLOW, np.copysign(_largest(dtype), wide).astype(dtype), results)
    inexact = np.flatnonzero(kinds[1 : 1 << 15]) + 1
    # The widest gap between inexact magnitudes is where nearly all weights lie.
    edges = np.concatenate([[0], inexact, [1 << 15]])
    gap = int(np.diff(edges).argmax())
    first, last = int(edges[gap]) + 1, int(edges[gap + 1]) - 1
    bits = results.astype(dtype).view(np.dtype(f"u{dtype.itemsize}"))
    return _Table(source, bits, kinds, first, last, not len(inexact))


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
    import ml_dtypes

    return np.float32(ml_dtypes.finfo(dtype).max)


def _overflow(values: Array, *, dtype: str, entry: TensorEntry) -> InputError:
    largest = float(np.abs(values.astype(np.float32)).max())
    return InputError(
        f"{entry.path}: tensor '{entry.name}' holds {largest:.3g}, which overflows {dtype}",
        "convert to bfloat16, whose range is that of float32, or clip such values with --saturate",
    )
