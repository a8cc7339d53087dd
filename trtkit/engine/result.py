"""What trtllm-build left, compared with what it was to make."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trtkit.engine_files import Engine, read_engine
from trtkit.errors import InputError, TrtkitError


def check_built(folder: Path, checkpoint: Mapping[str, Any], tensorrt_llm: str) -> Engine:
    """The engine that a finished trtllm-build left in `folder`, compared with its checkpoint's config.json.

    Raises:
        TrtkitError: something is missing, belongs to another checkpoint, or was compiled by another TensorRT-LLM.
    """
    fix = "see the build's log: trtllm-build said that it had succeeded"
    try:
        engine = read_engine(folder)
    except InputError as error:
        raise TrtkitError(f"trtllm-build left no complete engine: {error.cause}", fix) from error
    pairs = {
        "tensor-parallel size": (engine.tp, checkpoint["mapping"]["tp_size"]),
        "pipeline-parallel size": (engine.pp, checkpoint["mapping"]["pp_size"]),
        "architecture": (engine.pretrained.get("architecture"), checkpoint["architecture"]),
        "dtype": (engine.pretrained.get("dtype"), checkpoint["dtype"]),
    }
    for name, (found, wanted) in pairs.items():
        if found != wanted:
            raise TrtkitError(f"the engine's {name} is {found}, the checkpoint's is {wanted}", fix)
    if not same_version(engine.version, tensorrt_llm):
        raise wrong_version(engine.version, tensorrt_llm)
    return engine


def same_version(first: str, second: str) -> bool:
    """Whether two versions share major, minor and patch number: `1.0.3` and `1.0.3.2510` run each other's engines."""
    return first.split(".")[:3] == second.split(".")[:3]


def wrong_version(found: str, wanted: str) -> InputError:
    return InputError(
        f"trtllm-build is TensorRT-LLM {found}, the release has {wanted}: Triton could not load the engine",
        f"set deploy.release to one with TensorRT-LLM {found} (see `trtkit releases`), or engine.builder: docker",
    )
