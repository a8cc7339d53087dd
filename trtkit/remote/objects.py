"""Objects below a prefix, read and written by name; small ones on condition that nobody else was faster.

Conditional writes: Amazon S3, PutObject with If-None-Match and If-Match; Cloud Storage, ifGenerationMatch.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

from trtkit.errors import InputError
from trtkit.remote import transfer
from trtkit.remote.failures import kind_of, plain
from trtkit.remote.stores import Gcs, Location, RemoteObject, Store, open_store


class Objects:
    """The objects below a prefix. Names are relative to it, with `/` between parts.

    Every method raises InputError or LacksError for what the store answers (see `failures.plain`). Safe to use from
    several threads.
    """

    def __init__(self, location: Location, *, write: bool = False) -> None:
        self.store: Store = open_store(location, write=write)
        self.location = location

    def listing(self) -> dict[str, RemoteObject]:
        """All objects below the prefix, however deep; none where nothing is there. A bucket must exist.

        Raises:
            InputError: also for names that are no file paths.
        """
        try:
            self.store.filesystem.invalidate_cache()
            found = self.store.filesystem.find(self.location.path, detail=True)
        except FileNotFoundError as error:
            if kind_of(error) == "bucket" or not self.location.prefix:
                raise self._plain(error) from error
            return {}
        except Exception as error:
            raise self._plain(error) from error
        root = f"{self.location.path}/"
        objects = {}
        for path, entry in found.items():
            name = str(path).removeprefix(root)
            if entry["type"] == "directory" or name.endswith("/") or not str(path).startswith(root):
                continue
            if not is_plain_path(name):
                raise InputError(f"{self.location.url} lists {name!r}, which is no file name", "remove that object")
            objects[name] = self.store.describe(name, entry)
        return objects

    def get(self, name: str) -> tuple[bytes, str] | None:
        """Content of a small object, and its version for `put`; None when it is not there."""
        key = self._key(name)
        try:
            if isinstance(self.store, Gcs):
                info = self.store.filesystem.info(f"{self.location.bucket}/{key}", refresh=True)
                version = str(info["generation"])
                data = self.store.filesystem.cat_file(f"{self.location.bucket}/{key}", generation=version)
                return bytes(data), version
            from fsspec.asyn import sync

            answer = self.store.filesystem.call_s3("get_object", Bucket=self.location.bucket, Key=key)
            return bytes(sync(self.store.filesystem.loop, answer["Body"].read)), str(answer["ETag"])
        except Exception as error:
            if kind_of(error) == "missing":
                return None
            raise self._plain(error) from error

    def put(self, name: str, data: bytes, *, expected: str | None) -> bool:
        """Writes a small object if it is still the `expected` version, or not there at all (None).

        Returns:
            False when it is another one by now. True also when a repeated attempt finds its own first one.
        """
        for attempt in range(transfer.ATTEMPTS):
            try:
                self._put(self._key(name), data, expected)
                return True
            except Exception as error:
                kind = kind_of(error)
                if kind in ("changed", "missing"):  # S3 says "missing" when If-Match finds nothing
                    there = self.get(name)
                    return there is not None and there[0] == data
                if attempt + 1 == transfer.ATTEMPTS or kind not in ("unreachable", "other"):
                    raise self._plain(error) from error
                time.sleep(2.0**attempt / 4)
        raise AssertionError

    def upload(self, content: Path | bytes, name: str) -> None:
        """Writes a file as an object, which appears whole or not at all. One that is there is replaced."""
        target = f"{self.location.bucket}/{self._key(name)}"
        for attempt in range(transfer.ATTEMPTS):
            try:
                if isinstance(content, Path):
                    self.store.filesystem.put_file(str(content), target)
                else:
                    self.store.filesystem.pipe_file(target, content)
                return
            except Exception as error:
                if attempt + 1 == transfer.ATTEMPTS or kind_of(error) not in ("unreachable", "other"):
                    raise self._plain(error) from error
                time.sleep(2.0**attempt / 4)

    def download(self, item: RemoteObject, file: Path, on_progress: Callable[[int], None]) -> None:
        """Makes `file` the content of a listed object, in blocks; goes on where a crash left off."""
        transfer.download(self.store, item, file, on_progress)

    def _put(self, key: str, data: bytes, expected: str | None) -> None:
        filesystem, bucket = self.store.filesystem, self.location.bucket
        if isinstance(self.store, Gcs):
            filesystem.call(
                "POST",
                f"{filesystem._location}/upload/storage/v1/b/{bucket}/o",
                uploadType="media",
                name=key,
                ifGenerationMatch=expected or "0",
                headers={"Content-Type": "application/octet-stream"},
                data=data,
            )
        else:
            condition = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": expected}
            filesystem.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)

    def _key(self, name: str) -> str:
        return f"{self.location.prefix}/{name}" if self.location.prefix else name

    def _plain(self, error: Exception) -> Exception:
        return plain(error, self.location.url, self.store.endpoint())


def has_content(item: RemoteObject, file: Path) -> bool:
    """Whether an object is this file: by size, and by the checksum where the listing tells one."""
    if not file.is_file() or file.stat().st_size != item.size:
        return False
    if item.checksum is None:
        return True
    hasher = transfer._hasher(item)
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            hasher.update(block)
    return bool(hasher.digest() == item.checksum[1])


def is_plain_path(name: str) -> bool:
    """Whether a name is a relative path that stays below where it is put, on any filesystem."""
    parts = name.split("/")
    return not re.search(r"[\x00-\x1f\x7f\\]", name) and all(
        part not in ("", ".", "..") and len(part.encode("utf-8", "surrogateescape")) <= 255 for part in parts
    )
