"""Experts of a transformers model, computed so that what goes into each of them can be seen or changed.

transformers 5 holds all experts of a layer in two parameters, `gate_up_proj` (experts, 2 x intermediate, hidden) and
`down_proj` (experts, hidden, intermediate), and multiplies with them in ways that no hook sees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from trtkit.errors import LacksError

Visit = Callable[[str, torch.Tensor], torch.Tensor]
"""Gets `fc` or `proj` and the inputs (tokens, features) of one expert's first or second linear; returns the inputs that
count."""


def experts_of(layer: torch.nn.Module) -> Any | None:
    """The module of a decoder layer that holds its experts; None where it has none."""
    return next((module for module in layer.modules() if holds_experts(module)), None)


def holds_experts(module: Any) -> bool:
    joined = getattr(module, "gate_up_proj", None)
    return isinstance(joined, torch.nn.Parameter) and joined.ndim == 3


def visit_experts(module: Any, visit: Visit) -> None:
    """From now on the module shows `visit` what goes into its experts."""

    if module is None:
        raise LacksError("this transformers keeps experts as modules of their own", "pip install 'transformers>=5'")

    def forward(hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Hidden states (tokens, hidden), experts and their weights (tokens, experts per token)."""
        result = torch.zeros_like(hidden)
        for expert in chosen.unique().tolist():
            if expert >= len(module.gate_up_proj):
                continue  # padding of some routers
            tokens, places = torch.where(chosen == expert)
            inputs = visit("fc", hidden[tokens])
            gate, up = torch.nn.functional.linear(inputs, module.gate_up_proj[expert]).chunk(2, dim=-1)
            inner = visit("proj", module.act_fn(gate) * up)
            output = torch.nn.functional.linear(inner, module.down_proj[expert])
            result.index_add_(0, tokens, (output * weights[tokens, places, None]).to(result.dtype))
        return result

    module.forward = forward


def leave_experts(module: Any) -> None:
    """Undoes `visit_experts`."""
    module.__dict__.pop("forward", None)
