"""The build config: one YAML file that says what to build, serve, deploy and test.

Strict by design: an unknown key, a mistyped value or a value out of range is an error that names the file, the line and
what would be valid. `BuildConfig` and its parts are plain frozen pydantic models; `load_config` is the only place that
knows about YAML.
"""

from __future__ import annotations

import difflib
import functools
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from trtkit.errors import InputError, LacksError

Runtime = Literal["tensorrtllm", "reference"]
DType = Literal["auto", "float16", "bfloat16", "float32"]
Target = Literal["local", "docker"]

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""Names become folder, process and container names, so they hold nothing a path or a shell could misread."""

Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Port = Annotated[int, Field(ge=0, le=65535, description="TCP port; 0 takes a free one")]
PositiveInt = Annotated[int, Field(ge=1)]


_GPU = r"(\d+|(GPU|MIG)-[A-Za-z0-9-]+)"
_GPUS = rf"^(all|{_GPU}(,{_GPU})*)$"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class ModelConfig(_Strict):
    """The source: a Hugging Face checkpoint."""

    source: Annotated[str, Field(min_length=1)]
    """Local folder (relative to the config file) or hub id such as `meta-llama/Llama-3.1-8B`."""
    revision: str | None = None
    """Hub commit, tag or branch. Pin a commit for reproducible builds."""
    trust_remote_code: bool = False
    """Let transformers run Python code that comes with the checkpoint. Off unless you trust its authors."""


class CheckpointConfig(_Strict):
    """How the source becomes a TRT-LLM checkpoint."""

    dtype: DType = "auto"
    """Dtype of the checkpoint; `auto` keeps the source's, with float32 becoming float16."""
    tp: Annotated[int, Field(ge=1, le=64)] = 1
    """Tensor-parallel size."""
    pp: Annotated[int, Field(ge=1, le=64)] = 1
    """Pipeline-parallel size."""
    parallel_embedding: Literal["none", "vocab", "hidden"] = "none"
    """Axis along which TP splits the token embedding; `none` keeps a full copy on every rank."""


class EngineConfig(_Strict):
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


class ServingConfig(_Strict):
    """The model repository."""

    runtime: Runtime = "tensorrtllm"
    """What executes the model inside Triton."""
    streaming: bool = True
    """Serve token by token (decoupled models). Requests still choose with `stream`."""
    max_batch_size: Annotated[int, Field(ge=1, le=65536)] = 64
    """Requests that Triton hands to the model at once; at most engine.max_batch_size."""
    max_queue_delay_microseconds: Annotated[int, Field(ge=0, le=10_000_000)] = 0
    """How long the dynamic batcher waits for company."""
    preferred_batch_size: list[PositiveInt] = []
    max_queue_size: Annotated[int, Field(ge=0)] = 0
    """Requests waiting before new ones are rejected; 0 is unlimited."""
    preprocessing_instances: Annotated[int, Field(ge=1, le=64)] = 1
    kv_cache_free_gpu_mem_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.9
    enable_kv_cache_reuse: bool = True
    enable_chunked_context: bool = False
    add_special_tokens: bool = True
    """Let the tokenizer add its begin-of-sequence token. Turn off when prompts already carry it (chat templates)."""

    @model_validator(mode="after")
    def _preferred_sizes_fit(self) -> ServingConfig:
        for size in self.preferred_batch_size:
            if size > self.max_batch_size:
                raise ValueError(f"preferred_batch_size {size} exceeds max_batch_size {self.max_batch_size}")
        return self


class DeployConfig(_Strict):
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
    gpus: Annotated[str, Field(pattern=_GPUS)] = "all"
    """`all`, or GPU ids such as `0,1` (numbers or UUIDs). Docker only."""
    shm_size: Annotated[str, Field(pattern=r"^[1-9][0-9]*[mg]$")] = "2g"
    """Shared memory of the container: the python backend and NCCL live in it."""
    image: str | None = None
    """A container image to use instead of the release's."""

    @model_validator(mode="after")
    def _ports_differ(self) -> DeployConfig:
        chosen = [port for port in (self.http_port, self.grpc_port, self.metrics_port) if port]
        if len(set(chosen)) < len(chosen):
            raise ValueError("http_port, grpc_port and metrics_port must differ")
        return self

    @property
    def gpu_ids(self) -> list[str] | None:
        """The GPUs by id; None for all of them."""
        return None if self.gpus == "all" else self.gpus.split(",")


