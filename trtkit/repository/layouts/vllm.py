"""The `vllm` runtime: a Hugging Face checkpoint in Triton's vLLM backend, as the single model `vllm_model`.

Source of tensors, parameters and files: triton-inference-server/vllm_backend, src/model.py and README.md. Everything
that the backend would add to an incomplete configuration is written out, so that servers need not complete it.
"""

from __future__ import annotations

from typing import Any

from trtkit import pbtxt
from trtkit.contract_tensors import Tensor, may, need
from trtkit.errors import InputError
from trtkit.repository.layouts import scheduling
from trtkit.repository.layouts.engine_args import merged
from trtkit.repository.layouts.job import Files, Job, json_text

NAME = "vllm_model"

INPUTS = (
    need("text_input", "STRING"),
    may("image", "STRING", -1),
    may("stream", "BOOL"),
    may("sampling_parameters", "STRING"),
    may("exclude_input_in_output", "BOOL"),
    may("return_finish_reason", "BOOL"),
    may("return_cumulative_logprob", "BOOL"),
    may("return_logprobs", "BOOL"),
    may("return_num_input_tokens", "BOOL"),
    may("return_num_output_tokens", "BOOL"),
)
OUTPUTS = (
    need("text_output", "STRING", -1),
    need("finish_reason", "STRING", -1),
    need("cumulative_logprob", "FP32", -1),
    need("logprobs", "STRING", -1),
    need("num_input_tokens", "UINT32"),
    need("num_output_tokens", "UINT32", -1),
)


def render(job: Job) -> Files:
    """The model `vllm_model`: config.pbtxt, 1/model.json, and 1/multi_lora.json where there are adapters."""
    config, serving = job.config, job.config.serving
    one_gpu = config.checkpoint.tp * config.checkpoint.pp == 1
    parameters = {"REPORT_CUSTOM_METRICS": "true", "ENABLE_VLLM_HEALTH_CHECK": "true"}
    if serving.gpu_device_ids and not one_gpu:
        parameters["GPU_DEVICE_IDS"] = serving.gpu_device_ids[0]
    message = pbtxt.model_config(
        NAME,
        inputs=INPUTS,
        outputs=OUTPUTS,
        max_batch_size=0,
        decoupled=True,  # the backend asserts it
        backend="vllm",
        parameters=parameters,
    )
    # KIND_MODEL lets the engine spread over GPUs; the backend takes KIND_GPU for engines on a single one.
    scheduling.place(message, serving, kind="KIND_MODEL", gpus=one_gpu)
    scheduling.choose_versions(message, serving)
    files: Files = {}
    for index, item in enumerate(serving.warmup):
        inputs = {tensor.name: tensor for tensor in INPUTS}
        sampling = json_text({"max_tokens": item.max_tokens}).strip()
        values: list[tuple[Tensor, list[Any]]] = [
            (inputs["text_input"], [item.prompt]),
            (inputs["sampling_parameters"], [sampling]),
        ]
        files.update(scheduling.warm_up(message, f"prompt{index}", item.count, values))
    files[f"{NAME}/config.pbtxt"] = pbtxt.dumps(message)
    files[f"{NAME}/1/model.json"] = json_text(engine_arguments(job))
    if serving.lora is not None:
        files[f"{NAME}/1/multi_lora.json"] = json_text(serving.lora.adapters)
    return files


def engine_arguments(job: Job) -> dict[str, Any]:
    """Keyword arguments of vLLM's `AsyncEngineArgs` that the build config stands for."""
    config, serving, kv = job.config, job.config.serving, job.config.serving.kv_cache
    for key in ("max_tokens", "host_memory_bytes", "max_attention_window", "sink_token_length", "cross_fraction"):
        if getattr(kv, key):
            raise InputError(f"serving.kv_cache.{key} does not go with runtime 'vllm'", "use serving.engine_args")
    arguments: dict[str, Any] = {
        "model": job.model_path,
        "dtype": config.checkpoint.dtype,
        "tensor_parallel_size": config.checkpoint.tp,
        "pipeline_parallel_size": config.checkpoint.pp,
        "max_num_seqs": serving.max_batch_size,
        "gpu_memory_utilization": serving.kv_cache_free_gpu_mem_fraction,
        "enable_prefix_caching": serving.enable_kv_cache_reuse,
        "trust_remote_code": config.model.trust_remote_code,
        "disable_log_stats": False,
    }
    if serving.enable_chunked_context:  # vLLM's own default depends on the model
        arguments["enable_chunked_prefill"] = True
    if config.engine.max_seq_len is not None:
        arguments["max_model_len"] = config.engine.max_seq_len
    if config.model.revision and job.is_hub_id:
        arguments["revision"] = config.model.revision
    if config.checkpoint.quantization.kv_cache is not None:
        if config.checkpoint.quantization.kv_cache != "fp8":
            raise InputError(
                f"checkpoint.quantization.kv_cache '{config.checkpoint.quantization.kv_cache}' is none of vLLM's",
                "use fp8, or leave it out",
            )
        arguments["kv_cache_dtype"] = "fp8"
    lora = serving.lora
    if lora is not None:
        for key in ("prefetch_dir", "gpu_memory_fraction", "host_memory_bytes"):
            if getattr(lora, key):
                raise InputError(f"serving.lora.{key} does not go with runtime 'vllm'", "remove the key")
        if not lora.adapters:
            raise InputError("serving.lora has no adapters, and requests may name only listed ones", "list them")
        arguments |= {"enable_lora": True, "max_lora_rank": lora.max_rank}
        arguments |= {"max_loras": lora.max_loras} if lora.max_loras else {}
    return merged(arguments, serving.engine_args)
