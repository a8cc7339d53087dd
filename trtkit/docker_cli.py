"""Values of `docker run` options that engine builds and deployments share."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ULIMITS = ("--ulimit", "memlock=-1", "--ulimit", "stack=67108864")
"""Locked memory for pinned buffers, and a large stack: NVIDIA's advice for its containers."""


@dataclass(frozen=True)
class Mount:
    """A folder of this machine at a path inside the container."""

    source: Path
    target: str
    read_only: bool = True

    def option(self) -> str:
        """Value of `--mount`, which is one CSV record, so commas and colons in paths are safe."""
        return _csv(["type=bind", f"source={self.source}", f"target={self.target}", *["readonly"] * self.read_only])


def gpus_option(ids: Sequence[str] | None) -> str:
    """Value of `--gpus`: also CSV, so a list of ids is one field that needs its own quotes. None is all GPUs."""
    return "all" if ids is None else _csv([f"device={','.join(ids)}"])


def _csv(fields: Sequence[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(fields)
    return line.getvalue()
