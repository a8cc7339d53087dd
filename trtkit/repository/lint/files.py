"""Lint rules about a model's directory, its versions and what runs it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from trtkit.findings import Finding
from trtkit.repository.lint.repository import SKIPPED, Model, is_version
from trtkit.repository.lint.rules import finding

_PLATFORMS = (
    "ensemble", "tensorrt_plan", "tensorflow_graphdef", "tensorflow_savedmodel", "onnxruntime_onnx", "pytorch_libtorch",
)  # fmt: skip
_PLATFORMS_OF_BACKEND = {
    "tensorrt": ("tensorrt_plan",),
    "tensorflow": ("tensorflow_graphdef", "tensorflow_savedmodel"),
    "onnxruntime": ("onnxruntime_onnx",),
    "pytorch": ("pytorch_libtorch",),
}
_ENUM_NUMBER = re.compile(r"(?:kind|data_type|format|priority|timeout_action)\s*:\s*-?\d")
_REFUSED_ENUMS = {"inference.ModelInstanceGroup.Kind", "inference.BatchInput.Kind", "inference.BatchOutput.Kind"}
_SINCE = {"model_metrics": "24.11", "ensemble_scheduling.max_inflight_requests": "25.12"}
"""Fields of Triton's schema, and the first release that has them. Each was missing in 24.10, whose schema was read."""


def lint_files(model: Model) -> Iterator[Finding]:
    """Findings about the directory, the versions, the backend and the release."""
    yield from _placeholders(model)
    config = model.config
    if config.name and config.name != model.name:
        cause = f"name '{config.name}' in directory '{model.name}'"
        yield finding("TK105", model.at("name"), cause, f'set name: "{model.name}", or rename the directory')
    yield from _versions(model)
    yield from _backend(model)
    yield from _agents(model)
    if _ENUM_NUMBER.search(model.text):
        yield from _enums(model, config, "")
    yield from _release(model)


def _placeholders(model: Model) -> Iterator[Finding]:
    if "${" not in model.text:
        return
    for number, line in enumerate(model.text.splitlines(), 1):
        if match := re.search(r"\$\{[^}]*\}", re.sub(r"^\s*#.*", "", line)):
            cause = f"placeholder {match.group()} is not filled in"
            place = f"{model.name}/config.pbtxt:{number}"
            yield finding("TK104", place, cause, "put the value there, or remove the line")


def _versions(model: Model) -> Iterator[Finding]:
    policy = model.config.version_policy
    if not model.versions:
        yield finding("TK106", model.name, "no version directory", "put the model's files into a directory '1'")
        return
    if not model.served_versions():
        cause = f"the version policy serves none of the versions {', '.join(map(str, model.versions))}"
        fix = "name an existing version, or remove version_policy"
        yield finding("TK106", model.at("version_policy"), cause, fix)
    else:
        for number, version in enumerate(policy.specific.versions):
            if version not in model.versions:
                place = model.at(f"version_policy.specific.versions[{number}]")
                fix = "add the version, or remove it from version_policy"
                yield finding("TK171", place, f"version {version} is not there and is left out", fix)
    for name in model.folders:
        if name not in SKIPPED and not is_version(name) and re.fullmatch(r"[vV]?[0-9]+", name):
            fix = "call it by its bare number, or move it out of the model"
            yield finding("TK172", f"{model.name}/{name}", "the server does not take it for a version", fix)


def _backend(model: Model) -> Iterator[Finding]:
    config, backend = model.config, model.backend
    if model.is_ensemble:
        if config.platform and config.platform != "ensemble":
            fix = 'write platform: "ensemble", or remove ensemble_scheduling'
            yield finding("TK109", model.at("platform"), f"platform '{config.platform}' with ensemble_scheduling", fix)
        elif not config.platform:
            cause = "ensemble_scheduling without a platform"
            yield finding("TK109", model.at("ensemble_scheduling"), cause, 'add platform: "ensemble"')
        return
    valid = _PLATFORMS_OF_BACKEND.get(config.backend)
    if config.platform and not backend:
        fix = f'write backend: "{config.platform}" instead, or one of the platforms {", ".join(sorted(_PLATFORMS))}'
        yield finding("TK109", model.at("platform"), f"unknown platform '{config.platform}'", fix)
    elif valid and config.platform and config.platform not in valid:
        cause = f"platform '{config.platform}' does not go with backend '{config.backend}'"
        yield finding("TK109", model.at("platform"), cause, f"remove platform, or use {' or '.join(valid)}")
    elif not backend:
        cause = "the server cannot tell the backend"
        yield finding("TK120", model.at(), cause, 'write it down, such as backend: "python"')
    elif not config.platform and not config.backend:
        cause = f"the server has to guess the backend, and takes '{backend}'"
        yield finding("TK110", model.at(), cause, f'write it down: backend: "{backend}"')
    known = model.server.backends
    if backend and known is not None and backend not in known:
        fix = f"serve it with a release that has the backend; this server has {', '.join(sorted(known))}"
        yield finding("TK175", model.at("backend", "platform"), f"the server has no backend '{backend}'", fix)
    elif backend == "python" and config.runtime not in ("", "libtriton_python.so"):
        cause = f"runtime '{config.runtime}' is not one of the python backend's"
        yield finding("TK175", model.at("runtime"), cause, "remove runtime")


def _agents(model: Model) -> Iterator[Finding]:
    if not model.config.HasField("model_repository_agents"):
        return
    agents = model.config.model_repository_agents.agents
    if not agents:
        cause = "model_repository_agents is empty, which ended a server 2.51 with a segmentation fault"
        yield finding("TK178", model.at("model_repository_agents"), cause, "remove it")
    known = model.server.agents
    for number, agent in enumerate(agents):
        if known is not None and agent.name not in known:
            place = model.at(f"model_repository_agents.agents[{number}]")
            fix = "remove it, or serve with a release that has the agent"
            yield finding("TK178", place, f"the server has no repository agent '{agent.name}'", fix)


def _enums(model: Model, message: Any, path: str) -> Iterator[Finding]:
    """Numbers instead of names: the parser takes any. For a kind the server refuses unknown ones, for a type not."""
    from google.protobuf.message import Message

    for field, value in message.ListFields():
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            continue
        items = [value] if isinstance(value, (int, float, str, bytes, Message)) else value
        for number, item in enumerate(items):
            here = f"{path}{field.name}[{number}]"
            if field.message_type is not None:
                yield from _enums(model, item, f"{here}.")
            elif field.enum_type is not None and item not in field.enum_type.values_by_number:
                names = [name.name for name in field.enum_type.values][:4]
                refused = field.enum_type.full_name in _REFUSED_ENUMS
                cause, fix = f"{field.name} {item} stands for nothing", f"use a name such as {', '.join(names)}"
                yield finding("TK179", model.at(here), cause, fix, severity="error" if refused else "warning")


def _release(model: Model) -> Iterator[Finding]:
    """A field that the server's own schema lacks is an error there; without a known release only a warning."""
    release = model.server.release
    for path, since in _SINCE.items():
        message = model.config
        for name in path.split(".")[:-1]:
            message = getattr(message, name)
        name = path.rpartition(".")[2]
        field = message.DESCRIPTOR.fields_by_name[name]
        given = message.HasField(name) if field.message_type else bool(getattr(message, name))
        if not given or (release is not None and release >= since):
            continue
        cause = f"{name} is unknown to releases before {since}" + (f", and this is {release}" if release else "")
        fix = f"remove it, or use release {since} or newer"
        yield finding("TK170", model.at(path), cause, fix, severity="error" if release else "warning")
