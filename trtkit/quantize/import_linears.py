"""The tensors of a checkpoint's linears from the modules of a source that somebody else quantised.

Codes and scales go over as they are wherever the checkpoint has a place for them, so what they stand for stays the same
to the bit. What does not fit is counted in an `Account`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from trtkit.convert.cast import Array
from trtkit.convert.dequantize import round_float8
from trtkit.convert.interleave import gptq_tensors
from trtkit.convert.linears import Linear, fields
from trtkit.convert.number_formats import FLOAT8, Float8Weight, IntegerWeight, pack_int4
from trtkit.convert.plan import PlannedTensor
from trtkit.convert.quantization import Format, Quantization

Read = Callable[[str], IntegerWeight | Float8Weight]
"""A module's name in the source -> its weight."""


@dataclass(frozen=True)
class Part:
    """What a linear, or a rank's share of it, takes of one module.

    Attributes:
        module: its name in the source.
        rows: of the output features, in the linear's order: a slice, or their numbers.
        columns: of the input features, from the first to the one behind the last.
    """

    module: str
    rows: slice | Array
    columns: tuple[int, int]


@dataclass(frozen=True)
class Member:
    """A linear that is quantised in the source.

    Attributes:
        form: what it becomes.
        experts: its parts; of a linear of experts those of each expert, else one list.
        ranks: for a format whose tensors are made for each TP rank, the parts of each.
    """

    linear: Linear
    form: Format
    experts: Sequence[Sequence[Part]]
    ranks: Sequence[Sequence[Part]] = ()

    @property
    def modules(self) -> list[str]:
        """The modules that it is made of, each once."""
        return list(dict.fromkeys(part.module for parts in self.experts for part in parts))


@dataclass
class Account:
    """What a checkpoint does not hold exactly as the source had it.

    Attributes:
        linears: how many were taken over.
        scales, zeros: of groups, which the dtype of the checkpoint rounded (of the formats that hold them in it).
        inputs: linears that have one static scale for their inputs where the source had several: the largest.
        requantized, changed: float8 weights that were brought to another scale, and those that it changed.
        caches: layers whose keys and values had two scales: the larger.
    """

    linears: int = 0
    scales: int = 0
    zeros: int = 0
    inputs: int = 0
    requantized: int = 0
    changed: int = 0
    caches: int = 0

    @property
    def exact(self) -> bool:
        """Whether every weight of the checkpoint stands for the very number that the source has."""
        return not (self.scales or self.zeros or self.changed)

    def add(self, other: Account) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class Maker:
    """Makes the tensors of linears.

    Attributes:
        quantization: of the checkpoint.
        dtype: numpy dtype of the checkpoint.
        read: a module's weight.
        second_scale: W4A8's second scale of a module.
        sm: GPU generation, for the format that lies as it needs it.
        account: what was not exact so far.
    """

    quantization: Quantization
    dtype: np.dtype[Any]
    read: Read
    second_scale: Callable[[str], float | None]
    sm: int | None
    account: Account = field(default_factory=Account)

    def tensors(self, member: Member) -> dict[str, Array]:
        """Name -> tensor of one linear, whole or for each rank."""
        self.account.linears += 1
        if member.ranks:
            return self._of_ranks(member)
        each = [self._of_parts(member.form, parts) for parts in member.experts]
        found: dict[str, Array] = {}
        for place in fields(member.form, self.quantization, member.linear.kind):
            values = [tensors[place.suffix] for tensors in each]
            if place.suffix == "activation_scaling_factor":
                inputs = np.concatenate(values)
                self.account.inputs += bool((inputs != inputs[0]).any())
                values = [inputs.max(keepdims=True)]
            stacked = bool(member.linear.experts) and place.per_expert
            found[f"{member.linear.name}.{place.suffix}"] = np.stack(values) if stacked else values[0]
        return found

    def _of_ranks(self, member: Member) -> dict[str, Array]:
        found: dict[str, Array] = {}
        read = cache(self.read)
        for rank, parts in enumerate(member.ranks):
            weight = join([_integers(read, part) for part in parts], parts, self.quantization.group_size)
            assert self.sm is not None  # noqa: S101 - `import_plan` asks for it
            made, rounded = gptq_tensors(weight, self.dtype, self.sm)
            self.account.scales += rounded.scales
            self.account.zeros += rounded.zeros
            found |= {f"{member.linear.name}.{suffix}.tp{rank}": values for suffix, values in made.items()}
        return found

    def _of_parts(self, form: Format, parts: Sequence[Part]) -> dict[str, Array]:
        """Suffix -> tensor of a linear or one expert, of all suffixes that its format might want."""
        read = cache(self.read)
        weights = [read(part.module) for part in parts]
        inputs = [weight.input_scale for weight in weights]
        found: dict[str, Array] = {}
        if inputs[0] is not None:
            found["activation_scaling_factor"] = np.array(inputs, np.float32)
        if form.name.startswith("fp8"):
            return found | self._float8(form, [_floats(read, part) for part in parts], parts)
        group = self.quantization.group_size if form.group_sizes else None
        weight = join([_integers(read, part) for part in parts], parts, group)
        columns = weight.codes.shape[1]
        ones = np.ones(columns, np.float32)
        found["prequant_scaling_factor"] = ones if weight.prequant is None else weight.prequant
        if form.bits == 4:
            return found | self._groups(weight, self.second_scale(parts[0].module))
        return found | {
            "weight": weight.codes,
            "weights_scaling_factor": weight.scales[:, 0],
            "per_channel_scale": weight.scales.T,
            "smoother": ones[None],
        }

    def _groups(self, weight: IntegerWeight, second: float | None) -> dict[str, Array]:
        """The build brings the scales to the model's dtype, W4A8's by its second scale and to float16."""
        scales = weight.scales
        if second is None:
            self.account.scales += _changed(scales, self.dtype)
            return {"weight": pack_int4(weight.codes), "weights_scaling_factor": scales}
        outer = np.array([second], np.float32)
        self.account.scales += _changed(scales / outer, np.dtype(np.float16))
        return {
            "weight": pack_int4(weight.codes),
            "weights_scaling_factor": scales,
            "weights_scaling_factor_2": outer,
        }

    def _float8(self, form: Format, weights: Sequence[Float8Weight], parts: Sequence[Part]) -> dict[str, Array]:
        if form.name == "fp8_rowwise":
            rows = [
                np.broadcast_to(weight.scales, weight.values.shape[0])[part.rows]
                for weight, part in zip(weights, parts, strict=True)
            ]
            values = [weight.values[part.rows] for weight, part in zip(weights, parts, strict=True)]
            return {"weight": np.concatenate(values), "per_channel_scale": np.concatenate(rows)}
        scale, _ = shared_scale(weights)
        values = []
        for weight, part in zip(weights, parts, strict=True):
            own = weight.values[part.rows]
            if weight.scales[0] != scale:
                brought, changed = _rescale(own, weight.scales[0], scale)
                self.account.requantized += own.size
                self.account.changed += changed
                own = brought
            values.append(own)
        return {"weight": np.concatenate(values), "weights_scaling_factor": np.array([scale], np.float32)}


