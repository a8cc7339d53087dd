"""One object to one file: in ranged blocks, several under way at once, continued where a crash left off."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from trtkit.errors import CheckFailedError, InputError, LacksError
from trtkit.remote.failures import ChangedError, kind_of, plain
from trtkit.remote.stores import RemoteObject, Store

Progress = Callable[[int, int], None]

BLOCK_BYTES = 16 * 2**20
CONCURRENT_BLOCKS = 8
"""One connection to an object store carries some 100 MB/s; several fill the network. They bound the memory."""
ATTEMPTS = 4


def download(store: Store, item: RemoteObject, file: Path, on_progress: Callable[[int], None]) -> None:
    """Makes `file` the object's content, by `file.partial`, which is left for the next run when this one fails.

    Args:
        on_progress: called with the bytes that are in the file so far.

    Raises:
        InputError: the object changed, or is shorter than its listing says.
        CheckFailedError: the content does not have the checksum of the listing; the partial file is removed.
        LacksError: the disk is full (the partial file is removed), or see `failures.plain`.
    """
    if intact(file, item):
        on_progress(item.size)
        return
    partial = file.with_suffix(".partial")
    url = f"{store.location.url}/{item.name}"
    try:
        checksum = _fill(store, item, partial, on_progress)
    except ChangedError as error:
        partial.unlink(missing_ok=True)
        raise InputError(
            f"{url} changed while it was downloaded", "run again when nobody writes there; finished files are kept"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        partial.unlink(missing_ok=True)
        raise LacksError(
            f"the disk of {file.parent} is full: {url} has {item.size / 1e9:.1f} GB",
            "free some space, or set TRTKIT_CACHE to a folder on a larger disk",
        ) from error
    if item.checksum and checksum != item.checksum[1] and store.checksum_counts(item):
        partial.unlink()
        raise CheckFailedError(f"{url}: the download does not have the object's {item.checksum[0]}", "run again")
    os.utime(partial, (item.modified, item.modified))
    partial.replace(file)


def intact(file: Path, item: RemoteObject) -> bool:
    """Whether a file still has the size and time that its download gave it."""
    try:
        stat = file.stat()
    except OSError:
        return False
    return (stat.st_size, int(stat.st_mtime)) == (item.size, item.modified)


def _fill(store: Store, item: RemoteObject, partial: Path, on_progress: Callable[[int], None]) -> bytes:
    """Downloads what is missing; returns the digest of the whole."""
    hasher = _hasher(item)
    with partial.open("ab") as file:
        if file.tell() > item.size:
            file.truncate(0)
        done = _hash_existing(partial, file.tell(), hasher)
        on_progress(done)
        with ThreadPoolExecutor(CONCURRENT_BLOCKS) as pool:
            starts = iter(range(done, item.size, BLOCK_BYTES))
            waiting: deque[Future[bytes]] = deque()

            def submit() -> None:
                if (start := next(starts, None)) is not None:
                    end = min(start + BLOCK_BYTES, item.size)
                    waiting.append(pool.submit(_block, store, item, start, end))

            for _ in range(CONCURRENT_BLOCKS):
                submit()
            try:
                while waiting:
                    block = waiting.popleft().result()
                    submit()
                    # At once to the system, in order: what the file holds after a crash is a prefix of the object.
                    file.write(block)
                    file.flush()
                    hasher.update(block)
                    done += len(block)
                    on_progress(done)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        os.fsync(file.fileno())
    return bytes(hasher.digest())


def _block(store: Store, item: RemoteObject, start: int, end: int) -> bytes:
    """Bytes [start, end) of the object, trying again what may be an accident."""
    url = f"{store.location.url}/{item.name}"
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(2.0**attempt / 4)
        try:
            block = store.read(item, start, end)
        except ChangedError:
            raise
        except Exception as error:
            if attempt + 1 < ATTEMPTS and kind_of(error) in ("unreachable", "other"):
                continue
            raise plain(error, url, store.endpoint()) from error
        if len(block) == end - start:
            return block
    raise InputError(f"{url} is truncated: bytes {start} to {end} of {item.size} are not all there", "upload it again")


def _hash_existing(partial: Path, size: int, hasher: Any) -> int:
    done = 0
    with partial.open("rb") as file:
        while block := file.read(min(2**20, size - done)):
            hasher.update(block)
            done += len(block)
    return done


def _hasher(item: RemoteObject) -> Any:
    if item.checksum and item.checksum[0] == "crc32c":
        import google_crc32c  # a dependency of gcsfs

        return google_crc32c.Checksum()
    return hashlib.md5(usedforsecurity=False)
