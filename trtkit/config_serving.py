"""The part of the build config that describes the model repository.

Keys that belong to one runtime only are refused with the others: what would be ignored is a mistake.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from trtkit.config_base import PositiveInt, Strict
from trtkit.config_serving_parts import (
    Fraction,
    KvCacheConfig,
    LoraConfig,
    OnnxConfig,
    PythonConfig,
    QueueConfig,
    RateLimiterConfig,
    SpeculativeConfig,
    WarmupConfig,
)

Runtime = Literal["tensorrtllm", "llmapi", "vllm", "onnxruntime", "python", "reference"]
Topology = Literal["ensemble", "fused"]
DecodingMode = Literal["top_k", "top_p", "top_k_top_p", "beam_search", "medusa", "redrafter", "lookahead", "eagle"]

RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)
LLM_RUNTIMES: tuple[Runtime, ...] = ("tensorrtllm", "llmapi", "vllm", "reference")
"""Runtimes that turn a prompt into text; the others run any model."""

TOPOLOGIES: dict[Runtime, tuple[Topology | None, ...]] = {
    "tensorrtllm": ("ensemble", "fused"),
    "reference": ("ensemble", "fused"),
    "llmapi": (None, "fused"),
    "vllm": (None, "fused"),
    "onnxruntime": (None,),
    "python": (None,),
}
"""What each runtime can be laid out as, its default first; None is the one model that the runtime itself defines."""

_GPU_LIST = r"^\d+(,\d+)*$"


class ServingConfig(Strict):
    """The model repository."""

    runtime: Runtime = "tensorrtllm"
    """What executes the model inside Triton."""
    topology: Topology | None = None
    """`ensemble`: preprocessing, model and postprocessing as Triton models of their own; `fused`: one model `llm` that
    tokenises, drives the engine in its own process and detokenises. None is `ensemble` for tensorrtllm and reference,
    and the runtime's own single model for the others."""
    streaming: bool = True
    """Serve token by token (decoupled models). Requests still choose with `stream`."""
    coalesce: bool = True
    """Tokens that the engine has ready together go out in one response."""
    max_token_wait_ms: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """How long a token may wait for company before it is sent: in `llm` for others of its stream, in an ensemble for
    those of all streams, which share the calls of postprocessing."""
    ensemble_outputs: list[Literal["cum_log_probs", "output_log_probs", "batch_index", "sequence_index"]] = []
    """What an ensemble returns beside the text. Each takes about 20 us of CPU per token, asked for or not. Requests
    with several prompts need batch_index where the ensemble streams, and `num_return_sequences` needs
    sequence_index."""
    default_max_tokens: PositiveInt = 256
    """Most tokens of an answer when the request to `llm` does not say (`max_tokens`)."""
    chat_template: str | None = None
    """A Jinja file for chat messages (relative to the config file); None takes the tokenizer's own."""
    max_batch_size: Annotated[int, Field(ge=1, le=65536)] = 64
    """Requests that Triton hands to the model at once; at most engine.max_batch_size. With llmapi and vllm, which
    batch by themselves, the requests that run at once."""
    max_queue_delay_microseconds: Annotated[int, Field(ge=0, le=10_000_000)] = 0
    """How long the dynamic batcher waits for company."""
    preferred_batch_size: list[PositiveInt] = []
    max_queue_size: Annotated[int, Field(ge=0)] = 0
    """Requests waiting before new ones are rejected; 0 is unlimited."""
    max_inflight_requests: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Responses of a decoupled step that an ensemble passes on at once, which bounds its memory where the next step is
    slower; 0 is unlimited. Servers know it since release 25.11."""
    queue: QueueConfig = QueueConfig()
    preprocessing_instances: Annotated[int, Field(ge=1, le=64)] = 1
    instances: Annotated[int, Field(ge=1, le=64)] = 1
    """Copies of the model that executes."""
    gpu_device_ids: list[Annotated[str, Field(pattern=_GPU_LIST)]] = []
    """GPUs of each instance, TP x PP ids each, such as `["0,1", "2,3"]`; empty leaves it to the runtime."""
    response_cache: bool = False
    """Answer equal requests from the server's cache, which `trtkit deploy` gives deploy.response_cache_bytes. Single
    answers only."""
    rate_limiter: RateLimiterConfig | None = None
    version_policy: Literal["all"] | PositiveInt | Annotated[list[PositiveInt], Field(min_length=1)] = 1
    """Versions that are served: the latest N, `all`, or a list of them."""
    warmup: list[WarmupConfig] = []
    kv_cache_free_gpu_mem_fraction: Fraction = 0.9
    enable_kv_cache_reuse: bool = True
    enable_chunked_context: bool = False
    kv_cache: KvCacheConfig = KvCacheConfig()
    lora: LoraConfig | None = None
    decoding_mode: DecodingMode | None = None
    """How the engine picks tokens; None is top_k_top_p, or beam_search where the engine has beams."""
    speculative: SpeculativeConfig = SpeculativeConfig()
    guided_decoding_backend: Literal["xgrammar"] | None = None
    """Lets requests bind the output to a JSON schema, regular expression or grammar."""
    backend_parameters: dict[str, bool | int | float | str] = {}
    """The other parameters of the C++ backend (tensorrtllm), checked against trtkit's table of them."""
    engine_args: dict[str, Any] = {}
    """Further arguments of `LLM` (llmapi) or `AsyncEngineArgs` (vllm), as these define them."""
    llmapi_folder: Annotated[str, Field(pattern=r"^/[^\n]*$")] = "/app/all_models/llmapi/tensorrt_llm/1"
    """Where the container keeps NVIDIA's model.py and helpers.py of the LLM API; no topology only (llmapi)."""
    onnx: OnnxConfig = OnnxConfig()
    python: PythonConfig = PythonConfig()
    add_special_tokens: bool = True
    """Let the tokenizer add its begin-of-sequence token. Turn off when prompts already carry it (chat templates)."""

    @property
    def layout(self) -> Topology | None:
        """The topology, with the runtime's default in place of None."""
        return self.topology or TOPOLOGIES[self.runtime][0]

    @property
    def decoupled(self) -> bool:
        """The model that executes may send several responses per request. vLLM's always does."""
        return self.runtime == "vllm" or (self.streaming and self.runtime in LLM_RUNTIMES)

    @field_validator("engine_args")
    @classmethod
    def _arguments_are_json(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"only what JSON can say goes into an engine's arguments: {error}") from None
        return value

    @model_validator(mode="after")
    def _preferred_sizes_fit(self) -> ServingConfig:
        for size in self.preferred_batch_size:
            if size > self.max_batch_size:
                raise ValueError(f"preferred_batch_size {size} exceeds max_batch_size {self.max_batch_size}")
        return self

    @model_validator(mode="after")
    def _topology_exists(self) -> ServingConfig:
        valid = TOPOLOGIES[self.runtime]
        if self.topology is not None and self.topology not in valid:
            named = ", ".join(one for one in valid if one) or "none"
            raise ValueError(f"topology '{self.topology}' does not go with runtime '{self.runtime}'; valid: {named}")
        return self

    @model_validator(mode="after")
    def _keys_belong_to_the_runtime(self) -> ServingConfig:
        for key in sorted(self.model_fields_set):
            runtimes = OWNERS.get(key, RUNTIMES)
            if self.runtime not in runtimes and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} goes with runtime {' or '.join(runtimes)}, not with '{self.runtime}'")
        return self

    @model_validator(mode="after")
    def _an_ensemble_is_there(self) -> ServingConfig:
        if self.max_inflight_requests and self.layout != "ensemble":
            raise ValueError("max_inflight_requests needs topology: ensemble")
        return self

    @model_validator(mode="after")
    def _queue_exists(self) -> ServingConfig:
        if self.runtime not in ("llmapi", "vllm") or self.layout is not None:
            return self
        for key in ("max_queue_delay_microseconds", "preferred_batch_size", "max_queue_size", "queue"):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key} needs a model that Triton batches, and that of runtime '{self.runtime}' batches by itself; "
                    "set topology: fused, or leave the key out"
                )
        return self

    @model_validator(mode="after")
    def _gpus_fit(self) -> ServingConfig:
        if self.gpu_device_ids and len(self.gpu_device_ids) != self.instances:
            raise ValueError(
                f"gpu_device_ids has {len(self.gpu_device_ids)} entries for {self.instances} instances; "
                "give one for each"
            )
        for entry in self.gpu_device_ids:
            ids = entry.split(",")
            if len(set(ids)) < len(ids):
                raise ValueError(f"gpu_device_ids names a GPU twice in '{entry}'")
        return self

    @model_validator(mode="after")
    def _cache_fits(self) -> ServingConfig:
        if self.response_cache and self.decoupled:
            hint = "vLLM's model always streams" if self.runtime == "vllm" else "set streaming: false"
            raise ValueError(f"response_cache holds single answers only; {hint}")
        return self

    @model_validator(mode="after")
    def _warmup_fits(self) -> ServingConfig:
        speaks = self.runtime in LLM_RUNTIMES
        for index, item in enumerate(self.warmup):
            if speaks != (item.prompt is not None):
                need = "needs a prompt" if speaks else "takes no prompt"
                raise ValueError(f"warmup.{index} {need} with runtime '{self.runtime}'")
        return self

    @model_validator(mode="after")
    def _decoding_fits(self) -> ServingConfig:
        mode, given = self.decoding_mode, self.speculative
        for key, needed in (("medusa_choices", "medusa"), ("eagle_choices", "eagle"), ("lookahead", "lookahead")):
            if getattr(given, key) and mode != needed:
                raise ValueError(f"speculative.{key} needs decoding_mode: {needed}")
        if mode == "lookahead" and given.lookahead is None:
            raise ValueError("decoding_mode lookahead needs speculative.lookahead with its three sizes")
        return self


_ENGINE: tuple[Runtime, ...] = ("tensorrtllm",)
OWNERS: dict[str, tuple[Runtime, ...]] = {
    "kv_cache": ("tensorrtllm", "llmapi", "vllm"),
    "lora": ("tensorrtllm", "llmapi", "vllm"),
    "decoding_mode": _ENGINE,
    "speculative": _ENGINE,
    "guided_decoding_backend": ("tensorrtllm", "llmapi"),
    "backend_parameters": _ENGINE,
    "engine_args": ("llmapi", "vllm"),
    "llmapi_folder": ("llmapi",),
    "onnx": ("onnxruntime",),
    "python": ("python",),
    "chat_template": LLM_RUNTIMES,
    "coalesce": LLM_RUNTIMES,
    "default_max_tokens": LLM_RUNTIMES,
    "max_token_wait_ms": LLM_RUNTIMES,
    "ensemble_outputs": ("tensorrtllm", "reference"),
    "gpu_device_ids": ("tensorrtllm", "llmapi", "vllm", "onnxruntime"),
}
"""Key -> runtimes that know it; keys that are not here are everybody's."""