def join(weights: Sequence[IntegerWeight], parts: Sequence[Part], group: int | None) -> IntegerWeight:
    """The parts of a linear below each other, with groups of `group` inputs: larger ones are repeated, which changes
    no value.

    Args:
        weights: of the module of each part.
        group: None leaves one scale per output.
    """
    codes, scales, zeros = [], [], []
    for weight, part in zip(weights, parts, strict=True):
        low, high = part.columns
        size = group or weight.codes.shape[1]
        places = np.arange(low // size, high // size) * size // weight.group_size
        codes.append(weight.codes[part.rows, low:high])
        scales.append(weight.scales[part.rows][:, places])
        offsets = np.zeros(weight.scales.shape, np.int8) if weight.zeros is None else weight.zeros
        zeros.append(offsets[part.rows][:, places])
    offset, factors = np.concatenate(zeros), weights[0].prequant
    return IntegerWeight(
        np.concatenate(codes),
        np.ascontiguousarray(np.concatenate(scales)),
        offset if offset.any() else None,
        weights[0].bits,
        None if factors is None else factors[slice(*parts[0].columns)],
    )


def shared_scale(weights: Sequence[Float8Weight]) -> tuple[np.float32, bool]:
    """One scale for float8 weights that had one each, and whether that changes no value.

    It can be so where scales differ by powers of two and no value leaves the range of float8 or loses bits at its
    lower end. Otherwise it is the largest, as TensorRT-LLM and vLLM choose it too.
    """
    scales = sorted({weight.scales[0] for weight in weights}, reverse=True)
    if len(scales) == 1:
        return scales[0], True
    for scale in scales if powers_of_two(scales) else ():
        if not any(_rescale(weight.values, weight.scales[0], scale)[1] for weight in weights):
            return scale, True
    return scales[0], False


def powers_of_two(scales: Sequence[np.float32]) -> bool:
    """Whether positive scales differ by powers of two."""
    return all(scale > 0 and math.frexp(float(scale) / float(scales[0]))[0] == 0.5 for scale in scales)


def _rescale(values: Array, old: np.float32, new: np.float32) -> tuple[Array, int]:
    """Float8 values for another scale, and how many then stand for another number."""
    wide = values.astype(np.float32) * old
    brought = round_float8(wide / new).astype(FLOAT8)
    return brought, int(np.count_nonzero(brought.astype(np.float32) * new != wide))


def _changed(values: Array, dtype: np.dtype[Any]) -> int:
    with np.errstate(over="ignore"):
        return int(np.count_nonzero(values.astype(dtype).astype(np.float32) != values))


def _integers(read: Read, part: Part) -> IntegerWeight:
    weight = read(part.module)
    assert isinstance(weight, IntegerWeight)  # noqa: S101 - the format says so
    return weight


def _floats(read: Read, part: Part) -> Float8Weight:
    weight = read(part.module)
    assert isinstance(weight, Float8Weight)  # noqa: S101 - the format says so
    return weight


def parts_of(tensor: PlannedTensor, names: Mapping[str, str]) -> list[Part]:
    """What a plain weight, of a whole linear or of a rank's share of it, is made of.

    Args:
        names: a source tensor in the spelling of the family's table -> the module's name in the source.
    """
    found = []
    for piece in tensor.pieces:
        rows: slice | Array
        if piece.transposed:  # the source keeps it (inputs, outputs); quantised modules are (outputs, inputs) always
            rows, columns = slice(*piece.box[1]), piece.box[0]
        elif len(piece.view) == 2:
            rows, columns = slice(*piece.box[0]), piece.box[1]
        else:
            outside = piece.view[:-1]
            numbers = np.arange(math.prod(outside)).reshape(outside)
            rows = numbers[tuple(slice(start, stop) for start, stop in piece.box[:-1])].reshape(-1)
            columns = piece.box[-1]
        found.append(Part(names[piece.source], rows, columns))
    return found
