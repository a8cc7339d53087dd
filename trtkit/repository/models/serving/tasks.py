"""Engines that speak asyncio: a loop in a thread of its own, where every sequence is a task."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from .engine import Code, Job, RequestError, Step
from .mailbox import Mailbox

T = TypeVar("T")
CLOSE_S = 10.0

Follow = Callable[[Job], AsyncIterator[Step]]
"""Generates a sequence. It is cancelled at an `await` when nobody wants the sequence any more."""


class Tasks:
    """Runs sequences and collects their steps.

    Args:
        name: of the thread.
        follow: runs in the loop, once for each sequence. What it raises ends the sequence with an error.
    """

    def __init__(self, name: str, follow: Follow) -> None:
        self._follow = follow
        self._mail = Mailbox()
        self._tasks: dict[int, asyncio.Task[None]] = {}  # only the loop's thread touches them
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def call(self, function: Callable[[], Awaitable[T]], timeout_s: float | None = None) -> T:
        """Runs a coroutine function in the loop and waits for what it returns or raises."""

        async def run() -> T:
            return await function()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(timeout_s)

    def start(self, job: Job) -> None:
        self._mail.open(job.key)
        self._loop.call_soon_threadsafe(self._start, job)

    def cancel(self, key: int) -> None:
        if self._mail.close(key):
            self._loop.call_soon_threadsafe(self._cancel, key)

    def take(self, timeout_s: float) -> list[Step]:
        return self._mail.take(timeout_s)

    def close(self) -> None:
        """Cancels all sequences and ends the thread."""
        if self._thread.is_alive():
            try:
                self.call(self._end, CLOSE_S)
            finally:
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join(CLOSE_S)
        if not self._thread.is_alive() and not self._loop.is_closed():
            self._loop.close()

    # In the loop's thread.

    def _start(self, job: Job) -> None:
        if self._mail.is_open(job.key):  # else it was cancelled already
            task = self._tasks[job.key] = self._loop.create_task(self._run(job))
            task.add_done_callback(lambda _: self._tasks.pop(job.key))

    def _cancel(self, key: int) -> None:
        if task := self._tasks.get(key):
            task.cancel()

    async def _run(self, job: Job) -> None:
        try:
            async for step in self._follow(job):
                self._mail.put(step)
            self._mail.put(Step(job.key, error="the engine ended a sequence without a reason"))  # if it is still open
        except asyncio.CancelledError:
            self._mail.put(Step(job.key, error="the engine cancelled the request", code="CANCELLED"))
        except RequestError as error:
            self._mail.put(Step(job.key, error=str(error), code=error.code))
        except Exception as error:
            code: Code = "INVALID_ARG" if isinstance(error, ValueError) else "INTERNAL"
            self._mail.put(Step(job.key, error=f"the engine failed: {type(error).__name__}: {error}", code=code))

    async def _end(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
