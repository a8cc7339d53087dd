"""How much each linear would cost the model in each format, predicted with one decoder layer in memory.

What counts is how far the predictions move: the KL divergence between the distributions of the unquantised and the
quantised model. To second order, logits changed by dz cost dz^T F dz / 2 with F the Fisher information of the softmax,
which is E[g g^T] for g the gradient of -ln p(t) and t drawn from the model's own distribution p. So with g taken back to
the outputs y of a linear, a change dy there costs E[(g . dy)^2] / 2. (What changes at two tokens of a window have in
common is left out: it is small, and the sum over tokens has less noise.)

One pass backwards through some held-out text gives g for all linears, whatever the formats. dy is not estimated: the
quantised linear runs on the same inputs. An output error alone does not say what it does to the model: the same error
matters a thousand times more in one linear than in another.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trtkit.convert.cast import Array
from trtkit.convert.dequantize import dequantize, input_rounding
from trtkit.convert.hidden import HiddenStates
from trtkit.convert.layerwise import LayerwiseModel, batches
from trtkit.convert.linears import Linear, linears
from trtkit.convert.plan import CHECKPOINT_DTYPES
from trtkit.convert.quantization import Format
from trtkit.convert.simulate import round_inputs
from trtkit.convert.whole import SourceReader, gather, scatter
from trtkit.errors import InputError
from trtkit.hf import Source
from trtkit.quantize.fit import Effort, needs_gram, quantize_linears
from trtkit.quantize.pipeline import BATCH_TOKENS, TOGETHER, compute_dtype
from trtkit.quantize.statistics import InputStatistics
from trtkit.safetensors_io import DTYPES

ALONE = Effort(correct=False)
"""How candidates are fitted: a linear does not know yet what becomes of those before it."""
_TORCH = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Block:
    """Linears of a layer that must have the same format: kernels fuse `mlp.fc` and `mlp.gate`
    (tensorrt_llm/models/modeling_utils.py, fuse_gate_mlp)."""

    linears: tuple[Linear, ...]

    @property
    def name(self) -> str:
        """`transformer.layers.3.mlp.fc+gate`"""
        return self.linears[0].name + "".join(f"+{linear.name.rpartition('.')[2]}" for linear in self.linears[1:])

    @property
    def layer(self) -> int:
        return self.linears[0].layer

    @property
    def weights(self) -> int:
        return sum(linear.rows * linear.columns for linear in self.linears)


@dataclass(frozen=True)
class Damage:
    """What one format would do to one block.

    Attributes:
        kl: predicted mean KL divergence from the unquantised model, in nats per predicted token.
        error: of the block's outputs, relative to their mean square.
    """

    kl: float
    error: float


def blocks(config: Mapping[str, Any]) -> list[Block]:
    """The linears of a model in order of execution, those together that must agree.

    Raises:
        InputError: the model has experts, which TensorRT-LLM runs in one format only.
    """
    found: list[list[Linear]] = []
    for linear in linears(config):
        if linear.experts:
            raise InputError(
                f"{config['architecture']} has experts: TensorRT-LLM has no mixed precision for them",
                "use one --quantization for all",
            )
        last = found[-1][-1] if found else None
        if last and linear.kind in TOGETHER and last.kind in TOGETHER and last.layer == linear.layer:
            found[-1].append(linear)
        else:
            found.append([linear])
    return [Block(tuple(each)) for each in found]


Damages = dict[str, dict[str, Damage]]
"""Name of a block -> name of a format -> what it would do."""


def damages(
    source: Source,
    config: Mapping[str, Any],
    calibration: Array,
    held_out: Array,
    candidates: Mapping[str, Sequence[Format]],
    folder: Path,
    *,
    group_size: int | None = None,
    device: str = "cpu",
    seed: int = 0,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> Damages:
    """What every candidate would do to the model, one block at a time.

    Takes the memory of a layer, the Gram matrices of its inputs, and what goes into and comes out of its linears for
    the held-out text. The source is read three times.

    Args:
        config: config.json of the checkpoint, whatever its quantisation.
        calibration, held_out: token ids, int64 (samples, length) each.
        candidates: name of a block -> formats to try there.
        folder: for hidden states while this runs.
        seed: draws tokens from the model's distributions.
        on_layer: called with layers (done, total) of all passes.

    Raises:
        InputError: an activation is NaN or infinite; names the layer.
    """
    with SourceReader(source, config) as reader:
        run = _Run(
            config, reader, calibration, held_out, candidates, folder, group_size, torch.device(device), on_layer
        )
        with torch.no_grad():
            _forward(run, seed)
            _backward(run)
            return _measure(run)


@dataclass
class _Run:
    """What all passes need."""

    config: Mapping[str, Any]
    reader: SourceReader
    calibration: Array
    held_out: Array
    candidates: Mapping[str, Sequence[Format]]
    folder: Path
    group_size: int | None
    device: torch.device
    on_layer: Callable[[int, int], None]
    done: int = 0

    def __post_init__(self) -> None:
        self.dtype = _TORCH[self.config["dtype"]]
        self.numpy_dtype = DTYPES[CHECKPOINT_DTYPES[self.config["dtype"]]]
        self.layers = int(self.config["num_hidden_layers"])

    def model(self) -> LayerwiseModel:
        """For one more pass: the layers of a model can be loaded once."""
        dtype = compute_dtype(self.dtype, self.device)
        model = LayerwiseModel(self.config, self.reader.tensors, dtype=dtype, device=self.device)
        model.model.requires_grad_(False)
        return model

    def tokens(self, which: str, where: slice) -> torch.Tensor:
        tokens = self.held_out if which != "calibration" else self.calibration
        return torch.from_numpy(np.ascontiguousarray(tokens[where]))

    def parts(self, which: str) -> Iterator[slice]:
        samples, length = (self.held_out if which != "calibration" else self.calibration).shape
        yield from batches(samples, max(1, BATCH_TOKENS // length))

    def states(self, which: str, layer: int) -> HiddenStates:
        """Of `calibration` or `held-out` what goes into a layer; of `gradient` the loss's by that."""
        samples, length = (self.held_out if which != "calibration" else self.calibration).shape
        shape = (samples, length, self.config["hidden_size"])
        return HiddenStates(self.folder / f"{which}-{layer}", shape, compute_dtype(self.dtype, self.device))

    def embed(self, model: LayerwiseModel, which: str, *, write: bool = True) -> None:
        for where in self.parts(which) if write else ():
            self.states(which, 0).write(where, model.embed(self.tokens(which, where)))
        if write:
            self.states(which, 0).finish()
        model.embed(self.tokens(which, slice(0, 1)))  # what the model tells its layers then fits every batch

    def tell(self) -> None:
        self.on_layer(self.done, 3 * self.layers)
        self.done += 1


