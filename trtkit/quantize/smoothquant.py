"""SmoothQuant (Xiao et al., arXiv 2211.10438): part of the range of the inputs is moved into the weights.

Inputs are divided by s and weights multiplied by it, s = x^a / w^(1-a) with x and w the largest magnitudes per input.
The share a is searched per linear: rounding the weights costs tr(E G E^T), exactly; rounding an input to steps of size
d adds noise of variance d^2 / 12 (or of the input itself, where that is less), which each column of the scaled weight
passes on.
"""

from __future__ import annotations

import torch

from trtkit.quantize.awq import output_error, searched_rows
from trtkit.quantize.statistics import InputStatistics

GRID = 20
LEVELS = 127.0


def smoothing(
    weight: torch.Tensor, statistics: InputStatistics, *, dtype: torch.dtype, per_token: bool
) -> torch.Tensor:
    """The factors s, float32 (K,), that lose least for a weight (N, K).

    Args:
        dtype: in which 1 / s is stored.
        per_token: every token has its own step (typically below that of the largest input seen).
    """
    largest_weight = weight.abs().amax(0)
    weight = searched_rows(weight)
    best, least = torch.ones_like(largest_weight), float("inf")
    for candidate in _candidates(statistics.largest, largest_weight):
        factors = 1 / (1 / candidate).to(dtype).float()
        scaled = weight * factors
        change = round_rows(scaled) / factors - weight
        step = (statistics.mean_magnitude if per_token else statistics.largest).div(factors).max() / LEVELS
        # An input that is smaller than a step is lost: its error is the input itself.
        per_input = torch.minimum(step**2 / 12, statistics.gram.diagonal() / factors**2)
        noise = float((per_input * scaled.square().sum(0)).sum())
        error = output_error(change, statistics.gram) + noise
        if error < least:
            best, least = factors, error
    return best


def _candidates(largest: torch.Tensor, largest_weight: torch.Tensor) -> list[torch.Tensor]:
    found = [torch.ones_like(largest)]
    inputs, weights = largest.clamp_min(1e-5), largest_weight.clamp_min(1e-5)
    for step in range(GRID + 1):
        share = step / GRID
        found.append((inputs**share / weights ** (1 - share)).clamp(1e-4, 1e4))
    return found


def row_scales(weight: torch.Tensor) -> torch.Tensor:
    """Scale of each output channel, float32 (N,): largest magnitude / 127, 1 where all is zero."""
    scales = weight.abs().amax(1) / LEVELS
    return torch.where(scales == 0, torch.ones_like(scales), scales)


def row_codes(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """int8 (N, K)."""
    return (weight / scales[:, None]).round().clamp(-128, 127).to(torch.int8)


def round_rows(weight: torch.Tensor) -> torch.Tensor:
    """A weight after rounding to 8 bits per output channel, float32."""
    scales = row_scales(weight)
    return row_codes(weight, scales).float() * scales[:, None]
