"""A model repository from a build config: every file as data first, then written in one go.

What is in it, `trtkit.repository.layouts` says.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path, PurePosixPath

from trtkit.config import BuildConfig
from trtkit.errors import CheckFailedError, InputError
from trtkit.findings import has_errors
from trtkit.hf import is_hub_id
from trtkit.repository.layouts import render
from trtkit.repository.layouts.job import Content, Files, Job

MARKER = "trtkit-repository.json"
"""Plain file in the repository's root, which Triton ignores: this folder was generated and may be generated again."""


def render_repository(
    config: BuildConfig,
    *,
    tokenizer_dir: Path | None = None,
    checkpoint_dir: Path | None = None,
    engine_dir: Path | None = None,
    model_path_in_container: str | None = None,
    logits_dtype: str = "FP32",
    repository_path: str | None = None,
) -> Files:
    """Every file of the repository that `config` asks for. Reads tokenizer, graph or code, and writes nothing.

    Args:
        tokenizer_dir: folder with tokenizer.json, and with generation_config.json or config.json for the end ids. The
            tokenizer is copied into the repository, so that it can be moved. None takes `model.source`.
        checkpoint_dir: TRT-LLM checkpoint, for the `reference` runtime; Hugging Face checkpoint, for `llmapi` and
            `vllm`, whose default is `model.source`.
        engine_dir: engine, for the `tensorrtllm` runtime.
        model_path_in_container: where the server will find the checkpoint or engine, when that is not where it is now.
        logits_dtype: dtype of the engine's logits, `FP32` or `FP16`.
        repository_path: where the server will find the repository, for runtimes that need whole paths into it.

    Raises:
        InputError: what the runtime needs is missing, or the config asks for what its release does not know.
    """
    for option, path in (("model-path", model_path_in_container), ("repository", repository_path)):
        if path is not None and not PurePosixPath(path).is_absolute():
            raise InputError(
                f"--{option}-in-container {path} is not absolute",
                "give the whole path inside the container, such as /models/engine",
            )
    model_path, from_hub = _model_path(config, checkpoint_dir, engine_dir, model_path_in_container)
    job = Job(config, tokenizer_dir or Path(config.model.source), model_path, logits_dtype, repository_path, from_hub)
    files: Files = {MARKER: json.dumps({"generator": "trtkit", "name": config.name}, indent=2) + "\n"}
    return {**files, **render(job)}


def _model_path(
    config: BuildConfig, checkpoint_dir: Path | None, engine_dir: Path | None, in_container: str | None
) -> tuple[str, bool]:
    """Where the server finds what the runtime executes, and whether that is a hub id."""
    runtime, serving = config.serving.runtime, config.serving
    if runtime in ("onnxruntime", "python"):
        chosen = serving.onnx.model if runtime == "onnxruntime" else serving.python.model
        return chosen or config.model.source, False
    if in_container is not None:
        return in_container, False
    if runtime in ("llmapi", "vllm"):
        folder = checkpoint_dir or Path(config.model.source)
        if checkpoint_dir is None and not folder.is_dir() and is_hub_id(config.model.source):
            return config.model.source, True
        _check_huggingface(folder)
        return str(folder.resolve()), False
    folder_or_none = checkpoint_dir if runtime == "reference" else engine_dir
    if folder_or_none is None:
        kind = "checkpoint" if runtime == "reference" else "engine"
        raise InputError(f"runtime '{runtime}' needs a folder with the {kind}", f"give --{kind} DIR")
    return str(folder_or_none.resolve()), False


def _check_huggingface(folder: Path) -> None:
    """Raises InputError when `folder` is no Hugging Face checkpoint, the only kind that llmapi and vllm load."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {error}", "give the folder of a Hugging Face checkpoint") from error
    if not isinstance(config, dict) or "model_type" not in config:
        kind = "a TRT-LLM checkpoint" if isinstance(config, dict) and "mapping" in config else "something else"
        raise InputError(
            f"{folder} is {kind}", "runtimes llmapi and vllm load Hugging Face checkpoints; give one of these"
        )


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
            if isinstance(content, Path):
                shutil.copyfile(content, path)
            else:
                path.write_bytes(content.encode() if isinstance(content, str) else content)
        findings = [finding for finding in lint_repository(temporary) if finding.id != "TK138"]
        if has_errors(findings):
            first = next(finding for finding in findings if finding.severity == "error")
            raise CheckFailedError(f"{first.id} {first.place}: {first.cause}", first.fix)


def size_of(content: Content) -> int:
    """Bytes of a rendered file."""
    if isinstance(content, Path):
        return content.stat().st_size
    return len(content.encode() if isinstance(content, str) else content)


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
