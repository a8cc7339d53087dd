"""The two object stores, by s3fs and gcsfs: a listing, and byte ranges of the very object that was listed."""

from __future__ import annotations

import abc
import base64
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from trtkit.errors import InputError, missing_extra
from trtkit.remote.failures import ChangedError, kind_of, plain

LISTING_SECONDS = 60.0
"""A listing that takes longer counts as an endpoint that cannot be reached (gcsfs alone would try for minutes)."""


@dataclass(frozen=True)
class Location:
    """A folder in object storage. `prefix` has no slash at its ends and may be empty."""

    scheme: str
    bucket: str
    prefix: str

    @property
    def path(self) -> str:
        return f"{self.bucket}/{self.prefix}" if self.prefix else self.bucket

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.path}"


@dataclass(frozen=True)
class RemoteObject:
    """One object of a listing.

    Attributes:
        name: its file name, checked to be one.
        size: bytes.
        etag: changes with the content; on gs the generation, by which reads ask for it.
        modified: seconds since the epoch, whole.
        checksum: `("md5" or "crc32c", digest)` of the content, where the listing tells one.
    """

    name: str
    size: int
    etag: str
    modified: int
    checksum: tuple[str, bytes] | None


class Store(abc.ABC):
    """A folder in one object store. Subclasses say how entries look and how a range is asked for."""

    def __init__(self, location: Location, filesystem: Any) -> None:
        self.location = location
        self.filesystem = filesystem

    def listing(self) -> list[RemoteObject]:
        """The objects directly below the prefix.

        Raises:
            InputError: no such bucket or prefix, or a name that is none for a file.
            LacksError: see `failures.plain`.
        """
        try:
            entries = self.filesystem.ls(self.location.path, detail=True, refresh=True, timeout=LISTING_SECONDS)
        except Exception as error:
            raise plain(error, self.location.url, self.endpoint()) from error
        objects = [self.describe(name, entry) for name, entry in self._files(entries)]
        if not entries:
            raise InputError(f"{self.location.url} is empty", "check the prefix")
        return objects

    @abc.abstractmethod
    def read(self, item: RemoteObject, start: int, end: int) -> bytes:
        """Bytes [start, end) of the object; fewer when the store sends fewer.

        Raises:
            ChangedError: the object is another one by now, or gone.
            Exception: whatever the library raises; `failures.kind_of` sorts it.
        """

    @abc.abstractmethod
    def describe(self, name: str, entry: dict[str, Any]) -> RemoteObject:
        """The object behind an entry of the library's listing."""

    def checksum_counts(self, item: RemoteObject) -> bool:
        """Whether a checksum that does not match proves that the content is another."""
        return True

    @abc.abstractmethod
    def endpoint(self) -> str:
        """Where the store is asked, for messages."""

    def _files(self, entries: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
        root = f"{self.location.path}/"
        for entry in entries:
            name, folder = str(entry["name"]), entry["type"] == "directory"
            if name.rstrip("/") == self.location.path:
                if folder or name.endswith("/"):
                    continue  # the empty object that consoles make for a folder
                raise InputError(f"{self.location.url} is an object, not a folder", "give the prefix above it")
            base = name.removeprefix(root).rstrip("/" if folder else "")
            if not name.startswith(root) or not _is_file_name(base):
                raise InputError(
                    f"{self.location.url} lists {base!r}, which is no file name", "do not use this checkpoint"
                )
            if not folder:
                yield base, entry


class S3(Store):
    def describe(self, name: str, entry: dict[str, Any]) -> RemoteObject:
        etag = str(entry["ETag"])
        # The etag of a single upload is the content's MD5; one in parts has a dash. Directory buckets have random ones.
        md5 = re.fullmatch(r'"?([0-9a-f]{32})"?', etag) if not self.location.bucket.endswith("--x-s3") else None
        checksum = ("md5", bytes.fromhex(md5[1])) if md5 else None
        return RemoteObject(name, int(entry["size"]), etag, int(entry["LastModified"].timestamp()), checksum)

    def read(self, item: RemoteObject, start: int, end: int) -> bytes:
        from fsspec.asyn import sync

        span = f"bytes={start}-{end - 1}"
        try:
            response = self.filesystem.call_s3("get_object", **self._key(item), Range=span, IfMatch=item.etag)
        except Exception as error:
            if kind_of(error) in ("changed", "missing"):
                raise ChangedError(item.name) from error
            raise
        if response["ETag"] != item.etag:  # a store that does not know If-Match
            response["Body"].close()
            raise ChangedError(item.name)
        return bytes(sync(self.filesystem.loop, response["Body"].read))

    def checksum_counts(self, item: RemoteObject) -> bool:
        """No for objects encrypted with KMS or customer keys, whose etag looks like an MD5 and is none."""
        try:
            head = self.filesystem.call_s3("head_object", **self._key(item))
        except Exception as error:
            raise plain(error, self.location.url, self.endpoint()) from error
        return "SSECustomerAlgorithm" not in head and not head.get("ServerSideEncryption", "").startswith("aws:kms")

    def endpoint(self) -> str:
        client = getattr(self.filesystem, "_s3", None)
        return str(client.meta.endpoint_url) if client else os.environ.get("AWS_ENDPOINT_URL", "")

    def _key(self, item: RemoteObject) -> dict[str, str]:
        prefix = self.location.prefix
        return {"Bucket": self.location.bucket, "Key": f"{prefix}/{item.name}" if prefix else item.name}


class Gcs(Store):
    def describe(self, name: str, entry: dict[str, Any]) -> RemoteObject:
        checksum = None
        for kind, key in (("crc32c", "crc32c"), ("md5", "md5Hash")):  # composed objects have no MD5
            if checksum is None and key in entry:
                checksum = (kind, base64.b64decode(entry[key]))
        updated = datetime.fromisoformat(str(entry["updated"]).replace("Z", "+00:00"))
        return RemoteObject(name, int(entry["size"]), str(entry["generation"]), int(updated.timestamp()), checksum)

    def read(self, item: RemoteObject, start: int, end: int) -> bytes:
        path = f"{self.location.path}/{item.name}"
        try:
            return bytes(self.filesystem.cat_file(path, start=start, end=end, generation=item.etag))
        except FileNotFoundError as error:
            raise ChangedError(item.name) from error

    def endpoint(self) -> str:
        return os.environ.get("STORAGE_EMULATOR_HOST") or "https://storage.googleapis.com"


def open_store(location: Location, *, write: bool = False) -> Store:
    """The folder's store, with credentials and endpoint from the environment. Nothing is asked yet.

    Args:
        write: ask for the right to write, too.

    Raises:
        LacksError: the extra is not installed, or the environment's settings cannot be used.
    """
    try:
        return S3(location, _s3_filesystem()) if location.scheme == "s3" else Gcs(location, _gcs_filesystem(write))
    except ImportError as error:
        package = "s3fs" if location.scheme == "s3" else "gcsfs"
        raise missing_extra(package, location.scheme) from error
    except Exception as error:
        raise plain(error, location.url, "") from error


def _s3_filesystem() -> Any:
    import s3fs

    settings = {"connect_timeout": 10, "read_timeout": 60, "retries": {"total_max_attempts": 3, "mode": "standard"}}
    filesystem = s3fs.S3FileSystem(config_kwargs=settings, skip_instance_cache=True)
    filesystem.retries = 1  # botocore's own attempts and ours are enough; s3fs would multiply them
    return filesystem


def _gcs_filesystem(write: bool) -> Any:
    import aiohttp
    from gcsfs.core import GCSFileSystem  # the JSON interface; the package's other class needs gRPC

    for name in ("gcsfs", "google"):  # they log tracebacks, which python prints where nobody else listens
        logging.getLogger(name).addHandler(logging.NullHandler())
    settings: dict[str, Any] = {"access": "read_write" if write else "read_only"}
    if os.environ.get("STORAGE_EMULATOR_HOST"):
        settings["token"] = "anon"  # noqa: S105 - real credentials are not for an emulator
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60)
    return GCSFileSystem(requests_timeout=timeout, skip_instance_cache=True, **settings)


def _is_file_name(name: str) -> bool:
    return (
        name not in ("", ".", "..")
        and not re.search(r"[\x00-\x1f\x7f/]", name)
        and len(name.encode("utf-8", "surrogateescape")) <= 255
    )
