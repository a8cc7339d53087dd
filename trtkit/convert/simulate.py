"""Makes a transformers model round what an engine would round: inputs of linears, and keys and values in the cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from trtkit.convert.dequantize import InputRounding
from trtkit.convert.experts import visit_experts
from trtkit.convert.number_formats import FLOAT8_MAX


def round_inputs(linear: torch.nn.Module, rounding: InputRounding) -> None:
    """From now on the module sees its inputs as the quantised kernel would, in their own dtype."""

    def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_rounded(args[0], rounding), *args[1:])

    linear.register_forward_pre_hook(hook)


def round_expert_inputs(experts: Any, first: InputRounding, second: InputRounding) -> None:
    """The same for a module with experts: the inputs of their first and of their second linears."""
    roundings = {"fc": first, "proj": second}
    visit_experts(experts, lambda kind, values: _rounded(values, roundings[kind]))


def _rounded(inputs: torch.Tensor, rounding: InputRounding) -> torch.Tensor:
    values = inputs.float()
    if rounding.prequant is None:
        return _round(values, rounding.kind, rounding.scale).to(inputs.dtype)
    factors = torch.from_numpy(rounding.prequant.copy()).to(values.device)
    return (_round(values * factors, rounding.kind, rounding.scale) / factors).to(inputs.dtype)


def _round(values: torch.Tensor, kind: str, scale: float | None) -> torch.Tensor:
    largest = 127.0 if kind == "int8" else FLOAT8_MAX
    step: torch.Tensor | float
    if scale is None:  # of each token
        step = values.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / largest
    else:
        step = scale
    if kind == "int8":
        return (values / step).round().clamp(-128, 127) * step
    return (values / step).clamp(-largest, largest).to(torch.float8_e4m3fn).float() * step


class CacheStatistics:
    """Stands where transformers expects a cache, keeps nothing, and notes the largest key or value."""

    def __init__(self) -> None:
        self.largest = 0.0

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.largest = max(self.largest, float(keys.abs().max()), float(values.abs().max()))
        return keys, values

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return 0

    def scale(self, kind: str) -> float:
        """real = quantised * scale. Of float8 never below 1, as Model-Optimizer's exporter has it: e4m3 is as precise
        for small numbers, and runtimes expect it."""
        if kind == "fp8":
            return max(1.0, self.largest / FLOAT8_MAX)
        return self.largest / 127 if self.largest else 1.0


class RoundedCache:
    """Stands where transformers expects a cache, keeps nothing, and rounds the keys and values that attention reads.

    For whole windows at once, where every position attends to positions of the same call only.

    Args:
        scales: layer -> real = quantised * scale.
    """

    def __init__(self, kind: str, scales: Mapping[int, float]) -> None:
        self.kind = kind
        self.scales = scales

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rounded = [_round(each.float(), self.kind, self.scales[layer]).to(each.dtype) for each in (keys, values)]
        return rounded[0], rounded[1]

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return 0
