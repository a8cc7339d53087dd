"""TensorRT engines, executed in this process through `tensorrt_llm.bindings.executor`.

It is driven as NVIDIA's python variant of the `tensorrt_llm` model does (tensorrtllm_backend c2e65b8,
all_models/inflight_batcher_llm/tensorrt_llm/1/model.py); names and types are those of the bindings
(cpp/tensorrt_llm/nanobind/executor). Not run: there was no GPU to run it on.

What the bindings do, by their source: without beam search a response of a stream holds new tokens only, and log_probs
those of all tokens so far (tensorrt_llm/executor/result.py); an end id is not among the tokens, a stop word is.

Several GPUs: in leader mode, as `mpirun -n <world size>` starts it, each rank has a server of its own; ranks above 0
stay inside `Engine(...)` until the leader ends. With TRTLLM_ORCHESTRATOR=1 this process spawns the ranks.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from ..engine import Job, RequestError, Step

_GUIDES = {"json": "JSON", "json_schema": "JSON_SCHEMA", "regex": "REGEX", "ebnf_grammar": "EBNF_GRAMMAR"}


class Engine:
    """Sequences of the engine in `gpt_model_path`.

    Args:
        parameters: those of NVIDIA's C++ backend that concern a decoder (see `_config`); relative paths begin in
            `version_dir`.
        slots: not used; the engine's max_batch_size says how many sequences run, and others wait in the executor.
    """

    def __init__(self, parameters: dict[str, str], *, slots: int) -> None:
        import tensorrt_llm.bindings.executor as trtllm

        given = {name: value for name, value in parameters.items() if value and not value.startswith("${")}
        if "gpt_model_path" not in given:
            raise ValueError("config.pbtxt: parameter 'gpt_model_path' is missing")
        base = Path(given.get("version_dir", "."))
        folder = base / given["gpt_model_path"]
        built = json.loads((folder / "config.json").read_bytes())
        self.vocab_size: int | None = built["pretrained_config"]["vocab_size"]
        self.max_seq_len: int | None = built["build_config"]["max_seq_len"]
        self._lora = bool((built["build_config"].get("lora_config") or {}).get("lora_target_modules"))
        self._trtllm = trtllm
        config = _config(trtllm, given, base)
        self._guides = config.guided_decoding_config is not None
        self._executor: Any = trtllm.Executor(str(folder), trtllm.ModelType.DECODER_ONLY, config)
        self._wake = threading.Condition()
        # Under the condition's lock: the executor's ids of what runs, None where nobody wants it any more.
        self._ids: dict[int, int] = {}
        self._running: dict[int, _Run | None] = {}
        self._failed: list[Step] = []
        self._woken = False
        if not self._executor.can_enqueue_requests():
            self._executor.shutdown()  # a rank above 0: returns when the leader has ended
            self._executor = None

    def check(self, job: Job) -> None:
        asked = job.sampling
        asked.check_guide(_GUIDES, enabled=self._guides)
        if asked.lora_task_id is not None and not self._lora:
            raise RequestError("the engine was built without LoRA", "UNSUPPORTED")

    def submit(self, job: Job) -> None:
        with self._wake:
            try:
                number = self._executor.enqueue_request(_request(self._trtllm, job))
            except Exception as error:  # the bindings check values of their own
                self._failed.append(Step(job.key, error=f"the engine refuses the request: {error}", code="INVALID_ARG"))
            else:
                self._ids[job.key] = number
                self._running[number] = _Run(job)
            self._woken = True
            self._wake.notify()

    def cancel(self, key: int) -> None:
        with self._wake:
            number = self._ids.pop(key, None)
            self._failed = [step for step in self._failed if step.key != key]
            if number is not None:
                self._running[number] = None
                self._executor.cancel_request(number)  # makes a last response, which wakes a waiting step
            self._woken = True
            self._wake.notify()

    def step(self, timeout_s: float) -> list[Step]:
        with self._wake:
            if not (self._running or self._woken):
                self._wake.wait(timeout_s)
            steps, self._failed, self._woken = self._failed, [], False
            running = bool(self._running)
        if not running:
            return steps
        wait = timedelta(seconds=0 if steps else timeout_s)
        responses = self._executor.await_responses(timeout=wait)
        with self._wake:
            touched = {run for response in responses if (run := self._take(response)) is not None}
            for run in touched:
                steps.append(run.step())
                if run.over:
                    del self._running[self._ids.pop(run.job.key)]
        return steps

    def close(self) -> None:
        if self._executor is None:
            return
        for key in list(self._ids):
            self.cancel(key)
        self._executor.shutdown()
        self._executor = None

    def _take(self, response: Any) -> _Run | None:
        """Hands a response to its sequence, if anybody wants it."""
        run = self._running.get(response.request_id)
        if run is not None:
            run.take(self._trtllm, response)
        elif response.has_error() or response.result.is_final:
            self._running.pop(response.request_id, None)  # a cancelled one is over
        return run


class _Run:
    """A sequence that runs, and what is new about it."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.over = False
        self._tokens: list[int] = []
        self._log_probs: list[float] = []
        self._count = 0
        self._end = Step(job.key)

    def take(self, trtllm: Any, response: Any) -> None:
        if response.has_error():
            self._end = Step(self.job.key, error=f"the engine failed: {response.error_msg}")
            return
        result = response.result
        tokens: list[int] = list(result.output_token_ids[0])
        reason = result.finish_reasons[0] if result.is_final and result.finish_reasons else None
        if reason == trtllm.FinishReason.STOP_WORDS and tokens and tokens[-1] in self.job.end_ids:
            tokens.pop()
        if self.job.log_probs and tokens:
            self._log_probs += result.log_probs[0][self._count : self._count + len(tokens)]
        self._tokens += tokens
        self._count += len(tokens)
        if result.is_final:
            self._end = self._finish(trtllm, reason)

    def _finish(self, trtllm: Any, reason: Any) -> Step:
        if reason == trtllm.FinishReason.CANCELLED:
            return Step(self.job.key, error="the engine cancelled the request", code="CANCELLED")
        if reason == trtllm.FinishReason.TIMED_OUT:
            return Step(self.job.key, error="the engine's time for the request is over", code="UNAVAILABLE")
        return Step(self.job.key, finish="length" if reason == trtllm.FinishReason.LENGTH else "stop")

    def step(self) -> Step:
        """All that has come since the last one."""
        tokens, self._tokens = self._tokens, []
        log_probs, self._log_probs = self._log_probs, []
        self.over = bool(self._end.finish or self._end.error)
        return self._end._replace(tokens=tokens, log_probs=log_probs)


