"""safetensors files by header and byte range: nothing is loaded that is not asked for.

Format (safetensors README, "Format"): 8 bytes little-endian length N, N bytes of JSON that maps tensor names to
`{"dtype", "shape", "data_offsets": [begin, end]}` relative to the end of the header, then the data, row-major and
little-endian. `__metadata__` holds strings.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from trtkit.errors import InputError

MAX_HEADER = 100_000_000
"""Largest header that the format's own reader accepts, in bytes."""

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies.

    Attributes:
        path: the file.
        dtype: numpy dtype (bfloat16 and float8 from ml_dtypes).
        shape: elements per axis.
        start: byte offset of the first element from the start of the file.
    """

    path: Path
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a file, checked against its size: a truncated or corrupt file does not get past this.

    Raises:
        InputError: the file is missing, truncated, or its header is not valid; names the file and the tensor.
    """
    fix = "download or write the file again"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(MAX_HEADER, size - 8):
                raise InputError(f"{path}: not a safetensors file, or truncated within its header", fix)
            raw = file.read(length)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", "check the path and its permissions") from error
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        entries = {name: _entry(path, name, record, 8 + length) for name, record in header.items()}
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: the safetensors header is corrupt ({error})", fix) from error
    _check_layout(path, entries, 8 + length, size, fix)
    return entries


def _entry(path: Path, name: str, record: Mapping[str, Any], data_start: int) -> TensorEntry:
    if record["dtype"] not in DTYPES:
        raise InputError(f"{path}: tensor '{name}' has dtype {record['dtype']}, which trtkit does not read", "")
    begin, end = record["data_offsets"]
    shape = tuple(int(extent) for extent in record["shape"])
    entry = TensorEntry(path, name, DTYPES[record["dtype"]], shape, data_start + int(begin))
    if end - begin != entry.nbytes or begin < 0 or any(extent < 0 for extent in shape):
        raise InputError(
            f"{path}: tensor '{name}' claims {end - begin} bytes, {record['dtype']}{list(shape)} takes {entry.nbytes}",
            "download or write the file again",
        )
    return entry


def _check_layout(path: Path, entries: Mapping[str, TensorEntry], data_start: int, size: int, fix: str) -> None:
    """The data section is covered without gaps or overlaps, and it ends where the file ends."""
    position = data_start
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.nbytes)):
        if entry.start + entry.nbytes > size:
            missing = entry.start + entry.nbytes - size
            raise InputError(f"{path}: truncated: tensor '{entry.name}' ends {missing} bytes after the file does", fix)
        if entry.start != position:
            raise InputError(f"{path}: tensor '{entry.name}' leaves a gap or overlaps its neighbour", fix)
        position += entry.nbytes
    if position != size:
        raise InputError(f"{path}: {size - position} bytes follow the last tensor", fix)


class Reader:
    """Reads parts of tensors with pread; keeps the files open. Use as a context manager."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def rows(self, entry: TensorEntry, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows `start` to `stop` of the first axis (a scalar tensor has one row), shape `(stop - start, *rest)`."""
        rest = entry.shape[1:]
        row_bytes = math.prod(rest) * entry.dtype.itemsize
        out = np.empty((stop - start, *rest), dtype=entry.dtype)
        self._fill(entry, entry.start + start * row_bytes, out.reshape(-1).view(np.uint8).data)
        return out

    def elements(self, entry: TensorEntry, start: int, count: int) -> npt.NDArray[Any]:
        """`count` elements from flat index `start`, shape `(count,)`."""
        out = np.empty(count, dtype=entry.dtype)
        self._fill(entry, entry.start + start * entry.dtype.itemsize, out.view(np.uint8).data)
        return out

    def tensor(self, entry: TensorEntry) -> npt.NDArray[Any]:
        """The whole tensor."""
        return self.elements(entry, 0, math.prod(entry.shape)).reshape(entry.shape)

    def _fill(self, entry: TensorEntry, offset: int, buffer: memoryview) -> None:
        if entry.path not in self._files:
            self._files[entry.path] = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC)
        descriptor = self._files[entry.path]
        while buffer:
            count = os.preadv(descriptor, [buffer], offset)
            if count == 0:
                raise InputError(
                    f"{entry.path}: ends within tensor '{entry.name}'", "the file was changed while it was read"
                )
            buffer, offset = buffer[count:], offset + count


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Writer:
    """Writes a safetensors file whose tensors are known in advance, in any order of parts.

    The file gets its full size at once, so a full disk shows at the start where the filesystem allows it, and what is
    never written reads as zeros. The bytes depend only on the specs and the data.
    """

    def __init__(self, path: Path, specs: Sequence[TensorSpec]) -> None:
        self.path = path
        records: dict[str, Any] = {}
        position = 0
        # Wide elements first keeps every tensor aligned to its element size, as the format's own writer does.
        for spec in sorted(specs, key=lambda s: (-s.dtype.itemsize, s.name)):
            records[spec.name] = {
                "dtype": _NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [position, position + spec.nbytes],
            }
            position += spec.nbytes
        header = json.dumps(records, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        data_start = 8 + len(header)
        self._starts = {name: data_start + record["data_offsets"][0] for name, record in records.items()}
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        if position:
            os.posix_fallocate(self._file, 0, data_start + position)
        self._write_all(0, len(header).to_bytes(8, "little") + header)

    def write(self, name: str, element: int, values: npt.NDArray[Any]) -> None:
        """Writes `values` (any shape, C order, of the tensor's dtype) from flat index `element` of tensor `name`."""
        flat = np.ascontiguousarray(values).reshape(-1)
        self._write_all(self._starts[name] + element * flat.dtype.itemsize, flat.view(np.uint8).data)

    def close(self) -> None:
        os.close(self._file)

    def _write_all(self, offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            count = os.pwrite(self._file, view, offset)
            view, offset = view[count:], offset + count
