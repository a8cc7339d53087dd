"""What a quantised model is in a ModelOpt-style Hugging Face checkpoint: which module is quantised how, which norm
takes the factors of which linear, and the config files that say so.

Format: Model-Optimizer 0.47, modelopt/torch/export/{unified_export_hf,quant_utils,convert_hf_config}.py. How
TensorRT-LLM reads it: tensorrt_llm/_torch/modules/linear.py, tensorrt_llm/_torch/models/modeling_utils.py
(exclude_modules, formats per layer), tensorrt_llm/_torch/model_config.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from trtkit.convert.linears import Linear, fields, linears
from trtkit.convert.plan import checkpoint_quantization
from trtkit.convert.quantization import Format, Quantization, layers_config, quantization_config
from trtkit.convert.support import LLMAPI, Target, check_support
from trtkit.convert.whole import whole_tensors
from trtkit.errors import InputError

PRODUCER = {"name": "modelopt", "version": "0.47.0"}
"""Readers take this for the name of the format: TensorRT-LLM's AutoDeploy and SGLang refuse any other."""

_MLP_NORMS = ("pre_feedforward_layernorm", "mlp_layernorm", "post_attention_layernorm", "post_layernorm")
"""Names of the norm in front of an MLP, the first that a family has."""
_FUSED = ("attention.qkv", "mlp.fc", "mlp.gate")
_STATIC_FLOAT8 = {"dynamic": False, "num_bits": 8, "type": "float"}
_GROUPS: dict[str, dict[str, Any]] = {
    "FP8": {"input_activations": _STATIC_FLOAT8, "weights": _STATIC_FLOAT8},
    "FP8_PER_CHANNEL_PER_TOKEN": {
        "input_activations": _STATIC_FLOAT8, "weights": {**_STATIC_FLOAT8, "strategy": "channel"},
    },
    "W4A16_AWQ": {"weights": {"dynamic": False, "num_bits": 4, "type": "int"}},
    "W4A8_AWQ": {
        "input_activations": dict(_STATIC_FLOAT8), "weights": {"dynamic": False, "num_bits": 4, "type": "float"},
    },
    "W8A16": {"weights": {"dynamic": False, "num_bits": 8, "type": "int"}},
    "W4A16": {"weights": {"dynamic": False, "num_bits": 4, "type": "int"}},
}  # fmt: skip
"""quant_algo -> its group in config.json, as compressed-tensors describes formats."""


@dataclass(frozen=True)
class Module:
    """A linear of the Hugging Face model that is quantised.

    Attributes:
        name: such as `model.layers.3.mlp.down_proj`.
        layer: number of its decoder layer.
        form: its format.
        linears: the TRT-LLM linears that it holds rows of: two where a source fuses gate and up projection.
        factors: what the file has of the factors per input: its own vector, ones where the norm in front took it, or
            nothing, as the runtime expects of several modules that it fuses.
    """

    name: str
    layer: int
    form: Format
    linears: tuple[Linear, ...]
    factors: Literal["none", "ones", "own"]