def _request(trtllm: Any, job: Job) -> Any:
    asked = job.sampling
    new = hasattr(trtllm.SamplingConfig, "min_tokens")  # since 0.17 names are those of the LLM API
    greedy = asked.temperature == 0
    sampling = {
        "top_k": 1 if greedy else asked.top_k,
        "top_p": None if greedy else asked.top_p or None,  # 0 is out of range, and means no limit
        "temperature": None if greedy else asked.temperature,
        "seed" if new else "random_seed": asked.seed,
        "min_tokens" if new else "min_length": asked.min_tokens,
        "repetition_penalty": asked.repetition_penalty,
        "presence_penalty": asked.presence_penalty,
        "frequency_penalty": asked.frequency_penalty,
    }
    extra: dict[str, Any] = {
        "max_tokens" if hasattr(trtllm.Request, "max_tokens") else "max_new_tokens": job.max_tokens
    }
    if job.end_ids:  # the engine knows one; words of one token do for the others
        extra |= {"end_id": job.end_ids[0], "pad_id": job.end_ids[0]}
    if job.end_ids[1:]:
        extra["stop_words"] = [[number] for number in job.end_ids[1:]]
    if job.bad_words:
        extra["bad_words"] = [list(word) for word in job.bad_words]
    if asked.lora_task_id is not None:
        extra["lora_config"] = trtllm.LoraConfig(task_id=asked.lora_task_id)
    if asked.guide_type is not None:
        kind = getattr(trtllm.GuidedDecodingParams.GuideType, _GUIDES[asked.guide_type])
        extra["guided_decoding_params"] = trtllm.GuidedDecodingParams(guide_type=kind, guide=asked.guide)
    return trtllm.Request(
        input_token_ids=list(job.prompt),
        streaming=job.streams,
        sampling_config=trtllm.SamplingConfig(**_some(sampling)),
        output_config=trtllm.OutputConfig(return_log_probs=job.log_probs, exclude_input_from_output=True),
        **extra,
    )


