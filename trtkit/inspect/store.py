"""What is in an artifact store: its finished checkpoints, engines and exports (quantised Hugging Face checkpoints)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trtkit.errors import InputError
from trtkit.inspect.checkpoint import CheckpointReport, inspect_checkpoint
from trtkit.inspect.engine import EngineReport, inspect_engine
from trtkit.inspect.model import Problem
from trtkit.inspect.source import SourceReport, inspect_source
from trtkit.store import MANIFEST
from trtkit.untrusted import read_json

_INSPECT: dict[str, Callable[[Path], CheckpointReport | EngineReport | SourceReport]] = {
    "checkpoint": inspect_checkpoint,
    "export": inspect_source,
    "engine": inspect_engine,
}


@dataclass(frozen=True)
class Artifact:
    """One finished artifact.

    Attributes:
        path: its folder, relative to the store.
        created: seconds since 1970; None where its manifest does not say.
        report: what is in it.
    """

    path: str
    created: int | None
    report: CheckpointReport | EngineReport | SourceReport


@dataclass(frozen=True)
class StoreReport:
    """What is in a store, or in one folder of it.

    Attributes:
        problems: artifacts that cannot be read, and what is wrong within those that can.
    """

    path: str
    artifacts: list[Artifact]
    problems: list[Problem]
    kind: str = "store"


def inspect_store(path: Path) -> StoreReport:
    """Describes the finished artifacts below a folder."""
    artifacts, problems = [], []
    for folder in artifact_folders(path):
        try:
            manifest = read_json(folder / MANIFEST, "an artifact")
            made, created = manifest.get("kind"), manifest.get("created")
            if made not in _INSPECT:
                raise InputError(f"{folder / MANIFEST}: the artifact is no checkpoint, engine or export", "remove it")
            report = _INSPECT[made](folder)
        except InputError as error:
            problems.append(Problem.of(error))
            continue
        problems += report.problems
        artifacts.append(Artifact(str(folder.relative_to(path)), created if type(created) is int else None, report))
    return StoreReport(str(path), artifacts, problems)


def artifact_folders(path: Path) -> list[Path]:
    """The finished artifacts of a store (`path` is its root) or of one kind in it."""
    found = [*path.glob(f"*/{MANIFEST}"), *path.glob(f"*/*/{MANIFEST}")]
    return sorted(
        file.parent for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
