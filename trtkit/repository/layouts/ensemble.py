"""The `ensemble` topology: preprocessing and postprocessing around the model `tensorrt_llm`, joined by an ensemble."""

from __future__ import annotations

from typing import Any

from trtkit import contract, pbtxt
from trtkit.contract_tensors import Tensor
from trtkit.errors import InputError
from trtkit.repository.layouts import scheduling
from trtkit.repository.layouts.code import model_code
from trtkit.repository.layouts.job import TOKENIZER_FILES, Files, Job, flag, pad_id, tokenizer_json

_INFLIGHT_SINCE = "25.11"  # core, branch r25.11: src/ensemble_scheduler reads ensemble_scheduling.max_inflight_requests


def render(job: Job) -> Files:
    """The three models around `tensorrt_llm`. An engine's knows what its release knows; the reference runtime all."""
    return {**_preprocessing(job), **_postprocessing(job), **_ensemble(job)}


def _preprocessing(job: Job) -> Files:
    serving = job.config.serving
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
            "add_special_tokens": flag(serving.add_special_tokens),
            "end_ids": ",".join(map(str, job.end_ids)),
            "pad_id": str(pad_id(job.tokenizer_dir, job.end_ids)),
            # The answers to several prompts in one request come one by one, and only batch_index tells them apart.
            "several_prompts": flag(not serving.streaming or "batch_index" in serving.ensemble_outputs),
        },
        dynamic_batching=scheduling.batching(serving),
    )
    files: Files = _warm_up(message, job)
    files["preprocessing/config.pbtxt"] = pbtxt.dumps(message)
    files.update(model_code("preprocessing"))
    tokenizer_json(job.tokenizer_dir)
    for name in TOKENIZER_FILES:
        if (job.tokenizer_dir / name).is_file():
            files[f"preprocessing/1/tokenizer/{name}"] = (job.tokenizer_dir / name).read_bytes()
    return files


def _postprocessing(job: Job) -> Files:
    message = pbtxt.model_config(
        "postprocessing",
        inputs=contract.POSTPROCESSING_INPUTS,
        outputs=contract.POSTPROCESSING_OUTPUTS,
        max_batch_size=job.config.serving.max_batch_size,
        decoupled=False,
        backend="python",
        instances=1,  # more would mix up the order of a stream's pieces
        parameters={"tokenizer_dir": "tokenizer", "skip_special_tokens": "true"},
        dynamic_batching={"max_queue_delay_microseconds": round(1000 * job.config.serving.max_token_wait_ms)},
    )
    files: Files = {"postprocessing/config.pbtxt": pbtxt.dumps(message)}
    files.update(model_code("postprocessing"))
    files["postprocessing/1/tokenizer/tokenizer.json"] = tokenizer_json(job.tokenizer_dir)
    return files


def _warm_up(message: Any, job: Job) -> Files:
    inputs = {tensor.name: tensor for tensor in contract.PREPROCESSING_INPUTS}
    files: Files = {}
    for index, item in enumerate(job.config.serving.warmup):
        values: list[tuple[Tensor, list[Any]]] = [
            (inputs["QUERY"], [item.prompt]),
            (inputs["REQUEST_OUTPUT_LEN"], [item.max_tokens]),
        ]
        files.update(scheduling.warm_up(message, f"prompt{index}", item.count, values))
    return files


def _ensemble(job: Job) -> Files:
    version = job.tensorrt_llm if job.config.serving.runtime == "tensorrtllm" else None
    extra = job.config.serving.ensemble_outputs
    message = pbtxt.model_config(
        "ensemble",
        inputs=contract.ensemble_inputs(version, extra),
        outputs=contract.ensemble_outputs(version, extra),
        max_batch_size=job.config.serving.max_batch_size,
        decoupled=job.config.serving.streaming,  # what the server would derive from the steps
    )
    pbtxt.add_steps(message, contract.ensemble_steps(version, extra))
    message.ensemble_scheduling.max_inflight_requests = _inflight(job)
    scheduling.cache(message, job.config.serving)
    return {"ensemble/config.pbtxt": pbtxt.dumps(message), "ensemble/1/.gitkeep": ""}


def _inflight(job: Job) -> int:
    """The limit on responses between steps, for servers that know it: others cannot read a config.pbtxt with it."""
    limit, deploy = job.config.serving.max_inflight_requests, job.config.deploy
    if limit and (deploy.target == "local" or deploy.release < _INFLIGHT_SINCE):
        server = "the local server" if deploy.target == "local" else f"the server of release {deploy.release}"
        raise InputError(
            f"serving.max_inflight_requests is unknown to {server}: it came with {_INFLIGHT_SINCE}",
            f"deploy in a container of release {_INFLIGHT_SINCE} or later, or leave it out",
        )
    return limit
