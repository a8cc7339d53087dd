"""The accuracy report of a quantised checkpoint: what quantisation cost, measured from the files that were written.

`accuracy.json` beside config.json holds it: perplexity of held-out text before and after, how often the likeliest token
is the same, how far the distributions are apart, and the signal-to-noise ratio of every linear.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtkit.checkpoint import open_checkpoint
from trtkit.convert.conversion import ACCURACY
from trtkit.evaluate.results import Scores, check_limit, parse_limit
from trtkit.hf import Source
from trtkit.store import atomic_write

if TYPE_CHECKING:
    from trtkit.quantize.calibration import Calibration

WORST = 5
_WORK = ".accuracy-"


def measure(
    source: Source,
    folder: Path,
    held_out: Calibration,
    *,
    device: str = "cpu",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Measures a checkpoint against its source and adds what came out to its `accuracy.json`.

    Args:
        folder: the checkpoint's.
        held_out: text that calibration has not seen.
    """
    from trtkit.evaluate.layerwise import score_layers

    for leftover in folder.glob(f"{_WORK}*"):  # of a run that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_WORK, dir=folder) as work:
        scores = score_layers(
            source, open_checkpoint(folder), held_out.tokens, Path(work), device=device, on_progress=on_progress
        )
    report = read(folder) | {
        "held_out": {
            "text": held_out.origin,
            "sha256": held_out.digest,
            "samples": held_out.samples,
            "length": held_out.length,
        },
        "scores": scores.to_dict(),
    }
    atomic_write(folder / ACCURACY, json.dumps(report, indent=2) + "\n")
    return report


def read(folder: Path) -> dict[str, Any]:
    """The report of a checkpoint so far; empty where there is none."""
    file = folder / ACCURACY
    if not file.is_file():
        return {}
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return report


def check(report: Mapping[str, Any], limit: str | None) -> None:
    """Raises CheckFailedError where perplexity rose by more than `limit` (`2%`, or `0.02`); None allows all."""
    if limit is not None:
        check_limit(Scores(**report["scores"]), parse_limit(limit))


def rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The report for people: what, and how much."""
    found: list[tuple[str, str]] = []
    if scores := report.get("scores"):
        found += [
            ("held-out perplexity before", f"{scores['reference_perplexity']:.4f}"),
            ("held-out perplexity after", f"{scores['candidate_perplexity']:.4f}"),
            ("increase", _percent(scores["perplexity_increase"], scores["increase_error"])),
            ("same likeliest token", f"{scores['top1_agreement']:.2%}"),
            ("KL divergence, mean", f"{scores['mean_kl']:.5f} nats per token"),
            ("KL divergence, 99th percentile", f"{scores['kl_p99']:.4f} nats"),
            ("held-out text", f"{scores['tokens']:,} tokens; {report['held_out']['text']}"),
        ]
    for each in worst(report):
        found.append((f"signal-to-noise of {each['name'].removeprefix('transformer.')}", f"{each['snr']:.1f} dB"))
    return found


def worst(report: Mapping[str, Any], count: int = WORST) -> list[dict[str, Any]]:
    """The linears with the least signal-to-noise ratio."""
    known = [each for each in report.get("linears", []) if each.get("snr") is not None]
    return sorted(known, key=lambda each: float(each["snr"]))[:count]


def _percent(increase: float, error: float | None) -> str:
    return f"{increase:+.2%}" + (f" (standard error {error:.2%})" if error is not None else "")
