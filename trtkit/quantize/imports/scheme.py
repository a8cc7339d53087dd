"""What a config says of an already quantised Hugging Face checkpoint: which linears lie how.

A config comes from the internet like the weights, so every key is checked for its type, and every refusal is made
before a weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from trtkit.errors import InputError
from trtkit.untrusted import printable

FROM_ORIGINAL = "convert the original model with --quantization instead"
"""The way out where a quantised checkpoint cannot be imported."""

MAX_NAMES = 100_000
"""Most names in a list of modules, more than any model has."""

T = TypeVar("T")


@dataclass(frozen=True)
class LinearFormat:
    """How the weight of a linear lies in the files, and what its inputs become.

    Attributes:
        kind: "int" for integers, "float8" for e4m3.
        bits: of a weight.
        scales: one for the whole tensor, one per output channel, or one per group of inputs of each.
        group_size: inputs in a group; None where there are no groups, and where only the tensors say it.
        symmetric: whether zero is code 0 everywhere.
        inputs: "static" where they are quantised with one scale from the files, "dynamic" where each token gets its
            own scale, None where they stay floats.
        input_kind: what quantised inputs become.
    """

    kind: Literal["int", "float8"]
    bits: int
    scales: Literal["tensor", "channel", "group"]
    group_size: int | None = None
    symmetric: bool = True
    inputs: Literal["static", "dynamic"] | None = None
    input_kind: Literal["int8", "float8"] | None = None

    @property
    def quant_algo(self) -> str | None:
        """The quantisation of TensorRT-LLM whose kernels compute the same, None where it has none.

        Source: TensorRT-LLM, tensorrt_llm/quantization/mode.py (QuantAlgo).
        """
        if self.kind == "float8":
            if self.inputs == "dynamic":  # a scale per tensor is one per channel, repeated
                return "FP8_PER_CHANNEL_PER_TOKEN"
            return "FP8" if self.inputs == "static" and self.scales == "tensor" else None
        if self.bits == 4:
            if self.inputs is not None:
                return "W4A8_AWQ" if self.symmetric and self.input_kind == "float8" else None
            return "W4A16_AWQ" if self.symmetric else "W4A16_GPTQ"
        if self.inputs is not None:
            return "W8A8_SQ_PER_CHANNEL" if self.inputs == "static" else "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN"
        return "W8A16" if self.symmetric and self.scales != "group" else "W8A16_GPTQ"


@dataclass(frozen=True)
class Scheme:
    """What a config says of all linears.

    Attributes:
        method: "awq", "gptq", "compressed-tensors" or "modelopt".
        file: the file that says so.
        targets: name, pattern or "*" -> format, the first that matches counts. What a pattern is, the method says.
        excluded: names or patterns of modules that are not quantised.
        kv_cache: what keys and values become in the cache, None where they stay floats.
    """

    method: str
    file: Path
    targets: tuple[tuple[str, LinearFormat], ...]
    excluded: tuple[str, ...] = ()
    kv_cache: Literal["FP8", "INT8"] | None = None

    def refuse(self, what: str, fix: str = FROM_ORIGINAL) -> InputError:
        """The error for something in this checkpoint that cannot be imported."""
        return refusal(self.file, what, fix)


def refusal(file: Path, what: str, fix: str = FROM_ORIGINAL) -> InputError:
    """The error for something that a quantisation config asks for and trtkit does not import."""
    return InputError(f"{file}: {what}", fix)


def key(section: Mapping[str, Any], name: str, kind: type[T], default: T, file: Path) -> T:
    """A key of a config, of exactly this type; its default where it is missing or null.

    Raises:
        InputError: it has another type.
    """
    value = section.get(name)
    if value is None:
        return default
    if type(value) is not kind:  # true is an int too
        raise InputError(
            f"{file}: quantisation key '{printable(name)}' is {printable(repr(value))}, expected {_KINDS[kind]}",
            "download the file again",
        )
    return value


_KINDS: Mapping[type, str] = {
    int: "a whole number", bool: "true or false", str: "a name", list: "a list", dict: "a mapping",
}  # fmt: skip


def names(section: Mapping[str, Any], name: str, file: Path) -> tuple[str, ...]:
    """A key of a config that lists names; empty where it is missing or null.

    Raises:
        InputError: it is no list of short texts.
    """
    values: list[Any] = key(section, name, list, [], file)
    if len(values) > MAX_NAMES or not all(isinstance(value, str) and len(value) <= 500 for value in values):
        raise InputError(f"{file}: quantisation key '{name}' is no list of module names", "download the file again")
    return tuple(values)


def one_of(value: T, allowed: tuple[T, ...], what: str, file: Path, fix: str = FROM_ORIGINAL) -> T:
    """`value`, if it is among those that are imported.

    Raises:
        InputError: it is not; names it and those that are.
    """
    if value not in allowed:
        known = ", ".join(str(item) for item in allowed)
        raise refusal(file, f"{what} {printable(value)} is not one that trtkit imports (it imports {known})", fix)
    return value


def group_size(size: int, file: Path) -> tuple[Literal["channel", "group"], int | None]:
    """The scales and group size of a config in which -1 stands for one group per output channel.

    Raises:
        InputError: no such size.
    """
    if size == -1:
        return "channel", None
    if size <= 0:
        raise InputError(f"{file}: group size {printable(size)}, expected a positive number or -1", FROM_ORIGINAL)
    return "group", size
