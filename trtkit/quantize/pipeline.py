"""Quantises a model one decoder layer at a time: load it, run the calibration text through it, quantise, write, free.

The outcome is a folder with one safetensors file per layer that holds the layer's quantised linears whole, in the form
of a TP 1 checkpoint; `trtkit.convert` then splits them like any other tensors. A run that was killed goes on with the
first layer that has no file.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trtkit.convert.cast import Array
from trtkit.convert.dequantize import dequantize, input_rounding
from trtkit.convert.hidden import HiddenStates
from trtkit.convert.layerwise import LayerwiseModel, batches
from trtkit.convert.linears import SCALED_NORMS, Linear, linears
from trtkit.convert.plan import CHECKPOINT_DTYPES, PlannedTensor, checkpoint_quantization
from trtkit.convert.progress import boot_id
from trtkit.convert.quantization import Format, Quantization
from trtkit.convert.readback import round_linears
from trtkit.convert.simulate import CacheStatistics
from trtkit.convert.whole import SourceReader, gather, scatter
from trtkit.errors import InputError, LacksError
from trtkit.hf import Source
from trtkit.quantize.fit import Effort, needs_gram, quantize_linears
from trtkit.quantize.inputs import Inputs
from trtkit.quantize.layer_files import layer_file, write_layer
from trtkit.quantize.quality import LinearQuality, snr
from trtkit.quantize.statistics import InputStatistics
from trtkit.safetensors_io import DTYPES, Reader, TensorEntry, read_header

BATCH_TOKENS = 1024
"""Tokens that run through a layer at once."""
TOGETHER = ("mlp.fc", "mlp.gate")
"""Linears that share their inputs, and that some kernels and the Hugging Face layout fuse."""
_TORCH = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class LayerJob:
    """One decoder layer at work.

    Attributes:
        linears: those of its linears that get a format.
        forms: their formats, by name.
        statistics: of the inputs, by linear.
        quality, tensors: the outcome.
    """

    layer: int
    linears: Sequence[Linear]
    forms: Mapping[str, Format]
    statistics: dict[str, InputStatistics] = field(default_factory=dict)
    quality: list[LinearQuality] = field(default_factory=list)
    tensors: dict[str, Array] = field(default_factory=dict)


class Quantizer:
    """Quantises the layers of a source into `folder`.

    Args:
        config: config.json of the checkpoint, with its `quantization`.
        tokens: int64 (samples, length), see `trtkit.quantize.calibration`; None for formats that need none.
        folder: for the layers' files and hidden states; what an interrupted run left there is used.
        device: where layers run.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        source: Source,
        tokens: Array | None,
        folder: Path,
        *,
        effort: Effort | None = None,
        device: str = "cpu",
    ) -> None:
        self.config, self.folder = config, folder
        self.effort = effort or Effort()
        self.device = torch.device(device)
        self.quantization: Quantization = checkpoint_quantization(config)
        self._sees = self.quantization.needs_calibration
        if tokens is None and self._sees:
            raise ValueError("the format needs calibration tokens")
        self.tokens = np.zeros((0, 0), np.int64) if tokens is None else tokens
        self.source = SourceReader(source, config)
        self.whole, self.shapes = self.source.whole, self.source.shapes
        self.dtype = _TORCH[config["dtype"]]
        self._numpy_dtype = DTYPES[CHECKPOINT_DTYPES[config["dtype"]]]
        self.model = LayerwiseModel(
            config, self.source.tensors, dtype=compute_dtype(self.dtype, self.device), device=device
        )
        self._linears = [
            linear
            for linear in linears(config)
            if (form := self.quantization.format_of(linear.name)) and not form.weight_only
        ]

    def run(self, on_layer: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Makes the files of all layers that have none.

        Raises:
            InputError: an activation is NaN or infinite; names the layer.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._forget_unsure()
        with self.source, torch.inference_mode():
            start = self._start()
            for layer in range(start, self.model.layers):
                on_layer(layer, self.model.layers)
                self._layer(layer)
            on_layer(self.model.layers, self.model.layers)
        for leftover in (*self.folder.glob("exact-*"), *self.folder.glob("rounded-*")):
            leftover.unlink()

    def _forget_unsure(self) -> None:
        """Removes hidden states of before a restart of the machine: they are never waited for to be on the disk."""
        note = self.folder / "boot"
        if not note.is_file() or note.read_text(encoding="ascii") != boot_id():
            for states in (*self.folder.glob("exact-*"), *self.folder.glob("rounded-*")):
                states.unlink()
            note.write_text(boot_id(), encoding="ascii")

    def _start(self) -> int:
        """The first layer to work at, with the hidden states that go into it on disk."""
        done = 0
        while done < self.model.layers and layer_file(self.folder, done).is_file():
            done += 1
        if done == self.model.layers or not self._sees:
            return done
        for layer in range(done, 0, -1):
            if self._states("exact", layer).complete and self._states("rounded", layer).complete:
                self._embed(write=False)
                return layer
        self._embed(write=True)
        return 0

    def _states(self, stream: str, layer: int) -> HiddenStates:
        samples, length = self.tokens.shape
        if stream == "rounded" and (layer == 0 or not self._corrects):
            stream = "exact"  # the same
        path = self.folder / f"{stream}-{layer}"
        return HiddenStates(path, (samples, length, self.config["hidden_size"]), self.model.dtype)

    @property
    def _corrects(self) -> bool:
        """Whether later layers see what the quantised earlier ones give them."""
        forms = [self.quantization.format_of(linear.name) for linear in self._linears]
        return self.effort.correct and any(form is not None and form.bits == 4 for form in forms)

    def _batches(self) -> Iterator[slice]:
        samples, length = self.tokens.shape
        yield from batches(samples, max(1, BATCH_TOKENS // length))

    def _embed(self, *, write: bool) -> None:
        """Makes what goes into the first layer, or only lets the model tell how it calls its layers."""
        states = self._states("exact", 0)
        parts = list(self._batches())
        for where in parts if write else (parts[0], parts[-1]):  # the last one may be smaller
            hidden = self.model.embed(torch.from_numpy(np.ascontiguousarray(self.tokens[where])))
            if write:
                states.write(where, hidden)
        if write:
            states.finish()
        self.model.release()
        _trim()

    def _layer(self, layer: int) -> None:
        own = [linear for linear in self._linears if linear.layer == layer]
        forms = {linear.name: form for linear in own if (form := self.quantization.format_of(linear.name))}
        job = LayerJob(layer, own, forms)
        file = layer_file(self.folder, layer)
        cache = CacheStatistics()
        last = layer == self.model.layers - 1
        finished = file.is_file()
        if self._sees:
            module = self.model.load(layer)
            self._collect(job, cache, keep=not finished, last=last)
        goes_on = self._corrects and not last
        if goes_on:
            module.to("cpu")  # where arrays can be put into it
        else:
            self.model.unload(layer)
        if finished:
            roundings = self._restore(job, read_header(file)) if goes_on else {}
        else:
            roundings = self._quantize(job, cache, goes_on=goes_on)
            self._save(job)
        if goes_on:
            module.to(self.device)
            round_linears(module, self.model.architecture, roundings, f"{self.model.path}.{layer}.")
            self._propagate(layer)
        self.model.unload(layer)
        for stream in ("exact", "rounded"):
            self._states(stream, layer).remove()

    def _collect(self, job: LayerJob, cache: CacheStatistics, *, keep: bool, last: bool) -> None:
        """Runs both streams through the unquantised layer, counts inputs, and writes the exact stream's outcome."""
        modules = self.model.linears(job.layer)
        hooked = {
            linear.name: modules[self.whole[f"{linear.name}.weight"].pieces[0].source]
            for linear in job.linears
            if keep and not linear.experts
        }
        experts = {linear.kind.rpartition(".")[2]: linear.name for linear in job.linears if keep and linear.experts}
        exact, rounded, after = (
            self._states("exact", job.layer), self._states("rounded", job.layer), self._states("exact", job.layer + 1)
        )  # fmt: skip
        apart = self._corrects and job.layer > 0
        changes = {"past_key_values": cache, "layer_past": cache} if keep and self.quantization.kv_cache else {}
        for where in self._batches():
            with Inputs(hooked, experts, self.model.module(job.layer)) as seen:
                hidden = exact.read(where, self.device)
                output = self.model.run(job.layer, hidden, **({} if apart else changes))
            if not torch.isfinite(output).all():
                raise _not_finite(job.layer)
            if not last:
                after.write(where, output)
            if apart:
                with Inputs(hooked, experts, self.model.module(job.layer)) as now:
                    self.model.run(job.layer, rounded.read(where, self.device), **changes)
                self._count(job, now.found, seen.found)
            else:
                self._count(job, seen.found, None)
        if not last:
            after.finish()

    def _count(
        self, job: LayerJob, inputs: Mapping[str, torch.Tensor], exact: Mapping[str, torch.Tensor] | None
    ) -> None:
        shared: dict[int, InputStatistics] = {}
        for linear in job.linears:
            if linear.name not in inputs:
                continue
            values = inputs[linear.name]
            known = job.statistics.get(linear.name)
            if id(values) in shared:  # the same tensor goes into several linears: counted once
                job.statistics[linear.name] = shared[id(values)]
                continue
            if known is None:
                gram = any(needs_gram(form) for form in job.forms.values())
                known = InputStatistics(values.shape[-1], gram=gram, device=self.device)
                job.statistics[linear.name] = known
            shared[id(values)] = known
            # Which tokens an expert gets can differ between the streams, so there is nothing to correct by.
            known.add(values, None if exact is None or linear.experts else exact[linear.name])

    def _quantize(self, job: LayerJob, cache: CacheStatistics, *, goes_on: bool) -> dict[str, Any]:
        """Fits the linears of a layer and, if the next one shall see it, puts what came out into the module; how their
        inputs are rounded."""
        places = self.model.places(job.layer) if goes_on else {}
        roundings: dict[str, Any] = {}
        for group in _groups(job.linears, job.forms):
            roundings |= self._fit(job, group, places)
            _trim()
        if self.quantization.kv_cache:
            if not cache.largest:
                raise LacksError(
                    f"transformers' {type(self.model.model).__name__} shows no keys and values of layer {job.layer}",
                    "leave out --kv-cache, or use another version of transformers",
                )
            scale = cache.scale(self.quantization.kv_cache)
            name = f"transformer.layers.{job.layer}.attention.kv_cache_scaling_factor"
            job.tensors[name] = np.array([scale], np.float32)
        return roundings

    def _fit(self, job: LayerJob, group: Sequence[Linear], places: Mapping[str, Array]) -> dict[str, Any]:
        """Fits linears that share their inputs; how these are rounded."""
        form = job.forms[group[0].name]
        wholes = [self.whole[f"{linear.name}.weight"] for linear in group]
        weights = [gather(whole, self.source.read) for whole in wholes]
        # Each has its matrices until its linears are done, since they are the largest things in memory.
        statistics = [job.statistics.pop(linear.name, None) for linear in group][0]  # noqa: RUF015 - all of them
        if statistics is not None and not statistics.finite:
            raise _not_finite(job.layer)
        made = quantize_linears(
            form,
            self.quantization.group_size,
            group,
            [torch.from_numpy(weight).to(self.device) for weight in weights],
            statistics,
            self.dtype,
            self.effort,
        )
        roundings: dict[str, Any] = {}
        for linear, whole, weight, tensors in zip(group, wholes, weights, made, strict=True):
            rounding, effective = self._put(job, linear, whole, form, tensors, places)
            roundings |= rounding
            job.quality.append(LinearQuality(linear.name, form.name, snr(form, effective, weight, statistics)))
        return roundings

    def _put(
        self, job: LayerJob, linear: Linear, whole: PlannedTensor, form: Format, tensors: dict[str, Array],
        places: Mapping[str, Array],
    ) -> tuple[dict[str, Any], Array]:  # fmt: skip
        """Notes a linear's tensors and puts the weight that they stand for into the module; how its inputs are rounded,
        and that weight."""
        smoothing = tensors.pop("_norm", None)
        if smoothing is not None:
            self._scale_norms(job, linear, smoothing[0])
        for suffix, values in tensors.items():
            job.tensors[f"{linear.name}.{suffix}"] = values
        effective = dequantize(form, tensors, self._numpy_dtype)
        if smoothing is not None:
            effective = effective / smoothing  # the module still has the unscaled norm
        for name, values in scatter(whole, effective, self.shapes) if places else ():
            _fill_part(places[name], values, whole, name)
        rounding = input_rounding(form, tensors)
        return {} if rounding is None else {piece.source: rounding for piece in whole.pieces}, effective

    def _scale_norms(self, job: LayerJob, linear: Linear, factors: Array) -> None:
        for norm, owner in SCALED_NORMS.items():
            if linear.kind != owner:
                continue
            for part in ("weight", "bias"):
                name = f"transformer.layers.{job.layer}.{norm}.{part}"
                if name in self.whole:
                    job.tensors[name] = gather(self.whole[name], self.source.read) / factors
            job.tensors[f"transformer.layers.{job.layer}.{norm}.scale_to_int"] = np.ones(1, np.float32)

    def _restore(self, job: LayerJob, entries: Mapping[str, TensorEntry]) -> dict[str, Any]:
        """Puts a finished layer's weights into the module."""
        places = self.model.places(job.layer)
        roundings: dict[str, Any] = {}
        for linear in job.linears:
            own = f"{linear.name}."
            with Reader() as reader:
                tensors = {
                    name.removeprefix(own): reader.tensor(entry)
                    for name, entry in entries.items()
                    if name.startswith(own)
                }
            whole, form = self.whole[f"{own}weight"], job.forms[linear.name]
            roundings |= self._put(job, linear, whole, form, tensors, places)[0]
        return roundings

    def _propagate(self, layer: int) -> None:
        before, after = self._states("rounded", layer), self._states("rounded", layer + 1)
        for where in self._batches():
            after.write(where, self.model.run(layer, before.read(where, self.device)))
        after.finish()

    def _save(self, job: LayerJob) -> None:
        arrays = {}
        for name, values in job.tensors.items():
            in_model_dtype = name.endswith((".prequant_scaling_factor", ".scale_to_int", "norm.weight", "norm.bias"))
            arrays[name] = values.astype(self._numpy_dtype) if in_model_dtype else values
        write_layer(self.folder, job.layer, arrays, [asdict(each) for each in job.quality])


def _not_finite(layer: int) -> InputError:
    return InputError(
        f"layer {layer}: calibration gives NaN or infinite activations",
        "check the source (`trtkit convert` without quantisation lists NaN), or use --dtype bfloat16",
    )


def _trim() -> None:
    """Gives freed memory back to the system, which glibc keeps where it lies between what is still in use."""
    with contextlib.suppress(AttributeError):  # other C libraries
        ctypes.CDLL(None).malloc_trim(0)


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What layers run in: float32 on a CPU, where bfloat16 is faster but its noise costs as much accuracy as a fifth of
    the quantisation; on a GPU the model's dtype."""
    return dtype if device.type == "cuda" else torch.float32


def _groups(found: Sequence[Linear], forms: Mapping[str, Format]) -> Iterator[list[Linear]]:
    """Linears that are quantised together."""
    together = [linear for linear in found if linear.kind in TOGETHER]
    alike = len({forms[linear.name].name for linear in together}) == 1
    share = alike and all(forms[linear.name].name != "int8_sq" for linear in together)
    for linear in found:
        if linear not in together or not share:
            yield [linear]
        elif linear is together[0]:
            yield together


def _fill_part(place: Array, values: Array, whole: PlannedTensor, name: str) -> None:
    """Writes what a linear holds of a source tensor, and leaves the rest of that tensor alone."""
    for piece in whole.pieces:
        if piece.source == name:
            where = tuple(slice(start, stop) for start, stop in piece.box)
            place.reshape(piece.view)[where] = values.reshape(piece.view)[where]
