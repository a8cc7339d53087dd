"""Undoes a plan: puts the tensors of a source together again from the ranks of a checkpoint, to run them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from trtkit import architectures
from trtkit.architectures.rules import Architecture
from trtkit.checkpoint import Checkpoint, open_checkpoint
from trtkit.convert.cast import Array
from trtkit.convert.plan import Placement, Plan, plan_checkpoint
from trtkit.convert.verify import check_layout
from trtkit.errors import InputError, LacksError, missing_extra
from trtkit.safetensors_io import Reader

OLDEST_TRANSFORMERS = (4, 57)
"""In 4.48 some models do not know the caches of the reference runtime, and some families do not exist."""


def read_tensors(checkpoint: Checkpoint, plan: Plan) -> Iterator[tuple[str, Array]]:
    """Every source tensor, in the checkpoint's dtype (float32 where a constant was added), in the order of the plan.

    Elements that no rank needs (OPT's first two positions) are zero.

    Raises:
        CheckFailedError: a checkpoint tensor is missing or misshapen, or its padding is not zero.
    """
    check_layout(checkpoint, plan)
    seen: set[str] = set()
    with Reader() as reader:
        for _, placements in plan.units():
            for name, places in placements.items():
                if name not in seen:  # a tied embedding comes up twice
                    seen.add(name)
                    yield name, _assemble(reader, checkpoint, plan.sources[name], places)


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
    plan = plan_checkpoint(checkpoint.config)
    architecture = architectures.get(checkpoint.config["architecture"])
    model = _unfilled(checkpoint.config["architecture"], architecture.huggingface_config(checkpoint.config))
    with torch.no_grad():
        wrong = _fill(model, architecture, read_tensors(checkpoint, plan))
    if wrong:
        raise InputError(
            f"{checkpoint.path}: transformers' {type(model).__name__} disagrees about {', '.join(wrong[:3])}",
            "use another version of transformers",
        )
    return model.eval()


def _unfilled(name: str, settings: dict[str, Any]) -> Any:
    """A model whose parameters have memory but no values: pages that nobody wrote to cost nothing."""
    import transformers

    version = metadata.version("transformers")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRANSFORMERS:
        oldest = ".".join(map(str, OLDEST_TRANSFORMERS))
        raise LacksError(f"transformers {version} is too old to run models", f"pip install 'transformers>={oldest}'")
    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # before transformers 5
        from transformers.modeling_utils import no_init_weights
    try:
        config = transformers.AutoConfig.for_model(**settings)
        with no_init_weights():
            model = getattr(transformers, name)(config)
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
    places = {
        name: place
        for parameter, values in model.named_parameters(remove_duplicate=False)
        for name, place in _places(parameter, values.detach().numpy(), architecture)
    }
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
