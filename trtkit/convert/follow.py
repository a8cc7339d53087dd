"""Follows right behind the writer of the rank files, in a thread of its own: checksums, NaN or infinity in them, and
having them written to the disk.

A file's checksum needs its bytes in order, and the writer fills all ranks a layer at a time; so the follower goes
through each file up to where it is complete, while the pages are still in memory.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import blake3
import numpy as np
import numpy.typing as npt

from trtkit.convert.plan import Piece, Plan, PlannedTensor
from trtkit.safetensors_io import DTYPES, Writer

READ_BYTES = 4 << 20

_INFINITY = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000}
"""Dtype -> bits of positive infinity; NaNs are above it."""


@dataclass(frozen=True)
class FileRecord:
    """A finished file: bytes, and the BLAKE3 digest as hex (None where none was asked for)."""

    bytes: int
    blake3: str | None


@dataclass(frozen=True)
class NonFinite:
    """The first NaN or infinity of a source tensor."""

    tensor: str
    index: tuple[int, ...]
    value: str


class Follower:
    """Follows the writers of some ranks. Use as a context manager; leaving it stops the thread.

    Attributes:
        non_finite: what was found so far, at most one entry per source tensor and rank.
    """

    def __init__(self, plan: Plan, writers: Mapping[int, Writer], *, checksum: bool, sync: bool) -> None:
        self.non_finite: list[NonFinite] = []
        self._writers = writers
        self._checksum = checksum
        self._runs = checksum or sync
        self._files = {rank: _File(plan.ranks[rank], writer, checksum, sync) for rank, writer in writers.items()}
        self._condition = threading.Condition()
        self._unit = self._followed = -1
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="trtkit-checksum", daemon=True)

    def __enter__(self) -> Follower:
        if self._runs:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        with self._condition:
            self._condition.notify()
        if self._runs:
            self._thread.join()

    def advance(self, unit: int) -> None:
        """Tells that everything up to and including a unit of the plan is written."""
        with self._condition:
            if self._error:
                raise self._error
            self._unit = unit
            self._condition.notify()

    def finish(self) -> dict[int, FileRecord]:
        """Waits until all is read; the record of each rank's file."""
        if not self._runs:
            return {rank: FileRecord(writer.size, None) for rank, writer in self._writers.items()}
        with self._condition:
            self._condition.wait_for(lambda: self._error or all(file.done for file in self._files.values()))
            if self._error:
                raise self._error
        return {
            rank: FileRecord(file.writer.size, file.hasher.hexdigest() if self._checksum else None)
            for rank, file in self._files.items()
        }

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                with self._condition:
                    self._condition.wait_for(lambda: self._stop.is_set() or self._unit > self._followed)
                    unit = self._unit
                for file in self._files.values():
                    if self._stop.is_set():
                        return
                    self.non_finite += file.follow(unit, self._stop)
                with self._condition:
                    self._followed = unit
                    self._condition.notify()
        except BaseException as error:
            with self._condition:
                self._error = error
                self._condition.notify()


class _File:
    """One rank's file and how far it was followed."""

    def __init__(self, planned: list[PlannedTensor], writer: Writer, checksum: bool, sync: bool) -> None:
        self.writer = writer
        self._checksum, self._sync = checksum, sync
        self.hasher = blake3.blake3()
        by_name = {tensor.name: tensor for tensor in planned}
        self._tensors = [by_name[spec.name] for spec in writer.order]
        self._starts = [writer.starts[spec.name] for spec in writer.order]
        self._ends = [*self._starts[1:], writer.size]
        self._read = 0
        self._complete = 0  # tensors at the beginning of the file that are known to be complete
        self._seen: set[str] = set()

    @property
    def done(self) -> bool:
        return self._read == self.writer.size

    def follow(self, unit: int, stop_event: threading.Event) -> list[NonFinite]:
        """Goes as far as the file is complete when all units up to `unit` are, unless it is told to stop."""
        while self._complete < len(self._tensors) and self._tensors[self._complete].unit <= unit:
            self._complete += 1
        limit = self._starts[self._complete] if self._complete < len(self._tensors) else self.writer.size
        found: list[NonFinite] = []
        start = self._read
        while self._checksum and self._read < limit:
            if stop_event.is_set():
                return found
            # Blocks end at multiples of 4 so that no element of any dtype is cut in two.
            stop = min((self._read + READ_BYTES) // 4 * 4, limit)
            data = self.writer.read(self._read, stop - self._read)
            if len(data) != stop - self._read:
                raise OSError(f"{self.writer.path} became shorter while it was written")
            self.hasher.update(data)
            found += self._scan(data, self._read, stop)
            self._read = stop
        self._read = max(self._read, limit)
        if self._sync and self._read > start:
            self.writer.start_writeback(start, self._read - start)
        return found

    def _scan(self, data: bytes, start: int, stop: int) -> list[NonFinite]:
        found = []
        position = max(0, bisect.bisect_right(self._starts, start) - 1)
        while position < len(self._tensors) and self._starts[position] < stop:
            tensor, first = self._tensors[position], self._starts[position]
            low, high = max(first, start), min(self._ends[position], stop)
            position += 1
            if tensor.dtype not in _INFINITY or tensor.packed:
                continue  # quantised: no such numbers
            infinity, size = _INFINITY[tensor.dtype], DTYPES[tensor.dtype].itemsize
            bits = np.frombuffer(data, f"u{size}", (high - low) // size, low - start)
            magnitudes = bits & ((1 << 8 * size - 1) - 1)
            if magnitudes.max(initial=0) >= infinity:
                elements = np.flatnonzero(magnitudes >= infinity)
                nan = magnitudes[elements] > infinity
                found += self._name(tensor, elements + (low - first) // size, nan)
        return found

    def _name(self, tensor: PlannedTensor, elements: npt.NDArray[Any], nan: npt.NDArray[Any]) -> list[NonFinite]:
        """The first of each source tensor among these elements of a checkpoint tensor."""
        found = []
        for piece in tensor.pieces:
            nth = int(np.searchsorted(elements, piece.element))
            if nth == len(elements) or elements[nth] >= piece.element + piece.count or piece.source in self._seen:
                continue
            self._seen.add(piece.source)
            index = _source_index(piece, int(elements[nth]) - piece.element)
            found.append(NonFinite(piece.source, index, "NaN" if nan[nth] else "infinity"))
        return found


def _source_index(piece: Piece, element: int) -> tuple[int, ...]:
    """Where the n-th element of a piece lies in the source tensor (in the shape that the piece looks at it in)."""
    extents = [stop - start for start, stop in piece.box]
    order: Any = extents[::-1] if piece.transposed else extents
    index = [int(i) for i in np.unravel_index(element, order)]
    if piece.transposed:
        index.reverse()
    return tuple(i + start for i, (start, _) in zip(index, piece.box, strict=True))
