"""Four-bit weights with a scale per group of inputs and a factor per input: scale search, clipping and error
compensation, all from one Gram matrix.

- Factors (AWQ, Lin et al., arXiv 2306.00978): inputs x are divided and weights multiplied by s, which gives inputs of
  large magnitude finer steps. s = x^a / w^(1-a) or x^a over a grid of a, and s = 1, by the exact error at the outputs.
- Clipping: scales below the largest weight of a group, by the error with the group's own block of the Gram matrix.
- Compensation (GPTQ, Frantar et al., arXiv 2210.17323): columns are rounded one after the other, and what a column's
  rounding breaks is mended in those that follow, by the inverse of the Gram matrix.
- Target: where the inputs are already those of a partly quantised model, the weights are first moved to what best gives
  the outputs of the unquantised one (a least-squares problem with the same matrices).

A weight is (out_features, in_features), written (N, K); G is the Gram matrix (K, K) of its inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from trtkit.convert.number_formats import INT4_MAX, INT4_MIN

GRID = 20
"""Values of a in the search for factors."""
CLIPS = tuple(1 - step / 40 for step in range(21))
"""Scales relative to the one that the largest weight of a group needs."""
SEARCH_ROWS = (64, 512)
"""At least and at most so many outputs, evenly spread, the search for factors looks at ..."""
SEARCH_WORK = 1 << 31
"""... and otherwise so many that each candidate costs this many multiplications: more change the choice no more."""
DAMPING = 0.01
TARGET_DAMPING = 0.05
BLOCK = 128
CHUNK = 2 << 20
"""Elements of a weight that are worked at together: rows do not depend on each other, and temporaries are as large."""


@dataclass(frozen=True)
class Fitted:
    """A quantised weight: value = codes * scales / factors.

    Attributes:
        codes: int8 (N, K), -8 to 7.
        scales: float32 (N, K / group), representable in the dtype of the model.
        factors: float32 (K,), whose inverse is what the inputs are multiplied with: that is representable.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    factors: torch.Tensor

    def weight(self) -> torch.Tensor:
        """float32 (N, K)."""
        return _spread(self.codes.float(), self.scales).div_(self.factors)

    def rows(self, which: slice) -> Fitted:
        """Some outputs of it."""
        return Fitted(self.codes[which], self.scales[which], self.factors)


def fit(
    weight: torch.Tensor,
    gram: torch.Tensor,
    magnitude: torch.Tensor,
    group: int,
    dtype: torch.dtype,
    *,
    cross: torch.Tensor | None = None,
    factors: bool = True,
    compensate: bool = True,
) -> Fitted:
    """Quantises a weight, or several that share their inputs stacked along axis 0.

    Args:
        weight: (N, K), float32.
        gram: (K, K), of the inputs.
        magnitude: (K,), mean magnitude of the inputs.
        group: inputs that share a scale; divides K.
        dtype: that of the model, in which kernels hold scales and factors.
        cross: (K, K), see `InputStatistics.cross`.
        factors: whether the format has a factor per input.
        compensate: round with compensation; otherwise each weight to its nearest.
    """
    target = weight if cross is None else _target(weight, gram, cross)
    chosen = search_factors(target, gram, magnitude, group, dtype) if factors else torch.ones_like(magnitude)
    fitted = _fit_scaled(target, gram, chosen, group, dtype, compensate)
    # Rounding to nearest without factors is the floor: a worse result is not kept.
    ours = theirs = 0.0
    for rows in _chunks(target):
        part = target[rows]
        ours += output_error(fitted.rows(rows).weight() - part, gram)
        theirs += output_error(_nearest(part, torch.ones_like(magnitude), group, dtype).weight() - part, gram)
    return fitted if ours <= theirs else _nearest(target, torch.ones_like(magnitude), group, dtype)