def _forward(run: _Run, seed: int) -> None:
    """Runs the held-out text through the model and keeps what goes into every layer, and the gradient by the last's
    output."""
    model = run.model()
    run.embed(model, "held-out")
    for layer in range(run.layers):
        run.tell()
        model.load(layer)
        after = run.states("held-out", layer + 1)
        for where in run.parts("held-out"):
            after.write(where, model.run(layer, run.states("held-out", layer).read(where, run.device)))
        after.finish()
        model.unload(layer)
    model.start_logits()
    generator = torch.Generator(run.device).manual_seed(seed)
    gradients = run.states("gradient", run.layers)
    for window in range(len(run.held_out)):  # one at a time: logits are large
        where = slice(window, window + 1)
        hidden = run.states("held-out", run.layers).read(where, run.device)
        with torch.enable_grad():
            hidden.requires_grad_()
            log = model.logits(hidden)[0, :-1].log_softmax(-1)
            if not bool(torch.isfinite(log.detach().amax(-1)).all()):
                raise InputError("the model's logits for the held-out text are NaN or infinite", "check the source")
            drawn = torch.multinomial(log.detach().exp(), 1, generator=generator)
            (gradient,) = torch.autograd.grad(-log.gather(1, drawn).sum(), hidden)
        gradients.write(where, gradient)
    gradients.finish()
    run.states("held-out", run.layers).remove()


