"""The build config: one YAML file that says what to build, serve, deploy and test.

Strict by design: an unknown key, a mistyped value or a value out of range is an error. `BuildConfig` and its parts are
plain frozen pydantic models; `trtkit.config_file` reads them from YAML and says where an error is.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from trtkit.config_base import PositiveInt, Strict
from trtkit.config_serving import LLM_RUNTIMES, ServingConfig
from trtkit.config_serving_parts import ResourceName

QuantizationFormat = Literal[
    "int8_wo", "int4_wo", "int4_awq", "w4a8_awq", "int8_sq", "int8_sq_plugin", "fp8", "fp8_rowwise"
]
DType = Literal["auto", "float16", "bfloat16", "float32"]
Target = Literal["local", "docker"]

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""Names become folder, process and container names, so they hold nothing a path or a shell could misread."""

Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Port = Annotated[int, Field(ge=0, le=65535, description="TCP port; 0 takes a free one")]

_GPU = r"(\d+|(GPU|MIG)-[A-Za-z0-9-]+)"
_GPUS = rf"^(all|none|{_GPU}(,{_GPU})*)$"


class ModelConfig(Strict):
    """The source: a Hugging Face checkpoint."""

    source: Annotated[str, Field(min_length=1)]
    """Local folder (relative to the config file) or hub id such as `meta-llama/Llama-3.1-8B`."""
    revision: str | None = None
    """Hub commit, tag or branch. Pin a commit for reproducible builds."""
    trust_remote_code: bool = False
    """Let transformers run Python code that comes with the checkpoint. Off unless you trust its authors."""


class CalibrationConfig(Strict):
    """The text that activations are seen on."""

    text: str | None = None
    """A .txt, .jsonl, .parquet or .npy file (relative to the config file), or a dataset of the hub; None takes the
    built-in text."""
    samples: Annotated[int, Field(ge=1, le=100_000)] = 128
    """Windows of the text."""
    length: Annotated[int, Field(ge=2, le=1_000_000)] = 512
    """Tokens in each window."""
    seed: int = 0
    """Draws the windows."""


class QuantizationConfig(Strict):
    """How linears and the KV cache are quantised; by default they are not."""

    format: QuantizationFormat | None = None
    """Format of the linears; None keeps them in the checkpoint's dtype."""
    group_size: Literal[64, 128] | None = None
    """Inputs that share a scale, for the int4 formats with groups; None takes 128."""
    kv_cache: Literal["int8", "fp8"] | None = None
    """Dtype of the KV cache."""
    exclude: list[str] = []
    """Patterns of TRT-LLM module names to leave alone, such as `transformer.layers.0.*`."""
    overrides: dict[str, QuantizationFormat] = {}
    """TRT-LLM module name such as `transformer.layers.3.mlp.proj` -> another format (mixed precision)."""
    gpu: str | None = None
    """The GPU that will serve, such as `H100` or `sm90`: what it cannot run is refused before any work."""
    calibration: CalibrationConfig = CalibrationConfig()
    max_perplexity_increase: Annotated[str, Field(pattern=r"^\d+(\.\d+)?%?$")] | None = None
    """`2%`, or an absolute number: the build fails when held-out perplexity rises by more."""


class CheckpointConfig(Strict):
    """How the source becomes a TRT-LLM checkpoint."""

    dtype: DType = "auto"
    """Dtype of the checkpoint; `auto` keeps the source's, with float32 becoming float16."""
    tp: Annotated[int, Field(ge=1, le=64)] = 1
    """Tensor-parallel size."""
    pp: Annotated[int, Field(ge=1, le=64)] = 1
    """Pipeline-parallel size."""
    ep: Annotated[int, Field(ge=1, le=64)] = 1
    """Expert-parallel size: groups of TP ranks that share the experts among them, a divisor of `tp`."""
    parallel_embedding: Literal["none", "vocab", "hidden"] = "none"
    """Axis along which TP splits the token embedding; `none` keeps a full copy on every rank."""
    quantization: QuantizationConfig = QuantizationConfig()


