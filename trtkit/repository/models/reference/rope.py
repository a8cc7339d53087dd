"""Rotary embeddings whose frequencies depend on the length of the sequence, in a batch of different lengths.

transformers chooses the frequencies for a whole batch, by the largest position in it (modeling_rope_utils.py,
dynamic_rope_update): with "longrope" (Phi-3's 128k models) one of two sets, on either side of
`original_max_position_embeddings`; with "dynamic" others for every length beyond `max_position_embeddings`. Here each
row gets those that it would get alone. TensorRT-LLM goes by the longest prompt of a step and never changes a running
request (gptAttentionPlugin.cpp, useLongRoPECache), so past that length its tokens can be others than transformers'.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def separate_rows(model: Any) -> int | None:
    """Gives each row of a batch the frequencies of its own length, from now on and if they depend on it.

    Returns:
        Length, in tokens, beyond which all keys of a sequence must be computed anew; None if there is none.
        transformers does so for Phi-3 only (modeling_phi3.py, prepare_inputs_for_generation).
    """
    config = model.config
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type"))
    if kind not in ("longrope", "dynamic"):
        return None
    limit: int = config.max_position_embeddings
    if kind == "longrope":
        limit = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
    for name, module in model.named_modules():
        # A model may have served another batch before.
        if name.rpartition(".")[2] == "rotary_emb" and not isinstance(module.forward, functools.partial):
            module.forward = functools.partial(_forward, module, module.forward, limit, kind == "dynamic")
    return limit if kind == "longrope" and config.model_type == "phi3" else None


def _forward(
    module: Any,
    original: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    limit: int,
    dynamic: bool,
    states: torch.Tensor,
    position_ids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines `[rows, columns, dimensions]`: the original's, for each group of rows of the same kind."""
    ends = position_ids.amax(dim=1) + 1
    groups = ends.clamp(min=limit) if dynamic else ends > limit
    kinds = groups.unique().tolist()
    if len(kinds) == 1:
        return _of_group(module, original, dynamic, states, position_ids)
    rows = [(groups == kind).nonzero()[:, 0] for kind in kinds]
    parts = [_of_group(module, original, dynamic, states, position_ids[chosen]) for chosen in rows]
    order = torch.cat(rows).argsort()
    cosines, sines = (torch.cat(tables)[order] for tables in zip(*parts, strict=True))
    return cosines, sines


def _of_group(
    module: Any,
    original: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    dynamic: bool,
    states: torch.Tensor,
    position_ids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    if dynamic:  # it remembers the longest sequence that it saw, and scales shorter ones by that
        module.max_seq_len_cached = module.original_max_seq_len
        module.inv_freq = module.original_inv_freq
    return original(states, position_ids)
