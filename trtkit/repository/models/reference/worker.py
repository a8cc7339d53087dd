"""The one thread that runs the batch: admits waiting requests, steps, reports, and looks for cancelled ones."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from trtkit.repository.models.reference.generation import Generation
from trtkit.repository.models.reference.inflight import InflightBatch, Progress

Code = Literal["INVALID_ARG", "CANCELLED", "UNAVAILABLE", "INTERNAL"]
"""Why a request failed, in Triton's words."""

QUIET_S = 1.5
"""After so long without work `watch` is told once more; longer than the interval in which metrics are brought over."""


@dataclass
class Counts:
    """What a worker has done and is doing.

    Attributes:
        requests: answered to their end.
        tokens: generated for clients, finished or not.
        cancelled: requests that were stopped, or whose client went away.
        running: generations that have a slot.
        waiting: requests with a generation that has none.
    """

    requests: int = 0
    tokens: int = 0
    cancelled: int = 0
    running: int = 0
    waiting: int = 0


class Client(Protocol):
    """Who waits for a request. The worker's thread calls it; what it raises ends the request."""

    def progressed(self, progress: Progress) -> None:
        """A step was made for one of the client's generations."""

    def failed(self, message: str, code: Code) -> None:
        """The request is over, whatever was done of it; nothing more will come."""

    def is_cancelled(self) -> bool:
        """Whether nobody waits any more. It may cost a message to another process: asked once per step, in turn."""


@dataclass(eq=False)
class _Job:
    """The generations of one client, which run independently, and the name that `stop` knows them by."""

    client: Client
    generations: list[Generation]
    name: str


class Worker:
    """Runs requests on a model until it is closed.

    Args:
        model: a transformers causal language model in eval mode on the CPU.
        slots: most requests at a time; others wait in order of arrival.
        log: receives one line about what nobody else is told.
        watch: is shown the counts after every step, by the worker's thread; if it raises, never again.
    """

    def __init__(
        self,
        model: Any,
        slots: int,
        log: Callable[[str], None] = lambda line: None,
        watch: Callable[[Counts], None] | None = None,
    ) -> None:
        self._batch = InflightBatch(model, slots)
        self._log = log
        self._watch = watch
        self._wake = threading.Condition()
        self._inbox: list[_Job | str] = []  # what to run, or the name of what to stop
        self._closing = False
        # Only the thread touches these.
        self._jobs: dict[Generation, _Job] = {}
        self._waiting: deque[Generation] = deque()
        self._rounds = 0
        self._counts = Counts()
        self._untold = False  # whether something has changed since the last quiet time
        self._thread = threading.Thread(target=self._run, name="reference-runtime", daemon=True)
        self._thread.start()

    def submit(self, client: Client, generations: Sequence[Generation], name: str = "") -> None:
        """Queues the generations of one client; returns at once.

        Args:
            name: what `stop` calls the request; need not be unique.
        """
        with self._wake:
            if not self._closing:
                self._inbox.append(_Job(client, list(generations), name))
                self._wake.notify()
                return
        client.failed("the model is being unloaded", "UNAVAILABLE")

    def stop(self, name: str) -> None:
        """Cancels the requests of that name, waiting or running."""
        with self._wake:
            self._inbox.append(name)
            self._wake.notify()

    def close(self, timeout: float = 30.0) -> None:
        """Ends the thread after the current step; whoever still waits gets an error."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout)

    def _run(self) -> None:
        while self._receive():
            try:
                self._round()
            except Exception as error:
                # Nothing here is expected to raise; if something does, no client may be left waiting.
                self._log(f"the batch was dropped: {error!r}")
                self._end_all(f"internal error: {type(error).__name__}: {error}", "INTERNAL")
            self._show_counts()
        self._end_all("the model is being unloaded", "UNAVAILABLE")

    def _receive(self) -> bool:
        """Takes over what arrived, and waits for it if there is nothing else to do. False when closing."""
        with self._wake:
            while not (self._inbox or self._jobs or self._closing):
                if not self._wake.wait(QUIET_S if self._untold else None):
                    self._untold = False
                    break
            inbox, self._inbox = self._inbox, []
        self._untold = self._untold or bool(inbox)
        for item in inbox:
            if isinstance(item, _Job):
                self._jobs.update(dict.fromkeys(item.generations, item))
                self._waiting.extend(item.generations)
            else:
                for job in self._clients():
                    if job.name == item:
                        self._cancel(job)
        return not self._closing

    def _round(self) -> None:
        """One token for everybody who has a slot."""
        if self._waiting and self._batch.free:
            joining = [self._waiting.popleft() for _ in range(min(self._batch.free, len(self._waiting)))]
            self._report(self._batch.join(joining))
        if self._batch.running:
            self._report(self._batch.step())
        self._look_for_cancelled()

    def _report(self, steps: Sequence[Progress]) -> None:
        for progress in steps:
            generation = progress.generation
            job = self._jobs.get(generation)
            if job is None:
                continue  # its client was dropped a moment ago
            if generation.error is not None:
                self._end(job, generation.error, "INTERNAL")
                continue
            if generation.done:
                del self._jobs[generation]
            self._counts.tokens += progress.token is not None
            try:
                job.client.progressed(progress)
            except Exception as error:
                self._log(f"a client was dropped: {error!r}")
                self._forget(job)
                continue
            self._counts.requests += not any(other in self._jobs for other in job.generations)

    def _look_for_cancelled(self) -> None:
        """Asks one running and one waiting client, in turn: what it costs does not grow with their number."""
        self._rounds += 1
        for generations in (self._batch.running, self._waiting):
            job = self._jobs.get(generations[self._rounds % len(generations)]) if generations else None
            if job is None:
                continue
            try:
                cancelled = job.client.is_cancelled()
            except Exception as error:
                self._log(f"a client was dropped: {error!r}")
                self._forget(job)
                continue
            if cancelled:
                self._cancel(job)

    def _clients(self) -> list[_Job]:
        """Waiting and running jobs, each once."""
        return list(dict.fromkeys(self._jobs.values()))

    def _show_counts(self) -> None:
        if self._watch is None:
            return
        self._counts.running = len(self._batch.running)
        self._counts.waiting = len({self._jobs[generation] for generation in self._waiting})
        try:
            self._watch(self._counts)
        except Exception as error:
            self._watch = None
            self._log(f"the counts are shown no more: {error!r}")

    def _cancel(self, job: _Job) -> None:
        self._counts.cancelled += 1
        self._end(job, "cancelled", "CANCELLED")

    def _end(self, job: _Job, message: str, code: Code) -> None:
        """Ends a job with an error."""
        self._forget(job)
        try:
            job.client.failed(message, code)
        except Exception as error:
            self._log(f"a client could not be told '{message}': {error!r}")

    def _forget(self, job: _Job) -> None:
        """Frees the slots and the places in the queue of a job."""
        for generation in job.generations:
            self._jobs.pop(generation, None)
            self._batch.leave(generation)
        if any(generation in self._waiting for generation in job.generations):
            self._waiting = deque(generation for generation in self._waiting if generation not in job.generations)

    def _end_all(self, message: str, code: Code) -> None:
        """Ends all jobs, those that nobody looked at yet included."""
        with self._wake:
            inbox, self._inbox = self._inbox, []
        self._batch.clear()
        self._waiting.clear()
        for job in [*self._clients(), *(item for item in inbox if isinstance(item, _Job))]:
            self._end(job, message, code)
