"""Lint rules about parameters of config.pbtxt: values that are refused, and folders that are not there."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

from trtkit import releases
from trtkit.contract_tensors import in_range
from trtkit.findings import Finding, Severity
from trtkit.repository.layouts.backend_parameters import PARAMETERS, problem
from trtkit.repository.lint.repository import Model
from trtkit.repository.lint.rules import finding


def lint_parameters(model: Model) -> Iterator[Finding]:
    """Findings about parameters and the folders that they name."""
    if model.is_ensemble:
        return
    yield from _server_values(model)
    for key in ("gpt_model_path", "encoder_model_path", "checkpoint_dir", "tokenizer_dir"):
        if value := model.parameters.get(key):
            yield from _folder(model, key, value)
    if model.backend == "tensorrtllm":
        yield from _backend_values(model)


def model_folder(model: Model, key: str, value: str) -> Path:
    """Relative to a version's folder for the reference runtime, to the server's working directory for the backend."""
    version = model.version_folder()
    return version / value if key == "checkpoint_dir" and version else Path(value)


def _server_values(model: Model) -> Iterator[Finding]:
    """Parameters of the server itself and of the python backend (python_backend, src/python_be.cc)."""
    parameters = model.config.parameters
    key = "FORCE_CPU_ONLY_INPUT_TENSORS"
    if model.backend == "python" and key in parameters and parameters[key].string_value not in ("yes", "no"):
        cause = f"{key} is '{parameters[key].string_value}'"
        yield finding("TK139", model.place(key), cause, "write yes or no")
    key = "TRITON_BATCH_STRATEGY_PATH"
    if key in parameters:
        file = Path(parameters[key].string_value)
        if model.config.HasField("sequence_batching"):
            yield finding("TK139", model.place(key), f"{key} with sequence batching", "remove one of them")
        elif not (model.path / file).is_file():
            cause = f"{key} {file} is not there"
            yield finding("TK139", model.place(key), cause, "put the library into the model's folder")

    key = "EXECUTION_ENV_PATH"
    if model.backend == "python" and (value := model.parameters.get(key)):
        yield from _environment(model, key, value)


def _environment(model: Model, key: str, value: str) -> Iterator[Finding]:
    """The packed environment of a python model. On another machine only a path inside the model can be looked for."""
    inside = "$$TRITON_MODEL_DIRECTORY"
    path = Path(value.replace(inside, str(model.path)))
    if path.exists():
        return
    severity: Severity = "error" if inside in value or model.server.is_local else "warning"
    cause = f"{key} {value} is not there" + ("" if severity == "error" else " on this machine")
    fix = f"name a file in the model's folder: {inside}/environment.tar.gz"
    yield finding("TK139", model.place(key), cause, fix, severity=severity)


def _folder(model: Model, key: str, value: str) -> Iterator[Finding]:
    if model.backend == "python" and not value.isascii():
        cause = f"{key} {value} is not ASCII, and the server's Python reads ASCII paths only"
        yield finding("TK137", model.place(value), cause, "move it to a path of ASCII characters")
        return
    if key == "tokenizer_dir" and "/" not in value:
        return  # in the repository itself: the tokenizer's rules
    folder = model_folder(model, key, value)
    if folder.is_dir():
        return
    if key == "checkpoint_dir" and folder.parent.is_dir():
        cause = f"{key} {value} does not exist, though {folder.parent} does"
        yield finding("TK138", model.place(value), cause, "convert the checkpoint again, or correct the path")
        return
    cause = f"{key} {value} does not exist on this machine"
    yield finding("TK131", model.place(value), cause, "make sure that it exists where the server runs")


def _backend_values(model: Model) -> Iterator[Finding]:
    """Of all versions of the backend, or of that in the release. It goes on with a default where it cannot read one."""
    version = next((item.tensorrt_llm for item in releases.load() if item.tag == model.server.release), None)
    for key, value in model.parameters.items():
        parameter = PARAMETERS.get(key)
        if parameter is None:
            near = difflib.get_close_matches(key, PARAMETERS, n=1)
            fix = f"did you mean '{near[0]}'?" if near else "remove it"
            yield finding("TK140", model.place(key), f"the backend has no parameter '{key}' and ignores it", fix)
        elif (wrong := problem(key, value)) is not None:
            yield finding("TK134", model.place(value), f"{key} is '{value}'", f"it {wrong}")
        elif version and not in_range(version, parameter.since, parameter.until):
            cause = f"TensorRT-LLM {version} of the release has no parameter '{key}' and ignores it"
            yield finding("TK140", model.place(key), cause, "remove it, or use another release")
