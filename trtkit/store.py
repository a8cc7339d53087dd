"""Where finished work lives: folders that appear whole or not at all, and a store of artifacts named by their inputs.

A folder under construction is a sibling `.NAME.tmp-XXXX` (or `.NAME.partial-KEY`, if an interrupted run can go on with
it), locked (flock) by the process that fills it and published by rename. So a crash leaves the old state or the new
one, and the next run recognises what a dead one left.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trtkit import __version__
from trtkit.errors import InputError

MANIFEST = "trtkit.json"
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


@contextlib.contextmanager
def atomic_dir(out: Path, *, replace: bool = False, resume: str | None = None) -> Iterator[Path]:
    """Yields a temporary sibling of `out` that becomes `out` when the block ends without an exception.

    Args:
        out: the folder to make. Its parent is created; a symbolic link to a folder is followed.
        replace: swap with an existing folder, which is then deleted: the caller has made sure that nobody misses it.
            Without it an existing `out` is an error, unless it is an empty folder.
        resume: names what is made by all that determines it. What an interrupted block (a signal, a crash, but not an
            error) of the same name left behind is yielded again, for the caller to go on with.

    Raises:
        InputError: `out` may not be written to (see `check_output`), or another process is making it. Nothing was
            changed.
    """
    out = check_output(out, replace=replace)
    out.parent.mkdir(parents=True, exist_ok=True)
    name = None if resume is None else f".{out.name}.partial-{resume[:16]}"
    remove_abandoned(out, keep=name)
    temporary, lock = _claim(out, name)
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        check_output(out, replace=replace)
        if name is not None:
            # A name of its own: once it is published, nobody may take what was replaced for something to go on with.
            temporary = temporary.rename(tempfile.mkdtemp(prefix=f".{out.name}.tmp-", dir=out.parent))
        _publish(temporary, out)
    except BaseException as error:
        if name is None or isinstance(error, Exception):
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    else:
        shutil.rmtree(temporary, ignore_errors=True)  # after an exchange it holds what was replaced
    finally:
        os.close(lock)


def _claim(out: Path, name: str | None) -> tuple[Path, int]:
    """A temporary folder, and the descriptor that holds its lock."""
    while True:
        if name is None:
            folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.tmp-", dir=out.parent))
        else:
            folder = out.parent / name
            folder.mkdir(mode=0o700, exist_ok=True)
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue
        except NotADirectoryError:
            raise InputError(f"{folder} is in the way and is no folder", "remove it if you do not need it") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            if name is None:
                continue  # somebody takes it for an abandoned one and is about to remove it
            raise InputError(f"another process is writing {out}", "wait for it, or choose another folder") from None
        if folder.is_dir() and os.path.samestat(os.fstat(lock), folder.stat()):
            return folder, lock
        os.close(lock)  # removed or published between mkdir and flock


def check_output(out: Path, *, replace: bool = False) -> Path:
    """The absolute path of an output folder, if `atomic_dir` may make it.

    Raises:
        InputError: it exists already (and `replace` is off), is no folder, or is one that must not be replaced: the
            root, the home folder, the working folder, or a folder above them.
    """
    try:
        resolved = out.expanduser().resolve()
    except (OSError, RuntimeError) as error:
        raise InputError(f"{out} is not a usable path ({error})", "choose another output folder") from error
    if resolved.exists() and not resolved.is_dir():
        raise InputError(f"{out} exists and is not a folder", "choose another output folder")
    for precious in (Path.cwd(), Path.home()):
        if resolved == precious.resolve() or resolved in precious.resolve().parents:
            raise InputError(f"'{out}' is {resolved}, which is not a folder to write over", "name a new folder")
    if not replace and resolved.is_dir() and any(resolved.iterdir()):
        raise InputError(f"{out} exists already", "choose another output folder")
    return resolved


def atomic_write(path: Path, data: str | bytes, *, sync: bool = True) -> None:
    """Writes a file so that readers and crashes see the old content or the new one.

    Args:
        sync: also across a loss of power.
    """
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = data.encode() if isinstance(data, str) else data
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(raw)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        Path(name).chmod(0o666 & ~_umask())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def remove_abandoned(out: Path, *, keep: str | None = None) -> None:
    """Removes the temporary siblings of `out` that no living process holds, except the one named `keep`; puts back what
    a crash in the middle of replacing left aside."""
    aside = out.parent / f".{out.name}.replaced"
    if aside.is_dir() and not out.exists():
        aside.rename(out)
    prefix = glob.escape(f".{out.name}.")
    for pattern in ("tmp-*", "partial-*", "replaced"):
        for leftover in out.parent.glob(prefix + pattern):
            if leftover.name != keep:
                _remove_unlocked(leftover)


def _remove_unlocked(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pass  # somebody is at work there
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


class ArtifactStore:
    """Finished outputs of build steps, each in a folder named by the digest of everything that determines it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, kind: str, inputs: Mapping[str, Any]) -> Path:
        """Folder of the artifact with these inputs, whether or not it exists yet."""
        return self.root / kind / digest(inputs)[:20]

    def get(self, kind: str, inputs: Mapping[str, Any]) -> Path | None:
        """The finished artifact, or None."""
        path = self.path(kind, inputs)
        return path if (path / MANIFEST).is_file() else None

    def build(
        self, kind: str, inputs: Mapping[str, Any], make: Callable[[Path], None], *, resume: bool = False
    ) -> tuple[Path, bool]:
        """The artifact's folder and whether it was there already; otherwise `make(folder)` fills it.

        Processes that build the same artifact wait for the first one and take its result.

        Args:
            resume: `make` can go on with what an interrupted call of it left in the folder.
        """
        path = self.path(kind, inputs)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent / f".{path.name}.lock"):
            if self.get(kind, inputs) is not None:
                return path, True
            with atomic_dir(path, replace=True, resume=path.name if resume else None) as folder:
                make(folder)
                manifest = {"kind": kind, "inputs": dict(inputs), "trtkit": __version__, "created": int(time.time())}
                atomic_write(folder / MANIFEST, json.dumps(manifest, indent=2, sort_keys=True) + "\n")
        return path, False


def default_root() -> Path:
    """`$TRTKIT_STORE`, else `$XDG_CACHE_HOME/trtkit/store`, else `~/.cache/trtkit/store`."""
    if root := os.environ.get("TRTKIT_STORE"):
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trtkit" / "store"


def digest(inputs: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of `inputs`, as hex."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _publish(temporary: Path, out: Path) -> None:
    _sync_folder(temporary)
    if not out.exists():
        temporary.rename(out)
    elif not _exchange(temporary, out):
        # A filesystem that cannot exchange two names (some network ones): two renames. After a crash between them,
        # `remove_abandoned` puts the old folder back.
        aside = out.parent / f".{out.name}.replaced"
        shutil.rmtree(aside, ignore_errors=True)
        out.rename(aside)
        temporary.rename(out)
        shutil.rmtree(aside, ignore_errors=True)
    _sync_folder(out.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two names in one step; whether the filesystem can."""
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    if failed and ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(second))
    return not failed


def _sync_folder(folder: Path) -> None:
    """Returns once the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
