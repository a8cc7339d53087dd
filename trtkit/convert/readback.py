"""Undoes a plan: puts the tensors of a source together again from the ranks of a checkpoint, to run them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from trtkit import architectures
from trtkit.architectures.rules import Architecture
from trtkit.checkpoint import Checkpoint, open_checkpoint
from trtkit.convert.cast import Array
from trtkit.convert.dequantize import InputRounding, dequantize, input_rounding
from trtkit.convert.linears import Linear, fields, linears
from trtkit.convert.plan import CHECKPOINT_DTYPES, Placement, checkpoint_quantization, plan_checkpoint
from trtkit.convert.quantization import Format
from trtkit.convert.ranks import generation, join_gptq, weights_by_rank
from trtkit.convert.verify import check_layout
from trtkit.convert.whole import gather, scatter, whole_tensors
from trtkit.errors import InputError, LacksError, missing_extra
from trtkit.safetensors_io import DTYPES, Reader

OLDEST_TRANSFORMERS = (4, 57)
"""In 4.48 some models do not know the caches of the reference runtime, and some families do not exist."""


class CheckpointReader:
    """The tensors of a checkpoint under the names of its family's table, as a source would have them: ranks put
    together, quantised linears dequantised. Use as a context manager.

    Attributes:
        shapes: of every source tensor, by name.
        units: how many steps the model has: what comes before the layers, each layer, what follows them.

    Raises:
        CheckFailedError: a checkpoint tensor is missing or misshapen, or its padding is not zero.
        InputError: its weights are laid out for a GPU, and it does not say for which.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.plan = plan_checkpoint(checkpoint.config)
        check_layout(checkpoint, self.plan)
        self.quantization = checkpoint_quantization(checkpoint.config)
        self._whole, self.shapes = whole_tensors(checkpoint.config)
        self.units = checkpoint.config["num_hidden_layers"] + 2
        self._linears: dict[int, list[Linear]] = {}
        for linear in linears(checkpoint.config) if self.quantization.format else ():
            self._linears.setdefault(linear.layer + 1, []).append(linear)
        per_rank = "int4_gptq" in self.quantization.formats
        self._by_rank = weights_by_rank(checkpoint.config) if per_rank else {}
        self._sm = generation(checkpoint.config) if per_rank else 0
        self._reader = Reader()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *details: Any) -> None:
        self._reader.__exit__(*details)

    def tensors(self, unit: int) -> Iterator[tuple[str, Array]]:
        """The source tensors of a unit, by name: in the checkpoint's dtype, float32 where they were quantised or a
        constant was added. Elements that no rank needs (OPT's first two positions) are zero."""
        weight_only = self._weight_only(unit)
        linears_here = {f"{linear.name}.weight" for linear in self._linears.get(unit, [])}
        kept: dict[str, Array] = {}
        for name, places in self.plan.unit(unit).items():
            values = _assemble(self._reader, self.checkpoint, self.plan.sources[name], places)
            if name in self._whole and name not in linears_here:  # a norm that quantisation scaled
                yield from scatter(self._whole[name], values.astype(np.float32), self.shapes)
            elif name in self.shapes and name not in weight_only:
                yield name, values
            else:
                kept[name] = values
            del values  # one tensor at a time is in memory beside what waits for the rest of its linear
        for linear in self._linears.get(unit, []):
            form = self.quantization.format_of(linear.name)
            whole = self._whole[f"{linear.name}.weight"]
            if form is not None and form.weight_only:
                plain = gather(whole, kept.__getitem__).astype(self._dtype)
                yield from scatter(whole, dequantize(form, {"weight": plain}, self._dtype), self.shapes)
            elif form is not None and form.name == "int4_gptq":
                ranks = self._by_rank[f"{linear.name}.weight"]
                yield from join_gptq(linear.name, ranks, kept, self.shapes, self._sm).items()
            elif form is not None:
                yield from scatter(
                    whole, dequantize(form, self._tensors_of(linear, form, kept), self._dtype), self.shapes
                )

    def _weight_only(self, unit: int) -> set[str]:
        """Source tensors whose values count only together with the rest of their linear."""
        return {
            piece.source
            for linear in self._linears.get(unit, [])
            if (form := self.quantization.format_of(linear.name)) is not None and form.weight_only
            for piece in self._whole[f"{linear.name}.weight"].pieces
        }

    def roundings(self, layer: int) -> dict[str, InputRounding]:
        """How the inputs of a layer's linears are rounded, by the name of every source tensor of the linear."""
        found: dict[str, InputRounding] = {}
        made: dict[str, Array] | None = None
        for linear in self._linears.get(layer + 1, []):
            form = self.quantization.format_of(linear.name)
            if form is None or form.inputs == "16 bits":
                continue
            made = self._made(layer + 1) if made is None else made
            rounding = input_rounding(form, self._tensors_of(linear, form, made))
            if rounding is not None:
                found |= {piece.source: rounding for piece in self._whole[f"{linear.name}.weight"].pieces}
        return found

    def cache_scale(self, layer: int) -> float | None:
        """The scale of a layer's quantised keys and values; None where the cache is not quantised."""
        if self.quantization.kv_cache is None:
            return None
        name = f"transformer.layers.{layer}.attention.kv_cache_scaling_factor"
        return float(self._made(layer + 1)[name][0])

    @property
    def _dtype(self) -> Any:
        return DTYPES[CHECKPOINT_DTYPES[self.checkpoint.config["dtype"]]]

    def _made(self, unit: int) -> dict[str, Array]:
        return {
            name: _assemble(self._reader, self.checkpoint, self.plan.sources[name], places)
            for name, places in self.plan.unit(unit).items()
        }

    def _tensors_of(self, linear: Linear, form: Format, made: Mapping[str, Array]) -> dict[str, Array]:
        own = fields(form, self.quantization, linear.kind)
        return {field.suffix: made[f"{linear.name}.{field.suffix}"] for field in own}


