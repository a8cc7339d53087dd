"""The `llmapi` runtime: a Hugging Face checkpoint in TensorRT-LLM's PyTorch backend, as NVIDIA's own single model.

Source of tensors and of model.yaml: NVIDIA/TensorRT-LLM, triton_backend/all_models/llmapi/tensorrt_llm. NVIDIA's
model.py sets `decoupled` and `max_batch_size` only when the server completes configurations, which servers in
production do not; so config.pbtxt says both, and model.yaml says the same.
"""

from __future__ import annotations

from typing import Any

import yaml

from trtkit import pbtxt
from trtkit.contract_tensors import Tensor, in_range, may, need
from trtkit.errors import InputError
from trtkit.repository.layouts import scheduling
from trtkit.repository.layouts.code import model_code
from trtkit.repository.layouts.engine_args import merged
from trtkit.repository.layouts.job import Files, Job

SINCE = "1.0"
"""The first TensorRT-LLM with this model."""

INPUTS = (
    need("text_input", "STRING", -1),
    may("image_url", "STRING", -1, since="1.3"),
    may("streaming", "BOOL"),
    may("sampling_param_best_of", "INT32"),
    may("sampling_param_temperature", "FP32"),
    may("sampling_param_top_k", "INT32"),
    may("sampling_param_top_p", "FP32"),
    may("sampling_param_frequency_penalty", "FP32"),
    may("sampling_param_presence_penalty", "FP32"),
    may("sampling_param_max_tokens", "INT32"),
    may("sampling_param_stop", "STRING", -1),
    may("sampling_param_seed", "UINT64"),
    may("sampling_param_exclude_input_from_output", "BOOL"),
    may("sampling_param_return_perf_metrics", "BOOL"),
    may("return_finish_reason", "BOOL"),
    may("return_stop_reason", "BOOL"),
    may("return_cumulative_logprob", "BOOL"),
    may("stop", "BOOL"),
    may("lora_id", "UINT64", since="1.3"),
    may("lora_name", "STRING", since="1.3"),
    may("lora_path", "STRING", since="1.3"),
    may("lora_ckpt_source", "STRING", since="1.3"),
)
OUTPUTS = (
    need("text_output", "STRING", -1),
    need("finish_reason", "STRING", -1),
    need("stop_reason", "STRING", -1),
    need("cumulative_logprob", "FP32", -1),
    need("kv_cache_reused_block", "INT32", -1),
    need("kv_cache_missed_block", "INT32", -1),
    need("kv_cache_alloc_new_blocks", "INT32", -1),
    need("kv_cache_alloc_total_blocks", "INT32", -1),
    need("kv_cache_hit_rate", "FP32", -1),
    need("arrival_time_ns", "INT64"),
    need("first_scheduled_time_ns", "INT64"),
    need("first_token_time_ns", "INT64"),
    need("last_token_time_ns", "INT64"),
    need("acceptance_rate", "FP32"),
    need("total_accepted_draft_tokens", "INT32"),
    need("total_draft_tokens", "INT32"),
)
_BATCH_SIZE = 0
"""NVIDIA's model takes one prompt per request; the engine batches them."""


def render(job: Job) -> Files:
    """The model `tensorrt_llm`.

    Raises:
        InputError: the release's TensorRT-LLM is too old, or the config asks for what its model does not have.
    """
    serving, version = job.config.serving, job.tensorrt_llm
    check_release(job)
    inputs = tuple(tensor for tensor in INPUTS if tensor.known_to(version))
    parameters = {}
    if serving.gpu_device_ids:
        parameters["gpu_device_ids"] = ";".join(serving.gpu_device_ids)
    message = pbtxt.model_config(
        "tensorrt_llm",
        inputs=inputs,
        outputs=OUTPUTS,
        max_batch_size=_BATCH_SIZE,
        decoupled=serving.decoupled,
        backend="python",
        parameters=parameters,
    )
    scheduling.place(message, serving)
    scheduling.choose_versions(message, serving)
    scheduling.cache(message, serving)
    files = _warm_up(job, message, {tensor.name: tensor for tensor in inputs})
    text = yaml.safe_dump(model_yaml(job), sort_keys=False, allow_unicode=True, width=120)
    files["tensorrt_llm/1/model.yaml"] = pbtxt.HEADER + text
    files["tensorrt_llm/config.pbtxt"] = pbtxt.dumps(message)
    files["tensorrt_llm/1/container_folder.txt"] = serving.llmapi_folder + "\n"
    return {**files, **model_code("llmapi", "tensorrt_llm")}


