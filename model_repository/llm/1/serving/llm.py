"""The model `llm`: text or chat messages in, text out, with an engine in this process.

Two threads. Triton's thread reads requests, tokenises them together and hands them to the engine, or to a queue while
every slot is taken. The other asks the engine for what is new, turns it into text and sends it (with a helper, see
outbox.py), and looks for clients that have gone. So no token waits for a prompt to be read, and a stream's pieces
cannot overtake each other.
"""

from __future__ import annotations

import importlib
import json
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from .answers import Answer, Reply
from .chat import ChatError
from .engine import Code, Engine, RequestError, Step
from .kept import KeptTensors
from .metrics import Metrics
from .outbox import Outbox
from .reader import Reader
from .settings import Settings

CANCEL_POLL_S = 0.05
"""How often a running request is asked whether its client has gone. Each question costs about 80 us of CPU."""
QUEUE_LOOK_S = 0.01
"""How often those that wait are looked after."""
IDLE_S = 0.5
"""How long the engine may wait for work before the metrics are brought up to date."""

REQUESTS = "trtkit_llm_requests_total"
PROMPT_TOKENS = "trtkit_llm_prompt_tokens_total"
COMPLETION_TOKENS = "trtkit_llm_completion_tokens_total"
CANCELLED = "trtkit_llm_cancelled_requests_total"
REFUSED = "trtkit_llm_refused_requests_total"
FAILED = "trtkit_llm_failed_requests_total"
RUNNING = "trtkit_llm_running_sequences"
WAITING = "trtkit_llm_waiting_requests"
QUEUE_TIME = "trtkit_llm_queue_seconds_total"
FIRST_TOKEN = "trtkit_llm_time_to_first_token_seconds"  # noqa: S105 - no password
COUNTERS = {
    REQUESTS: "Requests answered to their end",
    PROMPT_TOKENS: "Tokens of the prompts of these requests",
    COMPLETION_TOKENS: "Tokens generated for them",
    CANCELLED: "Requests whose client went away",
    REFUSED: "Requests refused: wrong, too late, or the queue was full",
    FAILED: "Requests that the engine could not finish",
    QUEUE_TIME: "Seconds that started requests had waited for a slot",
}
GAUGES = {RUNNING: "Sequences that the engine is generating", WAITING: "Requests that wait for a slot"}
HISTOGRAMS = {FIRST_TOKEN: "From a request's arrival to its first text"}


