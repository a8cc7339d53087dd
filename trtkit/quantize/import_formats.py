"""What a source that somebody else quantised becomes, and what of it nothing can become.

What becomes of the formats of a source (`LinearFormat.quant_algo`):

- int4 without zero points: `int4_awq`. Larger groups are repeated to 128 or 64, the sizes that the kernels have. Where
  no module has factors for its inputs, nor has the checkpoint: with `pre_quant_scale` false TensorRT-LLM's
  WeightOnlyGroupwiseQuantLinear has no such parameter (quantization/layers.py), and ones would cost a multiplication
  for nothing. Where some modules have them, the others get ones.
- int4 with zero points: `int4_gptq`, since of W4A16_AWQ with zero points nobody is known to have run any. Its weights
  lie as the kernel of one GPU generation needs them.
- int8 with quantised inputs: `int8_sq` (one static scale) or `int8_sq_plugin` (each token its own).
- float8: `fp8` (one static scale for the inputs) or `fp8_rowwise` (each token its own). `fp8` has one scale for the
  weights of a linear, so query, key and value must agree on one.
- int8 or float8 weights alone: refused. A checkpoint of W8A16 is in 16 bits, and the build quantises it anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from trtkit import architectures
from trtkit.convert.divisibility import check_divisible, fits, sides
from trtkit.convert.interleave import interleave
from trtkit.convert.quantization import FORMATS, Format, Quantization
from trtkit.convert.source import Layout
from trtkit.convert.support import gpu_generation
from trtkit.errors import InputError
from trtkit.hf import Source
from trtkit.quantize import imports
from trtkit.quantize.import_linears import powers_of_two, shared_scale
from trtkit.quantize.import_modules import Found, Survey
from trtkit.quantize.imports import Scheme
from trtkit.safetensors_io import Reader

_NAMES = {form.quant_algo: form.name for form in FORMATS.values()}
_NOT_EXACT = {
    "W8A16": (
        "int8 weights with 16-bit inputs: TensorRT-LLM quantises such weights itself when it builds an engine, "
        "to other numbers than these",
        "int8_wo",
    ),
    "W8A16_GPTQ": ("int8 weights with zero points or groups, for which trtkit has no checkpoint format", "int8_wo"),
    None: ("float8 weights with inputs that stay in 16 bits or have one scale beside one per channel", "fp8_rowwise"),
}
"""quant_algo that no checkpoint holds exactly -> why, and the format to make of the original model."""


def decide(source: Source, found: Survey, scheme: Scheme, config: Mapping[str, Any], layout: Layout) -> Quantization:
    """How the checkpoint is quantised.

    Args:
        config: its config.json without quantisation.

    Raises:
        InputError: no checkpoint can hold what the source does.
    """
    kv_cache: Any = scheme.kv_cache.lower() if scheme.kv_cache else None
    forms = {each.linear.name: _form(each, scheme) for each in found.quantised}
    if not forms:
        if kv_cache is None:
            raise InputError(
                f"{scheme.file} says that the weights are quantised ({scheme.method}), but no linear's are",
                "is config.json of the same checkpoint?",
            )
        return Quantization(kv_cache=kv_cache)
    main = Counter(form.name for form in forms.values()).most_common(1)[0][0]
    overrides = {name: form.name for name, form in forms.items() if form.name != main}
    exclude = tuple(_excluded(found))
    for form in set(forms.values()):
        if form.linear_wise and (exclude or overrides):
            raise scheme.refuse(
                f"only some linears have inputs with a scale per token, but {form.name} is for whole layers",
                f"convert the original model with --quantization {form.linear_wise}",
            )
    factors = any(f"{module}.pre_quant_scale" in source.tensors for each in found.quantised for module in each.formats)
    base = Quantization(
        main,
        kv_cache=kv_cache,
        exclude=exclude,
        overrides=overrides,
        pre_quant_scale=factors or "w4a8_awq" in (main, *overrides.values()),
    )
    groups = _group_sizes(found, scheme, set(forms.values()))
    if not groups:
        return base
    shapes = sides(config)
    each = [replace(base, group_size=group) for group in groups]
    best = next((q for q in each if fits(q, shapes, layout.tp, ep=layout.ep)), each[-1])
    try:
        check_divisible(best, shapes, layout.tp, ep=layout.ep)
    except InputError as error:  # which advises those who can choose a format
        raise InputError(error.cause, f"use a smaller --tp, or {imports.FROM_ORIGINAL}") from error
    return best


def _form(each: Found, scheme: Scheme) -> Format:
    module, linear_format = next(iter(each.formats.items()))
    algo = linear_format.quant_algo
    if algo in _NOT_EXACT:
        why, instead = _NOT_EXACT[algo]
        raise scheme.refuse(f"'{module}': {why}", f"convert the original model with --quantization {instead}")
    form = FORMATS[_NAMES[str(algo)]]
    if form.import_only and each.linear.experts:
        raise scheme.refuse(f"'{module}': TensorRT-LLM has no int4 with zero points for experts")
    return form


def _excluded(found: Survey) -> Iterator[str]:
    """Patterns of the linears that the source leaves alone: of a kind of which no layer is quantised, or by name."""
    quantised = {each.linear.kind for each in found.quantised}
    kinds = {each.linear.kind for each in found.linears} - quantised
    yield from (f"*.{kind}" for kind in sorted(kinds))
    for each in found.linears:
        if not each.formats and each.linear.kind in quantised:
            yield each.linear.name


def _group_sizes(found: Survey, scheme: Scheme, forms: set[Format]) -> list[int]:
    """The group sizes that the checkpoint can have, the largest first; empty where its formats have no groups."""
    grouped = [form.group_sizes for form in forms if form.group_sizes]
    if not grouped:
        return []
    sizes = {}
    for each in found.quantised:
        for module, linear_format in each.formats.items():
            if linear_format.bits == 4:
                sizes[linear_format.group_size or each.linear.columns] = module
    possible = [group for group in sorted(grouped[0], reverse=True) if all(group in other for other in grouped)]
    fitting = [group for group in possible if all(size % group == 0 for size in sizes)]
    if not fitting:
        size = next(size for size in sorted(sizes) if size % possible[-1])
        raise scheme.refuse(
            f"'{sizes[size]}' has groups of {size} inputs, and TensorRT-LLM's kernels groups of "
            f"{' or '.join(map(str, possible))} only",
            f"quantise it again with group size {possible[0]}, or convert the original model with --quantization",
        )
    return fitting


def check_shared(source: Source, found: Survey, scheme: Scheme, reader: Reader, *, requantize: bool) -> None:
    """Refuses linears of several modules that would have to share what they do not have in common.

    Args:
        requantize: float8 weights may be brought to one scale though that changes values.

    Raises:
        InputError: names the modules.
    """
    for each in found.quantised:
        modules = list(dict.fromkeys(part.module for parts in each.experts for part in parts))
        _check_factors(source, modules, reader, scheme)
        for parts in each.experts:
            modules = list(dict.fromkeys(part.module for part in parts))
            second = {imports.read_second_scale(module, scheme, source.tensors, reader) for module in modules}
            if len(second) > 1:
                raise scheme.refuse(f"{_both(modules)} have different weight_scale_2, but TensorRT-LLM has them in one")
            if len(modules) > 1 and each.formats[modules[0]].quant_algo == "FP8" and not requantize:
                _check_float8(source, modules, reader, scheme)


def _check_factors(source: Source, modules: Sequence[str], reader: Reader, scheme: Scheme) -> None:
    entries = [source.tensors.get(f"{module}.pre_quant_scale") for module in modules]
    if not any(entries) or len(modules) == 1:
        return
    values = [None if entry is None else reader.tensor(entry).astype(np.float32) for entry in entries]
    for module, value in zip(modules, values, strict=True):
        if value is None or values[0] is None or not np.array_equal(value, values[0]):
            raise scheme.refuse(
                f"'{modules[0]}' and '{module}' have different pre_quant_scale, but TensorRT-LLM has one for both"
            )


def _check_float8(source: Source, modules: Sequence[str], reader: Reader, scheme: Scheme) -> None:
    scales = [np.float32(reader.tensor(source.tensors[f"{module}.weight_scale"]).reshape(-1)[0]) for module in modules]
    if len(set(scales)) == 1:
        return
    exact = False
    if powers_of_two(scales):
        weights: Any = [imports.read(module, scheme, source.tensors, reader) for module in modules]
        exact = shared_scale(weights)[1]
    if not exact:
        raise scheme.refuse(
            f"{_both(modules)} have different scales ({', '.join(f'{scale:.4g}' for scale in scales)}), but "
            "TensorRT-LLM has one for both, so that some of their values would have to be rounded again",
            "allow it with --requantize, or convert the original model with --quantization fp8",
        )


def _float8_scale(source: Source, module: str, reader: Reader) -> np.float32:
    return np.float32(reader.tensor(source.tensors[f"{module}.weight_scale"]).reshape(-1)[0])


def _both(modules: Sequence[str]) -> str:
    return f"'{modules[0]}' and '{modules[1]}'"


def target_generation(
    source: Source, quantization: Quantization, config: Mapping[str, Any], layout: Layout, gpu: str | None
) -> int | None:
    """The GPU generation that weights with zero points are laid out for; None where there are none.

    Raises:
        InputError: `gpu` is not given or has no known layout; the format cannot have the model.
    """
    if "int4_gptq" not in quantization.formats:
        return None
    if gpu is None:
        raise InputError(
            f"{source.path}: int4 with zero points becomes W4A16_GPTQ, whose weights lie as one GPU needs them",
            "say which: --gpu H100, or --gpu sm90",
        )
    if config["dtype"] == "float32":
        raise InputError("int4_gptq: TensorRT-LLM runs it in float16 and bfloat16 only", "use --dtype float16")
    sm = gpu_generation(gpu)
    interleave(np.zeros((64, 8), np.int8), 4, 16, sm)  # refuses a GPU whose layout is not known
    if layout.tp > 1:
        _check_biases(quantization, config)
    return sm


def _check_biases(quantization: Quantization, config: Mapping[str, Any]) -> None:
    """TensorRT-LLM's groupwise linears add the bias before the sum over the ranks. Of AWQ the build zeroes it on all
    ranks but the first (modeling_utils.py, preprocess_perlayer_weights), of W4A16_GPTQ not."""
    for weight in architectures.get(config["architecture"]).weights:
        if not weight.name.endswith(("attention.dense.bias", "mlp.proj.bias")) or not weight.when(config):
            continue
        names = [weight.name.format(layer=layer).removesuffix(".bias") for layer in range(config["num_hidden_layers"])]
        if any((form := quantization.format_of(name)) and form.name == "int4_gptq" for name in names):
            raise InputError(
                f"int4_gptq with TP: TensorRT-LLM would add the bias of {names[0]} once per rank",
                "use --tp 1, or convert the original model with --quantization int4_awq",
            )


def cache_notes(source: Source, found: Survey, scheme: Scheme, reader: Reader) -> list[str]:
    """What users should know of a quantised KV cache, a line each.

    Raises:
        InputError: scales are missing that somebody must have measured.
    """
    if scheme.kv_cache is None:
        return []
    lacking = [
        name
        for name in found.attentions.values()
        if imports.read_kv_scales(name, scheme, source.tensors, reader) is None
    ]
    if not lacking:
        return []
    if scheme.kv_cache == "INT8" or len(lacking) < len(found.attentions):
        raise scheme.refuse(
            f"the KV cache is {scheme.kv_cache}, but '{lacking[0]}' has no scales of keys and values",
            "is the download complete? Or convert the original model with --quantization and --kv-cache",
        )
    return ["the source has no scales for its FP8 KV cache: they are taken as 1"]


def mlp_notes(source: Source, found: Survey, reader: Reader) -> list[str]:
    """What users should know of the two halves of gated MLPs in float8, a line."""
    halves: dict[int, set[np.float32]] = {}
    for each in found.quantised:
        if each.linear.kind in ("mlp.fc", "mlp.gate") and not each.linear.experts:
            scales = {
                _float8_scale(source, module, reader)
                for module, linear_format in each.formats.items()
                if linear_format.quant_algo == "FP8"
            }
            halves.setdefault(each.linear.layer, set()).update(scales)
    if all(len(scales) < 2 for scales in halves.values()):
        return []
    return [
        "mlp.fc and mlp.gate keep scales of their own: give trtllm-build --use_fused_mlp disable, or it rounds one of "
        "them to the other's scale"
    ]


def dtype_notes(source: Source, found: Survey, dtype: str) -> list[str]:
    """What users should know of int4 scales in another 16-bit dtype than the checkpoint's, a line."""
    modules = [module for each in found.quantised for module, given in each.formats.items() if given.bits == 4]
    suffixes = ("scales", "weight_scale")
    stored = {
        source.tensors[name].dtype.name
        for name in (f"{module}.{suffix}" for module in modules for suffix in suffixes)
        if name in source.tensors
    }
    if dtype == "bfloat16" and "float16" in stored:
        return ["the scales are float16, which bfloat16 rounds: --dtype float16 keeps them"]
    return []
