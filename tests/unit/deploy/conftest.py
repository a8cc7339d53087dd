"""A state folder of the test's own, and stand-ins for tritonserver and docker."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from trtkit.deploy import local, state

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TRTKIT_STATE_DIR", str(tmp_path / "state"))
    yield tmp_path / "state"
    for name in state.names():
        if (state.read(state.folder_of(name)) or {}).get("target") == "local":
            local.down(name)


@pytest.fixture
def tritonserver(tmp_path: Path) -> str:
    """A stand-in tritonserver; its module says what it can do."""
    return _program(tmp_path / "standin" / "tritonserver", HERE / "standin_tritonserver.py")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A model repository, empty but for the folders of two models."""
    for name in ("one", "two"):
        (tmp_path / "models" / name).mkdir(parents=True)
    return tmp_path / "models"


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Puts the stand-in docker first on PATH; returns its folder. Its module says what it can do."""
    home = tmp_path / "docker"
    (home / "containers").mkdir(parents=True)
    (home / "images").write_text("nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3")
    (home / "registry").write_text("")
    program = Path(_program(tmp_path / "bin" / "docker", HERE / "standin_docker_deploy.py"))
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("STANDIN_DOCKER", str(home))
    yield home
    for file in (home / "containers").iterdir():
        if pid := json.loads(file.read_text())["pid"]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _program(path: Path, module: Path) -> str:
    path.parent.mkdir(parents=True)
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{module}" "$@"\n')
    path.chmod(0o755)
    return str(path)
