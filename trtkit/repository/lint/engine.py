"""Lint rules that compare config.pbtxt with the engine or the checkpoint that it serves.

Keys of an engine's config: TensorRT-LLM, tensorrt_llm/builder.py (BuildConfig) and tensorrt_llm/plugin/plugin.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from trtkit import releases
from trtkit.checkpoint import rank_file, read_checkpoint_config
from trtkit.engine_files import Engine, read_engine_config
from trtkit.errors import InputError
from trtkit.findings import Finding
from trtkit.repository.lint.parameters import model_folder
from trtkit.repository.lint.repository import Model
from trtkit.repository.lint.rules import finding

_PATH = "gpt_model_path"


def lint_engine(model: Model, engine_dir: Path | None = None) -> Iterator[Finding]:
    """Findings about the engine (`gpt_model_path`, or `engine_dir` for it) or checkpoint (`checkpoint_dir`)."""
    if model.is_ensemble:
        return
    values = model.parameters
    if "checkpoint_dir" in values and values["checkpoint_dir"].isascii():
        folder = model_folder(model, "checkpoint_dir", values["checkpoint_dir"])
        if folder.is_dir():
            yield from _checkpoint(model, folder)
    if _PATH not in values:
        return
    if model.backend == "tensorrtllm":
        yield from _has_backend(model)
    folder = engine_dir or Path(values[_PATH])
    if not folder.is_dir():
        return
    try:
        engine = read_engine_config(folder)
    except InputError as error:
        yield finding("TK133", str(folder / "config.json"), error.cause, error.fix)
        return
    if (missing := engine.missing()) is not None:
        cause = "the file is missing or empty, and config.json has its rank"
        yield finding("TK133", str(missing), cause, "build it again")
    for check in (_sizes, _ranks, _version, _lengths, _context, _vocabulary):
        yield from check(model, engine)


def _checkpoint(model: Model, folder: Path) -> Iterator[Finding]:
    try:
        config = read_checkpoint_config(folder)
    except InputError as error:
        yield finding("TK133", str(folder / "config.json"), error.cause, error.fix)
        return
    files = (folder / rank_file(rank) for rank in range(config["mapping"]["world_size"]))
    if (missing := next((file for file in files if not file.is_file()), None)) is not None:
        cause = "the file is missing or empty, and config.json has its rank"
        yield finding("TK133", str(missing), cause, "build it again")
    limit, longest = config["max_position_embeddings"], model.parameters.get("max_seq_len", "")
    if longest.isdecimal() and int(longest) > limit:
        cause = f"max_seq_len {longest}, and the model knows {limit} positions"
        yield finding("TK205", model.place("max_seq_len"), cause, f"use {limit} at most")


def _has_backend(model: Model) -> Iterator[Finding]:
    tag = model.server.release
    release = next((item for item in releases.load() if item.tag == tag), None)
    if release is not None and not release.has_engine_builder:
        cause = f"release {tag} has TensorRT-LLM {release.tensorrt_llm}, which has no backend for engines"
        yield finding("TK207", model.at("backend"), cause, "serve with an older release, or with runtime llmapi")


def _number(value: object) -> int | None:
    """An integer of an engine's config, or of a parameter."""
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    return value if type(value) is int else None


def _sizes(model: Model, engine: Engine) -> Iterator[Finding]:
    limit, size = _number(engine.build.get("max_batch_size")), model.config.max_batch_size
    if limit is not None and size > limit:
        cause = f"max_batch_size {size}, and the engine runs {limit}"
        fix = f"set it to {limit} or less, or compile the engine for {size}"
        yield finding("TK201", model.at("max_batch_size"), cause, fix)
    width = _number(model.parameters.get("max_beam_width"))
    limit = _number(engine.build.get("max_beam_width"))
    if limit is not None and width is not None and width > limit:
        cause = f"max_beam_width {width}, and the engine has {limit}"
        fix = f"set it to {limit} or less, or compile the engine for {width}"
        yield finding("TK202", model.place("max_beam_width"), cause, fix)


