"""Samples for the tests of `trtkit inspect`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers

from trtkit import hf
from trtkit.convert.conversion import Options, convert
from trtkit.convert.source import Layout, plan_conversion


def to_checkpoint(source: Path, out: Path, *, checksum: bool = True, **layout: Any) -> Path:
    opened = hf.open_source(source)
    convert(plan_conversion(opened, Layout(**layout)), opened, out, options=Options(checksum=checksum, sync=False))
    return out


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = safetensors.torch.load_file(file)
    change(state)
    safetensors.torch.save_file(state, file)


def mixtral(folder: Path) -> tuple[Path, int, int]:
    """A tiny Mixtral, its parameters, and those of a token that goes through 2 of its 4 experts."""
    config = transformers.MixtralConfig(
        vocab_size=131, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).to(torch.float16)
    model.save_pretrained(folder)
    total = sum(parameter.numel() for parameter in model.parameters())
    return folder, total, total - 3 * 2 * (3 * 32 * 48)


def engine_of(folder: Path, *, tp: int = 1, ranks: int = 1, **build: Any) -> Path:
    """An engine as trtllm-build's config.json describes it, with stand-ins for the engines themselves."""
    folder.mkdir()
    config = {
        "version": "1.2.1",
        "pretrained_config": {
            "architecture": "LlamaForCausalLM", "dtype": "float16", "vocab_size": 2048, "hidden_size": 192,
            "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_size": 24,
            "max_position_embeddings": 512, "rotary_scaling": {"type": "linear", "factor": 2.0},
            "mapping": {"world_size": tp, "tp_size": tp, "pp_size": 1, "rank": 0},
            "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "group_size": 128},
        },
        "build_config": {
            "max_batch_size": 8, "max_input_len": 256, "max_seq_len": 512, "max_num_tokens": 2048,
            "max_beam_width": 1, "kv_cache_type": "PAGED",
            "plugin_config": {"dtype": "float16", "gemm_plugin": "auto", "nccl_plugin": None, "moe_plugin": "float16"},
            **build,
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    for rank in range(ranks):
        (folder / f"rank{rank}.engine").write_bytes(b"engine" * (rank + 1))
    return folder
