"""The quantisation config of compressed-tensors: groups of targets, each with the settings of its linears.

Format (vllm-project/compressed-tensors, src/compressed_tensors/quantization: quant_config.py, quant_scheme.py and
quant_args.py, whose defaults and inferred strategies are repeated here).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from trtkit.quantize.imports.patterns import UnsupportedPatternError, compiled
from trtkit.quantize.imports.scheme import (
    FROM_ORIGINAL,
    LinearFormat,
    Scheme,
    group_size,
    key,
    names,
    one_of,
    refusal,
)
from trtkit.untrusted import printable

_PACKED, _INT, _FLOAT, _NAIVE = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"
_MIXED = "mixed-precision"
_FORMATS = (_PACKED, _INT, _FLOAT, _NAIVE)

Inputs = tuple[Literal["static", "dynamic"] | None, Literal["int8", "float8"] | None]


def parse(method: str, config: Mapping[str, Any], file: Path) -> Scheme:
    """What a quantisation config says.

    Raises:
        InputError: something that is not imported, or a malformed key.
    """
    if isinstance(config.get("quantization_config"), dict):  # the nesting of compression_config
        config = {**config, **config["quantization_config"]}
    if key(key(config, "sparsity_config", dict, {}, file), "format", str, "dense", file) != "dense":
        raise refusal(file, "a sparse checkpoint (sparsity_config) is not one that trtkit imports")
    if key(config, "transform_config", dict, {}, file).get("config_groups"):
        raise refusal(file, "a checkpoint with rotated weights (transform_config) is not one that trtkit imports")
    one_of(
        key(config, "quantization_status", str, "compressed", file), ("compressed",), "quantization_status", file,
        "save it compressed (save_pretrained with save_compressed=True), or " + FROM_ORIGINAL,
    )  # fmt: skip
    packing = one_of(
        key(config, "format", str, "fakequant", file), (*_FORMATS, _MIXED), "compressed-tensors' format", file
    )
    targets: dict[str, LinearFormat] = {}
    groups = key(config, "config_groups", dict, {}, file)
    for group in groups:
        section = key(groups, group, dict, {}, file)
        linear = _linear(section, packing, file)
        for target in names(section, "targets", file):
            targets[_target(target, file)] = linear
    if not targets:
        raise refusal(file, "compressed-tensors without config_groups says nothing of its linears")
    ignored = names(config, "ignore", file)
    for pattern in ignored:
        _check_pattern(pattern, file)
    ordered = sorted(targets, key=lambda target: (target == "*", "re:" in target, target))
    pairs = tuple((target, targets[target]) for target in ordered)
    return Scheme(method, file, pairs, ignored, _kv_cache(config, file))


def _target(target: str, file: Path) -> str:
    """A target, "*" for the class of all linears."""
    if target == "Linear":
        return "*"
    if target[:1].isupper():  # names of modules are lower case, names of classes are not
        raise refusal(file, f"targets of class {printable(target)} cannot be told from the files (only Linear can)")
    _check_pattern(target, file)
    return target


def _check_pattern(pattern: str, file: Path) -> None:
    if pattern.startswith("re:"):
        try:
            compiled(pattern[3:])
        except UnsupportedPatternError as error:
            raise refusal(
                file,
                f"the pattern {printable(repr(pattern))} is more than trtkit matches ({error})",
                "write the names of the modules in its place, which loads the same everywhere",
            ) from error


def _linear(section: Mapping[str, Any], packing: str, file: Path) -> LinearFormat:
    packing = one_of(key(section, "format", str, packing, file), _FORMATS, "compressed-tensors' format", file)
    if section.get("output_activations") is not None:
        raise refusal(file, "compressed-tensors with quantised outputs (output_activations) is not imported")
    weights = key(section, "weights", dict, {}, file)
    if not weights:
        raise refusal(file, "compressed-tensors with quantised inputs alone is not imported")
    kind = _kind(weights, file)
    bits = one_of(key(weights, "num_bits", int, 8, file), (4, 8) if packing == _PACKED else (8,), "num_bits", file)
    if weights.get("dynamic"):
        raise refusal(file, "weights with dynamic scales are not imported")
    _refuse_order(weights.get("actorder"), file)
    strategy = _strategy(weights, file)
    symmetric = key(weights, "symmetric", bool, True, file)
    inputs, input_kind = _inputs(key(section, "input_activations", dict, {}, file), kind, file)
    if packing == _PACKED:
        one_of(kind, ("int",), f"{_PACKED} of type", file)
        one_of(strategy, ("group", "channel"), f"{_PACKED} with one scale per", file)
        if inputs is not None:
            raise refusal(file, f"{_PACKED} weights of {bits} bits with quantised inputs are not imported")
    else:
        one_of(strategy, ("channel", "tensor"), f"{packing} with one scale per", file)
        if not symmetric:
            raise refusal(file, f"{packing} weights with zero points are not imported")
        if packing in (_INT, _FLOAT) and kind != {_INT: "int", _FLOAT: "float8"}[packing]:
            raise refusal(file, f"{packing} holds no weights of type {kind}")
    size = None
    if strategy == "group":
        size = group_size(key(weights, "group_size", int, 0, file), file)[1]
    return LinearFormat(kind, bits, strategy, size, symmetric, inputs, input_kind)


def _kind(args: Mapping[str, Any], file: Path) -> Literal["int", "float8"]:
    kind = one_of(key(args, "type", str, "int", file).lower(), ("int", "float"), "type", file)
    if kind == "int":
        return "int"
    bits = key(args, "num_bits", int, 8, file)
    if bits != 8 or args.get("scale_dtype") == "torch.uint8":
        blocks = "with blocks of scales (nvfp4, mxfp4, mxfp8)"
        raise refusal(file, f"floats of {printable(bits)} bits {blocks} are not imported")
    return "float8"


def _strategy(args: Mapping[str, Any], file: Path) -> Literal["tensor", "channel", "group"]:
    size = key(args, "group_size", int, 0, file)
    inferred = "tensor" if size == 0 else "channel" if size == -1 else "group"
    strategy = key(args, "strategy", str, inferred, file).lower()
    for known in ("tensor", "channel", "group"):
        if strategy == known:
            return known
    known_ones = "tensor, channel and group are"
    raise refusal(file, f"one scale per {printable(strategy)} of a weight is not imported ({known_ones})")


def _refuse_order(order: Any, file: Path) -> None:
    """In the order "weight", or "static", columns stay where they are."""
    if order not in (None, False, "weight", "static"):
        raise refusal(
            file,
            f"actorder {printable(order)}: the inputs of a group do not lie together",
            "quantise it again with actorder 'weight', or " + FROM_ORIGINAL,
        )


def _inputs(args: Mapping[str, Any], weights: str, file: Path) -> Inputs:
    if not args:
        return None, None
    kind = _kind(args, file)
    if kind != weights or key(args, "num_bits", int, 8, file) != 8:
        raise refusal(file, f"{weights} weights with inputs of type {kind} are not imported")
    if not key(args, "symmetric", bool, True, file):
        raise refusal(file, "inputs with zero points (symmetric false) are not imported")
    dynamic = args.get("dynamic") or False
    if not isinstance(dynamic, bool):
        raise refusal(file, f"inputs that are dynamic {printable(dynamic)} are not imported")
    strategy = key(args, "strategy", str, "token" if dynamic else "tensor", file).lower()
    one_of(strategy, ("token",) if dynamic else ("tensor",), "inputs with one scale per", file)
    return "dynamic" if dynamic else "static", "int8" if kind == "int" else "float8"


def _kv_cache(config: Mapping[str, Any], file: Path) -> Literal["FP8", "INT8"] | None:
    args = key(config, "kv_cache_scheme", dict, {}, file)
    if not args:
        return None
    inputs, kind = _inputs(args, _kind(args, file), file)
    if inputs != "static":
        raise refusal(file, "a KV cache with dynamic scales (kv_cache_scheme) is not imported")
    return "FP8" if kind == "float8" else "INT8"
