"""A transformers model of which one decoder layer at a time is in memory, whatever the size of the whole.

Everything in front of the layers (embedding, positions, masks) and behind them (last norm, output projection) is the
model's own code, so a family needs nothing here that transformers does not know.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from trtkit import architectures
from trtkit.convert.cast import Array
from trtkit.convert.readback import parameter_places, unfilled_model
from trtkit.errors import LacksError

Weights = Callable[[int], Iterable[tuple[str, Array]]]
"""Unit (0: before the layers, then one per layer, then one for what follows them) -> tensors under the names of the
family's table."""


_Call = tuple[tuple[Any, ...], dict[str, Any]]


class LayerwiseModel:
    """The model of a checkpoint's config.json, fed with weights layer by layer.

    Args:
        config: config.json of a checkpoint.
        weights: where the weights come from.
        dtype: of parameters and activations.
        device: where layers run.

    Attributes:
        layers: how many decoder layers there are.
        path: name of their list in the model.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: Weights,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        self.architecture = architectures.get(config["architecture"])
        self.model = unfilled_model(dict(config), dtype).eval()
        self.weights = weights
        self.dtype, self.device = dtype, torch.device(device)
        self.layers: int = config["num_hidden_layers"]
        self.path, self._list = _layer_list(self.model, self.layers)
        self._modules = list(self._list)
        self._calls: dict[int, list[_Call]] = {}
        self._returns_tuple = False
        self._held: int | None = None
        with self._without_layers():
            self._shapes = [(parameter, parameter.shape) for parameter in self.model.parameters()]

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the first layer sees: (batch, length, hidden) of token ids (batch, length). Also notes what the model
        tells its layers beside that, for batches of this size: those that `run` gets later must have been seen here,
        and all have one length."""
        self._hold(0)
        recorders = [_Recorder(layer) for layer in self._modules]
        calls = self._record(recorders, tokens.to(self.device))
        self._calls[len(tokens)] = [(args[1:], kwargs) for args, kwargs in calls]
        return calls[0][0][0]

    def load(self, layer: int) -> torch.nn.Module:
        """A decoder layer with its weights, on the device. Free it with `unload`."""
        module = self._modules[layer]
        places = parameter_places(module, self.architecture, f"{self.path}.{layer}.")
        self._fill(places, self.weights(layer + 1))
        return module.to(self.device)

    def module(self, layer: int) -> Any:
        """A decoder layer, loaded or not."""
        return self._modules[layer]

    def unload(self, layer: int) -> None:
        """Gives the memory of a layer back. It cannot be loaded again."""
        for parameter in self._modules[layer].parameters():
            parameter.data = torch.empty(0, dtype=parameter.dtype)

    def run(self, layer: int, hidden: torch.Tensor, **changes: Any) -> torch.Tensor:
        """A loaded layer's output for hidden states (batch, length, hidden), after `embed`.

        Args:
            changes: keyword arguments that the model gives its layers otherwise.
        """
        args, kwargs = self._calls[len(hidden)][layer]
        if changes:
            args, kwargs = _changed(self._modules[layer], args, kwargs, changes)
        output = self._modules[layer](hidden, *args, **kwargs)
        return output if torch.is_tensor(output) else output[0]

    def release(self) -> None:
        """Gives the memory of what is in front of the layers, or behind them, back; it is read again when needed."""
        self._held = None
        with self._without_layers():
            for parameter in self.model.parameters():
                parameter.data = torch.empty(0, dtype=parameter.dtype)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (batch, length, vocabulary), float32, of the last layer's output, after `embed`."""
        self._hold(self.layers + 1)
        self._swap([_Feed(layer, (hidden,) if self._returns_tuple else hidden) for layer in self._modules])
        try:
            tokens = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device)
            return self.model(input_ids=tokens, use_cache=False).logits.float()
        finally:
            self._swap(self._modules)

    def linears(self, layer: int) -> dict[str, torch.nn.Module]:
        """The modules of a layer by the name that their weight has in the family's table."""
        module = self._modules[layer]
        found = {}
        for name, part in module.named_modules():
            places = [place for place, _ in part.named_parameters(recurse=False) if place == "weight"]
            if places and name:
                found[self._table_name(f"{self.path}.{layer}.{name}.weight")] = part
        return found

    def places(self, layer: int) -> dict[str, Array]:
        """The memory of a loaded layer's parameters on the CPU, under the names of the family's table."""
        return parameter_places(self._modules[layer], self.architecture, f"{self.path}.{layer}.")

    def _table_name(self, name: str) -> str:
        for pattern, replacement in self.architecture.renames:
            name = re.sub(pattern, replacement, name)
        return name

    def _record(self, recorders: list[_Recorder], tokens: torch.Tensor) -> list[_Call]:
        """How the model calls its layers. Whether these return hidden states or a tuple with them differs between
        families, and is known by what the next one is then given."""
        self._swap(recorders)
        try:
            for recorder in recorders:
                recorder.returns_tuple = False
            # A tensor where a tuple is taken apart loses an axis each time.
            with contextlib.suppress(IndexError, RuntimeError):
                last = self._base()(input_ids=tokens, use_cache=False)[0]
                calls = [recorder.call for recorder in recorders]
                if all(each.shape == calls[0][0][0].shape for each in (last, *(args[0] for args, _ in calls))):
                    return calls
            self._returns_tuple = True
            for recorder in recorders:
                recorder.returns_tuple = True
            self._base()(input_ids=tokens, use_cache=False)
            return [recorder.call for recorder in recorders]
        finally:
            self._swap(self._modules)

    def _base(self) -> Any:
        return self.model.base_model

    def _hold(self, unit: int) -> None:
        """Has the weights of what is in front of the layers, or behind them, in memory and on the device."""
        if self._held == unit:
            return
        with self._without_layers():
            self.model.to("cpu")
            for parameter, shape in self._shapes:
                parameter.data = torch.empty(shape, dtype=self.dtype)  # pages that nobody writes to cost nothing
            self._fill(parameter_places(self.model, self.architecture), self.weights(unit), missing=True)
            self.model.to(self.device)
        self._held = unit

    @contextlib.contextmanager
    def _without_layers(self) -> Iterator[None]:
        self._swap([])
        try:
            yield
        finally:
            self._swap(self._modules)

    def _fill(
        self, places: Mapping[str, Array], tensors: Iterable[tuple[str, Array]], *, missing: bool = False
    ) -> None:
        lacking = set(places)
        for name, values in tensors:
            if name in places:
                places[name][...] = values
                lacking.discard(name)
        if lacking and not missing:
            raise LacksError(
                f"transformers' {type(self.model).__name__} has '{min(lacking)}', which the weights have not",
                "use another version of transformers",
            )

    def _swap(self, modules: list[Any]) -> None:
        self._list._modules.clear()
        for index, module in enumerate(modules):
            self._list._modules[str(index)] = module


