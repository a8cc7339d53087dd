"""The fitting of four-bit weights: every step is at least as good as the one it builds on, by the exact error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trtkit.quantize import awq

SHAPES = st.tuples(st.integers(1, 24), st.integers(1, 3), st.sampled_from([64, 128]))
SEEDS = st.integers(0, 2**31)
DTYPES = st.sampled_from([torch.float16, torch.bfloat16])


def problem(shape: tuple[int, int, int], seed: int, outliers: float = 30.0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and inputs that depend on each other, a few of them large."""
    rows, groups, group = shape
    generator = torch.Generator().manual_seed(seed)
    columns = groups * group
    inputs = torch.randn(400, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    inputs /= columns**0.5
    inputs[:, torch.randperm(columns, generator=generator)[: max(1, columns // 32)]] *= outliers
    return torch.randn(rows, columns, generator=generator), inputs


def gram_of(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.T @ inputs / len(inputs)


def nearest(weight: torch.Tensor, group: int, dtype: torch.dtype) -> torch.Tensor:
    """Rounding to nearest, written out: a scale of largest / 7 per group."""
    grouped = weight.numpy().reshape(len(weight), -1, group)
    scales = np.abs(grouped).max(2, keepdims=True) / 7
    scales = torch.from_numpy(scales).to(dtype).float().numpy()
    return torch.from_numpy((np.clip(np.rint(grouped / scales), -8, 7) * scales).reshape(weight.shape))


def codes_of(weight: torch.Tensor, gram: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return awq.Compensation(gram, torch.ones(len(gram))).codes(weight, scales).float()


@settings(max_examples=25, deadline=None)
@given(SHAPES, SEEDS, DTYPES)
def test_never_worse_than_rounding_to_nearest(shape: tuple[int, int, int], seed: int, dtype: torch.dtype) -> None:
    weight, inputs = problem(shape, seed)
    gram = gram_of(inputs)
    fitted = awq.fit(weight, gram, inputs.abs().mean(0), shape[2], dtype)
    plain = awq.output_error(nearest(weight, shape[2], dtype) - weight, gram)
    assert awq.output_error(fitted.weight() - weight, gram) <= plain * (1 + 1e-5)


@settings(max_examples=25, deadline=None)
@given(SHAPES, SEEDS, DTYPES)
def test_what_is_stored_is_what_was_fitted(shape: tuple[int, int, int], seed: int, dtype: torch.dtype) -> None:
    weight, inputs = problem(shape, seed)
    fitted = awq.fit(weight, gram_of(inputs), inputs.abs().mean(0), shape[2], dtype)
    assert fitted.codes.dtype == torch.int8
    assert int(fitted.codes.min()) >= -8 and int(fitted.codes.max()) <= 7
    assert torch.equal(fitted.scales.to(dtype).float(), fitted.scales)
    assert (fitted.scales > 0).all()
    prequant = 1 / fitted.factors
    assert torch.allclose(prequant.to(dtype).float(), prequant, rtol=1e-6)


@settings(max_examples=25, deadline=None)
@given(SHAPES, SEEDS)
def test_the_error_is_the_one_at_the_outputs(shape: tuple[int, int, int], seed: int) -> None:
    weight, inputs = problem(shape, seed)
    change = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    expected = (inputs.double() @ change.double().T).square().sum(1).mean()
    assert awq.output_error(change, gram_of(inputs)) == pytest.approx(float(expected), rel=1e-3)


def test_outliers_get_factors_and_lose_less() -> None:
    weight, inputs = problem((64, 2, 128), 3)
    weight[:, inputs.abs().mean(0) > 10] /= (
        30  # as where a norm has made inputs large that the weights make small again
    )
    gram, magnitude = gram_of(inputs), inputs.abs().mean(0)
    errors = {}
    for name, options in {
        "nearest": {"factors": False, "compensate": False},
        "factors": {"compensate": False},
        "all": {},
    }.items():
        fitted = awq.fit(weight, gram, magnitude, 128, torch.float16, **options)
        errors[name] = awq.output_error(fitted.weight() - weight, gram)
    assert errors["factors"] < 0.5 * errors["nearest"]
    assert errors["all"] < 0.9 * errors["factors"]


def test_without_dependence_compensation_is_rounding_to_nearest() -> None:
    weight, _ = problem((32, 2, 64), 5)
    scales = weight.view(32, 2, 64).abs().amax(2) / 7
    codes = codes_of(weight, torch.eye(128), scales)
    assert torch.equal(codes, (weight.view(32, 2, 64) / scales[:, :, None]).round().clamp(-8, 7).view(32, 128))


def test_compensation_of_two_inputs_is_the_best_there_is() -> None:
    """With two inputs the second code can be tried out: given the first, compensation finds the best one."""
    gram = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(200, 2, generator=generator)
    scales = torch.full((200, 1), 0.5)
    codes = codes_of(weight, gram, scales)
    for row in range(200):
        errors = []
        for code in range(-8, 8):
            change = torch.tensor([[codes[row, 0] * 0.5, code * 0.5]]) - weight[row : row + 1]
            errors.append(awq.output_error(change, gram))
        assert int(codes[row, 1]) == int(np.argmin(errors)) - 8


def test_clipping_loses_less_than_the_largest_weight_as_the_limit() -> None:
    weight, inputs = problem((64, 2, 64), 7, outliers=1)
    weight[:, ::64] *= 4  # one weight of every group far from the others
    gram = gram_of(inputs)
    blocks = torch.stack([gram[:64, :64], gram[64:, 64:]])
    clipped = awq.clipped_scales(weight, blocks, torch.float16)
    grouped = weight.view(64, 2, 64)
    found = ((grouped / clipped[:, :, None]).round().clamp(-8, 7) * clipped[:, :, None]).view(64, 128)
    block = torch.block_diag(gram[:64, :64], gram[64:, 64:])
    assert awq.output_error(found - weight, block) < 0.95 * awq.output_error(
        nearest(weight, 64, torch.float16) - weight, block
    )


def test_the_target_gives_the_outputs_of_the_exact_inputs() -> None:
    """Inputs that were disturbed in a way that can be undone: the moved weight undoes it."""
    weight, inputs = problem((16, 1, 64), 9, outliers=1)
    generator = torch.Generator().manual_seed(2)
    disturbed = inputs @ (torch.eye(64) + 0.05 * torch.randn(64, 64, generator=generator))
    gram, cross = gram_of(disturbed), inputs.T @ disturbed / len(inputs)
    wanted = inputs @ weight.T
    moved = awq._target(weight, gram, cross)
    before, after = ((disturbed @ each.T - wanted).square().mean() for each in (weight, moved))
    assert after < 0.5 * before


@pytest.mark.parametrize("make", [torch.zeros, lambda *size: torch.ones(*size) * 1e-20])
def test_inputs_that_are_zero_break_nothing(make: object) -> None:
    weight, _ = problem((8, 1, 64), 1)
    fitted = awq.fit(weight, torch.zeros(64, 64), make(64), 64, torch.float16)  # type: ignore[operator]
    assert torch.isfinite(fitted.weight()).all()
    assert (fitted.weight() - weight).abs().max() < 1
    assert torch.isfinite(awq.fit(torch.zeros(8, 64), torch.eye(64), torch.ones(64), 64, torch.float16).weight()).all()


def test_rows_are_fitted_alike_in_chunks_and_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = problem((50, 2, 64), 4)
    arguments = (weight, gram_of(inputs), inputs.abs().mean(0), 64, torch.float16)
    whole = awq.fit(*arguments)
    monkeypatch.setattr(awq, "CHUNK", 7 * 128)
    chunked = awq.fit(*arguments)
    assert torch.equal(whole.scales, chunked.scales)
    assert (whole.codes != chunked.codes).float().mean() < 1e-3  # sums in another order can tip a tie
