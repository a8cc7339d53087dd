"""Lint rules about models of the vLLM backend: model.json, tensors, instances.

Format: triton-inference-server/vllm_backend, README.md and src/model.py.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

from trtkit.findings import Finding
from trtkit.repository.lint.repository import Model, enum_name
from trtkit.repository.lint.rules import finding

_INPUTS, _OUTPUTS = ("text_input",), ("text_output",)


def lint_vllm(model: Model) -> Iterator[Finding]:
    """Findings about a model of the vLLM backend."""
    if model.is_ensemble or model.backend != "vllm":
        return
    for version in model.served_versions():
        file, place = model.path / str(version) / "model.json", f"{model.name}/{version}/model.json"
        if not file.is_file():
            fix = 'add it with the engine\'s arguments, at least {"model": ...}'
            yield finding("TK231", place, "the file is missing", fix)
            continue
        settings = read_json_object(file.read_bytes())
        if isinstance(settings, str):
            yield finding("TK231", place, settings, "write a JSON object of arguments of vLLM's AsyncEngineArgs")
            continue
        if not isinstance(settings.get("model"), str) or not settings["model"]:
            yield finding("TK231", place, "it names no model", 'add "model" with a folder or a hub id')
        yield from _instances(model, settings)
    if not model.server.auto_complete:
        yield from _explicit(model)


@functools.lru_cache(maxsize=256)
def read_json_object(data: bytes) -> dict[str, Any] | str:
    """The object, or what is wrong with it."""
    try:
        settings = json.loads(data)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    return settings if isinstance(settings, dict) else "not a JSON object"


def _explicit(model: Model) -> Iterator[Finding]:
    """What the backend's code sets by itself only where the server completes configs."""
    config = model.config
    for field, wanted, tensors in (("input", _INPUTS, config.input), ("output", _OUTPUTS, config.output)):
        for name in sorted(set(wanted) - {tensor.name for tensor in tensors}):
            cause = f"{field} '{name}' is missing, and the server does not complete configs"
            yield finding("TK232", model.at(field), cause, f"write all inputs and outputs of the backend, {name} too")
    if not config.model_transaction_policy.decoupled:
        cause = "the backend needs decoupled, and the server does not complete configs"
        place = model.at("model_transaction_policy.decoupled")
        yield finding("TK232", place, cause, "write model_transaction_policy { decoupled: true }")
    if config.max_batch_size:
        cause = f"max_batch_size is {config.max_batch_size}, and the backend takes single requests"
        yield finding("TK232", model.at("max_batch_size"), cause, "write max_batch_size: 0: vLLM batches by itself")


def _instances(model: Model, settings: dict[str, Any]) -> Iterator[Finding]:
    from tritonclient.grpc import model_config_pb2 as pb

    world = 1
    for key in ("tensor_parallel_size", "pipeline_parallel_size"):
        world *= settings[key] if type(settings.get(key)) is int else 1
    for number, group in enumerate(model.config.instance_group):
        if world > 1 and group.kind != pb.ModelInstanceGroup.KIND_MODEL:
            cause = f"{enum_name(pb.ModelInstanceGroup.Kind, group.kind)}, and model.json asks for {world} GPUs"
            fix = "use KIND_MODEL, and let vLLM pick the GPUs"
            yield finding("TK233", model.at(f"instance_group[{number}].kind"), cause, fix)
