"""Hugging Face checkpoints that others quantised: what lies how in them, and their weights exactly as they mean them.

One file per format, each with `parse` (the config, all that can be refused early), `check` (a module's tensors by their
headers), `read` (its weight) and `SUFFIXES` (what it keeps of a module).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from trtkit.convert.number_formats import Float8Weight, IntegerWeight
from trtkit.errors import InputError
from trtkit.quantize.imports import autoawq, compressed_tensors, gptq, modelopt
from trtkit.quantize.imports.scheme import FROM_ORIGINAL, LinearFormat, Scheme, key, refusal
from trtkit.quantize.imports.tensors import Tensors
from trtkit.safetensors_io import Reader
from trtkit.untrusted import printable, read_json

__all__ = [
    "FORMATS", "FROM_ORIGINAL", "LinearFormat", "Scheme", "check", "detect", "leftovers", "read", "read_kv_scales",
    "read_second_scale", "refuse_leftovers",
]  # fmt: skip

FORMATS: dict[str, ModuleType] = {module.METHOD: module for module in (autoawq, gptq, compressed_tensors, modelopt)}
"""quant_method -> the module that reads it."""

_OLD_FILES = {"quantize_config.json": gptq, "quant_config.json": autoawq}
"""Where AutoGPTQ and AutoAWQ once put what config.json now says."""


def detect(config: Mapping[str, Any], folder: Path) -> Scheme | None:
    """What a checkpoint says of its quantisation, None for a checkpoint that is not quantised.

    Args:
        config: config.json as it stands there.
        folder: the checkpoint.

    Raises:
        InputError: quantised in a way that is not imported, which it names; or a malformed config.
    """
    file = folder / "config.json"
    section = config.get("quantization_config")
    if section is None:
        section = config.get("compression_config")
    if section is not None and not isinstance(section, dict):
        raise refusal(file, f"quantization_config is {printable(repr(section))}, expected a mapping")
    if (folder / modelopt.CONFIG).exists():
        return _modelopt(section, folder)
    if section is not None:
        return _parse(section, file)
    for name, module in _OLD_FILES.items():
        if (folder / name).exists():
            scheme: Scheme = module.parse(read_json(folder / name), folder / name)
            return scheme
    return None


def _parse(section: Mapping[str, Any], file: Path) -> Scheme:
    nested = section.get("quantization_config")
    default = compressed_tensors.METHOD if "config_groups" in section or isinstance(nested, dict) else ""
    method = key(section, "quant_method", str, default, file).lower()
    if method not in FORMATS:
        raise refusal(
            file,
            f"weights quantised by {printable(repr(method))} are not imported (imported are {', '.join(FORMATS)})",
            FROM_ORIGINAL,
        )
    scheme: Scheme = FORMATS[method].parse(section, file)
    return scheme


def _modelopt(section: Mapping[str, Any] | None, folder: Path) -> Scheme:
    """hf_quant_config.json counts, and what config.json says beside it must not contradict it."""
    file = folder / modelopt.CONFIG
    described = key(read_json(file), "quantization", dict, {}, file)
    algo = described.get("quant_algo")
    if section is not None:
        method, other = section.get("quant_method"), section.get("quant_algo")
        if method not in (None, modelopt.METHOD) or (other is not None and other != algo):
            raise refusal(
                file,
                f"says {printable(algo)}, but config.json beside it says {printable(method)} {printable(other)}",
                "download both files again, from the same checkpoint",
            )
    return modelopt.parse(described, file)


def check(module: str, scheme: Scheme, tensors: Tensors, reader: Reader) -> LinearFormat | None:
    """The format of a module, after a look at its tensors' headers; None: its plain `weight` counts.

    Args:
        module: name of a linear, `model.layers.0.mlp.up_proj`.

    Raises:
        InputError: a tensor is missing, or is not what the config says; names it.
    """
    found: LinearFormat | None = FORMATS[scheme.method].check(module, scheme, tensors, reader)
    return found


def read(module: str, scheme: Scheme, tensors: Tensors, reader: Reader) -> IntegerWeight | Float8Weight | None:
    """The weight of a module, whose `dequantize` gives (code - zero) * scale of the file to the bit; None: its plain
    `weight` counts.

    Raises:
        InputError: as `check`; a scale that is no finite number; zero points that cannot be told.
    """
    weight: IntegerWeight | Float8Weight | None = FORMATS[scheme.method].read(module, scheme, tensors, reader)
    return weight


def read_second_scale(module: str, scheme: Scheme, tensors: Tensors, reader: Reader) -> float | None:
    """W4A8's second scale of a module (see `modelopt.read_second_scale`), None in all other formats."""
    if scheme.method != modelopt.METHOD:
        return None
    return modelopt.read_second_scale(module, scheme, tensors, reader)


def read_kv_scales(attention: str, scheme: Scheme, tensors: Tensors, reader: Reader) -> tuple[float, float] | None:
    """The scales of keys and values in the cache (real = stored * scale), None where the files have none.

    Args:
        attention: name of an attention module, `model.layers.0.self_attn`.

    Raises:
        InputError: only one is there, or is no finite number.
    """
    if scheme.method == modelopt.METHOD:
        return modelopt.read_kv_scales(attention, scheme, tensors, reader)
    if scheme.method == compressed_tensors.METHOD:
        return compressed_tensors.read_kv_scales(attention, scheme, tensors, reader)
    return None


def leftovers(scheme: Scheme, tensors: Tensors, modules: Iterable[str]) -> list[str]:
    """Tensors of the quantisation that no module used: a name that nothing reads, so something would be lost.

    Args:
        modules: the linears that were read, and the attention modules whose scales were.
    """
    known = set(modules)
    suffixes = FORMATS[scheme.method].SUFFIXES
    found = []
    for name in tensors:
        owner, _, suffix = name.rpartition(".")
        if suffix in suffixes and owner not in known:
            found.append(name)
    return sorted(found)


def refuse_leftovers(scheme: Scheme, tensors: Tensors, modules: Iterable[str]) -> None:
    """Refuses tensors of the quantisation that no module used.

    Raises:
        InputError: there is one; names it.
    """
    if found := leftovers(scheme, tensors, modules):
        raise InputError(
            f"{tensors[found[0]].path}: tensor '{found[0]}' belongs to no linear of this model ({len(found)} such)",
            "is config.json of the same checkpoint?",
        )
