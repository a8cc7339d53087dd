"""What each tensor-parallel rank takes of the linears of a model, for formats whose tensors cannot be split.

The weight of W4A16_GPTQ is interleaved for a kernel, so it is made, and read back, from the part of the linear that a
rank has. Which part that is follows from the same plan as for plain weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from trtkit.convert.cast import Array
from trtkit.convert.interleave import gptq_values
from trtkit.convert.plan import PlannedTensor, plan_checkpoint
from trtkit.errors import InputError

SM = "weights_for_sm"
"""Key of `producer` in a checkpoint's config.json: the GPU generation (89 for 8.9) that its weights are laid out for.
TensorRT-LLM keeps no such key of its own, and lets `producer` hold anything."""


def weights_by_rank(config: Mapping[str, Any]) -> dict[str, list[PlannedTensor]]:
    """The plain weights of a checkpoint's layers as each TP rank would hold them.

    Args:
        config: config.json of the checkpoint, quantised or not.

    Returns:
        name with the layer's number in the whole model, `transformer.layers.{layer}.mlp.fc.weight` -> one per TP rank.
    """
    plan = plan_checkpoint({**config, "quantization": {}})
    found: dict[str, list[PlannedTensor]] = {}
    for ranks in plan.stages():
        for rank in ranks:
            for tensor in plan.ranks[rank]:
                if 0 < tensor.unit <= config["num_hidden_layers"]:
                    within = tensor.name.split(".", 3)[3]
                    found.setdefault(f"transformer.layers.{tensor.unit - 1}.{within}", []).append(tensor)
    return found


def generation(config: Mapping[str, Any]) -> int:
    """The GPU generation that a checkpoint's weights are laid out for, 89 for 8.9.

    Raises:
        InputError: its config.json does not say.
    """
    producer = config.get("producer")
    sm = producer.get(SM) if isinstance(producer, dict) else None
    if type(sm) is not int:
        raise InputError(
            f"config.json of the checkpoint does not say which GPU its weights are laid out for (producer.{SM})",
            "add it, such as 89 for compute capability 8.9, or convert again",
        )
    return sm


def join_gptq(
    linear: str, ranks: list[PlannedTensor], made: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]], sm: int
) -> dict[str, Array]:
    """The source tensors behind a linear of W4A16_GPTQ, float32: all ranks' parts, out of the kernel's order.

    Args:
        linear: its name, `transformer.layers.{layer}.mlp.fc`.
        ranks: its plain weight on each TP rank (see `weights_by_rank`).
        made: the tensors of all ranks, `{linear}.weight.tp0` and so on.
        shapes: of the source's tensors.
        sm: the GPU that the weights are laid out for.
    """
    found: dict[str, Array] = {}
    for rank, tensor in enumerate(ranks):
        weight, scales, zero = (
            made[f"{linear}.{suffix}.tp{rank}"] for suffix in ("weight", "weights_scaling_factor", "zero")
        )
        flat = gptq_values(weight, scales, zero, 4, sm).reshape(-1)
        for piece in tensor.pieces:
            extents = [stop - start for start, stop in piece.box]
            part = flat[piece.element : piece.element + piece.count]
            part = part.reshape(extents[::-1]).T if piece.transposed else part.reshape(extents)
            values = found.setdefault(piece.source, np.zeros(shapes[piece.source], np.float32))
            values.reshape(piece.view)[tuple(slice(start, stop) for start, stop in piece.box)] = part
    return found
