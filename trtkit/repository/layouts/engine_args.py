"""`serving.engine_args`: arguments of an engine that no key of the build config stands for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trtkit.errors import InputError

_KEYS = {
    "model": "model.source",
    "revision": "model.revision",
    "trust_remote_code": "model.trust_remote_code",
    "dtype": "checkpoint.dtype",
    "tensor_parallel_size": "checkpoint.tp",
    "pipeline_parallel_size": "checkpoint.pp",
    "moe_expert_parallel_size": "checkpoint.ep",
    "max_batch_size": "serving.max_batch_size",
    "max_num_seqs": "serving.max_batch_size",
    "max_num_tokens": "engine.max_num_tokens",
    "max_seq_len": "engine.max_seq_len",
    "max_model_len": "engine.max_seq_len",
    "max_beam_width": "engine.max_beam_width",
    "gpu_memory_utilization": "serving.kv_cache_free_gpu_mem_fraction",
    "enable_prefix_caching": "serving.enable_kv_cache_reuse",
    "enable_chunked_prefill": "serving.enable_chunked_context",
    "guided_decoding_backend": "serving.guided_decoding_backend",
    "lora_config": "serving.lora",
    "enable_lora": "serving.lora",
    "max_lora_rank": "serving.lora.max_rank",
    "max_loras": "serving.lora.max_loras",
}
"""Argument -> the key of the build config that stands for it."""


def merged(arguments: dict[str, Any], extra: Mapping[str, Any], *, reserved: tuple[str, ...] = ()) -> dict[str, Any]:
    """`arguments` with the extra ones; mappings such as kv_cache_config are joined key by key.

    Raises:
        InputError: an extra argument has a key of its own in the build config, or is one of `reserved`.
    """
    result = dict(arguments)
    for name, value in extra.items():
        place = f"serving.engine_args.{name}"
        if name in reserved:
            raise InputError(f"{place} is written by trtkit", "remove it")
        if name in _KEYS:
            raise InputError(f"{place} has a key of its own", f"set {_KEYS[name]}")
        ours = result.get(name)
        if isinstance(ours, dict) and isinstance(value, dict):
            twice = sorted(set(ours) & set(value))
            if twice:
                raise InputError(f"{place}.{twice[0]} is set by trtkit from a key of its own", "set that key")
            result[name] = {**ours, **value}
        elif name in result:
            raise InputError(f"{place} is written by trtkit", "remove it")
        else:
            result[name] = value
    return result
