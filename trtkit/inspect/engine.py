"""What is in an engine: what its config.json says, and whether its ranks are there. Engines themselves are opaque."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtkit import releases
from trtkit.engine_files import read_engine_config
from trtkit.errors import InputError
from trtkit.inspect.checkpoint import MAX_RANKS, RankFile
from trtkit.inspect.model import ModelFacts, Problem, Quantization, facts_of_checkpoint, quantization_of_checkpoint
from trtkit.untrusted import printable

_LIMITS = ("max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens", "max_beam_width")
_PLUGINS = ("gemm_plugin", "gpt_attention_plugin", "moe_plugin", "nccl_plugin")


@dataclass(frozen=True)
class EngineReport:
    """What is in an engine.

    Attributes:
        tensorrt_llm: version that compiled it, and the only one that runs it.
        releases: tags of the Triton containers with that version.
        limits: max_batch_size, max_input_len, max_seq_len, max_num_tokens (tokens) and max_beam_width, None where the
            config does not say.
        kv_cache_type: `PAGED`, `CONTINUOUS` or `DISABLED`.
        plugins: dtype of each plugin that is on.
    """

    path: str
    architecture: str | None
    dtype: str | None
    tp: int
    pp: int
    ep: int
    complete: bool
    bytes: int
    tensorrt_llm: str
    releases: tuple[str, ...]
    limits: dict[str, int | None]
    kv_cache_type: str | None
    plugins: dict[str, str]
    quantization: Quantization | None
    model: ModelFacts
    ranks: list[RankFile]
    problems: list[Problem]
    kind: str = "engine"


def inspect_engine(path: Path) -> EngineReport:
    """Describes an engine folder.

    Formats: TensorRT-LLM, tensorrt_llm/builder.py (BuildConfig) and tensorrt_llm/plugin/plugin.py (PluginConfig).

    Raises:
        InputError: config.json is not an engine's.
    """
    engine = read_engine_config(path)
    config, build = engine.pretrained, engine.build
    world = engine.tp * engine.pp
    if world > MAX_RANKS:
        raise InputError(f"{path / 'config.json'}: {world} ranks, no engine has so many", "compile the engine again")
    ranks = [_rank(engine.rank_path(rank)) for rank in range(world)]
    missing = engine.missing()
    problem = f"{missing} is missing or empty (config.json: {world} ranks)"
    return EngineReport(
        path=str(path),
        architecture=_text(config.get("architecture")),
        dtype=_text(config.get("dtype")),
        tp=engine.tp,
        pp=engine.pp,
        ep=_size(config["mapping"].get("moe_ep_size")) or 1,
        complete=missing is None,
        bytes=sum(rank.bytes for rank in ranks),
        tensorrt_llm=printable(engine.version, 40),
        releases=tuple(found.tag for found in releases.load() if found.tensorrt_llm == engine.version),
        limits={name: _size(build.get(name)) for name in _LIMITS},
        kv_cache_type=_text(build.get("kv_cache_type")),
        plugins=_plugins(build.get("plugin_config")),
        quantization=quantization_of_checkpoint(config),
        model=facts_of_checkpoint(config),
        ranks=ranks,
        problems=[] if missing is None else [Problem(problem, "compile the engine again")],
    )


def _rank(file: Path) -> RankFile:
    present = file.is_file()
    size = file.stat().st_size if present else 0
    problem = None if size else "empty" if present else "missing"
    return RankFile(file.name, present, 0, size, problem)


def _plugins(given: Any) -> dict[str, str]:
    config: Mapping[str, Any] = given if isinstance(given, dict) else {}
    found = {name: _text(config.get(name)) for name in _PLUGINS}
    return {name: dtype for name, dtype in found.items() if dtype is not None}


def _size(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None


def _text(value: Any) -> str | None:
    return printable(value, 80) if isinstance(value, str) else None
