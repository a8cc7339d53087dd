"""Changes of dtype: torch's rounding bit for bit, and an honest account."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trtkit.convert.cast import CastReport, cast
from trtkit.errors import InputError
from trtkit.safetensors_io import TensorEntry

NUMPY = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}
PAIRS = [(source, target) for source in NUMPY for target in NUMPY if source != target]
ENTRY = TensorEntry(Path("model.safetensors"), "w", NUMPY["float32"], (1,), 0)


def to_torch(values: npt.NDArray[np.generic], dtype: str) -> torch.Tensor:
    integer = {2: np.int16, 4: np.int32}[values.dtype.itemsize]
    return torch.from_numpy(values.view(integer).copy()).view(getattr(torch, dtype))


def bits(tensor: torch.Tensor) -> npt.NDArray[np.generic]:
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.itemsize]).numpy()


@pytest.mark.parametrize(("source", "target"), [pair for pair in PAIRS if pair[0] != "float32"])
def test_every_16_bit_value_becomes_what_torch_makes_of_it(source: str, target: str) -> None:
    values = np.arange(1 << 16, dtype=np.uint16).view(NUMPY[source])
    theirs = to_torch(values, source).to(getattr(torch, target))
    fits = (torch.isfinite(theirs) | ~torch.isfinite(to_torch(values, source))).numpy()
    nan = np.isnan(values.astype(np.float32))
    report = CastReport()
    ours = cast(values[fits], NUMPY[target], ENTRY, report)
    compare = ~nan[fits]
    integer = np.dtype(f"i{NUMPY[target].itemsize}")
    assert np.array_equal(ours.view(integer)[compare], bits(theirs)[fits][compare])
    assert np.isnan(ours[~compare].astype(np.float32)).all()

    wide = values[fits].astype(np.float32)
    changed = (wide != ours.astype(np.float32)) & ~np.isnan(wide)
    assert report.rounded == changed.sum()
    assert report.flushed == (changed & (ours.astype(np.float32) == 0)).sum()
    assert report.saturated == 0


@pytest.mark.parametrize("target", ["float16", "bfloat16"])
@given(patterns=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
def test_float32_becomes_what_torch_makes_of_it(target: str, patterns: list[int]) -> None:
    values = np.array(patterns, dtype=np.uint32).view(np.float32)
    theirs = torch.from_numpy(values.copy()).to(getattr(torch, target))
    fits = (torch.isfinite(theirs).numpy() | np.isinf(values)) & ~np.isnan(values)
    report = CastReport()
    ours = cast(values[fits], NUMPY[target], ENTRY, report)
    assert np.array_equal(ours.view(np.int16), bits(theirs)[fits])
    changed = ours.astype(np.float32) != values[fits]
    assert (report.rounded, report.flushed) == (changed.sum(), (changed & (ours.astype(np.float32) == 0)).sum())


@pytest.mark.parametrize("source", ["bfloat16", "float32"])
def test_overflow_is_an_error_that_names_tensor_and_value(source: str) -> None:
    values = np.array([1.0, -131072.0, 65280.0], dtype=NUMPY[source])
    with pytest.raises(InputError, match=r"tensor 'w' holds 1\.31e\+05, which overflows float16") as caught:
        cast(values, NUMPY["float16"], ENTRY, CastReport())
    assert "--saturate" in caught.value.fix


@pytest.mark.parametrize("source", ["bfloat16", "float32"])
def test_saturating_takes_the_largest_finite_value(source: str) -> None:
    values = np.array([1.0, -131072.0, 1e30, np.inf, -np.inf, np.nan], dtype=NUMPY[source])
    report = CastReport()
    found = cast(values, NUMPY["float16"], ENTRY, report, saturate=True)
    assert found[:5].tolist() == [1.0, -65504.0, 65504.0, np.inf, -np.inf] and np.isnan(found[5])
    assert (report.saturated, report.rounded, report.flushed) == (2, 2, 0)


@pytest.mark.parametrize("source", NUMPY)
@pytest.mark.parametrize("target", NUMPY)
@given(values=st.lists(st.floats(-4, 4, width=16), min_size=1, max_size=50))
def test_a_constant_is_added_in_float32(source: str, target: str, values: list[float]) -> None:
    given_values = np.array(values, dtype=NUMPY[source])
    ours = cast(given_values, NUMPY[target], ENTRY, CastReport(), plus=1.0)
    theirs = (to_torch(given_values, source).float() + 1.0).to(getattr(torch, target))
    assert np.array_equal(ours.view(np.dtype(f"i{ours.itemsize}")), bits(theirs))


def test_nothing_is_copied_where_nothing_changes() -> None:
    values = np.ones(3, dtype=np.float16)
    assert cast(values, NUMPY["float16"], ENTRY, CastReport()) is values
