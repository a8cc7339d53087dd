"""Lint rules about models of TensorRT-LLM's LLM API: config.pbtxt against model.yaml beside the code.

Format: NVIDIA/TensorRT-LLM, triton_backend/all_models/llmapi. model.py there sets decoupled and max_batch_size of
`triton_config` only where the server completes configs, so elsewhere config.pbtxt has to say them too.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from trtkit.findings import Finding
from trtkit.repository.lint.repository import Model
from trtkit.repository.lint.rules import finding

_OWN = {"triton_config"}


def lint_llmapi(model: Model) -> Iterator[Finding]:
    """Findings about a python model with a model.yaml, or whose code reads one."""
    if model.is_ensemble or model.backend != "python":
        return
    for version in model.served_versions():
        folder = model.path / str(version)
        file, place = folder / "model.yaml", f"{model.name}/{version}/model.yaml"
        if not file.is_file():
            if (folder / "model.py").is_file() and _reads_yaml(folder / "model.py"):
                fix = "add it: `model`, `backend`, `tensor_parallel_size` and `triton_config`"
                yield finding("TK221", place, "the file is missing, and model.py reads it", fix)
            continue
        settings = read_yaml(file.read_bytes())
        if isinstance(settings, str):
            yield finding("TK221", place, settings, "write a mapping of arguments of LLM()")
            continue
        if not isinstance(settings.get("model"), str) or not settings["model"]:
            yield finding("TK221", place, "it names no model", "add `model:` with a folder or a hub id")
        yield from _agreement(model, place, settings)
        yield from _gpus(model, settings)


@functools.lru_cache(maxsize=256)
def read_yaml(data: bytes) -> dict[str, Any] | str:
    """The mapping, or what is wrong with it."""
    try:
        settings = yaml.safe_load(data)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        return f"not YAML: {' '.join(str(error).split())[:200]}"
    return settings if isinstance(settings, dict) else "not a mapping"


def _reads_yaml(file: Path) -> bool:
    code = file.read_bytes()
    return b"model.yaml" in code and b"tensorrt_llm" in code


def _agreement(model: Model, place: str, settings: dict[str, Any]) -> Iterator[Finding]:
    triton = settings.get("triton_config")
    if not isinstance(triton, dict) or model.server.auto_complete:
        return
    given = bool(model.config.model_transaction_policy.decoupled)
    if "decoupled" in triton and bool(triton["decoupled"]) != given:
        explicit = model.config.HasField("model_transaction_policy")
        says = f"says {str(given).lower()}" if explicit else "says nothing, which is false"
        cause = f"decoupled is {str(bool(triton['decoupled'])).lower()} in model.yaml, and config.pbtxt {says}"
        fix = f"write model_transaction_policy {{ decoupled: {str(bool(triton['decoupled'])).lower()} }}"
        yield finding("TK222", model.at("model_transaction_policy.decoupled"), cause, fix)
    size = triton.get("max_batch_size")
    if type(size) is int and size != model.config.max_batch_size:
        cause = f"max_batch_size is {size} in model.yaml and {model.config.max_batch_size} in config.pbtxt"
        yield finding("TK222", model.at("max_batch_size"), cause, f"write max_batch_size: {size}")


def _gpus(model: Model, settings: dict[str, Any]) -> Iterator[Finding]:
    """With several instances the code takes one group of `gpu_device_ids` (`0,1;2,3`) for each."""
    instances = sum(max(group.count, 1) for group in model.config.instance_group) or 1
    text = model.parameters.get("gpu_device_ids", "")
    groups = [group.split(",") for group in text.split(";") if group.strip()]
    if instances > 1 and len(groups) != instances:
        cause = f"{instances} instances, and gpu_device_ids has {len(groups)} groups"
        place = model.place("gpu_device_ids") if groups else model.at("instance_group.count")
        yield finding("TK223", place, cause, "give one group of GPUs for each instance: 0,1;2,3")
        return
    world = 1
    for key in ("tensor_parallel_size", "pipeline_parallel_size"):
        world *= settings[key] if type(settings.get(key)) is int else 1
    for group in groups:
        if len(group) != world:
            cause = f"the group {','.join(group)} has {len(group)} GPUs, and model.yaml asks for {world}"
            yield finding("TK223", model.place("gpu_device_ids"), cause, f"name {world} GPUs in each group")