def _backward(run: _Run) -> None:
    """Takes the gradient back to the output of every layer."""
    model = run.model()
    run.embed(model, "held-out", write=False)
    for layer in range(run.layers - 1, 0, -1):
        run.tell()
        model.load(layer)
        before = run.states("gradient", layer)
        for where in run.parts("held-out"):
            hidden = run.states("held-out", layer).read(where, run.device)
            with torch.enable_grad():
                output = model.run(layer, hidden.requires_grad_())
            behind = run.states("gradient", layer + 1).read(where, run.device)
            before.write(where, torch.autograd.grad(output, hidden, behind)[0])
        before.finish()
        model.unload(layer)
    run.tell()


@dataclass
class _Seen:
    """What went into and came out of a module, and the loss's gradient by the latter, batch by batch."""

    inputs: list[torch.Tensor] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)
    gradients: list[torch.Tensor] = field(default_factory=list)


def _measure(run: _Run) -> Damages:
    """Fits the candidates of one layer after the other to the calibration text, and tries them on the held-out one."""
    model = run.model()
    run.embed(model, "calibration")
    found: Damages = {}
    for layer in range(run.layers):
        run.tell()
        model.load(layer)
        modules = model.linears(layer)
        own = [block for block in blocks(run.config) if block.layer == layer and run.candidates.get(block.name)]
        run.embed(model, "calibration", write=False)
        statistics = _calibrate(run, model, layer, own)
        run.embed(model, "held-out", write=False)
        seen = _look(run, model, layer, {name: modules[name] for block in own for name in _sources(run, block)})
        for block in own:
            found[block.name] = {
                form.name: _try(run, block, form, statistics, modules, seen) for form in run.candidates[block.name]
            }
        model.unload(layer)
        for which in ("calibration", "held-out"):
            run.states(which, layer).remove()
        run.states("gradient", layer + 1).remove()
    run.states("calibration", run.layers).remove()
    run.on_layer(3 * run.layers, 3 * run.layers)
    return found


def _sources(run: _Run, block: Block) -> list[str]:
    """The source tensors that a block is made of."""
    pieces = [piece for linear in block.linears for piece in run.reader.whole[f"{linear.name}.weight"].pieces]
    return list(dict.fromkeys(piece.source for piece in pieces))


def _calibrate(run: _Run, model: LayerwiseModel, layer: int, own: Sequence[Block]) -> dict[str, InputStatistics]:
    """Statistics of the inputs of a layer's blocks, by block. Also runs the calibration text through the layer."""
    modules = model.linears(layer)
    firsts = {block.name: modules[_sources(run, block)[0]] for block in own}
    found: dict[str, InputStatistics] = {}
    after = run.states("calibration", layer + 1)
    for where in run.parts("calibration"):
        with _Hooks(firsts) as noted:
            output = model.run(layer, run.states("calibration", layer).read(where, run.device))
        if not torch.isfinite(output).all():
            raise InputError(
                f"layer {layer}: calibration gives NaN or infinite activations", "check the source, or use bfloat16"
            )
        after.write(where, output)
        for block in own:
            values = noted.inputs[block.name]
            if block.name not in found:
                gram = any(needs_gram(form) for form in run.candidates[block.name])
                found[block.name] = InputStatistics(values.shape[-1], gram=gram, device=run.device)
            found[block.name].add(values)
    after.finish()
    return found


def _look(run: _Run, model: LayerwiseModel, layer: int, modules: Mapping[str, torch.nn.Module]) -> dict[str, _Seen]:
    """What the held-out text does in a layer's modules, and which way each output moves the predictions."""
    found = {name: _Seen() for name in modules}
    for where in run.parts("held-out"):
        hidden = run.states("held-out", layer).read(where, run.device)
        behind = run.states("gradient", layer + 1).read(where, run.device)
        with torch.enable_grad(), _Hooks(modules) as noted:
            output = model.run(layer, hidden.requires_grad_())
        outputs = [noted.outputs[name] for name in modules]
        for name, gradient in zip(modules, torch.autograd.grad(output, outputs, behind), strict=True):
            seen = found[name]
            seen.inputs.append(noted.inputs[name].detach())
            seen.outputs.append(noted.outputs[name].detach())
            seen.gradients.append(gradient)
    return found


