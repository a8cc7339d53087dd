"""What a weight map is: a table that says, for every TRT-LLM tensor, which Hugging Face tensors it is made of and how
tensor parallelism splits them.

The same table drives conversion, reading back and the reference runtime, so a mistake in it cannot hide in one of
them. Vocabulary follows TensorRT-LLM (docs/source/legacy/architecture/checkpoint.md and
tensorrt_llm/models/llama/convert.py): a column-parallel linear is split along its output features (axis 0 of
`(out_features, in_features)`), a row-parallel one along its input features (axis 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from trtkit.errors import InputError

Split = Literal["replicate", "axis0", "axis1", "kv_heads", "vocab", "embedding"]
"""How a part is divided among the TP ranks.

- `replicate`: every rank holds all of it.
- `axis0`, `axis1`: equal chunks along that axis.
- `kv_heads`: chunks of key/value heads along axis 0; with fewer heads than ranks each head goes to several ranks.
- `vocab`: chunks of ceil(vocabulary / TP) rows, the last ones padded with zero rows.
- `embedding`: as the checkpoint's `use_parallel_embedding` and `embedding_sharding_dim` say: replicate, vocab or axis1.
"""

Stage = Literal["first", "layers", "last"]
"""Which pipeline stages hold a tensor: the first, the one with its layer, or the last."""

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """One Hugging Face tensor within a TRT-LLM tensor.

    Attributes:
        source: Hugging Face name; `{layer}` stands for the layer's number in the whole model.
        shape: extent of each axis, by the names that `sizes` gives.
        split: how TP divides it.
    """

    source: str
    shape: tuple[str, ...]
    split: Split


@dataclass(frozen=True)
class Weight:
    """One TRT-LLM tensor: its parts, one after the other along axis 0, each split on its own.

    Attributes:
        name: TRT-LLM name; `{layer}` stands for the layer's number within its pipeline stage.
        when: whether a model with this checkpoint config has the tensor.
    """

    name: str
    parts: tuple[Part, ...]
    stage: Stage = "layers"
    when: Callable[[Config], bool] = lambda config: True


@dataclass(frozen=True)
class Architecture:
    """A model family.

    Attributes:
        huggingface_names: class names in the `architectures` key of Hugging Face configs.
        checkpoint_config: Hugging Face config (in the spelling of `hf.normalize_config`) -> the model's keys of a
            TRT-LLM config.json. Raises InputError for what TRT-LLM cannot express.
        huggingface_config: the inverse: those keys -> keyword arguments of the transformers config class.
        weights: the weight map.
        ignored: regular expressions of source tensors that hold nothing to convert, such as rotary tables.
    """

    huggingface_names: tuple[str, ...]
    checkpoint_config: Callable[[Config], dict[str, Any]]
    huggingface_config: Callable[[Config], dict[str, Any]]
    weights: tuple[Weight, ...]
    ignored: tuple[str, ...] = ()


def integer(hf: Config, key: str, default: int | None = None) -> int:
    """A positive integer of a Hugging Face config. A missing or null key gives `default`, if there is one.

    Raises:
        InputError: the value is not one; names the key.
    """
    return int(_number(hf, key, default, (int,), "a positive integer"))


def number(hf: Config, key: str, default: float | None = None) -> float:
    """Like `integer`, for a positive number."""
    return float(_number(hf, key, default, (int, float), "a positive number"))


def flag(hf: Config, key: str) -> bool:
    """A boolean of a Hugging Face config, False where it is missing or null.

    Raises:
        InputError: the value is not one; names the key.
    """
    value = hf.get(key)
    if value is not None and not isinstance(value, bool):
        raise _unexpected(key, value, "true or false")
    return bool(value)


def _number(hf: Config, key: str, default: float | None, kinds: tuple[type, ...], wanted: str) -> float:
    value = hf.get(key)
    if value is None and default is not None:
        return default
    if value is None and key not in hf:
        raise InputError(f"config.json: key '{key}' is missing", "download the file again")
    if (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and isinstance(value, kinds)
        and 0 < value < math.inf
    ):
        return value
    raise _unexpected(key, value, wanted)


def _unexpected(key: str, value: Any, wanted: str) -> InputError:
    return InputError(f"config.json: {key} is {value!r}, expected {wanted}", "download the file again")


def sizes(config: Config) -> dict[str, int]:
    """Axis names of `Part.shape` -> extents in elements, from the model's keys of a TRT-LLM config."""
    head = config["head_size"]
    return {
        "vocab": config["vocab_size"],
        "hidden": config["hidden_size"],
        "intermediate": config["intermediate_size"],
        "q": config["num_attention_heads"] * head,
        "kv": config["num_key_value_heads"] * head,
        "head": head,
    }


def replicated(name: str, source: str, *shape: str, stage: Stage = "layers", **options: Any) -> Weight:
    """A tensor that every rank holds whole, such as a norm or a row-parallel bias."""
    return Weight(name, (Part(source, shape, "replicate"),), stage, **options)


def column(name: str, source: str, *shape: str, **options: Any) -> Weight:
    """A column-parallel linear's weight `(out, in)` or bias `(out,)`: split along axis 0."""
    return Weight(name, (Part(source, shape, "axis0"),), **options)


def row(name: str, source: str, *shape: str, **options: Any) -> Weight:
    """A row-parallel linear's weight `(out, in)`: split along axis 1."""
    return Weight(name, (Part(source, shape, "axis1"),), **options)


def fused_qkv(name: str, query: str, key: str, value: str, *rest: str, **options: Any) -> Weight:
    """Query, key and value projections as one tensor `[q; k; v]`, each split by heads before they are joined.

    `rest` names the axes behind the output features: `hidden` for weights, nothing for biases.
    """
    parts = (
        Part(query, ("q", *rest), "axis0"),
        Part(key, ("kv", *rest), "kv_heads"),
        Part(value, ("kv", *rest), "kv_heads"),
    )
    return Weight(name, parts, **options)
