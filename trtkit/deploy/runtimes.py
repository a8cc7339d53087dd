"""Which runtime executes each model of a repository, and what a server must have for it. Only reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from trtkit import pbtxt, releases
from trtkit.deploy.server import Server
from trtkit.errors import InputError, LacksError

BACKENDS = ("tensorrtllm", "vllm", "onnxruntime")
"""Backends that are runtimes by themselves."""
ENGINES = {"reference": "reference", "executor": "tensorrtllm", "llmapi": "llmapi", "vllm": "vllm"}
"""Parameter `engine` of the model `llm` -> what it drives. With `triton` it drives another model of the same server."""
PACKAGES = {
    "tensorrtllm": "tensorrt_llm",
    "llmapi": "tensorrt_llm",
    "vllm": "vllm",
    "onnxruntime": "onnxruntime",
    "reference": "trtkit",
}
"""Runtime -> the Python package that a python model of it imports."""
HOMES = {
    ("backend", "tensorrtllm"): "trtllm",
    ("package", "tensorrt_llm"): "trtllm",
    ("backend", "vllm"): "vllm",
    ("package", "vllm"): "vllm",
    ("backend", "onnxruntime"): "plain",
    ("package", "onnxruntime"): None,
    ("package", "trtkit"): None,
}
"""What only one kind of container has, and what none has."""


@dataclass(frozen=True)
class Need:
    """What a server must have for a model: a backend, or a Python package beside the python backend."""

    model: str
    kind: Literal["backend", "package"]
    name: str

    def __str__(self) -> str:
        return f"model '{self.model}' needs the {'Python package' if self.kind == 'package' else 'backend'} {self.name}"


def runtime_of(folder: Path, config: Any) -> str | None:
    """The runtime that executes a model; None for one that executes nothing (an ensemble, texts and tokens, a front of
    another model) or with another backend.

    Args:
        folder: the model's.
        config: its `ModelConfig`.
    """
    backend = backend_of(config)
    return (
        _python_runtime(folder, config.parameters) if backend == "python" else backend if backend in BACKENDS else None
    )


def backend_of(config: Any) -> str:
    """The backend of a model; empty for ensembles, and where a server would have to guess."""
    platform = "" if config.platform == "ensemble" else config.platform
    return str(config.backend or platform.partition("_")[0])


def _python_runtime(folder: Path, parameters: Any) -> str | None:
    if "engine" in parameters:
        return ENGINES.get(parameters["engine"].string_value)
    if "checkpoint_dir" in parameters:
        return "reference"
    for file, runtime in (("container_folder.txt", "llmapi"), ("model.onnx", "onnxruntime")):
        if any(folder.glob(f"[0-9]*/{file}")):
            return runtime
    return None if "tokenizer_dir" in parameters else "python"


def needs_of(repository: Path) -> Iterator[Need]:
    """What the models of a repository need. Those whose configuration cannot be read are left to the server's words."""
    for file in sorted(repository.glob("*/config.pbtxt")):
        try:
            config = pbtxt.load(file)
        except InputError:
            continue
        backend, runtime = backend_of(config), runtime_of(file.parent, config)
        if backend == "python" and runtime in PACKAGES:
            yield Need(file.parent.name, "package", PACKAGES[runtime])
        elif backend not in ("", "python"):
            yield Need(file.parent.name, "backend", backend)


def check_local(repository: Path, server: Server) -> None:
    """Whether this machine's server can execute a repository.

    Raises:
        LacksError: the server lacks a backend, or its Python, which is this one, a package.
    """
    for need in needs_of(repository):
        there = (
            find_spec(need.name) is not None
            if need.kind == "package"
            else server.backends is None or (server.backends / need.name).is_dir()
        )
        if not there:
            raise LacksError(f"{need}, which is not on this machine", _fix(need))


def _fix(need: Need) -> str:
    if need.name == "onnxruntime":
        if need.kind == "package":
            return "pip install 'trtkit[local]'"
        return "generate the repository with deploy.target: local, where a python model runs it, or use --target docker"
    boxed = "use --target docker on a machine with GPUs"
    return boxed if HOMES.get((need.kind, need.name)) else f"install {need.name}, or {boxed}"


def check_container(repository: Path, runtime: str) -> None:
    """Whether the release's container for `runtime` can execute a repository.

    Raises:
        InputError: something in it is for another server.
    """
    kind = releases.KINDS[runtime]
    for need in needs_of(repository):
        home = HOMES.get((need.kind, need.name), kind)
        if home != kind:
            raise InputError(
                f"{need}, and the container for runtime '{runtime}' ({releases.IMAGES[kind].format(tag='YY.MM')}) "
                "has none",
                "generate the repository again from this config with deploy.target: docker, or name a deploy.image "
                "that has it",
            )