def read_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Array]]:
    """Every source tensor, one after the other in order of execution (see `CheckpointReader`)."""
    seen: set[str] = set()
    with CheckpointReader(checkpoint) as reader:
        for unit in range(reader.units):
            for name, values in reader.tensors(unit):
                if name not in seen:  # a tied embedding comes up twice
                    seen.add(name)
                    yield name, values
                del values


def _assemble(reader: Reader, checkpoint: Checkpoint, shape: tuple[int, ...], places: list[Placement]) -> Array:
    first = checkpoint.ranks[places[0].rank][places[0].tensor.name]
    dtype = np.dtype(np.float32) if places[0].piece.plus else first.dtype
    values = np.zeros(shape, dtype=dtype)
    for place in places:
        piece = place.piece
        part = reader.elements(checkpoint.ranks[place.rank][place.tensor.name], piece.element, piece.count)
        extents = [stop - start for start, stop in piece.box]
        part = part.reshape(extents[::-1]).T if piece.transposed else part.reshape(extents)
        if piece.plus:
            part = part.astype(np.float32) - np.float32(piece.plus)
        where = tuple(slice(start, stop) for start, stop in piece.box)
        values.reshape(piece.view)[where] = part
    return values


def load_transformers_model(checkpoint_dir: str | Path) -> Any:
    """The model behind a checkpoint, for transformers: all ranks put together, float32, on the CPU, in eval mode.

    Takes the memory of the float32 weights and of about two tensors: what is read goes right into its parameter.

    Raises:
        LacksError: torch is not installed, or this transformers cannot make the model.
        InputError: the checkpoint is damaged, or transformers' model wants other tensors.
    """
    try:
        import torch
    except ImportError:
        raise missing_extra("torch", "torch") from None

    checkpoint = open_checkpoint(checkpoint_dir)
    architecture = architectures.get(checkpoint.config["architecture"])
    model = unfilled_model(checkpoint.config)
    with torch.no_grad():
        wrong = _fill(model, architecture, read_tensors(checkpoint))
    with CheckpointReader(checkpoint) as reader:
        _round_inputs(model, architecture, reader)
    if wrong:
        raise InputError(
            f"{checkpoint.path}: transformers' {type(model).__name__} disagrees about {', '.join(wrong[:3])}",
            "use another version of transformers",
        )
    return model.eval()


def _round_inputs(model: Any, architecture: Architecture, reader: CheckpointReader) -> None:
    """Lets the linears of a model round their inputs as the checkpoint says."""
    roundings: dict[str, InputRounding] = {}
    for layer in range(reader.units - 2):
        roundings |= reader.roundings(layer)
    if roundings:
        round_linears(model, architecture, roundings)