def check_release(job: Job) -> None:
    """Raises InputError when the release's TensorRT-LLM has no LLM API for Triton, or no LoRA in it."""
    version, release = job.tensorrt_llm, job.config.deploy.release
    if not in_range(version, SINCE, ""):
        raise InputError(
            f"release {release} has TensorRT-LLM {version}, and runtime 'llmapi' needs {SINCE} or later",
            "use release 25.09 or later, or runtime tensorrtllm",
        )


def llm_arguments(job: Job) -> dict[str, Any]:
    """Keyword arguments of `tensorrt_llm.LLM` that the build config stands for."""
    config, serving, kv = job.config, job.config.serving, job.config.serving.kv_cache
    if config.checkpoint.quantization.kv_cache == "int8":
        raise InputError("checkpoint.quantization.kv_cache 'int8' is none of the PyTorch backend's", "use fp8")
    cache: dict[str, Any] = {
        "enable_block_reuse": serving.enable_kv_cache_reuse,
        "free_gpu_memory_fraction": serving.kv_cache_free_gpu_mem_fraction,
    }
    optional = {
        "max_tokens": kv.max_tokens,
        "host_cache_size": kv.host_memory_bytes or None,
        "max_attention_window": kv.max_attention_window or None,
        "sink_token_length": kv.sink_token_length or None,
        "cross_kv_cache_fraction": kv.cross_fraction,
        "dtype": config.checkpoint.quantization.kv_cache,
    }
    cache.update({key: value for key, value in optional.items() if value is not None})
    arguments: dict[str, Any] = {
        "model": job.model_path,
        "backend": "pytorch",
        "tensor_parallel_size": config.checkpoint.tp,
        "pipeline_parallel_size": config.checkpoint.pp,
        "max_batch_size": serving.max_batch_size,
        "max_num_tokens": config.engine.max_num_tokens,
        "max_beam_width": config.engine.max_beam_width,
        "enable_chunked_prefill": serving.enable_chunked_context,
        "trust_remote_code": config.model.trust_remote_code,
        "kv_cache_config": cache,
    }
    if config.checkpoint.ep > 1:
        arguments["moe_expert_parallel_size"] = config.checkpoint.ep
    if config.engine.max_seq_len is not None:
        arguments["max_seq_len"] = config.engine.max_seq_len
    if config.checkpoint.dtype != "auto":
        arguments["dtype"] = config.checkpoint.dtype
    if config.model.revision and job.is_hub_id:
        arguments["revision"] = config.model.revision
    if serving.guided_decoding_backend:
        arguments["guided_decoding_backend"] = serving.guided_decoding_backend
    if serving.lora is not None:
        arguments["lora_config"] = _lora(job)
    return merged(arguments, serving.engine_args, reserved=("triton_config",))


def model_yaml(job: Job) -> dict[str, Any]:
    """model.yaml: what goes to `LLM`, and under `triton_config` what config.pbtxt says too."""
    serving = job.config.serving
    return {
        **llm_arguments(job),
        "triton_config": {"max_batch_size": _BATCH_SIZE, "decoupled": serving.decoupled},
    }


def _lora(job: Job) -> dict[str, Any]:
    lora, version = job.config.serving.lora, job.tensorrt_llm
    assert lora is not None  # noqa: S101 - the caller asked
    if job.config.serving.layout is None and not in_range(version, "1.3", ""):
        raise InputError(
            f"serving.lora is unknown to the llmapi model of TensorRT-LLM {version}: "
            "its requests name adapters since 1.3",
            "use topology fused, or leave it out",
        )
    alone = ("adapters",) if job.config.serving.layout is None else ()  # `llm` is told of them at its start
    for key in (*alone, "prefetch_dir", "gpu_memory_fraction", "host_memory_bytes"):
        if getattr(lora, key):
            raise InputError(f"serving.lora.{key} does not go with runtime 'llmapi'", "remove the key")
    return {"max_lora_rank": lora.max_rank, **({"max_loras": lora.max_loras} if lora.max_loras else {})}


def _warm_up(job: Job, message: Any, inputs: dict[str, Tensor]) -> Files:
    files: Files = {}
    for index, item in enumerate(job.config.serving.warmup):
        values: list[tuple[Tensor, list[Any]]] = [
            (inputs["text_input"], [item.prompt]),
            (inputs["sampling_param_max_tokens"], [item.max_tokens]),
        ]
        files.update(scheduling.warm_up(message, f"prompt{index}", item.count, values))
    return files
