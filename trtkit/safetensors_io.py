"""safetensors files by header and byte range: nothing is loaded that is not asked for.

Format (safetensors README, "Format"): 8 bytes little-endian length N, N bytes of JSON that maps tensor names to
`{"dtype", "shape", "data_offsets": [begin, end]}` relative to the end of the header, then the data, row-major and
little-endian. `__metadata__` holds strings.
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from trtkit.errors import InputError
from trtkit.untrusted import is_name, open_plain, parse_json, printable, refuse_pointer, unreadable

COPY_BYTES = 64 << 20
"""Most that one call to the kernel copies: between two, an interrupt is noticed."""
PAGE = 4096
_buffers = threading.local()

MAX_HEADER = 100_000_000
"""Largest header that the format's own reader accepts, in bytes."""
MAX_RANK = 32
"""Most axes of a tensor; numpy before 2 has no more."""

_FIX = "download or write the file again"

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
_CANNOT_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)
"""What copy_file_range answers where a filesystem or the kernel does not do it."""
_WRITE = 2  # SYNC_FILE_RANGE_WRITE

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
    raw, size = header_bytes(path)
    try:
        header = parse_json(raw)
    except ValueError as error:
        raise _corrupt(path, str(error)) from error
    if not isinstance(header, dict):
        raise _corrupt(path, "not a JSON object")
    data_start = 8 + len(raw)
    entries = {
        name: _entry(path, name, record, data_start) for name, record in header.items() if name != "__metadata__"
    }
    _check_layout(path, entries, data_start, size)
    return entries


