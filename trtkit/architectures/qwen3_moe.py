"""Qwen 3 with experts.

Names and rules: tensorrt_llm/models/qwen/model.py and config.py (see `qwen`); in TRT-LLM since 1.0.
"""

from __future__ import annotations

from typing import Any

from trtkit.architectures import qwen
from trtkit.architectures.rules import Architecture, Config
from trtkit.architectures.settings import integer, must_be


def checkpoint_config(hf: Config) -> dict[str, Any]:
    must_be(hf, "attention_bias", False, False)
    return {
        **qwen.qwen_config(hf, "qwen3_moe", attention_bias=False),
        **qwen.mixture_config(hf),
        **qwen.window_config({**hf, "layer_types": None}, _all_layers),
        "moe_shared_expert_intermediate_size": 0,
    }


def _all_layers(hf: Config) -> list[int]:
    """The layers that have a window: transformers' class does not tell them apart."""
    return list(range(integer(hf, "num_hidden_layers")))


def huggingface_config(config: Config) -> dict[str, Any]:
    return {
        **qwen.huggingface_qwen(config),
        **qwen.huggingface_mixture(config),
        "attention_bias": config["attn_bias"],
        "use_sliding_window": config.get("sliding_window") is not None,
        "sliding_window": config.get("sliding_window"),
    }


ARCHITECTURE = Architecture(
    checkpoint_config=checkpoint_config,
    huggingface_config=huggingface_config,
    weights=qwen.weights(*qwen.ATTENTION, *qwen.HEAD_NORMS, *qwen.EXPERTS),
    sizes=qwen.mixture_sizes,
    stacked=qwen.STACKED,
    ignored=qwen.IGNORED,
    notes="TRT-LLM 1.0 or newer; expert parallelism; every layer must have experts; windows are set at run time",
)
