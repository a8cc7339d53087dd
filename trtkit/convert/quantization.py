"""Formats of quantised checkpoints, what a user asks for, and the `quantization` dict of config.json that says so.

Sources: TensorRT-LLM, tensorrt_llm/quantization/{mode,quantize,layers}.py and tensorrt_llm/models/modeling_utils.py
(QuantConfig, preprocess_weights); Model-Optimizer 0.47, modelopt/torch/export/quant_utils.py
(process_layer_quant_config), which writes the same keys.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from trtkit.errors import InputError
from trtkit.untrusted import printable

Inputs = Literal["16 bits", "int8 per tensor", "int8 per token", "fp8 per tensor", "fp8 per token"]
"""A linear's inputs: not quantised, with one calibrated scale, or with a scale of each token's own."""

KVCache = Literal["int8", "fp8"]


@dataclass(frozen=True)
class Format:
    """A way to quantise linears.

    Attributes:
        name: what users call it.
        quant_algo: what TensorRT-LLM calls it.
        weights: what the weights become, for people.
        bits: of a weight.
        inputs: how activations are quantised.
        calibrated: whether activations must be seen first.
        group_sizes: inputs that may share a scale, the default first; empty for a scale per output channel or tensor.
        multiple: TensorRT-LLM rounds both sides of a linear up to a multiple of this (of the group size, where that is
            larger) times TP, and then refuses the smaller tensors of the file (tensorrt_llm/quantization/layers.py).
        linear_wise: for a format where TensorRT-LLM swaps whole attention and MLP blocks and the norms before them
            (tensorrt_llm/quantization/quantize.py), so that no linear can be left out: the nearest that does not.
        import_only: trtkit reads it, but makes no new ones: the weights lie as one GPU generation needs them.
    """

    name: str
    quant_algo: str
    weights: str
    bits: int
    inputs: Inputs = "16 bits"
    calibrated: bool = False
    group_sizes: tuple[int, ...] = ()
    multiple: int = 1
    linear_wise: str = ""
    import_only: bool = False

    @property
    def weight_only(self) -> bool:
        """The checkpoint holds plain weights, which trtllm-build quantises."""
        return self.quant_algo in ("W8A16", "W4A16")


_CHANNEL = "a scale per output channel"
_GROUP = "a scale per group of inputs"
# Group sizes: the kernels have 64 and 128 only (TensorRT-LLM issues 988 and 1547), and of W4A8_AWQ with 64
# Model-Optimizer's export raises NotImplementedError.
_FORMATS = (
    Format("int8_wo", "W8A16", f"int8, {_CHANNEL}", 8, multiple=64),
    Format("int4_wo", "W4A16", f"int4, {_CHANNEL}", 4, multiple=64),
    Format("int4_awq", "W4A16_AWQ", f"int4, {_GROUP}", 4, "16 bits", True, (128, 64), 64),
    Format("w4a8_awq", "W4A8_AWQ", f"int4, {_GROUP}", 4, "fp8 per tensor", True, (128,), 128),
    Format("int8_sq", "W8A8_SQ_PER_CHANNEL", f"int8, {_CHANNEL}", 8, "int8 per tensor", True),
    Format("int8_sq_plugin", "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", f"int8, {_CHANNEL}", 8, "int8 per token", True,
           linear_wise="int8_sq"),
    Format("fp8", "FP8", "fp8 e4m3, one scale", 8, "fp8 per tensor", True),
    Format("fp8_rowwise", "FP8_PER_CHANNEL_PER_TOKEN", f"fp8 e4m3, {_CHANNEL}", 8, "fp8 per token", linear_wise="fp8"),
    Format("int4_gptq", "W4A16_GPTQ", f"int4 with zero points, {_GROUP}", 4, "16 bits", False, (128, 64), 64,
           import_only=True),
)  # fmt: skip

FORMATS = {form.name: form for form in _FORMATS}
"""Name -> format."""

DEFAULT_EXCLUDE = (
    "*lm_head", "*router", "*vocab_embedding", "*position_embedding", "*block_embedding", "*shared_expert_gate",
)  # fmt: skip
"""What TensorRT-LLM leaves alone where `exclude_modules` is null. A list replaces these, so every list repeats them."""

_BY_ALGO = {form.quant_algo: form for form in _FORMATS}
_MIXED = "MIXED_PRECISION"
_NO_PATTERNS = {*DEFAULT_EXCLUDE, "*fused_a", "*ln_f", "*ln_embed", "lm_head"}
"""What a list may name although trtkit never quantises it."""
_KEYS = {
    "quant_algo", "kv_cache_quant_algo", "group_size", "has_zero_point", "pre_quant_scale", "exclude_modules",
    "smoothquant_val", "clamp_val", "use_meta_recipe",
}  # fmt: skip
_PLACE = "config.json: quantization"
_REPAIR = "repair it, or quantise the source anew"


@dataclass(frozen=True)
class Quantization:
    """What a user asks for, in one spelling: equal requests are equal. Raises InputError for what no checkpoint says.

    Attributes:
        format: a name in FORMATS; None leaves the weights as they are.
        group_size: inputs that share a scale; None takes the format's default and stays None where it has no groups.
        kv_cache: dtype of the KV cache; None keeps the model's.
        exclude: patterns (fnmatch) of TRT-LLM module names to leave alone, beyond DEFAULT_EXCLUDE.
        overrides: TRT-LLM module name such as `transformer.layers.3.mlp.proj` -> the format of that linear, whatever
            the patterns say.
        zero_point: groups have zero points (only int4_awq, from asymmetric sources; then no pre_quant_scale).
        pre_quant_scale: linears have a `prequant_scaling_factor` for their inputs (AWQ formats).
        clamp: limits of the inputs (only fp8_rowwise).
    """

    format: str | None = None
    group_size: int | None = None
    kv_cache: KVCache | None = None
    exclude: tuple[str, ...] = ()
    overrides: Mapping[str, str] = field(default_factory=dict)
    zero_point: bool = False
    pre_quant_scale: bool = True
    clamp: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.format is None and (self.overrides or self.exclude):
            raise InputError("linears were named to be treated otherwise, but no format was given", "give a format")
        if self.kv_cache not in (None, *get_args(KVCache)):
            raise InputError(f"no KV cache '{printable(str(self.kv_cache))}'", "use int8 or fp8")
        patterns = [pattern.removesuffix(".weight") for pattern in self.exclude]
        if not all(patterns):
            raise InputError("an empty pattern in exclude", "remove it")
        exclude = tuple(dict.fromkeys(pattern for pattern in patterns if pattern not in _NO_PATTERNS))
        object.__setattr__(self, "exclude", exclude)
        others = {
            module: name
            for module, name in sorted(self.overrides.items())
            if name != self.format or _matches(module, exclude)
        }
        object.__setattr__(self, "overrides", others)
        self._check_blocks()
        object.__setattr__(self, "group_size", self._group_size())
        if (self.zero_point and self.formats != ("int4_awq",)) or (self.clamp and self.format != "fp8_rowwise"):
            cause = f"{', '.join(self.formats) or 'no format'} has neither zero points nor clamped inputs"
            raise InputError(cause, "int4_awq can have zero points, fp8_rowwise clamped inputs")
        if self.zero_point or not any(name.endswith("_awq") for name in self.formats):
            object.__setattr__(self, "pre_quant_scale", not self.zero_point)

    @property
    def formats(self) -> tuple[str, ...]:
        """The names of all formats in it, the main one first."""
        return tuple(dict.fromkeys(name for name in (self.format, *self.overrides.values()) if name))

    @property
    def makes_tensors(self) -> bool:
        """Whether a checkpoint has quantised tensors, rather than plain weights that are quantised when it is used."""
        return self.kv_cache is not None or any(not get(name).weight_only for name in self.formats)

    @property
    def needs_calibration(self) -> bool:
        """Whether activations must be seen to make them."""
        return self.kv_cache is not None or any(get(name).calibrated for name in self.formats)

    @property
    def mixed(self) -> bool:
        return bool(self.overrides)

    def format_of(self, module: str) -> Format | None:
        """The format of a linear, by its TRT-LLM module name; None for one that is left alone."""
        if module in self.overrides:
            return get(self.overrides[module])
        if self.format is None or _matches(module, (*DEFAULT_EXCLUDE, *self.exclude)):
            return None
        return get(self.format)

    def _check_blocks(self) -> None:
        for form in map(get, self.formats):
            if form.linear_wise and (self.exclude or self.overrides):
                raise InputError(
                    f"{form.name} quantises whole attention and MLP blocks: no linear can be left out or be different",
                    f"drop the patterns and other formats, or use {form.linear_wise}",
                )

    def _group_size(self) -> int | None:
        grouped = [form for form in map(get, self.formats) if form.group_sizes]
        if not grouped and self.group_size is not None:
            names = ", ".join(name for name, form in FORMATS.items() if form.group_sizes)
            raise InputError(f"group size {self.group_size} for {self.format}, which has no groups", f"use {names}")
        for form in grouped:
            if self.group_size is not None and self.group_size not in form.group_sizes:
                fitting = " or ".join(map(str, form.group_sizes))
                raise InputError(f"{form.name} has no groups of {self.group_size}", f"use group size {fitting}")
        return self.group_size or (grouped[0].group_sizes[0] if grouped else None)


def _matches(module: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(module, pattern) for pattern in patterns)


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known[:12])}"


def get(name: str) -> Format:
    """The format of a name.

    Raises:
        InputError: there is none; names near ones.
    """
    if name not in FORMATS:
        raise InputError(f"no format '{printable(name)}'", _near(name, list(FORMATS)))
    return FORMATS[name]


def quantization_config(q: Quantization) -> dict[str, Any]:
    """`quantization` of a TRT-LLM checkpoint's config.json. TensorRT-LLM knows these keys and fails on any other.

    Of mixed precision it says only that much: what each linear is stands in `layers_config`.
    """
    algo = _MIXED if q.mixed else FORMATS[q.format].quant_algo if q.format else None
    config: dict[str, Any] = {"quant_algo": algo, "kv_cache_quant_algo": q.kv_cache.upper() if q.kv_cache else None}
    if q.mixed or q.format is None:
        return config
    config.update(_details(q, FORMATS[q.format]))
    if q.exclude:
        patterns = [*DEFAULT_EXCLUDE, *q.exclude]
        if FORMATS[q.format].weight_only:
            # Two things read them: one swaps modules by their names, the other quantises weights by theirs.
            patterns += [f"{pattern}.weight" for pattern in patterns if not pattern.endswith("*")]
        config["exclude_modules"] = patterns
    return config


def layers_config(q: Quantization, modules: Iterable[str]) -> dict[str, Any]:
    """quant_cfg.json beside the config.json of mixed precision: the format of every linear, by its exact name.

    Args:
        modules: TRT-LLM names of all linears that could be quantised.

    Raises:
        InputError: `q.overrides` names a linear that the model does not have.
    """
    found = list(modules)
    for module in q.overrides:
        if module not in found:
            cause = f"a format was given for '{printable(module)}', which is no linear of this model"
            raise InputError(cause, _near(module, found))
    forms = {module: form for module in found if (form := q.format_of(module)) is not None}
    layers = {module: {"quant_algo": form.quant_algo, **_details(q, form)} for module, form in forms.items()}
    return {**quantization_config(q), "quantized_layers": layers}


def _details(q: Quantization, form: Format) -> dict[str, Any]:
    """The keys of a format beyond its name: those that Model-Optimizer writes, and `clamp_val`."""
    if form.group_sizes:
        zero = q.zero_point or form.import_only
        scaled = q.pre_quant_scale and not form.import_only
        return {"group_size": q.group_size, "has_zero_point": zero, "pre_quant_scale": scaled}
    return {"clamp_val": list(q.clamp)} if q.clamp and form.name == "fp8_rowwise" else {}


def read_quantization(config: Mapping[str, Any] | None, layers: Mapping[str, Any] | None = None) -> Quantization:
    """The inverse of `quantization_config` and `layers_config`; also reads what TensorRT-LLM and Model-Optimizer write.

    Args:
        config: `quantization` of config.json; None or empty where nothing is quantised.
        layers: the content of quant_cfg.json, for mixed precision.

    Raises:
        InputError: a key or a value that trtkit does not know; names it.
    """
    if config is not None and not isinstance(config, Mapping):
        raise InputError(
            f"{_PLACE} is {printable(repr(config), 60)}, expected a mapping", "repair it, or convert again"
        )
    given = dict(config or {})
    if unknown := sorted(set(given) - _KEYS - {"quantized_layers"}):
        raise InputError(
            f"{_PLACE} has the unknown key '{printable(unknown[0])}'",
            "remove it: TensorRT-LLM refuses it too (up to 0.7 it had other keys: convert again)",
        )
    if given.get("use_meta_recipe"):
        raise InputError(f"{_PLACE}.use_meta_recipe: trtkit does not read this recipe", "quantise the source anew")
    algo, kv_cache = given.get("quant_algo"), _kv_cache(given.get("kv_cache_quant_algo"))
    if algo == _MIXED:
        return _read_mixed(layers or given, kv_cache)
    if algo in (None, "NO_QUANT"):
        return Quantization(kv_cache=kv_cache)
    form = _by_algo(algo)
    exclude = given.get("exclude_modules") or []
    if not isinstance(exclude, list) or not all(isinstance(each, str) and each for each in exclude):
        raise InputError(f"{_PLACE}.exclude_modules is no list of names", _REPAIR)
    clamp = _pair(given.get("clamp_val")) if form.name == "fp8_rowwise" else None
    return Quantization(form.name, kv_cache=kv_cache, exclude=tuple(exclude), clamp=clamp, **_read_details(form, given))


def _read_mixed(layers: Mapping[str, Any], kv_cache: KVCache | None) -> Quantization:
    table = layers.get("quantized_layers")
    if not isinstance(table, dict) or not table or not all(isinstance(each, dict) for each in table.values()):
        raise InputError(
            f"{_PLACE} says {_MIXED}, but no quantized_layers say which linear is what",
            "put quant_cfg.json beside config.json",
        )
    forms = {module: _by_algo(entry.get("quant_algo")) for module, entry in table.items()}
    details = [_read_details(forms[module], entry) for module, entry in table.items() if forms[module].group_sizes]
    if any(each != details[0] for each in details):
        raise InputError("quant_cfg.json: linears of differing group sizes", "quantise the source anew, with one size")
    main = Counter(form.name for form in forms.values()).most_common(1)[0][0]
    overrides = {module: form.name for module, form in forms.items()}
    # What the table does not name is not quantised.
    shared = details[0] if details else {}
    return Quantization(main, kv_cache=kv_cache, exclude=("*",), overrides=overrides, **shared)


def _read_details(form: Format, given: Mapping[str, Any]) -> dict[str, Any]:
    if not form.group_sizes:
        return {}
    group = given.get("group_size", 128)
    if group not in form.group_sizes or isinstance(group, bool):
        raise InputError(
            f"{_PLACE}.group_size {printable(str(group))}: {form.quant_algo} has groups of "
            f"{' or '.join(map(str, form.group_sizes))}",
            "quantise the source anew",
        )
    if form.import_only:
        return {"group_size": group}
    flags = {key: given.get(key, False) for key in ("has_zero_point", "pre_quant_scale")}
    for key, value in flags.items():
        if not isinstance(value, bool):
            raise InputError(f"{_PLACE}.{key} is neither true nor false", _REPAIR)
    if all(flags.values()):
        raise InputError(
            f"{_PLACE} has both zero points and pre_quant_scale: trtkit reads either", "quantise the source anew"
        )
    return {"group_size": group, "zero_point": flags["has_zero_point"], "pre_quant_scale": flags["pre_quant_scale"]}


def _by_algo(algo: Any) -> Format:
    if not isinstance(algo, str) or algo not in _BY_ALGO:
        cause = f"{_PLACE}.quant_algo '{printable(str(algo))}' is not one that trtkit knows"
        raise InputError(cause, f"known: {', '.join(_BY_ALGO)}")
    return _BY_ALGO[algo]


def _kv_cache(algo: Any) -> KVCache | None:
    for known in get_args(KVCache):
        if algo == known.upper():
            return known  # type: ignore[no-any-return]
    if algo is None:
        return None
    raise InputError(f"{_PLACE}.kv_cache_quant_algo '{printable(str(algo))}' is neither INT8 nor FP8", "quantise anew")


def _pair(given: Any) -> tuple[float, float] | None:
    if given is None:
        return None
    if not isinstance(given, list) or len(given) != 2 or not all(type(each) in (int, float) for each in given):
        raise InputError(f"{_PLACE}.clamp_val is no pair of numbers", _REPAIR)
    return float(given[0]), float(given[1])
