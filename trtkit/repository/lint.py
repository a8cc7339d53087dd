"""The linter: what a Triton server would refuse, hang on or serve wrongly, said before it starts and with the line."""

from __future__ import annotations

from pathlib import Path

from trtkit import pbtxt
from trtkit.errors import InputError
from trtkit.findings import Finding
from trtkit.repository.lint_ensemble import lint_ensemble
from trtkit.repository.lint_model import lint_model
from trtkit.repository.lint_rules import Model, finding


def lint_repository(path: Path) -> list[Finding]:
    """Findings about the model repository at `path`, by model and rule. Reads files and runs nothing.

    Raises:
        InputError: `path` is not a folder.
    """
    if not path.is_dir():
        raise InputError(f"model repository {path} is not a folder", "give the folder that holds the model directories")
    folders = sorted(item for item in path.iterdir() if item.is_dir() and not _ignored(item.name))
    if not folders:
        return [
            finding(
                "TK101", str(path), "no model directories", "give the folder that holds them, or `trtkit repo generate`"
            )
        ]
    findings: list[Finding] = []
    models: dict[str, Model] = {}
    for folder in folders:
        model, problems = _read(folder)
        findings += problems
        models[model.name] = model
    for model in models.values():
        if model.config is None:
            continue
        findings += lint_model(model)
        if model.is_ensemble:
            findings += lint_ensemble(model, models)
    return findings


def _ignored(name: str) -> bool:
    """Folders that are no models: hidden ones, and what Python leaves behind."""
    return name.startswith(".") or name == "__pycache__"


def _read(folder: Path) -> tuple[Model, list[Finding]]:
    """A model directory; its config is None when that cannot be read, which is then the only finding."""
    name = folder.name
    versions = tuple(sorted(int(item.name) for item in folder.iterdir() if item.is_dir() and item.name.isdecimal()))
    file = folder / "config.pbtxt"
    if not file.is_file():
        problem = finding(
            "TK102", name, "config.pbtxt is missing", "write one, or move this folder out of the repository"
        )
        return Model(name, folder, "", None, versions), [problem]
    text = file.read_bytes().decode(errors="replace")
    try:
        config = pbtxt.loads(text, f"{name}/config.pbtxt")
    except pbtxt.PbtxtError as error:
        problem = finding("TK103", f"{name}/config.pbtxt:{error.line}", error.problem, error.fix)
        return Model(name, folder, text, None, versions), [problem]
    return Model(name, folder, text, config, versions), []
