"""The `onnxruntime` runtime: an ONNX model under its own name, with a config.pbtxt derived from its graph.

In a container Triton's onnxruntime backend runs it. The local server has the python backend only, where a model.py runs
the same file with the same configuration.
"""

from __future__ import annotations

from pathlib import Path

from trtkit import pbtxt
from trtkit.errors import InputError
from trtkit.repository.layouts import scheduling
from trtkit.repository.layouts.code import model_code
from trtkit.repository.layouts.job import Files, Job
from trtkit.repository.layouts.onnx_graph import read_graph


def render(job: Job) -> Files:
    """One model, named after the build config."""
    config, serving = job.config, job.config.serving
    name, path = config.name, Path(job.model_path)
    graph = read_graph(path, batch=serving.onnx.batch)
    local = config.deploy.target == "local"
    threads = serving.onnx.threads
    if local and serving.gpu_device_ids:
        raise InputError(
            "serving.gpu_device_ids needs a server with GPUs, and deploy.target is local", "set deploy.target: docker"
        )
    message = pbtxt.model_config(
        name,
        inputs=graph.inputs,
        outputs=graph.outputs,
        max_batch_size=serving.max_batch_size if graph.batched else 0,
        decoupled=False,
        backend="python" if local else "onnxruntime",
        parameters={"threads" if local else "intra_op_thread_count": str(threads)} if threads else {},
        dynamic_batching=scheduling.batching(serving) if graph.batched else None,
    )
    scheduling.place(message, serving, kind="KIND_CPU" if local else "KIND_AUTO", gpus=not local)
    scheduling.choose_versions(message, serving)
    scheduling.cache(message, serving)
    for index, item in enumerate(serving.warmup):
        scheduling.warm_up_zeros(message, f"zeros{index}", item.count, item.size)
    files: Files = {f"{name}/config.pbtxt": pbtxt.dumps(message), f"{name}/1/model.onnx": path}
    for location in graph.data_files:
        files[f"{name}/1/{Path(location).as_posix()}"] = path.parent / location
    return {**files, **(model_code("onnx", name) if local else {})}