class EngineConfig(Strict):
    """How trtllm-build compiles the checkpoint. Ignored by the `reference` runtime."""

    builder: Literal["local", "docker"] = "docker"
    """Where trtllm-build runs: on this machine's PATH, or in the release's container."""
    max_batch_size: Annotated[int, Field(ge=1, le=65536)] = 64
    """Requests that the engine runs at once."""
    max_input_len: PositiveInt = 1024
    """Longest prompt, in tokens."""
    max_seq_len: PositiveInt | None = None
    """Longest prompt plus output, in tokens; None takes the model's own limit."""
    max_num_tokens: PositiveInt = 8192
    """Tokens in one engine step over all requests, after padding is removed."""
    max_beam_width: Annotated[int, Field(ge=1, le=64)] = 1
    gemm_plugin: Literal["auto", "float16", "bfloat16", "float32", "fp8", "disable"] = "auto"
    kv_cache_type: Literal["paged", "continuous", "disabled"] = "paged"
    use_paged_context_fmha: bool = True
    """Needed for KV-cache reuse and chunked context."""
    multiple_profiles: bool = False
    reduce_fusion: bool = False
    """Fuses the all-reduce with the norm behind it; Llama and Gemma 2 with TP > 1 only."""
    workers: PositiveInt = 1
    """Ranks compiled at once; each needs its own GPU."""

    @model_validator(mode="after")
    def _lengths_fit(self) -> EngineConfig:
        if self.max_seq_len is not None and self.max_seq_len <= self.max_input_len:
            raise ValueError(
                f"max_seq_len ({self.max_seq_len}) counts prompt and output, "
                f"so it must exceed max_input_len ({self.max_input_len})"
            )
        return self


class DeployConfig(Strict):
    """Where and how Triton runs."""

    target: Target = "local"
    release: Annotated[str, Field(pattern=r"^\d\d\.\d\d$")] = "26.07"
    """Triton container tag, YY.MM."""
    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback lets other machines in, without authentication."""
    http_port: Port = 0
    grpc_port: Port = 0
    metrics_port: Port = 0
    ready_timeout_s: Annotated[float, Field(gt=0, le=86400)] = 300.0
    exit_timeout_s: Annotated[int, Field(ge=1, le=3600)] = 10
    """How long running requests may finish after a stop."""
    model_control: Literal["none", "poll"] = "none"
    """`poll` makes the server take over what changes in the model repository: whoever may write there may run code."""
    gpus: Annotated[str, Field(pattern=_GPUS)] = "all"
    """`all`, GPU ids such as `0,1` (numbers or UUIDs), or `none` for a container without GPUs. Docker only."""
    shm_size: Annotated[str, Field(pattern=r"^[1-9][0-9]*[mg]$")] = "2g"
    """Shared memory of the container: the python backend and NCCL live in it."""
    image: str | None = None
    """A container image to use instead of the release's for the runtime."""
    response_cache_bytes: Annotated[int, Field(ge=2**20, le=2**44)] = 64 * 2**20
    """Memory of the server's response cache, which there is where serving.response_cache is on."""
    rate_limit_resources: dict[ResourceName, PositiveInt] = {}
    """Resource of serving.rate_limiter -> how many of it the server has. Of those that are not listed it has as many as
    the greediest execution takes."""

    @model_validator(mode="after")
    def _ports_differ(self) -> DeployConfig:
        chosen = [port for port in (self.http_port, self.grpc_port, self.metrics_port) if port]
        if len(set(chosen)) < len(chosen):
            raise ValueError("http_port, grpc_port and metrics_port must differ")
        return self

    @property
    def gpu_ids(self) -> list[str] | None:
        """The GPUs by id; None for all of them, and an empty list for none."""
        return {"all": None, "none": []}.get(self.gpus, self.gpus.split(","))


class ValidationConfig(Strict):
    """What `trtkit validate` sends."""

    prompts: Annotated[list[str], Field(min_length=1)] = ["The", "def main(", "Return a new", "import os\n"]
    max_tokens: Annotated[int, Field(ge=1, le=100_000)] = 24
    """Tokens generated per prompt."""


