"""From a build config to finished artifacts: checkpoint, then engine, each made once per set of inputs.

What is made depends on the runtime: a TRT-LLM checkpoint and an engine (tensorrtllm), the checkpoint alone (reference),
a quantised Hugging Face checkpoint (llmapi, vllm), or nothing, where the source is served as it is.

The artifact store names every output by the digest of all that determines it, so a rerun reuses what is finished, and a
crash costs only the step that it interrupted.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trtkit import __version__, hf, releases
from trtkit.accuracy import check, read
from trtkit.checkpoint import open_checkpoint
from trtkit.config import BuildConfig
from trtkit.convert.conversion import write_checkpoint
from trtkit.convert.plan import Plan
from trtkit.convert.quantization import Quantization
from trtkit.convert.source import asked_quantization, plan_conversion
from trtkit.convert.verify import verify
from trtkit.engine.builders import BuildCommand, compile_into, plan_build
from trtkit.errors import CheckFailedError, InputError
from trtkit.quantized import Settings, check_runs, write_export, write_quantized
from trtkit.store import ArtifactStore, digest

EXPORTED = ("llmapi", "vllm")
"""Runtimes that load Hugging Face checkpoints, and split them over GPUs themselves."""
CHECKPOINT, EXPORT, ENGINE = "checkpoint", "export", "engine"
"""Kinds of artifacts. An export is a quantised Hugging Face checkpoint."""


@dataclass(frozen=True)
class BuildPlan:
    """What a build would do. Nothing of it has been done.

    Attributes:
        source: the opened source.
        conversion: source -> checkpoint.
        exports: the checkpoint is a quantised Hugging Face checkpoint, and not one of TRT-LLM.
        checkpoint_dir: where the checkpoint is or will be, in the store.
        checkpoint_inputs, engine_inputs: all that determines the two artifacts.
        engine_dir, command: where the engine goes and what compiles it; None for runtimes without an engine.
    """

    config: BuildConfig
    source: hf.Source
    conversion: Plan
    checkpoint_inputs: dict[str, Any]
    checkpoint_dir: Path
    engine_inputs: dict[str, Any] | None
    engine_dir: Path | None
    command: BuildCommand | None

    @property
    def exports(self) -> bool:
        return self.config.serving.runtime in EXPORTED

    @property
    def checkpoint_kind(self) -> str:
        return EXPORT if self.exports else CHECKPOINT

    @property
    def skipped(self) -> str | None:
        """Why there is no engine; None where there is one."""
        if self.command is not None:
            return None
        runtime = self.config.serving.runtime
        return f"no engine step: runtime '{runtime}' executes the checkpoint itself"


@dataclass(frozen=True)
class Built:
    """Finished artifacts of a build config, and which of them were there before."""

    checkpoint_dir: Path
    checkpoint_reused: bool
    engine_dir: Path | None
    engine_reused: bool

    def to_dict(self) -> dict[str, Any]:
        return {
            "checkpoint": str(self.checkpoint_dir),
            "checkpoint_reused": self.checkpoint_reused,
            "engine": str(self.engine_dir) if self.engine_dir else None,
            "engine_reused": self.engine_reused,
        }


def nothing_to_build(config: BuildConfig) -> str | None:
    """Why a config needs no build: its runtime serves the source itself. None when there is something to build.

    Raises:
        InputError: there is no such source.
    """
    runtime, serving = config.serving.runtime, config.serving
    if runtime in ("onnxruntime", "python"):
        chosen = serving.onnx.model if runtime == "onnxruntime" else serving.python.model
        file = Path(chosen or config.model.source)
        if not file.is_file():
            raise InputError(f"there is no file {file} for runtime '{runtime}' to serve", "check model.source")
        return f"nothing to build: runtime '{runtime}' serves {file} itself"
    if runtime in EXPORTED and not _quantizes(config):
        source = config.model.source
        if not Path(source).is_dir() and not hf.is_hub_id(source):
            fix = "give a folder, or a hub id such as owner/name"
            raise InputError(f"source '{source}' is nothing that runtime '{runtime}' can serve", fix)
        return f"nothing to build: runtime '{runtime}' serves {source} itself"
    return None


def plan(config: BuildConfig, store: ArtifactStore) -> BuildPlan:
    """What `run` will do, after opening the source by its headers.

    Raises:
        InputError: the source is damaged, the config asks for what model or release cannot do, or there is nothing to
            build (see `nothing_to_build`).
        LacksError: the source cannot be downloaded.
    """
    if reason := nothing_to_build(config):
        raise InputError(reason, "serve it: `trtkit repo generate`, then `trtkit deploy up`")
    source = hf.open_source(config.model.source, revision=config.model.revision)
    _check_quantization(config, source)
    if config.serving.runtime in EXPORTED:
        return _plan_export(config, source, store)
    conversion = plan_conversion(source, config.checkpoint)
    checkpoint_inputs = _checkpoint_inputs(config, source, conversion)
    checkpoint_dir = store.path(CHECKPOINT, checkpoint_inputs)
    if config.serving.runtime != "tensorrtllm":
        return BuildPlan(config, source, conversion, checkpoint_inputs, checkpoint_dir, None, None, None)
    planned = plan_build(config, checkpoint_dir, store.root / "engine" / "new", architecture=source.architecture)
    _check_stages(config, conversion, planned.tensorrt_llm)
    engine_inputs = {
        "checkpoint": digest(checkpoint_inputs),
        "engine": config.engine.model_dump(exclude={"builder", "workers"}),
        "tensorrt_llm": planned.tensorrt_llm,
        "image": planned.image,
        "gpus": _gpus(),
    }
    engine_dir = store.path(ENGINE, engine_inputs)
    command = replace(planned, engine_dir=engine_dir)
    return BuildPlan(config, source, conversion, checkpoint_inputs, checkpoint_dir, engine_inputs, engine_dir, command)


def _plan_export(config: BuildConfig, source: hf.Source, store: ArtifactStore) -> BuildPlan:
    """The plan of a quantised Hugging Face checkpoint, which is never split."""
    whole = {"tp": 1, "pp": 1, "ep": 1, "parallel_embedding": "none"}
    conversion = plan_conversion(source, config.checkpoint.model_copy(update=whole))
    asked = asked_quantization(config.checkpoint)
    if config.checkpoint.quantization.max_perplexity_increase and not asked.makes_tensors:
        raise InputError(
            f"{asked.format or 'a KV cache'} is made when the runtime loads it, so its accuracy cannot be "
            "measured before",
            "leave out checkpoint.quantization.max_perplexity_increase",
        )
    inputs = _checkpoint_inputs(config, source, conversion)
    return BuildPlan(config, source, conversion, inputs, store.path(EXPORT, inputs), None, None, None)


def _checkpoint_inputs(config: BuildConfig, source: hf.Source, conversion: Plan) -> dict[str, Any]:
    """All that determines a checkpoint."""
    inputs = {"source": source.identity(), "config": conversion.config, "trtkit": __version__}
    return {**inputs, "calibration": _calibration_identity(config)} if _quantizes(config) else inputs


def run(
    planned: BuildPlan,
    store: ArtifactStore,
    *,
    on_step: Callable[[str], None] = lambda step: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_line: Callable[[str], None] | None = None,
) -> Built:
    """Makes what is not there yet.

    Args:
        on_step: told in a few words what begins.
        on_progress: source bytes (done, total) of the conversion.
        on_line: lines that trtllm-build prints.

    Raises: what converting, reading back and compiling raise; finished artifacts stay.
    """

    def make_checkpoint(folder: Path) -> None:
        on_step(f"{'exporting' if planned.exports else 'converting'} {planned.source.path.name}")
        if _quantizes(planned.config):
            _quantize(planned, folder, on_step)
        else:
            write_checkpoint(planned.conversion, planned.source, folder, on_progress=on_progress)
        if planned.exports:
            return
        on_step("reading the checkpoint back")
        result = verify(planned.source, open_checkpoint(folder))
        if not result.passed:
            name = result.first_difference
            raise CheckFailedError(f"the checkpoint differs from its source in '{name}'", "check disk and memory")

    checkpoint_dir, checkpoint_reused = store.build(
        planned.checkpoint_kind, planned.checkpoint_inputs, make_checkpoint, resume=True
    )
    _check_accuracy(planned.config, checkpoint_dir)
    if planned.command is None or planned.engine_inputs is None:
        return Built(checkpoint_dir, checkpoint_reused, None, False)
    command, identity = planned.command, digest(planned.checkpoint_inputs)

    def make_engine(folder: Path) -> None:
        on_step(f"compiling the engine: {command.line}")
        compile_into(command, folder, on_line=on_line, checkpoint_digest=identity)

    engine_dir, engine_reused = store.build(ENGINE, planned.engine_inputs, make_engine)
    return Built(checkpoint_dir, checkpoint_reused, engine_dir, engine_reused)


def find(config: BuildConfig, store: ArtifactStore) -> Built:
    """The finished artifacts of a config.

    Raises:
        InputError: they have not been built, the source or config changed since, or there is nothing to build.
    """
    planned = plan(config, store)
    checkpoint_dir = store.get(planned.checkpoint_kind, planned.checkpoint_inputs)
    engine_dir = store.get(ENGINE, planned.engine_inputs) if planned.engine_inputs else None
    if checkpoint_dir is None or (planned.engine_inputs and engine_dir is None):
        missing = "checkpoint" if checkpoint_dir is None else "engine"
        raise InputError(f"'{config.name}' as it is now has no finished {missing}", "run `trtkit build` first")
    return Built(checkpoint_dir, True, engine_dir, engine_dir is not None)


def _quantizes(config: BuildConfig) -> bool:
    return asked_quantization(config.checkpoint) != Quantization()


def _check_quantization(config: BuildConfig, source: hf.Source) -> None:
    """Refuses, before any work, what the release, the GPU or the runtime cannot run."""
    if _quantizes(config):
        check_runs(
            asked_quantization(config.checkpoint),
            source.architecture,
            runtime=config.serving.runtime,
            tensorrt_llm=releases.get(config.deploy.release).tensorrt_llm,
            gpu=config.checkpoint.quantization.gpu,
        )


def _calibration_identity(config: BuildConfig) -> dict[str, Any]:
    """The settings of the calibration; of a text in a file also what is in it."""
    calibration = config.checkpoint.quantization.calibration
    text = Path(calibration.text) if calibration.text else None
    content = hashlib.sha256(text.read_bytes()).hexdigest() if text and text.is_file() else None
    return {**calibration.model_dump(exclude={"text"} if content else set()), "content": content}


def _quantize(planned: BuildPlan, folder: Path, on_step: Callable[[str], None]) -> None:
    calibration = planned.config.checkpoint.quantization.calibration
    settings = Settings(calibration.text, calibration.samples, calibration.length, calibration.seed)
    told = ""

    def tell(what: str, unit: str, done: int, total: int) -> None:
        nonlocal told
        if what != told:
            told = what
            on_step(what)

    write = write_export if planned.exports else write_quantized
    write(planned.conversion, planned.source, folder, settings, on_step=tell)


def _check_accuracy(config: BuildConfig, checkpoint_dir: Path) -> None:
    """Fails a build whose quantisation cost more than the config allows. The checkpoint stays: its measurement is in
    accuracy.json, and with a higher limit the next build goes on with it."""
    limit = config.checkpoint.quantization.max_perplexity_increase
    if limit is not None and _quantizes(config):
        check(read(checkpoint_dir), limit)


def _gpus() -> list[str]:
    """Kinds of GPU of this machine, for which engines are compiled: name and compute capability. Empty without any."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return sorted({line.strip() for line in done.stdout.splitlines() if line.strip()})


def _check_stages(config: BuildConfig, conversion: Plan, tensorrt_llm: str) -> None:
    """Before 1.0 the loader gave every stage layers // pp layers and dropped the rest without a word."""
    layers = conversion.config["num_hidden_layers"]
    if layers % config.checkpoint.pp and int(tensorrt_llm.split(".", maxsplit=1)[0]) < 1:
        raise InputError(
            f"TensorRT-LLM {tensorrt_llm} drops layers: PP {config.checkpoint.pp} does not divide {layers} of them",
            "choose a PP that divides the layers, or a release with TensorRT-LLM 1.0 or later",
        )
