"""Whether the engine that a container gets is one, and lies where the repository looks for it. Only reads."""

from __future__ import annotations

import posixpath
from pathlib import Path

from trtkit import pbtxt
from trtkit.engine_files import read_engine
from trtkit.errors import InputError
from trtkit.findings import Finding


def check(repository: Path, engine: Path | None, target: str | None) -> list[Finding]:
    """What cannot be checked yet, because it does not exist, as warnings.

    Args:
        repository: model repository; a TensorRT-LLM model in it is called `tensorrt_llm`.
        engine: folder to mount, if any.
        target: absolute path of the mount inside the container.

    Raises:
        InputError: what exists contradicts: no complete engine in the folder, or the repository looks elsewhere.
    """
    findings = []
    if not repository.is_dir():
        fix = "make one with `trtkit repo generate`"
        findings.append(Finding("TK761", "warning", str(repository), f"no model repository at {repository}", fix))
    if engine is not None and not engine.is_dir():
        fix = "compile one with `trtkit build`"
        findings.append(Finding("TK762", "warning", str(engine), f"no engine at {engine}", fix))
    elif engine is not None:
        read_engine(engine)
    config = repository / "tensorrt_llm" / "config.pbtxt"
    if config.is_file():
        _check_place(config, repository, engine, target)
    return findings


def _check_place(config: Path, repository: Path, engine: Path | None, target: str | None) -> None:
    wanted = _gpt_model_path(config)
    if wanted is None:
        return  # a model that is told in another way
    if engine is None:
        inside = posixpath.normpath(wanted)
        if not Path(inside).is_relative_to(repository):  # which is mounted at its own path
            cause = f"{config} looks for an engine at '{wanted}' (gpt_model_path), and none is given"
            raise InputError(cause, "give --engine DIR")
    elif posixpath.normpath(wanted) != posixpath.normpath(target or str(engine)):
        fix = f"--model-path-in-container {wanted}, or generate the repository again"
        raise InputError(
            f"{config} looks for the engine at '{wanted}' (gpt_model_path), and it is mounted at '{target or engine}'",
            fix if engine.is_dir() else f"give --engine the engine's folder: there is nothing at {engine}",
        )


def _gpt_model_path(config: Path) -> str | None:
    model = pbtxt.load(config)
    if "gpt_model_path" not in model.parameters:
        return None
    return str(model.parameters["gpt_model_path"].string_value)
