"""Sources whose tensors are named otherwise, or hold more than weights, become the same checkpoint."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from trtkit import hf
from trtkit.config import CheckpointConfig
from trtkit.convert.conversion import convert
from trtkit.convert.source import plan_conversion

Tensors = dict[str, torch.Tensor]
EMBEDDING = "transformer.word_embeddings.weight"
SIZES = {"vocab_size": 131, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def without_prefix(prefix: str) -> Callable[[Tensors], Tensors]:
    """As saved by the model class without a head."""
    return lambda tensors: {name.removeprefix(prefix): values for name, values in tensors.items()}


def with_buffers(layer: str, *names: str) -> Callable[[Tensors], Tensors]:
    """With the masks and tables that older versions of transformers stored."""
    buffers = {layer.format(index) + name: torch.ones(3) for index in range(2) for name in names}
    return lambda tensors: {**tensors, **buffers}


def with_copy(name: str, of: str) -> Callable[[Tensors], Tensors]:
    """With a stored copy of a tied embedding, as torch's own format holds it."""
    return lambda tensors: {**tensors, name: tensors[of].clone()}


def renamed(pattern: str, replacement: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {re.sub(pattern, replacement, name): values for name, values in tensors.items()}


CASES: dict[str, tuple[dict[str, Any], Callable[[Tensors], Tensors]]] = {
    "gpt2-without-prefix": ({"model_type": "gpt2", **SIZES}, without_prefix("transformer.")),
    "gpt2-masks": ({"model_type": "gpt2", **SIZES}, with_buffers("transformer.h.{}.attn.", "bias", "masked_bias")),
    "gpt2-copy": ({"model_type": "gpt2", **SIZES}, with_copy("lm_head.weight", "transformer.wte.weight")),
    "bloom-without-prefix": ({"model_type": "bloom", **SIZES}, without_prefix("transformer.")),
    "bloom-copy": ({"model_type": "bloom", **SIZES}, with_copy("lm_head.weight", EMBEDDING)),
    "falcon-rotary": (
        {"model_type": "falcon", **SIZES},
        with_buffers("transformer.h.{}.self_attention.maybe_rotary.", "inv_freq"),
    ),
    "falcon-copy": ({"model_type": "falcon", **SIZES}, with_copy("lm_head.weight", EMBEDDING)),
    "opt-without-prefix": ({"model_type": "opt", **SIZES}, without_prefix("model.")),
    "opt-copy": ({"model_type": "opt", **SIZES}, with_copy("lm_head.weight", "model.decoder.embed_tokens.weight")),
    "gpt-neox-buffers": (
        {"model_type": "gpt_neox", **SIZES, "intermediate_size": 128},
        with_buffers("gpt_neox.layers.{}.attention.", "bias", "masked_bias", "rotary_emb.inv_freq"),
    ),
    "gpt-neox-lm-head": (
        {"model_type": "gpt_neox", **SIZES, "intermediate_size": 128},
        renamed(r"^embed_out\.", "lm_head."),
    ),
    "gpt-neox-copy": (
        {"model_type": "gpt_neox", **SIZES, "intermediate_size": 128, "tie_word_embeddings": True},
        with_copy("embed_out.weight", "gpt_neox.embed_in.weight"),
    ),
    "starcoder2-rotary": (
        {"model_type": "starcoder2", **SIZES, "intermediate_size": 48, "num_key_value_heads": 2},
        with_buffers("model.layers.{}.self_attn.rotary_emb.", "inv_freq"),
    ),
}


def to_checkpoint(source: Path, out: Path) -> bytes:
    opened = hf.open_source(source)
    convert(plan_conversion(opened, CheckpointConfig()), opened, out)
    return (out / "rank0.safetensors").read_bytes()


@pytest.mark.parametrize("name", CASES)
def test_other_spellings(name: str, tmp_path: Path) -> None:
    settings, change = CASES[name]
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**settings))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "usual")
    shutil.copytree(tmp_path / "usual", tmp_path / "other")
    file = tmp_path / "other" / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    changed = change(tensors)
    assert changed.keys() != tensors.keys()
    safetensors.torch.save_file(changed, file)

    assert to_checkpoint(tmp_path / "other", tmp_path / "b") == to_checkpoint(tmp_path / "usual", tmp_path / "a")