def _ranks(model: Model, engine: Engine) -> Iterator[Finding]:
    """`gpu_device_ids` and `participant_ids` hold a group for each instance: `0,1;2,3`."""
    world = engine.tp * engine.pp
    for key in ("gpu_device_ids", "participant_ids"):
        for group in model.parameters.get(key, "").split(";"):
            names = [part for part in re.split(r"[,\s]+", group) if part]
            # With an orchestrator, a process of its own takes the first place among the participants.
            allowed = {world, world + 1} if key == "participant_ids" else {world}
            if names and len(names) not in allowed:
                cause = f"{key} {group} has {len(names)}, and the engine {world} ranks (TP {engine.tp}, PP {engine.pp})"
                yield finding("TK203", model.place(key), cause, f"name {world} of them")
    gpus, nodes = model.server.gpus, _number(model.parameters.get("num_nodes")) or 1
    if gpus is not None and gpus * nodes < world:
        cause = f"the engine has {world} ranks, and the server {gpus * nodes} GPUs"
        yield finding("TK203", model.place(_PATH), cause, "give the server as many GPUs as ranks")


def _version(model: Model, engine: Engine) -> Iterator[Finding]:
    tag = model.server.release
    release = next((item for item in releases.load() if item.tag == tag), None)
    if release is not None and engine.version != release.tensorrt_llm:
        cause = f"the engine is of TensorRT-LLM {engine.version}, and release {tag} has {release.tensorrt_llm}"
        same = [item.tag for item in releases.load() if item.tensorrt_llm == engine.version]
        fix = f"serve with release {same[0]}, or compile it again" if same else f"compile it with release {tag}"
        yield finding("TK204", model.place(_PATH), cause, fix)


def _lengths(model: Model, engine: Engine) -> Iterator[Finding]:
    longest = _number(engine.build.get("max_seq_len"))
    pool = _number(model.parameters.get("max_tokens_in_paged_kv_cache"))
    if longest is not None and pool is not None and pool < longest:
        cause = f"the KV cache holds {pool} tokens, and one sequence may have {longest}"
        place = model.place("max_tokens_in_paged_kv_cache")
        yield finding("TK205", place, cause, f"raise it to {longest} or more, or remove it")
    for part in model.parameters.get("max_attention_window_size", "").split(","):
        window = _number(part)
        if longest is not None and window is not None and window > longest:
            cause = f"an attention window of {window}, and sequences have {longest} tokens at most"
            yield finding("TK205", model.place("max_attention_window_size"), cause, f"use {longest} at most")
    tokens, prompt = _number(engine.build.get("max_num_tokens")), _number(engine.build.get("max_input_len"))
    chunked = model.parameters.get("enable_chunked_context", "").lower() == "true"
    if tokens is not None and prompt is not None and tokens < prompt and not chunked:
        cause = f"the engine takes {tokens} tokens at a time, so prompts of up to {prompt} do not fit"
        fix = "set enable_chunked_context to true, or compile with a greater max_num_tokens"
        yield finding("TK205", model.place("enable_chunked_context", _PATH), cause, fix)


def _context(model: Model, engine: Engine) -> Iterator[Finding]:
    plugins = engine.build.get("plugin_config")
    if not isinstance(plugins, dict) or plugins.get("use_paged_context_fmha") is not False:
        return
    for key in ("enable_kv_cache_reuse", "enable_chunked_context"):
        if model.parameters.get(key, "").lower() == "true":
            cause = f"{key}, and the engine was compiled without use_paged_context_fmha"
            fix = f"set {key} to false, or compile with use_paged_context_fmha"
            yield finding("TK206", model.place(key), cause, fix)


def _vocabulary(model: Model, engine: Engine) -> Iterator[Finding]:
    """The tokenizers of a repository are in other models: each of them is compared with this engine."""
    size = _number(engine.pretrained.get("vocab_size"))
    if size is None:
        return
    from trtkit.repository.lint.tokenizer import highest_ids

    for place, highest in highest_ids(model.path.parent):
        if highest >= size:
            cause = f"it gives ids up to {highest}, and the engine of '{model.name}' has {size}"
            yield finding("TK211", place, cause, "use the tokenizer of the source that the engine was made of")