class Scenario(Strict):
    """One load test: closed loop with `concurrency`, or open loop with `request_rate`."""

    concurrency: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Closed loop: requests kept in flight."""
    request_rate: Annotated[float, Field(gt=0, le=100_000)] | None = None
    """Open loop: requests per second that arrive whether or not earlier ones are done."""
    arrival: Literal["poisson", "constant"] = "poisson"
    """Arrival process of the open loop."""
    duration_s: Annotated[float, Field(gt=0, le=86_400)] = 30.0
    warmup_s: Annotated[float, Field(ge=0, le=3600)] = 2.0
    """Sent before the measurement and left out of it."""
    max_requests: PositiveInt | None = None
    """Stop after this many requests, even when time is left."""
    timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 120.0
    """A request that takes longer counts as an error."""
    protocol: Literal["grpc", "http"] = "grpc"
    streaming: bool = True
    """Needed for time to first token and inter-token latency."""
    prompts: list[str] = []
    """Sent in turn; empty takes validation.prompts."""
    max_tokens: Annotated[int, Field(ge=1, le=100_000)] = 64
    seed: int = 0

    @model_validator(mode="after")
    def _one_loop(self) -> Scenario:
        if (self.concurrency is None) == (self.request_rate is None):
            raise ValueError("give either concurrency (closed loop) or request_rate (open loop)")
        return self


class BuildConfig(Strict):
    """Everything trtkit needs to know, from source to load test."""

    name: Name
    """Name of the deployment and of its folder."""
    model: ModelConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    engine: EngineConfig = EngineConfig()
    serving: ServingConfig = ServingConfig()
    deploy: DeployConfig = DeployConfig()
    validation: ValidationConfig = ValidationConfig()
    loadtest: dict[Name, Scenario] = {"default": Scenario(concurrency=8)}
    """Scenarios by name."""

    @field_validator("loadtest")
    @classmethod
    def _some_scenario(cls, value: dict[str, Scenario]) -> dict[str, Scenario]:
        if not value:
            raise ValueError("at least one scenario is needed")
        return value

    @model_validator(mode="after")
    def _paged_context_fits(self) -> BuildConfig:
        wants_it = self.serving.enable_kv_cache_reuse or self.serving.enable_chunked_context
        if self.serving.runtime == "tensorrtllm" and wants_it and not self.engine.use_paged_context_fmha:
            raise ValueError(
                "engine.use_paged_context_fmha is off, but serving.enable_kv_cache_reuse and "
                "serving.enable_chunked_context need it"
            )
        return self

    @model_validator(mode="after")
    def _gpus_fit(self) -> BuildConfig:
        serving, world = self.serving, self.checkpoint.tp * self.checkpoint.pp
        if serving.runtime == "onnxruntime":
            world = 1
        for entry in serving.gpu_device_ids:
            if entry.count(",") + 1 != world:
                raise ValueError(
                    f"serving.gpu_device_ids gives '{entry}' to an instance that runs on {world} GPUs "
                    "(checkpoint.tp x checkpoint.pp)"
                )
        if serving.runtime == "llmapi" and serving.instances > 1 and not serving.gpu_device_ids:
            raise ValueError("serving.gpu_device_ids is needed by several instances of runtime 'llmapi'")
        if serving.runtime == "vllm" and serving.instances > 1 and (world > 1 or not serving.gpu_device_ids):
            raise ValueError(
                "serving.instances above 1 need one GPU each in serving.gpu_device_ids with runtime 'vllm' "
                "(its backend cannot tell instances on several GPUs apart)"
            )
        return self

    @model_validator(mode="after")
    def _an_engine_has_gpus(self) -> BuildConfig:
        runtime = self.serving.runtime
        if self.deploy.gpus == "none" and runtime in LLM_RUNTIMES and runtime != "reference":
            raise ValueError(f"deploy.gpus is 'none', and runtime '{runtime}' needs GPUs")
        return self

    @model_validator(mode="after")
    def _resources_suffice(self) -> BuildConfig:
        limiter, there = self.serving.rate_limiter, self.deploy.rate_limit_resources
        if there and limiter is None:
            raise ValueError("deploy.rate_limit_resources needs serving.rate_limiter, which takes them")
        for name, count in limiter.resources.items() if limiter else ():
            if there.get(name, count) < count:
                raise ValueError(
                    f"deploy.rate_limit_resources.{name} ({there[name]}) is less than one execution takes "
                    f"(serving.rate_limiter.resources.{name}: {count})"
                )
        return self

    @model_validator(mode="after")
    def _batch_sizes_fit(self) -> BuildConfig:
        if self.serving.runtime == "tensorrtllm" and self.serving.max_batch_size > self.engine.max_batch_size:
            raise ValueError(
                f"serving.max_batch_size ({self.serving.max_batch_size}) exceeds "
                f"engine.max_batch_size ({self.engine.max_batch_size})"
            )
        return self
