"""Checkpoints of AutoGPTQ, GPTQModel and optimum: 4 or 8 bits, with or without zero points, in groups of inputs.

Format (AutoGPTQ, auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py; GPTQModel, gptqmodel/nn_modules/qlinear): of K
inputs and N outputs, `qweight` int32 (K * bits / 32, N), consecutive inputs in a word from the lowest bits on; `qzeros`
int32 (K / group, N * bits / 32), consecutive outputs in a word; `scales` (K / group, N); `g_idx` int32 (K,), the group
of each input. A value is (code - zero) * scale with unsigned codes. Format "gptq" stores zeros less one, "gptq_v2" as
they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trtkit.convert.cast import Array
from trtkit.convert.number_formats import IntegerWeight
from trtkit.quantize.imports import tensors as checked
from trtkit.quantize.imports.scheme import FROM_ORIGINAL, LinearFormat, Scheme, group_size, key, one_of, refusal
from trtkit.quantize.imports.tensors import Tensors
from trtkit.safetensors_io import Reader, TensorEntry

METHOD = "gptq"
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
"""What this format keeps of a linear, besides its bias."""

_V2 = "save it as gptq_v2 with GPTQModel, or " + FROM_ORIGINAL
_REPACK = "save it as gptq or gptq_v2 with GPTQModel, or " + FROM_ORIGINAL


@dataclass(frozen=True)
class GptqScheme(Scheme):
    """What a config says of all linears.

    Attributes:
        less_one: zeros are stored less one.
        by_word: they were taken one off by subtracting within whole words, so that a zero of 0 borrows from the next.
    """

    less_one: bool = True
    by_word: bool = False


def parse(config: Mapping[str, Any], file: Path) -> GptqScheme:
    """What a quantisation config says.

    Args:
        config: config.json's `quantization_config`, or what AutoGPTQ's quantize_config.json holds.
        file: where it is from.

    Raises:
        InputError: something that is not imported, or a malformed key.
    """
    bits = one_of(key(config, "bits", int, 4, file), (4, 8), "GPTQ with bits", file)
    # GPTQModel renamed checkpoint_format to format and writes both.
    packing = key(config, "checkpoint_format", str, key(config, "format", str, "gptq", file), file).lower()
    one_of(packing, ("gptq", "gptq_v2"), "GPTQ's packing (checkpoint_format)", file, _REPACK)
    if key(config, "is_marlin_format", bool, False, file):
        raise refusal(file, "GPTQ packed for Marlin is not one that trtkit imports", _REPACK)
    one_of(key(config, "pack_dtype", str, "int32", file), ("int32",), "GPTQ's pack_dtype", file, _REPACK)
    _refuse_overrides(config, file)
    scales, size = group_size(key(config, "group_size", int, 128, file), file)
    linear = LinearFormat("int", bits, scales, size, symmetric=key(config, "sym", bool, True, file))
    # GPTQModel, gptqmodel/utils/model.py (convert_gptq_v2_to_v1_format_module), subtracts from whole words.
    meta = key(config, "meta", dict, {}, file).get("quantizer")
    tools = meta if isinstance(meta, list) else [meta]
    by_word = any(isinstance(tool, str) and tool.startswith("gptqmodel") for tool in tools)
    return GptqScheme(METHOD, file, (("*", linear),), less_one=packing == "gptq", by_word=by_word)


def _refuse_overrides(config: Mapping[str, Any], file: Path) -> None:
    """GPTQModel's `dynamic` gives modules other settings by pattern; one that starts with "-" leaves modules alone,
    which their tensors show."""
    for pattern in key(config, "dynamic", dict, {}, file):
        if not str(pattern).startswith("-"):
            raise refusal(file, "GPTQ with other settings for some modules (dynamic) is not one that trtkit imports")


def check(module: str, scheme: Scheme, tensors: Tensors, reader: Reader) -> LinearFormat | None:
    """The format of a module as its tensors have it, looked at without reading its weight; None: not quantised.

    Raises:
        InputError: a tensor is missing, or is not what the config says; the inputs of a group do not lie together.
    """
    if not checked.quantised(module, scheme, tensors, SUFFIXES, False):
        return None
    checked.refuse_twice(module, scheme, tensors)
    linear = scheme.targets[0][1]
    per_word = 32 // linear.bits
    weight = checked.need(scheme, tensors, f"{module}.qweight", ("I32",))
    inputs, outputs = weight.shape[0] * per_word, weight.shape[1]
    scales = checked.need(scheme, tensors, f"{module}.scales", checked.FLOATS, (-1, outputs))
    checked.groups(scales, 0, inputs, linear.group_size or inputs)
    if outputs % per_word:
        raise checked.wrong(weight, f"has {outputs} outputs, no multiple of {per_word}")
    checked.need(scheme, tensors, f"{module}.qzeros", ("I32",), (scales.shape[0], outputs // per_word))
    if f"{module}.g_idx" in tensors:
        index = checked.need(scheme, tensors, f"{module}.g_idx", ("I32", "I64"), (inputs,))
        if not np.array_equal(reader.tensor(index), np.arange(inputs) // (inputs // scales.shape[0])):
            raise scheme.refuse(
                f"'{module}' was quantised in the order of its activations (desc_act), so the inputs of a group do not "
                "lie together",
                "quantise it again with desc_act false, or " + FROM_ORIGINAL,
            )
    return linear


def read(module: str, scheme: Scheme, tensors: Tensors, reader: Reader) -> IntegerWeight | None:
    """The weight of a module, None where it is not quantised.

    Raises:
        InputError: as `check`; a scale that is no finite number; zero points that readers disagree on.
    """
    linear = check(module, scheme, tensors, reader)
    if linear is None:
        return None
    assert isinstance(scheme, GptqScheme)  # noqa: S101 - `parse` made it
    zeros = _zeros(tensors[f"{module}.qzeros"], scheme, linear, reader)
    words = reader.tensor(tensors[f"{module}.qweight"])
    scales = checked.floats(reader, tensors[f"{module}.scales"])
    return IntegerWeight(
        codes=checked.signed(checked.unpack(words.T, linear.bits), linear.bits),
        scales=np.ascontiguousarray(scales.T),
        zeros=zeros,
        bits=linear.bits,
    )


def _zeros(entry: TensorEntry, scheme: GptqScheme, linear: LinearFormat, reader: Reader) -> Array | None:
    """int8 (N, K / group), None where all are zero."""
    words = reader.tensor(entry)
    if scheme.less_one:
        ones = np.uint32(0x11111111 if linear.bits == 4 else 0x01010101)
        largest = (1 << linear.bits) - 1
        # Zero less one is the largest code or borrows from its neighbour, and what it was then, only the writer knows.
        if not scheme.by_word and (checked.unpack(words, linear.bits) == largest).any():
            raise scheme.refuse(
                f"tensor '{entry.name}' stores a zero point less one as {largest}, which programs read differently", _V2
            )
        words = (words.view(np.uint32) + ones).view(np.int32)
    zeros = checked.zeros_or_none(checked.signed(checked.unpack(words, linear.bits), linear.bits).T)
    if zeros is not None and linear.symmetric:
        raise scheme.refuse(f"the config says sym, but tensor '{entry.name}' holds other zero points", _V2)
    return zeros
