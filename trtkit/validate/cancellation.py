"""Does the engine model stop working when its client goes away?

No counter of the server tells it (Triton counts a request as done when the model lets go of it, which may be long
before its last token), so it is seen from outside: as many long requests as run at once keep a short one waiting, and
once they are cancelled it must get through long before they would have ended.

Cancelling a request to an ensemble does not reach a step that is already running, so the engine model is asked
directly.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass

from trtkit.client.api import LLMClient, RequestTimeoutError
from trtkit.findings import Finding
from trtkit.validate.results import CheckResult, Subject, plural, result, skipped
from trtkit.validate.streaming import is_decoupled

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


@dataclass
class _Request:
    """One running request and how far it is. `changed` is common to all requests: set whenever one of them moves."""

    changed: asyncio.Event
    count: int = 0
    ended: bool = False

    async def run(self, stream: AsyncGenerator[list[int], None]) -> None:
        try:
            async with aclosing(stream) as pieces:
                async for piece in pieces:
                    self.count += len(piece)
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
    """Fills the engine model with long requests over each client, cancels them, and times a short one behind them."""
    if subject.engine not in await clients[0].models(timeout_s=subject.lookup_s):
        return skipped(NAME, f"the server has no model '{subject.engine}'")
    if not await is_decoupled(subject, clients[0], subject.engine):
        return skipped(NAME, f"model '{subject.engine}' is not decoupled, so no answer can be cancelled halfway")
    config = await clients[0].model_config(subject.engine, timeout_s=subject.lookup_s)
    places = max(config.get("max_batch_size", 0), subject.max_running or 0, 1)
    if places > MOST_REQUESTS:
        return skipped(NAME, f"the engine runs {places} requests at once, too many to fill it up")
    findings, seen = [], {}
    for client in clients:
        verdict = await _observe(subject, client, places)
        if verdict.unclear:
            return skipped(NAME, verdict.unclear)
        seen[client.protocol] = {"freed_s": verdict.freed_s, "left_s": verdict.left_s}
        if not verdict.stopped:
            cause = (
                f"{plural(places, 'request')} cancelled with {verdict.left_s:.2f} s to go kept their places "
                f"for {verdict.freed_s:.2f} s"
            )
            fix = "poll is_cancelled() in the model; for the C++ backend see cancellation_check_period_ms"
            findings.append(Finding("TK731", "error", f"{client.protocol} {subject.engine}", cause, fix))
    told = ", ".join(f"{protocol} {1000 * times['freed_s']:.0f} ms" for protocol, times in seen.items())
    left = min(times["left_s"] for times in seen.values())
    detail = f"{plural(places, 'long request')} cancelled: the next one got through after {told} (else {left:.2f} s)"
    return result(NAME, detail, findings, places=places, seconds=seen)


async def _pace_s(subject: Subject, client: LLMClient, length: int) -> float:
    """Seconds per token of a request that runs alone: the better of two. One among others is never faster."""
    pace_s = float("inf")
    for tokens in (1, min(PACE, length), min(PACE, length)):  # the first one only warms up
        alone, sent = _Request(asyncio.Event()), time.perf_counter()
        stream = client.stream_tokens(PROMPT, tokens, end_id=-1, model=subject.engine, timeout_s=subject.timeout_s)
        await alone.run(stream)
        if tokens > 1:
            pace_s = min(pace_s, (time.perf_counter() - sent) / max(alone.count, 1))
    return pace_s


async def _observe(subject: Subject, client: LLMClient, places: int) -> _Verdict:
    length = min(LONG, subject.max_seq_len - len(PROMPT) - 1) if subject.max_seq_len else UNKNOWN_LIMIT
    pace_s = await _pace_s(subject, client, length)
    changed = asyncio.Event()
    holders, short = [_Request(changed) for _ in range(places)], _Request(changed)
    tasks: list[asyncio.Task[None]] = []

    def start(request: _Request, tokens: int) -> None:
        stream = client.stream_tokens(PROMPT, tokens, end_id=-1, model=subject.engine, timeout_s=subject.timeout_s)
        tasks.append(asyncio.create_task(request.run(stream)))

    try:
        for holder in holders:
            start(holder, length)
        # Until all have begun, or one is so far that the others must be waiting for places.
        await _until(lambda: all(h.count for h in holders) or _most(holders) >= length // 4, holders, changed, tasks)
        start(short, 1)
        goal = _most(holders) + WATCHED
        await _until(lambda: bool(short.count) or _most(holders) >= goal, holders, changed, tasks)
        first = max(holders, key=lambda holder: holder.count)
        left = length - first.count
        if short.count:
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


def _most(holders: Sequence[_Request]) -> int:
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
