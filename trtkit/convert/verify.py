"""Compares a checkpoint with its source, and its files with their checksums.

It goes from the checkpoint's side, block by block, and shares only the plan with the code that wrote it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import blake3
import ml_dtypes
import numpy as np

from trtkit.checkpoint import Checkpoint, rank_file, read_manifest
from trtkit.convert.cast import Array
from trtkit.convert.linears import SCALED_NORMS, Linear, linears
from trtkit.convert.plan import Box, Piece, Placement, Plan, checkpoint_quantization, plan_checkpoint
from trtkit.convert.quantization import Quantization
from trtkit.convert.source import Layout, checkpoint_config, source_tensors
from trtkit.errors import CheckFailedError
from trtkit.hf import Source
from trtkit.safetensors_io import DTYPES, Reader, TensorEntry

BLOCK_BYTES = 4 << 20
UNLIKE = 0.5
"""Relative error from which on a quantised weight is taken for another one: int4 makes 0.1 to 0.2, other models 1.4."""


@dataclass
class Verification:
    """Outcome of `verify`.

    Attributes:
        tensors: source tensors compared.
        elements: elements of the source compared.
        mismatches: source tensor -> elements that differ from the source's value in the checkpoint's dtype.
        rounded: elements whose value the checkpoint's dtype cannot hold exactly (0: not one value was changed).
        saturated: those of them beyond its range, which the checkpoint holds as its largest value.
        quantized: linears whose dequantised weight was compared with the source's, which it can only resemble.
        unlike: those that do not: name -> relative error of the weight (2-norm).
        settings: key of config.json -> (what the source implies, what the checkpoint has), where they differ.
        files: file -> what is wrong with its size or checksum.
        checksums: files whose checksum was compared.
    """

    tensors: int = 0
    elements: int = 0
    mismatches: dict[str, int] = field(default_factory=dict)
    rounded: int = 0
    saturated: int = 0
    quantized: int = 0
    unlike: dict[str, float] = field(default_factory=dict)
    settings: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    checksums: int = 0

    @property
    def passed(self) -> bool:
        return not (self.mismatches or self.unlike or self.settings or self.files)

    @property
    def first_difference(self) -> str:
        """Name of a file, tensor or config key that differs; empty when nothing does."""
        return next(iter([*self.files, *self.mismatches, *self.unlike, *self.settings]), "")


OnProgress = Callable[[int, int], None]


def verify(
    source: Source, checkpoint: Checkpoint, *, on_progress: OnProgress = lambda done, total: None
) -> Verification:
    """Reads the checkpoint back and compares every element with the source, bit for bit after the change of dtype,
    and config.json with what the source's config implies. Of quantised linears the dequantised weight must resemble the
    source's.

    Keys and files that trtkit does not write are not looked at, so checkpoints of other tools can be verified too.

    Args:
        on_progress: called with bytes of the checkpoint (done, total).

    Raises:
        InputError: the source is damaged.
        CheckFailedError: the checkpoint is not one of this source at all (other tensors or shapes), or is damaged.
    """
    plan = plan_checkpoint(checkpoint.config)
    tensors = source_tensors(source)
    plain = plan_checkpoint({**checkpoint.config, "quantization": {}})
    for name, shape in plain.sources.items():
        if name not in tensors or tensors[name].shape != shape:
            found = f"shape {list(tensors[name].shape)}" if name in tensors else "no such tensor"
            raise CheckFailedError(
                f"{source.path}: the checkpoint implies '{name}' {list(shape)}, the source has {found}",
                "give the source that the checkpoint was made from",
            )
    check_layout(checkpoint, plan)
    result = Verification(
        settings=_compare_settings(source, checkpoint), tensors=len(plan.sources.keys() & plain.sources.keys())
    )
    total = sum(plan.rank_bytes(rank) for rank in range(len(plan.ranks)))
    done = 0
    with Reader() as reader:
        for _, placements in plan.units():
            for name, places in placements.items():
                for place in places if name in plain.sources else ():
                    _compare(reader, tensors[name], checkpoint, place, result)
                    done += place.nbytes
                    on_progress(done, total)
    _compare_quantized(source, checkpoint, result)
    return result


def _compare_quantized(source: Source, checkpoint: Checkpoint, result: Verification) -> None:
    if checkpoint_quantization(checkpoint.config).format is None:
        return
    from trtkit.convert.readback import CheckpointReader
    from trtkit.convert.whole import SourceReader, gather

    with SourceReader(source, checkpoint.config) as plain, CheckpointReader(checkpoint) as quantized:
        layer, found = -1, dict[str, Array]()
        for linear in linears(checkpoint.config):
            if quantized.quantization.format_of(linear.name) is None:
                continue
            if linear.layer != layer:
                layer, found = linear.layer, dict(quantized.tensors(linear.layer + 1))
            whole = plain.whole[f"{linear.name}.weight"]
            expected = gather(whole, plain.read)
            norm = _scaled_norm(quantized.quantization, linear)
            if norm is not None:  # its values and the weight's were scaled against each other
                expected = (
                    expected * gather(plain.whole[norm], plain.read) / gather(plain.whole[norm], found.__getitem__)
                )
            change = gather(whole, found.__getitem__) - expected
            error = float(np.linalg.norm(change)) / max(float(np.linalg.norm(expected)), 1e-30)
            result.quantized += 1
            if not error < UNLIKE:
                result.unlike[linear.name] = error


def _scaled_norm(quantization: Quantization, linear: Linear) -> str | None:
    """The norm that SmoothQuant's plugin folds the smoothing of a linear into."""
    if "int8_sq_plugin" not in quantization.formats:
        return None
    owner = "mlp.fc" if linear.kind == "mlp.gate" else linear.kind
    norm = next((norm for norm, kind in SCALED_NORMS.items() if kind == owner), None)
    return norm and f"transformer.layers.{linear.layer}.{norm}.weight"