def header_bytes(path: Path) -> tuple[bytes, int]:
    """The JSON of a file's header as it stands there, and the size of the whole file in bytes.

    Raises:
        InputError: the file is missing, unreadable, not a safetensors file, or ends within its header.
    """
    with open_plain(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(MAX_HEADER, size - 8):
                refuse_pointer(path, prefix + file.read(100))
                raise InputError(f"{path}: not a safetensors file, or truncated within its header", _FIX)
            raw = file.read(length)
        except OSError as error:
            raise unreadable(path, error) from error
    if len(raw) < length:
        raise InputError(f"{path}: truncated within its header", _FIX)
    return raw, size


def _corrupt(path: Path, reason: str) -> InputError:
    return InputError(f"{path}: the safetensors header is corrupt ({reason})", _FIX)


def _entry(path: Path, name: str, record: Any, data_start: int) -> TensorEntry:
    if not is_name(name):
        raise _corrupt(path, f"no tensor can be named '{printable(name)}'")
    if not isinstance(record, dict) or not {"dtype", "shape", "data_offsets"} <= record.keys():
        raise _corrupt(path, f"tensor '{name}' lacks its dtype, shape or data_offsets")
    kind, extents, offsets = record["dtype"], record["shape"], record["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        cause = f"{path}: tensor '{name}' has dtype {printable(kind)}, which trtkit does not read"
        raise InputError(cause, f"known: {', '.join(DTYPES)}; start from the unquantised model")
    # Rank first: the product of a million huge extents would take for ever.
    if not isinstance(extents, list) or len(extents) > MAX_RANK or not all(map(_is_size, extents)):
        raise _corrupt(path, f"tensor '{name}' has shape {printable(extents)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise _corrupt(path, f"tensor '{name}' has data_offsets {printable(offsets)}")
    begin, end = offsets
    entry = TensorEntry(path, name, DTYPES[kind], tuple(extents), data_start + begin)
    if end - begin != entry.nbytes:
        claim = f"{path}: tensor '{name}' claims {end - begin} bytes"
        raise InputError(f"{claim}, {kind}{extents} takes {entry.nbytes}", _FIX)
    return entry


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63  # neither true, which is an int too, nor 4.0


def _check_layout(path: Path, entries: Mapping[str, TensorEntry], data_start: int, size: int) -> None:
    """The data section is covered without gaps or overlaps, and it ends where the file ends."""
    position = data_start
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.nbytes)):
        if entry.start + entry.nbytes > size:
            missing = entry.start + entry.nbytes - size
            raise InputError(f"{path}: truncated: tensor '{entry.name}' ends {missing} bytes after the file does", _FIX)
        if entry.start != position:
            raise InputError(f"{path}: tensor '{entry.name}' leaves a gap or overlaps its neighbour", _FIX)
        position += entry.nbytes
    if position != size:
        raise InputError(f"{path}: {size - position} bytes follow the last tensor", _FIX)


class Reader:
    """Reads parts of tensors with pread; keeps the files open. Threads may share it. Use as a context manager."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def elements(
        self, entry: TensorEntry, start: int, count: int, *, out: npt.NDArray[Any] | None = None
    ) -> npt.NDArray[Any]:
        """`count` elements from flat index `start`, shape `(count,)`; in the first of `out`, if it is given."""
        out = np.empty(count, dtype=entry.dtype) if out is None else out[:count]
        self._fill(entry, entry.start + start * entry.dtype.itemsize, out.view(np.uint8).data)
        return out

    def tensor(self, entry: TensorEntry) -> npt.NDArray[Any]:
        """The whole tensor."""
        return self.elements(entry, 0, math.prod(entry.shape)).reshape(entry.shape)

    def strided(self, entry: TensorEntry, start: int, rows: int, stride: int, length: int) -> npt.NDArray[Any]:
        """`rows` runs of `length` elements, `stride` apart, from flat index `start`; shape `(rows, length)`."""
        out = np.empty((rows, length), dtype=entry.dtype)
        size = entry.dtype.itemsize
        for row, buffer in enumerate(out.view(np.uint8)):
            self._fill(entry, entry.start + (start + row * stride) * size, buffer.data)
        return out

    def descriptor(self, path: Path) -> int:
        """File descriptor of an input file, open until this reader is left."""
        with self._lock:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return self._files[path]

    def _fill(self, entry: TensorEntry, offset: int, buffer: memoryview) -> None:
        descriptor = self.descriptor(entry.path)
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

    Args:
        specs: the tensors, in the order in which they shall lie in the file.
        resume: go on with a file that an earlier writer with the same specs began.

    Attributes:
        order: the tensors in the order in which they lie in the file: that of `specs`, unless some tensor would then
            not be aligned to its element size.
        starts: tensor -> byte offset in the file.
        size: bytes of the whole file.
    """

    def __init__(self, path: Path, specs: Sequence[TensorSpec], *, resume: bool = False) -> None:
        self.path = path
        self.order = _aligned(specs)
        records: dict[str, Any] = {}
        position = 0
        for spec in self.order:
            records[spec.name] = {
                "dtype": _NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [position, position + spec.nbytes],
            }
            position += spec.nbytes
        header = json.dumps(records, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        data_start = 8 + len(header)
        self.starts = {name: data_start + record["data_offsets"][0] for name, record in records.items()}
        self.size = data_start + position
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._file = os.open(path, flags if resume else flags | os.O_EXCL, 0o666)
        try:
            _allocate(self._file, self.size)
            self._write_all(0, len(header).to_bytes(8, "little") + header)
        except BaseException:
            os.close(self._file)
            raise

    def write(self, name: str, element: int, values: npt.NDArray[Any]) -> None:
        """Writes `values` (any shape, C order, of the tensor's dtype) from flat index `element` of tensor `name`."""
        flat = np.ascontiguousarray(values).reshape(-1)
        self._write_all(self.starts[name] + element * flat.dtype.itemsize, flat.view(np.uint8).data)

    def copy(self, name: str, element: int, reader: Reader, entry: TensorEntry, start: int, count: int) -> None:
        """Copies `count` elements from flat index `start` of `entry`, of the same dtype, to flat index `element` of
        tensor `name`, within the kernel where it can."""
        size = entry.dtype.itemsize
        origin, target = entry.start + start * size, self.starts[name] + element * size
        left, descriptor = count * size, reader.descriptor(entry.path)
        # Where the two places differ within a page, the kernel touches every page twice, and a buffer is faster.
        in_kernel = (origin - target) % PAGE == 0
        while left:
            try:
                copied = (
                    os.copy_file_range(descriptor, self._file, min(left, COPY_BYTES), origin, target)
                    if in_kernel
                    else self._copy_through_memory(descriptor, left, origin, target)
                )
            except OSError as error:
                if not in_kernel or error.errno not in _CANNOT_COPY:
                    raise
                in_kernel = False
                continue
            if copied == 0:
                raise InputError(
                    f"{entry.path}: ends within tensor '{entry.name}'", "the file was changed while it was read"
                )
            left, origin, target = left - copied, origin + copied, target + copied

    def start_writeback(self, offset: int, count: int) -> None:
        """Has the kernel begin to write these bytes to the disk, so that `sync` finds little left to wait for."""
        ctypes.CDLL(None).sync_file_range(self._file, ctypes.c_int64(offset), ctypes.c_int64(count), _WRITE)

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes of the file."""
        return os.pread(self._file, count, offset)

    def sync(self) -> None:
        """Returns once the file is on the disk."""
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)

    def _copy_through_memory(self, descriptor: int, count: int, origin: int, target: int) -> int:
        if not hasattr(_buffers, "copy"):
            _buffers.copy = memoryview(bytearray(4 << 20))
        read = os.preadv(descriptor, [_buffers.copy[:count]], origin)
        self._write_all(target, _buffers.copy[:read])
        return read

    def _write_all(self, offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            count = os.pwrite(self._file, view, offset)
            view, offset = view[count:], offset + count


def _aligned(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    position = 0
    for spec in specs:
        if position % spec.dtype.itemsize:
            return sorted(specs, key=lambda s: -s.dtype.itemsize)
        position += spec.nbytes
    return list(specs)


def _allocate(descriptor: int, size: int) -> None:
    """Reserves the space of a file. Unlike posix_fallocate, never by writing zeros where the filesystem cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate64(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)):
        if ctypes.get_errno() not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        os.ftruncate(descriptor, size)
