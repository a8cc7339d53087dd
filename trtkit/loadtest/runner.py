"""Runs a scenario from first connection to result. One process, one event loop, one client."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime, timezone
from statistics import median
from typing import Any, Literal

from trtkit.client.api import ENSEMBLE, GenerateRequest, ServerError, connect, split_url
from trtkit.config import Scenario
from trtkit.errors import CheckFailedError, InputError, LacksError, TrtkitError
from trtkit.loadtest.arrivals import NS
from trtkit.loadtest.metrics import Result, summarise
from trtkit.loadtest.records import Clock, Run
from trtkit.loadtest.workers import Client, Load

MAX_IN_FLIGHT = 10_000
"""An open loop drops (and counts) requests beyond this instead of piling them up without end."""
GIVE_UP_S = 5.0
"""What is still in flight so long after its timeout is given up, even if the client still waits."""
LAG_PERIOD_S = 0.05
PROGRESS_PERIOD_S = 0.5

_REFUSALS = {
    "INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED", "UNAUTHENTICATED", "PERMISSION_DENIED",
    "400", "401", "403", "404", "405", "411", "413", "415", "422", "501",
}  # fmt: skip
"""Statuses of gRPC and HTTP that say that the request cannot succeed, now or later."""

ClientFactory = Callable[[], "AbstractAsyncContextManager[Client]"]


@dataclass(frozen=True)
class Progress:
    """How far a run is. `rps` and `p50_ms` are over the answers of the last 10 s, and the last 1000 at most; `p50_of`
    says what `p50_ms` is: without streaming there is no first token."""

    phase: Literal["warm-up", "measuring", "draining"]
    elapsed_s: float
    total_s: float
    done: int
    errors: int
    dropped: int
    in_flight: int
    rps: float
    p50_ms: float | None
    p50_of: Literal["first token", "end to end"] = "first token"


async def run_scenario(
    target: str | ClientFactory,
    scenario: Scenario,
    *,
    name: str = "default",
    model: str = ENSEMBLE,
    prompts: Sequence[str] = (),
    count_tokens: Callable[[str], int] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    stop: asyncio.Event | None = None,
    max_in_flight: int = MAX_IN_FLIGHT,
    clock: Clock | None = None,
) -> Result:
    """Runs one scenario and returns what was measured. Errors of requests are counted, not raised.

    One request goes out before the start, to open the connection and to refuse at once what cannot work.

    Args:
        target: url of the server, or a function that makes a client (an async context manager).
        model: the served model, when `target` is a url.
        prompts: sent in turn when the scenario has none of its own.
        count_tokens: counts the tokens of a text, where the served model does not tell how many it made. Without either
            a streamed chunk counts as one, and is named a chunk.
        stop: when set, requests in flight are cancelled and the result so far is returned, marked as incomplete.

    Raises:
        InputError: no prompts, a wrong url, a schedule too long, or streaming from a model that cannot stream.
        LacksError: nobody listens at the url.
        CheckFailedError: the server refuses the first request for good, as it does for an unknown model.
    """
    texts = list(scenario.prompts or prompts)
    if not texts:
        raise InputError(f"scenario '{name}' has no prompts", "set prompts, in the scenario or in validation")
    stop, clock = stop or asyncio.Event(), clock or Clock()
    if isinstance(target, str):
        scenario = _with_protocol_of(target, scenario)
    factory = target if callable(target) else _factory(target, model, scenario)
    started_at = datetime.now(timezone.utc).isoformat(timespec="seconds")
    async with factory() as client:
        await _unless(stop, _try_once(client, scenario, texts[0]))
        load = Load(
            client, scenario, texts, clock=clock, max_in_flight=max_in_flight, keep_texts=count_tokens is not None
        )
        run = Run(
            name=name,
            scenario=scenario,
            prompts=texts,
            target=target if isinstance(target, str) else "",
            model=model,
            started_at=started_at,
            start_ns=load.start_ns,
            window_start_ns=load.window_start_ns,
            window_end_ns=load.end_ns,
            records=load.records,
        )
        await _drive(load, run, on_progress, stop)
    return summarise(run, count_tokens)


def run_blocking(target: str | ClientFactory, scenario: Scenario, **options: Any) -> Result:
    """`run_scenario` for code without an event loop. SIGINT and SIGTERM end it early, with an incomplete result; a
    second signal is handled as before the call."""

    async def main() -> Result:
        stop = asyncio.Event()
        with _set_on_signal(stop):
            return await run_scenario(target, scenario, stop=stop, **options)

    return asyncio.run(main())


async def _drive(load: Load, run: Run, on_progress: Callable[[Progress], None] | None, stop: asyncio.Event) -> None:
    """Lets the load run until all is answered, given up or stopped. Leaves no task behind."""
    loop = asyncio.get_running_loop()
    cpu: list[tuple[int, int]] = []
    timers = [
        loop.call_later(max(0.0, (at - load.clock.now_ns()) / NS), lambda: cpu.append(_cpu(load.clock)))
        for at in (run.window_start_ns, run.window_end_ns)
    ]
    sending = loop.create_task(load.run())
    stopping = loop.create_task(stop.wait())
    others = [stopping, loop.create_task(_watch_lag(load, run))]
    if on_progress is not None:
        others.append(loop.create_task(_watch_progress(load, on_progress)))
    limit_s = (load.end_ns - load.clock.now_ns()) / NS + load.scenario.timeout_s + GIVE_UP_S
    try:
        await asyncio.wait({sending, stopping}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        stopped_ns = load.clock.now_ns()
    finally:
        load.stopping = True
        for task in (sending, *others):
            task.cancel()
        await asyncio.gather(sending, *others, return_exceptions=True)
        for timer in timers:
            timer.cancel()
    if not sending.cancelled() and (error := sending.exception()) is not None:
        raise error
    for other in others[1:]:
        if not other.cancelled() and (error := other.exception()) is not None:
            raise error  # a callback of the caller failed
    cpu.append(_cpu(load.clock))
    if len(cpu) > 1 and cpu[1][0] > cpu[0][0]:
        run.cpu_share = (cpu[1][1] - cpu[0][1]) / (cpu[1][0] - cpu[0][0])
    run.due = load.due
    _close_window(load, run, stopped_ns, interrupted=stop.is_set())


def _close_window(load: Load, run: Run, stopped_ns: int, *, interrupted: bool) -> None:
    """Settles when and why the measurement ended, and what becomes of requests that were cancelled."""
    for record in load.records:
        if record.outcome == "unfinished" and not interrupted:
            record.outcome, record.error = "error", "timeout"
        if not record.end_ns:  # cancelled before it could start
            record.sent_ns = record.end_ns = stopped_ns
    measured = [record for record in load.records if record.intended_ns >= run.window_start_ns]
    if interrupted and stopped_ns < run.window_end_ns:
        run.ended_by, run.window_end_ns = "interrupt", max(stopped_ns, run.window_start_ns)
    elif load.full and measured:
        # All were started before the time was over, so the time that counts is the time they took.
        run.ended_by, run.window_end_ns = "max_requests", max(record.end_ns for record in measured)
    elif interrupted:
        run.ended_by = "interrupt"


async def _watch_lag(load: Load, run: Run) -> None:
    """Samples, during the measurement, how late the event loop wakes up: it may add that to any time it takes."""
    clock = load.clock
    while True:
        due = clock.now_ns() + round(LAG_PERIOD_S * NS)
        await asyncio.sleep(LAG_PERIOD_S)
        if run.window_start_ns <= (now := clock.now_ns()) <= run.window_end_ns:
            run.lag_ns.append(max(0, now - due))


async def _watch_progress(load: Load, on_progress: Callable[[Progress], None]) -> None:
    while True:
        await asyncio.sleep(PROGRESS_PERIOD_S)
        on_progress(_progress(load))


def _progress(load: Load) -> Progress:
    now = load.clock.now_ns()
    recent = [item for item in load.recent if item[0] > now - 10 * NS]
    span_s = (now - min((item[0] for item in recent), default=now)) / NS
    return Progress(
        phase="warm-up" if now < load.window_start_ns else "measuring" if now < load.end_ns else "draining",
        elapsed_s=(now - load.start_ns) / NS,
        total_s=(load.end_ns - load.start_ns) / NS,
        done=load.done,
        errors=load.errors,
        dropped=load.dropped,
        in_flight=load.in_flight,
        rps=len(recent) / max(1.0, span_s),
        p50_ms=median(item[1] for item in recent) / 1e6 if recent else None,
        p50_of="first token" if load.scenario.streaming else "end to end",
    )


def _cpu(clock: Clock) -> tuple[int, int]:
    return clock.now_ns(), clock.cpu_ns()


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
    """Does the work, or cancels it when `stop` is set first."""
    working, stopping = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (working, stopping):
            task.cancel()
        await asyncio.gather(working, stopping, return_exceptions=True)
    if not working.cancelled():
        working.result()


async def _try_once(client: Client, scenario: Scenario, prompt: str) -> None:
    request = GenerateRequest(prompt, max_tokens=1)
    try:
        if scenario.streaming:
            async for _ in client.stream(request, timeout_s=scenario.timeout_s):
                pass
        else:
            await client.generate(request, timeout_s=scenario.timeout_s)
    except (InputError, LacksError):
        raise
    except ServerError as error:
        if _is_refusal(error, scenario.protocol):
            line = " ".join(error.cause.split())  # it may hold a whole HTML page
            fix = "see whether the url and the model are right: every request would get this answer"
            raise CheckFailedError(line[:300], fix) from None
    except TrtkitError:
        return  # a timeout: it counts when it happens during the run


def _is_refusal(error: ServerError, protocol: str) -> bool:
    """Whether every other request would get this answer too: the model is unknown, the request is refused, or what
    answers is no Triton server. An error of a server that merely fails just now counts when it happens in the run."""
    if protocol == "http" and not error.status:
        return True  # what answers does not speak HTTP
    return error.status in _REFUSALS or error.message.startswith("not JSON")


def _factory(url: str, model: str, scenario: Scenario) -> ClientFactory:
    return lambda: connect(url, model=model, protocol=scenario.protocol)


def _with_protocol_of(url: str, scenario: Scenario) -> Scenario:
    """The scenario with the protocol that is really spoken: a url with a scheme decides it."""
    scheme, _ = split_url(url, None if "://" in url else scenario.protocol)
    return scenario.model_copy(update={"protocol": "grpc" if scheme.startswith("grpc") else "http"})


@contextlib.contextmanager
def _set_on_signal(stop: asyncio.Event) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)

    def caught() -> None:
        restore()
        stop.set()

    for number in before:
        loop.add_signal_handler(number, caught)
    try:
        yield
    finally:
        restore()
