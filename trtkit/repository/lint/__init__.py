"""The linter: what a Triton server would refuse, hang on or serve wrongly, said before it starts and with the line."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from trtkit.errors import InputError
from trtkit.findings import Finding
from trtkit.repository.lint.code import lint_code
from trtkit.repository.lint.engine import lint_engine
from trtkit.repository.lint.ensemble import lint_ensemble
from trtkit.repository.lint.files import lint_files
from trtkit.repository.lint.llmapi import lint_llmapi
from trtkit.repository.lint.onnx_graph import lint_onnx
from trtkit.repository.lint.parameters import lint_parameters
from trtkit.repository.lint.repository import UNKNOWN, Model, Server, read_models
from trtkit.repository.lint.rules import RULES, finding
from trtkit.repository.lint.scheduling import lint_scheduling
from trtkit.repository.lint.security import lint_security, lint_server
from trtkit.repository.lint.sequences import lint_sequences
from trtkit.repository.lint.tensors import lint_tensors
from trtkit.repository.lint.tokenizer import lint_tokenizer
from trtkit.repository.lint.vllm import lint_vllm

__all__ = ["RULES", "Server", "lint_repository"]

_CHECKS: tuple[Callable[[Model], Iterable[Finding]], ...] = (
    lint_files, lint_code, lint_scheduling, lint_sequences, lint_tensors, lint_parameters, lint_tokenizer, lint_llmapi,
    lint_vllm, lint_onnx, lint_security,
)  # fmt: skip


def lint_repository(path: Path, *, server: Server = UNKNOWN, engine_dir: Path | None = None) -> list[Finding]:
    """Findings about the model repository at `path`, by model and rule. Reads files and runs nothing.

    Args:
        server: what is known about the server that will load it.
        engine_dir: where the engine is on this machine, when the repository names a path in a container.

    Raises:
        InputError: `path` is not a folder, or `engine_dir` holds no engine.
    """
    if not path.is_dir():
        raise InputError(f"model repository {path} is not a folder", "give the folder that holds the model directories")
    models, findings = read_models(path, server)
    if not models:
        fix = "give the folder that holds them, or `trtkit repo generate`"
        findings.append(finding("TK101", ".", "no model directories", fix))
    for model in models.values():
        if model.config is None:
            continue
        for check in _CHECKS:
            findings += check(model)
        findings += lint_engine(model, engine_dir)
        if model.is_ensemble:
            findings += lint_ensemble(model, models)
    return [*findings, *lint_server(server)]
