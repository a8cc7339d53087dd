"""What is in a model repository: one line per model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtkit import pbtxt
from trtkit.errors import InputError
from trtkit.inspect.model import Problem
from trtkit.repository.lint import lint_repository
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


@dataclass(frozen=True)
class RepositoryReport:
    """What is in a model repository.

    Attributes:
        files, bytes: of all models, links not followed into folders.
        errors, warnings: how many findings of each severity `trtkit repo lint` has.
        problems: models whose config.pbtxt cannot be read.
    """

    path: str
    models: list[ModelReport]
    files: int
    bytes: int
    errors: int
    warnings: int
    problems: list[Problem]
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
    )


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
    )


def _steps(config: Any) -> tuple[str, ...]:
    return tuple(printable(step.model_name) for step in config.ensemble_scheduling.step)


def _instances(group: Any) -> str:
    kind = group.Kind.Name(group.kind).removeprefix("KIND_")
    gpus = f" {','.join(map(str, group.gpus))}" if group.gpus else ""
    return f"{group.count or 1} x {kind}{gpus}"
