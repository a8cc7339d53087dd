"""Qwen 3 without experts: each query and key head is normalised, attention has no biases.

Names and rules: tensorrt_llm/models/qwen/model.py and config.py (see `qwen`); in TRT-LLM since 1.0.
"""

from __future__ import annotations

from typing import Any

from trtkit.architectures import qwen
from trtkit.architectures.rules import Architecture, Config
from trtkit.architectures.settings import integer, must_be

_HEAD_DIM = 128
"""What transformers' class takes where the config says nothing, whatever the width and number of heads."""


def checkpoint_config(hf: Config) -> dict[str, Any]:
    must_be(hf, "attention_bias", False, False)
    sized = {**hf, "head_dim": integer(hf, "head_dim", _HEAD_DIM)}
    return {**qwen.qwen_config(sized, "qwen3", attention_bias=False), **qwen.dense_config(hf)}


def huggingface_config(config: Config) -> dict[str, Any]:
    return {
        **qwen.huggingface_qwen(config),
        **qwen.huggingface_window(config),
        "attention_bias": config["attn_bias"],
    }


ARCHITECTURE = Architecture(
    checkpoint_config=checkpoint_config,
    huggingface_config=huggingface_config,
    weights=qwen.weights(*qwen.ATTENTION, *qwen.HEAD_NORMS, *qwen.DENSE),
    ignored=qwen.IGNORED,
    notes="TRT-LLM 1.0 or newer; sliding windows are set at run time",
)