def _try(
    run: _Run,
    block: Block,
    form: Format,
    statistics: Mapping[str, InputStatistics],
    modules: Mapping[str, torch.nn.Module],
    seen: Mapping[str, _Seen],
) -> Damage:
    """Quantises a block and runs it on the held-out inputs."""
    quantized = _quantized(run, block, form, statistics[block.name], modules)
    some = next(iter(quantized))
    squares, change, scale = 0.0, 0.0, 0.0
    for part in range(len(seen[some].inputs)):
        moved: torch.Tensor | float = 0.0
        for name, module in quantized.items():
            exact, gradient = seen[name].outputs[part].float(), seen[name].gradients[part].float()
            delta = module(seen[name].inputs[part]).float() - exact
            moved = moved + (gradient * delta).sum(-1)
            change += float(delta.square().sum(dtype=torch.float64))
            scale += float(exact.square().sum(dtype=torch.float64))
        squares += float(torch.as_tensor(moved).square().sum(dtype=torch.float64))
    samples, length = run.held_out.shape
    return Damage(squares / 2 / (samples * (length - 1)), change / max(scale, 1e-30))


def _quantized(
    run: _Run, block: Block, form: Format, statistics: InputStatistics, modules: Mapping[str, torch.nn.Module]
) -> dict[str, torch.nn.Module]:
    """Copies of a block's modules that compute as the format would."""
    found: dict[str, torch.nn.Module] = {}
    for linear, tensors in _fit(run, block, form, statistics):
        whole = run.reader.whole[f"{linear.name}.weight"]
        effective = dequantize(form, tensors, run.numpy_dtype)
        rounding = input_rounding(form, tensors)
        for name, values in scatter(whole, effective, run.reader.shapes):
            if name not in found:
                found[name] = _copy(modules[name])
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
    run: _Run, block: Block, form: Format, statistics: InputStatistics
) -> Iterator[tuple[Linear, dict[str, Array]]]:
    """The tensors of each linear of a block, as `trtkit.quantize.pipeline` would make them."""
    weights = [gather(run.reader.whole[f"{linear.name}.weight"], run.reader.read) for linear in block.linears]
    if form.weight_only:
        for linear, weight in zip(block.linears, weights, strict=True):
            yield linear, {"weight": weight.astype(run.numpy_dtype)}
        return
    joint = [range(len(weights))] if form.name != "int8_sq" else [range(i, i + 1) for i in range(len(weights))]
    for places in joint:
        own = [block.linears[place] for place in places]
        given = [torch.from_numpy(weights[place]).to(run.device) for place in places]
        made = quantize_linears(form, run.group_size, own, given, statistics, run.dtype, ALONE)
        yield from zip(own, made, strict=True)


def _copy(module: torch.nn.Module) -> Any:
    """A module with a weight and hooks of its own."""
    made = copy.copy(module)
    made._parameters = dict(module._parameters)
    made._parameters["weight"] = torch.nn.Parameter(module.weight.detach().clone(), requires_grad=False)
    made._forward_pre_hooks, made._forward_hooks = OrderedDict(), OrderedDict()
    return made


class _Hooks:
    """The inputs and outputs of modules during a call, by name."""

    def __init__(self, modules: Mapping[str, torch.nn.Module]) -> None:
        self.inputs: dict[str, torch.Tensor] = {}
        self.outputs: dict[str, torch.Tensor] = {}
        self._modules = modules
        self._handles: list[Any] = []

    def __enter__(self) -> _Hooks:
        for name, module in self._modules.items():

            def note(module: torch.nn.Module, args: tuple[Any, ...], output: Any, name: str = name) -> torch.Tensor:
                self.inputs[name], self.outputs[name] = args[0], output
                return output.clone()  # what follows may write into it

            self._handles.append(module.register_forward_hook(note))
        return self

    def __exit__(self, *details: object) -> None:
        for handle in self._handles:
            handle.remove()
