"""The `tensorrtllm` runtime: an engine in NVIDIA's C++ backend, as the model `tensorrt_llm`."""

from __future__ import annotations

from trtkit import contract, pbtxt, releases
from trtkit.errors import InputError
from trtkit.repository.layouts import tensorrt_llm_model
from trtkit.repository.layouts.backend_parameters import Value, checked, gated
from trtkit.repository.layouts.job import Files, Job, json_text, tokenizer_json

_GRAMMAR_FILE = "tensorrt_llm/1/xgrammar_tokenizer_info.json"


def render(job: Job) -> Files:
    """The model `tensorrt_llm`, with the parameters and tensors that the release's TensorRT-LLM knows.

    Raises:
        InputError: the release has no C++ backend, or the config asks for what it does not know.
    """
    version = job.tensorrt_llm
    if not releases.get(job.config.deploy.release).has_engine_builder:
        raise InputError(
            f"release {job.config.deploy.release} (TensorRT-LLM {version}) has no C++ backend for engines",
            "use runtime llmapi, or a release with TensorRT-LLM below 1.3",
        )
    if job.logits_dtype != "FP32" and not contract.in_range(version, "0.17", ""):
        raise InputError(
            f"TensorRT-LLM {version} has no logits of type {job.logits_dtype}", "use FP32, or release 25.01 or later"
        )
    files: Files = {}
    message, warm_up = tensorrt_llm_model.model(
        job,
        parameters(job, files),
        inputs=contract.llm_inputs(logits_dtype=job.logits_dtype, version=version),
        outputs=contract.llm_outputs(logits_dtype=job.logits_dtype, version=version),
        backend="tensorrtllm",
    )
    return {"tensorrt_llm/config.pbtxt": pbtxt.dumps(message), "tensorrt_llm/1/.gitkeep": "", **files, **warm_up}


def parameters(job: Job, files: Files) -> dict[str, str]:
    """Parameters of the backend; a file that one of them names is added to `files`."""
    serving, kv = job.config.serving, job.config.serving.kv_cache
    values: dict[str, Value | None] = {
        "gpt_model_type": "inflight_fused_batching",
        "gpt_model_path": job.model_path,
        "batch_scheduler_policy": "guaranteed_no_evict",
        "max_beam_width": job.config.engine.max_beam_width,
        "kv_cache_free_gpu_mem_fraction": serving.kv_cache_free_gpu_mem_fraction,
        "enable_kv_cache_reuse": serving.enable_kv_cache_reuse,
        "enable_chunked_context": serving.enable_chunked_context,
        "exclude_input_in_output": True,
        "FORCE_CPU_ONLY_INPUT_TENSORS": "no",
        "gpu_device_ids": ";".join(serving.gpu_device_ids) or None,
        "max_tokens_in_paged_kv_cache": kv.max_tokens,
        "kv_cache_host_memory_bytes": kv.host_memory_bytes or None,
        "max_attention_window_size": ",".join(map(str, kv.max_attention_window)) or None,
        "sink_token_length": kv.sink_token_length or None,
        "cross_kv_cache_fraction": kv.cross_fraction,
        **_decoding(job),
        **_lora(job),
        **_grammar(job, files),
        **checked(dict(serving.backend_parameters)),
    }
    if contract.in_range(job.tensorrt_llm, "0.10", ""):
        default = "/opt/tritonserver/backends/tensorrtllm/trtllmExecutorWorker"
        values.setdefault("executor_worker_path", default)
    return gated(values, job.tensorrt_llm)


def _decoding(job: Job) -> dict[str, Value | None]:
    given = job.config.serving.speculative
    lookahead = given.lookahead
    return {
        "decoding_mode": job.config.serving.decoding_mode,
        "medusa_choices": _tree(given.medusa_choices),
        "eagle_choices": _tree(given.eagle_choices),
        "lookahead_window_size": lookahead.window_size if lookahead else None,
        "lookahead_ngram_size": lookahead.ngram_size if lookahead else None,
        "lookahead_verification_set_size": lookahead.verification_set_size if lookahead else None,
        "speculative_decoding_fast_logits": given.fast_logits or None,
    }


def _tree(paths: list[list[int]]) -> str | None:
    """Paths of a draft tree as the backend reads them: `{0}, {0, 0}, {1}`."""
    return ", ".join("{" + ", ".join(map(str, path)) + "}" for path in paths) or None


def _lora(job: Job) -> dict[str, Value | None]:
    lora = job.config.serving.lora
    if lora is None:
        return {}
    if lora.adapters or lora.max_loras:
        key = "adapters" if lora.adapters else "max_loras"
        raise InputError(
            f"serving.lora.{key} does not go with runtime 'tensorrtllm'",
            "its requests bring their adapters as tensors; remove the key",
        )
    return {
        "lora_cache_max_adapter_size": lora.max_rank,
        "lora_cache_optimal_adapter_size": lora.optimal_rank,
        "lora_cache_gpu_memory_fraction": lora.gpu_memory_fraction,
        "lora_cache_host_memory_bytes": lora.host_memory_bytes,
        "lora_prefetch_dir": lora.prefetch_dir,
    }


def _grammar(job: Job, files: Files) -> dict[str, Value | None]:
    """Guided decoding: the C++ backend reads the vocabulary from a file that it finds by its whole path."""
    backend = job.config.serving.guided_decoding_backend
    if backend is None:
        return {}
    if job.repository_path is None:
        raise InputError(
            "serving.guided_decoding_backend needs to know where the server finds the repository",
            "give --repository-in-container PATH",
        )
    files[_GRAMMAR_FILE] = json_text(_tokenizer_info(job))
    return {
        "guided_decoding_backend": backend,
        "xgrammar_tokenizer_info_path": f"{job.repository_path}/{_GRAMMAR_FILE}",
    }


def _tokenizer_info(job: Job) -> dict[str, object]:
    """What model_instance_state.cc reads: texts of all tokens by id, the tokenizer as JSON, and the ids that end."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json(job.tokenizer_dir).decode("utf-8"))
    vocabulary = sorted(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    return {
        "encoded_vocab": [text for text, _ in vocabulary],
        "tokenizer_str": tokenizer.to_str(),
        "stop_token_ids": list(job.end_ids),
    }
