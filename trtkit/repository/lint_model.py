"""Lint rules about one model: its files, batching, tensors and parameters."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trtkit.checkpoint import rank_file, read_checkpoint_config
from trtkit.engine_files import read_engine_config
from trtkit.errors import InputError
from trtkit.findings import Finding
from trtkit.repository.lint_code import lint_code
from trtkit.repository.lint_rules import Model, finding

_PLATFORMS = {
    "ensemble", "tensorrt_plan", "tensorflow_graphdef", "tensorflow_savedmodel", "onnxruntime_onnx", "pytorch_libtorch",
}  # fmt: skip
_BATCHING_TYPES = {"inflight_fused_batching", "inflight_batching", "V1", "v1"}
_SCHEDULERS = {"guaranteed_no_evict", "max_utilization", "static_batch"}


def lint_model(model: Model) -> list[Finding]:
    """Findings about one model whose config.pbtxt could be read."""
    checks = (_files, lint_code, _batching, _queue, _decoupled, _instances, _tensors, _warmup, _parameters)
    return [found for check in checks for found in check(model)]


def _files(model: Model) -> Iterator[Finding]:
    config = model.config
    for number, line in enumerate(model.text.splitlines(), 1):
        if match := re.search(r"\$\{[^}]*\}", re.sub(r"^\s*#.*", "", line)):
            place = f"{model.name}/config.pbtxt:{number}"
            yield finding(
                "TK104",
                place,
                f"placeholder {match.group()} is not filled in",
                "put the value there, or remove the line",
            )
    if config.name and config.name != model.name:
        place, cause = model.place(config.name), f"name '{config.name}' in directory '{model.name}'"
        yield finding("TK105", place, cause, f'set name: "{model.name}", or rename the directory')
    if not model.versions:
        yield finding("TK106", model.name, "no version directory", "put the model's files into a directory '1'")
    elif not model.served_versions():
        cause = f"the version policy serves none of the versions {', '.join(map(str, model.versions))}"
        yield finding(
            "TK106", model.place("version_policy"), cause, "name an existing version, or remove version_policy"
        )
    if config.platform and config.platform not in _PLATFORMS:
        fix = f'write backend: "{config.platform}" instead, or one of the platforms {", ".join(sorted(_PLATFORMS))}'
        yield finding("TK109", model.place("platform"), f"unknown platform '{config.platform}'", fix)
    if not config.platform and not config.backend and not model.is_ensemble:
        yield finding(
            "TK110", model.place(), "the server has to guess the backend", 'write it down, such as backend: "python"'
        )


def _batching(model: Model) -> Iterator[Finding]:
    config = model.config
    size = config.max_batch_size
    if size < 0:
        yield finding(
            "TK111", model.place("max_batch_size"), f"max_batch_size is {size}", "use 0 for no batching, or more"
        )
        return
    if config.HasField("dynamic_batching") and size == 0:
        yield finding(
            "TK113", model.place("dynamic_batching"), "no request is ever batched", "set max_batch_size to 1 or more"
        )
    for preferred in config.dynamic_batching.preferred_batch_size:
        if preferred < 1 or preferred > size > 0:
            cause = f"preferred_batch_size {preferred} with max_batch_size {size}"
            yield finding("TK112", model.place("preferred_batch_size"), cause, f"use sizes from 1 to {size}")
    for tensor in config.input:
        if tensor.allow_ragged_batch and size == 0:
            cause = f"input '{tensor.name}' allows ragged batches, but there are no batches"
            yield finding("TK114", model.place(tensor.name), cause, "set max_batch_size to 1 or more")


def _queue(model: Model) -> Iterator[Finding]:
    batching = model.config.dynamic_batching
    if not batching.priority_levels:
        return
    cause = "priority levels made requests of 20 ms wait for 500 ms and more (measured on server 2.51)"
    yield finding(
        "TK116", model.place("priority_levels"), cause, "remove priority_levels; give priority before the server"
    )
    if not 1 <= batching.default_priority_level <= batching.priority_levels:
        cause = f"default_priority_level {batching.default_priority_level} of {batching.priority_levels}"
        fix = f"set it to 1 to {batching.priority_levels}"
        yield finding("TK117", model.place("default_priority_level", "priority_levels"), cause, fix)


def _decoupled(model: Model) -> Iterator[Finding]:
    config = model.config
    if not config.model_transaction_policy.decoupled:
        return
    if config.response_cache.enable:
        fix = "turn off response_cache or decoupled"
        yield finding("TK118", model.place("response_cache"), "the cache holds single answers only", fix)
    if config.dynamic_batching.preserve_ordering:
        cause = "preserve_ordering does nothing for the responses of a decoupled model"
        yield finding("TK119", model.place("preserve_ordering"), cause, "remove it")
    if config.HasField("sequence_batching"):
        cause = "sequence batching expects one response per request"
        yield finding("TK119", model.place("sequence_batching"), cause, "turn off decoupled, or batch dynamically")


def _instances(model: Model) -> Iterator[Finding]:
    from tritonclient.grpc import model_config_pb2 as pb

    for group in model.config.instance_group:
        if group.gpus and group.kind in (pb.ModelInstanceGroup.KIND_CPU, pb.ModelInstanceGroup.KIND_MODEL):
            kind = pb.ModelInstanceGroup.Kind.Name(group.kind)
            cause = f"{kind} with gpus {list(group.gpus)}"
            yield finding("TK115", model.place(kind), cause, "remove gpus, or use KIND_GPU")


def _tensors(model: Model) -> Iterator[Finding]:
    for kind, tensors in (("input", model.config.input), ("output", model.config.output)):
        seen: set[str] = set()
        for tensor in tensors:
            lacks = [
                part
                for part, missing in (
                    ("name", not tensor.name),
                    ("data_type", not tensor.data_type),
                    ("dims", not tensor.dims or any(dim == 0 or dim < -1 for dim in tensor.dims)),
                )
                if missing
            ]
            if lacks:
                cause = f"{kind} '{tensor.name}' has no valid {' and '.join(lacks)}"
                yield finding(
                    "TK121", model.place(tensor.name or kind), cause, "dims are 1 or more, or -1 for any size"
                )
            elif problem := _reshape_problem(tensor, model.config.max_batch_size):
                yield finding(
                    "TK123", model.place(tensor.name), f"{kind} '{tensor.name}' {problem}", "make the two equal"
                )
            if tensor.name in seen:
                cause = f"{kind} '{tensor.name}' is given twice"
                yield finding("TK122", model.place(tensor.name), cause, "remove one of them")
            seen.add(tensor.name)


def _reshape_problem(tensor: Any, max_batch_size: int) -> str | None:
    if not tensor.HasField("reshape"):
        return None
    dims, shape = list(tensor.dims), list(tensor.reshape.shape)
    if not shape and max_batch_size == 0:
        return "reshapes to nothing without a batch dimension"
    fixed = math.prod(dim for dim in dims if dim > 0), math.prod(dim for dim in shape if dim > 0)
    if fixed[0] != fixed[1] or dims.count(-1) != shape.count(-1):
        return f"reshapes {dims} to {shape}"
    return None


def _warmup(model: Model) -> Iterator[Finding]:
    names = {tensor.name for tensor in model.config.input}
    for warmup in model.config.model_warmup:
        for unknown in sorted(set(warmup.inputs) - names):
            yield finding(
                "TK124", model.place(unknown), f"warmup '{warmup.name}' has unknown input '{unknown}'", "remove it"
            )


def _parameters(model: Model) -> Iterator[Finding]:
    values = {key: item.string_value for key, item in model.config.parameters.items()}
    values = {key: value for key, value in values.items() if value and "${" not in value}
    for key in ("gpt_model_path", "encoder_model_path", "checkpoint_dir", "tokenizer_dir"):
        value = values.get(key)
        if value is None:
            continue
        if model.config.backend == "python" and not value.isascii():
            cause = f"{key} {value} is not ASCII, and the server's Python reads ASCII paths only"
            yield finding("TK137", model.place(value), cause, "move it to a path of ASCII characters")
            continue
        if key == "tokenizer_dir" and "/" not in value:
            yield from _own_tokenizer(model, value)
            continue
        folder = _folder(model, key, value)
        if not folder.is_dir():
            if key == "checkpoint_dir" and folder.parent.is_dir():
                cause = f"{key} {value} does not exist, though {folder.parent} does"
                yield finding("TK138", model.place(value), cause, "convert the checkpoint again, or correct the path")
                continue
            cause = f"{key} {value} does not exist on this machine"
            yield finding("TK131", model.place(value), cause, "make sure that it exists where the server runs")
        elif key in ("gpt_model_path", "checkpoint_dir"):
            yield from _ranks(key, folder)
    if model.config.backend == "tensorrtllm":
        yield from _backend_values(model, values)


def _own_tokenizer(model: Model, folder: str) -> Iterator[Finding]:
    from tokenizers import Tokenizer

    from trtkit.repository.models.postprocessing.detokenizer import TokenBytes

    for version in model.served_versions():
        file = model.path / str(version) / folder / "tokenizer.json"
        place = f"{model.name}/{version}/{folder}/tokenizer.json"
        if not file.is_file():
            fix = "generate the repository again, or copy the tokenizer there"
            yield finding("TK132", place, "the file is missing", fix)
            continue
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises no more special type
            cause = f"not a tokenizer: {' '.join(str(error).split())}"
            yield finding("TK135", place, cause, "copy the source's tokenizer.json there again")
            continue
        if (file.parents[1] / "detokenizer.py").is_file() and not TokenBytes(tokenizer).exact:
            cause = "its decoder looks at neighbouring tokens, and a streamed piece does not have them"
            yield finding("TK136", place, cause, "serve without streaming, or compare streamed with whole answers")


def _folder(model: Model, key: str, value: str) -> Path:
    """Relative to a version's folder for the reference runtime, to the server's working directory for the backend."""
    versions = model.served_versions()
    return model.path / str(versions[-1]) / value if key == "checkpoint_dir" and versions else Path(value)


def _ranks(key: str, folder: Path) -> Iterator[Finding]:
    """A checkpoint has rank{R}.safetensors, an engine rank{R}.engine, for every rank of the mapping in config.json."""
    try:
        if key == "gpt_model_path":
            missing = read_engine_config(folder).missing()
        else:
            world = read_checkpoint_config(folder)["mapping"]["world_size"]
            files = (folder / rank_file(rank) for rank in range(world))
            missing = next((file for file in files if not file.is_file()), None)
    except InputError as error:
        yield finding("TK133", str(folder / "config.json"), error.cause, error.fix)
        return
    if missing is not None:
        cause = "the file is missing or empty, and config.json has its rank"
        yield finding("TK133", str(missing), cause, "build it again")


def _backend_values(model: Model, values: dict[str, str]) -> Iterator[Finding]:
    for key, valid in (("gpt_model_type", _BATCHING_TYPES), ("batch_scheduler_policy", _SCHEDULERS)):
        if key in values and values[key] not in valid:
            cause = f"{key} is '{values[key]}'"
            yield finding("TK134", model.place(values[key]), cause, f"use one of {', '.join(sorted(valid))}")
    key = "kv_cache_free_gpu_mem_fraction"
    if key in values and not _is_fraction(values[key]):
        yield finding("TK134", model.place(key), f"{key} is '{values[key]}'", "use a number between 0 and 1")


def _is_fraction(text: str) -> bool:
    try:
        return 0 < float(text) < 1
    except ValueError:
        return False
