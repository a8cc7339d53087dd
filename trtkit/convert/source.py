"""From a source and options to a plan, after checking that the source holds exactly what the plan reads."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trtkit import __version__, architectures
from trtkit.architectures.rules import Architecture, Stacked
from trtkit.architectures.settings import MAX_EXPERTS
from trtkit.convert.divisibility import check_divisible, check_stages, sides
from trtkit.convert.linears import linears
from trtkit.convert.plan import Plan, plan_checkpoint
from trtkit.convert.quantization import Quantization, layers_config, quantization_config
from trtkit.errors import InputError
from trtkit.hf import Source
from trtkit.hf_config import refuse_quantized
from trtkit.safetensors_io import TensorEntry
from trtkit.untrusted import printable

if TYPE_CHECKING:
    from trtkit.config import CheckpointConfig

SOURCE_DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Layout:
    """How a source becomes a checkpoint: the same as `config.CheckpointConfig`, for callers without a build config.

    Attributes:
        tp, pp, ep: tensor, pipeline and expert parallel sizes.
        dtype: `auto`, float16, bfloat16 or float32.
        parallel_embedding: `none`, `vocab` or `hidden`: axis along which TP splits the token embedding.
        quantization: how linears and the KV cache are quantised.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    dtype: str = "auto"
    parallel_embedding: str = "none"
    quantization: Quantization = field(default_factory=Quantization)


@dataclass(frozen=True)
class Packed:
    """What a source that is quantised already holds in place of plain weights, under the names of its family's table.

    Attributes:
        weights: the plain weights that are not there, since somebody makes tensors of what is.
        tensors: what is there for them.
    """

    weights: Collection[str]
    tensors: Collection[str]


def plan_conversion(source: Source, options: CheckpointConfig | Layout, *, packed: Packed | None = None) -> Plan:
    """The plan for a source, after checking that the source holds exactly what the plan reads.

    Args:
        packed: of a source that is quantised already.

    Raises:
        InputError: sizes that the layout does not divide; missing, surplus or misshapen tensors; a source that is
            quantised already, and nobody says what to make of it.
    """
    if packed is None:
        refuse_quantized(source.path, source.config)
    architecture = architectures.get(source.architecture)
    config = checkpoint_config(source, options)
    layers = config["num_hidden_layers"]
    if layers > len(source.tensors):  # told before a plan of that length is made
        raise InputError(
            f"{source.path}: config.json says {layers} layers, the weights have {len(source.tensors)} tensors",
            "config.json and the weights do not belong together",
        )
    plan = plan_checkpoint({**config, "quantization": {}})
    _check(plan, source, architecture, packed or Packed((), ()))
    quantization = asked_quantization(options)
    if quantization == Quantization():
        return plan_checkpoint(config)
    tp, pp, ep = options.tp, options.pp, options.ep
    _check_names(quantization, [linear.name for linear in linears(config)])
    check_divisible(quantization, sides(config), tp, ep=ep)
    check_stages(quantization, pp)
    return plan_checkpoint(config)


