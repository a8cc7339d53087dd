"""Qwen 2 and 2.5 without experts.

Names and rules: tensorrt_llm/models/qwen/convert.py and config.py (see `qwen`). Query, key and value have biases, which
Hugging Face's class has without a key for it.
"""

from __future__ import annotations

from typing import Any

from trtkit.architectures import qwen
from trtkit.architectures.rules import Architecture, Config


def checkpoint_config(hf: Config) -> dict[str, Any]:
    return {**qwen.qwen_config(hf, "qwen2", attention_bias=True), **qwen.dense_config(hf)}


def huggingface_config(config: Config) -> dict[str, Any]:
    return {**qwen.huggingface_qwen(config), **qwen.huggingface_window(config)}


ARCHITECTURE = Architecture(
    checkpoint_config=checkpoint_config,
    huggingface_config=huggingface_config,
    weights=qwen.weights(*qwen.ATTENTION, *qwen.DENSE),
    ignored=qwen.IGNORED,
    notes="sliding windows are set at run time",
)
