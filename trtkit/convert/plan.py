"""Which elements of which source tensor go where in which rank's file: pure functions from a config to data.

A plan follows from the checkpoint's config.json alone, so whoever holds a checkpoint can undo it without the source.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from trtkit import architectures
from trtkit.architectures.rules import sizes
from trtkit.checkpoint import MIXED_PRECISION, stage_layers
from trtkit.convert.linears import linears
from trtkit.convert.parallelism import check_parallelism
from trtkit.convert.pieces import Box, Piece, PlannedTensor
from trtkit.convert.planner import CHECKPOINT_DTYPES, Planner, instances
from trtkit.convert.quantization import Quantization, read_quantization
from trtkit.errors import InputError
from trtkit.safetensors_io import DTYPES

__all__ = [
    "CHECKPOINT_DTYPES",
    "Box",
    "Piece",
    "Placement",
    "Plan",
    "PlannedTensor",
    "checkpoint_quantization",
    "plan_checkpoint",
]


@dataclass(frozen=True)
class Placement:
    """A piece, with the tensor and the rank that it belongs to."""

    rank: int
    tensor: PlannedTensor
    piece: Piece

    @property
    def nbytes(self) -> int:
        return self.piece.count * DTYPES[self.tensor.dtype].itemsize


@dataclass(frozen=True)
class Plan:
    """A conversion, or its inverse.

    Attributes:
        config: config.json of the checkpoint.
        ranks: the tensors of each rank's file, in order of execution.
        sources: shape of every source tensor that the plan reads.
    """

    config: dict[str, Any]
    ranks: list[list[PlannedTensor]]
    sources: dict[str, tuple[int, ...]]

    def rank_bytes(self, rank: int) -> int:
        """Bytes of a rank's tensors."""
        return sum(tensor.nbytes for tensor in self.ranks[rank])

    def stages(self) -> list[list[int]]:
        """The ranks of each pipeline stage, which read the same source tensors."""
        tp = self.config["mapping"]["tp_size"]
        return [list(range(first, first + tp)) for first in range(0, len(self.ranks), tp)]

    def units(self, ranks: Collection[int] | None = None) -> Iterator[tuple[int, dict[str, list[Placement]]]]:
        """The model in order of execution, one layer at a time: number of the unit, and for every source tensor that
        some of `ranks` (default: all) take a part of, where its pieces go."""
        chosen = sorted(range(len(self.ranks)) if ranks is None else ranks)
        by_unit: dict[int, list[tuple[int, PlannedTensor]]] = {}
        for rank in chosen:
            for tensor in self.ranks[rank]:
                by_unit.setdefault(tensor.unit, []).append((rank, tensor))
        for unit in sorted(by_unit):
            yield unit, _by_source(by_unit[unit])

    def unit(self, number: int) -> dict[str, list[Placement]]:
        """One of `units`, of all ranks."""
        held = [
            (rank, tensor) for rank, tensors in enumerate(self.ranks) for tensor in tensors if tensor.unit == number
        ]
        return _by_source(held)


def _by_source(tensors: list[tuple[int, PlannedTensor]]) -> dict[str, list[Placement]]:
    found: dict[str, list[Placement]] = {}
    for rank, tensor in tensors:
        for piece in tensor.pieces:
            found.setdefault(piece.source, []).append(Placement(rank, tensor, piece))
    return found


def plan_checkpoint(config: Mapping[str, Any]) -> Plan:
    """The plan behind a checkpoint's config.json.

    Raises:
        InputError: an unknown architecture or dtype, or sizes that the layout does not divide.
    """
    architecture = architectures.get(config["architecture"])
    if config["dtype"] not in CHECKPOINT_DTYPES:
        known = ", ".join(CHECKPOINT_DTYPES)
        raise InputError(f"checkpoint dtype '{config['dtype']}' is not one of {known}", "convert again")
    try:
        check_parallelism(config, architecture)
        weights = [weight for weight in architecture.weights if weight.when(config)]
        quantization = checkpoint_quantization(config)
        planner = Planner(config, {**sizes(config), **architecture.sizes(config)}, weights, quantization)
    except KeyError as error:
        raise InputError(f"config.json of the checkpoint lacks the key {error}", "convert again") from error
    ranks: list[list[PlannedTensor]] = []
    sources: dict[str, tuple[int, ...]] = {}
    tp, pp = config["mapping"]["tp_size"], config["mapping"]["pp_size"]
    for stage, layers in enumerate(stage_layers(config["num_hidden_layers"], pp)):
        named = list(instances(weights, layers, first=stage == 0, last=stage == pp - 1))
        last = config["num_hidden_layers"] + 1
        for tp_rank in range(tp):
            ranks.append([tensor for place in named for tensor in planner.tensors(*place, tp_rank, last)])
            for weight, _, layer in named if tp_rank == 0 or planner.made_per_rank else ():
                sources.update(planner.sources(weight, layer, tp_rank))
    return Plan(dict(config), ranks, sources)


def checkpoint_quantization(config: Mapping[str, Any]) -> Quantization:
    """How the linears of a checkpoint are quantised, from its config.json with the table of quant_cfg.json in it.

    Raises:
        InputError: the config asks for what trtkit does not know.
    """
    given = config.get("quantization")
    quantization = read_quantization(given)
    mixed = given is not None and given.get("quant_algo") == MIXED_PRECISION
    table = given.get("quantized_layers") if given and mixed else None
    if isinstance(table, dict):  # what the table does not list is not quantised
        exclude = tuple(linear.name for linear in linears(config) if linear.name not in table)
        quantization = replace(quantization, exclude=exclude)
    return quantization
