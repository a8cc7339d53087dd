"""The argument list of trtllm-build, for the TensorRT-LLM version that will read it.

Sources: TensorRT-LLM, tensorrt_llm/commands/build.py and tensorrt_llm/plugin/plugin.py, in two states: the parser of
0.17, built by running `parse_arguments`, and the parser of the 1.x line, by reading. No release was read at its tag,
and no real trtllm-build was run with these arguments. Before 0.17 several of these flags are missing or mean something
else; 1.3 has no trtllm-build.

Every setting is written out, also where it equals a default: defaults differ between the versions
(`use_paged_context_fmha` was off in 0.17 and is on in 1.x), and an engine should depend on the build config alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from trtkit.config import EngineConfig
from trtkit.errors import InputError

OLDEST, REMOVED = (0, 17), (1, 3)
TIMING_CACHE = "model.cache"
"""File of measured kernel timings that trtllm-build leaves in the engine folder; without a path it lands in the cwd."""

REDUCE_FUSION_ARCHITECTURES = ("LlamaForCausalLM", "Gemma2ForCausalLM", "MedusaForCausalLM")
"""Elsewhere, and with TP 1, TensorRT-LLM (tensorrt_llm/builder.py) logs a warning and turns reduce_fusion off."""

Kind = type[int] | type[str] | tuple[str, ...]
"""What a flag takes: a number, any text, or one of some words."""

_ON_OFF = ("enable", "disable")
_DTYPES = ("auto", "float16", "float32", "bfloat16", "int32")

_FLAGS_0_17: dict[str, Kind] = {
    "checkpoint_dir": str,
    "output_dir": str,
    "output_timing_cache": str,
    "workers": int,
    "max_batch_size": int,
    "max_input_len": int,
    "max_seq_len": int,
    "max_num_tokens": int,
    "max_beam_width": int,
    "kv_cache_type": ("continuous", "paged", "disabled"),
    "gemm_plugin": (*_DTYPES, "fp8", "disable"),
    "use_paged_context_fmha": _ON_OFF,
    "multiple_profiles": _ON_OFF,
    "reduce_fusion": _ON_OFF,
}

FLAGS: Mapping[str, Mapping[str, Kind]] = MappingProxyType(
    {"0.17": _FLAGS_0_17, "1.x": {**_FLAGS_0_17, "gemm_plugin": (*_DTYPES, "fp8", "nvfp4", "disable")}}
)
"""The flags that trtkit sends, per version line: `0.17` stands for 0.17 up to 1.0, `1.x` for 1.0 up to 1.3."""


def version_line(tensorrt_llm_version: str) -> str:
    """The key of `FLAGS` for a version such as `0.17.0.post1` or `1.2.1`.

    Raises:
        InputError: not a version, or one whose trtllm-build trtkit does not know, or one without trtllm-build.
    """
    match = re.match(r"(\d+)\.(\d+)(?![\d])", tensorrt_llm_version)
    if match is None:
        raise InputError(f"'{tensorrt_llm_version}' is not a TensorRT-LLM version", "give one such as 1.2.1")
    version = int(match[1]), int(match[2])
    if version >= REMOVED:
        raise InputError(
            f"TensorRT-LLM {tensorrt_llm_version} has no engine builder: 1.3 removed it",
            "set deploy.release to 26.07, which has TensorRT-LLM 1.2; `trtkit releases` lists them all",
        )
    if version < OLDEST:
        raise InputError(
            f"TensorRT-LLM {tensorrt_llm_version} is too old: trtkit knows the flags of trtllm-build from 0.17 on",
            "set deploy.release to 25.01 or newer; `trtkit releases` lists them all",
        )
    return "0.17" if version < (1, 0) else "1.x"


def trtllm_build_args(
    engine: EngineConfig,
    checkpoint_dir: str | Path,
    output_dir: str | Path,
    *,
    tensorrt_llm_version: str,
    tp: int = 1,
    architecture: str | None = None,
) -> list[str]:
    """Arguments of trtllm-build, without the program's name.

    Args:
        engine: the settings.
        checkpoint_dir: folder of the TRT-LLM checkpoint, as trtllm-build sees it (inside a container: the mount).
        output_dir: folder that receives the engine and the timing cache.
        tensorrt_llm_version: version that will run, such as `1.2.1`.
        tp: tensor-parallel size of the checkpoint.
        architecture: `architecture` of the checkpoint's config.json; None skips what depends on it.

    Raises:
        InputError: the version has no trtllm-build that trtkit knows, or the settings contradict each other, the
            version or the checkpoint. `reduce_fusion` where it cannot work is refused rather than sent, because
            trtllm-build would compile without it and only say so in its log.
    """
    line = version_line(tensorrt_llm_version)
    _refuse_contradictions(engine, tp, architecture)
    settings: dict[str, str | int | bool | None] = {
        "checkpoint_dir": str(checkpoint_dir),
        "output_dir": str(output_dir),
        "output_timing_cache": f"{output_dir}/{TIMING_CACHE}",
        "workers": engine.workers,
        "max_batch_size": engine.max_batch_size,
        "max_input_len": engine.max_input_len,
        "max_seq_len": engine.max_seq_len,
        "max_num_tokens": engine.max_num_tokens,
        "max_beam_width": engine.max_beam_width,
        "kv_cache_type": engine.kv_cache_type,
        "gemm_plugin": engine.gemm_plugin,
        "use_paged_context_fmha": engine.use_paged_context_fmha,
        "multiple_profiles": engine.multiple_profiles,
        "reduce_fusion": engine.reduce_fusion,
    }
    arguments = []
    for name, value in settings.items():
        if value is not None:
            arguments += [f"--{name}", _text(name, value, FLAGS[line], tensorrt_llm_version)]
    return arguments


def refuse_inert_reduce_fusion(tp: int, architecture: str | None) -> None:
    """Raises InputError where trtllm-build would quietly turn reduce_fusion off."""
    if tp == 1:
        raise InputError(
            "engine.reduce_fusion fuses the all-reduce of tensor parallelism, and checkpoint.tp is 1",
            "set engine.reduce_fusion: false, or checkpoint.tp above 1",
        )
    if architecture is not None and architecture not in REDUCE_FUSION_ARCHITECTURES:
        raise InputError(
            f"engine.reduce_fusion does nothing for {architecture}",
            f"set engine.reduce_fusion: false; only {', '.join(REDUCE_FUSION_ARCHITECTURES)} have it",
        )


def _refuse_contradictions(engine: EngineConfig, tp: int, architecture: str | None) -> None:
    if engine.reduce_fusion:
        refuse_inert_reduce_fusion(tp, architecture)
    if engine.use_paged_context_fmha and engine.kv_cache_type != "paged":
        raise InputError(
            f"engine.use_paged_context_fmha reads a paged KV cache, and engine.kv_cache_type is {engine.kv_cache_type}",
            "set engine.use_paged_context_fmha: false, or engine.kv_cache_type: paged",
        )


def _text(name: str, value: str | int | bool, flags: Mapping[str, Kind], version: str) -> str:
    """A setting as trtllm-build wants it, checked against what the version's flag takes."""
    kind = flags.get(name)
    if kind is None:
        raise InputError(f"trtllm-build of TensorRT-LLM {version} has no flag --{name}", f"leave engine.{name} out")
    text = ("enable" if value else "disable") if isinstance(value, bool) else str(value)
    if isinstance(kind, tuple) and text not in kind:
        raise InputError(
            f"trtllm-build of TensorRT-LLM {version} does not take --{name} {text}", f"one of: {', '.join(kind)}"
        )
    return text
