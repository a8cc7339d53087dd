"""Executes a plan for some ranks: goes through the source layer by layer, and writes each tensor into all rank files.

What is contiguous in the source and keeps its dtype is copied by the kernel; the rest goes through memory in blocks.
Memory: for each thread a block of the source and its cast copy, and the plan of a few layers, however large the model.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trtkit.checkpoint import rank_file
from trtkit.convert.cast import Array, CastReport, cast
from trtkit.convert.follow import FileRecord, Follower, NonFinite
from trtkit.convert.plan import Box, Placement, Plan
from trtkit.safetensors_io import DTYPES, Reader, TensorEntry, TensorSpec, Writer

BLOCK_BYTES = 4 << 20
LANES = 2
"""Threads that copy; more only wait for the memory."""
AHEAD = 2
"""Layers that may be under way at once: each holds its plan in memory."""
DIRECT_BYTES = 128 << 10
"""Shorter contiguous runs are cut from a block in memory: a call to the kernel for each would cost more."""


@dataclass(frozen=True)
class Written:
    """What `write_ranks` did.

    Attributes:
        files: of each rank.
        report: what the change of dtype did to the values.
        non_finite: source tensors that hold a NaN or an infinity.
    """

    files: dict[int, FileRecord]
    report: CastReport
    non_finite: list[NonFinite]


def write_ranks(
    plan: Plan,
    tensors: Mapping[str, TensorEntry],
    folder: Path,
    ranks: Collection[int],
    *,
    checksum: bool = True,
    saturate: bool = False,
    sync: bool = True,
    done_units: int = -1,
    report: CastReport | None = None,
    on_unit: Callable[[int, CastReport], None] = lambda unit, report: None,
    on_progress: Callable[[int], None] = lambda count: None,
) -> Written:
    """Writes the files of some ranks into `folder`.

    Args:
        tensors: the source's tensors by the names in the plan.
        checksum: digest every file, and look for NaN and infinity, while the pages are still in memory.
        saturate: values beyond the range of the dtype become its largest instead of an error.
        sync: return only when the files are on the disk.
        done_units, report: the last unit (see `Plan.units`) that an interrupted run of the same call finished, and
            its account so far.
        on_unit: called when a unit is written (but maybe not yet on the disk).
        on_progress: called with each number of bytes written.

    Raises:
        InputError: the source ends early, or a value overflows.
        OSError: the disk is full or fails.
    """
    total = report or CastReport()
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(Reader())
        writers: dict[int, Writer] = {}
        for rank in sorted(ranks):
            specs = [TensorSpec(t.name, DTYPES[t.dtype], t.shape) for t in plan.ranks[rank]]
            if done_units < 0:
                (folder / rank_file(rank)).unlink(missing_ok=True)
            writers[rank] = Writer(folder / rank_file(rank), specs, resume=done_units >= 0)
            stack.callback(writers[rank].close)
        follower = stack.enter_context(Follower(plan, writers, checksum=checksum, sync=sync))
        lanes = [ThreadPoolExecutor(1, "trtkit-copy") for _ in range(min(LANES, os.cpu_count() or 1))]
        stack.callback(_shut_down, lanes)
        running: deque[tuple[int, list[tuple[Future[CastReport], int]]]] = deque()

        def finish_unit() -> None:
            unit, jobs = running.popleft()
            for job, nbytes in jobs:
                total.add(job.result())
                on_progress(nbytes)
            follower.advance(unit)
            on_unit(unit, total)

        for unit, placements in plan.units(ranks):
            if unit <= done_units:
                on_progress(sum(place.nbytes for places in placements.values() for place in places))
                follower.advance(unit)
                continue
            names = sorted(placements, key=lambda name: (tensors[name].path, tensors[name].start))
            jobs = []
            for index, name in enumerate(names):
                for lane, places in _share_out(tensors[name], placements[name], index, len(writers), len(lanes)):
                    job = lanes[lane].submit(_copy_tensor, reader, tensors[name], places, writers, saturate)
                    jobs.append((job, sum(place.nbytes for place in places)))
            running.append((unit, jobs))
            if len(running) > AHEAD:
                finish_unit()
        while running:
            finish_unit()
        files = follower.finish()
        for writer in writers.values() if sync else ():
            writer.sync()
    return Written(files, total, follower.non_finite)


def _shut_down(lanes: list[ThreadPoolExecutor]) -> None:
    for lane in lanes:
        lane.shutdown(wait=False, cancel_futures=True)
    for lane in lanes:
        lane.shutdown()


def _share_out(
    entry: TensorEntry, placements: list[Placement], index: int, ranks: int, lanes: int
) -> Iterator[tuple[int, list[Placement]]]:
    """Which lane writes what. Each rank's file belongs to one lane, since writers of one file wait for each other; only
    a single file that is cast is worth sharing, tensor by tensor."""
    by_lane: dict[int, list[Placement]] = {}
    for place in placements:
        casts = DTYPES[place.tensor.dtype] != entry.dtype
        lane = place.rank if ranks > 1 else index if casts else 0
        by_lane.setdefault(lane % lanes, []).append(place)
    yield from by_lane.items()


def _copy_tensor(
    reader: Reader, entry: TensorEntry, placements: list[Placement], writers: Mapping[int, Writer], saturate: bool
) -> CastReport:
    """Writes everything that is made of one source tensor; the account of what its casts did."""
    report = CastReport()
    through_memory = []
    for place in placements:
        piece, writer = place.piece, writers[place.rank]
        same = DTYPES[place.tensor.dtype] == entry.dtype and not piece.plus
        if piece.transposed:
            _transpose(reader, entry, place, writer, report, saturate)
        elif same and _run_length(piece.view, piece.box) * entry.dtype.itemsize >= min(DIRECT_BYTES, entry.nbytes):
            for index, (start, count) in enumerate(_runs(piece.view, piece.box)):
                writer.copy(place.tensor.name, piece.element + index * count, reader, entry, start, count)
        else:
            through_memory.append(place)
    if through_memory:
        _copy_blocks(reader, entry, through_memory, writers, report, saturate)
    return report


def _copy_blocks(
    reader: Reader,
    entry: TensorEntry,
    placements: list[Placement],
    writers: Mapping[int, Writer],
    report: CastReport,
    saturate: bool,
) -> None:
    """Reads the source in blocks of whole rows and cuts all pieces from each."""
    width = entry.shape[-1] if len(entry.shape) > 1 else 1
    step = max(1, BLOCK_BYTES // (width * entry.dtype.itemsize)) * width
    first, last = _range(placements)
    # What several ranks hold is cut and cast once.
    alike: dict[Any, list[Placement]] = {}
    for place in placements:
        piece = place.piece
        alike.setdefault((piece.view, piece.box, piece.plus, place.tensor.dtype), []).append(place)
    # Both buffers are used again for every block: fresh memory costs more than what is done with it.
    raw = np.empty(step, entry.dtype)
    scratch = np.empty(step * 4, np.uint8)
    for start in range(first // width * width, last, step):
        values = reader.elements(entry, start, min(step, math.prod(entry.shape) - start), out=raw)
        for (view, box, plus, dtype), places in alike.items():
            account = report if any(place.piece.counted for place in places) else CastReport()
            for offset, part in _cut(view, box, start, values):
                block = cast(part, DTYPES[dtype], entry, account, plus=plus, saturate=saturate, scratch=scratch)
                for place in places:
                    writers[place.rank].write(place.tensor.name, place.piece.element + offset, block)


def _range(placements: list[Placement]) -> tuple[int, int]:
    """Flat indices, first and behind the last, of all that the pieces take of their source tensor."""
    corners = []
    for piece in (place.piece for place in placements):
        strides = [math.prod(piece.view[axis + 1 :]) for axis in range(len(piece.view))]
        first = sum(start * stride for (start, _), stride in zip(piece.box, strides, strict=True))
        last = sum((stop - 1) * stride for (_, stop), stride in zip(piece.box, strides, strict=True))
        corners.append((first, last + 1))
    return min(first for first, _ in corners), max(last for _, last in corners)


def _cut(view: tuple[int, ...], box: Box, start: int, values: Array) -> Iterator[tuple[int, Array]]:
    """What a box takes of the elements from flat index `start`, each with its place in the box's own C order."""
    if len(view) == 2 and box[1] != (0, view[1]):  # columns of a matrix: the block has whole rows
        (top, bottom), (left, right) = box
        first = start // view[1]
        rows = values.reshape(-1, view[1])
        low, high = max(top, first), min(bottom, first + len(rows))
        if low < high:
            yield (low - top) * (right - left), rows[low - first : high - first, left:right]
        return
    for index, (run, count) in enumerate(_runs(view, box)):
        low, high = max(run, start), min(run + count, start + len(values))
        if low < high:
            yield index * count + low - run, values[low - start : high - start]


