"""Which modules of a source that somebody else quantised make up the linears of a model, checked by their headers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trtkit import architectures
from trtkit.convert.linears import Linear, linears
from trtkit.convert.plan import Piece
from trtkit.convert.source import table_name
from trtkit.convert.whole import whole_tensors
from trtkit.errors import InputError
from trtkit.hf import Source
from trtkit.quantize import imports
from trtkit.quantize.import_linears import Part, parts_of
from trtkit.quantize.imports import LinearFormat, Scheme
from trtkit.safetensors_io import Reader


@dataclass(frozen=True)
class Found:
    """A linear of the model, and what the source has of it.

    Attributes:
        experts: its parts; of a linear of experts those of each expert, else one list.
        formats: module -> how it is quantised; empty where it is not.
    """

    linear: Linear
    experts: Sequence[Sequence[Part]]
    formats: Mapping[str, LinearFormat]


@dataclass(frozen=True)
class Survey:
    """What a quantised source holds.

    Attributes:
        linears: of the model, in order of execution.
        names: a linear's weight in the spelling of the family's table -> the module in the source.
        attentions: layer -> its attention module.
        weights: the weights, in the table's spelling, that are not plain.
        tensors: the tensors, in the table's spelling, that stand for them.
    """

    linears: Sequence[Found]
    names: Mapping[str, str]
    attentions: Mapping[int, str]
    weights: frozenset[str]
    tensors: frozenset[str]

    @property
    def quantised(self) -> list[Found]:
        return [found for found in self.linears if found.formats]


def survey(source: Source, scheme: Scheme, config: Mapping[str, Any], reader: Reader) -> Survey:
    """Looks at every linear.

    Args:
        config: config.json of the checkpoint that it would become without quantisation.

    Raises:
        InputError: a tensor is missing, or is not what the configs say; something is quantised that TensorRT-LLM would
            have as it is; parts of one linear are quantised differently. Names the tensor or module.
    """
    architecture = architectures.get(source.architecture)
    whole, shapes = whole_tensors(config)
    known = {}
    for name in source.tensors:
        owner = name.rpartition(".")[0]
        known[table_name(architecture, f"{owner}.weight")] = owner
    names = {name: known.get(name, name.removesuffix(".weight")) for name in shapes}
    found, attentions, packed = [], {}, {}
    for linear in linears(config):
        pieces = whole[f"{linear.name}.weight"].pieces
        formats = {}
        for piece in pieces:
            module = names[piece.source]
            linear_format = imports.check(module, scheme, source.tensors, reader)
            if linear_format is not None:
                _check_shape(source, module, linear_format, piece, reader)
                formats[module], packed[piece.source] = linear_format, module
        parts = parts_of(whole[f"{linear.name}.weight"], names)
        each = len(linear.weight.parts)
        experts = [parts[start : start + each] for start in range(0, len(parts), each)]
        found.append(Found(linear, experts, formats))
        _check_alike(found[-1], scheme)
        if linear.kind == "attention.qkv":
            attentions[linear.layer] = parts[0].module.rpartition(".")[0]
    owners = {*packed.values(), *attentions.values()}
    _refuse_leftovers(source, scheme, owners, shapes)
    stand = set(_zero_biases(source, packed, shapes, reader))
    for name in source.tensors:
        owner, _, suffix = name.rpartition(".")
        if owner in owners and suffix in ("weight", *imports.FORMATS[scheme.method].SUFFIXES):
            stand.add(table_name(architecture, name))
    return Survey(found, names, attentions, frozenset(packed), frozenset(stand))


def _check_shape(source: Source, module: str, linear_format: LinearFormat, piece: Piece, reader: Reader) -> None:
    outputs, inputs = _shape(module, linear_format.bits, source, reader)
    implied = (math.prod(piece.view[:-1]), piece.view[-1])
    implied = implied[::-1] if piece.transposed else implied
    if (outputs, inputs) != implied:
        raise InputError(
            f"{source.path}: '{module}' has {outputs} outputs and {inputs} inputs, config.json implies "
            f"{implied[0]} and {implied[1]}",
            "config.json and the weights do not belong together",
        )


def _shape(module: str, bits: int, source: Source, reader: Reader) -> tuple[int, int]:
    """Outputs and inputs of a module that was checked (see the modules of `trtkit.quantize.imports`)."""
    if (words := source.tensors.get(f"{module}.qweight")) is not None:
        outputs = source.tensors[f"{module}.scales"].shape[1]
        return outputs, math.prod(words.shape) * 32 // bits // outputs
    if (noted := source.tensors.get(f"{module}.weight_shape")) is not None:
        outputs, inputs = reader.tensor(noted)
        return int(outputs), int(inputs)
    rows, columns = source.tensors[f"{module}.weight"].shape
    return rows * 8 // bits, columns


def _check_alike(found: Found, scheme: Scheme) -> None:
    modules = list(dict.fromkeys(part.module for parts in found.experts for part in parts))
    kinds = {found.formats[module].quant_algo if module in found.formats else "not" for module in modules}
    if len(kinds) > 1:
        other = next(
            module
            for module in modules
            if (module in found.formats) != (modules[0] in found.formats)
            or (module in found.formats and found.formats[module].quant_algo != found.formats[modules[0]].quant_algo)
        )
        raise scheme.refuse(
            f"'{modules[0]}' and '{other}' are quantised differently, but TensorRT-LLM has them in one linear"
        )


def _refuse_leftovers(source: Source, scheme: Scheme, owners: set[str], shapes: Mapping[str, Any]) -> None:
    architecture = architectures.get(source.architecture)
    for name in imports.leftovers(scheme, source.tensors, owners):
        owner = name.rpartition(".")[0]
        if table_name(architecture, f"{owner}.weight") in shapes:
            raise scheme.refuse(f"'{owner}' is quantised, which trtkit imports of the linears within layers only")
        imports.refuse_leftovers(scheme, source.tensors, owners)


def _zero_biases(source: Source, packed: Mapping[str, str], shapes: Mapping[str, Any], reader: Reader) -> Iterator[str]:
    """Biases that early AutoGPTQ gave to every linear: of a model without biases they are zero, and no part of it."""
    for weight, module in packed.items():
        name = weight.removesuffix("weight") + "bias"
        entry = source.tensors.get(f"{module}.bias")
        if entry is not None and name not in shapes and not reader.tensor(entry).any():
            yield name
