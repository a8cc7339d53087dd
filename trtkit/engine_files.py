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

from trtkit.errors import InputError

_COMPILE = "compile one with `trtkit build`"


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

    def missing(self) -> Path | None:
        """The first rank's file that is not there or holds nothing; None when the engine is complete."""
        paths = map(self.rank_path, range(self.tp * self.pp))
        return next((path for path in paths if not path.is_file() or path.stat().st_size == 0), None)


def read_engine_config(path: str | Path) -> Engine:
    """Reads an engine's config.json, whether or not the ranks' files are there.

    Raises:
        InputError: the folder holds no engine; says what it holds.
    """
    path = Path(path)
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} holds no engine: no config.json in it", _COMPILE) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {file}: {error}", _COMPILE) from error
    if not isinstance(config, dict) or not {"pretrained_config", "build_config"} <= config.keys():
        what = "a checkpoint" if isinstance(config, dict) and "architecture" in config else "something else"
        raise InputError(f"{path} holds {what} and no engine: its config.json has no build_config", _COMPILE)
    version, pretrained, build = config.get("version"), config["pretrained_config"], config["build_config"]
    mapping = pretrained.get("mapping") if isinstance(pretrained, dict) else None
    if not (isinstance(version, str) and isinstance(build, dict) and isinstance(mapping, dict)):
        raise InputError(f"{file}: 'version', 'build_config' or 'mapping' is no engine's", _COMPILE)
    for key in ("tp_size", "pp_size"):
        if type(size := mapping.get(key, 1)) is not int or size < 1:
            raise InputError(f"{file}: mapping.{key} is {json.dumps(size)[:80]}, no positive integer", _COMPILE)
    return Engine(path, version, pretrained, build)


def read_engine(path: str | Path) -> Engine:
    """Reads an engine's config.json and checks that every rank's file is there.

    Raises:
        InputError: the folder holds no complete engine; names the file.
    """
    engine = read_engine_config(path)
    if (missing := engine.missing()) is not None:
        ranks = engine.tp * engine.pp
        raise InputError(f"{missing} is missing or empty (config.json: {ranks} ranks)", "compile the engine again")
    return engine
