"""Checkpoints of AutoAWQ, packing "gemm": 4 bits, with zero points, in groups of inputs.

Format (AutoAWQ, awq/modules/linear/gemm.py and awq/utils/packing_utils.py): of K inputs and N outputs, `qweight`
int32 (K, N / 8), `qzeros` int32 (K / group, N / 8), `scales` (K / group, N). Eight outputs lie in a word, from the
lowest bits on those of index 0, 2, 4, 6, 1, 3, 5, 7. A value is (code - zero) * scale with codes and zeros from 0 to
15. The scales that AWQ searched for are in the norms and linears before, so nothing is left to multiply inputs with.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trtkit.convert.cast import Array
from trtkit.convert.number_formats import IntegerWeight
from trtkit.quantize.imports import tensors as checked
from trtkit.quantize.imports.scheme import FROM_ORIGINAL, LinearFormat, Scheme, group_size, key, names, one_of, refusal
from trtkit.quantize.imports.tensors import Tensors
from trtkit.safetensors_io import Reader

METHOD = "awq"
SUFFIXES = ("qweight", "qzeros", "scales")
"""What this format keeps of a linear, besides its bias."""

_REPACK = "load it with AutoAWQ and save it with version GEMM, or " + FROM_ORIGINAL
_LANES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Output of a word -> where it lies in it, counted in codes from the lowest bits on."""


def parse(config: Mapping[str, Any], file: Path) -> Scheme:
    """What a quantisation config says.

    Args:
        config: config.json's `quantization_config`, or what AutoAWQ's quant_config.json holds.
        file: where it is from.

    Raises:
        InputError: something that is not imported, or a malformed key.
    """
    bits = key(config, "bits", int, key(config, "w_bit", int, 4, file), file)
    one_of(bits, (4,), "AWQ with bits", file)
    version = key(config, "version", str, key(config, "format", str, "gemm", file), file).lower()
    one_of(version, ("gemm",), "AWQ's packing (version)", file, _REPACK)
    backend = key(config, "backend", str, "auto", file).lower()
    if backend == "llm-awq":
        raise refusal(file, "AWQ packed by llm-awq is not one that trtkit imports", _REPACK)
    if not key(config, "zero_point", bool, True, file):
        raise refusal(file, "AWQ without zero points (zero_point false) has no packing 'gemm'", FROM_ORIGINAL)
    size = key(config, "group_size", int, key(config, "q_group_size", int, 128, file), file)
    scales, size_or_none = group_size(size, file)
    linear = LinearFormat("int", bits, scales, size_or_none, symmetric=False)
    return Scheme(METHOD, file, (("*", linear),), names(config, "modules_to_not_convert", file))


def check(module: str, scheme: Scheme, tensors: Tensors, reader: Reader) -> LinearFormat | None:
    """The format of a module as its tensors have it, looked at without reading its weight; None: not quantised.

    Raises:
        InputError: a tensor is missing, or is not what the config says.
    """
    # AutoAWQ, awq/utils/module.py: a module is left alone if one of these is anywhere in its name.
    excluded = any(part in module for part in scheme.excluded)
    if not checked.quantised(module, scheme, tensors, SUFFIXES, excluded):
        return None
    checked.refuse_twice(module, scheme, tensors)
    linear = scheme.targets[0][1]
    weight = checked.need(scheme, tensors, f"{module}.qweight", ("I32",))
    inputs, words = weight.shape
    scales = checked.need(scheme, tensors, f"{module}.scales", checked.FLOATS, (-1, 8 * words))
    checked.groups(scales, 0, inputs, linear.group_size or inputs)
    checked.need(scheme, tensors, f"{module}.qzeros", ("I32",), (scales.shape[0], words))
    return linear


def read(module: str, scheme: Scheme, tensors: Tensors, reader: Reader) -> IntegerWeight | None:
    """The weight of a module, None where it is not quantised.

    Raises:
        InputError: as `check`, or a scale that is no finite number.
    """
    if check(module, scheme, tensors, reader) is None:
        return None
    scales = checked.floats(reader, tensors[f"{module}.scales"])
    zeros = _outputs_first(reader.tensor(tensors[f"{module}.qzeros"]))
    return IntegerWeight(
        codes=_outputs_first(reader.tensor(tensors[f"{module}.qweight"])),
        scales=np.ascontiguousarray(scales.T),
        zeros=checked.zeros_or_none(zeros),
    )


def _outputs_first(words: Array) -> Array:
    """int32 (R, N / 8) -> signed codes int8 (N, R)."""
    codes = checked.unpack(words, 4).reshape(words.shape[0], -1, 8)[:, :, _LANES]
    return np.ascontiguousarray(checked.signed(codes.reshape(words.shape[0], -1), 4).T)
