"""Qwen 1.5 and 2 with experts: every token also goes through a shared expert, scaled by a gate of its own.

Names and rules: tensorrt_llm/models/qwen/convert.py and config.py (see `qwen`), tensorrt_llm/layers/moe.py (SharedMoE).
"""

from __future__ import annotations

from typing import Any

from trtkit.architectures import qwen
from trtkit.architectures.qwen import HF, TRT
from trtkit.architectures.rules import Architecture, Config, joined_columns, replicated, row
from trtkit.architectures.settings import flag, integer

_SHARED_EXPERT = (
    joined_columns(
        f"{TRT}mlp.shared_expert.fc.weight",
        (f"{HF}mlp.shared_expert.up_proj.weight", f"{HF}mlp.shared_expert.gate_proj.weight"),
        "shared",
        "hidden",
    ),
    row(f"{TRT}mlp.shared_expert.proj.weight", f"{HF}mlp.shared_expert.down_proj.weight", "hidden", "shared"),
    replicated(f"{TRT}mlp.shared_expert_gate.weight", f"{HF}mlp.shared_expert_gate.weight", 1, "hidden"),
)
"""Split by TP whatever the expert-parallel size is."""


def checkpoint_config(hf: Config) -> dict[str, Any]:
    return {
        **qwen.qwen_config(hf, "qwen2_moe", attention_bias=flag(hf, "qkv_bias", default=True)),
        **qwen.mixture_config(hf),
        **qwen.window_config(hf, _every_other_layer),
        "moe_shared_expert_intermediate_size": integer(hf, "shared_expert_intermediate_size"),
    }


def _every_other_layer(hf: Config) -> list[int]:
    """The layers that have a window where the config does not list them: every other one before max_window_layers."""
    late = qwen.late_layers(hf)
    return [layer for layer in range(0, integer(hf, "num_hidden_layers"), 2) if layer not in late]


def huggingface_config(config: Config) -> dict[str, Any]:
    return {
        **qwen.huggingface_qwen(config),
        **qwen.huggingface_mixture(config),
        **qwen.huggingface_window(config),
        "qkv_bias": config["attn_bias"],
        "shared_expert_intermediate_size": config["moe_shared_expert_intermediate_size"],
    }


ARCHITECTURE = Architecture(
    checkpoint_config=checkpoint_config,
    huggingface_config=huggingface_config,
    weights=qwen.weights(*qwen.ATTENTION, *qwen.EXPERTS, *_SHARED_EXPERT),
    sizes=qwen.mixture_sizes,
    stacked=qwen.STACKED,
    ignored=qwen.IGNORED,
    notes="expert parallelism; every layer must have experts; sliding windows are set at run time",
)
