"""A model repository from a build config: every file as data first, then written in one go.

Four models, as in NVIDIA's inflight_batcher_llm repository: preprocessing, tensorrt_llm, postprocessing and the
ensemble that joins them. The runtime changes the directory `tensorrt_llm` and nothing else.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from trtkit import contract, pbtxt
from trtkit.config import BuildConfig
from trtkit.errors import CheckFailedError, InputError
from trtkit.findings import has_errors
from trtkit.hf import eos_token_ids

MARKER = "trtkit-repository.json"
"""Plain file in the repository's root, which Triton ignores: this folder was generated and may be generated again."""

Files = dict[str, bytes | str]
"""Content by path inside the repository, with `/` between folders."""

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.json",
    "chat_template.jinja",
)


def render_repository(
    config: BuildConfig,
    *,
    tokenizer_dir: Path,
    checkpoint_dir: Path | None = None,
    engine_dir: Path | None = None,
    model_path_in_container: str | None = None,
    logits_dtype: str = "FP32",
) -> Files:
    """Every file of the repository that `config` asks for. Reads the tokenizer, writes nothing.

    Args:
        tokenizer_dir: folder with tokenizer.json, and with generation_config.json or config.json for the end ids. The
            tokenizer is copied into the repository, so that it can be moved.
        checkpoint_dir: TRT-LLM checkpoint, for the `reference` runtime.
        engine_dir: engine, for the `tensorrtllm` runtime.
        model_path_in_container: where the server will find the checkpoint or engine, when that is not where it is now.
        logits_dtype: dtype of the engine's logits, `FP32` or `FP16`.

    Raises:
        InputError: the tokenizer or the folder that the runtime needs is missing, or `model_path_in_container` is not
            absolute.
    """
    if model_path_in_container is not None and not PurePosixPath(model_path_in_container).is_absolute():
        raise InputError(
            f"--model-path-in-container {model_path_in_container} is not absolute",
            "give the whole path inside the container, such as /models/engine",
        )
    runtime = config.serving.runtime
    model_dir = checkpoint_dir if runtime == "reference" else engine_dir
    if model_dir is None and model_path_in_container is None:
        kind = "checkpoint" if runtime == "reference" else "engine"
        raise InputError(f"runtime '{runtime}' needs a folder with the {kind}", f"give --{kind} DIR")
    model_path = model_path_in_container or str(Path(model_dir or "").resolve())
    end_ids = eos_token_ids(tokenizer_dir)
    files: Files = {MARKER: json.dumps({"generator": "trtkit", "name": config.name}, indent=2) + "\n"}
    files.update(_preprocessing(config, tokenizer_dir, end_ids))
    if runtime == "reference":
        files.update(_reference(config, model_path, end_ids))
    else:
        files.update(_tensorrtllm(config, model_path, logits_dtype))
    files.update(_postprocessing(config, tokenizer_dir))
    files.update(_ensemble(config))
    return files


def write_repository(files: Files, out: Path, *, force: bool = False) -> None:
    """Writes a rendered repository, lints it, and only then puts it in place of what was at `out`.

    That the checkpoint is not on this machine (TK138) is no obstacle: the repository may be written for another one.

    Args:
        force: replace a folder that trtkit did not generate.

    Raises:
        InputError: `out` holds something else and `force` is off.
        CheckFailedError: the linter finds errors; `out` is as it was.
    """
    from trtkit.repository.lint import lint_repository
    from trtkit.store import atomic_dir

    check_replaceable(out, force=force)
    with atomic_dir(out, replace=True) as temporary:
        for name, content in files.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        findings = [finding for finding in lint_repository(temporary) if finding.id != "TK138"]
        if has_errors(findings):
            first = next(finding for finding in findings if finding.severity == "error")
            raise CheckFailedError(f"{first.id} {first.place}: {first.cause}", first.fix)


def check_replaceable(out: Path, *, force: bool = False) -> None:
    """Raises InputError when `out` holds something that trtkit did not generate, unless `force` is on."""
    if not force and out.exists() and not is_generated(out) and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(
            f"{out} exists and trtkit did not generate it ({MARKER} is missing)",
            "choose another folder, or replace it with --force",
        )


