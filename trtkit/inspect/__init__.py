"""What a path holds: a source, a checkpoint, an engine, a model repository, or an artifact store of these.

Only configs and headers are read, never weights.
"""

from __future__ import annotations

from pathlib import Path

from trtkit.inspect.checkpoint import CheckpointReport, inspect_checkpoint
from trtkit.inspect.detect import KINDS, Kind, detect
from trtkit.inspect.engine import EngineReport, inspect_engine
from trtkit.inspect.repository import RepositoryReport, inspect_repository
from trtkit.inspect.source import SourceReport, inspect_source
from trtkit.inspect.store import StoreReport, inspect_store

__all__ = [
    "KINDS", "CheckpointReport", "EngineReport", "Kind", "Report", "RepositoryReport", "SourceReport", "StoreReport",
    "detect", "inspect_folder",
]  # fmt: skip

Report = SourceReport | CheckpointReport | EngineReport | RepositoryReport | StoreReport


def inspect_folder(path: Path, *, kind: Kind | None = None, origin: str = "") -> Report:
    """Describes a folder of this machine.

    Args:
        kind: what to take it for; by default what `detect` finds.
        origin: where a source is from, if not from this folder.

    Raises:
        InputError: no folder, nothing of the kind, several things at once, or a damaged config; names the file.
    """
    if kind is None:
        kind = detect(path)
    if kind == "source":
        return inspect_source(path, origin)
    if kind == "checkpoint":
        return inspect_checkpoint(path)
    if kind == "engine":
        return inspect_engine(path)
    return inspect_repository(path) if kind == "repository" else inspect_store(path)