class HuggingFaceLayout:
    """What becomes of the model of a TRT-LLM checkpoint's config.json, with its `quantization`.

    Attributes:
        whole: the tensors of the whole model under TensorRT-LLM's names.
        shapes: of the source's tensors.

    Raises:
        InputError: something that the runtime `llmapi` or the format does not have; names it.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.quantization: Quantization = checkpoint_quantization(config)
        self.whole, self.shapes = whole_tensors(config)
        self._linears = list(linears(config))
        self._by_name = {linear.name: linear for linear in self._linears}
        self._check()

    @cached_property
    def modules(self) -> dict[str, Module]:
        """Every quantised module by name, in order of execution."""
        held: dict[str, list[Linear]] = {}
        for linear in self._linears:
            for source in self.sources(linear):
                held.setdefault(source.removesuffix(".weight"), []).append(linear)
        found = {}
        for name, parts in held.items():
            form = self.quantization.format_of(parts[0].name)
            if form is not None:
                factors = self._factors(name, parts)
                found[name] = Module(name, parts[0].layer, form, tuple(parts), factors)
        return found

    @cached_property
    def folded(self) -> dict[str, tuple[Linear, ...]]:
        """TRT-LLM name of a norm's tensor -> the linears whose factors it takes, all the same."""
        found: dict[str, tuple[Linear, ...]] = {}
        for owner, group in self._joined():
            for part in ("weight", "bias"):
                if f"{owner}.{part}" in self.whole:
                    found[f"{owner}.{part}"] = tuple(group)
        return found

    @cached_property
    def excluded(self) -> list[str]:
        """Names of the linears that are not quantised, routers and the output projection included."""
        plain = {linear.name for linear in self._linears if self.quantization.format_of(linear.name) is None}
        known = {linear.name for linear in self._linears}
        found = set()
        for name, tensor in self.whole.items():
            owner = name.removesuffix(".weight")
            inside = 0 < tensor.unit <= self.config["num_hidden_layers"] and len(tensor.shape) > 1
            if inside and (owner in plain or owner not in known):
                found |= {piece.source.removesuffix(".weight") for piece in tensor.pieces}
        tied = bool(self.config.get("tie_word_embeddings"))
        head = self.whole["lm_head.weight"].pieces[0].source.removesuffix(".weight")
        return sorted(found | {"lm_head" if tied else head})

    def sources(self, linear: Linear) -> list[str]:
        """The source tensors that a linear's weight is made of."""
        return list(dict.fromkeys(piece.source for piece in self.whole[f"{linear.name}.weight"].pieces))

    def has_factors(self, linear: Linear) -> bool:
        """Whether the layer's files have a factor per input of it."""
        form = self.quantization.format_of(linear.name)
        own = fields(form, self.quantization, linear.kind) if form else ()
        return any(each.suffix == "prequant_scaling_factor" for each in own)

    def _joined(self) -> Iterator[tuple[str, list[Linear]]]:
        """Linears of several parts that the runtime fuses, with factors; and the norm in front that takes these."""
        for linear in self._linears:
            if not self.has_factors(linear):
                continue
            if linear.kind == "attention.qkv":
                yield f"transformer.layers.{linear.layer}.input_layernorm", [linear]
            elif linear.kind == "mlp.fc" and self._is_fused(linear):
                gate = self._by_name.get(_gate(linear))
                yield self._norm_before_mlp(linear.layer), [linear, *([gate] if gate else [])]

    def _norm_before_mlp(self, layer: int) -> str:
        """The name of the norm whose output the MLP reads; that of attention where they share one."""
        names = [f"transformer.layers.{layer}.{name}" for name in (*_MLP_NORMS, "input_layernorm")]
        return next(name for name in names if f"{name}.weight" in self.whole)

    def _is_fused(self, linear: Linear) -> bool:
        """Whether the runtime makes one linear of it and others, or of its parts, that all read the same norm."""
        return linear.kind in _FUSED and (len(linear.weight.parts) > 1 or _gate(linear) in self._by_name)

    def _factors(self, module: str, linears: Sequence[Linear]) -> Literal["none", "ones", "own"]:
        if not _has_groups(self.quantization, linears[0]):
            return "none"
        if not self._is_fused(linears[0]):
            return "own"
        # The norm took them. One module in the place of several is loaded like any other, and these have a vector.
        parts = sum(len(linear.weight.parts) for linear in linears)
        whole = all(self.sources(linear) == [f"{module}.weight"] for linear in linears)
        return "ones" if whole and parts > 1 else "none"

    def _check(self) -> None:
        architecture, q = self.config["architecture"], self.quantization
        check_support(q, Target(LLMAPI, architecture))
        if q.format is None:
            raise InputError(
                f"runtime {LLMAPI} takes no checkpoint of which only the KV cache is quantised",
                "add a format for the linears, or set the dtype of the KV cache in the runtime's own options",
            )
        if q.zero_point or q.clamp:
            what = "zero points" if q.zero_point else "clamped inputs"
            raise InputError(f"the checkpoints of runtime {LLMAPI} have no {what}", "use runtime tensorrtllm")
        for linear in self._linears:
            self._check_linear(linear)
        for norm, (linear, *_) in self.folded.items():
            layer = linear.layer
            if self._norm_before_mlp(layer) == f"transformer.layers.{layer}.input_layernorm":
                source = self.whole[norm].pieces[0].source
                raise InputError(
                    f"{architecture}: attention and MLP read the same norm '{source}', which cannot take the factors "
                    f"of {q.format_of(linear.name).name} for both",  # type: ignore[union-attr]
                    "use fp8, or runtime tensorrtllm",
                )

    def _check_linear(self, linear: Linear) -> None:
        form = self.quantization.format_of(linear.name)
        gate = self._by_name.get(_gate(linear)) if linear.kind == "mlp.fc" else None
        if gate is not None and self.quantization.format_of(gate.name) != form:
            raise InputError(
                f"'{linear.name}' and '{gate.name}' have different formats, but runtime {LLMAPI} fuses them",
                "give both the same format",
            )
        if form is None:
            return
        whole = self.whole[f"{linear.name}.weight"]
        first = self.sources(linear)[0].removesuffix(".weight")
        if any(piece.transposed for piece in whole.pieces):
            raise InputError(
                f"'{first}' is stored with inputs first, for which runtime {LLMAPI} has no quantised form",
                "use runtime tensorrtllm",
            )
        if form.weight_only and f"{linear.name}.bias" in self.whole:
            # WeightOnlyQuantLinearMethod.apply hands the bias to nobody.
            raise InputError(
                f"'{first}' has a bias, which runtime {LLMAPI} leaves out in {form.name}",
                "use fp8 or int4_awq, or runtime tensorrtllm",
            )
        odd = [name for name in self.sources(linear) if self.shapes[name][0] % 2]
        if form.bits == 4 and odd:
            raise InputError(
                f"'{odd[0]}' has {self.shapes[odd[0]][0]} outputs, of which two share a byte in {form.name}",
                "use a format of 8 bits",
            )