def is_generated(path: Path) -> bool:
    """Whether trtkit generated the folder `path`."""
    try:
        marker = json.loads((path / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(marker, dict) and marker.get("generator") == "trtkit"


def _preprocessing(config: BuildConfig, tokenizer_dir: Path, end_ids: list[int]) -> Files:
    serving = config.serving
    message = pbtxt.model_config(
        "preprocessing",
        inputs=contract.PREPROCESSING_INPUTS,
        outputs=contract.PREPROCESSING_OUTPUTS,
        max_batch_size=serving.max_batch_size,
        decoupled=False,
        backend="python",
        instances=serving.preprocessing_instances,
        parameters={
            "tokenizer_dir": "tokenizer",
            "add_special_tokens": _flag(serving.add_special_tokens),
            "end_ids": ",".join(map(str, end_ids)),
            "pad_id": str(_pad_id(tokenizer_dir, end_ids)),
        },
        dynamic_batching=_batching(config),
    )
    files: Files = {"preprocessing/config.pbtxt": pbtxt.dumps(message)}
    files.update(_model_code("preprocessing"))
    _tokenizer_json(tokenizer_dir)
    for name in _TOKENIZER_FILES:
        if (tokenizer_dir / name).is_file():
            files[f"preprocessing/1/tokenizer/{name}"] = (tokenizer_dir / name).read_bytes()
    return files


def _postprocessing(config: BuildConfig, tokenizer_dir: Path) -> Files:
    message = pbtxt.model_config(
        "postprocessing",
        inputs=contract.POSTPROCESSING_INPUTS,
        outputs=contract.POSTPROCESSING_OUTPUTS,
        max_batch_size=config.serving.max_batch_size,
        decoupled=False,
        backend="python",
        instances=1,  # more would mix up the order of a stream's pieces
        parameters={"tokenizer_dir": "tokenizer", "skip_special_tokens": "true"},
        dynamic_batching={},
    )
    files: Files = {"postprocessing/config.pbtxt": pbtxt.dumps(message)}
    files.update(_model_code("postprocessing"))
    files["postprocessing/1/tokenizer/tokenizer.json"] = _tokenizer_json(tokenizer_dir)
    return files


def _ensemble(config: BuildConfig) -> Files:
    message = pbtxt.model_config(
        "ensemble",
        inputs=contract.ENSEMBLE_INPUTS,
        outputs=contract.ENSEMBLE_OUTPUTS,
        max_batch_size=config.serving.max_batch_size,
        decoupled=config.serving.streaming,  # what the server would derive from the steps
    )
    pbtxt.add_steps(message, contract.ENSEMBLE_STEPS)
    return {"ensemble/config.pbtxt": pbtxt.dumps(message), "ensemble/1/.gitkeep": ""}


def _reference(config: BuildConfig, model_path: str, end_ids: list[int]) -> Files:
    parameters = {
        "checkpoint_dir": model_path,
        "end_ids": ",".join(map(str, end_ids)),
        "exclude_input_in_output": "true",
    }
    if config.engine.max_seq_len is not None:
        parameters["max_seq_len"] = str(config.engine.max_seq_len)
    files: Files = {"tensorrt_llm/config.pbtxt": _llm_config(config, "python", parameters)}
    files.update(_model_code("reference", "tensorrt_llm"))
    return files


def _tensorrtllm(config: BuildConfig, model_path: str, logits_dtype: str) -> Files:
    """The C++ backend. Parameter names and values: tensorrtllm_backend v0.20, docs/model_config.md."""
    serving = config.serving
    parameters = {
        "gpt_model_type": "inflight_fused_batching",
        "gpt_model_path": model_path,
        "batch_scheduler_policy": "guaranteed_no_evict",
        "max_beam_width": str(config.engine.max_beam_width),
        "kv_cache_free_gpu_mem_fraction": str(serving.kv_cache_free_gpu_mem_fraction),
        "enable_kv_cache_reuse": _flag(serving.enable_kv_cache_reuse),
        "enable_chunked_context": _flag(serving.enable_chunked_context),
        "exclude_input_in_output": "true",
        "FORCE_CPU_ONLY_INPUT_TENSORS": "no",
        "executor_worker_path": "/opt/tritonserver/backends/tensorrtllm/trtllmExecutorWorker",
    }
    text = _llm_config(config, "tensorrtllm", parameters, logits_dtype)
    return {"tensorrt_llm/config.pbtxt": text, "tensorrt_llm/1/.gitkeep": ""}


def _llm_config(config: BuildConfig, backend: str, parameters: dict[str, str], logits_dtype: str = "FP32") -> str:
    reference = backend == "python"
    message = pbtxt.model_config(
        "tensorrt_llm",
        inputs=contract.llm_inputs(reference=reference, logits_dtype=logits_dtype),
        outputs=contract.llm_outputs(reference=reference, logits_dtype=logits_dtype),
        max_batch_size=config.serving.max_batch_size,
        decoupled=config.serving.streaming,
        backend=backend,
        parameters=parameters,
        dynamic_batching=_batching(config),
    )
    return pbtxt.dumps(message)


def _batching(config: BuildConfig) -> dict[str, Any]:
    serving = config.serving
    return {
        "preferred_batch_size": serving.preferred_batch_size,
        "max_queue_delay_microseconds": serving.max_queue_delay_microseconds,
        "default_queue_policy": {"max_queue_size": serving.max_queue_size},
    }


def _model_code(source: str, model: str | None = None) -> Files:
    """The Python files of a model, as version 1."""
    folder = Path(__file__).parent / "models" / source
    # The reference model runs where trtkit is installed and imports the rest of itself; the others bring their helpers.
    names = ["model.py"] if source == "reference" else sorted(path.name for path in folder.glob("*.py"))
    code = [folder / name for name in names if name != "__init__.py"]
    return {f"{model or source}/1/{path.name}": path.read_bytes() for path in code}


def _tokenizer_json(folder: Path) -> bytes:
    try:
        return (folder / "tokenizer.json").read_bytes()
    except OSError as error:
        raise InputError(
            f"{folder} has no readable tokenizer.json: {error.strerror}",
            'write one: python -c "from transformers import AutoTokenizer as A; '
            f"A.from_pretrained('{folder}').save_pretrained('{folder}')\"",
        ) from error


def _pad_id(folder: Path, end_ids: list[int]) -> int:
    """The padding id that the source names, else the first end id, else 0. Only lengths give padding a meaning."""
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        try:
            value = json.loads(file.read_text(encoding="utf-8")).get("pad_token_id") if file.is_file() else None
        except (ValueError, AttributeError) as error:
            raise InputError(f"{file} is not a JSON object: {error}", "copy it from the source again") from error
        if isinstance(value, int) and value >= 0:
            return value
    return end_ids[0] if end_ids else 0


def _flag(value: bool) -> str:
    return "true" if value else "false"
