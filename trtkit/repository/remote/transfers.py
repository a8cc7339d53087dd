"""What a push and a pull have in common: their result, progress, and several files at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from trtkit.repository.remote.manifest import Manifest

Progress = Callable[[int, int], None]

PARALLEL = 4
"""Files under way at once; each is split into several connections by the store's library."""


@dataclass(frozen=True)
class VersionTransfer:
    """One version: `present` on both sides already, or `moved` (by a dry run: would be)."""

    model: str
    version: int
    state: str
    files: int
    bytes: int


@dataclass(frozen=True)
class Transfer:
    """What a push or a pull did, or would do.

    Attributes:
        configs: models whose config.pbtxt was written.
        done: False for a dry run.
    """

    url: str
    repository: str
    versions: tuple[VersionTransfer, ...]
    configs: tuple[str, ...]
    done: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def in_parallel(work: Callable[[str], None], names: list[str]) -> None:
    """At the first error nothing further is begun."""
    pool = ThreadPoolExecutor(PARALLEL)
    try:
        for done in [pool.submit(work, name) for name in names]:
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def counted(on_progress: Progress | None, total: int) -> Iterator[Callable[[int], None]]:
    """A function that adds bytes to what is done, from any thread."""
    done, lock = 0, threading.Lock()

    def count(size: int) -> None:
        nonlocal done
        with lock:
            done += size
            if on_progress:
                on_progress(done, total)

    count(0)
    yield count


def as_transfer(manifest: Manifest, moves: bool) -> VersionTransfer:
    state = "moved" if moves else "present"
    return VersionTransfer(manifest.model, manifest.version, state, len(manifest.files), manifest.size)
