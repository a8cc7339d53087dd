"""How much each linear would cost the model in each format, predicted with one decoder layer in memory.

What counts is how far the predictions move: the KL divergence between the distributions of the unquantised and the
quantised model. To second order, logits changed by dz cost dz^T F dz / 2 with F the Fisher information of the softmax,
which is E[g g^T] for g the gradient of -ln p(t) and t drawn from the model's own distribution p. So with g taken back
to the outputs y of a linear, a change dy there costs E[(g . dy)^2] / 2. (What changes at two tokens of a window have in
common is left out: it is small, and the sum over tokens has less noise.)

One pass backwards through some held-out text gives g for all linears, whatever the formats. dy is not estimated: the
quantised linear runs on the same inputs. The size of dy alone would say how exact a linear is, not what that is worth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trtkit.convert.cast import Array
from trtkit.convert.hidden import HiddenStates
from trtkit.convert.layerwise import LayerwiseModel, batches
from trtkit.convert.linears import Linear, linears
from trtkit.convert.quantization import Format
from trtkit.convert.whole import SourceReader
from trtkit.errors import InputError
from trtkit.hf import Source
from trtkit.quantize.fit import needs_gram
from trtkit.quantize.pipeline import BATCH_TOKENS, TOGETHER, compute_dtype
from trtkit.quantize.statistics import InputStatistics
from trtkit.quantize.trial import TORCH_DTYPES, Noted, Seen, changes, quantized_copies, sources


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
        calibration, held_out: token ids, int64 (samples, length) each; the longer samples are cut to the length of the
            shorter.
        candidates: name of a block -> formats to try there.
        folder: for hidden states while this runs.
        seed: draws tokens from the model's distributions.
        on_layer: called with layers (done, total) of all passes.

    Raises:
        InputError: an activation is NaN or infinite; names the layer.
    """
    length = min(calibration.shape[1], held_out.shape[1])
    texts = {"calibration": calibration[:, :length], "held-out": held_out[:, :length]}
    texts["gradient"] = texts["held-out"]
    with SourceReader(source, config) as reader:
        run = _Run(config, reader, texts, candidates, folder, group_size, torch.device(device), on_layer)
        with torch.no_grad():
            _forward(run, seed)
            _backward(run)
            return _measure(run)


@dataclass
class _Run:
    """What all passes need."""

    config: Mapping[str, Any]
    reader: SourceReader
    texts: Mapping[str, Array]
    candidates: Mapping[str, Sequence[Format]]
    folder: Path
    group_size: int | None
    device: torch.device
    on_layer: Callable[[int, int], None]
    done: int = 0

    def __post_init__(self) -> None:
        self.dtype = compute_dtype(TORCH_DTYPES[self.config["dtype"]], self.device)
        self.layers = int(self.config["num_hidden_layers"])

    def model(self) -> LayerwiseModel:
        """For one more pass: the layers of a model can be loaded once."""
        model = LayerwiseModel(self.config, self.reader.tensors, dtype=self.dtype, device=self.device)
        model.model.requires_grad_(False)
        return model

    def parts(self, which: str) -> Iterator[slice]:
        """Batches of one size for all texts, since some models tell their layers how large a batch is."""
        samples, length = self.texts[which].shape
        common = math.gcd(*(len(text) for text in self.texts.values()))
        fitting = [size for size in range(1, common + 1) if common % size == 0 and size * length <= BATCH_TOKENS]
        yield from batches(samples, max(fitting, default=1))

    def states(self, which: str, layer: int) -> HiddenStates:
        """Of a text what goes into a layer; of `gradient` the loss's by what goes in of the held-out text."""
        shape = (*self.texts[which].shape, self.config["hidden_size"])
        return HiddenStates(self.folder / f"{which}-{layer}", shape, self.dtype)

    def embed(self, model: LayerwiseModel, which: str, *, write: bool = True) -> None:
        """What goes into the first layer; always lets the model note what it tells its layers beside that."""
        states = self.states(which, 0)
        for where in self.parts(which):
            hidden = model.embed(self._tokens(which, where))
            if not write:
                return
            states.write(where, hidden)
        states.finish()

    def _tokens(self, which: str, where: slice) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.texts[which][where]))

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
    generator = torch.Generator(run.device).manual_seed(seed)
    gradients = run.states("gradient", run.layers)
    for window in range(len(run.texts["held-out"])):  # one at a time: logits are large
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
        statistics = _calibrate(run, model, layer, own)
        names = [name for block in own for name in sources(run.reader, block.linears)]
        seen = _look(run, model, layer, {name: modules[name] for name in names})
        for block in own:
            found[block.name] = {
                form.name: _try(run, block, form, statistics[block.name], modules, seen)
                for form in run.candidates[block.name]
            }
        model.unload(layer)
        for which in ("calibration", "held-out"):
            run.states(which, layer).remove()
        run.states("gradient", layer + 1).remove()
    run.states("calibration", run.layers).remove()
    run.on_layer(3 * run.layers, 3 * run.layers)
    return found


def _calibrate(run: _Run, model: LayerwiseModel, layer: int, own: Sequence[Block]) -> dict[str, InputStatistics]:
    """Statistics of the inputs of a layer's blocks, by block. Also runs the calibration text through the layer."""
    modules = model.linears(layer)
    firsts = {block.name: modules[sources(run.reader, block.linears)[0]] for block in own}
    found: dict[str, InputStatistics] = {}
    after = run.states("calibration", layer + 1)
    for where in run.parts("calibration"):
        with Noted(firsts) as noted:
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


def _look(run: _Run, model: LayerwiseModel, layer: int, modules: Mapping[str, torch.nn.Module]) -> dict[str, Seen]:
    """What the held-out text does in a layer's modules, and which way each output moves the predictions."""
    found = {name: Seen() for name in modules}
    for where in run.parts("held-out"):
        hidden = run.states("held-out", layer).read(where, run.device)
        behind = run.states("gradient", layer + 1).read(where, run.device)
        with torch.enable_grad(), Noted(modules) as noted:
            output = model.run(layer, hidden.requires_grad_())
        outputs = [noted.outputs[name] for name in modules]
        for name, gradient in zip(modules, torch.autograd.grad(output, outputs, behind), strict=True):
            found[name].add(modules[name], noted.inputs[name], gradient)
    return found


def _try(
    run: _Run,
    block: Block,
    form: Format,
    statistics: InputStatistics,
    modules: Mapping[str, torch.nn.Module],
    seen: Mapping[str, Seen],
) -> Damage:
    """Quantises a block and runs it on the held-out inputs."""
    quantized = quantized_copies(
        block.linears, form, run.group_size, statistics, run.reader, modules, run.config["dtype"]
    )
    squares, error = changes(quantized, seen)
    samples, length = run.texts["held-out"].shape
    return Damage(squares / 2 / (samples * (length - 1)), error)
