"""What a path holds: a source, a checkpoint, an engine, a model repository, or an artifact store of these.

Only configs and headers are read, never weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from trtkit.errors import InputError
from trtkit.inspect.checkpoint import CheckpointReport, inspect_checkpoint
from trtkit.inspect.engine import EngineReport, inspect_engine
from trtkit.inspect.repository import RepositoryReport, inspect_repository, model_folders
from trtkit.inspect.source import SourceReport, inspect_source
from trtkit.store import MANIFEST
from trtkit.untrusted import printable, read_json

__all__ = [
    "KINDS", "Artifact", "CheckpointReport", "EngineReport", "Kind", "Report", "RepositoryReport", "SourceReport",
    "StoreReport", "detect", "inspect_folder",
]  # fmt: skip

Kind = Literal["source", "checkpoint", "engine", "repository", "store"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Artifact:
    """One finished artifact of a store.

    Attributes:
        path: its folder, relative to the folder that was inspected.
        made: kind that its manifest gives.
        created: seconds since 1970; None where the manifest does not say.
        report: what is in it; None where that cannot be read, and the report's problems say why.
    """

    path: str
    made: str | None
    created: int | None
    report: CheckpointReport | EngineReport | None


@dataclass(frozen=True)
class StoreReport:
    """The artifacts of a store, or of one folder in it."""

    path: str
    artifacts: list[Artifact]
    problems: list[Any]
    kind: str = "store"


Report = SourceReport | CheckpointReport | EngineReport | RepositoryReport | StoreReport
