"""From the tables of families to the tensors of each rank: what `plan` puts together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from trtkit.architectures.rules import Extent, Part, Split, Weight
from trtkit.convert.linears import Field, LayerTensors, layer_tensors
from trtkit.convert.pieces import Box, Piece, PlannedTensor
from trtkit.convert.quantization import Quantization

CHECKPOINT_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
"""Dtypes of checkpoints -> safetensors' spelling."""


def instances(
    weights: list[Weight], layers: range, *, first: bool, last: bool
) -> Iterator[tuple[Weight, int | None, int | None]]:
    """Each tensor of a pipeline stage, in execution order: its rule, its layer within the stage and in the model (None
    outside layers)."""
    if first:
        yield from ((weight, None, None) for weight in weights if weight.stage == "first")
    for local, layer in enumerate(layers):
        yield from ((weight, local, layer) for weight in weights if weight.stage == "layers")
    if last:
        yield from ((weight, None, None) for weight in weights if weight.stage == "last")


class Planner:
    """Plans the tensors of one checkpoint."""

    def __init__(
        self,
        config: Mapping[str, Any],
        extents: Mapping[str, int],
        weights: list[Weight],
        quantization: Quantization,
    ) -> None:
        self.config = config
        self.quantization = quantization
        self.made_per_rank = quantization.zero_point or "int4_gptq" in quantization.formats
        self.extents = extents
        mapping = config["mapping"]
        self.tp = mapping["tp_size"]
        self.expert_parallel = mapping.get("moe_ep_size", 1)
        self.dtype = CHECKPOINT_DTYPES[config["dtype"]]
        self._owner: dict[str, str] = {}
        """Source -> the first tensor that it goes into (a tied embedding goes into two)."""
        for weight in weights:
            for part in weight.parts:
                self._owner.setdefault(part.source, weight.name)

    def tensors(
        self, weight: Weight, local: int | None, layer: int | None, tp_rank: int, last_unit: int
    ) -> Iterator[PlannedTensor]:
        """What a rank holds in place of one entry of the table."""
        made = self._made(weight, layer)
        if made.plain:
            yield self._tensor(weight, local, layer, tp_rank, last_unit)
        if layer is None:
            return
        owner = weight.name.format(layer=layer).rpartition(".")[0]
        here = weight.name.format(layer=local).rpartition(".")[0]
        for each in made.fields:
            dtype = self.dtype if each.dtype == "model" else each.dtype
            yield PlannedTensor(
                name=f"{here}.{each.suffix}",
                dtype=dtype,
                shape=self._field_shape(weight, each, tp_rank),
                unit=layer + 1,
                locate=partial(self._field_pieces, weight, each, owner, tp_rank),
                packed=each.packed,
            )
        for name, dtype, shape in made.whole:
            yield PlannedTensor(
                name=f"transformer.layers.{local}.{name}",
                dtype=self.dtype if dtype == "model" else dtype,
                shape=shape,
                unit=layer + 1,
                locate=partial(_whole, f"transformer.layers.{layer}.{name}", shape, tp_rank),
            )

    def _made(self, weight: Weight, layer: int | None) -> LayerTensors:
        if layer is None:
            return LayerTensors()
        return layer_tensors(self.config, self.quantization, weight, layer)

    def _tensor(
        self, weight: Weight, local: int | None, layer: int | None, tp_rank: int, last_unit: int
    ) -> PlannedTensor:
        unit = {"first": 0, "layers": (layer or 0) + 1, "last": last_unit}[weight.stage]
        experts, tp, place = self._experts(weight, tp_rank)
        shapes = [self._split(part, self._shape(part.shape), tp, place)[1] for part in weight.parts]
        shape = (sum(each[0] for each in shapes), *shapes[0][1:])
        return PlannedTensor(
            name=weight.name.format(layer=local),
            dtype="F32" if weight.float32 else self.dtype,
            shape=(len(experts), *shape) if weight.experts else shape,
            unit=unit,
            locate=partial(self.pieces, weight, layer, tp_rank),
        )

    def pieces(self, weight: Weight, layer: int | None, tp_rank: int) -> tuple[Piece, ...]:
        """What one rank's tensor is made of, in the order in which it lies there."""
        experts, tp, place = self._experts(weight, tp_rank)
        pieces, element = [], 0
        for expert in experts:
            for part in weight.parts:
                box, local_shape = self._split(part, self._shape(part.shape), tp, place)
                name = part.source.format(layer=layer, expert=expert)
                view, box = self._stored(part, box)
                counted = self._owner[part.source] == weight.name and self._first_holder(part, tp, place)
                piece = Piece(name, view, box, element, _is_transposed(part), part.plus, counted)
                if piece.count:
                    pieces.append(piece)
                element += math.prod(local_shape)
        return tuple(pieces)

    def sources(self, weight: Weight, layer: int | None, tp_rank: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every source tensor that a rank takes a part of, with its shape: of the model's source, or made by
        quantisation."""
        made = self._made(weight, layer)
        owner = weight.name.format(layer=layer).rpartition(".")[0]
        for each in made.fields:
            shape = self._field_shape(weight, each, tp_rank if each.per_rank else None)
            yield each.source(owner, tp_rank), shape
        for name, _, shape in made.whole:
            yield f"transformer.layers.{layer}.{name}", shape
        if made.plain:
            yield from self._table_sources(weight, layer)

    def _field_shape(self, weight: Weight, each: Field, tp_rank: int | None) -> tuple[int, ...]:
        """Shape of a quantised linear's tensor on a rank; `None` for the whole."""
        experts, tp, place = self._experts(weight, tp_rank or 0) if tp_rank is not None else (None, 1, 0)
        shapes = [self._split(part, self._shape(part.shape), tp, place)[1] for part in weight.parts]
        lengths = {"one": 1, "in": shapes[0][1], "out": sum(shape[0] for shape in shapes)}
        own = tuple(_steps(lengths[axis.along], axis.step) for axis in each.axes)
        if not weight.experts or not each.per_expert:
            return own
        return (self.config["moe"]["num_experts"] if experts is None else len(experts), *own)

    def _field_pieces(self, weight: Weight, each: Field, owner: str, tp_rank: int) -> tuple[Piece, ...]:
        """What a rank holds of a quantised linear's tensor: rows of each part, one after the other."""
        source = each.source(owner, tp_rank)
        if each.per_rank:
            return _whole(source, self._field_shape(weight, each, tp_rank), 0)
        experts, tp, place = self._experts(weight, tp_rank)
        stacked = bool(weight.experts) and each.per_expert
        along_out = any(axis.along == "out" for axis in each.axes)
        pieces, element = [], 0
        for expert in experts if stacked else [None]:
            row = 0
            for part in weight.parts if along_out else weight.parts[:1]:
                whole = self._shape(part.shape)
                (low, high), columns = self._split(part, whole, tp, place)[0]
                bounds = {"one": (0, 1), "in": columns, "out": (row + low, row + high)}
                box = tuple(_bounds(bounds[axis.along], axis.step) for axis in each.axes)
                if stacked and expert is not None:
                    box = ((expert, expert + 1), *box)
                counted = self._first_holder(part, tp, place) if along_out else place == 0
                piece = Piece(source, self._field_shape(weight, each, None), box, element, counted=counted)
                pieces.append(piece)
                element += piece.count
                row += whole[0]
        return tuple(pieces)

    def _table_sources(self, weight: Weight, layer: int | None) -> Iterator[tuple[str, tuple[int, ...]]]:
        experts: Iterable[int | None] = range(self.config["moe"]["num_experts"]) if weight.experts else [None]
        for part in weight.parts:
            whole = tuple((0, extent) for extent in self._shape(part.shape))
            view, _ = self._stored(part, whole)
            shape = (math.prod(view[:3]), *view[3:]) if part.grouped else view
            for expert in experts:
                yield part.source.format(layer=layer, expert=expert), shape

    def _experts(self, weight: Weight, tp_rank: int) -> tuple[Sequence[int | None], int, int]:
        """The experts of a rank (one None for tensors without), the TP size that splits each, the rank's place in it.

        TensorRT-LLM numbers expert-parallel ranks fastest (tensorrt_llm/mapping.py: moe_ep_rank, moe_tp_rank).
        """
        if not weight.experts:
            return [None], self.tp, tp_rank
        place, group = divmod(tp_rank, self.expert_parallel)
        count = self.config["moe"]["num_experts"] // self.expert_parallel
        return range(group * count, (group + 1) * count), self.tp // self.expert_parallel, place

    def _first_holder(self, part: Part, tp: int, tp_rank: int) -> bool:
        split = _resolve(part.split, self.config)
        if split == "replicate":
            return tp_rank == 0
        heads = self.extents["kv"] // self.extents["head"]
        return split != "kv_heads" or heads >= tp or tp_rank * heads % tp == 0

    def _shape(self, shape: tuple[Extent, ...]) -> tuple[int, ...]:
        return tuple(extent if isinstance(extent, int) else self.extents[extent] for extent in shape)

    def _split(self, part: Part, shape: tuple[int, ...], tp: int, tp_rank: int) -> tuple[Box, tuple[int, ...]]:
        """The box that a TP rank takes of a part, and the shape it has in the rank's tensor (padding included)."""
        split = _resolve(part.split, self.config)
        box = [(0, extent) for extent in shape]
        local = list(shape)
        if split in ("axis0", "axis1"):
            axis = 0 if split == "axis0" else 1
            chunk = shape[axis] // tp
            box[axis], local[axis] = (tp_rank * chunk, (tp_rank + 1) * chunk), chunk
        elif split == "kv_heads":
            head = self.extents["head"]
            heads = shape[0] // head
            count = max(1, heads // tp)
            start = tp_rank * heads // tp
            box[0], local[0] = (start * head, (start + count) * head), count * head
        elif split == "vocab":
            chunk = -(-shape[0] // tp)
            box[0] = (min(tp_rank * chunk, shape[0]), min((tp_rank + 1) * chunk, shape[0]))
            local[0] = chunk
        return tuple(box), tuple(local)

    def _stored(self, part: Part, box: Box) -> tuple[tuple[int, ...], Box]:
        """Where a box of a part lies in the source tensor: the shape to look at that tensor in, and the box there."""
        view = self._shape(part.shape)
        if part.grouped:
            return self._group(part, view, box)
        if part.sections:
            sections = self._shape(part.sections)
            start = sum(sections[: part.section])
            box = ((box[0][0] + start, box[0][1] + start), *box[1:])
            view = (sum(sections), *view[1:])
        return (view[::-1], box[::-1]) if _is_transposed(part) else (view, box)

    def _group(self, part: Part, shape: tuple[int, ...], box: Box) -> tuple[tuple[int, ...], Box]:
        """Rows of queries, keys or values within axis 0 = (key/value heads, query heads per one + 2, head size)."""
        head = self.extents["head"]
        groups = self.extents["kv"] // head
        queries = self.extents["q"] // self.extents["kv"]
        view = (groups, queries + 2, head, *shape[1:])
        first, last = box[0][0] // head, box[0][1] // head
        whole = (0, head)
        if part.grouped in ("k", "v"):
            member = queries + (part.grouped == "v")
            return view, ((first, last), (member, member + 1), whole, *box[1:])
        # A rank's query heads are those of whole groups or lie within one, since TP divides the groups or vice versa.
        group, member = divmod(first, queries)
        if last - first < queries:
            return view, ((group, group + 1), (member, member + last - first), whole, *box[1:])
        return view, ((group, last // queries), (0, queries), whole, *box[1:])


def _whole(source: str, shape: tuple[int, ...], tp_rank: int) -> tuple[Piece, ...]:
    return (Piece(source, shape, tuple((0, extent) for extent in shape), 0, counted=tp_rank == 0),)


def _steps(length: int, step: int) -> int:
    return length if length == 1 else length // step


def _bounds(bounds: tuple[int, int], step: int) -> tuple[int, int]:
    return bounds if bounds == (0, 1) else (bounds[0] // step, bounds[1] // step)


def _is_transposed(part: Part) -> bool:
    return part.transposed and len(part.shape) == 2


def _resolve(split: Split, config: Mapping[str, Any]) -> Split:
    if split != "embedding":
        return split
    if not config["use_parallel_embedding"]:
        return "replicate"
    return "vocab" if config["embedding_sharding_dim"] == 0 else "axis1"
