"""Does the engine stop working when its client goes away?

No counter of the server tells it (Triton counts a request as done when the model lets go of it, which may be long
before its last token), so it is seen from outside: as many long requests as run at once keep a short one waiting, and
once they are cancelled it must get through long before they would have ended.

Cancelling a request to an ensemble does not reach a step that is already running, so the engine model is asked
directly, and the model `llm`, which hands cancellation on to its engine, with a prompt in place of tokens.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import Any

from trtkit.client.api import LLMClient, RequestTimeoutError
from trtkit.findings import Finding
from trtkit.validate.contract import chat_model
from trtkit.validate.results import CheckResult, Subject, plural, result, skipped

NAME = "cancellation"

LONG = 1024
"""Tokens of a long request, as far as the model's length allows."""
UNKNOWN_LIMIT = 256
"""The same where that length is unknown."""
SHORTEST = 64
"""Fewer tokens left than this are over too soon to tell."""
MOST_REQUESTS = 256
"""A server that runs more at once is not filled up for this."""
WATCHED = 8
"""Tokens that the long requests make while the short one is watched waiting."""
PACE = 96
"""Tokens of the request that tells how fast the engine is when it has nothing else to do."""
IN_TIME = 0.5
"""Share of the time that the long requests still had, within which the short one must get through."""

PROMPT = (1, 2, 3)
PROMPT_ROOM = 64
"""Tokens that a prompt of text may have: its tokenizer is the server's."""


@dataclass(frozen=True)
class _Target:
    """A model to fill up.

    Attributes:
        prompt: what a model that takes text is asked; None for one that takes tokens.
        places: requests that it runs at once.
        length: tokens of a long request.
        weight: tokens that a piece of text stands for, more or less; pieces of tokens are counted exactly.
    """

    model: str
    places: int
    length: int
    prompt: str | None = None
    weight: float = 1.0

    async def counts(self, subject: Subject, client: LLMClient, tokens: int) -> AsyncGenerator[float, None]:
        """For each piece of a request that never ends early, how many tokens it holds."""
        if self.prompt is None:
            stream = client.stream_tokens(PROMPT, tokens, end_id=-1, model=self.model, timeout_s=subject.timeout_s)
            async with aclosing(stream) as pieces:
                async for piece in pieces:
                    yield len(piece)
            return
        request = replace(subject.request(self.prompt, tokens), end_id=-1)
        async with aclosing(client.stream(request, model=self.model, timeout_s=subject.timeout_s)) as chunks:
            sofar = 0.0
            async for chunk in chunks:
                made = self.weight * bool(chunk.text)
                if chunk.ending is not None and chunk.ending.completion_tokens is not None:
                    made = chunk.ending.completion_tokens - sofar  # corrects what was estimated
                sofar += made
                yield made


@dataclass
class _Request:
    """One running request and how far it is. `changed` is common to all requests: set whenever one of them moves."""

    changed: asyncio.Event
    count: float = 0.0
    pieces: int = 0
    ended: bool = False

    async def run(self, counts: AsyncGenerator[float, None]) -> None:
        try:
            async with aclosing(counts) as pieces:
                async for count in pieces:
                    self.count += count
                    self.pieces += 1
                    self.changed.set()
        finally:
            self.ended = True
            self.changed.set()


@dataclass(frozen=True)
class _Verdict:
    """What was seen over one protocol: seconds until the short request got through, and seconds the long ones had."""

    freed_s: float = 0.0
    left_s: float = 0.0
    unclear: str = ""

    @property
    def stopped(self) -> bool:
        return self.freed_s < IN_TIME * self.left_s


async def check(subject: Subject, clients: Sequence[LLMClient]) -> CheckResult:
    """Fills each model with long requests over each client, cancels them, and times a short one behind them."""
    targets, reasons = await _targets(subject, clients[0])
    findings, seen = [], {}
    for target in targets:
        for client in clients:
            verdict = await _observe(subject, client, target)
            if verdict.unclear:
                reasons.append(f"{target.model}: {verdict.unclear}")
                break
            seen[f"{client.protocol} {target.model}"] = {"freed_s": verdict.freed_s, "left_s": verdict.left_s}
            if not verdict.stopped:
                cause = (
                    f"{plural(target.places, 'request')} cancelled with {verdict.left_s:.2f} s to go kept their places "
                    f"for {verdict.freed_s:.2f} s"
                )
                fix = "poll is_cancelled() in the model; for the C++ backend see cancellation_check_period_ms"
                findings.append(Finding("TK731", "error", f"{client.protocol} {target.model}", cause, fix))
    if not seen:
        return skipped(NAME, "; ".join(reasons))
    told = ", ".join(f"{place} {1000 * times['freed_s']:.0f} ms" for place, times in seen.items())
    left, places = min(times["left_s"] for times in seen.values()), max(target.places for target in targets)
    detail = f"{plural(places, 'long request')} cancelled: the next one got through after {told} (else {left:.2f} s)"
    detail += "".join(f"; {reason}" for reason in reasons)
    return result(NAME, detail, findings, places=places, seconds=seen)