class ValidationConfig(_Strict):
    """What `trtkit validate` sends."""

    prompts: Annotated[list[str], Field(min_length=1)] = ["The", "def main(", "Return a new", "import os\n"]
    max_tokens: Annotated[int, Field(ge=1, le=100_000)] = 24
    """Tokens generated per prompt."""


class Scenario(_Strict):
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


class BuildConfig(_Strict):
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
    def _batch_sizes_fit(self) -> BuildConfig:
        if self.serving.runtime == "tensorrtllm" and self.serving.max_batch_size > self.engine.max_batch_size:
            raise ValueError(
                f"serving.max_batch_size ({self.serving.max_batch_size}) exceeds "
                f"engine.max_batch_size ({self.engine.max_batch_size})"
            )
        return self


def load_config(path: str | Path) -> BuildConfig:
    """Reads and checks a build config.

    A relative `model.source` that exists beside the config file becomes an absolute path, so a config works from any
    working directory.

    Raises:
        InputError: the file is missing, is not YAML, or breaks the schema: every problem with its line.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # a device may never end
            raise InputError(f"cannot read {path}: not a file", "`trtkit config ls` lists ready-made configs")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}", "`trtkit config ls` lists ready-made configs") from error
    return parse_config(text, str(path), base=path.parent)


def parse_config(text: str, name: str = "<config>", base: Path | None = None) -> BuildConfig:
    """Like `load_config`, for text. `name` stands in for the file in errors; `base` resolves a relative source."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise InputError(f"{name}{line}: not valid YAML: {problem}", "mend the syntax") from error
    except RecursionError:
        raise InputError(f"{name}: nested too deeply", "a build config has four levels; mend the brackets") from None
    if not isinstance(data, dict) or root is None:
        raise InputError(f"{name}: a build config is a mapping of keys", "start from one that `trtkit config ls` lists")
    duplicate = _duplicate_key(root)
    if duplicate is not None:
        raise InputError(f"{name}:{duplicate[1]}: key '{duplicate[0]}' is given twice", "keep one of them")
    try:
        config = BuildConfig.model_validate(data)
    except ValidationError as error:
        problems = [_describe(problem, root, name) for problem in error.errors()]
        raise InputError("\n".join(problems), "`trtkit config schema` shows every key, its type and range") from None
    return _with_absolute_source(config, base)


def ready_made_configs() -> dict[str, Path]:
    """The build configs that come with trtkit, by name.

    Raises:
        LacksError: the installation is incomplete.
    """
    files = sorted(_config_folder().glob("*.yaml"), key=lambda file: file.stem)
    if not files:
        raise LacksError(f"no build configs in {_config_folder()}", "install trtkit again: the package is incomplete")
    return {file.stem: file for file in files}


def config_schema() -> dict[str, Any]:
    """The JSON Schema of a build config, for editors and `trtkit config schema`."""
    return BuildConfig.model_json_schema()


