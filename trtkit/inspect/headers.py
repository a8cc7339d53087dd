"""What safetensors files say they hold, whatever the dtype: for describing, not for reading.

`safetensors_io.read_header` refuses what trtkit cannot convert, such as 4-bit dtypes; a description must not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtkit.errors import InputError
from trtkit.safetensors_io import header_bytes
from trtkit.untrusted import is_name, parse_json, printable


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file.

    Attributes:
        dtype: safetensors' spelling, also of dtypes that trtkit does not read.
        shape: elements per axis, as stored: a quantised tensor may pack several values into one element.
        nbytes: bytes in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class DtypeShare:
    """The tensors of one dtype.

    Attributes:
        dtype: safetensors' spelling.
        elements: as stored.
        share: of all bytes, 0 to 1.
    """

    dtype: str
    tensors: int
    elements: int
    bytes: int
    share: float


def stored_tensors(path: Path) -> list[StoredTensor]:
    """The tensors that a file's header names.

    Raises:
        InputError: the file is missing or unreadable, or its header is not valid; names it.
    """
    raw, _ = header_bytes(path)
    try:
        header = parse_json(raw)
    except ValueError as error:
        raise _corrupt(path, str(error)) from error
    if not isinstance(header, dict):
        raise _corrupt(path, "not a JSON object")
    return [_tensor(path, name, record) for name, record in header.items() if name != "__metadata__"]


def dtype_shares(tensors: Iterable[StoredTensor]) -> list[DtypeShare]:
    """Tensors, elements and bytes by dtype, the one with the most bytes first."""
    found: dict[str, list[StoredTensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.dtype, []).append(tensor)
    sizes = {dtype: sum(tensor.nbytes for tensor in of) for dtype, of in found.items()}
    total = sum(sizes.values()) or 1
    return [
        DtypeShare(dtype, len(found[dtype]), sum(t.elements for t in found[dtype]), size, round(size / total, 6))
        for dtype, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
    ]


def _tensor(path: Path, name: str, record: Any) -> StoredTensor:
    if not is_name(name):
        raise _corrupt(path, f"no tensor can be named '{printable(name)}'")
    keys = record if isinstance(record, dict) else {}
    dtype, shape, offsets = keys.get("dtype"), keys.get("shape"), keys.get("data_offsets")
    good = (
        isinstance(dtype, str)
        and is_name(dtype, 20)
        and isinstance(shape, list)
        and len(shape) <= 32
        and all(map(_is_size, shape))
        and isinstance(offsets, list)
        and len(offsets) == 2
        and all(map(_is_size, offsets))
        and offsets[0] <= offsets[1]
    )
    if not good:
        raise _corrupt(path, f"tensor '{name}' lacks a proper dtype, shape or data_offsets")
    return StoredTensor(name, dtype, tuple(shape), offsets[1] - offsets[0])  # type: ignore[arg-type, index]


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _corrupt(path: Path, reason: str) -> InputError:
    return InputError(f"{path}: the safetensors header is corrupt ({reason})", "download or write the file again")
