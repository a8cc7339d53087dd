"""SmoothQuant's factors, and the statistics they come from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trtkit.quantize import smoothquant
from trtkit.quantize.statistics import InputStatistics


def statistics_of(inputs: torch.Tensor, gram: bool = True) -> InputStatistics:
    found = InputStatistics(inputs.shape[1], gram=gram, device=torch.device("cpu"))
    for part in inputs.split(37):
        found.add(part)
    return found


def static_error(weight: torch.Tensor, inputs: torch.Tensor, factors: torch.Tensor) -> float:
    """Mean squared error of the outputs with inputs and weights rounded to 8 bits, as a kernel would do it."""
    scaled = inputs / factors
    step = scaled.abs().max() / 127
    rounded = (scaled / step).round().clamp(-128, 127) * step
    outputs = rounded @ smoothquant.round_rows(weight * factors).T
    return float((outputs - inputs @ weight.T).square().mean())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1.0, 20.0, 100.0]))
def test_the_found_share_is_near_the_best_by_trial(seed: int, outliers: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(300, 96, generator=generator)
    inputs[:, :3] *= outliers
    weight = torch.randn(48, 96, generator=generator)
    statistics = statistics_of(inputs)
    factors = smoothquant.smoothing(weight, statistics, dtype=torch.float16, per_token=False)
    tried = [
        static_error(weight, inputs, statistics.largest**share / weight.abs().amax(0) ** (1 - share))
        for share in np.linspace(0, 1, 11)
    ]
    assert static_error(weight, inputs, factors) < 1.25 * min(tried)
    assert static_error(weight, inputs, factors) <= 1.01 * static_error(weight, inputs, torch.ones(96))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 200), st.integers(1, 40), st.integers(0, 2**31))
def test_statistics_are_sums_over_all_parts(tokens: int, columns: int, seed: int) -> None:
    inputs = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    found = statistics_of(inputs)
    assert found.tokens == tokens
    assert torch.equal(found.largest, inputs.abs().amax(0))
    assert torch.allclose(found.mean_magnitude, inputs.abs().mean(0), atol=1e-5)
    assert torch.allclose(found.gram, inputs.T @ inputs / tokens, atol=1e-4)
    assert found.cross is None


def test_exact_inputs_give_the_cross_product() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, exact = torch.randn(50, 8, generator=generator), torch.randn(50, 8, generator=generator)
    found = InputStatistics(8, gram=True, device=torch.device("cpu"))
    found.add(inputs, exact)
    assert found.cross is not None
    assert torch.allclose(found.cross, exact.T @ inputs / 50, atol=1e-5)


def test_without_a_gram_matrix_there_is_none_to_ask_for() -> None:
    with pytest.raises(ValueError, match="no Gram matrix"):
        _ = statistics_of(torch.ones(3, 4), gram=False).gram


def test_rows_of_zeros_stay_zeros() -> None:
    weight = torch.zeros(4, 8)
    assert torch.equal(smoothquant.round_rows(weight), weight)
    assert torch.equal(smoothquant.row_scales(weight), torch.ones(4))
