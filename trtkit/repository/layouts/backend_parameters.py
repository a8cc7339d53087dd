"""Every parameter of NVIDIA's C++ backend `tensorrtllm`, with its type, default, range and releases, as one table.

The backend takes all of them as text and, with few exceptions, goes on with its default when it cannot read one, saying
so in the log only; so they are checked here.

Sources: triton-inference-server/tensorrtllm_backend, tags v0.9.0 to v0.19.0, and NVIDIA/TensorRT-LLM, triton_backend/:
all_models/inflight_batcher_llm/tensorrt_llm/config.pbtxt (which release knows which), docs/model_config.md (meaning),
inflight_batcher_llm/src/model_state.cc and model_instance_state.cc (how each is read).
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from typing import Literal

from trtkit import releases
from trtkit.contract_tensors import in_range
from trtkit.errors import InputError

Kind = Literal["bool", "int", "float", "text", "choice", "ints", "groups", "tree"]
Value = bool | int | float | str

_FORMS: dict[Kind, tuple[str, str]] = {
    "ints": (r"\d+(,\d+)*", "whole numbers with commas, such as 0,1"),
    "groups": (r"\d+(,\d+)*(;\d+(,\d+)*)*", "whole numbers with commas, and semicolons between instances: 0,1;2,3"),
    "tree": (r"\{\d+(, ?\d+)*\}(, ?\{\d+(, ?\d+)*\})*", "paths in braces, such as {0}, {0, 0}, {1}"),
}


@dataclass(frozen=True)
class Parameter:
    """One parameter.

    Attributes:
        default: what the backend takes when it is absent, as text; empty is none.
        low, high: inclusive bounds of a number; `open_` leaves both bounds out.
        since, until: the first TensorRT-LLM version that knows it, and the first that does no more.
        key: the key of the build config that sets it; empty where only `serving.backend_parameters` does.
        always: from this version on the backend does not load without it, even if it is empty.
    """

    name: str
    kind: Kind
    default: str = ""
    low: float = -math.inf
    high: float = math.inf
    open_: bool = False
    choices: tuple[str, ...] = ()
    since: str = ""
    until: str = ""
    key: str = ""
    always: str = ""


_KV = "serving.kv_cache."
_SPEC = "serving.speculative."
_LORA = "serving.lora."
_MODES = ("top_k", "top_p", "top_k_top_p", "beam_search", "medusa", "redrafter", "lookahead", "eagle")
DECODING_MODES_SINCE = {"medusa": "0.10", "redrafter": "0.16", "lookahead": "0.16", "eagle": "0.16"}

_ALL = (
    # engine and batching
    Parameter(
        "gpt_model_type", "choice", choices=("inflight_fused_batching", "inflight_batching", "V1", "v1"), key="-"
    ),
    Parameter("gpt_model_path", "text", key="--engine"),
    Parameter("encoder_model_path", "text", since="0.11"),
    Parameter("max_beam_width", "int", "1", 1, 1024, key="engine.max_beam_width"),
    Parameter(
        "batch_scheduler_policy", "choice", "guaranteed_no_evict", choices=("guaranteed_no_evict", "max_utilization")
    ),
    Parameter(
        "executor_worker_path", "text", "/opt/tritonserver/backends/tensorrtllm/trtllmExecutorWorker", since="0.10"
    ),
    Parameter("worker_path", "text", until="0.10"),
    Parameter("FORCE_CPU_ONLY_INPUT_TENSORS", "choice", "no", choices=("yes", "no"), key="-"),
    Parameter("gpu_device_ids", "groups", key="serving.gpu_device_ids"),
    Parameter("participant_ids", "groups", since="0.13"),
    Parameter("num_nodes", "int", "1", 1, 4096, since="0.19"),
    Parameter("gpu_weights_percent", "float", "1.0", 0, 1, since="0.10"),
    # attention and KV cache
    Parameter(
        "kv_cache_free_gpu_mem_fraction", "float", "0.9", 0, 1, open_=True, key="serving.kv_cache_free_gpu_mem_fraction"
    ),
    Parameter("max_tokens_in_paged_kv_cache", "int", "", 1, key=_KV + "max_tokens"),
    Parameter("cross_kv_cache_fraction", "float", "0.5", 0, 1, open_=True, since="0.14", key=_KV + "cross_fraction"),
    Parameter("kv_cache_host_memory_bytes", "int", "0", 0, since="0.10", key=_KV + "host_memory_bytes"),
    Parameter("kv_cache_onboard_blocks", "bool", "true", since="0.10"),
    Parameter("enable_kv_cache_reuse", "bool", "true", key="serving.enable_kv_cache_reuse"),
    Parameter("enable_chunked_context", "bool", "false", key="serving.enable_chunked_context"),
    Parameter("max_attention_window_size", "ints", "", key=_KV + "max_attention_window"),
    Parameter("sink_token_length", "int", "", 0, since="0.10", key=_KV + "sink_token_length"),
    # answers
    Parameter("exclude_input_in_output", "bool", "false", key="-"),
    Parameter("normalize_log_probs", "bool", "true"),
    Parameter("cancellation_check_period_ms", "int", "100", 1, 3_600_000, since="0.10"),
    # statistics and polling
    Parameter("stats_check_period_ms", "int", "100", 1, 3_600_000, since="0.10"),
    Parameter("recv_poll_period_ms", "int", "0", 0, 3_600_000, since="0.13"),
    Parameter("iter_stats_max_iterations", "int", "1000", 0, since="0.10"),
    Parameter("request_stats_max_iterations", "int", "0", 0, since="0.10"),
    # LoRA
    Parameter("lora_cache_optimal_adapter_size", "int", "8", 1, key=_LORA + "optimal_rank"),
    Parameter("lora_cache_max_adapter_size", "int", "64", 1, key=_LORA + "max_rank"),
    Parameter("lora_cache_gpu_memory_fraction", "float", "0.05", 0, 1, open_=True, key=_LORA + "gpu_memory_fraction"),
    Parameter("lora_cache_host_memory_bytes", "int", "1073741824", 0, key=_LORA + "host_memory_bytes"),
    Parameter("lora_prefetch_dir", "text", since="0.19", key=_LORA + "prefetch_dir"),
    # decoding
    Parameter("decoding_mode", "choice", choices=_MODES, key="serving.decoding_mode"),
    Parameter("medusa_choices", "tree", key=_SPEC + "medusa_choices"),
    Parameter("eagle_choices", "tree", since="0.16", key=_SPEC + "eagle_choices"),
    Parameter("lookahead_window_size", "int", "", 1, since="0.19", key=_SPEC + "lookahead"),
    Parameter("lookahead_ngram_size", "int", "", 1, since="0.19", key=_SPEC + "lookahead"),
    Parameter("lookahead_verification_set_size", "int", "", 1, since="0.19", key=_SPEC + "lookahead"),
    Parameter("speculative_decoding_fast_logits", "bool", "false", since="0.15", key=_SPEC + "fast_logits"),
    Parameter(
        "guided_decoding_backend",
        "choice",
        choices=("", "xgrammar"),
        since="0.19",
        always="0.19",
        key="serving.guided_decoding_backend",
    ),
    Parameter("tokenizer_dir", "text", since="0.19", always="0.19", key="-"),
    Parameter("xgrammar_tokenizer_info_path", "text", since="0.19", always="0.19", key="-"),
    # kernels
    Parameter("multi_block_mode", "bool", "true", since="0.12"),
    Parameter("enable_context_fmha_fp32_acc", "bool", "false", since="0.12"),
    Parameter("cuda_graph_mode", "bool", "false", since="0.15"),
    Parameter("cuda_graph_cache_size", "int", "0", 0, since="0.15"),
    Parameter("enable_trt_overlap", "bool", "false", since="1.2"),  # read before 0.16 too, without effect
)
PARAMETERS: dict[str, Parameter] = {parameter.name: parameter for parameter in _ALL}


def problem(name: str, text: str) -> str | None:
    """What is wrong with the text of a parameter in config.pbtxt; None when the backend reads it as meant.

    Unknown names are no problem of a value: the backend never looks at them.
    """
    parameter = PARAMETERS.get(name)
    if parameter is None or not text:
        return None
    if parameter.kind == "bool":
        valid = {"true", "True", "TRUE", "1", "false", "False", "FALSE", "0"}
        return None if text in valid else "must be true or false"
    if parameter.kind == "choice":
        return None if text in parameter.choices else f"must be one of {', '.join(filter(None, parameter.choices))}"
    if parameter.kind in ("int", "float"):
        return _number_problem(parameter, text)
    if parameter.kind in _FORMS:
        pattern, form = _FORMS[parameter.kind]
        return None if re.fullmatch(pattern, text.strip()) else f"must be {form}"
    return None


def written(value: Value) -> str:
    """A value as config.pbtxt spells it."""
    return ("true" if value else "false") if isinstance(value, bool) else str(value)


def gated(values: dict[str, Value | None], version: str) -> dict[str, str]:
    """Parameters for one TensorRT-LLM version: those that are None are left out, and those without which the backend
    would not load are added empty.

    Raises:
        InputError: a value is invalid, or is meant for another version.
    """
    given = {name: written(value) for name, value in values.items() if value is not None}
    for name, text in given.items():
        parameter = PARAMETERS[name]
        place = parameter.key if parameter.key not in ("", "-") else f"serving.backend_parameters.{name}"
        if wrong := problem(name, text):
            raise InputError(f"{place} is '{text}'", wrong)
        if not in_range(version, parameter.since, parameter.until):
            raise unknown_to(version, f"{place} (parameter {name})", parameter.since, parameter.until)
        since = DECODING_MODES_SINCE.get(text, "") if name == "decoding_mode" else ""
        if not in_range(version, since, ""):
            raise unknown_to(version, f"{place} '{text}'", since, "")
    empty = {name: "" for name, one in PARAMETERS.items() if one.always and in_range(version, one.always, one.until)}
    return {**empty, **given}


def unknown_to(version: str, what: str, since: str, until: str) -> InputError:
    """The error for something that a release does not have, with the releases that do."""
    tags = [one.tag for one in releases.load() if in_range(one.tensorrt_llm, since, until)]
    span = " and ".join(
        words for words in (f"came with {since}" if since else "", f"went with {until}" if until else "") if words
    )
    use = f"use a release from {min(tags)} to {max(tags)}, " if tags else ""
    return InputError(f"{what} is unknown to TensorRT-LLM {version}: it {span}", f"{use}or leave it out")


def checked(given: dict[str, Value]) -> dict[str, Value]:
    """`serving.backend_parameters`, whose names must be in the table and not be another key's.

    Raises:
        InputError: a name is unknown, belongs to a key of its own, or has a value of another type.
    """
    for name, value in given.items():
        place = f"serving.backend_parameters.{name}"
        parameter = PARAMETERS.get(name)
        if parameter is None:
            near = difflib.get_close_matches(name, PARAMETERS, n=1)
            fix = f"did you mean '{near[0]}'?" if near else "see NVIDIA's docs/model_config.md for their names"
            raise InputError(f"{place} is no parameter of the tensorrtllm backend", fix)
        if parameter.key == "-":
            raise InputError(f"{place} is set by trtkit itself", "remove it")
        if parameter.key:
            raise InputError(f"{place} has a key of its own", f"set {parameter.key}")
        kinds: dict[str, tuple[type, ...]] = {"bool": (bool,), "int": (int,), "float": (int, float)}
        wanted = kinds.get(parameter.kind, (str, int))
        if not isinstance(value, wanted) or (isinstance(value, bool) and parameter.kind != "bool"):
            raise InputError(f"{place} is {value!r}", f"give a {parameter.kind}")
    return given


def _number_problem(parameter: Parameter, text: str) -> str | None:
    try:
        number = int(text) if parameter.kind == "int" else float(text)
    except ValueError:
        return "must be a whole number" if parameter.kind == "int" else "must be a number"
    inside = parameter.low < number < parameter.high if parameter.open_ else parameter.low <= number <= parameter.high
    if math.isnan(number) or not inside:
        low, high = f"{parameter.low:g}", f"{parameter.high:g}"
        if parameter.open_:
            return f"must be between {low} and {high}, both left out"
        return f"must be {low} or more" if math.isinf(parameter.high) else f"must be {low} to {high}"
    return None