class ServingModel:
    """What model.py offers to Triton as `TritonPythonModel`."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads tokenizer, chat template and engine, and starts the thread that answers. ValueError: one line."""
        try:
            self._load(args)
        except Exception as error:
            fix = getattr(error, "fix", "")  # of trtkit's own errors, which the reference runtime raises
            if not fix and not isinstance(error, ValueError):
                raise
            # From here, so that the server's log has this line and no list of frames.
            raise ValueError("; ".join(" ".join(part.split()) for part in (str(error), fix) if part)) from None

    def _load(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"]) / args["model_version"]
        self._settings = settings = Settings.of(config, folder)
        module = importlib.import_module(f".engines.{settings.engine}", __package__)
        self._engine: Engine = module.Engine(settings.parameters, slots=settings.slots)
        decoupled = pb_utils.using_decoupled_model_transaction_policy(config)
        self._kept = KeptTensors()
        self._reader = Reader(settings, self._engine, self._kept, decoupled=decoupled)
        labels = {"model": args["model_name"], "version": args["model_version"]}
        self._metrics = Metrics(labels, counters=COUNTERS, gauges=GAUGES, histograms=HISTOGRAMS)
        # Both threads touch these, under the lock.
        self._lock = threading.Lock()
        self._running: dict[int, Reply] = {}
        self._waiting: deque[Reply] = deque()
        # Only the answering thread touches these.
        self._polls: deque[tuple[float, Reply]] = deque()
        self._arrived: deque[Reply] = deque()
        self._held: dict[Reply, None] = {}
        self._outbox = Outbox()
        self._queue_due = 0.0
        self._asked = 0
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="llm", daemon=True)
        self._thread.start()

    def execute(self, requests: list[Any]) -> None:
        """Reads requests and hands them on. A wrong one is answered at once and leaves the others alone."""
        for reply in self._reader.read(requests, time.monotonic(), self._refuse):
            try:
                self._accept(reply)
            except Exception as error:
                self._refuse(reply, error)

    def finalize(self) -> None:
        """Ends the thread; requests that still run get an error."""
        self._closing = True
        if hasattr(self, "_thread"):  # not after a failed initialize
            self._engine.cancel(0)  # wakes a waiting step
            self._thread.join(30)
            self._outbox.close()
            self._engine.close()
            self._kept.clear()

    # Triton's thread.

    def _accept(self, reply: Reply) -> None:
        """Starts a request, or lets it wait, or refuses it."""
        limit = self._settings.max_queue_size
        with self._lock:
            if self._closing:
                raise RequestError("the model is being unloaded", "UNAVAILABLE")
            if not self._waiting and self._has_room(reply):
                self._start(reply)
            elif limit and len(self._waiting) >= limit:
                raise RequestError(
                    f"the queue is full: {len(self._waiting)} requests wait, and max_queue_size is {limit}",
                    "UNAVAILABLE",
                )
            else:
                self._waiting.append(reply)

    def _refuse(self, reply: Reply, error: Exception) -> None:
        with self._lock:
            self._metrics.values[REFUSED] += 1
        if isinstance(error, RequestError):
            self._fail(reply, str(error), error.code)
        elif isinstance(error, ChatError):
            self._fail(reply, f"messages: {error}", "INVALID_ARG")
        else:
            pb_utils.Logger.log_error(f"a request cannot be started: {error!r}")
            self._fail(reply, f"the request cannot be started: {type(error).__name__}: {error}", "INTERNAL")

    @staticmethod
    def _fail(reply: Reply, message: str, code: Code) -> None:
        try:
            reply.fail(message, code)
        except Exception as error:
            pb_utils.Logger.log_error(f"a client could not be told '{message}': {error!r}")

    # Under the lock.

    def _has_room(self, reply: Reply) -> bool:
        return not self._running or len(self._running) + len(reply.jobs) <= self._settings.slots

    def _start(self, reply: Reply) -> None:
        for job in reply.jobs:
            self._running[job.key] = reply
        self._arrived.append(reply)
        try:
            for job in reply.jobs:
                self._engine.submit(job)
        except Exception:
            for job in reply.jobs:
                self._running.pop(job.key, None)
                self._drop(job.key)
            raise

    def _drop(self, key: int) -> None:
        """Tells the engine that a sequence is not wanted any more."""
        try:
            self._engine.cancel(key)
        except Exception as error:
            pb_utils.Logger.log_error(f"the engine does not let go of a sequence: {error!r}")

    # The answering thread.

    def _run(self) -> None:
        failures = 0
        while not self._closing:
            try:
                self._round()
                failures = 0
            except BaseException as error:  # a panic in a Rust library is no Exception
                # An engine that fails may go on failing. No client is left waiting, and the log is not flooded.
                pb_utils.Logger.log_error(f"all requests were dropped: {error!r}")
                self._end_all(f"internal error: {type(error).__name__}: {error}", "INTERNAL")
                time.sleep(min(1.0, 0.01 * 2**failures))
                failures = min(failures + 1, 10)
        self._end_all("the model is being unloaded", "UNAVAILABLE")

    def _round(self) -> None:
        steps = self._engine.step(self._patience())
        now = time.monotonic()
        while self._arrived:
            self._polls.append((now + CANCEL_POLL_S, self._arrived.popleft()))
        for step in steps:
            try:
                self._advance(step, now)
            except Exception as error:
                pb_utils.Logger.log_error(f"a request was dropped: {error!r}")
                if (reply := self._running.get(step.key)) is not None:
                    self._end(reply, f"internal error: {type(error).__name__}: {error}", "INTERNAL")
        if self._held:
            self._send_held(now)
        self._deliver()
        if self._waiting and now >= self._queue_due:
            self._queue_due = now + QUEUE_LOOK_S
            self._look_after_queue(now)
        self._look_for_cancelled(now)
        self._deliver()
        self._metrics.values[RUNNING], self._metrics.values[WAITING] = len(self._running), len(self._waiting)
        self._metrics.report(now)

    def _patience(self) -> float:
        """How long the engine may wait for something to happen."""
        if not self._running:
            return IDLE_S
        if self._held:
            since = next(iter(self._held)).held_since or 0.0
            return min(max(since + self._settings.max_token_wait_s - time.monotonic(), 0.0), CANCEL_POLL_S / 3)
        return CANCEL_POLL_S / 3

    def _advance(self, step: Step, now: float) -> None:
        """Turns what is new about one sequence into text, and sends it if it is time."""
        reply = self._running.get(step.key)
        if reply is None:
            return  # it was cancelled a moment ago
        if step.error:
            self._metrics.values[FAILED] += 1
            self._end(reply, step.error, step.code)
            return
        if len(step.tokens) > 1 and not self._settings.coalesce and reply.ask.streams:
            for piece in _one_by_one(step):
                self._advance(piece, now)
            return
        answer = reply.answers[0] if len(reply.answers) == 1 else _find(reply.answers, step.key)
        answer.take(step)
        if answer.finish:
            self._leave(step)
            if reply.done():
                self._finish(reply, now)
                return
        if not reply.ask.streams or not answer.fresh:
            return
        if reply.started is not None and self._settings.max_token_wait_s:
            if reply.held_since is None:
                reply.held_since = now
                self._held[reply] = None
            return
        if reply.started is None:
            reply.started = now
            self._metrics.observe(FIRST_TOKEN, now - reply.arrived)
        self._send(reply)

    def _leave(self, step: Step) -> None:
        """Frees the slot of a sequence that is over; the engine may not know, if it was a stop word."""
        with self._lock:
            self._running.pop(step.key, None)
        if not step.finish:
            self._drop(step.key)
        self._admit()

    def _finish(self, reply: Reply, now: float) -> None:
        self._held.pop(reply, None)
        if reply.started is None:
            self._metrics.observe(FIRST_TOKEN, now - reply.arrived)
        values = self._metrics.values
        values[REQUESTS] += 1
        values[PROMPT_TOKENS] += reply.prompt_tokens
        values[COMPLETION_TOKENS] += sum(answer.tokens for answer in reply.answers)
        self._send(reply)

    def _send(self, reply: Reply) -> None:
        self._outbox.add(reply, reply.pieces())

    def _deliver(self) -> None:
        """Sends what the round has made."""
        for reply in self._outbox.deliver():
            reply.over = True
            self._cancel(reply)

    def _send_held(self, now: float) -> None:
        """Sends the text that has waited long enough for company."""
        limit = now - self._settings.max_token_wait_s
        while self._held:
            reply = next(iter(self._held))
            if reply.held_since is not None and reply.held_since > limit:
                return
            del self._held[reply]
            self._send(reply)

    def _admit(self) -> None:
        """Starts waiting requests while there are slots for them."""
        while self._waiting:
            with self._lock:
                if not self._waiting or not self._has_room(self._waiting[0]):
                    return
                reply = self._waiting.popleft()
            try:
                if reply.is_cancelled():
                    raise RequestError("cancelled", "CANCELLED")
                self._metrics.values[QUEUE_TIME] += time.monotonic() - reply.arrived
                with self._lock:
                    self._start(reply)
            except RequestError as error:
                self._metrics.values[CANCELLED] += error.code == "CANCELLED"
                self._fail(reply, str(error), error.code)
            except Exception as error:
                self._refuse(reply, error)

    def _look_after_queue(self, now: float) -> None:
        """Turns away those that have waited too long, and asks one in a hundred whether its client has gone."""
        late: list[Reply] = []
        asked: list[Reply] = []
        with self._lock:
            staying: deque[Reply] = deque()
            for reply in self._waiting:
                (late if reply.deadline is not None and reply.deadline <= now else staying).append(reply)
            self._waiting = staying
            for _ in range(1 + len(staying) // 100 if staying else 0):
                self._asked = (self._asked + 1) % len(staying)
                asked.append(staying[self._asked])
        for reply in asked:
            if self._is_gone(reply):
                self._metrics.values[CANCELLED] += 1
                self._end(reply, "cancelled", "CANCELLED")
        for reply in late:
            waited = 1000 * (now - reply.arrived)
            self._refuse(reply, RequestError(f"the deadline is exceeded: {waited:.0f} ms in the queue", "UNAVAILABLE"))
        self._admit()

    def _look_for_cancelled(self, now: float) -> None:
        """Asks about those whose turn it is, but never about all at once: tokens would wait for the answers."""
        for _ in range(1 + len(self._polls) // 4):
            if not self._polls or self._polls[0][0] > now:
                return
            _, reply = self._polls.popleft()
            if reply.over:
                continue
            if self._is_gone(reply):
                self._metrics.values[CANCELLED] += 1
                self._end(reply, "cancelled", "CANCELLED")
            else:
                self._polls.append((now + CANCEL_POLL_S, reply))

    @staticmethod
    def _is_gone(reply: Reply) -> bool:
        try:
            return reply.is_cancelled()
        except Exception as error:
            pb_utils.Logger.log_error(f"a client was dropped: {error!r}")
            return True

    def _end(self, reply: Reply, message: str, code: Code) -> None:
        """Ends a request with an error, behind what it has been given so far."""
        self._outbox.add(reply, reply.failure(message, code))
        self._cancel(reply)

    def _cancel(self, reply: Reply) -> None:
        """Takes a request away from the engine."""
        self._held.pop(reply, None)
        with self._lock:
            keys = [job.key for job in reply.jobs if self._running.pop(job.key, None) is not None]
            if reply in self._waiting:
                self._waiting.remove(reply)
        for key in keys:
            self._drop(key)
        self._admit()

    def _end_all(self, message: str, code: Code) -> None:
        with self._lock:
            replies = [*dict.fromkeys(self._running.values()), *self._waiting]
            self._waiting.clear()
        for reply in replies:
            self._end(reply, message, code)
        self._outbox.deliver()


def _find(answers: Sequence[Answer], key: int) -> Answer:
    return next(answer for answer in answers if answer.key == key)


def _one_by_one(step: Step) -> list[Step]:
    """A step of several tokens as steps of one token each; the end comes with the last."""
    last = len(step.tokens) - 1
    return [
        Step(
            step.key,
            step.tokens[place : place + 1],
            step.finish if place == last else "",
            log_probs=step.log_probs[place : place + 1],
        )
        for place in range(len(step.tokens))
    ]
