"""Undoes a plan: puts the tensors of a source back together from the ranks of a checkpoint.

That serves two ends: `verify` compares them with the source, and `load_transformers_model` runs them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from trtkit import architectures
from trtkit.checkpoint import Checkpoint, open_checkpoint
from trtkit.config import CheckpointConfig
from trtkit.convert.plan import Plan, plan_checkpoint, plan_conversion
from trtkit.convert.stream import CastReport, cast
from trtkit.errors import CheckFailedError, InputError, missing_extra
from trtkit.hf import Source
from trtkit.safetensors_io import DTYPES, Reader

if TYPE_CHECKING:
    import torch


def read_tensors(checkpoint: Checkpoint, plan: Plan) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Every source tensor, in the checkpoint's dtype, in the order of the plan.

    Raises:
        CheckFailedError: a checkpoint tensor is missing or misshapen, copies on several ranks differ, padding is not
            zero, or an element is on no rank.
    """
    check_layout(checkpoint, plan)
    placements = plan.placements()
    dtype = DTYPES[plan.safetensors_dtype]
    with Reader() as reader:
        for name, shape in plan.sources.items():
            values = np.zeros(shape, dtype=dtype)
            covered = np.zeros(shape, dtype=np.bool_)
            for rank, target, piece in placements[name]:
                entry = checkpoint.ranks[rank][target]
                part = reader.elements(entry, piece.element, piece.count)
                part = part.reshape([stop - start for start, stop in piece.box])
                where = tuple(slice(start, stop) for start, stop in piece.box)
                seen = covered[where]
                if seen.any() and not np.array_equal(_bits(values[where])[seen], _bits(part)[seen]):
                    raise CheckFailedError(
                        f"{entry.path}: tensor '{target}' differs from its copy on another rank ('{name}')",
                        "convert again",
                    )
                values[where] = part
                covered[where] = True
            if not covered.all():
                raise CheckFailedError(f"{checkpoint.path}: part of '{name}' is on no rank", "convert again")
            yield name, values


def check_layout(checkpoint: Checkpoint, plan: Plan) -> None:
    """Names, shapes and dtypes of all ranks equal the plan's, and padding is zero."""
    dtype = DTYPES[plan.safetensors_dtype]
    with Reader() as reader:
        for rank, tensors in enumerate(plan.ranks):
            found = checkpoint.ranks[rank]
            names = {tensor.name for tensor in tensors}
            for name in sorted(names ^ set(found)):
                what = "is missing" if name in names else "is not expected"
                raise CheckFailedError(f"{checkpoint.path}: rank {rank}: tensor '{name}' {what}", "convert again")
            for tensor in tensors:
                entry = found[tensor.name]
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


@dataclass
class Verification:
    """Outcome of `verify`.

    Attributes:
        tensors: source tensors compared.
        elements: elements compared.
        mismatches: tensor -> elements that differ from the source's value in the checkpoint's dtype.
        rounded: elements whose value the checkpoint's dtype cannot hold exactly (0: not one value was changed).
        settings: key of config.json -> (what the source implies, what the checkpoint has), where they differ.
    """

    tensors: int = 0
    elements: int = 0
    mismatches: dict[str, int] = field(default_factory=dict)
    rounded: int = 0
    settings: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return not self.mismatches and not self.settings

    @property
    def first_difference(self) -> str:
        """Name of a tensor or config key that differs; empty when nothing does."""
        return next(iter([*self.mismatches, *self.settings]), "")


def verify(
    source: Source, checkpoint: Checkpoint, *, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Verification:
    """Reads the checkpoint back and compares every element with the source, bit for bit after the change of dtype,
    and config.json with what the source's config implies.

    Raises:
        InputError: the source is damaged.
        CheckFailedError: the checkpoint is not one of this source at all (other tensors or shapes), or is damaged.
    """
    plan = plan_checkpoint(checkpoint.config)
    result = Verification(settings=_compare_settings(source, checkpoint))
    report = CastReport()
    total = sum(math.prod(shape) for shape in plan.sources.values())
    with Reader() as reader:
        for name, values in read_tensors(checkpoint, plan):
            entry = source.tensors.get(name)
            if entry is None or entry.shape != values.shape:
                found = "no such tensor" if entry is None else f"shape {list(entry.shape)}"
                raise CheckFailedError(
                    f"{source.path}: the checkpoint implies '{name}' {list(values.shape)}, the source has {found}", ""
                )
            expected = cast(reader.tensor(entry), values.dtype, entry, report)
            different = int((_bits(expected) != _bits(values)).sum())
            if different:
                result.mismatches[name] = different
            result.tensors += 1
            result.elements += values.size
            on_progress(result.elements, total)
    result.rounded = report.rounded
    return result


def _compare_settings(source: Source, checkpoint: Checkpoint) -> dict[str, tuple[Any, Any]]:
    found = checkpoint.config
    sharding = {0: "vocab", 1: "hidden"}[found["embedding_sharding_dim"]] if found["use_parallel_embedding"] else "none"
    options = CheckpointConfig(
        dtype=found["dtype"],
        tp=checkpoint.tp,
        pp=checkpoint.pp,
        parallel_embedding=sharding,  # type: ignore[arg-type]
    )
    expected = plan_conversion(source, options).config
    ignored = {"producer"}  # another version of trtkit may have made it
    return {
        key: (expected.get(key), found.get(key))
        for key in sorted(expected.keys() | found.keys())
        if key not in ignored and expected.get(key) != found.get(key)
    }


def load_transformers_model(checkpoint_dir: str | Path) -> Any:
    """The model behind a checkpoint, for transformers: all ranks put together, float32, on the CPU, in eval mode.

    Raises:
        LacksError: torch is not installed.
        InputError: the checkpoint is damaged, or transformers' model wants other tensors.
    """
    try:
        import torch
    except ImportError:
        raise missing_extra("torch", "torch") from None
    import transformers

    checkpoint = open_checkpoint(checkpoint_dir)
    plan = plan_checkpoint(checkpoint.config)
    settings = architectures.get(checkpoint.config["architecture"]).huggingface_config(checkpoint.config)
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    state: dict[str, torch.Tensor] = {
        name: torch.from_numpy(values.astype(np.float32)) for name, values in read_tensors(checkpoint, plan)
    }
    model.to_empty(device="cpu")
    _initialise_buffers(model, config)
    result = model.load_state_dict(state, strict=False)
    model.tie_weights()
    missing = [name for name in result.missing_keys if not (config.tie_word_embeddings and name == "lm_head.weight")]
    if missing or result.unexpected_keys:
        names = (missing + result.unexpected_keys)[:3]
        raise InputError(
            f"{checkpoint.path}: transformers' {type(model).__name__} disagrees about {', '.join(names)}", ""
        )
    return model.float().eval()


def _initialise_buffers(model: Any, config: Any) -> None:
    """Buffers that no checkpoint stores (rotary tables) are taken from a fresh model without layers."""
    import copy

    small = copy.deepcopy(config)
    small.num_hidden_layers = 0
    buffers = dict(type(model)(small).named_buffers())
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


def _bits(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same memory as unsigned integers, so that NaNs and signed zeros compare by their bits."""
    return values.view(np.dtype(f"u{values.dtype.itemsize}"))
