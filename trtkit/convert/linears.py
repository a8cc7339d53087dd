"""The linears of a model, and which tensors hold each of them in a quantised checkpoint.

A linear is quantised whole, before tensor parallelism splits it: its tensors then have the shapes of a TP 1 checkpoint,
and what each rank takes of them follows from the same table as for plain weights.

Layouts: TensorRT-LLM, tensorrt_llm/quantization/layers.py and modeling_utils.py (preprocess_perlayer_weights);
Model-Optimizer, modelopt/torch/export/model_config.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trtkit import architectures
from trtkit.architectures.rules import Extent, Weight, sizes
from trtkit.convert.quantization import Format, Quantization

Along = Literal["one", "in", "out"]


@dataclass(frozen=True)
class Axis:
    """An axis of a tensor: along the inputs or outputs of its linear, `step` of them per element, or of length 1."""

    along: Along
    step: int = 1


ONE, IN, OUT = Axis("one"), Axis("in"), Axis("out")


@dataclass(frozen=True)
class Field:
    """A tensor that a linear has.

    Attributes:
        suffix: the end of its name.
        dtype: safetensors' spelling; `model` is the checkpoint's dtype.
        axes: what they are along.
        per_expert: a linear of experts has one of it per expert, stacked along a new first axis.
        per_rank: it cannot be split, so it is made for each TP rank from that rank's part of the linear.
        packed: its elements are bits in the guise of numbers.
    """

    suffix: str
    dtype: str
    axes: tuple[Axis, ...]
    per_expert: bool = True
    per_rank: bool = False
    packed: bool = False

    def source(self, linear: str, tp_rank: int) -> str:
        """The name of the tensor that quantisation makes for it (see the module's first lines)."""
        return f"{linear}.{self.suffix}" + (f".tp{tp_rank}" if self.per_rank else "")


@dataclass(frozen=True)
class Linear:
    """A linear that tensor parallelism splits.

    Attributes:
        name: `transformer.layers.{global number}.mlp.fc`.
        layer: number of its layer in the whole model.
        weight: its rule in the family's table.
        rows, columns: output and input features of the whole model.
        experts: how many of them lie in one tensor; 0 where it is not one of experts.
    """

    name: str
    layer: int
    weight: Weight
    rows: int
    columns: int
    experts: int = 0

    @property
    def kind(self) -> str:
        """The name within the layer, such as `mlp.fc`."""
        return self.name.split(".", 3)[3]

    @property
    def row_parallel(self) -> bool:
        """Whether TP splits the inputs."""
        return self.weight.parts[0].split == "axis1"


def is_linear(weight: Weight) -> bool:
    """Whether a rule is that of a linear's weight that TP splits: the ones that quantisation is about."""
    split = {part.split for part in weight.parts} <= {"axis0", "axis1", "kv_heads"}
    return weight.stage == "layers" and split and all(len(part.shape) == 2 for part in weight.parts)


def linears(config: Mapping[str, Any]) -> Iterator[Linear]:
    """The linears of the model of a checkpoint's config.json, in order of execution."""
    architecture = architectures.get(config["architecture"])
    extents: dict[str, int] = {**sizes(config), **architecture.sizes(config)}

    def length(extent: Extent) -> int:
        return extent if isinstance(extent, int) else extents[extent]

    rules = [weight for weight in architecture.weights if is_linear(weight) and weight.when(config)]
    experts = config["moe"]["num_experts"] if architecture.has_experts else 0
    for layer in range(config["num_hidden_layers"]):
        for weight in rules:
            rows = sum(length(part.shape[0]) for part in weight.parts)
            name = weight.name.format(layer=layer).removesuffix(".weight")
            columns = length(weight.parts[0].shape[1])
            yield Linear(name, layer, weight, rows, columns, experts if weight.experts else 0)


def fields(form: Format, quantization: Quantization, kind: str) -> Sequence[Field]:
    """The tensors of a quantised linear; none for weight-only formats, whose plain weight trtllm-build quantises.

    Args:
        kind: `attention.qkv`, `mlp.proj` ... (SmoothQuant's plugin treats them differently).
    """
    group = quantization.group_size or (form.group_sizes[0] if form.group_sizes else 1)
    prequant = Field("prequant_scaling_factor", "model", (IN,), per_expert=False)
    inputs = Field("activation_scaling_factor", "F32", (ONE,), per_expert=False)
    zero = Field("zero", "model", (Axis("in", group), OUT), per_rank=True)
    packed = Field("weight", "I8", (Axis("out", 2), IN))
    grouped = Field("weights_scaling_factor", "F32", (OUT, Axis("in", group)))
    layouts: dict[str, tuple[Field, ...]] = {
        "int8_wo": (),
        "int4_wo": (),
        "int4_awq": (
            packed,
            grouped,
            *((prequant,) if quantization.pre_quant_scale else ()),
            *((zero,) if quantization.zero_point else ()),
        ),
        "w4a8_awq": (
            packed,
            grouped,
            prequant,
            inputs,
            Field("weights_scaling_factor_2", "F32", (ONE,), per_expert=False),
        ),
        "int8_sq": (
            Field("weight", "I8", (OUT, IN)),
            Field("weights_scaling_factor", "F32", (OUT,)),
            prequant,
            inputs,
        ),
        "int8_sq_plugin": (
            Field("weight", "I8", (OUT, IN)),
            Field("per_channel_scale", "F32", (ONE, OUT)),
            *((Field("smoother", "F32", (ONE, IN)),) if kind in SMOOTHERS else ()),
        ),
        "fp8": (Field("weight", "F8_E4M3", (OUT, IN)), Field("weights_scaling_factor", "F32", (ONE,)), inputs),
        "fp8_rowwise": (Field("weight", "F8_E4M3", (OUT, IN)), Field("per_channel_scale", "F32", (OUT,))),
        # Bytes in the order of one GPU's kernel, seen as numbers of the model's dtype.
        "int4_gptq": (
            Field("weight", "model", (IN, Axis("out", 4)), per_rank=True, packed=True),
            Field("weights_scaling_factor", "model", (Axis("in", group), OUT), per_rank=True),
            zero,
        ),
    }
    return layouts[form.name]


SMOOTHERS = ("attention.dense", "mlp.proj")
"""Linears without a norm in front, of which SmoothQuant's plugin divides the inputs at run time."""

SCALED_NORMS = {"input_layernorm": "attention.qkv", "post_layernorm": "mlp.fc"}
"""Norms that SmoothQuant's plugin folds the smoothing of a linear (and of its neighbour `mlp.gate`) into."""


@dataclass(frozen=True)
class LayerTensors:
    """The tensors that stand in a checkpoint for one of the family's table.

    Attributes:
        plain: the table's own tensor is there too, as it is in the source.
        fields: tensors of the quantised linear `owner`.
        whole: further tensors that every rank holds whole: name within the layer, dtype, extents.
    """

    plain: bool = True
    fields: Sequence[Field] = ()
    whole: Sequence[tuple[str, str, tuple[int, ...]]] = ()


def layer_tensors(config: Mapping[str, Any], quantization: Quantization, weight: Weight, layer: int) -> LayerTensors:
    """What a rule of the table becomes in one layer of a quantised checkpoint."""
    owner, _, last = weight.name.format(layer=layer).rpartition(".")
    kind = owner.split(".", 3)[-1]
    if kind in SCALED_NORMS and "int8_sq_plugin" in quantization.formats:
        # The norm's values are the source's divided by the smoothing, so they come from quantisation.
        width = (int(config["hidden_size"]),)
        scale = [(f"{kind}.scale_to_int", "model", (1,))] if last == "weight" else []
        return LayerTensors(plain=False, whole=[(f"{kind}.{last}", "model", width), *scale])
    if not is_linear(weight):
        return LayerTensors()
    form = quantization.format_of(owner)
    own = fields(form, quantization, kind) if form else ()
    cache: Sequence[tuple[str, str, tuple[int, ...]]] = ()
    if kind == "attention.qkv" and quantization.kv_cache:
        cache = (("attention.kv_cache_scaling_factor", "F32", (1,)),)
    return LayerTensors(plain=not own, fields=own, whole=cache)
