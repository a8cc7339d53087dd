"""What the model `tensorrt_llm` of an engine and of the reference runtime have in common: tensors and scheduling."""

from __future__ import annotations

from typing import Any

from trtkit import contract, pbtxt
from trtkit.repository.layouts import scheduling
from trtkit.repository.layouts.job import Files, Job, tokenizer_json

NAME = "tensorrt_llm"


def model(
    job: Job,
    parameters: dict[str, str],
    *,
    inputs: tuple[contract.Tensor, ...],
    outputs: tuple[contract.Tensor, ...],
    backend: str,
) -> tuple[Any, Files]:
    """The `ModelConfig` and the files of its warm-up requests."""
    serving = job.config.serving
    message = pbtxt.model_config(
        NAME,
        inputs=inputs,
        outputs=outputs,
        max_batch_size=serving.max_batch_size,
        decoupled=serving.decoupled,
        backend=backend,
        parameters=parameters,
        dynamic_batching=scheduling.batching(serving),
    )
    scheduling.place(message, serving)
    scheduling.choose_versions(message, serving)
    return message, _warm_up(job, message, {tensor.name: tensor for tensor in inputs})


def _warm_up(job: Job, message: Any, inputs: dict[str, contract.Tensor]) -> Files:
    files: Files = {}
    serving = job.config.serving
    if serving.warmup:
        tokenizer_json(job.tokenizer_dir)  # for its error
    for index, item in enumerate(serving.warmup):
        ids = scheduling.token_ids(job.tokenizer_dir, item.prompt or "", add_special_tokens=serving.add_special_tokens)
        values: list[tuple[contract.Tensor, list[int]]] = [
            (inputs["input_ids"], ids),
            (inputs["input_lengths"], [len(ids)]),
            (inputs["request_output_len"], [item.max_tokens]),
        ]
        if job.end_ids:
            values.append((inputs["end_id"], [job.end_ids[0]]))
        files.update(scheduling.warm_up(message, f"prompt{index}", item.count, values))
    return files
