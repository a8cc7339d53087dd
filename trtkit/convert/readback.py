"""Undoes a plan: puts the tensors of a source together again from the ranks of a checkpoint, to run them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trtkit import architectures
from trtkit.checkpoint import Checkpoint, open_checkpoint
from trtkit.convert.cast import Array
from trtkit.convert.plan import Placement, Plan, plan_checkpoint
from trtkit.convert.verify import check_layout
from trtkit.errors import InputError, missing_extra
from trtkit.safetensors_io import Reader

if TYPE_CHECKING:
    import torch


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
    state: dict[str, torch.Tensor] = {
        name: torch.from_numpy(values.astype(np.float32)) for name, values in read_tensors(checkpoint, plan)
    }
    kind = getattr(transformers, checkpoint.config["architecture"])
    model, info = kind.from_pretrained(
        None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
    )
    tied = config.tie_word_embeddings
    missing = [name for name in info["missing_keys"] if not (tied and name in ("lm_head.weight", "embed_out.weight"))]
    wrong = [*missing, *info["unexpected_keys"], *(str(key) for key in info["mismatched_keys"])]
    if wrong:
        raise InputError(
            f"{checkpoint.path}: transformers' {kind.__name__} disagrees about {', '.join(sorted(wrong)[:3])}",
            "use another version of transformers",
        )
    return model.eval()
