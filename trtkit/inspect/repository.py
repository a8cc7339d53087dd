"""What is in a model repository: one line per model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtkit import pbtxt
from trtkit.config_serving import Topology
from trtkit.deploy.runtimes import runtime_of
from trtkit.errors import InputError
from trtkit.inspect.model import Problem
from trtkit.repository.lint import lint_repository
from trtkit.serving_contract import MODEL
from trtkit.untrusted import printable


@dataclass(frozen=True)
class ModelReport:
    """One model of a repository. `None` stands for what config.pbtxt does not say, or for one that cannot be read.

    Attributes:
        backend: backend, or platform where only that is given (`ensemble`).
        versions: the version directories.
        instances: instance groups such as `1 x CPU` or `2 x GPU 0,1`; empty where Triton decides.
        inputs, outputs: names of the tensors.
        steps: models that an ensemble runs, in order.
        runtime: what executes it (`trtkit.config_serving.Runtime`); None where it executes nothing itself.
        drives: the other model of the repository that it asks, for a front of one.
    """

    name: str
    backend: str | None
    versions: tuple[int, ...]
    max_batch_size: int | None
    decoupled: bool | None
    instances: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    steps: tuple[str, ...]
    runtime: str | None = None
    drives: str | None = None


@dataclass(frozen=True)
class RepositoryReport:
    """What is in a model repository.

    Attributes:
        files, bytes: of all models, links not followed into folders.
        errors, warnings: how many findings of each severity `trtkit repo lint` has.
        problems: models whose config.pbtxt cannot be read.
        runtimes: those of the models, each once.
        topology: `ensemble` where one is, `fused` where the model `llm` drives its engine itself, else None.
    """

    path: str
    models: list[ModelReport]
    files: int
    bytes: int
    errors: int
    warnings: int
    problems: list[Problem]
    runtimes: tuple[str, ...] = ()
    topology: Topology | None = None
    kind: str = "repository"


def inspect_repository(path: Path) -> RepositoryReport:
    """Describes a model repository by its config.pbtxt files.

    Raises:
        InputError: `path` is not a folder.
    """
    models, problems = [], []
    for folder in model_folders(path):
        try:
            models.append(_model(folder, pbtxt.load(folder / "config.pbtxt")))
        except InputError as error:
            problems.append(Problem.of(error))
            models.append(_model(folder, None))
    files = [file for folder in model_folders(path) for file in folder.rglob("*") if file.is_file()]
    findings = lint_repository(path)
    return RepositoryReport(
        path=str(path),
        models=models,
        files=len(files),
        bytes=sum(file.stat().st_size for file in files),
        errors=sum(finding.severity == "error" for finding in findings),
        warnings=sum(finding.severity == "warning" for finding in findings),
        problems=problems,
        runtimes=tuple(sorted({model.runtime for model in models if model.runtime})),
        topology=_topology(models),
    )


def _topology(models: list[ModelReport]) -> Topology | None:
    if any(model.steps for model in models):
        return "ensemble"
    return "fused" if any(model.name == MODEL and model.runtime for model in models) else None


def model_folders(path: Path) -> list[Path]:
    """The directories of a repository that Triton takes for models."""
    found = (item for item in path.iterdir() if item.is_dir() and item.name != "__pycache__")
    return sorted(item for item in found if not item.name.startswith("."))


def _model(folder: Path, config: Any) -> ModelReport:
    versions = sorted(int(item.name) for item in folder.iterdir() if item.is_dir() and item.name.isdecimal())
    name = printable(folder.name)
    if config is None:
        return ModelReport(name, None, tuple(versions), None, None, (), (), (), ())
    return ModelReport(
        name=name,
        backend=printable(config.backend or config.platform) or ("ensemble" if _steps(config) else None),
        versions=tuple(versions),
        max_batch_size=config.max_batch_size,
        decoupled=config.model_transaction_policy.decoupled,
        instances=tuple(_instances(group) for group in config.instance_group),
        inputs=tuple(printable(tensor.name) for tensor in config.input),
        outputs=tuple(printable(tensor.name) for tensor in config.output),
        steps=_steps(config),
        runtime=runtime_of(folder, config),
        drives=_drives(config.parameters),
    )


def _drives(parameters: Any) -> str | None:
    front = "engine" in parameters and parameters["engine"].string_value == "triton" and "model_name" in parameters
    return printable(parameters["model_name"].string_value) if front else None


def _steps(config: Any) -> tuple[str, ...]:
    return tuple(printable(step.model_name) for step in config.ensemble_scheduling.step)


def _instances(group: Any) -> str:
    kind = group.Kind.Name(group.kind).removeprefix("KIND_")
    gpus = f" {','.join(map(str, group.gpus))}" if group.gpus else ""
    return f"{group.count or 1} x {kind}{gpus}"
