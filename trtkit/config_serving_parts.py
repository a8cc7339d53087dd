"""Sections within `serving` of the build config."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from trtkit.config_base import PositiveInt, Strict

Fraction = Annotated[float, Field(gt=0, lt=1)]
Bytes = Annotated[int, Field(ge=0, le=2**50)]
ResourceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class QueueConfig(Strict):
    """Policy for requests that wait in Triton's queue. How many may wait is `serving.max_queue_size`."""

    default_timeout_microseconds: Annotated[int, Field(ge=0, le=86_400_000_000)] = 0
    """How long a request may wait; 0 is for ever. Triton looks at the clock only when it forms a batch."""
    timeout_action: Literal["reject", "delay"] = "reject"
    """What happens then: an error, or a place behind all requests that are not late."""
    allow_timeout_override: bool = False
    """A request may name a shorter timeout than the default one."""
    priority_levels: Annotated[int, Field(ge=0, le=1000)] = 0
    """Levels that requests may name, 1 the first to be served; 0 turns priorities off. They cost: with levels on,
    Triton's batcher let requests of 20 ms wait for up to 500 ms (measured on server 2.51)."""
    default_priority_level: Annotated[int, Field(ge=0, le=1000)] = 0
    """Level of requests that name none; 0 takes the middle one."""

    @model_validator(mode="after")
    def _level_exists(self) -> QueueConfig:
        if self.default_priority_level > self.priority_levels:
            raise ValueError(
                f"default_priority_level ({self.default_priority_level}) exceeds "
                f"priority_levels ({self.priority_levels})"
            )
        return self

    @property
    def default_level(self) -> int:
        """The level of a request that names none."""
        return self.default_priority_level or (self.priority_levels + 1) // 2


class RateLimiterConfig(Strict):
    """Shares what models compete for. `trtkit deploy` turns it on in the server, with
    deploy.rate_limit_resources."""

    resources: dict[ResourceName, PositiveInt] = {}
    """Resource -> how many of it one execution takes."""
    priority: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """A model with priority 2 gets half the turns of one with priority 1; 0 is as 1."""


class WarmupConfig(Strict):
    """A request that Triton sends to each instance before it reports ready."""

    prompt: str | None = None
    """Text for a language model, tokenised when the repository is generated; None is for the other runtimes."""
    max_tokens: Annotated[int, Field(ge=1, le=100_000)] = 1
    """Tokens to generate from the prompt."""
    count: Annotated[int, Field(ge=1, le=10_000)] = 1
    """How often it is sent."""
    size: PositiveInt = 1
    """What every dynamic axis measures (onnxruntime, python); the values are zeros and empty texts."""


class KvCacheConfig(Strict):
    """The paged KV cache. Its share of the GPU is `serving.kv_cache_free_gpu_mem_fraction`."""

    max_tokens: PositiveInt | None = None
    """Upper limit in tokens over all requests; None lets the fraction of memory decide."""
    host_memory_bytes: Bytes = 0
    """Host memory for blocks that the GPU has no room for."""
    max_attention_window: list[PositiveInt] = []
    """Tokens that attention looks back, per layer (repeated as a pattern); empty is the whole sequence."""
    sink_token_length: Annotated[int, Field(ge=0)] = 0
    """First tokens that the window always keeps."""
    cross_fraction: Fraction | None = None
    """Part of the cache for cross attention; encoder-decoder models only."""


class LoraConfig(Strict):
    """LoRA adapters that requests may choose."""

    max_rank: Annotated[int, Field(ge=1, le=4096)] = 64
    """Largest rank (adapter size) of an adapter."""
    optimal_rank: Annotated[int, Field(ge=1, le=4096)] = 8
    """Rank that cache pages are made for (tensorrtllm)."""
    gpu_memory_fraction: Fraction | None = None
    """Part of the GPU memory left after engine and KV cache that caches adapters (tensorrtllm); None is 0.05."""
    host_memory_bytes: Bytes | None = None
    """Host cache of adapters (tensorrtllm); None is 1 GiB."""
    prefetch_dir: str | None = None
    """Folder of adapters to load at the start, as the server sees it (tensorrtllm)."""
    adapters: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")], str] = {}
    """Name -> folder as the server sees it (vllm, and llmapi in the fused topology). Else requests name the adapter."""
    max_loras: PositiveInt | None = None
    """Adapters in one batch (llmapi, vllm)."""

    @model_validator(mode="after")
    def _ranks_fit(self) -> LoraConfig:
        if self.optimal_rank > self.max_rank:
            raise ValueError(f"optimal_rank ({self.optimal_rank}) exceeds max_rank ({self.max_rank})")
        return self


class LookaheadConfig(Strict):
    """Size of the lookahead branch."""

    window_size: PositiveInt
    ngram_size: PositiveInt
    verification_set_size: PositiveInt


class SpeculativeConfig(Strict):
    """Speculative decoding of an engine that was built for it."""

    medusa_choices: list[Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]] = []
    """Tree of Medusa heads as paths, such as `[[0], [0, 0], [1]]`; empty takes the backend's own."""
    eagle_choices: list[Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]] = []
    """Tree of EAGLE drafts as paths; empty takes the backend's own or the request's."""
    lookahead: LookaheadConfig | None = None
    fast_logits: bool = False
    """Draft logits go from model to model without the host; orchestrator mode without spawned processes only."""


class OnnxConfig(Strict):
    """The `onnxruntime` runtime."""

    model: str | None = None
    """The .onnx file (relative to the config file); None takes `model.source`."""
    batch: bool | None = None
    """Whether axis 0 of every input and output counts requests; None decides by the graph: where all of them begin
    with the same dynamic axis."""
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """Threads within one operator on the CPU; 0 lets onnxruntime choose."""


class PythonConfig(Strict):
    """The `python` runtime."""

    model: str | None = None
    """The .py file (relative to the config file); None takes `model.source`."""
    function: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] = "infer"
    """The function whose annotations are the model's inputs and outputs."""
    batch: bool = True
    """Arrays carry a first axis over requests, which Triton batches; otherwise each call is one request."""
