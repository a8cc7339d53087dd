"""Sources in object storage: `s3://bucket/prefix` and `gs://bucket/prefix` become a folder in a local cache.

    CACHE/sources/NAME-URLDIGEST/
        .lock               held (flock) by the process that downloads; others wait and find its work
        objects/DIGEST      a finished object, named by the digest of its name, etag and size
        objects/DIGEST.partial    one in the making; a changed object has another digest, so it starts anew
        LISTINGDIGEST/NAME  a snapshot: hard links to the objects of one listing, made by one rename

CACHE is `$TRTKIT_CACHE`, else `$XDG_CACHE_HOME/trtkit`, else `~/.cache/trtkit`. Any of these folders may be deleted.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from trtkit.errors import InputError, LacksError
from trtkit.remote.stores import Location, RemoteObject, Store, open_store
from trtkit.remote.transfer import Progress, download, intact

__all__ = ["is_remote", "parse", "snapshot"]

SCHEMES = ("s3", "gs")


def is_remote(source: str | Path) -> bool:
    """Whether a source is the address of a folder in object storage."""
    return str(source).startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


def parse(url: str) -> Location:
    """The parts of `s3://bucket/prefix` or `gs://bucket/prefix`; the prefix may be empty.

    Raises:
        InputError: another form. A refused URL is not repeated, since it may hold a secret.
    """
    scheme, _, rest = url.partition("://")
    bucket, _, prefix = rest.rstrip("/").partition("/")
    if scheme not in SCHEMES:
        raise InputError("the source is no s3:// or gs:// address", "write s3://bucket/prefix or gs://bucket/prefix")
    form = f"write {scheme}://bucket/prefix"
    if "@" in bucket or ":" in bucket or "?" in rest or re.match(r"[^/]*:[^@]*@", rest):
        cause = f"the {scheme}:// source holds credentials or a query, which would end up in files and logs"
        raise InputError(cause, f"{form} and give credentials through the environment")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,220}[A-Za-z0-9]", bucket):
        raise InputError(f"the {scheme}:// source does not start with a valid bucket name", form)
    if re.search(r"[\x00-\x1f\x7f#*\[\]]", prefix) or any(
        part in ("", ".", "..") for part in prefix.split("/") if prefix
    ):
        cause = f"the prefix of the source in bucket '{bucket}' holds an empty part, '.', '..' or one of # * [ ]"
        raise InputError(cause, f"{form} with plain names")
    return Location(scheme, bucket, prefix)


def snapshot(
    url: str,
    *,
    patterns: Sequence[str],
    ignored: Sequence[str] = (),
    cache: Path | None = None,
    on_progress: Progress | None = None,
) -> Path:
    """The folder that holds the files of one listing of `url`, downloaded as far as they are not here yet.

    Sub-folders are left out. The listing decides: names, sizes and etags name the folder, so an object that changed
    gives a new one, which shares the unchanged files with the old. A crash costs at most a few blocks.

    Args:
        url: `s3://bucket/prefix` or `gs://bucket/prefix`. Credentials and endpoint come from the environment, as s3fs
            and gcsfs define it (`AWS_*`, `GOOGLE_APPLICATION_CREDENTIALS`, `STORAGE_EMULATOR_HOST`).
        patterns: the file names to take, as shell patterns.
        ignored: those not to take after all.
        cache: cache folder instead of the default one.
        on_progress: called with (bytes here, bytes of all files), also for what earlier runs left.

    Raises:
        InputError: the URL, bucket or prefix is wrong, an object changed meanwhile, or there are only pickled weights.
        LacksError: an extra, credentials, permission, the network or disk space is missing.
    """
    location = parse(url)
    store = open_store(location)
    objects = _wanted(store, patterns, ignored)
    root = (cache or default_cache()) / "sources" / _folder_name(location)
    identity = _digest([(item.name, item.etag, item.size) for item in objects])
    try:
        with _locked(root):
            return _assemble(store, objects, root, root / identity, on_progress)
    except OSError as error:  # those of downloads are errors of ours already
        raise LacksError(
            f"cannot use the cache folder {root}: {error.strerror}", "set TRTKIT_CACHE to a folder to write to"
        ) from error


def default_cache() -> Path:
    """`$TRTKIT_CACHE`, else `$XDG_CACHE_HOME/trtkit`, else `~/.cache/trtkit`."""
    if own := os.environ.get("TRTKIT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trtkit"


def _wanted(store: Store, patterns: Sequence[str], ignored: Sequence[str]) -> list[RemoteObject]:
    """The objects to download, small ones first."""
    listed = store.listing()
    taken = [
        item
        for item in listed
        if any(fnmatchcase(item.name, pattern) for pattern in patterns)
        and not any(fnmatchcase(item.name, pattern) for pattern in ignored)
    ]
    pickled = [item.name for item in listed if item.name.endswith((".bin", ".pt", ".pth"))]
    if pickled and not any(item.name.endswith(".safetensors") for item in taken):
        raise InputError(
            f"{store.location.url} holds pickled weights ({pickled[0]}), which can run any code when they are loaded",
            "if you trust them, rewrite them once with transformers' save_pretrained and upload the safetensors files",
        )
    if not taken:
        found = ", ".join(item.name for item in listed[:3]) or "only sub-folders"
        raise InputError(f"{store.location.url} holds no file of a checkpoint ({found})", "give the model's own prefix")
    return sorted(taken, key=lambda item: (item.size, item.name))


def _assemble(
    store: Store, objects: list[RemoteObject], root: Path, folder: Path, on_progress: Progress | None
) -> Path:
    total = sum(item.size for item in objects)
    if folder.is_dir() and all(intact(folder / item.name, item) for item in objects):
        if on_progress:
            on_progress(total, total)
        return folder
    files = {item: root / "objects" / _digest([item.name, item.etag, item.size]) for item in objects}
    _check_space(root, files)
    done = 0
    for item, file in files.items():
        download(store, item, file, _shifted(on_progress, done, total))
        done += item.size
    _publish(files, folder)
    _clean(root / "objects")
    return folder


def _check_space(root: Path, files: dict[RemoteObject, Path]) -> None:
    """A download of hours that cannot fit is refused at its start."""
    missing = 0
    for item, file in files.items():
        partial = file.with_suffix(".partial")
        missing += 0 if file.exists() else item.size - (partial.stat().st_size if partial.exists() else 0)
    free = shutil.disk_usage(root).free
    if missing > free:
        raise LacksError(
            f"the download needs {missing / 1e9:.1f} GB more, and {root} has {free / 1e9:.1f} GB free",
            "free some space, or set TRTKIT_CACHE to a folder on a larger disk",
        )


def _publish(files: dict[RemoteObject, Path], folder: Path) -> None:
    temporary = folder.with_name(f".{folder.name}.tmp")  # the lock is ours, so one that is there is a dead one's
    for old in (temporary, folder):
        shutil.rmtree(old, ignore_errors=True)
    temporary.mkdir()
    for item, file in files.items():
        try:
            (temporary / item.name).hardlink_to(file)
        except OSError:  # a filesystem without hard links
            file.rename(temporary / item.name)
    temporary.rename(folder)


def _clean(objects: Path) -> None:
    """Removes what no snapshot holds: partial downloads of changed objects, and objects of deleted snapshots."""
    for file in objects.iterdir():
        if file.stat().st_nlink == 1:
            file.unlink()


def _shifted(on_progress: Progress | None, before: int, total: int) -> Callable[[int], None]:
    """Turns "so many bytes of this file" into "so many of all"."""
    if on_progress is None:
        return lambda done: None
    return lambda done: on_progress(before + done, total)


def _folder_name(location: Location) -> str:
    last = re.sub(r"[^\w.-]", "_", location.path.rsplit("/", 1)[-1])[:80]
    return f"{last}-{_digest([location.url])[:12]}"


def _digest(data: object) -> str:
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()[:20]


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    (root / "objects").mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
