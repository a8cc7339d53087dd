"""The tensors of a ModelOpt-style Hugging Face checkpoint, from a source's plain ones and those that quantisation made.

Of K inputs and N outputs a module has `weight`: float8 e4m3 (N, K), int8 (N, K), or uint8 (N / 2, K) of two outputs'
int4 each; `weight_scale`: float32, a scalar, (N,) or (N, K / group); where inputs are quantised `input_scale`: float32,
a scalar; in W4A8 `weight_scale_2`: the same; `pre_quant_scale` (K,): in the model's dtype, what inputs are multiplied
with. Keys and values have `k_scale` and `v_scale`: float32, scalars.

Format: see `trtkit.quantize.huggingface_layout`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from trtkit.convert.cast import Array, CastReport, cast
from trtkit.convert.dequantize import built_codes
from trtkit.convert.linears import Linear
from trtkit.convert.number_formats import FLOAT8, pack_int4, unpack_int4
from trtkit.convert.plan import CHECKPOINT_DTYPES, PlannedTensor
from trtkit.convert.source import source_tensors
from trtkit.convert.whole import gather, scatter
from trtkit.errors import InputError
from trtkit.hf import Source
from trtkit.quantize.huggingface_layout import HuggingFaceLayout, Module
from trtkit.safetensors_io import DTYPES, Reader, TensorEntry, TensorSpec, Writer

BLOCK = 2 << 20
"""Elements of a plain tensor that are worked on at once."""
_F32 = np.dtype(np.float32)
_ANEW = "quantise the source anew, as config.json asks for it"


@dataclass(frozen=True)
class Output:
    """Tensors that are made together.

    Attributes:
        make: their values by name; None for one that is copied from `entry`, and maybe cast.
    """

    specs: tuple[TensorSpec, ...]
    make: Callable[[], Mapping[str, Array]] | None = None
    entry: TensorEntry | None = None

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs)


class HuggingFaceTensors:
    """Makes the tensors of a checkpoint. Use as a context manager."""

    def __init__(self, layout: HuggingFaceLayout, source: Source, layers: Mapping[str, TensorEntry]) -> None:
        self.layout, self.layers = layout, layers
        self.dtype = DTYPES[CHECKPOINT_DTYPES[layout.config["dtype"]]]
        self._source = source_tensors(source)
        self._reader = Reader()
        self._kept: OrderedDict[str, dict[str, Array]] = OrderedDict()

    def __enter__(self) -> HuggingFaceTensors:
        return self

    def __exit__(self, *details: Any) -> None:
        self._reader.__exit__(*details)

    def outputs(self) -> Iterator[Output]:
        """Everything that the checkpoint holds, in order of execution."""
        folded = {piece.source for name in self.layout.folded for piece in self.layout.whole[name].pieces}
        seen: set[str] = set()
        for name, tensor in self.layout.whole.items():
            for source in dict.fromkeys(piece.source for piece in tensor.pieces):
                module = self.layout.modules.get(source.removesuffix(".weight"))
                if source in seen:
                    continue
                seen.add(source)
                shape = self.layout.shapes[source]
                if source in folded:
                    yield Output((TensorSpec(source, self.dtype, shape),), partial(self.norm, name))
                elif module is not None and source.endswith(".weight"):
                    yield Output(tuple(_specs(module, self.layout, self.dtype)), partial(self.module, module))
                else:
                    yield Output((TensorSpec(source, self.dtype, shape),), entry=self._source[source])
            if self.layout.quantization.kv_cache and name.endswith(".attention.qkv.weight"):
                yield self._cache_scales(name.removesuffix(".qkv.weight"), tensor)

    def write(self, output: Output, writer: Writer, report: CastReport, *, saturate: bool) -> None:
        """Writes the tensors of one output."""
        if output.make is not None:
            made = output.make()
            for spec in output.specs:
                values = made[spec.name]
                assert (values.dtype, values.shape) == (spec.dtype, spec.shape), spec.name  # noqa: S101
                writer.write(spec.name, 0, values)
            return
        entry, spec = output.entry, output.specs[0]
        assert entry is not None  # noqa: S101 - an output has one or the other
        count = entry.nbytes // entry.dtype.itemsize
        if entry.dtype == spec.dtype:
            writer.copy(spec.name, 0, self._reader, entry, 0, count)
            return
        for start in range(0, count, BLOCK):
            values = self._reader.elements(entry, start, min(BLOCK, count - start))
            writer.write(spec.name, start, cast(values, spec.dtype, entry, report, saturate=saturate))

    def norm(self, name: str) -> dict[str, Array]:
        """A norm's tensor with the factors of the linears behind it: for norms that add one to their weight (Gemma's)
        the sum is what the factors multiply."""
        linears = self.layout.folded[name]
        vectors = [self._linear(linear)["prequant_scaling_factor"].astype(np.float32) for linear in linears]
        if not all(np.array_equal(vectors[0], vector) for vector in vectors):
            raise InputError(
                f"'{linears[0].name}' and '{linears[1].name}' have different factors for the same inputs",
                "quantise both together",
            )
        whole = self.layout.whole[name]
        values = gather(whole, self._read) * vectors[0]
        made = {part: each.astype(self.dtype) for part, each in scatter(whole, values, self.layout.shapes)}
        for part, each in made.items():
            if not np.isfinite(each.astype(np.float32)).all():
                raise InputError(
                    f"'{part}' times the factors of '{linears[0].name}' is beyond {self.dtype.name}",
                    "use --dtype bfloat16",
                )
        return made

    def module(self, module: Module) -> dict[str, Array]:
        """The tensors of a quantised module, by name."""
        made = self._built(module) if module.form.weight_only else self._made(module)
        if module.factors != "none":
            made["pre_quant_scale"] = self._factors(module)
        return {f"{module.name}.{suffix}": values for suffix, values in made.items()}

    def _built(self, module: Module) -> dict[str, Array]:
        """What trtllm-build would make of the plain weight, some rows at a time."""
        entry = self._source[f"{module.name}.weight"]
        outputs, inputs = entry.shape
        codes, scales = np.empty((outputs, inputs), np.int8), np.empty(outputs, np.float32)
        step = max(1, BLOCK // inputs)
        for first in range(0, outputs, step):
            rows = slice(first, min(first + step, outputs))
            count = rows.stop - rows.start
            weight = self._reader.elements(entry, first * inputs, count * inputs).reshape(count, inputs)
            made, steps = built_codes(module.form, weight.astype(self.dtype))
            codes[rows], scales[rows] = made, steps[:, 0]
        return {"weight": _packed(module, codes), "weight_scale": scales}

    def _made(self, module: Module) -> dict[str, Array]:
        outputs = self.layout.shapes[f"{module.name}.weight"][0]
        weight: Array | None = None
        scales = np.empty(0, np.float32)
        for linear in module.linears:
            tensors = self._linear(linear)
            own = _per_row(module, tensors, linear)
            for target, rows in _rows(self.layout.whole[f"{linear.name}.weight"], f"{module.name}.weight"):
                if weight is None:
                    weight = np.empty((outputs, tensors["weight"].shape[-1]), tensors["weight"].dtype)
                    scales = np.empty((outputs, *own.shape[1:]), np.float32)
                weight[target] = tensors["weight"].reshape(-1, weight.shape[1])[rows]
                scales[target] = own[rows]
        assert weight is not None  # noqa: S101 - a module holds rows of each of its linears
        made = {"weight": _packed(module, weight), "weight_scale": scales}
        if module.form.name == "fp8":
            made["weight_scale"] = _one(module, "weight_scale", scales)
        for suffix, theirs in (
            ("weight_scale_2", "weights_scaling_factor_2"), ("input_scale", "activation_scaling_factor"),
        ):  # fmt: skip
            found = [each[theirs] for linear in module.linears if theirs in (each := self._linear(linear))]
            if found:
                made[suffix] = _one(module, suffix, np.concatenate([each.reshape(-1) for each in found]))
        return made

    def _factors(self, module: Module) -> Array:
        columns = self.layout.shapes[f"{module.name}.weight"][1]
        vector = self._linear(module.linears[0]).get("prequant_scaling_factor") if module.factors == "own" else None
        return np.ones(columns, self.dtype) if vector is None else vector.astype(self.dtype)

    def _cache_scales(self, attention: str, qkv: PlannedTensor) -> Output:
        entry = self.layers.get(f"{attention}.kv_cache_scaling_factor")
        if entry is None:
            raise InputError(f"quantisation made no '{attention}.kv_cache_scaling_factor'", _ANEW)
        module = qkv.pieces[0].source.rsplit(".", 2)[0]
        names = [f"{module}.k_proj.k_scale", f"{module}.v_proj.v_scale"]

        def make() -> dict[str, Array]:
            scale = self._reader.tensor(entry).astype(np.float32).reshape(())
            return dict.fromkeys(names, scale)

        return Output(tuple(TensorSpec(name, _F32, ()) for name in names), make)

    def _read(self, name: str) -> Array:
        return self._reader.tensor(self._source[name])

    def _linear(self, linear: Linear) -> dict[str, Array]:
        """The tensors of a whole linear by suffix, int4 unpacked. The last two are kept: a layer asks for both."""
        if linear.name not in self._kept:
            while len(self._kept) > 1:
                self._kept.popitem(last=False)
            own = f"{linear.name}."
            found = {
                name.removeprefix(own): self._reader.tensor(entry)
                for name, entry in self.layers.items()
                if name.startswith(own)
            }
            if "weight" not in found:
                raise InputError(f"quantisation made no '{own}weight'", _ANEW)
            if found["weight"].dtype == np.int8 and self.layout.quantization.format_of(linear.name).bits == 4:  # type: ignore[union-attr]
                found["weight"] = unpack_int4(found["weight"])
            self._kept[linear.name] = found
        return self._kept[linear.name]


def _specs(module: Module, layout: HuggingFaceLayout, dtype: np.dtype[Any]) -> Iterator[TensorSpec]:
    """The tensors of a module, in the order in which `HuggingFaceTensors.module` makes them."""
    form, (outputs, inputs) = module.form, layout.shapes[f"{module.name}.weight"]
    group = layout.quantization.group_size or 1
    kind = {"fp8": FLOAT8, "fp8_rowwise": FLOAT8, "int8_wo": np.dtype(np.int8)}.get(form.name, np.dtype(np.uint8))
    shape = (outputs // 2, inputs) if form.bits == 4 else (outputs, inputs)
    scales: tuple[int, ...] = (outputs, inputs // group) if form.group_sizes else (outputs,)
    yield TensorSpec(f"{module.name}.weight", kind, shape)
    yield TensorSpec(f"{module.name}.weight_scale", _F32, () if form.name == "fp8" else scales)
    if form.name == "w4a8_awq":
        yield TensorSpec(f"{module.name}.weight_scale_2", _F32, ())
    if form.inputs == "fp8 per tensor":
        yield TensorSpec(f"{module.name}.input_scale", _F32, ())
    if module.factors != "none":
        yield TensorSpec(f"{module.name}.pre_quant_scale", dtype, (inputs,))


def _rows(whole: PlannedTensor, source: str) -> Iterator[tuple[Array, slice]]:
    """Which rows of a source tensor are which rows of a linear (of all its experts, one after the other)."""
    for piece in whole.pieces:
        if piece.source == source:
            places = np.arange(int(np.prod(piece.view[:-1]))).reshape(piece.view[:-1])
            target = places[tuple(slice(start, stop) for start, stop in piece.box[:-1])].reshape(-1)
            first = piece.element // whole.shape[-1]
            yield target, slice(first, first + len(target))


def _per_row(module: Module, tensors: Mapping[str, Array], linear: Linear) -> Array:
    """Scales of a linear with one entry per row (of all its experts)."""
    scales = tensors.get("weights_scaling_factor", tensors.get("per_channel_scale"))
    assert scales is not None  # noqa: S101 - every format but weight-only has them
    wide = scales.astype(np.float32)
    if module.form.group_sizes:
        return wide.reshape(-1, wide.shape[-1])
    wide = wide.reshape(-1)
    rows = linear.rows * max(1, linear.experts)
    return np.repeat(wide, rows // len(wide))


def _one(module: Module, suffix: str, values: Array) -> Array:
    """The value that all of them have, as a scalar."""
    if not (values == values.flat[0]).all():
        raise InputError(f"'{module.name}': its parts have different values of {suffix}", "quantise them together")
    return np.asarray(values.flat[0], np.float32)


def _packed(module: Module, codes: Array) -> Array:
    return pack_int4(codes).view(np.uint8) if module.form.bits == 4 else codes