def quantization_files(layout: HuggingFaceLayout) -> dict[str, dict[str, Any]]:
    """hf_quant_config.json, for mixed precision quant_cfg.json, and `quantization_config` for config.json."""
    q = layout.quantization
    described = quantization_config(q)
    described.pop("exclude_modules", None)
    if "pre_quant_scale" in described:
        described["pre_quant_scale"] = True  # where there were none, they are ones
    files: dict[str, dict[str, Any]] = {}
    if q.mixed:
        table = layers_config(q, [linear.name for linear in linears(layout.config)])["quantized_layers"]
        described["quantized_layers"] = {
            module.name: table[module.linears[0].name] for module in layout.modules.values()
        }
        # Where TensorRT-LLM looks for the table; Model-Optimizer writes it into hf_quant_config.json only.
        files["quant_cfg.json"] = dict(described)
    described["exclude_modules"] = layout.excluded
    files["hf_quant_config.json"] = {"producer": PRODUCER, "quantization": described}
    files["quantization_config"] = _inline(described)
    return files


def _inline(described: Mapping[str, Any]) -> dict[str, Any]:
    """`quantization_config` of config.json (convert_hf_config.py, convert_hf_quant_config_format)."""
    algo, inline = described["quant_algo"], dict[str, Any]()
    if algo == "FP8":
        inline["config_groups"] = {"group_0": {**_GROUPS[algo], "targets": ["Linear"]}}
    elif "quantized_layers" in described:
        inline["config_groups"] = _groups(described["quantized_layers"])
        inline["quantized_layers"] = described["quantized_layers"]
    inline |= {"ignore": described["exclude_modules"], "quant_algo": algo}
    if described["kv_cache_quant_algo"] == "FP8":
        inline["kv_cache_scheme"] = dict(_STATIC_FLOAT8)
    return inline | {"producer": PRODUCER, "quant_method": "modelopt"}


def _groups(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    alike: dict[tuple[str, int | None], list[str]] = {}
    for module, entry in layers.items():
        alike.setdefault((entry["quant_algo"], entry.get("group_size")), []).append(module)
    groups = {}
    for index, ((algo, size), names) in enumerate(alike.items()):
        grouped = {} if size is None else {"group_size": size}
        described = {key: {**value, **grouped} for key, value in _GROUPS[algo].items()}
        groups[f"group_{index}"] = {**described, "targets": sorted(names)}
    return groups


def _gate(linear: Linear) -> str:
    return f"transformer.layers.{linear.layer}.mlp.gate"


def _has_groups(quantization: Quantization, linear: Linear) -> bool:
    form = quantization.format_of(linear.name)
    return form is not None and bool(form.group_sizes)
