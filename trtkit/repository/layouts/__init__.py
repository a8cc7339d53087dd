"""How a model repository looks: one file per runtime, one per topology, and the scheduling that they share.

A layout is a function from a `Job` to files; a new runtime is one new file and one entry here.
"""

from __future__ import annotations

from collections.abc import Callable

from trtkit.config_serving import Runtime
from trtkit.repository.layouts import ensemble, fused, llmapi, onnxruntime, python, reference, tensorrtllm, vllm
from trtkit.repository.layouts.job import Files, Job

LAYOUTS: dict[Runtime, Callable[[Job], Files]] = {
    "tensorrtllm": tensorrtllm.render,
    "llmapi": llmapi.render,
    "vllm": vllm.render,
    "onnxruntime": onnxruntime.render,
    "python": python.render,
    "reference": reference.render,
}
"""Runtime -> the model that executes."""


def render(job: Job) -> Files:
    """All models of a repository."""
    serving = job.config.serving
    if serving.layout == "fused":
        return fused.render(job)
    files = LAYOUTS[serving.runtime](job)
    if serving.layout == "ensemble":
        files = {**files, **ensemble.render(job), **fused.front(job)}
    return files