def _transpose(
    reader: Reader, entry: TensorEntry, place: Placement, writer: Writer, report: CastReport, saturate: bool
) -> None:
    """Writes the box of a matrix with its axes swapped, in blocks of columns of the source."""
    piece, dtype = place.piece, DTYPES[place.tensor.dtype]
    (top, bottom), (left, right) = piece.box
    rows = bottom - top
    # Larger blocks than elsewhere, since each reads short runs from every row.
    step = max(1, 4 * BLOCK_BYTES // (rows * entry.dtype.itemsize))
    for column in range(left, right, step):
        width = min(step, right - column)
        values = reader.strided(entry, top * piece.view[1] + column, rows, piece.view[1], width)
        account = report if piece.counted else CastReport()
        block = cast(values.T, dtype, entry, account, plus=piece.plus, saturate=saturate)
        writer.write(place.tensor.name, piece.element + (column - left) * rows, block)


def _run_length(view: tuple[int, ...], box: Box) -> int:
    """Elements of each contiguous run that a box consists of."""
    length = 1
    for extent, (start, stop) in zip(reversed(view), reversed(box), strict=True):
        length *= stop - start
        if stop - start != extent:
            break
    return length


def _runs(view: tuple[int, ...], box: Box) -> Iterator[tuple[int, int]]:
    """The contiguous runs of a box, in its C order: flat index of the first element, and the count of elements."""
    inner = len(view)
    while inner > 0 and box[inner - 1] == (0, view[inner - 1]):
        inner -= 1
    inner = max(inner - 1, 0)  # the innermost axis that is not whole joins the run
    strides = [math.prod(view[axis + 1 :]) for axis in range(len(view))]
    count = math.prod(stop - start for start, stop in box[inner:])
    first = box[inner][0] * strides[inner] if view else 0
    for index in itertools.product(*(range(start, stop) for start, stop in box[:inner])):
        yield first + sum(i * stride for i, stride in zip(index, strides, strict=False)), count
