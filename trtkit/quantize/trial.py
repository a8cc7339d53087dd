"""Quantised copies of a layer's modules, to see what a format does to their outputs."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from trtkit.convert.cast import Array
from trtkit.convert.dequantize import dequantize, input_rounding
from trtkit.convert.linears import Linear
from trtkit.convert.plan import CHECKPOINT_DTYPES
from trtkit.convert.quantization import Format
from trtkit.convert.simulate import round_inputs
from trtkit.convert.whole import SourceReader, gather, scatter
from trtkit.quantize.fit import Effort, quantize_linears
from trtkit.quantize.statistics import InputStatistics
from trtkit.safetensors_io import DTYPES

ALONE = Effort(correct=False)
"""How candidates are fitted: a linear does not know yet what becomes of those before it."""
TORCH_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
Modules = Mapping[str, torch.nn.Module]
"""Modules of a layer by the name of their weight in the family's table."""


@dataclass
class Seen:
    """What went into and came out of a module, and the loss's gradient by the latter, batch by batch, float32."""

    inputs: list[torch.Tensor] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)
    gradients: list[torch.Tensor] = field(default_factory=list)

    def add(self, module: torch.nn.Module, inputs: torch.Tensor, gradient: torch.Tensor) -> None:
        """One batch. The output is computed anew: changes are small beside what 16 bits round away."""
        self.inputs.append(inputs.detach().float())
        self.outputs.append(plain_copy(module)(self.inputs[-1]))
        self.gradients.append(gradient.float())


def sources(reader: SourceReader, linears: Sequence[Linear]) -> list[str]:
    """The source tensors that linears are made of."""
    pieces = [piece for linear in linears for piece in reader.whole[f"{linear.name}.weight"].pieces]
    return list(dict.fromkeys(piece.source for piece in pieces))


def changes(quantized: Modules, seen: Mapping[str, Seen]) -> tuple[float, float]:
    """What quantised modules do to a text: the sum over tokens of (gradient . change of all outputs)^2, and the change
    relative to the outputs, both squared."""
    squares, change, scale = 0.0, 0.0, 0.0
    for batch in range(len(seen[next(iter(quantized))].inputs)):
        moved = []
        for name, module in quantized.items():
            exact, gradient = seen[name].outputs[batch], seen[name].gradients[batch]
            delta = module(seen[name].inputs[batch]) - exact
            moved.append((gradient * delta).sum(-1))
            change += float(delta.square().sum(dtype=torch.float64))
            scale += float(exact.square().sum(dtype=torch.float64))
        squares += float(torch.stack(moved).sum(0).square().sum(dtype=torch.float64))
    return squares, change / max(scale, 1e-30)


def quantized_copies(
    linears: Sequence[Linear],
    form: Format,
    group_size: int | None,
    statistics: InputStatistics,
    reader: SourceReader,
    modules: Modules,
    dtype: str,
) -> dict[str, torch.nn.Module]:
    """Copies of the modules of linears that share their inputs, which compute as the format would, in float32.

    Args:
        reader: of the source.
        dtype: of the checkpoint.
    """
    numpy_dtype = DTYPES[CHECKPOINT_DTYPES[dtype]]
    found: dict[str, torch.nn.Module] = {}
    for linear, tensors in _fit(linears, form, group_size, statistics, reader, dtype):
        whole = reader.whole[f"{linear.name}.weight"]
        effective = dequantize(form, tensors, numpy_dtype)
        rounding = input_rounding(form, tensors)
        for name, values in scatter(whole, effective, reader.shapes):
            if name not in found:
                found[name] = plain_copy(modules[name])
                if rounding is not None:
                    round_inputs(found[name], rounding)
            weight = found[name].weight.data
            changed = torch.from_numpy(values).to(weight)
            for piece in whole.pieces:
                if piece.source == name:  # it may hold other linears too
                    where = tuple(slice(start, stop) for start, stop in piece.box)
                    weight.view(piece.view)[where] = changed.view(piece.view)[where]
    return found


def _fit(
    linears: Sequence[Linear],
    form: Format,
    group_size: int | None,
    statistics: InputStatistics,
    reader: SourceReader,
    dtype: str,
) -> Iterator[tuple[Linear, dict[str, Array]]]:
    """The tensors of each linear, as `trtkit.quantize.pipeline` would make them."""
    weights = [gather(reader.whole[f"{linear.name}.weight"], reader.read) for linear in linears]
    if form.weight_only:
        for linear, weight in zip(linears, weights, strict=True):
            yield linear, {"weight": weight.astype(DTYPES[CHECKPOINT_DTYPES[dtype]])}
        return
    joint = [range(len(weights))] if form.name != "int8_sq" else [range(i, i + 1) for i in range(len(weights))]
    for places in joint:
        own = [linears[place] for place in places]
        given = [torch.from_numpy(weights[place]).to(statistics.largest.device) for place in places]
        made = quantize_linears(form, group_size, own, given, statistics, TORCH_DTYPES[dtype], ALONE)
        yield from zip(own, made, strict=True)


def plain_copy(module: torch.nn.Module) -> Any:
    """A module with parameters of its own in float32, and without hooks."""
    made = copy.copy(module)
    made._parameters = {
        name: None if values is None else torch.nn.Parameter(values.detach().to(torch.float32, copy=True), False)
        for name, values in module._parameters.items()
    }
    made._forward_pre_hooks, made._forward_hooks = OrderedDict(), OrderedDict()
    return made


class Noted:
    """The inputs and outputs of modules during a call, by name."""

    def __init__(self, modules: Mapping[str, torch.nn.Module]) -> None:
        self.inputs: dict[str, torch.Tensor] = {}
        self.outputs: dict[str, torch.Tensor] = {}
        self._modules = modules
        self._handles: list[Any] = []

    def __enter__(self) -> Noted:
        for name, module in self._modules.items():

            def note(module: torch.nn.Module, args: tuple[Any, ...], output: Any, name: str = name) -> torch.Tensor:
                self.inputs[name], self.outputs[name] = args[0], output
                return output.clone()  # what follows may write into it

            self._handles.append(module.register_forward_hook(note))
        return self

    def __exit__(self, *details: object) -> None:
        for handle in self._handles:
            handle.remove()
