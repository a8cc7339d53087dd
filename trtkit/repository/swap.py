"""Changes in a repository that a server may be polling: each comes in by one rename.

What such a server looks at (triton-inference-server/core, src/model_repository_manager, read and measured on 2.51):

- A model changed when the newest time of anything in its directory grew. A file or folder in it that is no version and
  not config.pbtxt, such as a temporary one, has every version of the model loaded anew; a name that begins with digits
  counts as a version; any folder in the root counts as a model. So everything is prepared outside the repository, and
  the time grows.
- Only a version that loads takes the place of those before it. One that fails is tried again at every look.
- A changed version policy alone loads and unloads versions, and leaves the others running.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trtkit import bytecode, pbtxt
from trtkit.errors import InputError
from trtkit.store import remove_abandoned


@contextlib.contextmanager
def opened(repository: Path, model: str) -> Iterator[tuple[Path, Path, Any]]:
    """The repository, the model's directory and its config, for as long as nobody else changes versions there."""
    root = repository.expanduser().resolve()
    if not root.is_dir():
        raise InputError(f"{repository} is no model repository", "give the folder that holds the model directories")
    if model in ("", ".", "..") or "/" in model or not (root / model).is_dir():
        names = sorted(item.name for item in root.iterdir() if item.is_dir() and not item.name.startswith("."))
        raise InputError(f"{repository} has no model '{model}'", f"it has {', '.join(names) or 'none'}")
    with locked(root):
        yield root, root / model, pbtxt.load(root / model / "config.pbtxt")


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Waits until nobody else changes versions in the repository, and keeps others waiting."""
    lock = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


@contextlib.contextmanager
def staging_beside(root: Path) -> Iterator[Path]:
    """A folder beside the repository, on the same filesystem, that nobody serves; gone afterwards.

    Where the repository is a mount of its own, or nothing may be written beside it, the folder is a hidden one inside:
    a server that polls then complains in its log for that time, and one that starts in it fails.
    """
    for place in (root, root / root.name):
        remove_abandoned(place)
    staging, lock = _claim_beside(root)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(lock)


def _claim_beside(root: Path) -> tuple[Path, int]:
    """A staging folder and the descriptor that holds its lock, without which the next one would remove it."""
    while True:
        staging = _make_beside(root)
        with contextlib.suppress(FileNotFoundError):  # removed before the lock was ours
            lock = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if staging.is_dir():
                return staging, lock
            os.close(lock)


def _make_beside(root: Path) -> Path:
    prefix = f".{root.name}.tmp-"
    with contextlib.suppress(OSError):
        staging = Path(tempfile.mkdtemp(prefix=prefix, dir=root.parent))
        if staging.stat().st_dev == root.stat().st_dev:
            return staging
        staging.rmdir()
    return Path(tempfile.mkdtemp(prefix=prefix, dir=root))


@contextlib.contextmanager
def noticed(directory: Path) -> Iterator[None]:
    """A change inside that a polling server sees, also where files carry times that are yet to come."""
    before = newest(directory)
    yield
    if newest(directory) <= before:
        os.utime(directory, ns=(before + 10**6, before + 10**6))


def newest(folder: Path) -> int:
    """The newest time of anything in a folder, in nanoseconds, as a server sees it."""
    times = [folder.stat().st_mtime_ns]
    for item in folder.rglob("*"):
        with contextlib.suppress(OSError):
            times.append(item.stat().st_mtime_ns)
    return max(times)


def publish(staged: Path, target: Path) -> None:
    try:
        staged.rename(target)
    except OSError as error:
        if target.exists():  # by another way than trtkit, since the repository is locked
            raise InputError(f"{target} appeared meanwhile", "run again for the next free number") from error
        raise
    sync(target.parent)


def write_config(root: Path, directory: Path, text: str) -> None:
    """Replaces the model's config.pbtxt in one step, so that a polling server sees the change and nothing else."""
    file = directory / "config.pbtxt"
    with staging_beside(root) as staging, noticed(directory):
        staged = staging / "config.pbtxt"
        staged.write_text(text, encoding="utf-8")
        if file.exists():
            shutil.copymode(file, staged)
        with staged.open("rb") as stream:
            os.fsync(stream.fileno())
        staged.replace(file)
        sync(directory)


def files_of(folder: Path) -> list[Path]:
    """Paths of the files below a version's folder, relative to it and sorted, without bytecode.

    Raises:
        InputError: it is no folder, or holds what is no file, such as a link to a folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder", "give the folder that holds the files of one version")
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if bytecode.FOLDER in name.parts:
            continue
        mode = path.stat().st_mode if path.exists() else 0
        if stat.S_ISREG(mode):
            found.append(name)
        elif path.is_symlink() or not stat.S_ISDIR(mode):
            raise InputError(f"{path} is neither a file nor a folder of its own", "remove it, or put a copy there")
    return found


def sync(folder: Path) -> None:
    """Returns once the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
