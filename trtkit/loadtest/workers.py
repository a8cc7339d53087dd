"""The two loops that send requests.

A closed loop keeps `concurrency` requests in flight: each worker sends its next one when its last one is done. An open
loop sends at precomputed arrivals, whatever the server does: a slow answer delays nothing, and a request that went out
late is still measured from when it was due.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, Protocol

from trtkit.client.api import Chunk, Completion, GenerateRequest, RequestTimeoutError, ServerError
from trtkit.config import Scenario
from trtkit.errors import TrtkitError
from trtkit.loadtest.arrivals import NS, arrival_offsets
from trtkit.loadtest.records import Clock, Record

LONGEST_PAUSE_S = 1.0
"""A worker of a closed loop pauses after failures in a row, ever longer up to this: a dead server is not hammered."""
BATCH = 32
"""Requests that an open loop which is late starts before it lets answers in."""


class Client(Protocol):
    """What a load test needs of an LLM client."""

    async def generate(self, request: GenerateRequest, *, timeout_s: float = ...) -> Completion: ...
    def stream(self, request: GenerateRequest, *, timeout_s: float = ...) -> AsyncIterator[Chunk]: ...


class Load:
    """The requests of one run: sends them and keeps a record of each."""

    def __init__(
        self,
        client: Client,
        scenario: Scenario,
        prompts: Sequence[str],
        *,
        clock: Clock,
        max_in_flight: int,
        keep_texts: bool,
    ) -> None:
        self.client, self.scenario, self.prompts = client, scenario, prompts
        self.clock, self.max_in_flight, self.keep_texts = clock, max_in_flight, keep_texts
        self.records: list[Record] = []
        self.recent: deque[tuple[int, int]] = deque(maxlen=1000)
        """Of the last answers: when they ended, and their time to first token (end to end without streaming)."""
        self.done = self.errors = self.dropped = self.in_flight = self.measured = 0
        self.due: int | None = None
        self.stopping = False
        """Set before `run` is cancelled: any other cancellation of a request is a failure."""
        self.running: set[asyncio.Task[None]] = set()
        self.start_ns = clock.now_ns()
        self.window_start_ns = self.start_ns + round(scenario.warmup_s * NS)
        self.end_ns = self.window_start_ns + round(scenario.duration_s * NS)

    @property
    def full(self) -> bool:
        """Whether `max_requests` have been started."""
        return self.scenario.max_requests is not None and self.measured >= self.scenario.max_requests

    async def run(self) -> None:
        """Sends everything and returns when all is answered. Cancelling it cancels what is in flight."""
        try:
            if self.scenario.concurrency is not None:
                for _ in range(self.scenario.concurrency):
                    self._spawn(self._worker())
            elif self.scenario.request_rate is not None:
                await self._dispatch(self.scenario.request_rate)
            if self.running:
                await asyncio.gather(*self.running)
        finally:
            self.stopping = True
            for task in self.running:
                task.cancel()
            await asyncio.gather(*self.running, return_exceptions=True)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self.running.add(task)
        task.add_done_callback(self.running.discard)

    async def _worker(self) -> None:
        """One of the workers of a closed loop."""
        failures = 0
        while (now := self.clock.now_ns()) < self.end_ns and not self.full:
            record = self._new_record(now)
            record.sent_ns = now
            self.in_flight += 1
            await self._send(record)
            failures = failures + 1 if record.outcome == "error" else 0
            # Even without a pause other tasks get a turn, though a client may answer without ever waiting.
            await asyncio.sleep(min(0.05 * 2**failures, LONGEST_PAUSE_S) if failures > 1 else 0)

    async def _dispatch(self, rate: float) -> None:
        """The open loop: absolute deadlines, so that lateness never adds up."""
        scenario = self.scenario
        offsets = arrival_offsets(
            rate,
            warmup_s=scenario.warmup_s,
            duration_s=scenario.duration_s,
            arrival=scenario.arrival,
            seed=scenario.seed,
            max_requests=scenario.max_requests,
        )
        self.due = int((offsets >= self.window_start_ns - self.start_ns).sum())
        for number, offset in enumerate(offsets):
            due = self.start_ns + int(offset)
            while (wait_ns := due - self.clock.now_ns()) > 0:  # noqa: ASYNC110 - a deadline, not a condition
                await asyncio.sleep(wait_ns / NS)
            record = self._new_record(due)
            if self.in_flight >= self.max_in_flight:
                record.outcome, record.sent_ns, record.end_ns = "dropped", due, due
                self.dropped += 1
            else:
                self.in_flight += 1
                self._spawn(self._send(record))
            if number % BATCH == 0:
                await asyncio.sleep(0)

    def _new_record(self, intended_ns: int) -> Record:
        record = Record(len(self.records) % len(self.prompts), intended_ns)
        self.records.append(record)
        self.measured += intended_ns >= self.window_start_ns
        return record

    async def _send(self, record: Record) -> None:
        """Sends one request and completes its record, whatever happens."""
        request = GenerateRequest(self.prompts[record.prompt], max_tokens=self.scenario.max_tokens)
        record.sent_ns = record.sent_ns or self.clock.now_ns()
        try:
            if self.scenario.streaming:
                await self._stream(request, record)
            else:
                completion = await self.client.generate(request, timeout_s=self.scenario.timeout_s)
                record.empty = not completion.text
                if completion.completion_tokens is not None:
                    record.tokens = completion.completion_tokens
                if self.keep_texts:
                    record.texts.append(completion.text)
            record.outcome = "ok"
        except asyncio.CancelledError:
            if self.stopping:
                raise
            record.outcome, record.error = "error", "cancelled by the server or the client library"
            self.errors += 1
        except Exception as error:  # a load test counts what fails, whatever it is
            record.outcome, record.error = "error", error_text(error)
            self.errors += 1
        finally:
            record.end_ns = self.clock.now_ns()
            self.in_flight -= 1
        if record.outcome == "ok":
            self.done += 1
            first_ns = record.chunk_ns[0] if record.chunk_ns else record.end_ns
            self.recent.append((record.end_ns, first_ns - record.intended_ns))

    async def _stream(self, request: GenerateRequest, record: Record) -> None:
        async for chunk in self.client.stream(request, timeout_s=self.scenario.timeout_s):
            if chunk.text:
                record.chunk_ns.append(chunk.received_ns)
                if self.keep_texts:
                    record.texts.append(chunk.text)
            if chunk.ending is not None and chunk.ending.completion_tokens is not None:
                record.tokens = chunk.ending.completion_tokens
        record.empty = not record.chunk_ns


def error_text(error: Exception) -> str:
    """What failed, in one line, without the id of the request."""
    if isinstance(error, (RequestTimeoutError, TimeoutError, asyncio.TimeoutError)):
        return "timeout"
    if isinstance(error, ServerError):
        head, message = f"server error{f' {error.status}' if error.status else ''}", error.message
    elif isinstance(error, TrtkitError):
        head, message = type(error).__name__.removesuffix("Error").lower(), error.cause
    else:
        head, message = type(error).__name__, str(error)
    line = " ".join(re.sub(r"\[request id: [^\]]*\]", "", message).split())
    return f"{head}: {line[:200]}"