def _changed(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], changes: dict[str, Any]) -> _Call:
    """Arguments behind the hidden states with some of them replaced, however the model gives them."""
    names = list(inspect.signature(module.forward).parameters)[1:]
    given, named = list(args), dict(kwargs)
    for name, value in changes.items():
        if name in named:
            named[name] = value
        elif name in names and names.index(name) < len(given):
            given[names.index(name)] = value
    return tuple(given), named


class _Recorder(torch.nn.Module):  # type: ignore[misc]
    """Stands where a layer would be, notes how it is called and passes the hidden states on."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.__dict__["_layer"] = layer
        self.call: _Call = ((), {})
        self.returns_tuple = False

    def __getattr__(self, name: str) -> Any:  # models ask their layers for things such as `attention_type`
        return getattr(self.__dict__["_layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.call = (args, kwargs)
        return (args[0],) if self.returns_tuple else args[0]


class _Feed(torch.nn.Module):  # type: ignore[misc]
    """Stands where a layer would be and returns what it is given."""

    def __init__(self, layer: torch.nn.Module, output: Any) -> None:
        super().__init__()
        self.__dict__["_layer"] = layer
        self.__dict__["_output"] = output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._output


def _layer_list(model: Any, layers: int) -> tuple[str, torch.nn.ModuleList]:
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == layers:
            return name, module
    raise LacksError(
        f"transformers' {type(model).__name__} has no list of {layers} layers", "use another version of transformers"
    )


def batches(count: int, size: int) -> Iterator[slice]:
    """Slices of up to `size` that together are `count` long."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