async def _targets(subject: Subject, client: LLMClient) -> tuple[list[_Target], list[str]]:
    """The models to fill up, and why others cannot be."""
    states = await client.models(timeout_s=subject.lookup_s)
    targets, reasons = [], []
    longest = subject.max_seq_len
    chat = await chat_model(subject, client)
    for model, prompt in ((subject.engine, None), (chat, subject.prompts[0])):
        if model is None:
            continue
        if model not in states:
            reasons.append(f"the server has no model '{model}'")
            continue
        config = await client.model_config(model, timeout_s=subject.lookup_s)
        places = _places(config, subject) if prompt is None else _slots(config)
        if not config.get("model_transaction_policy", {}).get("decoupled", False):
            reasons.append(f"model '{model}' is not decoupled, so no answer can be cancelled halfway")
        elif places > MOST_REQUESTS:
            reasons.append(f"model '{model}' runs {places} requests at once, too many to fill it up")
        else:
            room = len(PROMPT) + 1 if prompt is None else PROMPT_ROOM
            length = min(LONG, longest - room) if longest else UNKNOWN_LIMIT
            targets.append(_Target(model, places, max(length, 1), prompt))
    if not targets and not reasons:
        reasons.append("there is no model that hands cancellation on")
    return targets, reasons


def _places(config: dict[str, Any], subject: Subject) -> int:
    """Requests that the engine model runs at once."""
    batch: int = config.get("max_batch_size", 0)
    return max(batch, subject.max_running or 0, 1)


def _slots(config: dict[str, Any]) -> int:
    """Requests that the model `llm` hands to its engine at once."""
    given = config.get("parameters", {}).get("slots", {}).get("string_value", "")
    return int(given) if given.isdecimal() else max(config.get("max_batch_size", 0), 1)


async def _measured(subject: Subject, client: LLMClient, target: _Target) -> tuple[float, float]:
    """Seconds per token of a request that runs alone, the better of two: one among others is never faster. And tokens
    per piece."""
    pace_s, weight = float("inf"), 1.0
    for tokens in (1, min(PACE, target.length), min(PACE, target.length)):  # the first one only warms up
        alone, sent = _Request(asyncio.Event()), time.perf_counter()
        await alone.run(target.counts(subject, client, tokens))
        if tokens > 1 and alone.count:
            pace_s = min(pace_s, (time.perf_counter() - sent) / alone.count)
            weight = alone.count / alone.pieces
    return pace_s, weight


async def _observe(subject: Subject, client: LLMClient, target: _Target) -> _Verdict:
    pace_s, weight = await _measured(subject, client, target)
    if target.prompt is not None:
        target = replace(target, weight=weight)
    places, length = target.places, target.length
    changed = asyncio.Event()
    holders, short = [_Request(changed) for _ in range(places)], _Request(changed)
    tasks: list[asyncio.Task[None]] = []

    def start(request: _Request, tokens: int) -> None:
        tasks.append(asyncio.create_task(request.run(target.counts(subject, client, tokens))))

    try:
        for holder in holders:
            start(holder, length)
        # Until all have begun, or one is so far that the others must be waiting for places.
        await _until(lambda: all(h.count for h in holders) or _most(holders) >= length // 4, holders, changed, tasks)
        start(short, 1)
        goal = _most(holders) + WATCHED
        await _until(lambda: bool(short.pieces) or _most(holders) >= goal, holders, changed, tasks)
        left = length - _most(holders)
        if short.pieces:
            return _Verdict(unclear=f"the engine runs more than {plural(places, 'request')} at once, so nothing waits")
        if left < SHORTEST or any(holder.ended for holder in holders):
            return _Verdict(unclear=f"an answer of {plural(length, 'token')} is over too soon to tell")
        cancelled = time.perf_counter()
        for task in tasks[:places]:
            task.cancel()
        with suppress(RequestTimeoutError):  # then it never got through
            await tasks[places]
        return _Verdict(freed_s=time.perf_counter() - cancelled, left_s=left * pace_s)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _most(holders: Sequence[_Request]) -> float:
    return max(holder.count for holder in holders)


async def _until(
    reached: Callable[[], bool],
    holders: Sequence[_Request],
    changed: asyncio.Event,
    tasks: Sequence[asyncio.Task[None]],
) -> None:
    """Waits until `reached`, or until a long request ends early; an error of any request is raised."""
    while True:
        changed.clear()
        for task in tasks:
            if task.done():
                task.result()
        if reached() or any(holder.ended for holder in holders):
            return
        await changed.wait()