def checkpoint_config(source: Source, options: CheckpointConfig | Layout) -> dict[str, Any]:
    """config.json of the checkpoint: the model's keys plus those of its layout. All defaults are written out, since
    TRT-LLM's own are wrong for most models and it does not complain when they apply.

    Raises:
        InputError: the model has settings that TRT-LLM cannot express.
    """
    architecture = architectures.get(source.architecture)
    model = architecture.checkpoint_config(source.config)
    sharding = options.parallel_embedding
    if architecture.split_embedding and options.tp > 1:
        sharding = "vocab"
    mapping = {"world_size": options.tp * options.pp, "tp_size": options.tp, "pp_size": options.pp}
    if architecture.has_experts or options.ep > 1:
        mapping |= {"moe_tp_size": options.tp // options.ep, "moe_ep_size": options.ep}
    return {
        **model,
        "dtype": resolve_dtype(source.config.get("dtype"), options.dtype),
        "logits_dtype": "float32",
        "use_parallel_embedding": sharding != "none",
        "embedding_sharding_dim": 1 if sharding == "hidden" else 0,
        "mapping": mapping,
        "quantization": _quantization(model, asked_quantization(options)),
        "producer": {"name": "trtkit", "version": __version__},
    }


def _check_names(quantization: Quantization, names: list[str]) -> None:
    """A pattern that matches nothing is a mistake: what it should spare would be quantised."""
    for pattern in quantization.exclude:
        if not any(fnmatch.fnmatchcase(name, pattern.removesuffix(".weight")) for name in names):
            raise InputError(
                f"'{printable(pattern)}' excludes nothing: no linear of this model has such a name",
                f"their names are such as {names[0]}",
            )


def asked_quantization(options: CheckpointConfig | Layout) -> Quantization:
    """How the options ask for the checkpoint to be quantised.

    Raises:
        InputError: formats, group sizes or names that no checkpoint can have.
    """
    given = options.quantization
    if isinstance(given, Quantization):
        return given
    return Quantization(
        given.format,
        group_size=given.group_size,
        kv_cache=given.kv_cache,
        exclude=tuple(given.exclude),
        overrides=given.overrides,
    )


def _quantization(model: dict[str, Any], quantization: Quantization) -> dict[str, Any]:
    if not quantization.mixed:
        return quantization_config(quantization)
    return layers_config(quantization, [linear.name for linear in linears(model)])


def resolve_dtype(given: Any, wanted: str) -> str:
    """The checkpoint's dtype: `wanted`, where `auto` keeps the source's and float32 becomes float16.

    Raises:
        InputError: `auto`, and the source's is no weight dtype.
    """
    if wanted != "auto":
        return wanted
    given = given or "float16"
    if given not in SOURCE_DTYPES:
        raise InputError(f"config.json: dtype {given!r} is not a weight dtype", "give --dtype")
    return given if given in ("float16", "bfloat16") else "float16"


def source_tensors(source: Source) -> dict[str, TensorEntry]:
    """The source's tensors under the names of its family's table, whichever spelling or layout it came in."""
    architecture = architectures.get(source.architecture)
    tensors: dict[str, TensorEntry] = {}
    for given, entry in source.tensors.items():
        name = table_name(architecture, given)
        for unstacked, part in _unstack(name, entry, architecture.stacked):
            if unstacked in tensors:
                raise InputError(
                    f"{entry.path}: '{entry.name}' and '{tensors[unstacked].name}' are both '{unstacked}'",
                    "remove one of them",
                )
            tensors[unstacked] = part
    return tensors


def table_name(architecture: Architecture, name: str) -> str:
    """A source tensor's name in the spelling of its family's table."""
    for rename in architecture.renames:
        name = re.sub(*rename, name)
    return name


def _unstack(name: str, entry: TensorEntry, layouts: tuple[Stacked, ...]) -> list[tuple[str, TensorEntry]]:
    """The single experts of a tensor that stacks them: each is a contiguous range of its bytes."""
    for layout in layouts:
        match = re.fullmatch(layout.pattern, name)
        if match is None or len(entry.shape) != 3 or entry.shape[1] % len(layout.names):
            continue
        experts, rows, columns = entry.shape
        if experts > MAX_EXPERTS:
            break
        shape = (rows // len(layout.names), columns)
        parts: list[tuple[str, TensorEntry]] = []
        for expert in range(experts):
            for template in layout.names:
                start = entry.start + len(parts) * shape[0] * shape[1] * entry.dtype.itemsize
                part_name = match.expand(template).format(expert=expert)
                parts.append((part_name, TensorEntry(entry.path, part_name, entry.dtype, shape, start)))
        return parts
    return [(name, entry)]


def _check(plan: Plan, source: Source, architecture: Architecture, packed: Packed) -> None:
    mixed = "config.json and the weights do not belong together"
    tensors = source_tensors(source)
    for name, shape in plan.sources.items():
        if name in packed.weights:
            continue
        entry = tensors.get(name)
        if entry is None:
            raise InputError(f"{source.path}: tensor '{name}' is missing", mixed)
        if entry.shape != shape:
            raise InputError(
                f"{entry.path}: tensor '{name}' has shape {list(entry.shape)}, config.json implies {list(shape)}", mixed
            )
        if entry.dtype.name not in SOURCE_DTYPES:
            raise InputError(
                f"{entry.path}: tensor '{name}' is {entry.dtype.name}, which is not a plain weight dtype",
                "start from the unquantised checkpoint",
            )
    # A tied output projection is another name of the embedding; transformers ignores a stored copy, and so do we.
    tied = plan.config.get("tie_word_embeddings")
    ignored = (*architecture.ignored, *([r"lm_head\.weight"] if tied else []))
    for name, entry in tensors.items():
        if name in plan.sources or name in packed.tensors:
            continue
        if not any(re.fullmatch(pattern, name) for pattern in ignored):
            raise InputError(
                f"{entry.path}: tensor '{name}' has no place in {source.architecture}",
                f"{mixed} (a bias the config denies? an adapter?)",
            )
