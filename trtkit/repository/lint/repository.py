"""What the rules look at: the model directories, read, and what is known about the server."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trtkit import pbtxt
from trtkit.findings import Finding
from trtkit.repository.lint.parse import parse
from trtkit.repository.lint.positions import line_numbers
from trtkit.repository.lint.rules import finding

SKIPPED = {"warmup", "initial_state", "configs"}
"""Folders beside the versions that have a meaning of their own (core, model_lifecycle.cc)."""


@dataclass(frozen=True)
class Server:
    """What is known about the server that will load the repository. What is None is unknown, and rules that need it
    keep still.

    Attributes:
        release: container tag, `YY.MM`.
        gpus: how many GPUs it sees.
        auto_complete: whether it completes configs by asking the backends; servers that trtkit starts do not.
        cache: whether it was given a response cache.
        model_control: who may load models: nobody, those who change the repository, or clients.
        host: address that it listens on.
        backends: backends that it has.
        agents: repository agents that it has.
        is_local: whether it runs on this machine, and its python models in this Python.
        backend_directory: where its backends are, on this machine.
    """

    release: str | None = None
    gpus: int | None = None
    auto_complete: bool = False
    cache: bool | None = None
    model_control: Literal["none", "poll", "explicit"] = "none"
    host: str = "127.0.0.1"
    backends: frozenset[str] | None = None
    agents: frozenset[str] | None = None
    is_local: bool = False
    backend_directory: Path | None = None


UNKNOWN = Server()


@dataclass(frozen=True)
class Model:
    """One model directory, read.

    Attributes:
        name: the directory's name, under which the server and ensembles know it.
        text: of config.pbtxt.
        config: the `ModelConfig` message; None when there is no config.pbtxt or it cannot be read.
        versions: numbers of its version directories.
        folders: names of all its folders.
        server: what is known about the server.
    """

    name: str
    path: Path
    text: str
    config: Any
    versions: tuple[int, ...]
    folders: tuple[str, ...] = ()
    server: Server = UNKNOWN

    @property
    def is_ensemble(self) -> bool:
        return bool(self.config.platform == "ensemble" or self.config.HasField("ensemble_scheduling"))

    @functools.cached_property
    def backend(self) -> str:
        """The backend that the server picks: the one that is given, or else follows from platform and files; empty
        for ensembles and where nothing tells (core, model_config_utils.cc, AutoCompleteBackendFields)."""
        config = self.config
        if config.backend or self.is_ensemble:
            return str(config.backend)
        if config.platform:
            return _BACKEND_OF_PLATFORM.get(config.platform, "")
        if config.default_model_filename:
            return _BACKEND_OF_FILE.get(config.default_model_filename, "")
        # The server looks into the first of all folders, and takes the first file of this order.
        inside = {item.name for item in (self.path / self.folders[0]).iterdir()} if self.folders else set()
        for file, backend in _BACKEND_OF_FILE.items():
            if file in inside:
                return backend
        return self.name.partition(".")[2]

    @functools.cached_property
    def parameters(self) -> dict[str, str]:
        """Parameters that have a value: no empty text and no placeholder."""
        values = {key: item.string_value for key, item in self.config.parameters.items()}
        return {key: value for key, value in values.items() if value and "${" not in value}

    def served_versions(self) -> tuple[int, ...]:
        """Versions that the version policy serves, as far as they exist. Without a policy the newest one."""
        policy = self.config.version_policy
        kind = policy.WhichOneof("policy_choice")
        if kind == "all" or (kind is None and self.config.HasField("version_policy")):
            return self.versions
        if kind == "specific":
            return tuple(v for v in self.versions if v in policy.specific.versions)
        newest = policy.latest.num_versions if kind == "latest" else 1
        return self.versions[-newest:] if newest else ()

    def version_folder(self) -> Path | None:
        """Folder of the newest version that is served."""
        versions = self.served_versions()
        return self.path / str(versions[-1]) if versions else None

    def at(self, *fields: str) -> str:
        """config.pbtxt with the line of the first of these fields that is there, such as `input[2].dims`; of a field
        that is not there the message around it counts."""
        for name in fields:
            *outer, last = name.split(".")
            path = [part if part.endswith("]") else f"{part}[0]" for part in outer] + [last]
            while path:
                if line := self._lines.get(".".join(path)):
                    return f"{self.name}/config.pbtxt:{line}"
                path.pop()
        return f"{self.name}/config.pbtxt"

    def says(self, field: str) -> bool:
        """Whether the text gives a field, such as `instance_group[0].count`. The message cannot tell where the value is
        the default."""
        return field in self._lines

    def place(self, *words: str) -> str:
        """config.pbtxt with the first line that holds one of the words: quoted, or else bare."""
        for form in [f'"{word}"' for word in words] + [word for word in words if word]:
            before, found, _ = self.text.partition(form)
            if found:
                return f"{self.name}/config.pbtxt:{before.count(chr(10)) + 1}"
        return f"{self.name}/config.pbtxt"

    @functools.cached_property
    def _lines(self) -> dict[str, int]:
        return line_numbers(self.text)


_BACKEND_OF_PLATFORM = {
    "tensorflow_savedmodel": "tensorflow",
    "tensorflow_graphdef": "tensorflow",
    "tensorrt_plan": "tensorrt",
    "onnxruntime_onnx": "onnxruntime",
    "pytorch_libtorch": "pytorch",
}
_BACKEND_OF_FILE = {
    "model.savedmodel": "tensorflow",
    "model.graphdef": "tensorflow",
    "model.plan": "tensorrt",
    "model.onnx": "onnxruntime",
    "model.xml": "openvino",
    "model.pt": "pytorch",
    "model.py": "python",
}


def enum_name(enum: Any, value: int) -> str:
    """Name of an enum's value; the number where Triton's schema has no name for it, which a text may still say."""
    return str(enum.Name(value)) if value in enum.values() else str(value)


def read_models(path: Path, server: Server) -> tuple[dict[str, Model], list[Finding]]:
    """The models of a repository by name, and findings about those that cannot be read."""
    models: dict[str, Model] = {}
    findings: list[Finding] = []
    for folder in sorted(item for item in path.iterdir() if item.is_dir() and not _ignored(item.name)):
        model, problems = _read(folder, server)
        models[model.name] = model
        findings += problems
    return models, findings


def _ignored(name: str) -> bool:
    """Folders that are no models: hidden ones, and what Python leaves behind."""
    return name.startswith(".") or name == "__pycache__"


def _read(folder: Path, server: Server) -> tuple[Model, list[Finding]]:
    """A model directory; its config is None when that cannot be read, which is then the only finding."""
    name = folder.name
    folders = tuple(sorted(item.name for item in folder.iterdir() if item.is_dir()))
    versions = tuple(sorted(int(item) for item in folders if is_version(item)))
    file = folder / "config.pbtxt"
    if not file.is_file():
        fix = "write one, or move this folder out of the repository"
        problem = finding(
            "TK102", name, "config.pbtxt is missing", fix, severity="warning" if server.auto_complete else None
        )
        return Model(name, folder, "", None, versions, folders, server), [problem]
    text, place = file.read_bytes().decode(errors="replace"), f"{name}/config.pbtxt"
    try:
        config = parse(text, place)
    except pbtxt.PbtxtError as error:
        problem = finding("TK103", f"{place}:{error.line}", error.problem, error.fix)
        return Model(name, folder, text, None, versions, folders, server), [problem]
    return Model(name, folder, text, config, versions, folders, server), []


def is_version(name: str) -> bool:
    """Whether the server takes a folder for a version: a number without leading zeros."""
    return name.isascii() and name.isdecimal() and (name == "0" or name[0] != "0")
