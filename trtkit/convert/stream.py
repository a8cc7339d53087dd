"""Executes a plan: reads each source tensor in blocks, in file order, and writes them into all rank files at once.

Memory: one block (at most `BLOCK_BYTES` of the source) and its cast copy, whatever the model's size.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trtkit.checkpoint import is_checkpoint, rank_file
from trtkit.convert.plan import Piece, Plan
from trtkit.errors import InputError
from trtkit.hf import Source
from trtkit.safetensors_io import DTYPES, Reader, TensorEntry, TensorSpec, Writer
from trtkit.store import atomic_dir, check_output

BLOCK_BYTES = 16 << 20


@dataclass
class CastReport:
    """What a change of dtype did to the values.

    Attributes:
        rounded: elements whose value changed.
        flushed: those of them that became zero.
    """

    rounded: int = 0
    flushed: int = 0


def convert(
    plan: Plan,
    source: Source,
    out: Path,
    *,
    replace: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> CastReport:
    """Writes the checkpoint folder, all or nothing.

    Args:
        replace: replace an earlier checkpoint. Any other folder stays as it is.
        on_progress: called with source bytes (done, total).

    Raises:
        InputError: `out` may not be written to, or a value cannot be represented in the checkpoint's dtype (names the
            tensor).
    """
    check_target(out, source, replace=replace)
    with atomic_dir(out, replace=replace) as folder:
        return write_checkpoint(plan, source, folder, on_progress=on_progress)


def check_target(out: Path, source: Source, *, replace: bool = False) -> None:
    """Whether a checkpoint of `source` may be written to `out`.

    Raises:
        InputError: `out` is or holds the source or lies in it, exists, or is (with `replace`) no earlier checkpoint.
    """
    target = check_output(out, replace=True)
    origin = source.path.resolve()
    if target == origin or origin in target.parents or target in origin.parents:
        raise InputError(f"{out} would overwrite its own source {source.path}", "choose another output folder")
    if target.is_dir() and any(target.iterdir()):
        earlier = is_checkpoint(target)
        if not replace:
            hint = ", or replace the checkpoint there with --force" if earlier else ""
            raise InputError(f"{out} exists already", f"choose another output folder{hint}")
        if not earlier:
            raise InputError(
                f"{out} is not an earlier checkpoint", "choose another output folder, or remove it yourself"
            )


def write_checkpoint(
    plan: Plan, source: Source, folder: Path, *, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> CastReport:
    """Like `convert`, into an existing empty folder that the caller publishes."""
    dtype = DTYPES[plan.safetensors_dtype]
    placements = plan.placements()
    entries = sorted((source.tensors[name] for name in placements), key=lambda e: (e.path, e.start))
    total, done = sum(entry.nbytes for entry in entries), 0
    report = CastReport()
    with Reader() as reader, contextlib.ExitStack() as stack:
        writers = []
        for rank, tensors in enumerate(plan.ranks):
            specs = [TensorSpec(tensor.name, dtype, tensor.shape) for tensor in tensors]
            writers.append(Writer(folder / rank_file(rank), specs))
            stack.callback(writers[-1].close)
        for entry in entries:
            for row, block in _blocks(reader, entry):
                values = cast(block, dtype, entry, report)
                for rank, name, piece in placements[entry.name]:
                    for element, part in _cut(piece, row, values):
                        writers[rank].write(name, element, part)
                done += block.nbytes
                on_progress(done, total)
    (folder / "config.json").write_text(json.dumps(plan.config, indent=2) + "\n", encoding="utf-8")
    return report


def _blocks(reader: Reader, entry: TensorEntry) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """Blocks of whole rows of the first axis, each with the number of its first row."""
    row_bytes = max(1, math.prod(entry.shape[1:]) * entry.dtype.itemsize)
    step = max(1, BLOCK_BYTES // row_bytes)
    for row in range(0, entry.shape[0], step):
        yield row, reader.rows(entry, row, min(row + step, entry.shape[0]))


def _cut(piece: Piece, row: int, values: npt.NDArray[Any]) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """What `piece` takes of a block that starts at `row`, with its flat index in the checkpoint tensor."""
    (start, stop), *rest = piece.box
    low, high = max(start, row), min(stop, row + len(values))
    if low < high:
        width = math.prod(b - a for a, b in rest)
        where = [slice(low - row, high - row), *(slice(a, b) for a, b in rest)]
        part = values[tuple(where)]
        yield piece.element + (low - start) * width, part


def cast(values: npt.NDArray[Any], dtype: np.dtype[Any], entry: TensorEntry, report: CastReport) -> npt.NDArray[Any]:
    """`values` in another dtype, rounded to nearest even; the same array when nothing changes.

    Raises:
        InputError: a finite value became infinite.
    """
    if values.dtype == dtype:
        return values
    wide = values.astype(np.float32)  # exact for every 16-bit float
    with np.errstate(over="ignore"):
        result = wide.astype(dtype)
    back = result.astype(np.float32)
    changed = back != wide
    if changed.any():
        lost = np.isinf(back) & np.isfinite(wide)
        if lost.any():
            largest = float(np.abs(wide[lost]).max())
            raise InputError(
                f"{entry.path}: tensor '{entry.name}' holds {largest:.3g}, which overflows {dtype.name}",
                "convert to bfloat16, whose range is that of float32",
            )
        changed &= ~np.isnan(wide)
        report.rounded += int(changed.sum())
        report.flushed += int((changed & (back == 0)).sum())
    return result
