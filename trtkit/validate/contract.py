"""Does the server have the models that clients count on, with the tensors they count on?

What is looked at is the part of the contract (`trtkit.contract`) that a text client and the ensemble's own wiring use,
and the whole of that of the model `llm` (`trtkit.serving_contract`). A server may have more inputs, as long as it does
not require them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from trtkit import serving_contract
from trtkit.client.api import LLM as LLM_MODEL
from trtkit.client.api import LLMClient
from trtkit.contract import (
    ENSEMBLE_INPUTS,
    ENSEMBLE_OUTPUTS,
    POSTPROCESSING_INPUTS,
    POSTPROCESSING_OUTPUTS,
    PREPROCESSING_INPUTS,
    PREPROCESSING_OUTPUTS,
    Tensor,
    llm_inputs,
    llm_outputs,
)
from trtkit.findings import Finding, Severity
from trtkit.validate.results import CheckResult, Subject, plural, result

NAME = "contract"
GENERATE_AGAIN = "generate the model repository again with `trtkit repo generate` and restart the server"


class _Contract(NamedTuple):
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


def _part(inputs: Sequence[Tensor], outputs: Sequence[Tensor], names: str) -> _Contract:
    wanted = names.split()
    return _Contract(
        tuple(tensor for tensor in inputs if tensor.name in wanted),
        tuple(tensor for tensor in outputs if tensor.name in wanted),
    )


TEXT = _part(
    ENSEMBLE_INPUTS,
    ENSEMBLE_OUTPUTS,
    """text_input max_tokens bad_words stop_words exclude_input_in_output end_id pad_id top_k top_p temperature
    repetition_penalty presence_penalty frequency_penalty min_tokens seed stream text_output""",
)
ENGINE = _part(
    llm_inputs(),
    llm_outputs(),
    """input_ids input_lengths request_output_len end_id pad_id stop_words_list bad_words_list temperature runtime_top_k
    runtime_top_p seed streaming exclude_input_in_output output_ids sequence_length""",
)
LLM = _Contract(serving_contract.INPUTS, serving_contract.OUTPUTS)
EITHER = {"input_ids"}
"""Inputs that may be required or optional: a backend that also serves encoders has prompts without tokens."""
STEPS = {
    "preprocessing": _part(
        PREPROCESSING_INPUTS,
        PREPROCESSING_OUTPUTS,
        "QUERY REQUEST_OUTPUT_LEN STOP_WORDS_DICT BAD_WORDS_DICT INPUT_ID REQUEST_INPUT_LEN",
    ),
    "postprocessing": _part(POSTPROCESSING_INPUTS, POSTPROCESSING_OUTPUTS, "TOKENS_BATCH SEQUENCE_LENGTH OUTPUT"),
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
    main = [name for name in (subject.engine, LLM_MODEL if LLM_MODEL in states else None) if name]
    for name in dict.fromkeys([*steps, *main]):
        configs[name] = await _config(subject, client, name, states, findings)
    tensors = 0
    for config in configs.values():
        if config is not None and (contract := _contract_of(config, subject)):
            findings += _compare(config, contract)
            tensors += len(contract.inputs) + len(contract.outputs)
    for name in dict.fromkeys([subject.model, *main]):
        if (config := configs[name]) is not None:
            findings += _settings(config, subject)
    served = [name for name, config in configs.items() if config is not None]
    detail = f"{plural(len(served), 'model')} ready ({', '.join(served)}), {plural(tensors, 'tensor')} compared"
    return result(NAME, detail, findings, models=states, tensors=tensors)


def takes_messages(config: dict[str, Any]) -> bool:
    """Whether a model is one like `llm`, by its config."""
    return config["name"] == LLM_MODEL or any(tensor["name"] == "messages" for tensor in config.get("input", []))


async def chat_model(subject: Subject, client: LLMClient) -> str | None:
    """The model like `llm`: the one that is checked, or the one beside an ensemble; None where the server has none."""
    states = await client.models(timeout_s=subject.lookup_s)
    if subject.model in states and takes_messages(await client.model_config(subject.model, timeout_s=subject.lookup_s)):
        return subject.model
    return LLM_MODEL if LLM_MODEL in states else None


async def text_models(subject: Subject, client: LLMClient) -> list[str]:
    """The models that take text: the one that is checked, and the model like `llm` beside it."""
    chat = await chat_model(subject, client)
    return [subject.model] if chat in (None, subject.model) else [subject.model, chat]


def _contract_of(config: dict[str, Any], subject: Subject) -> _Contract | None:
    if takes_messages(config):
        return LLM
    if config["name"] == subject.model:
        return TEXT
    return ENGINE if config["name"] == subject.engine else STEPS.get(config["name"])


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


def _compare_tensor(place: str, kind: str, expected: Tensor, served: dict[str, Any] | None) -> Iterator[Finding]:
    if served is None:
        yield Finding("TK704", "error", place, f"the {kind} is missing", GENERATE_AGAIN)
        return
    dtype, dims = served["data_type"].removeprefix("TYPE_"), tuple(served.get("dims", ()))
    if dtype != expected.dtype:
        yield Finding("TK704", "error", place, f"the {kind} is {dtype}, not {expected.dtype}", GENERATE_AGAIN)
    if dims != expected.dims:
        cause = f"the {kind} has dims {list(dims)}, not {list(expected.dims)}"
        yield Finding("TK704", "error", place, cause, GENERATE_AGAIN)
    if kind == "output" or expected.name in EITHER:
        return
    need, wanted = ("optional" if optional else "required" for optional in (served.get("optional"), expected.optional))
    if need != wanted:
        cause = f"the input is {need}, not {wanted}"
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
