"""The tensors of a quantised checkpoint, each checked against what its format says before it is read."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from trtkit.convert.cast import Array
from trtkit.errors import InputError
from trtkit.quantize.imports.scheme import Scheme
from trtkit.safetensors_io import DTYPES, Reader, TensorEntry

FLOATS = ("F16", "BF16", "F32")
"""What scales may be."""

Tensors = Mapping[str, TensorEntry]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def need(scheme: Scheme, tensors: Tensors, name: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> TensorEntry:
    """A tensor that must be there.

    Args:
        dtypes: the dtypes that it may have, as safetensors spells them.
        shapes: the shapes that it may have; -1 is any extent; none at all is any shape of two axes.

    Raises:
        InputError: it is missing, or has another dtype or shape; names it.
    """
    entry = tensors.get(name)
    if entry is None:
        raise InputError(
            f"{scheme.file.parent}: tensor '{name}' is missing, without which its linear cannot be dequantised",
            "is the download complete?",
        )
    kind = _NAMES[entry.dtype]
    if kind not in dtypes:
        raise wrong(entry, f"is {kind}, expected {' or '.join(dtypes)}")
    allowed = shapes or ((-1, -1),)
    if not any(_fits(entry.shape, shape) for shape in allowed):
        expected = " or ".join(str(list(shape)).replace("-1", "any") for shape in allowed)
        raise wrong(entry, f"has shape {list(entry.shape)}, expected {expected}")
    if 0 in entry.shape:
        raise wrong(entry, f"is empty: {list(entry.shape)}")
    return entry


def _fits(shape: tuple[int, ...], pattern: tuple[int, ...]) -> bool:
    return len(shape) == len(pattern) and all(b in (-1, a) for a, b in zip(shape, pattern, strict=True))


def wrong(entry: TensorEntry, what: str) -> InputError:
    """The error for a tensor that is not what its format says."""
    return InputError(f"{entry.path}: tensor '{entry.name}' {what}", "is config.json of the same checkpoint?")


def groups(entry: TensorEntry, axis: int, inputs: int, size: int | None) -> None:
    """Checks that the groups of a tensor of scales make up all inputs.

    Args:
        axis: that of the groups.
        size: inputs in a group; None where only the tensor says it.

    Raises:
        InputError: they do not.
    """
    count = entry.shape[axis]
    if inputs % count or (size is not None and count * size != inputs):
        of = "equal size" if size is None else f"{size}"
        raise wrong(entry, f"has {count} groups, which of {of} do not make up {inputs} inputs")


def floats(reader: Reader, entry: TensorEntry) -> Array:
    """A tensor of scales in float32.

    Raises:
        InputError: one of them is infinite or no number.
    """
    values = reader.tensor(entry).astype(np.float32)
    if not np.isfinite(values).all():
        raise wrong(entry, "holds a scale that is infinite or no number")
    return values


def scalar(reader: Reader, entry: TensorEntry) -> float:
    """The one element of a tensor.

    Raises:
        InputError: it is infinite or no number.
    """
    return float(floats(reader, entry).reshape(-1)[0])


SCALAR: tuple[tuple[int, ...], ...] = ((), (1,), (1, 1))
"""Shapes of a tensor of one element."""


def unpack(words: Array, bits: int) -> Array:
    """uint8 (..., C * 32 / bits) of the unsigned codes in int32 (..., C): the lowest bits of a word come first."""
    packed = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return packed
    codes = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.uint8)
    codes[..., 0::2] = packed & 15
    codes[..., 1::2] = packed >> 4
    return codes


def signed(codes: Array, bits: int) -> Array:
    """int8 of unsigned codes, uint8, with the middle of their range at zero."""
    shifted: Array = (codes - np.uint8(1 << (bits - 1))).view(np.int8)
    return shifted


def zeros_or_none(zeros: Array) -> Array | None:
    """Zero points, None where all are zero."""
    return np.ascontiguousarray(zeros) if zeros.any() else None


def quantised(module: str, scheme: Scheme, tensors: Tensors, marks: tuple[str, ...], excluded: bool) -> bool:
    """Whether a module is quantised in the files: its tensors say so.

    Args:
        marks: suffixes of tensors that only a quantised module has.
        excluded: whether the config says that it is not.

    Raises:
        InputError: the config says that it is not, though it has such a tensor; or it is there twice.
    """
    found = [f"{module}.{mark}" for mark in marks if f"{module}.{mark}" in tensors]
    if not found:
        plain = tensors.get(f"{module}.weight")
        if plain is not None and _NAMES[plain.dtype] not in (*FLOATS, "F64"):
            raise wrong(plain, f"is {_NAMES[plain.dtype]}, but has no scales beside it")
        return False
    if excluded:
        raise scheme.refuse(f"'{module}' is listed as not quantised, but tensor '{found[0]}' is there")
    return True


def refuse_twice(module: str, scheme: Scheme, tensors: Tensors) -> None:
    """Refuses a module with both packed weights and a plain one, of which nobody can tell which counts."""
    if f"{module}.weight" in tensors:
        raise scheme.refuse(f"'{module}' has a plain weight beside its quantised one", "download the checkpoint again")