def _config(trtllm: Any, given: dict[str, str], base: Path) -> Any:
    """The ExecutorConfig that parameters describe; one that is not given keeps TensorRT-LLM's own default."""

    def pick(**wanted: tuple[str, Callable[[str], Any]]) -> dict[str, Any]:
        return {name: _read(given, key, kind) for name, (key, kind) in wanted.items() if key in given}

    cache = pick(
        enable_block_reuse=("enable_kv_cache_reuse", _flag),
        max_tokens=("max_tokens_in_paged_kv_cache", int),
        max_attention_window=("max_attention_window_size", _integers),
        sink_token_length=("sink_token_length", int),
        free_gpu_memory_fraction=("kv_cache_free_gpu_mem_fraction", float),
        cross_kv_cache_fraction=("cross_kv_cache_fraction", float),
        host_cache_size=("kv_cache_host_memory_bytes", int),
        onboard_blocks=("kv_cache_onboard_blocks", _flag),
    )
    adapters = pick(
        optimal_adapter_size=("lora_cache_optimal_adapter_size", int),
        max_adapter_size=("lora_cache_max_adapter_size", int),
        device_cache_percent=("lora_cache_gpu_memory_fraction", float),
        host_cache_size=("lora_cache_host_memory_bytes", int),
        lora_prefetch_dir=("lora_prefetch_dir", str),
    )
    kernels = pick(
        multi_block_mode=("multi_block_mode", _flag),
        enable_context_fmha_fp32_acc=("enable_context_fmha_fp32_acc", _flag),
    )
    config = trtllm.ExecutorConfig(
        max_beam_width=1,
        kv_cache_config=trtllm.KvCacheConfig(**cache),
        peft_cache_config=trtllm.PeftCacheConfig(**adapters),
        extended_runtime_perf_knob_config=trtllm.ExtendedRuntimePerfKnobConfig(**kernels),
        iter_stats_max_iterations=0,  # nobody reads them
        **pick(
            enable_chunked_context=("enable_chunked_context", _flag),
            normalize_log_probs=("normalize_log_probs", _flag),
            gpu_weights_percent=("gpu_weights_percent", float),
            recv_poll_period_ms=("recv_poll_period_ms", int),
        ),
    )
    if policy := given.get("batch_scheduler_policy"):
        config.scheduler_config = trtllm.SchedulerConfig(getattr(trtllm.CapacitySchedulerPolicy, policy.upper()))
    if decoding := _decoding(trtllm, given):
        config.decoding_config = trtllm.DecodingConfig(**decoding)
    parallel = pick(device_ids=("gpu_device_ids", _integers), num_nodes=("num_nodes", int))
    if os.environ.get("TRTLLM_ORCHESTRATOR") == "1":
        worker = {"worker_executable_path": given["executor_worker_path"]} if "executor_worker_path" in given else {}
        parallel["communication_mode"] = trtllm.CommunicationMode.ORCHESTRATOR
        parallel["orchestrator_config"] = trtllm.OrchestratorConfig(is_orchestrator=True, **worker)
    if parallel:
        config.parallel_config = trtllm.ParallelConfig(**parallel)
    if given.get("guided_decoding_backend") == "xgrammar":
        backend = trtllm.GuidedDecodingConfig.GuidedDecodingBackend.XGRAMMAR
        config.guided_decoding_config = trtllm.GuidedDecodingConfig(backend=backend, **_grammar(given, base))
    return config


def _decoding(trtllm: Any, given: dict[str, str]) -> dict[str, Any]:
    names = {
        "top_k": "TopK", "top_p": "TopP", "top_k_top_p": "TopKTopP", "medusa": "Medusa", "lookahead": "Lookahead",
        "redrafter": "ExplicitDraftTokens", "eagle": "Eagle",
    }  # fmt: skip
    decoding: dict[str, Any] = {}
    if mode := given.get("decoding_mode"):
        if mode not in names:
            raise ValueError(f"config.pbtxt: parameter 'decoding_mode' is '{mode}', none of {', '.join(names)}")
        decoding["decoding_mode"] = getattr(trtllm.DecodingMode, names[mode])()
    if "medusa_choices" in given:
        decoding["medusa_choices"] = _read(given, "medusa_choices", _tree)
    if "eagle_choices" in given:
        decoding["eagle_config"] = trtllm.EagleConfig(eagle_choices=_read(given, "eagle_choices", _tree))
    if "lookahead_window_size" in given:
        sizes = ("lookahead_window_size", "lookahead_ngram_size", "lookahead_verification_set_size")
        look = [_read(given, name, int) for name in sizes]
        decoding["lookahead_decoding_config"] = trtllm.LookaheadDecodingConfig(*look)
    return decoding


def _grammar(given: dict[str, str], base: Path) -> dict[str, Any]:
    """What xgrammar must know of the tokenizer: from the file that the C++ backend reads too, or from the tokenizer."""
    if path := given.get("xgrammar_tokenizer_info_path"):
        info: dict[str, Any] = json.loads((base / path).read_bytes())
        return {name: info[name] for name in ("encoded_vocab", "tokenizer_str", "stop_token_ids") if name in info}
    from tensorrt_llm.llmapi.tokenizer import _xgrammar_tokenizer_info
    from transformers import AutoTokenizer

    made: dict[str, Any] = _xgrammar_tokenizer_info(AutoTokenizer.from_pretrained(base / given["tokenizer_dir"]))
    return made


def _read(given: dict[str, str], name: str, kind: Callable[[str], Any]) -> Any:
    try:
        return kind(given[name])
    except (KeyError, ValueError):
        raise ValueError(f"config.pbtxt: parameter '{name}' is '{given.get(name, '')}'") from None


def _flag(text: str) -> bool:
    return {"true": True, "1": True, "false": False, "0": False}[text.lower()]


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.partition(";")[0].split(",")]  # behind ";" are those of further instances


def _tree(text: str) -> Any:
    return json.loads("[" + text.replace("{", "[").replace("}", "]") + "]")


def _some(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
