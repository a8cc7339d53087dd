"""Does the server have the models that clients count on, with the tensors they count on?

The tables are the part of NVIDIA's `inflight_batcher_llm` contract (triton-inference-server/tensorrtllm_backend,
`all_models/inflight_batcher_llm/*/config.pbtxt`) that a text client and the ensemble's own wiring use. A server may
have more inputs, as long as it does not require them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from trtkit.client.api import LLMClient
from trtkit.findings import Finding, Severity
from trtkit.validate.results import CheckResult, Subject, plural, result

NAME = "contract"
GENERATE_AGAIN = "generate the model repository again with `trtkit repo generate` and restart the server"


class _Tensor(NamedTuple):
    name: str
    dtype: str
    dims: tuple[int, ...] = (1,)
    need: str = "optional"
    """`required`: every request must have it. `optional`: a request may leave it out. `either`: both are fine."""


class _Contract(NamedTuple):
    inputs: tuple[_Tensor, ...]
    outputs: tuple[_Tensor, ...]


TEXT = _Contract(
    (
        _Tensor("text_input", "STRING", (1,), "required"),
        _Tensor("max_tokens", "INT32", (1,), "required"),
        _Tensor("bad_words", "STRING", (-1,)),
        _Tensor("stop_words", "STRING", (-1,)),
        _Tensor("exclude_input_in_output", "BOOL"),
        _Tensor("end_id", "INT32"),
        _Tensor("pad_id", "INT32"),
        _Tensor("top_k", "INT32"),
        _Tensor("top_p", "FP32"),
        _Tensor("temperature", "FP32"),
        _Tensor("repetition_penalty", "FP32"),
        _Tensor("presence_penalty", "FP32"),
        _Tensor("frequency_penalty", "FP32"),
        _Tensor("min_tokens", "INT32"),
        _Tensor("seed", "UINT64"),
        _Tensor("stream", "BOOL"),
    ),
    (_Tensor("text_output", "STRING", (-1,)),),
)
ENGINE = _Contract(
    (
        _Tensor("input_ids", "INT32", (-1,), "either"),  # optional where the backend also serves encoders
        _Tensor("input_lengths", "INT32", (1,), "required"),
        _Tensor("request_output_len", "INT32", (1,), "required"),
        _Tensor("end_id", "INT32"),
        _Tensor("pad_id", "INT32"),
        _Tensor("stop_words_list", "INT32", (2, -1)),
        _Tensor("bad_words_list", "INT32", (2, -1)),
        _Tensor("temperature", "FP32"),
        _Tensor("runtime_top_k", "INT32"),
        _Tensor("runtime_top_p", "FP32"),
        _Tensor("seed", "UINT64"),
        _Tensor("streaming", "BOOL"),
        _Tensor("exclude_input_in_output", "BOOL"),
    ),
    (_Tensor("output_ids", "INT32", (-1, -1)), _Tensor("sequence_length", "INT32", (-1,))),
)
STEPS = {
    "preprocessing": _Contract(
        (
            _Tensor("QUERY", "STRING", (1,), "required"),
            _Tensor("REQUEST_OUTPUT_LEN", "INT32", (1,), "required"),
            _Tensor("STOP_WORDS_DICT", "STRING", (-1,)),
            _Tensor("BAD_WORDS_DICT", "STRING", (-1,)),
        ),
        (_Tensor("INPUT_ID", "INT32", (-1,)), _Tensor("REQUEST_INPUT_LEN", "INT32", (1,))),
    ),
    "postprocessing": _Contract(
        (
            _Tensor("TOKENS_BATCH", "INT32", (-1, -1), "required"),
            _Tensor("SEQUENCE_LENGTH", "INT32", (-1,), "required"),
        ),
        (_Tensor("OUTPUT", "STRING", (-1,)),),
    ),
}
"""Models whose tensors are looked at where the ensemble uses them under these names."""


async def check(subject: Subject, clients: Sequence[LLMClient]) -> CheckResult:
    """Compares what the server says about itself with the contract. Sends no inference request."""
    findings: list[Finding] = []
    for client in clients:
        if not await client.is_ready(timeout_s=subject.lookup_s):
            log = "look at the server's log"
            findings.append(Finding("TK701", "error", client.url, "the server is not ready", log))
    client = clients[0]
    states = await client.models(timeout_s=subject.lookup_s)
    text = await _config(subject, client, subject.model, states, findings)
    steps = [step["model_name"] for step in (text or {}).get("ensemble_scheduling", {}).get("step", [])]
    configs = {subject.model: text}
    for name in dict.fromkeys([*steps, subject.engine]):
        configs[name] = await _config(subject, client, name, states, findings)
    tensors = 0
    contracts = {subject.model: TEXT, subject.engine: ENGINE} | STEPS
    for name, config in configs.items():
        if config is not None and name in contracts:
            findings += _compare(config, contracts[name])
            tensors += len(contracts[name].inputs) + len(contracts[name].outputs)
    for name in (subject.model, subject.engine):
        if (config := configs[name]) is not None:
            findings += _settings(config, subject)
    served = [name for name, config in configs.items() if config is not None]
    detail = f"{plural(len(served), 'model')} ready ({', '.join(served)}), {plural(tensors, 'tensor')} compared"
    return result(NAME, detail, findings, models=states, tensors=tensors)


async def _config(
    subject: Subject, client: LLMClient, name: str, states: dict[str, str], findings: list[Finding]
) -> dict[str, Any] | None:
    """The config of a model, or None and a finding."""
    if name not in states:
        known = ", ".join(sorted(states)) or "none"
        cause = f"the server has no such model; it has: {known}"
        fix = "give the name with --model or --engine, or serve the right repository"
        findings.append(Finding("TK702", "error", name, cause, fix))
    elif not await client.is_ready(name, timeout_s=subject.lookup_s):
        cause = f"the model is not ready (state {states[name] or 'unknown'})"
        findings.append(Finding("TK702", "error", name, cause, "look for its name in the server's log"))
    else:
        return await client.model_config(name, timeout_s=subject.lookup_s)
    return None


def _compare(config: dict[str, Any], contract: _Contract) -> Iterator[Finding]:
    name = config["name"]
    if not config.get("max_batch_size", 0):
        cause = "max_batch_size is 0, so tensors have no batch dimension and clients of the contract fail"
        yield Finding("TK703", "error", name, cause, GENERATE_AGAIN)
    for kind, expected in (("input", contract.inputs), ("output", contract.outputs)):
        served = {tensor["name"]: tensor for tensor in config.get(kind, [])}
        for tensor in expected:
            yield from _compare_tensor(f"{name}/{tensor.name}", kind, tensor, served.get(tensor.name))
        if kind == "input":
            known = {tensor.name for tensor in expected}
            for extra, tensor in served.items():
                if extra not in known and not tensor.get("optional", False):
                    cause = "a required input that clients of the contract do not send"
                    yield Finding("TK705", "error", f"{name}/{extra}", cause, "make it optional")


def _compare_tensor(place: str, kind: str, expected: _Tensor, served: dict[str, Any] | None) -> Iterator[Finding]:
    if served is None:
        yield Finding("TK704", "error", place, f"the {kind} is missing", GENERATE_AGAIN)
        return
    dtype, dims = served["data_type"].removeprefix("TYPE_"), tuple(served.get("dims", ()))
    if dtype != expected.dtype:
        yield Finding("TK704", "error", place, f"the {kind} is {dtype}, not {expected.dtype}", GENERATE_AGAIN)
    if dims != expected.dims:
        cause = f"the {kind} has dims {list(dims)}, not {list(expected.dims)}"
        yield Finding("TK704", "error", place, cause, GENERATE_AGAIN)
    if kind == "output" or expected.need == "either":
        return
    need = "optional" if served.get("optional", False) else "required"
    if need != expected.need:
        cause = f"the input is {need}, not {expected.need}"
        # A missing required input is then no longer the server's to notice, but requests still work.
        severity: Severity = "error" if need == "required" else "warning"
        yield Finding("TK705", severity, place, cause, GENERATE_AGAIN)


def _settings(config: dict[str, Any], subject: Subject) -> Iterator[Finding]:
    """What the build config decides: streaming and batch size."""
    decoupled = bool(config.get("model_transaction_policy", {}).get("decoupled", False))
    if subject.streaming is not None and decoupled != subject.streaming:
        is_, should = ("is", "false") if decoupled else ("is not", "true")
        cause = f"the model {is_} decoupled, but serving.streaming is {should}"
        yield Finding("TK706", "error", config["name"], cause, GENERATE_AGAIN)
    served = config.get("max_batch_size", 0)
    if subject.max_batch_size is not None and served and served != subject.max_batch_size:
        cause = f"max_batch_size is {served}, but serving.max_batch_size is {subject.max_batch_size}"
        yield Finding("TK707", "warning", config["name"], cause, GENERATE_AGAIN)
