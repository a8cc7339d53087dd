"""Putting a checkpoint together for transformers takes the memory of its weights once."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from trtkit import hf
from trtkit.checkpoint import Checkpoint
from trtkit.config import CheckpointConfig
from trtkit.convert import readback
from trtkit.convert.conversion import convert
from trtkit.convert.source import plan_conversion
from trtkit.errors import InputError, LacksError

PEAK = """
import sys
from pathlib import Path
import torch, transformers
from trtkit.convert.readback import load_transformers_model

def resident(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024

transformers.Qwen3MoeForCausalLM  # its imports are not what is measured
Path("/proc/self/clear_refs").write_text("5")  # the highest value starts from here
before = resident("VmRSS")
model = load_transformers_model(sys.argv[1])
print(resident("VmHWM") - before, sum(p.numel() for p in model.parameters()) * 4)
"""


def write_checkpoint(folder: Path, hidden: int = 32, vocabulary: int = 131) -> Path:
    """A random mixture of experts on two ranks, in bfloat16."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        moe_intermediate_size=hidden,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=16,
        num_experts_per_tok=2,
    )
    transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "source")
    source = hf.open_source(folder / "source")
    convert(plan_conversion(source, CheckpointConfig(tp=2, dtype="bfloat16")), source, folder / "checkpoint")
    return folder / "checkpoint"


def test_no_tensor_is_kept_beside_its_parameter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = readback.read_tensors
    seen: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def watched(checkpoint: Checkpoint) -> Iterator[tuple[str, Any]]:
        for name, values in read(checkpoint):
            seen.append(weakref.ref(values))
            alive.append(sum(reference() is not None for reference in seen))
            yield name, values

    monkeypatch.setattr(readback, "read_tensors", watched)
    readback.load_transformers_model(write_checkpoint(tmp_path))
    assert len(alive) > 100
    assert max(alive) <= 2


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts the highest memory of a process")
def test_the_highest_memory_is_little_more_than_the_weights(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, hidden=512, vocabulary=2000)
    result = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder)], capture_output=True, text=True, check=True, timeout=120
    )
    highest, weights = map(int, result.stdout.split())
    assert weights > 200e6
    assert highest < 1.4 * weights


def test_tensors_that_the_model_lacks_or_misses_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write_checkpoint(tmp_path)
    read = readback.read_tensors
    lost = "model.layers.1.mlp.experts.3.up_proj.weight"

    def other(checkpoint: Checkpoint) -> Iterator[tuple[str, Any]]:
        for name, values in read(checkpoint):
            if name != lost:
                yield ("model.norm.gain" if name == "model.norm.weight" else name), values

    monkeypatch.setattr(readback, "read_tensors", other)
    with pytest.raises(InputError) as error:
        readback.load_transformers_model(checkpoint)
    for name in (lost, "model.norm.gain", "model.norm.weight"):
        assert name in error.value.cause


def test_transformers_that_are_too_old_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write_checkpoint(tmp_path)
    for version in ("4.48.3", "3.9"):
        monkeypatch.setattr(metadata, "version", lambda package, version=version: version)
        with pytest.raises(LacksError, match=f"transformers {version} is too old") as error:
            readback.load_transformers_model(checkpoint)
        assert "4.57" in error.value.fix
    for version in ("4.57.0", "4.100.1", "5.0.0rc1"):
        monkeypatch.setattr(metadata, "version", lambda package, version=version: version)
        readback.load_transformers_model(checkpoint)


def test_a_config_that_transformers_refuses_is_one_line(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path)
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    config["rotary_scaling"] = {"rope_type": "nothing of the kind", "factor": "large"}
    path.write_text(json.dumps(config))
    with pytest.raises(LacksError, match="makes no Qwen3MoeForCausalLM of the checkpoint") as error:
        readback.load_transformers_model(checkpoint)
    assert "\n" not in error.value.cause
