"""Sources that are not on this machine, by their small files and headers alone.

A folder is made whose safetensors files hold the real headers and have the real sizes, but holes in place of the
weights. So whatever reads headers works there as it does on the whole download.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from trtkit import hub, remote
from trtkit.errors import LacksError
from trtkit.remote.failures import plain
from trtkit.remote.stores import open_store
from trtkit.safetensors_io import MAX_HEADER
from trtkit.untrusted import MAX_JSON, is_name, printable

FIRST_BYTES = 100_000
"""Asked for at first: most headers are shorter."""

Read = Callable[[int, int], bytes]
"""Bytes from start to end of one file."""


@contextlib.contextmanager
def headers_only(source: str, revision: str | None = None) -> Iterator[tuple[Path, str]]:
    """A temporary folder with the small files and headers of a source, and the source's origin.

    Args:
        source: a hub id, or `s3://bucket/prefix` or `gs://bucket/prefix`.

    Raises:
        InputError: no such model, revision, bucket or prefix.
        LacksError: no access, no connection, or an extra is missing.
    """
    with tempfile.TemporaryDirectory(prefix="trtkit-inspect-") as name:
        folder = Path(name)
        origin = _from_store(source, folder) if remote.is_remote(source) else _from_hub(source, revision, folder)
        yield folder, origin


def _from_store(source: str, folder: Path) -> str:
    location = remote.parse(source)
    store = open_store(location)
    for item in store.listing():
        try:
            if item.name.endswith(".json") and 0 < item.size <= MAX_JSON:
                (folder / item.name).write_bytes(store.read(item, 0, item.size))
            elif _has_weights(item.name):
                write_header(folder / item.name, item.size, partial(store.read, item))
            else:
                (folder / item.name).touch()
        except Exception as error:
            raise plain(error, location.url, store.endpoint()) from error
    return location.url


def _from_hub(repo: str, revision: str | None, folder: Path) -> str:
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        snapshot = _small_files(repo, revision)
    except (HTTPError, OSError, ValueError):
        snapshot = hub.download(repo, revision)  # which says in one line what is wrong
    for file in snapshot.iterdir():
        (folder / file.name).symlink_to(file)
    names = _names_on_hub(repo, snapshot.name)
    if not names and not any(_has_weights(file.name) for file in snapshot.iterdir()):
        cause = f"cannot reach the hub, and of '{repo}' its local cache holds only small files"
        raise LacksError(cause, "run again with a connection")
    for name in names:
        if (folder / name).is_symlink():
            continue
        try:
            if _has_weights(name):
                _hub_header(repo, snapshot.name, name, folder / name)
            else:
                (folder / name).touch()
        except (HTTPError, OSError) as error:
            reason = printable(str(error).splitlines()[0] if str(error) else type(error).__name__, 200)
            raise LacksError(f"cannot read the header of {name} of '{repo}' ({reason})", "run again") from error
    return f"hub:{repo}@{snapshot.name}"


def _small_files(repo: str, revision: str | None) -> Path:
    """The folder of a commit in huggingface_hub's cache, with its JSON files; also with the weights if they are there
    already."""
    import huggingface_hub
    from huggingface_hub import utils

    hub_utils: Any = utils
    mute = not hub_utils.are_progress_bars_disabled()
    if mute:
        hub_utils.disable_progress_bars()
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=["*.json"], ignore_patterns=hub.NOT_FILES
            )
        )
    finally:
        if mute:
            hub_utils.enable_progress_bars()


def _names_on_hub(repo: str, commit: str) -> list[str]:
    """The files of a commit, without those in folders; none without a connection, when the cache must do."""
    import huggingface_hub
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        found = huggingface_hub.HfApi().list_repo_files(repo, revision=commit)
    except (HTTPError, OSError):
        return []
    return [name for name in found if "/" not in name and name not in (".", "..") and is_name(name)]


def _has_weights(name: str) -> bool:
    return name.endswith(".safetensors") and not name.startswith("consolidated")


def _hub_header(repo: str, commit: str, name: str, file: Path) -> None:
    import huggingface_hub
    from huggingface_hub import utils

    hub_utils: Any = utils
    url = huggingface_hub.hf_hub_url(repo, name, revision=commit)

    def ask(start: int, end: int) -> Any:
        headers = {**hub_utils.build_hf_headers(), "Range": f"bytes={start}-{end - 1}"}
        answer = hub_utils.get_session().get(url, headers=headers, timeout=30)
        hub_utils.hf_raise_for_status(answer)
        return answer

    first = ask(0, FIRST_BYTES)
    whole = re.fullmatch(r"bytes 0-\d+/(\d+)", first.headers.get("Content-Range", ""))
    size = int(whole[1]) if whole else len(first.content)
    write_header(
        file, size, lambda start, end: first.content[:end] if start == 0 else ask(start, end).content[: end - start]
    )


def write_header(file: Path, size: int, read: Read) -> None:
    """Writes a file of `size` bytes that holds the header of a safetensors file and nothing behind it."""
    data = read(0, min(size, FIRST_BYTES)) if size else b""
    length = 8 + int.from_bytes(data[:8], "little")
    if len(data) < length <= min(size, 8 + MAX_HEADER):
        data += read(len(data), length)
    file.write_bytes(data[:length])
    os.truncate(file, size)