def unfilled_model(config: Mapping[str, Any], dtype: Any = None) -> Any:
    """The transformers model of a checkpoint's config.json, whose parameters have memory but no values: pages that
    nobody wrote to cost nothing.

    Args:
        dtype: torch dtype of the parameters, float32 by default.

    Raises:
        LacksError: this transformers cannot make the model.
    """
    import torch
    import transformers

    name = config["architecture"]
    settings = architectures.get(name).huggingface_config(config)

    version = metadata.version("transformers")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRANSFORMERS:
        oldest = ".".join(map(str, OLDEST_TRANSFORMERS))
        raise LacksError(f"transformers {version} is too old to run models", f"pip install 'transformers>={oldest}'")
    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # before transformers 5
        from transformers.modeling_utils import no_init_weights
    try:
        made = transformers.AutoConfig.for_model(**settings)
        with no_init_weights():
            model = getattr(transformers, name)._from_config(made, dtype=dtype or torch.float32)
    except (MemoryError, RuntimeError):
        raise
    except Exception as error:  # its own checks raise many kinds, which differ between versions
        reason = " ".join(str(error).split())
        raise LacksError(
            f"transformers {version} makes no {name} of the checkpoint's config.json: {type(error).__name__}: {reason}",
            "use another version of transformers, or convert again",
        ) from error
    model.tie_weights()  # in transformers 5 a part of what was left out
    return model


def _fill(model: Any, architecture: Architecture, tensors: Iterable[tuple[str, Array]]) -> list[str]:
    """Copies tensors into the parameters of a model; returns the names of which one side lacks or the shapes differ."""
    places = parameter_places(model, architecture)
    wrong: list[str] = []
    filled: set[int] = set()
    for name, values in tensors:
        place = places.get(name)
        if place is None or place.shape != values.shape:
            wrong.append(name)
        else:
            place[...] = values
            filled.add(place.ctypes.data)
    # Of a tied pair only one name is in the checkpoint, but both have the same memory.
    wrong.extend(name for name, place in places.items() if name not in wrong and place.ctypes.data not in filled)
    return sorted(wrong)


def parameter_places(model: Any, architecture: Architecture, prefix: str = "") -> dict[str, Array]:
    """The memory of a model's parameters, as arrays under the names of the family's table.

    Args:
        model: on the CPU.
        prefix: what the names of a part of the model begin with.
    """
    return {
        name: place
        for parameter, values in model.named_parameters(remove_duplicate=False)
        for name, place in _places(prefix + parameter, _array(values.detach()), architecture)
    }


def _array(values: Any) -> Array:
    import ml_dtypes
    import torch

    if values.dtype == torch.bfloat16:  # numpy has no such dtype of its own
        return values.view(torch.int16).numpy().view(ml_dtypes.bfloat16)  # type: ignore[no-any-return]
    return values.numpy()  # type: ignore[no-any-return]


def round_linears(
    model: Any, architecture: Architecture, roundings: Mapping[str, InputRounding], prefix: str = ""
) -> None:
    """Lets modules of a model round their inputs.

    Args:
        roundings: by the name of the weight in the family's table.
        prefix: what the names of a part of a model begin with.
    """
    from trtkit.convert.experts import holds_experts
    from trtkit.convert.simulate import round_expert_inputs, round_inputs

    for name, module in model.named_modules():
        weight = f"{prefix}{name}.weight"
        for pattern, replacement in architecture.renames:
            weight = re.sub(pattern, replacement, weight)
        if weight in roundings:
            round_inputs(module, roundings[weight])
        if holds_experts(module):
            names = {which: f"{prefix}{name}.{which}_proj" for which in ("gate_up", "down")}
            first = {which: next(_places(full, np.zeros((1, 2)), architecture))[0] for which, full in names.items()}
            if first["gate_up"] in roundings:
                round_expert_inputs(module, roundings[first["gate_up"]], roundings[first["down"]])


def _places(name: str, values: Array, architecture: Architecture) -> Iterator[tuple[str, Array]]:
    """The parts of a parameter under the names of the family's table: one, or one per tensor of the experts."""
    for pattern, replacement in architecture.renames:
        name = re.sub(pattern, replacement, name)
    for layout in architecture.stacked:
        if match := re.fullmatch(layout.pattern, name):
            for expert, joined in enumerate(values):
                for template, part in zip(layout.names, np.split(joined, len(layout.names)), strict=True):
                    yield match.expand(template).format(expert=expert), part
            return
    yield name, values
