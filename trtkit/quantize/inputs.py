"""What goes into the linears of a decoder layer while it runs, those of its experts included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from trtkit.convert.experts import experts_of, leave_experts, visit_experts


class Inputs:
    """The inputs of linears during a call, by name.

    Args:
        modules: linears by name.
        experts: `fc` and `proj` -> name of the linear of all experts; empty where a layer has none.
        layer: the module with the experts.
    """

    def __init__(self, modules: Mapping[str, Any], experts: Mapping[str, str], layer: Any) -> None:
        self.found: dict[str, torch.Tensor] = {}
        self._modules, self._experts, self._layer = modules, experts, layer
        self._handles: list[Any] = []
        self._routed: dict[str, list[torch.Tensor]] = {name: [] for name in experts.values()}

    def __enter__(self) -> Inputs:
        for name, module in self._modules.items():

            def note(module: Any, args: tuple[Any, ...], name: str = name) -> None:
                self.found[name] = args[0]

            self._handles.append(module.register_forward_pre_hook(note))
        if self._experts:
            visit_experts(experts_of(self._layer), self._visit)
        return self

    def _visit(self, kind: str, values: torch.Tensor) -> torch.Tensor:
        if kind in self._experts:
            self._routed[self._experts[kind]].append(values)
        return values

    def __exit__(self, *details: object) -> None:
        self.found |= {name: torch.cat(parts) for name, parts in self._routed.items() if parts}
        for handle in self._handles:
            handle.remove()
        if self._experts:
            leave_experts(experts_of(self._layer))
