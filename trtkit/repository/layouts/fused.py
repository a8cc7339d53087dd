"""The model `llm`: tokenises, drives an engine in its own process and detokenises.

It is all there is in the `fused` topology. Beside an ensemble it is the front for streams: its engine then is the model
`tensorrt_llm` of the same server, which it can stop when a client goes away, as an ensemble cannot.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from trtkit import pbtxt, serving_contract
from trtkit.config_serving import Runtime
from trtkit.contract_tensors import in_range
from trtkit.errors import InputError
from trtkit.repository.layouts import llmapi, scheduling, tensorrtllm, vllm
from trtkit.repository.layouts.code import model_code
from trtkit.repository.layouts.job import TOKENIZER_FILES, Files, Job, flag, tokenizer_json

FOLDER = f"{serving_contract.MODEL}/1"


def render(job: Job) -> Files:
    """The `fused` topology."""
    serving = job.config.serving
    refused = {
        "instances": serving.instances > 1,
        "preprocessing_instances": serving.preprocessing_instances > 1,
        "warmup": bool(serving.warmup),
        "queue.priority_levels": serving.queue.priority_levels > 0,
        "queue.timeout_action": serving.queue.timeout_action == "delay",
    }
    for key in (key for key, given in refused.items() if given):
        raise InputError(
            f"serving.{key} does not go with topology fused, where one model has one engine and a queue of its own",
            "remove the key, or use topology ensemble",
        )
    return _model(job, *ENGINES[serving.runtime](job), fused=True)


def front(job: Job) -> Files:
    """`llm` beside an ensemble, in front of the server's own `tensorrt_llm`."""
    parameters = {"model_name": "tensorrt_llm"}
    if job.config.serving.runtime == "tensorrtllm" and not in_range(job.tensorrt_llm, "0.20", ""):
        # Some of its inputs had other names then.
        parameters["model_release"] = job.tensorrt_llm
    return _model(job, "triton", parameters)


def _reference(job: Job) -> tuple[str, dict[str, str]]:
    return "reference", {"checkpoint_dir": job.model_path}


def _executor(job: Job) -> tuple[str, dict[str, str]]:
    if job.config.engine.max_beam_width > 1 or job.config.serving.decoding_mode == "beam_search":
        raise InputError(
            "topology fused has no beam search", "set engine.max_beam_width to 1, or use topology ensemble"
        )
    # The file with the grammar's vocabulary is for the C++ backend; the engine takes it from the tokenizer beside it.
    parameters = tensorrtllm.parameters(replace(job, repository_path=job.repository_path or "/models"), {})
    parameters.pop("xgrammar_tokenizer_info_path", None)
    return "executor", {**parameters, **_slots(job.config.engine.max_batch_size)}


def _llmapi(job: Job) -> tuple[str, dict[str, str]]:
    llmapi.check_release(job)
    return "llmapi", _with_arguments(job, llmapi.llm_arguments(job))


def _vllm(job: Job) -> tuple[str, dict[str, str]]:
    return "vllm", _with_arguments(job, vllm.engine_arguments(job))


def _with_arguments(job: Job, arguments: dict[str, Any]) -> dict[str, str]:
    arguments.pop("model", None)
    adapters = job.config.serving.lora.adapters if job.config.serving.lora else {}
    parameters = {"model": job.model_path, "engine_args": json.dumps(arguments)}
    parameters |= _slots(job.config.serving.max_batch_size)
    return {**parameters, "lora_adapters": json.dumps(adapters)} if adapters else parameters


def _slots(runs: int) -> dict[str, str]:
    """These engines batch by themselves: they get as many sequences again as they run, so that they never starve."""
    return {"slots": str(2 * runs)}


ENGINES: dict[Runtime, Callable[[Job], tuple[str, dict[str, str]]]] = {
    "reference": _reference,
    "tensorrtllm": _executor,
    "llmapi": _llmapi,
    "vllm": _vllm,
}
"""Runtime -> the module in models/serving/engines that drives it in the model's own process, with its parameters."""


def _model(job: Job, engine: str, parameters: dict[str, str], *, fused: bool = False) -> Files:
    serving = job.config.serving
    message = pbtxt.model_config(
        serving_contract.MODEL,
        inputs=serving_contract.INPUTS,
        outputs=serving_contract.OUTPUTS,
        max_batch_size=serving.max_batch_size,
        decoupled=serving.streaming,
        backend="python",
        parameters={**parameters, **_parameters(job), "engine": engine},
        # Requests that come together are tokenised together; how many run and wait, the model itself decides.
        dynamic_batching={
            "preferred_batch_size": serving.preferred_batch_size,
            "max_queue_delay_microseconds": serving.max_queue_delay_microseconds,
        },
    )
    if fused:
        scheduling.place(message, serving)
    scheduling.choose_versions(message, serving)
    scheduling.cache(message, serving)
    tokenizer_json(job.tokenizer_dir)
    files: Files = {
        f"{serving_contract.MODEL}/config.pbtxt": pbtxt.dumps(message),
        **model_code(serving_contract.MODEL, also=(f"engines/{engine}",)),
    }
    for name in TOKENIZER_FILES:
        if (job.tokenizer_dir / name).is_file():
            files[f"{FOLDER}/tokenizer/{name}"] = (job.tokenizer_dir / name).read_bytes()
    for path in sorted((job.tokenizer_dir / "additional_chat_templates").glob("*.jinja")):
        files[f"{FOLDER}/tokenizer/additional_chat_templates/{path.name}"] = path.read_bytes()
    if serving.chat_template is not None:
        files[f"{FOLDER}/tokenizer/chat_template.jinja"] = Path(serving.chat_template).read_bytes()
    return files


def _parameters(job: Job) -> dict[str, str]:
    serving = job.config.serving
    given = {
        "tokenizer_dir": "tokenizer",
        "end_ids": ",".join(map(str, job.end_ids)),
        "add_special_tokens": flag(serving.add_special_tokens),
        "coalesce": flag(serving.coalesce),
        "default_max_tokens": str(serving.default_max_tokens),
        "max_token_wait_ms": f"{serving.max_token_wait_ms:g}",
        "max_queue_size": str(serving.max_queue_size),
        "timeout_ms": f"{serving.queue.default_timeout_microseconds / 1000:g}",
        "allow_timeout_override": flag(serving.queue.allow_timeout_override),
    }
    longest = job.config.engine.max_seq_len or _positions(job.tokenizer_dir)
    return {**given, "max_seq_len": str(longest)} if longest else given


def _positions(source: Path) -> int | None:
    """The most positions that the source's config.json speaks of, which is what an engine is built for by default."""
    try:
        config = json.loads((source / "config.json").read_bytes())
    except (OSError, ValueError):
        return None
    text = config.get("text_config", config) if isinstance(config, dict) else {}
    found = text.get("max_position_embeddings") or text.get("n_positions")
    return found if isinstance(found, int) and found > 0 else None
