"""How well linears came out, measured at their outputs on the calibration text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from trtkit.convert.cast import Array
from trtkit.convert.layerwise import batches
from trtkit.convert.quantization import Format
from trtkit.quantize.awq import output_error
from trtkit.quantize.fit import needs_gram
from trtkit.quantize.layer_files import read_notes
from trtkit.quantize.statistics import InputStatistics

ROWS = 2048
"""Outputs that are looked at together."""


@dataclass(frozen=True)
class LinearQuality:
    """How well one linear came out.

    Attributes:
        name: TRT-LLM name.
        format: name in FORMATS.
        snr: signal-to-noise ratio of its outputs on the calibration text, in dB; None where no statistics were kept.
    """

    name: str
    format: str
    snr: float | None


def qualities(folder: Path, layers: int) -> list[LinearQuality]:
    """How well every linear came out, in order of execution."""
    return [LinearQuality(**each) for layer in range(layers) for each in read_notes(folder, layer)]


def snr(form: Format, effective: Array, weight: Array, statistics: InputStatistics | None) -> float | None:
    """Signal-to-noise ratio in dB of the outputs of a weight (N, K) or (experts, N, K), float32, that has become
    `effective`; None where no Gram matrix of the inputs was kept."""
    if statistics is None or not needs_gram(form):
        return None
    device = statistics.largest.device
    rows = weight.reshape(-1, weight.shape[-1])
    after, noise, signal = effective.reshape(rows.shape), 0.0, 0.0
    for where in batches(len(rows), ROWS):
        exact = torch.from_numpy(rows[where]).to(device)
        noise += output_error(torch.from_numpy(after[where]).to(device) - exact, statistics.gram)
        signal += output_error(exact, statistics.gram)
    return float(10 * np.log10(signal / max(noise, 1e-30))) if signal > 0 else None
