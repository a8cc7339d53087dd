"""What a path holds: a source, a checkpoint, an engine, a model repository, or an artifact store of these.

Only configs and headers are read, never weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from trtkit import hf, remote
from trtkit.errors import InputError
from trtkit.inspect.checkpoint import CheckpointReport, inspect_checkpoint
from trtkit.inspect.detect import KINDS, Kind, detect
from trtkit.inspect.engine import EngineReport, inspect_engine
from trtkit.inspect.model import Problem
from trtkit.inspect.remote_headers import headers_only
from trtkit.inspect.repository import RepositoryReport, inspect_repository
from trtkit.inspect.source import SourceReport, inspect_source
from trtkit.inspect.store import StoreReport, inspect_store
from trtkit.untrusted import printable, unreadable

__all__ = [
    "KINDS", "CheckpointReport", "EngineReport", "Kind", "Report", "RepositoryReport", "SourceReport", "StoreReport",
    "detect", "inspect_folder", "inspect_path",
]  # fmt: skip

Report = SourceReport | CheckpointReport | EngineReport | RepositoryReport | StoreReport


def inspect_path(
    path: str,
    *,
    revision: str | None = None,
    kind: Kind | None = None,
    on_step: Callable[[str], None] = lambda step: None,
) -> Report:
    """Describes a folder, or a source on the hub or in object storage, of which only small files and headers are read.

    Args:
        path: a folder, a hub id, or `s3://bucket/prefix` or `gs://bucket/prefix`.
        revision: commit, tag or branch of a hub id.
        kind: what to take a folder for; by default what `detect` finds.
        on_step: told in a few words what takes a while.

    Raises:
        InputError: see `inspect_folder`; or no such model, revision, bucket or prefix.
        LacksError: the hub or the bucket cannot be reached or read.
    """
    folder = _local(path)
    if folder is None and remote.is_remote(path) and revision is not None:
        raise InputError(f"{remote.parse(path).url} has no revisions", "leave --revision out")
    if folder is not None:
        if revision is not None:
            raise InputError(f"{path} is a local folder, which has no revision '{revision}'", "leave --revision out")
        return inspect_folder(folder, kind=kind)
    if kind not in (None, "source"):
        raise InputError(f"{printable(path)} does not exist", f"a {kind} is a folder of this machine")
    on_step(f"reading headers of {remote.parse(path).url if remote.is_remote(path) else path}")
    with headers_only(path, revision) as (headers, origin):
        try:
            report = inspect_source(headers, origin)
        except InputError as error:
            problem = _renamed(Problem.of(error), headers, origin)
            raise InputError(problem.cause, problem.fix) from error
        problems = [_renamed(problem, headers, origin) for problem in report.problems]
        return replace(report, path=origin, problems=problems)


def _local(path: str) -> Path | None:
    """The folder, or None for what may be a source elsewhere."""
    try:
        local = Path(path).expanduser()
        exists = local.exists() or local.is_symlink()
    except OSError as error:
        raise unreadable(Path(printable(path)), error) from error
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{printable(path)} is no path ({error})", "give a folder or a hub id") from error
    if exists:
        return local
    if remote.is_remote(path) or hf.is_hub_id(path):
        return None
    raise InputError(f"{printable(path)} does not exist", "give a folder, or a hub id such as owner/name")


def _renamed(problem: Problem, folder: Path, origin: str) -> Problem:
    """A problem that names the source instead of the temporary folder with its headers."""
    return Problem(problem.cause.replace(str(folder), origin), problem.fix.replace(str(folder), origin))


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