def check_files(checkpoint: Checkpoint, *, on_progress: OnProgress = lambda done, total: None) -> Verification:
    """Compares the files of a checkpoint with the sizes and checksums in its manifest. A checkpoint without a manifest,
    or made without checksums, has nothing to compare: `checksums` is 0."""
    result = Verification()
    manifest = read_manifest(checkpoint.path)
    records = manifest["files"] if manifest else {}
    wanted = ["config.json", *(rank_file(rank) for rank in range(len(checkpoint.ranks)))]
    if manifest:
        result.files |= {name: "the manifest does not list it" for name in wanted if name not in records}
    done, total = 0, sum(record["bytes"] for record in records.values())
    for name, record in records.items():
        path = checkpoint.path / name
        if not path.is_file() or path.stat().st_size != record["bytes"]:
            result.files[name] = "its size is not the one in the manifest" if path.is_file() else "it is missing"
            continue
        if record["blake3"] is None:
            continue
        hasher = blake3.blake3()
        with path.open("rb", buffering=0) as file:
            while block := file.read(BLOCK_BYTES):
                hasher.update(block)
                done += len(block)
                on_progress(done, total)
        result.checksums += 1
        if hasher.hexdigest() != record["blake3"]:
            result.files[name] = "its content is not the one in the manifest"
    return result


def check_layout(checkpoint: Checkpoint, plan: Plan) -> None:
    """Names, shapes and dtypes of all ranks equal the plan's, and padding is zero.

    Raises:
        CheckFailedError: they do not; names the rank and the tensor.
    """
    with Reader() as reader:
        for rank, tensors in enumerate(plan.ranks):
            found = checkpoint.ranks[rank]
            names = {tensor.name for tensor in tensors}
            for name in sorted(names ^ set(found)):
                what = "is missing" if name in names else "is not expected"
                raise CheckFailedError(f"{checkpoint.path}: rank {rank}: tensor '{name}' {what}", "convert again")
            for tensor in tensors:
                entry = found[tensor.name]
                dtype = DTYPES[tensor.dtype]
                if (entry.shape, entry.dtype) != (tensor.shape, dtype):
                    raise CheckFailedError(
                        f"{entry.path}: tensor '{tensor.name}' is {entry.dtype.name}{list(entry.shape)}, "
                        f"expected {dtype.name}{list(tensor.shape)}",
                        "convert again",
                    )
                used = sum(piece.count for piece in tensor.pieces)
                padding = math.prod(tensor.shape) - used
                if padding and reader.elements(entry, used, padding).any():
                    raise CheckFailedError(
                        f"{entry.path}: the padding of tensor '{tensor.name}' is not zero", "convert again"
                    )


def _compare(
    reader: Reader, entry: TensorEntry, checkpoint: Checkpoint, place: Placement, result: Verification
) -> None:
    piece, target = place.piece, checkpoint.ranks[place.rank][place.tensor.name]
    rounded = saturated = 0
    for raw, found in _blocks(reader, entry, target, piece):
        expected, changed, beyond = _expected(raw, target.dtype, piece.plus)
        rounded += changed
        saturated += beyond
        different = int((_bits(expected) != _bits(found)).sum())
        if different:
            result.mismatches[piece.source] = result.mismatches.get(piece.source, 0) + different
    if piece.counted:
        result.elements += piece.count
        result.rounded += rounded
        result.saturated += saturated