def is_hub_id(source: str) -> bool:
    """Whether a source that is not a local folder has the form of a hub id (`name` or `owner/name`)."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", source) is not None


def _config_folder(package: Path = Path(__file__).parent) -> Path:
    """Inside the package when it is installed, beside it in a working copy."""
    installed = package / "_data" / "build_configs"
    return installed if installed.is_dir() else package.parent / "build_configs"


def _with_absolute_source(config: BuildConfig, base: Path | None) -> BuildConfig:
    source = Path(config.model.source).expanduser()
    local = source if source.is_absolute() else (base or Path()) / source
    if not local.exists():
        return config
    model = config.model.model_copy(update={"source": str(local.resolve())})
    return config.model_copy(update={"model": model})


def _duplicate_key(root: yaml.Node) -> tuple[str, int] | None:
    """A key that a mapping holds twice (YAML silently keeps the last one), with its line."""
    waiting: list[yaml.Node] = [root]
    visited: set[int] = set()
    while waiting:
        node = waiting.pop()
        if id(node) in visited:  # an alias may name its own parent, and a few of them one node billions of times
            continue
        visited.add(id(node))
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, _ in node.value:
                if key.value in seen:
                    return _printable(str(key.value)), key.start_mark.line + 1
                seen.add(key.value)
            waiting += [value for _, value in reversed(node.value)]
        elif isinstance(node, yaml.SequenceNode):
            waiting += reversed(node.value)
    return None


def _describe(problem: Any, root: yaml.Node, name: str) -> str:
    """One line for one schema violation: place, key, what is wrong, what is valid."""
    location = [part for part in problem["loc"] if part != "[key]"]
    line = _line_of(root, location)
    key = ".".join(_printable(str(part)) for part in location)
    prefix = f"{name}:{line}: "
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(location[-1]), _valid_keys(location[:-1]), n=1, cutoff=0.5)
        hint = f", did you mean '{near[0]}'?" if near else f"; valid here: {', '.join(_valid_keys(location[:-1]))}"
        return f"{prefix}unknown key '{key}'{hint}"
    if problem["type"] == "missing":
        return f"{prefix}required key '{key}' is missing"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    given = problem.get("input")
    shown = "" if isinstance(given, (dict, list)) or given is None else f" (given: {given!r})"
    if shown and problem["type"] == "string_type":
        shown += "; put it in quotes"  # YAML reads 25.10 as a number and 2024-01-01 as a date
    if problem["type"] == "value_error":  # a message of our own, which begins with the key that it is about
        line = _line_of(root, [*location, *message.split(" ", 1)[0].split(".")])
    return f"{name}:{line}: {key + ': ' if key else ''}{message}{shown}{_range_of(location)}"


def _line_of(root: yaml.Node, location: list[Any]) -> int:
    """Line of the deepest node of `location` that the document has, counted from 1."""
    node, line = root, root.start_mark.line
    for part in location:
        found = None
        if isinstance(node, yaml.MappingNode):
            found = next((pair for pair in node.value if pair[0].value == str(part)), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            found = (node.value[part], node.value[part])
        if found is None:
            break
        line, node = found[0].start_mark.line, found[1]
    return line + 1


def _printable(key: str) -> str:
    """A key as an error shows it: line breaks and terminal controls escaped."""
    return key if key.isprintable() else repr(key)[1:-1]


_schema = functools.cache(config_schema)


def _schema_at(location: list[Any]) -> dict[str, Any]:
    """The part of the JSON Schema that describes `location`; empty where there is none."""
    schema = _schema()
    definitions = schema.get("$defs", {})

    def resolve(node: dict[str, Any]) -> dict[str, Any]:
        while "$ref" in node:
            node = definitions[node["$ref"].rsplit("/", 1)[-1]]
        return node

    node = resolve(schema)
    for part in location:
        if isinstance(part, int):
            node = resolve(node.get("items", {}))
        elif part in node.get("properties", {}):
            node = resolve(node["properties"][part])
        elif "patternProperties" in node:  # a mapping whose keys are free names
            node = resolve(next(iter(node["patternProperties"].values())))
        else:
            return {}
    return node


def _valid_keys(location: list[Any]) -> list[str]:
    return list(_schema_at(location).get("properties", {}))


def _range_of(location: list[Any]) -> str:
    """The permitted range of a number, as text such as `; valid: 1 to 64`."""
    node = _schema_at(location)
    branches = [node, *node.get("anyOf", [])]
    low = next((f"{b['minimum']}" for b in branches if "minimum" in b), None) or next(
        (f"more than {b['exclusiveMinimum']}" for b in branches if "exclusiveMinimum" in b), None
    )
    high = next((f"{b['maximum']}" for b in branches if "maximum" in b), None) or next(
        (f"less than {b['exclusiveMaximum']}" for b in branches if "exclusiveMaximum" in b), None
    )
    if low and high:
        return f"; valid: {low} to {high}"
    if low:
        return f"; valid: {low} or more"
    return ""