def _chunks(weight: torch.Tensor) -> Iterator[slice]:
    step = max(1, CHUNK // weight.shape[1])
    for start in range(0, len(weight), step):
        yield slice(start, start + step)


def output_error(change: torch.Tensor, gram: torch.Tensor) -> float:
    """tr(E G E^T): mean over tokens of the squared change of all outputs."""
    return float((change @ gram).mul_(change).sum(dtype=torch.float64))


def search_factors(
    weight: torch.Tensor, gram: torch.Tensor, magnitude: torch.Tensor, group: int, dtype: torch.dtype
) -> torch.Tensor:
    """The factors, float32 (K,), that lose least when weights are rounded to nearest."""
    sample = searched_rows(weight)
    blocks = sample.view(len(sample), -1, group).abs()
    relative = (blocks / blocks.amax(2, keepdim=True).clamp_min(1e-9)).view_as(sample).mean(0)
    best, least = torch.ones_like(magnitude), float("inf")
    for candidate in _candidates(magnitude, relative):
        factors = _representable(candidate, dtype)
        error = output_error(_nearest(sample, factors, group, dtype).weight() - sample, gram)
        if error < least:
            best, least = factors, error
    return best


def searched_rows(weight: torch.Tensor) -> torch.Tensor:
    """Some outputs of a weight, evenly spread, that stand for all in a search."""
    count = min(max(SEARCH_WORK // weight.shape[1] ** 2, SEARCH_ROWS[0]), SEARCH_ROWS[1])
    return weight[:: max(1, -(-len(weight) // count))]


def _candidates(magnitude: torch.Tensor, relative: torch.Tensor) -> list[torch.Tensor]:
    found = [torch.ones_like(magnitude)]
    for step in range(1, GRID + 1):
        exponent = step / GRID
        for scale in (magnitude**exponent, magnitude**exponent / (relative ** (1 - exponent) + 1e-4)):
            positive = scale.clamp_min(1e-4)
            found.append(positive / (positive.max() * positive.min()).sqrt())
    return found


def _representable(factors: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Factors whose inverses the model's dtype holds."""
    return 1 / (1 / factors).to(dtype).float()


def _fit_scaled(
    target: torch.Tensor, gram: torch.Tensor, factors: torch.Tensor, group: int, dtype: torch.dtype, compensate: bool
) -> Fitted:
    parts = [slice(start, start + group) for start in range(0, len(gram), group)]
    blocks = torch.stack([gram[part, part] / factors[part, None] / factors[part] for part in parts])
    rounding = Compensation(gram, factors) if compensate else None
    codes = torch.empty(target.shape, dtype=torch.int8, device=target.device)
    scales = torch.empty(len(target), target.shape[1] // group, device=target.device)
    for rows in _chunks(target):
        scaled = target[rows] * factors
        scales[rows] = clipped_scales(scaled, blocks, dtype)
        nearest = nearest_codes(scaled, scales[rows]).to(torch.int8) if rounding is None else None
        codes[rows] = rounding.codes(scaled, scales[rows]) if rounding is not None else nearest
    return Fitted(codes, scales, factors)


def _nearest(weight: torch.Tensor, factors: torch.Tensor, group: int, dtype: torch.dtype) -> Fitted:
    scaled = weight * factors
    scales = _stored(_largest_scales(scaled, group), dtype)
    return Fitted(nearest_codes(scaled, scales).to(torch.int8), scales, factors)


def _largest_scales(weight: torch.Tensor, group: int) -> torch.Tensor:
    return weight.view(len(weight), -1, group).abs().amax(2) / INT4_MAX


def _stored(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales as the dtype holds them; 1 where that is zero."""
    rounded = scales.to(dtype).float()
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)


def nearest_codes(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Codes, in the dtype of the weight (N, K), of scales (N, K / group): each value to its nearest."""
    grouped = weight.view(*scales.shape, -1) / scales[:, :, None]
    return grouped.round_().clamp_(INT4_MIN, INT4_MAX).view_as(weight)


def _spread(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return (codes.view(*scales.shape, -1) * scales[:, :, None]).view_as(codes)


def clipped_scales(weight: torch.Tensor, blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """For every group of every output, the scale out of `CLIPS` with the least error by the group's own inputs.

    Args:
        blocks: (K / group, group, group), the Gram matrices of the groups.
    """
    count, group = blocks.shape[:2]
    largest = _largest_scales(weight, group)
    best, least = _stored(largest, dtype), torch.full_like(largest, float("inf"))
    for clip in CLIPS:
        scales = _stored(largest * clip, dtype)
        change = (_spread(nearest_codes(weight, scales), scales) - weight).view(-1, count, group).transpose(0, 1)
        error = torch.bmm(change, blocks).mul_(change).sum(2).T
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, scales, best)
    return best


class Compensation:
    """Rounding with compensation of weights that share their inputs.

    Args:
        gram: (K, K), of the inputs.
        factors: (K,), by which they are divided before the weights see them.
        low, high: the smallest and largest code.
    """

    def __init__(self, gram: torch.Tensor, factors: torch.Tensor, low: int = INT4_MIN, high: int = INT4_MAX) -> None:
        # The most active inputs first, while there are still many others to mend what their rounding breaks.
        self.order = torch.argsort(gram.diagonal() / factors**2, descending=True)
        own = gram[self.order[:, None], self.order]
        own /= factors[self.order, None]
        own /= factors[self.order]
        self.inverse = _inverse_factor(own)
        self.low, self.high = low, high

    def codes(self, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Codes int8 (N, K) of a weight (N, K), column by column in blocks, for fixed scales (N, K / group)."""
        columns = weight.shape[1]
        group_of = (self.order // (columns // scales.shape[1])).tolist()
        left = weight[:, self.order].T.contiguous()  # transposed, a column is contiguous: this loop is all memory
        codes = torch.empty(left.shape, dtype=torch.int8, device=left.device)
        by_group = scales.T.contiguous()
        for start in range(0, columns, BLOCK):
            stop = min(start + BLOCK, columns)
            part, errors = left[start:stop], torch.empty_like(left[start:stop])
            for column in range(start, stop):
                here, scale = part[column - start], by_group[group_of[column]]
                code = (here / scale).round_().clamp_(self.low, self.high)
                codes[column] = code
                error = here.sub(code.mul_(scale)).div_(self.inverse[column, column])
                part[column - start + 1 :].addr_(self.inverse[column, column + 1 : stop], error, alpha=-1)
                errors[column - start] = error
            left[stop:].addmm_(self.inverse[start:stop, stop:].T, errors, alpha=-1)
        result = torch.empty_like(codes)
        result[self.order] = codes
        return result.T


def _inverse_factor(gram: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor of the inverse of a Gram matrix that is damped in place."""
    diagonal = gram.diagonal()
    mean = float(diagonal.mean())
    damping = DAMPING * mean if mean > 0 else 1.0  # inputs that are always zero: any code will do
    while True:
        diagonal.add_(damping)
        factor, failed = torch.linalg.cholesky_ex(gram)
        if not failed:
            factor = torch.cholesky_inverse(factor)
            factor, failed = torch.linalg.cholesky_ex(factor, upper=True)
            if not failed:
                return factor
        damping *= 10  # inputs that depend on each other: more damping always ends it


def _target(weight: torch.Tensor, gram: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
    """argmin over V of |W Y^T - V X^T|^2 with some damping towards W: V = W (C + d) (G + d)^-1."""
    mean = float(gram.diagonal().mean())
    left, right = cross.clone(), gram.clone()
    for matrix in (left, right):
        matrix.diagonal().add_(TARGET_DAMPING * mean)
    factor, failed = torch.linalg.cholesky_ex(right)
    if failed:
        return weight
    return torch.cholesky_solve((weight @ left).T, factor).T.contiguous()