def _expected(raw: Array, dtype: np.dtype[Any], plus: float) -> tuple[Array, int, int]:
    """What values become in another dtype, by numpy's own rounding, how many it changed, and how many of them were
    beyond the range. Those are the largest value: whether that is allowed is the conversion's business."""
    wide = raw.astype(np.float32) + np.float32(plus) if plus else raw
    if wide.dtype == dtype:
        return wide, 0, 0
    wide = wide.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        result = wide.astype(dtype)
        beyond = np.isinf(result.astype(np.float32)) & np.isfinite(wide)
        if beyond.any():
            largest = np.float32(ml_dtypes.finfo(dtype).max)
            result = np.where(beyond, np.copysign(largest, wide).astype(dtype), result)
    changed = (result.astype(np.float32) != wide) & ~np.isnan(wide)
    return result, int(changed.sum()), int(beyond.sum())


def _blocks(reader: Reader, entry: TensorEntry, target: TensorEntry, piece: Piece) -> Iterator[tuple[Array, Array]]:
    """Matching blocks of a piece: of the source, and of the checkpoint."""
    rows = piece.box[0][1] - piece.box[0][0]
    element = piece.element
    for box in _small_boxes(piece.view, piece.box, entry.dtype.itemsize):
        raw = _read_box(reader, entry, piece.view, box)
        if piece.transposed:
            start = piece.element + box[0][0] - piece.box[0][0]
            yield raw.T, reader.strided(target, start, raw.shape[1], rows, raw.shape[0])
        else:
            yield raw, reader.elements(target, element, raw.size).reshape(raw.shape)
        element += raw.size


def _small_boxes(view: tuple[int, ...], box: Box, itemsize: int) -> Iterator[Box]:
    """A box cut into ones, in C order, that each lie within `BLOCK_BYTES` of the source."""
    axis = 0
    while axis < len(view) - 1 and math.prod(view[axis + 1 :]) * itemsize > BLOCK_BYTES:
        axis += 1
    step = max(1, BLOCK_BYTES // (math.prod(view[axis + 1 :]) * itemsize))
    for index in itertools.product(*(range(*bounds) for bounds in box[:axis])):
        for low in range(*box[axis], step):
            high = min(low + step, box[axis][1])
            yield (*((i, i + 1) for i in index), (low, high), *box[axis + 1 :])


def _read_box(reader: Reader, entry: TensorEntry, view: tuple[int, ...], box: Box) -> Array:
    """The elements of a box that `_small_boxes` gave, by one contiguous read around it."""
    axis = next((axis for axis, (low, high) in enumerate(box) if high - low > 1), len(box) - 1)
    strides = [math.prod(view[i + 1 :]) for i in range(len(view))]
    start = sum(low * stride for (low, _), stride in zip(box[: axis + 1], strides, strict=False))
    rows = box[axis][1] - box[axis][0]
    around = reader.elements(entry, start, rows * strides[axis]).reshape(rows, *view[axis + 1 :])
    where = (slice(None), *(slice(*bounds) for bounds in box[axis + 1 :]))
    inside = around[where]
    return inside.reshape([high - low for low, high in box])


def _compare_settings(source: Source, checkpoint: Checkpoint) -> dict[str, tuple[Any, Any]]:
    found = checkpoint.config
    sharding = {0: "vocab", 1: "hidden"}[found["embedding_sharding_dim"]] if found["use_parallel_embedding"] else "none"
    layout = Layout(
        dtype=found["dtype"],
        tp=checkpoint.tp,
        pp=checkpoint.pp,
        ep=found["mapping"].get("moe_ep_size", 1),
        parallel_embedding=sharding,
        quantization=checkpoint_quantization(found),
    )
    expected = checkpoint_config(source, layout)
    del expected["producer"]  # another tool or another version may have made it
    return {key: (want, found.get(key)) for key, want in sorted(expected.items()) if found.get(key) != want}


def _bits(values: Array) -> Array:
    """The same memory as unsigned integers, so that NaNs and signed zeros compare by their bits."""
    return np.ascontiguousarray(values).view(np.dtype(f"u{values.dtype.itemsize}"))
