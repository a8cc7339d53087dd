"""Is a request that makes no sense answered with an error, soon, and does the server live on?"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from trtkit.client.api import LLMClient, RequestTimeoutError, ServerError
from trtkit.client.tensors import Tensor, scalar
from trtkit.errors import TrtkitError
from trtkit.findings import Finding
from trtkit.validate.contract import takes_messages
from trtkit.validate.results import CheckResult, Subject, plural, result, short

NAME = "bad_requests"

UNKNOWN_MODEL = "no-such-model"


class _Case(NamedTuple):
    name: str
    send: Callable[[LLMClient], Awaitable[Any]]


def cases(subject: Subject, *, takes_messages: bool = False) -> list[_Case]:
    """The bad requests. Each goes to the text model and should be refused.

    Args:
        takes_messages: the model is one like `llm`.
    """
    prompt = subject.prompts[0]
    good = subject.request(prompt)

    def text(**changes: Any) -> Callable[[LLMClient], Awaitable[Any]]:
        request = replace(good, **changes)
        return lambda client: client.generate(request, timeout_s=subject.timeout_s)

    def raw(model: str, *inputs: Tensor) -> Callable[[LLMClient], Awaitable[Any]]:
        return lambda client: client.infer(model, inputs, timeout_s=subject.timeout_s)

    text_input, max_tokens = scalar("text_input", "BYTES", prompt), scalar("max_tokens", "INT32", 2)
    found = [
        _Case("empty prompt", text(prompt="")),
        _Case("max_tokens 0", text(max_tokens=0)),
        _Case("max_tokens -1", text(max_tokens=-1)),
        _Case("top_p 5", text(top_p=5.0)),
        _Case("a number as prompt", raw(subject.model, scalar("text_input", "INT32", 7), max_tokens)),
        _Case("unknown model", raw(UNKNOWN_MODEL, text_input, max_tokens)),
    ]
    if takes_messages:
        found += _chat_cases(text, lambda *inputs: raw(subject.model, max_tokens, *inputs), text_input)
    else:
        found.append(_Case("no max_tokens", raw(subject.model, text_input)))
    longest = subject.max_input_len or subject.max_seq_len
    if longest:
        # Every word is at least one token, so this is too long for any tokenizer.
        found.append(_Case(f"prompt of more than {longest} tokens", text(prompt=" a1" * (longest + 8))))
    return found


def _chat_cases(
    text: Callable[..., Callable[[LLMClient], Awaitable[Any]]],
    raw: Callable[..., Callable[[LLMClient], Awaitable[Any]]],
    text_input: Tensor,
) -> list[_Case]:
    """Those for a model like `llm`."""
    message = {"role": "user", "content": "Hello"}
    return [
        _Case("neither prompt nor messages", raw()),
        _Case("prompt and messages", text(messages=[message])),
        _Case("messages that are no JSON", raw(scalar("messages", "BYTES", "[{"))),
        _Case("messages without a message", raw(scalar("messages", "BYTES", "[]"))),
        _Case("a message without a role", text(prompt="", messages=[{"content": "Hello"}])),
        _Case("a message without content", text(prompt="", messages=[{"role": "user"}])),
        _Case("template arguments for a prompt", raw(text_input, scalar("chat_template_kwargs", "BYTES", "{}"))),
        _Case("temperature -1", text(temperature=-1.0)),
        _Case("end_id -2", text(end_id=-2)),
        _Case("0 sequences", raw(text_input, scalar("num_return_sequences", "INT32", 0))),
    ]


async def check(subject: Subject, clients: Sequence[LLMClient]) -> CheckResult:
    """Sends every bad request over every client, and a good one after each."""
    config = await clients[0].model_config(subject.model, timeout_s=subject.lookup_s)
    bad = cases(subject, takes_messages=takes_messages(config))
    findings: list[Finding] = []
    slowest_s, count, refused = 0.0, 0, 0
    for client in clients:
        for case in bad:
            count += 1
            begin = time.perf_counter()
            finding = await _judge(case, client, subject)
            slowest_s = max(slowest_s, time.perf_counter() - begin)
            if finding is None:
                refused += 1
            else:
                findings.append(finding)
            if dead := await _dead(case, client, subject):
                findings.append(dead)
                break
    detail = f"{refused} of {plural(count, 'bad request')} refused, the slowest in {slowest_s:.2f} s"
    return result(NAME, detail, findings, sent=count, refused=refused, slowest_s=slowest_s)


async def _judge(case: _Case, client: LLMClient, subject: Subject) -> Finding | None:
    """A finding unless the request is refused."""
    place = f"{client.protocol} {case.name}"
    check_inputs = "let the server check its inputs, else clients get nonsense without a word"
    try:
        answer = await case.send(client)
    except ServerError as error:
        if error.message.strip():
            return None
        return Finding("TK742", "warning", place, "the error has no message", "give the error a reason")
    except RequestTimeoutError:
        cause = f"no answer within {subject.timeout_s:g} s"
        return Finding("TK743", "error", place, cause, check_inputs)
    except TrtkitError as error:
        return Finding("TK744", "error", place, error.cause, "look at the server's log")
    text = short(answer.text) if hasattr(answer, "text") else "an answer"
    return Finding("TK741", "error", place, f"accepted, and answered with {text}", check_inputs)


async def _dead(case: _Case, client: LLMClient, subject: Subject) -> Finding | None:
    """A finding if the server no longer answers a good request."""
    try:
        await client.generate(subject.request(subject.prompts[0], 2), timeout_s=subject.timeout_s)
    except TrtkitError as error:
        cause = f"after this request the server fails a good one: {error.cause}"
        return Finding("TK745", "error", f"{client.protocol} {case.name}", cause, "look at the server's log")
    return None
