"""What a weight map is: a table that says, for every TRT-LLM tensor, which Hugging Face tensors it is made of and how
tensor parallelism splits them.

The same table drives conversion, reading back and the reference runtime, so a mistake in it cannot hide in one of
them. Vocabulary follows TensorRT-LLM (docs/source/legacy/architecture/checkpoint.md and
tensorrt_llm/models/llama/convert.py): a column-parallel linear is split along its output features (axis 0 of
`(out_features, in_features)`), a row-parallel one along its input features (axis 1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Split = Literal["replicate", "axis0", "axis1", "kv_heads", "vocab", "embedding"]
"""How a part is divided among the TP ranks.

- `replicate`: every rank holds all of it.
- `axis0`, `axis1`: equal chunks along that axis.
- `kv_heads`: chunks of key/value heads along axis 0; with fewer heads than ranks each head goes to several ranks.
- `vocab`: chunks of ceil(rows / TP) rows, the last ones padded with zero rows.
- `embedding`: as the checkpoint's `use_parallel_embedding` and `embedding_sharding_dim` say: replicate, vocab or axis1.
"""

Stage = Literal["first", "layers", "last"]
"""Which pipeline stages hold a tensor: the first, the one with its layer, or the last."""

Config = Mapping[str, Any]

Extent = str | int
"""Length of an axis: a name that `sizes` gives, or a number."""


@dataclass(frozen=True)
class Part:
    """One Hugging Face tensor, or a piece of one, within a TRT-LLM tensor.

    Attributes:
        source: Hugging Face name; `{layer}` stands for the layer's number in the whole model, `{expert}` for the
            expert's.
        shape: extents of the part as TRT-LLM orders its axes, `(out_features, in_features)` for linears.
        split: how TP divides it.
        sections: for a source tensor that holds several parts one after the other along axis 0, all their extents ...
        section: ... and which of them this part is. (Phi-3's qkv_proj: `("q", "kv", "kv")`.)
        grouped: for a source tensor whose axis 0 is (key/value heads, query heads per key/value head + 2, head size),
            as Falcon, BLOOM and GPT-NeoX fuse query, key and value: which of the three this part is.
        transposed: the source tensor is stored (in_features, out_features), as GPT-2's are; `sections` are then along
            its last axis.
        plus: added to every value (Gemma's norms, which Hugging Face stores minus one).
    """

    source: str
    shape: tuple[Extent, ...]
    split: Split
    sections: tuple[Extent, ...] = ()
    section: int = 0
    grouped: Literal["", "q", "k", "v"] = ""
    transposed: bool = False
    plus: float = 0.0


@dataclass(frozen=True)
class Weight:
    """One TRT-LLM tensor: its parts, one after the other along axis 0, each split on its own.

    Attributes:
        name: TRT-LLM name; `{layer}` stands for the layer's number within its pipeline stage.
        when: whether a model with this checkpoint config has the tensor.
        experts: the parts are repeated for every expert and stacked along a new first axis. Expert parallelism gives
            each rank a contiguous block of experts; the parts are split by the expert TP size.
        float32: stored in float32 whatever the checkpoint's dtype is (MoE routers).
    """

    name: str
    parts: tuple[Part, ...]
    stage: Stage = "layers"
    when: Callable[[Config], bool] = lambda config: True
    experts: bool = False
    float32: bool = False


@dataclass(frozen=True)
class Stacked:
    """Another layout of a family's weights: all experts of a layer in one tensor (transformers 5 can save so).

    Attributes:
        pattern: regular expression of such a tensor's name, whose axis 0 are the experts.
        names: templates of the names of one expert's tensors, which lie one after the other along axis 1 in equal
            parts; `\\1` stands for the pattern's group, `{expert}` for the expert's number.
    """

    pattern: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Architecture:
    """A model family.

    Attributes:
        checkpoint_config: Hugging Face config (in the spelling of `hf.normalize_config`) -> the model's keys of a
            TRT-LLM config.json. Raises InputError for what TRT-LLM cannot express.
        huggingface_config: the inverse: those keys -> keyword arguments of the transformers config class, with
            `model_type`.
        weights: the weight map.
        sizes: further extents for `Part.shape`, from the model's keys of a TRT-LLM config.
        renames: (regular expression, replacement) pairs that bring other spellings of source tensor names to those in
            `weights`, such as names without the `transformer.` prefix.
        stacked: other layouts of experts.
        ignored: regular expressions of source tensors that hold nothing to convert, such as rotary tables.
        pipeline: whether TRT-LLM's model class can be split into pipeline stages.
        split_embedding: whether TRT-LLM's model class always splits the token embedding along the vocabulary when
            TP > 1.
        notes: what users should know, for `trtkit convert --list`.
    """

    checkpoint_config: Callable[[Config], dict[str, Any]]
    huggingface_config: Callable[[Config], dict[str, Any]]
    weights: tuple[Weight, ...]
    sizes: Callable[[Config], dict[str, int]] = lambda config: {}
    renames: tuple[tuple[str, str], ...] = ()
    stacked: tuple[Stacked, ...] = ()
    ignored: tuple[str, ...] = ()
    pipeline: bool = True
    split_embedding: bool = False
    notes: str = ""

    @property
    def has_experts(self) -> bool:
        return any(weight.experts for weight in self.weights)


def sizes(config: Config) -> dict[str, int]:
    """Names of extents in `Part.shape` -> elements, from the model's keys of a TRT-LLM config."""
    head = config["head_size"]
    return {
        "vocab": config["vocab_size"],
        "hidden": config["hidden_size"],
        "intermediate": config["intermediate_size"],
        "positions": config.get("max_position_embeddings") or 0,
        "q": config["num_attention_heads"] * head,
        "kv": config["num_key_value_heads"] * head,
        "head": head,
    }


def replicated(
    name: str, source: str, *shape: Extent, stage: Stage = "layers", plus: float = 0, **options: Any
) -> Weight:
    """A tensor that every rank holds whole, such as a norm or a row-parallel bias."""
    return Weight(name, (Part(source, shape, "replicate", plus=plus),), stage, **options)


def layer_norm(name: str, source: str, **options: Any) -> tuple[Weight, Weight]:
    """Weight and bias of a norm over the hidden size, which every rank holds whole."""
    return (
        replicated(f"{name}.weight", f"{source}.weight", "hidden", **options),
        replicated(f"{name}.bias", f"{source}.bias", "hidden", **options),
    )


def column(name: str, source: str, *shape: Extent, transposed: bool = False, **options: Any) -> Weight:
    """A column-parallel linear's weight `(out, in)` or bias `(out,)`: split along axis 0."""
    return Weight(name, (Part(source, shape, "axis0", transposed=transposed),), **options)


def row(name: str, source: str, *shape: Extent, transposed: bool = False, **options: Any) -> Weight:
    """A row-parallel linear's weight `(out, in)`: split along axis 1."""
    return Weight(name, (Part(source, shape, "axis1", transposed=transposed),), **options)


def joined_columns(name: str, sources: tuple[str, ...], *shape: Extent, **options: Any) -> Weight:
    """Several column-parallel linears of one shape as one tensor, each split before they are joined.

    TRT-LLM's fused gated MLPs, of experts above all, hold `[up; gate]`.
    """
    return Weight(name, tuple(Part(source, shape, "axis0") for source in sources), **options)


def separate_qkv(name: str, query: str, key: str, value: str, *rest: Extent, **options: Any) -> Weight:
    """Query, key and value projections as one tensor `[q; k; v]`, each split by heads before they are joined.

    `rest` names the axes behind the output features: `hidden` for weights, nothing for biases.
    """
    parts = (
        Part(query, ("q", *rest), "axis0"),
        Part(key, ("kv", *rest), "kv_heads"),
        Part(value, ("kv", *rest), "kv_heads"),
    )
    return Weight(name, parts, **options)


def joined_qkv(name: str, source: str, *rest: Extent, transposed: bool = False, **options: Any) -> Weight:
    """Like `separate_qkv`, from one source tensor that holds `[q; k; v]` (transposed: along its last axis)."""
    shared: dict[str, Any] = {"sections": ("q", "kv", "kv"), "transposed": transposed}
    parts = (
        Part(source, ("q", *rest), "axis0", section=0, **shared),
        Part(source, ("kv", *rest), "kv_heads", section=1, **shared),
        Part(source, ("kv", *rest), "kv_heads", section=2, **shared),
    )
    return Weight(name, parts, **options)


def grouped_qkv(name: str, source: str, *rest: Extent, **options: Any) -> Weight:
    """Like `separate_qkv`, from one source tensor that holds each key/value head beside its query heads."""
    parts = (
        Part(source, ("q", *rest), "axis0", grouped="q"),
        Part(source, ("kv", *rest), "kv_heads", grouped="k"),
        Part(source, ("kv", *rest), "kv_heads", grouped="v"),
    )
    return Weight(name, parts, **options)


def embedding(source: str, **options: Any) -> Weight:
    """The token embedding, on the first pipeline stage."""
    part = Part(source, ("vocab", "hidden"), "embedding")
    return Weight("transformer.vocab_embedding.weight", (part,), "first", **options)


def lm_head(source: str, tied_source: str) -> tuple[Weight, Weight]:
    """The output projection, on the last pipeline stage: its own tensor, or the embedding again where they are tied.

    Always written: a checkpoint without it loads, but TRT-LLM leaves the weights uninitialised in larger layouts.
    """

    def tied(config: Config) -> bool:
        return bool(config.get("tie_word_embeddings"))

    def untied(config: Config) -> bool:
        return not config.get("tie_word_embeddings")

    def weight(name: str, when: Callable[[Config], bool]) -> Weight:
        return Weight("lm_head.weight", (Part(name, ("vocab", "hidden"), "vocab"),), "last", when)

    return weight(source, untied), weight(tied_source, tied)
