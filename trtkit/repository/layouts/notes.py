"""What a user should know about a generated repository, and no file in it can say."""

from __future__ import annotations

from trtkit.config import BuildConfig


def notes(config: BuildConfig) -> list[str]:
    """One sentence each."""
    serving = config.serving
    found = []
    if serving.queue.priority_levels:
        found.append(
            "priority levels make Triton's batcher slow: requests of 20 ms waited for up to 500 ms (server 2.51)"
        )
    if serving.rate_limiter is not None:
        found.append(
            "the rate limiter works only in a server started with --rate-limit=execution_count, as `trtkit deploy` "
            "starts it"
        )
    if serving.response_cache:
        found.append(
            "the response cache works only in a server started with --cache-config=local,size=BYTES, as "
            "`trtkit deploy` starts it"
        )
    if serving.runtime == "tensorrtllm" and serving.instances > 1 and serving.layout == "ensemble":
        found.append(
            "several instances of an engine need the C++ backend's orchestrator mode: TRTLLM_ORCHESTRATOR=1 in the "
            "environment of the server"
        )
    if serving.runtime == "llmapi" and serving.layout is None:
        found.append(
            f"the model runs NVIDIA's model.py of the release's container, from {serving.llmapi_folder}; "
            "serving.llmapi_folder says where it lies elsewhere"
        )
    if serving.runtime == "vllm":
        found.append("the vLLM backend is in the containers YY.MM-vllm-python-py3, not in those for TensorRT-LLM")
        if serving.gpu_device_ids and config.checkpoint.tp * config.checkpoint.pp > 1:
            found.append("the vLLM backend reads GPU_DEVICE_IDS since May 2026; older ones take all visible GPUs")
    if serving.runtime == "onnxruntime" and config.deploy.target != "local":
        found.append("the onnxruntime backend is in the containers YY.MM-py3, not in those for TensorRT-LLM")
    if serving.runtime == "onnxruntime" and config.deploy.target == "local":
        found.append(
            "the local server has no onnxruntime backend: a model.py runs the model with the package onnxruntime"
        )
    return found
