"""Conversion with quantisation: a `WriteRanks` that first makes the quantised tensors and then writes the ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trtkit.convert.conversion import ACCURACY, WORK, Options, WriteRanks, write_here
from trtkit.convert.plan import Plan
from trtkit.convert.progress import Progress
from trtkit.hf import Source
from trtkit.quantize.calibration import Calibration
from trtkit.quantize.fit import Effort
from trtkit.quantize.layer_files import layer_entries
from trtkit.quantize.pipeline import Quantizer
from trtkit.quantize.quality import qualities
from trtkit.store import atomic_write


def quantizing(
    calibration: Calibration | None,
    *,
    effort: Effort | None = None,
    device: str = "cpu",
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> WriteRanks:
    """For `trtkit.convert.conversion.convert`: quantises layer by layer, then writes the ranks.

    Args:
        calibration: see `trtkit.quantize.calibration.load_tokens`; None for formats that need none.
        device: where layers run: `cpu`, `cuda`, `cuda:1`.
        on_layer: called with decoder layers (done, total).
    """

    def write(
        plan: Plan, source: Source, folder: Path, options: Options, progress: Progress, advance: Callable[[int], None]
    ) -> None:
        work = folder / WORK
        if len(progress.finished) == len(plan.ranks) and (folder / ACCURACY).is_file():
            return  # all that is left is to publish
        tokens = None if calibration is None else calibration.tokens
        quantizer = Quantizer(plan.config, source, tokens, work, effort=effort, device=device)
        quantizer.run(on_layer)
        found = [asdict(each) for each in qualities(work, plan.config["num_hidden_layers"])]
        atomic_write(folder / ACCURACY, json.dumps({"linears": found}, indent=2) + "\n")
        write_here(plan, source, folder, options, progress, advance, made=layer_entries(work))

    return write


def identity(calibration: Calibration | None, effort: Effort | None = None) -> Mapping[str, Any]:
    """What beside the source and the plan determines quantised tensors, for `Options.quantization`."""
    effort = effort or Effort()
    return {
        "calibration": calibration
        and {
            "text": calibration.origin,
            "sha256": calibration.digest,
            "samples": calibration.samples,
            "length": calibration.length,
        },
        "factors": effort.factors,
        "compensate": effort.compensate,
        "correct": effort.correct,
    }
