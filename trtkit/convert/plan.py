"""Which elements of which source tensor go where in which rank's file: pure functions from a config to data.

A plan follows from the checkpoint's config.json alone, so whoever holds a checkpoint can undo it without the source.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trtkit import __version__, architectures
from trtkit.architectures.rules import Architecture, Part, Split, Weight, sizes
from trtkit.checkpoint import stage_layers
from trtkit.config import CheckpointConfig
from trtkit.errors import InputError
from trtkit.hf import Source, is_ignored
from trtkit.safetensors_io import DTYPES

Box = tuple[tuple[int, int], ...]
"""Start and stop per axis."""

_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


@dataclass(frozen=True)
class Piece:
    """A box of a source tensor that lies as one contiguous run, in C order, in a checkpoint tensor.

    Attributes:
        source: name of the source tensor.
        box: what is taken of it, in elements.
        element: flat index in the checkpoint tensor where it starts.
    """

    source: str
    box: Box
    element: int

    @property
    def count(self) -> int:
        return math.prod(stop - start for start, stop in self.box)


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of one rank's file. Elements that no piece covers are zero (vocabulary padding)."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Plan:
    """A conversion, or its inverse.

    Attributes:
        config: config.json of the checkpoint.
        ranks: the tensors of each rank's file.
        sources: shape of every source tensor that the plan reads.
    """

    config: dict[str, Any]
    ranks: list[list[PlannedTensor]]
    sources: dict[str, tuple[int, ...]]

    @property
    def safetensors_dtype(self) -> str:
        """Dtype of all tensors, in safetensors' spelling."""
        return _DTYPES[self.config["dtype"]]

    def rank_bytes(self, rank: int) -> int:
        """Bytes of a rank's tensors."""
        size = DTYPES[self.safetensors_dtype].itemsize
        return sum(math.prod(tensor.shape) * size for tensor in self.ranks[rank])

    def placements(self) -> dict[str, list[tuple[int, str, Piece]]]:
        """Source tensor -> every (rank, checkpoint tensor, piece) that holds a part of it."""
        found: dict[str, list[tuple[int, str, Piece]]] = {name: [] for name in self.sources}
        for rank, tensors in enumerate(self.ranks):
            for tensor in tensors:
                for piece in tensor.pieces:
                    found[piece.source].append((rank, tensor.name, piece))
        return found


def plan_conversion(source: Source, options: CheckpointConfig) -> Plan:
    """The plan for a source, after checking that the source holds exactly what the plan reads.

    Raises:
        InputError: sizes that TP or PP does not divide, missing, surplus or misshapen tensors.
    """
    architecture = architectures.get(source.architecture)
    model = architecture.checkpoint_config(source.config)
    plan = plan_checkpoint(_complete_config(model, source, options))
    _check_source(plan, source, architecture)
    return plan


def plan_checkpoint(config: Mapping[str, Any]) -> Plan:
    """The plan behind a checkpoint's config.json.

    Raises:
        InputError: an unknown architecture or dtype, or sizes that TP or PP does not divide.
    """
    architecture = architectures.get(config["architecture"])
    if config["dtype"] not in _DTYPES:
        raise InputError(f"checkpoint dtype '{config['dtype']}' is not one of {', '.join(_DTYPES)}", "convert again")
    tp, pp = config["mapping"]["tp_size"], config["mapping"]["pp_size"]
    _check_parallelism(config, tp, pp)
    weights = [weight for weight in architecture.weights if weight.when(config)]
    sources: dict[str, tuple[int, ...]] = {}
    ranks = []
    stages = stage_layers(config["num_hidden_layers"], pp)
    for stage, layers in enumerate(stages):
        named = list(_instances(weights, layers, first=stage == 0, last=stage == pp - 1))
        for tp_rank in range(tp):
            ranks.append([_plan_tensor(*place, config, tp, tp_rank, sources) for place in named])
    return Plan(dict(config), ranks, sources)


def valid_tp_sizes(config: Mapping[str, Any], limit: int = 64) -> list[int]:
    """TP sizes up to `limit` that the model's heads and widths allow."""
    return [tp for tp in range(1, limit + 1) if _tp_problem(config, tp) is None]


def _complete_config(model: dict[str, Any], source: Source, options: CheckpointConfig) -> dict[str, Any]:
    """The model's keys plus those of layout. All defaults are written out: TRT-LLM's own are wrong for most models and
    it does not complain when they apply."""
    dtype: str = options.dtype
    if dtype == "auto":
        given = source.config.get("dtype") or "float16"
        if given not in ("float16", "bfloat16", "float32", "float64"):
            raise InputError(f"config.json: dtype {given!r} is not a weight dtype", "give --dtype")
        dtype = given if given in ("float16", "bfloat16") else "float16"
    sharding = {"none": (False, 0), "vocab": (True, 0), "hidden": (True, 1)}[options.parallel_embedding]
    return {
        **model,
        "dtype": dtype,
        "logits_dtype": "float32",
        "use_parallel_embedding": sharding[0],
        "embedding_sharding_dim": sharding[1],
        "mapping": {"world_size": options.tp * options.pp, "tp_size": options.tp, "pp_size": options.pp},
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
        "producer": {"name": "trtkit", "version": __version__},
    }


