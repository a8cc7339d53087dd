"""The `python` runtime: a function with a typed signature as a model under its own name.

A file that has a TritonPythonModel of its own becomes model.py as it is; for any other, trtkit adds one that calls the
function.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from trtkit import pbtxt
from trtkit.contract_tensors import Tensor
from trtkit.errors import InputError
from trtkit.repository.layouts import scheduling
from trtkit.repository.layouts.code import model_code
from trtkit.repository.layouts.job import Files, Job
from trtkit.repository.layouts.signature import Signature, read_signature


def render(job: Job) -> Files:
    """One model, named after the build config."""
    config, serving = job.config, job.config.serving
    name, path, options = config.name, Path(job.model_path), serving.python
    signature = read_signature(path, options.function)
    batched = options.batch and not signature.streams
    parameters = {}
    if not signature.is_triton_model:
        if batched:
            signature = _batched(signature)
        parameters = {
            "function": options.function,
            "texts": ",".join(signature.texts),
            "plain": ",".join(signature.plain),
        }
    message = pbtxt.model_config(
        name,
        inputs=signature.inputs,
        outputs=signature.outputs,
        max_batch_size=serving.max_batch_size if batched else 0,
        decoupled=signature.streams,
        backend="python",
        parameters=parameters,
        dynamic_batching=scheduling.batching(serving) if batched else None,
    )
    scheduling.place(message, serving)
    scheduling.choose_versions(message, serving)
    if serving.response_cache and signature.streams:
        raise InputError(f"{path}: '{options.function}' streams", "remove serving.response_cache")
    scheduling.cache(message, serving)
    for index, item in enumerate(serving.warmup):
        scheduling.warm_up_zeros(message, f"zeros{index}", item.count, item.size)
    files: Files = {f"{name}/config.pbtxt": pbtxt.dumps(message)}
    if signature.is_triton_model:
        return {**files, f"{name}/1/model.py": path.read_bytes()}
    return {**files, **model_code("function", name), f"{name}/1/function.py": path.read_bytes()}


def _batched(signature: Signature) -> Signature:
    """Single values lose their own axis beside the batch's: the function sees [batch] where clients send [batch, 1]."""

    def without_axis(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(replace(tensor, scalar=True) if tensor.name in signature.plain else tensor for tensor in tensors)

    return replace(signature, inputs=without_axis(signature.inputs), outputs=without_axis(signature.outputs))
