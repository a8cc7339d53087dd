"""Virtual time: sleeping costs nothing, so a test decides what happens when, and no machine is too slow for it."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

from trtkit.client.api import Chunk, Completion, Ending, GenerateRequest
from trtkit.config import Scenario
from trtkit.loadtest.metrics import Result
from trtkit.loadtest.records import Clock
from trtkit.loadtest.runner import run_scenario

T = TypeVar("T")
MS = 1_000_000


class _Selector(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    """Instead of waiting, moves the loop's time forward."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> Any:
        events = super().select(0)
        if not events:
            if timeout is None:
                raise RuntimeError("deadlock: nothing is scheduled and nothing can happen")
            self.loop.now += timeout
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock only moves when every task waits, and then at once to the next timer."""

    def __init__(self) -> None:
        selector = _Selector()
        selector.loop = self
        self.now = 1000.0
        super().__init__(selector)

    def time(self) -> float:
        return self.now


@dataclass
class World:
    """Virtual time for one test. `cpu_share` is what the process pretends to use."""

    loop: VirtualLoop = field(default_factory=VirtualLoop)
    cpu_share: float = 0.1

    def now_ns(self) -> int:
        return round(self.loop.now * 1e9)

    @property
    def clock(self) -> Clock:
        return Clock(self.now_ns, lambda: round(self.now_ns() * self.cpu_share))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The work's result; fails when a task is left behind."""
        result = self.loop.run_until_complete(work)
        assert asyncio.all_tasks(self.loop) == set()
        return result

    def test(self, client: Any, scenario: Scenario, **options: Any) -> Result:
        """The result of a load test of `client` in virtual time."""
        options = {"prompts": ["a prompt"], "clock": self.clock, **options}
        return self.run(run_scenario(lambda: client, scenario, **options))


@dataclass
class KnownDelayClient:
    """Stand-in for a server that is far away: answers exactly after `ttft_ms`, then one chunk every `itl_ms`.

    `plan`, when given, is called with the number of the request (from 0; the trial request before the start is -1) and
    the request, and may change the delays by returning `(ttft_ms, gaps_ms)` or raise what the request shall fail with.
    `counts`: how many tokens it says that it made per chunk; 0 says nothing.
    """

    world: World
    ttft_ms: float = 100
    itl_ms: float = 20
    chunks: int = 5
    plan: Callable[[int, GenerateRequest], tuple[float, list[float]] | None] | None = None
    counts: int = 0
    requests: list[tuple[int, GenerateRequest]] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    closed: bool = False

    async def __aenter__(self) -> KnownDelayClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closed = True

    def _delays(self, request: GenerateRequest) -> tuple[float, list[float]]:
        number = len(self.requests) - 1
        self.requests.append((self.world.now_ns(), request))
        planned = self.plan(number, request) if self.plan else None
        return planned or (self.ttft_ms, [self.itl_ms] * (self.chunks - 1))

    async def stream(self, request: GenerateRequest, *, timeout_s: float = 120.0) -> AsyncIterator[Chunk]:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            first, gaps = self._delays(request)
            for place, delay in enumerate([first, *gaps]):
                await asyncio.sleep(delay / 1000)
                ending = Ending("stop", 1, self.counts * (place + 1)) if self.counts and place == len(gaps) else None
                yield Chunk(f"w{place} ", self.world.now_ns(), ending)
        finally:
            self.in_flight -= 1

    async def generate(self, request: GenerateRequest, *, timeout_s: float = 120.0) -> Completion:
        pieces = [chunk async for chunk in self.stream(request, timeout_s=timeout_s)]
        ending = pieces[-1].ending or Ending()
        text = "".join(chunk.text for chunk in pieces)
        return Completion(text, request.request_id, completion_tokens=ending.completion_tokens)
