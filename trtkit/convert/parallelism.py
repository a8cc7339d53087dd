"""Which TP, PP and expert-parallel sizes a model allows, told from its config and its family's table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trtkit import architectures
from trtkit.architectures.rules import Architecture, sizes
from trtkit.errors import InputError

_CONFIG_KEYS = {
    "intermediate": "intermediate_size",
    "hidden": "hidden_size",
    "moe": "moe_intermediate_size",
    "shared": "shared_expert_intermediate_size",
}


def check_parallelism(config: Mapping[str, Any], architecture: Architecture) -> None:
    """Whether the layout in `config["mapping"]` fits the model.

    Args:
        config: the model's keys of a checkpoint config, with `mapping`.

    Raises:
        InputError: it does not; says which sizes would.
    """
    mapping = config["mapping"]
    tp, pp, ep = mapping["tp_size"], mapping["pp_size"], mapping.get("moe_ep_size", 1)
    if problem := _expert_problem(config, architecture, ep):
        valid = ", ".join(map(str, valid_ep_sizes(config)))
        raise InputError(f"EP {ep} does not fit this model: {problem}", f"valid EP sizes: {valid}")
    if problem := _problem(config, architecture, tp, ep):
        valid = ", ".join(map(str, valid_tp_sizes(config, ep=ep))) or "none"
        and_ep = f" with {ep} expert-parallel groups" if ep > 1 else ""
        raise InputError(f"TP {tp}{and_ep} does not fit this model: {problem}", f"valid TP sizes{and_ep}: {valid}")
    layers = config["num_hidden_layers"]
    if pp > layers:
        raise InputError(f"PP {pp} does not fit this model: it has {layers} layers", f"valid PP sizes: 1 to {layers}")
    if pp > 1 and not architecture.pipeline:
        raise InputError(
            f"TRT-LLM's {config['architecture']} has no pipeline parallelism", "use --pp 1, and TP to spread the model"
        )


def valid_tp_sizes(config: Mapping[str, Any], *, ep: int = 1, limit: int = 64) -> list[int]:
    """TP sizes up to `limit` that the model's heads and widths allow."""
    architecture = architectures.get(config["architecture"])
    return [tp for tp in range(1, limit + 1) if _problem(config, architecture, tp, ep) is None]


def valid_ep_sizes(config: Mapping[str, Any], *, limit: int = 64) -> list[int]:
    """Expert-parallel sizes up to `limit` that divide the model's experts; only 1 for models without experts."""
    experts = config["moe"]["num_experts"] if config.get("moe") else 1
    return [ep for ep in range(1, min(experts, limit) + 1) if experts % ep == 0]


def _expert_problem(config: Mapping[str, Any], architecture: Architecture, ep: int) -> str | None:
    if ep > 1 and not architecture.has_experts:
        return "it has no experts to spread"
    if ep > 1 and config["moe"]["num_experts"] % ep:
        return f"{ep} groups do not divide its {config['moe']['num_experts']} experts"
    return None


def _problem(config: Mapping[str, Any], architecture: Architecture, tp: int, ep: int) -> str | None:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    if heads % tp:
        return f"num_attention_heads {heads} is not a multiple of it"
    if kv_heads % tp and tp % kv_heads:
        return f"num_key_value_heads {kv_heads} is neither a multiple nor a divisor of it"
    if tp % ep:
        return f"{ep} expert-parallel groups do not divide it"
    extents: dict[str, int] = {**sizes(config), **architecture.sizes(config)}
    for weight in architecture.weights:
        if not weight.when(config):
            continue
        ranks = tp // ep if weight.experts else tp
        for part in weight.parts:
            split = part.split
            if split == "embedding" and config.get("use_parallel_embedding") and config.get("embedding_sharding_dim"):
                split = "axis1"
            if split not in ("axis0", "axis1"):
                continue
            name = part.shape[0 if split == "axis0" else 1]
            extent = name if isinstance(name, int) else extents[name]
            if extent % ranks:
                return f"{_CONFIG_KEYS.get(str(name), name)} {extent} is not a multiple of {ranks if ep > 1 else 'it'}"
    return None
