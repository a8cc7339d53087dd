"""Whether the engine that a container gets is one, and lies where the repository looks for it. Only reads."""

from __future__ import annotations

import json
import posixpath
from pathlib import Path

from trtkit.errors import InputError
from trtkit.findings import Finding

_COMPILE = "compile one with `trtkit build`"


def check(repository: Path, engine: Path | None, target: str | None) -> list[Finding]:
    """What cannot be checked yet, because it does not exist, as warnings.

    Args:
        repository: model repository; a TensorRT-LLM model in it is called `tensorrt_llm`.
        engine: folder to mount, if any.
        target: absolute path of the mount inside the container.

    Raises:
        InputError: what exists contradicts: no engine in the folder, or the repository looks elsewhere.
    """
    findings = []
    if not repository.is_dir():
        fix = "make one with `trtkit repo generate`"
        findings.append(Finding("TK761", "warning", str(repository), f"no model repository at {repository}", fix))
    if engine is not None and not engine.is_dir():
        findings.append(Finding("TK762", "warning", str(engine), f"no engine at {engine}", _COMPILE))
    elif engine is not None:
        _check_engine(engine)
    config = repository / "tensorrt_llm" / "config.pbtxt"
    if config.is_file():
        _check_place(config, repository, engine, target)
    return findings


def _check_engine(engine: Path) -> None:
    """An engine's config.json holds what it was built from and how (TensorRT-LLM, builder.py: EngineConfig)."""
    file = engine / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{engine} holds no engine: no config.json in it", _COMPILE) from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {file}: {error}", _COMPILE) from None
    if isinstance(found, dict) and {"pretrained_config", "build_config"} <= found.keys():
        return
    what = "a checkpoint" if isinstance(found, dict) and "architecture" in found else "something else"
    raise InputError(f"{engine} holds {what} and no engine: its config.json has no build_config", _COMPILE)


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
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    try:
        model = text_format.Parse(config.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    except (OSError, ValueError, text_format.ParseError) as error:
        raise InputError(f"cannot read {config}: {error}", "check the repository with `trtkit repo lint`") from None
    if "gpt_model_path" not in model.parameters:
        return None
    return str(model.parameters["gpt_model_path"].string_value)
