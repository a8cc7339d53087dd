"""A stand-in of `tensorrt_llm.bindings.executor` for machines without TensorRT-LLM: its classes with the argument names
and types that NVIDIA/TensorRT-LLM declares in cpp/tensorrt_llm/nanobind/executor, around a made-up model.

Only what concerns decoders with one beam is there. What it gives back is as upstream: in a stream new tokens only,
log_probs of all tokens so far, no end id among the tokens, but a stop word.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from datetime import timedelta
from types import ModuleType, SimpleNamespace
from typing import Any

from standin_model import (
    LONGEST,
    NEEDED,
    VOCABULARY,
    Run,
    World,
    declare,
    flag,
    lists,
    log_prob,
    namespace,
    number,
    one,
    text,
    whole,
    wholes,
)  # fmt: skip

CONFIG = {"pretrained_config": {"vocab_size": VOCABULARY}, "build_config": {"max_seq_len": LONGEST}}


def module(slots: int = 4, *, old: bool = False, leads: bool = True) -> Any:
    """The bindings as a module. `made` is the one Executor, once there is one.

    Args:
        old: names of arguments from before TensorRT-LLM 0.17.
        leads: the process may enqueue requests; otherwise it is a rank above 0.
    """
    it: Any = ModuleType("tensorrt_llm.bindings.executor")
    it.made = None
    it.ModelType = namespace("ModelType", DECODER_ONLY="decoder", ENCODER_ONLY="encoder")
    it.FinishReason = namespace(
        "FinishReason", NOT_FINISHED=0, END_ID=1, STOP_WORDS=2, LENGTH=3, TIMED_OUT=4, CANCELLED=5
    )
    _requests(it, old)
    _configs(it)

    class Executor(_Executor):
        def __init__(self, model_path: str, model_type: str, executor_config: Any) -> None:
            assert isinstance(model_path, str)
            assert model_type == it.ModelType.DECODER_ONLY
            assert isinstance(executor_config, it.ExecutorConfig)
            super().__init__(it, slots, leads)
            self.model_path, self.config = model_path, executor_config
            it.made = self

    it.Executor = Executor
    return it


def _requests(it: Any, old: bool) -> None:
    it.SamplingConfig = declare(
        "SamplingConfig",
        1,
        beam_width=(whole, 1),
        top_k=(whole, None),
        top_p=(lambda value: number(value) and 0 < value <= 1, None),
        temperature=(lambda value: number(value) and value > 0, None),
        repetition_penalty=(number, None),
        presence_penalty=(number, None),
        frequency_penalty=(number, None),
        num_return_sequences=(whole, None),
        **{"random_seed" if old else "seed": (whole, None), "min_length" if old else "min_tokens": (whole, None)},
    )
    it.OutputConfig = declare(
        "OutputConfig",
        return_log_probs=(flag, False),
        return_context_logits=(flag, False),
        return_generation_logits=(flag, False),
        exclude_input_from_output=(flag, False),
    )
    it.LoraConfig = declare("LoraConfig", task_id=(whole, NEEDED), weights=(one(), None), config=(one(), None))
    it.GuidedDecodingParams = declare("GuidedDecodingParams", guide_type=(text, NEEDED), guide=(text, None))
    kinds = ("JSON", "JSON_SCHEMA", "REGEX", "EBNF_GRAMMAR", "STRUCTURAL_TAG")
    it.GuidedDecodingParams.GuideType = namespace("GuideType", **{kind: kind for kind in kinds})
    limit = "max_new_tokens" if old else "max_tokens"
    fields = {
        "input_token_ids": (wholes, NEEDED),
        limit: (whole, NEEDED),
        "streaming": (flag, False),
        "sampling_config": (one(it.SamplingConfig), NEEDED),
        "output_config": (one(it.OutputConfig), NEEDED),
        "end_id": (whole, None),
        "pad_id": (whole, None),
        "bad_words": (lists, None),
        "stop_words": (lists, None),
        "lora_config": (one(it.LoraConfig), None),
        "guided_decoding_params": (one(it.GuidedDecodingParams), None),
    }
    it.Request = declare("Request", 2, **fields)


def _configs(it: Any) -> None:
    it.CapacitySchedulerPolicy = namespace("Policy", MAX_UTILIZATION="max", GUARANTEED_NO_EVICT="no_evict")
    it.CommunicationMode = namespace("CommunicationMode", LEADER="leader", ORCHESTRATOR="orchestrator")
    modes = ("Auto", "TopK", "TopP", "TopKTopP", "BeamSearch", "Medusa", "ExplicitDraftTokens", "Lookahead", "Eagle")
    it.DecodingMode = namespace("DecodingMode", **{name: staticmethod(lambda name=name: name) for name in modes})
    it.SchedulerConfig = declare("SchedulerConfig", 1, capacity_scheduler_policy=(text, "no_evict"))
    it.KvCacheConfig = declare(
        "KvCacheConfig",
        enable_block_reuse=(flag, True),
        max_tokens=(whole, None),
        max_attention_window=(wholes, None),
        sink_token_length=(whole, None),
        free_gpu_memory_fraction=(number, None),
        host_cache_size=(whole, None),
        onboard_blocks=(flag, True),
        cross_kv_cache_fraction=(number, None),
    )
    it.PeftCacheConfig = declare(
        "PeftCacheConfig",
        optimal_adapter_size=(whole, 8),
        max_adapter_size=(whole, 64),
        device_cache_percent=(number, None),
        host_cache_size=(whole, None),
        lora_prefetch_dir=(text, None),
    )
    it.ExtendedRuntimePerfKnobConfig = declare(
        "ExtendedRuntimePerfKnobConfig", multi_block_mode=(flag, True), enable_context_fmha_fp32_acc=(flag, False)
    )
    it.OrchestratorConfig = declare(
        "OrchestratorConfig", is_orchestrator=(flag, True), worker_executable_path=(text, "")
    )
    it.ParallelConfig = declare(
        "ParallelConfig",
        communication_mode=(text, "leader"),
        device_ids=(wholes, None),
        orchestrator_config=(one(it.OrchestratorConfig), None),
        num_nodes=(whole, None),
    )
    it.EagleConfig = declare("EagleConfig", eagle_choices=(lists, None))
    it.LookaheadDecodingConfig = declare(
        "LookaheadDecodingConfig", 3, max_window_size=(whole, NEEDED), max_ngram_size=(whole, NEEDED),
        max_verification_set_size=(whole, NEEDED),
    )  # fmt: skip
    it.DecodingConfig = declare(
        "DecodingConfig",
        decoding_mode=(text, None),
        lookahead_decoding_config=(one(it.LookaheadDecodingConfig), None),
        medusa_choices=(lists, None),
        eagle_config=(one(it.EagleConfig), None),
    )
    it.GuidedDecodingConfig = declare(
        "GuidedDecodingConfig",
        backend=(text, NEEDED),
        encoded_vocab=(one(list), None),
        tokenizer_str=(text, None),
        stop_token_ids=(wholes, None),
    )
    it.GuidedDecodingConfig.GuidedDecodingBackend = namespace("Backend", XGRAMMAR="xgrammar")
    it.ExecutorConfig = declare(
        "ExecutorConfig",
        max_beam_width=(whole, 1),
        scheduler_config=(one(it.SchedulerConfig), it.SchedulerConfig()),
        kv_cache_config=(one(it.KvCacheConfig), it.KvCacheConfig()),
        enable_chunked_context=(flag, False),
        normalize_log_probs=(flag, True),
        iter_stats_max_iterations=(whole, 1000),
        parallel_config=(one(it.ParallelConfig), None),
        peft_cache_config=(one(it.PeftCacheConfig), it.PeftCacheConfig()),
        decoding_config=(one(it.DecodingConfig), None),
        gpu_weights_percent=(number, 1.0),
        extended_runtime_perf_knob_config=(one(it.ExtendedRuntimePerfKnobConfig), it.ExtendedRuntimePerfKnobConfig()),
        recv_poll_period_ms=(whole, 0),
        guided_decoding_config=(one(it.GuidedDecodingConfig), None),
    )


class _Executor:
    def __init__(self, it: Any, slots: int, leads: bool) -> None:
        self._it = it
        self._leads = leads
        self.world = World(slots)
        self.requests: list[Any] = []
        self.shut_down = False
        self._ids = itertools.count(7)
        self._sequences: dict[int, Run] = {}
        self._responses: deque[Any] = deque()
        self._ready = threading.Condition()

    def can_enqueue_requests(self) -> bool:
        return self._leads

    def enqueue_request(self, request: Any) -> int:
        assert self._leads
        assert isinstance(request, self._it.Request)
        limit = request.max_tokens if hasattr(request, "max_tokens") else request.max_new_tokens
        if len(request.input_token_ids) + limit > LONGEST:
            raise RuntimeError(f"Prompt length + maxNewTokens exceeds maxSeqLen ({LONGEST})")
        assert all(len(word) == 1 for word in request.stop_words or [])
        self.requests.append(request)
        key = next(self._ids)
        self._sequences[key] = sequence = Run(
            request.input_token_ids,
            limit,
            _Teller(self, key, request),
            end_ids=[] if request.end_id is None else [request.end_id],
            stop_ids=[word[0] for word in request.stop_words or []],
            bad_ids=[word[0] for word in request.bad_words or [] if len(word) == 1],
        )
        self.world.add(sequence)
        return key

    def cancel_request(self, id: int) -> None:
        self.world.stop(self._sequences[id])

    def await_responses(self, timeout: timedelta | None = None) -> list[Any]:
        assert timeout is None or isinstance(timeout, timedelta)
        with self._ready:
            if not self._responses:
                self._ready.wait(None if timeout is None else timeout.total_seconds())
            responses = list(self._responses)
            self._responses.clear()
        return responses

    def shutdown(self) -> None:
        self.shut_down = True
        self.world.close()

    def respond(self, response: Any) -> None:
        with self._ready:
            self._responses.append(response)
            self._ready.notify()


class _Teller:
    """Makes responses of what the world tells about a request."""

    def __init__(self, executor: _Executor, key: int, request: Any) -> None:
        self._executor, self._key, self._request = executor, key, request
        self._unsent: list[int] = []
        self._log_probs: list[float] = []

    def __call__(self, token: int | None, finish: str, error: str) -> None:
        request, reasons = self._request, self._executor._it.FinishReason
        if error:
            self._executor.respond(_Response(self._key, error_msg=error))
            return
        if token is not None:
            self._unsent.append(token)
            self._log_probs.append(log_prob(token))
        if not (finish or request.streaming):
            return
        names = {"end": "END_ID", "stop": "STOP_WORDS", "length": "LENGTH", "cancelled": "CANCELLED"}
        reason = getattr(reasons, names.get(finish, "NOT_FINISHED"))
        prompt = [] if request.streaming or request.output_config.exclude_input_from_output else request.input_token_ids
        result = SimpleNamespace(
            is_final=bool(finish),
            output_token_ids=[[*prompt, *self._unsent]],
            finish_reasons=[reason],
            log_probs=[list(self._log_probs)] if request.output_config.return_log_probs else None,
        )
        self._unsent = []
        self._executor.respond(_Response(self._key, result=result))


class _Response:
    def __init__(self, request_id: int, *, error_msg: str = "", result: Any = None) -> None:
        self.request_id, self._error, self._result = request_id, error_msg, result

    def has_error(self) -> bool:
        return bool(self._error)

    @property
    def error_msg(self) -> str:
        assert self._error
        return self._error

    @property
    def result(self) -> Any:
        assert not self._error, "a response with an error has no result"
        return self._result
