"""The state folder: one folder `deployments/<name>` per deployment. Standard library only.

- `state.json` is the record, replaced atomically.
- `server.log` is what the server said, `server.log.previous` the one before.
- `lock` is held (flock) by the supervisor for as long as anything of a local deployment lives.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from trtkit.errors import InputError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # the same names as trtkit.config.NAME_PATTERN; a test compares
LIVE = frozenset({"starting", "running", "stopping"})
ENDED = frozenset({"stopped", "failed", "crashed"})
"""Phases of a deployment that lives, and of one that is over."""

# What a record must hold, so that nobody after `read` meets a hole in it.
_HOLDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("name", "target", "phase", "host", "repository", "log_path"), str),
    **dict.fromkeys(("http_port", "grpc_port", "metrics_port"), int),
    "models": list,
    "started_at": (int, float),
}
_HOLDS_TOO: dict[str, dict[str, type]] = {
    "local": {"token": str, "shm_prefix": str, "exit_timeout_s": int},
    "docker": {"token": str, "container": str, "stop_timeout_s": int},
}


def state_dir() -> Path:
    """`$TRTKIT_STATE_DIR`, else `$XDG_STATE_HOME/trtkit`, else `~/.local/state/trtkit`."""
    if own := os.environ.get("TRTKIT_STATE_DIR"):
        return Path(own).absolute()
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state").absolute() / "trtkit"


def folder_of(name: str) -> Path:
    """Folder of a deployment, which need not exist.

    Raises:
        InputError: the name could be misread as a path.
    """
    if NAME.fullmatch(name) is None:
        fix = "use letters, digits, '.', '_' and '-', at most 64 of them, and no sign first"
        raise InputError(f"'{name}' is not a deployment name", fix)
    return state_dir() / "deployments" / name


def make_folder(name: str) -> Path:
    """Creates the folder of a deployment; only its owner may look into it."""
    folder = folder_of(name)
    for path in (state_dir(), folder.parent, folder):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def names() -> list[str]:
    """Deployments that have a record, running or not, even one that cannot be read."""
    try:
        folders = list((state_dir() / "deployments").iterdir())
    except OSError:
        return []
    return sorted(entry.name for entry in folders if NAME.fullmatch(entry.name) and (entry / "state.json").is_file())


def read(folder: Path) -> dict[str, Any] | None:
    """The record, or None when there is none that can be read, or it is damaged."""
    try:
        record = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if _is_whole(record) else None


def _is_whole(record: object) -> bool:
    """Whether a record holds what it must. The token may not be empty: what carries it is killed or removed."""
    if not isinstance(record, dict) or record.get("phase") not in LIVE | ENDED:
        return False
    target = record.get("target")
    if target not in ("local", "docker"):
        return False
    holds = _HOLDS | _HOLDS_TOO[target]
    return all(isinstance(record.get(key), kind) for key, kind in holds.items()) and record.get("token") != ""


def write(folder: Path, record: dict[str, Any]) -> None:
    """Replaces the record in one step: a reader sees the old one or the new one, never a part."""
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".state-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(record, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).replace(folder / "state.json")
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def acquire(folder: Path, patience_s: float = 0.0) -> int | None:
    """Takes the lock of a deployment: an open file descriptor, or None when somebody else keeps it.

    Whoever only looks whether the lock is free holds it for an instant; `patience_s` outlasts that. The lock belongs to
    the open file, so a child that inherits the descriptor holds it too, and the kernel frees it when the last holder is
    gone, however it died.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            make_folder(folder.name)  # removed by `remove` a moment ago
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.02)
            continue
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), (folder / "lock").stat()):
                return descriptor
        os.close(descriptor)  # the folder was removed between open and flock: this lock guards nothing


def is_locked(folder: Path) -> bool:
    """Whether somebody holds the lock, that is, whether the deployment lives."""
    if not (folder / "lock").exists():
        return False
    descriptor = acquire(folder)
    if descriptor is None:
        return True
    os.close(descriptor)
    return False


def wait_unlocked(folder: Path, seconds: float) -> bool:
    """Waits until nobody holds the lock; False when `seconds` were not enough."""
    deadline = time.monotonic() + seconds
    while is_locked(folder):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.05)
    return True


def remove(folder: Path) -> None:
    """Removes a deployment's folder. The caller holds its lock."""
    doomed = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".removed-"))
    with suppress(FileNotFoundError):
        folder.rename(doomed / folder.name)
    shutil.rmtree(doomed, ignore_errors=True)
