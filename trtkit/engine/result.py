"""An engine: `config.json` and one `rank{R}.engine` per rank, as trtllm-build leaves them.

Format: TensorRT-LLM, tensorrt_llm/builder.py (`Engine.save`, `EngineConfig`). No engine of a real trtllm-build was
read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtkit.errors import InputError, TrtkitError


@dataclass(frozen=True)
class Engine:
    """What an engine's config.json says.

    Attributes:
        path: the folder.
        version: TensorRT-LLM version that compiled it, and the only one that should run it.
        pretrained: config of the checkpoint that it was compiled from.
        build: limits and plugins that it was compiled with.
    """

    path: Path
    version: str
    pretrained: Mapping[str, Any]
    build: Mapping[str, Any]

    @property
    def tp(self) -> int:
        return int(self.pretrained["mapping"].get("tp_size", 1))

    @property
    def pp(self) -> int:
        return int(self.pretrained["mapping"].get("pp_size", 1))

    @property
    def nbytes(self) -> int:
        return sum(self.rank_path(rank).stat().st_size for rank in range(self.tp * self.pp))

    def rank_path(self, rank: int) -> Path:
        return self.path / f"rank{rank}.engine"


def read_engine(path: str | Path) -> Engine:
    """Reads an engine's config.json and checks that every rank's file is there.

    Raises:
        InputError: the folder holds no complete engine; names the file.
    """
    path = Path(path)
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        version, pretrained, build = config["version"], config["pretrained_config"], config["build_config"]
        if not (isinstance(version, str) and isinstance(build, dict) and isinstance(pretrained["mapping"], dict)):
            raise ValueError("its values have other types than an engine's")
        engine = Engine(path, version, pretrained, build)
        world = engine.tp * engine.pp
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{file}: not the config of an engine (no {error})", "compile it with `trtkit build`"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {file}: {error}", "compile the engine with `trtkit build`") from error
    for rank in range(world):
        if not engine.rank_path(rank).is_file() or engine.rank_path(rank).stat().st_size == 0:
            raise InputError(
                f"{engine.rank_path(rank)} is missing or empty (config.json: {world} ranks)", "compile the engine again"
            )
    return engine


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