def _tp_problem(config: Mapping[str, Any], tp: int) -> str | None:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    if heads % tp:
        return f"num_attention_heads {heads} is not a multiple of it"
    if kv_heads % tp and tp % kv_heads:
        return f"num_key_value_heads {kv_heads} is neither a multiple nor a divisor of it"
    if config["intermediate_size"] % tp:
        return f"intermediate_size {config['intermediate_size']} is not a multiple of it"
    if (
        config.get("use_parallel_embedding")
        and config.get("embedding_sharding_dim") == 1
        and config["hidden_size"] % tp
    ):
        return f"hidden_size {config['hidden_size']} is not a multiple of it"
    return None


def _check_parallelism(config: Mapping[str, Any], tp: int, pp: int) -> None:
    if problem := _tp_problem(config, tp):
        valid = ", ".join(map(str, valid_tp_sizes(config)))
        raise InputError(f"TP {tp} does not fit this model: {problem}", f"valid TP sizes: {valid}")
    layers = config["num_hidden_layers"]
    if pp > layers:
        raise InputError(f"PP {pp} does not fit this model: it has {layers} layers", f"valid PP sizes: 1 to {layers}")


def _instances(
    weights: list[Weight], layers: range, *, first: bool, last: bool
) -> Iterator[tuple[Weight, int | None, int | None]]:
    """Each tensor of a pipeline stage: its rule, its layer within the stage and in the model (None outside layers)."""
    for weight in weights:
        if weight.stage == "layers":
            for local, layer in enumerate(layers):
                yield weight, local, layer
        elif (weight.stage == "first" and first) or (weight.stage == "last" and last):
            yield weight, None, None


def _plan_tensor(
    weight: Weight,
    local: int | None,
    layer: int | None,
    config: Mapping[str, Any],
    tp: int,
    tp_rank: int,
    sources: dict[str, tuple[int, ...]],
) -> PlannedTensor:
    extents = sizes(config)
    pieces = []
    rows = 0
    rest: tuple[int, ...] = ()
    for part in weight.parts:
        shape = tuple(extents[axis] for axis in part.shape)
        source = part.source.format(layer=layer)
        sources[source] = shape
        box, local_shape = _split(_resolve(part.split, config), shape, part, extents, tp, tp_rank)
        rest = local_shape[1:]
        piece = Piece(source, box, rows * math.prod(rest))
        if piece.count:
            pieces.append(piece)
        rows += local_shape[0]
    return PlannedTensor(weight.name.format(layer=local), (rows, *rest), tuple(pieces))


def _resolve(split: Split, config: Mapping[str, Any]) -> Split:
    if split != "embedding":
        return split
    if not config["use_parallel_embedding"]:
        return "replicate"
    return "vocab" if config["embedding_sharding_dim"] == 0 else "axis1"


def _split(
    split: Split, shape: tuple[int, ...], part: Part, extents: Mapping[str, int], tp: int, tp_rank: int
) -> tuple[Box, tuple[int, ...]]:
    """The box that a TP rank takes of a source tensor, and the shape it has in the rank's tensor (padding included)."""
    box = [(0, extent) for extent in shape]
    local = list(shape)
    if split in ("axis0", "axis1"):
        axis = 0 if split == "axis0" else 1
        chunk = shape[axis] // tp
        if chunk * tp != shape[axis]:
            raise InputError(f"{part.source}: axis {axis} of {list(shape)} is no multiple of TP {tp}", "use another TP")
        box[axis], local[axis] = (tp_rank * chunk, (tp_rank + 1) * chunk), chunk
    elif split == "kv_heads":
        head = extents["head"]
        heads = shape[0] // head
        count = max(1, heads // tp)
        start = tp_rank * heads // tp
        box[0], local[0] = (start * head, (start + count) * head), count * head
    elif split == "vocab":
        chunk = -(-shape[0] // tp)
        box[0] = (min(tp_rank * chunk, shape[0]), min((tp_rank + 1) * chunk, shape[0]))
        local[0] = chunk
    return tuple(box), tuple(local)


def _check_source(plan: Plan, source: Source, architecture: Architecture) -> None:
    for name, shape in plan.sources.items():
        entry = source.tensors.get(name)
        if entry is None:
            raise InputError(
                f"{source.path}: tensor '{name}' is missing", "config.json and the weights do not belong together"
            )
        if entry.shape != shape:
            raise InputError(
                f"{entry.path}: tensor '{name}' has shape {list(entry.shape)}, config.json implies {list(shape)}",
                "config.json and the weights do not belong together",
            )
        if entry.dtype.name not in ("float16", "bfloat16", "float32"):
            fix = "start from the unquantised checkpoint"
            raise InputError(
                f"{entry.path}: tensor '{name}' is {entry.dtype.name}, which is not a plain weight dtype", fix
            )
    for name, entry in source.tensors.items():
        tied_copy = name == "lm_head.weight" and plan.config.get("tie_word_embeddings")
        if name not in plan.sources and not tied_copy and not is_ignored(name, architecture.ignored):
            raise InputError(
                f"{entry.path}: tensor '{name}' has no place in {source.architecture}",
                "config.json and the weights do not belong together (a bias the config denies? an adapter?)",
            )
