"""A small checkpoint, and stand-ins for trtllm-build and docker in front of everything else on PATH."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

HERE = Path(__file__).parent
IMAGE = "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3"


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """`make_checkpoint(tp=1, pp=1, architecture=...)` writes a checkpoint with two tensors per rank."""

    def make(*, tp: int = 1, pp: int = 1, architecture: str = "LlamaForCausalLM", name: str = "checkpoint") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        config = {
            "architecture": architecture, "dtype": "float16", "vocab_size": 8, "hidden_size": 4,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_size": 2,
            "intermediate_size": 8, "max_position_embeddings": 16,
            "mapping": {"world_size": tp * pp, "tp_size": tp, "pp_size": pp},
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
        for rank in range(tp * pp):
            tensors = {"lm_head.weight": np.full((8, 4), rank, np.float16), "ln_f.weight": np.ones(4, np.float16)}
            save_file(tensors, folder / f"rank{rank}.safetensors")
        return folder

    return make


class StandIns:
    """What the stand-ins play and what they saw."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.bin, self.containers = folder, folder / "bin", folder / "containers"
        self._monkeypatch = monkeypatch
        self.bin.mkdir(parents=True)
        self.containers.mkdir()
        for program in ("trtllm-build", "docker"):
            source = HERE / f"standin_{program.replace('-', '_')}.py"
            (self.bin / program).write_text(f'#!/bin/sh\nexec "{sys.executable}" "{source}" "$@"\n')
            (self.bin / program).chmod(0o755)
        self.set(PATH=f"{self.bin}{os.pathsep}{os.environ['PATH']}")
        self.set(STANDIN_VERSION="1.2.1", STANDIN_IMAGES=IMAGE, STANDIN_CONTAINERS=str(self.containers))
        self.set(STANDIN_PIDS=str(folder / "pids"), STANDIN_SEEN=str(folder / "seen"))

    def set(self, **variables: str) -> None:
        for name, value in variables.items():
            self._monkeypatch.setenv(name, value)

    def fail(self, how: str) -> None:
        self.set(STANDIN_FAILURE=how)

    @property
    def seen(self) -> list[str]:
        """Arguments of the last trtllm-build."""
        arguments: list[str] = json.loads((self.folder / "seen").read_text())
        return arguments

    @property
    def pids(self) -> list[int]:
        """The build that hangs, and its worker."""
        return [int(pid) for pid in (self.folder / "pids").read_text().split()]

    def living(self, wait_s: float = 0) -> list[int]:
        """Those of `pids` that still run, after at most `wait_s` for them to die."""
        deadline = time.monotonic() + wait_s
        while any(map(_runs, self.pids)) and time.monotonic() < deadline:
            time.sleep(0.01)
        return [pid for pid in self.pids if _runs(pid)]


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


@pytest.fixture
def standins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIns:
    return StandIns(tmp_path / "standins", monkeypatch)
