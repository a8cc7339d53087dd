"""Both loops in virtual time, against a client whose delays are known exactly."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtkit.client.api import Chunk, GenerateRequest, RequestTimeoutError, ServerError
from trtkit.config import Scenario
from trtkit.errors import CheckFailedError, InputError, LacksError
from trtkit.findings import Finding
from trtkit.loadtest.metrics import Result
from trtkit.loadtest.progress import show_progress
from trtkit.loadtest.runner import Progress, run_blocking, run_scenario

MakeClient = Callable[..., Any]


def ids(findings: list[Finding]) -> set[str]:
    return {finding.id for finding in findings}


def latency(result: Result, key: str) -> dict[str, Any]:
    entry = result.latency[key]
    assert entry is not None
    return entry


# Accuracy: what is reported is what was injected.


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize(
    "load", [{"concurrency": 4}, {"request_rate": 30.0}, {"request_rate": 30.0, "arrival": "constant"}]
)
def test_reports_the_delays_of_the_server(world: Any, known_delay: MakeClient, load: Any, protocol: Any) -> None:
    client = known_delay(ttft_ms=100, itl_ms=20, chunks=6)
    result = world.test(client, Scenario(**load, duration_s=5, warmup_s=1, protocol=protocol))
    for key, expected in {"ttft": 100, "itl": 20, "tpot": 20, "e2e": 200}.items():
        entry = latency(result, key)
        for statistic in ("p50", "p90", "p99", "mean", "max"):
            assert entry[statistic] == pytest.approx(expected, abs=1e-3), (key, statistic)
    assert result.counts["ok"] == result.counts["requests"] > 50
    assert latency(result, "itl")["count"] == pytest.approx(5 * result.counts["ok"], rel=0.05)


def test_every_gap_counts_not_a_mean_per_request(world: Any, known_delay: MakeClient) -> None:
    """One gap of 500 ms in every answer of nine: invisible in a mean per request, and 1 of 9 gaps here."""
    client = known_delay(plan=lambda number, request: (50, [10] * 8 + [500]))
    result = world.test(client, Scenario(concurrency=1, duration_s=30, warmup_s=0))
    assert latency(result, "itl")["p50"] == pytest.approx(10)
    assert latency(result, "itl")["p99"] == latency(result, "itl")["max"] == pytest.approx(500)
    assert latency(result, "tpot")["max"] == pytest.approx((80 + 500) / 9)


def test_ttft_is_the_first_chunk_with_text(world: Any) -> None:
    class EmptyFirst:
        async def __aenter__(self) -> EmptyFirst:
            return self

        async def __aexit__(self, *exc: object) -> None:
            pass

        async def stream(self, request: GenerateRequest, *, timeout_s: float = 0) -> AsyncIterator[Chunk]:
            for delay, text in ((0.03, ""), (0.04, "a"), (0.05, ""), (0.06, "b"), (0.01, "")):
                await asyncio.sleep(delay)
                yield Chunk(text, world.now_ns())

    result = world.test(EmptyFirst(), Scenario(concurrency=1, duration_s=10, warmup_s=0))
    assert latency(result, "ttft")["p50"] == pytest.approx(70)
    assert latency(result, "itl")["p50"] == pytest.approx(110)
    assert latency(result, "e2e")["p50"] == pytest.approx(190)
    assert result.throughput["output_total"] == 2 * result.counts["ok"]


def test_throughput_is_what_happened_inside_the_measurement(world: Any, known_delay: MakeClient) -> None:
    result = world.test(
        known_delay(ttft_ms=100, itl_ms=100, chunks=10), Scenario(concurrency=8, duration_s=20, warmup_s=2)
    )
    assert result.window == {"start_s": 2, "end_s": 22, "seconds": 20, "ended_by": "duration"}
    assert result.throughput["requests_per_s"] == pytest.approx(8.0, rel=0.05)
    assert result.throughput["output_per_s"] == pytest.approx(80.0, rel=0.02)
    assert result.throughput["output_unit"] == "chunks"


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("counter", [None, lambda text: 1000])
def test_tokens_are_those_that_the_model_counts(
    world: Any, known_delay: MakeClient, streaming: bool, counter: Callable[[str], int] | None
) -> None:
    client = known_delay(ttft_ms=100, itl_ms=100, chunks=10, counts=3)
    scenario = Scenario(concurrency=4, duration_s=20, warmup_s=0, streaming=streaming)
    result = world.test(client, scenario, count_tokens=counter)
    assert result.throughput["output_unit"] == "tokens" == result.requests["output_unit"]
    assert result.throughput["output_total"] == 30 * result.counts["ok"]
    assert result.throughput["output_per_s"] == pytest.approx(120, rel=0.06)
    assert not ids(result.findings) & {"TK822", "TK823"}
    if streaming and counter is None:
        assert latency(result, "tpot")["p50"] == pytest.approx(900 / 29)


def test_a_model_that_counts_only_sometimes_is_not_relied_on(world: Any, known_delay: MakeClient) -> None:
    client = known_delay(counts=3)
    stream = client.stream

    async def forgetful(request: GenerateRequest, **options: Any) -> AsyncIterator[Chunk]:
        silent = len(client.requests) == 3
        async for chunk in stream(request, **options):
            yield Chunk(chunk.text, chunk.received_ns) if silent else chunk

    client.stream = forgetful
    result = world.test(client, Scenario(concurrency=1, duration_s=5, warmup_s=0))
    assert result.throughput["output_unit"] == "chunks" and "TK822" in ids(result.findings)


def test_warmup_is_left_out_by_event_time(world: Any, known_delay: MakeClient) -> None:
    """Slow while warming up, fast afterwards: no slow request may show."""
    start = world.now_ns()
    client = known_delay(
        plan=lambda number, request: (2000, [5]) if world.now_ns() < start + 2_000_000_000 else (50, [5])
    )
    result = world.test(client, Scenario(concurrency=2, duration_s=3, warmup_s=5))
    assert latency(result, "ttft")["max"] == pytest.approx(50)
    assert result.counts["outside"] > 2
    assert len(result.requests["sent"]) == result.counts["requests"] + result.counts["outside"]


# The closed loop.


def test_a_closed_loop_keeps_its_concurrency(world: Any, known_delay: MakeClient) -> None:
    client = known_delay()
    result = world.test(client, Scenario(concurrency=7, duration_s=5, warmup_s=0))
    assert client.most_in_flight == 7
    busy = [value for value in result.series["timeline"]["in_flight"] if value > 6.9]
    assert len(busy) >= len(result.series["timeline"]["in_flight"]) - 2
    assert result.latency["schedule_error"] is None
    assert result.latency["ttft_from_send"] is None


def test_prompts_are_sent_in_turn(world: Any, known_delay: MakeClient) -> None:
    client = known_delay()
    scenario = Scenario(concurrency=1, duration_s=2, warmup_s=0, prompts=["a", "b", "c"], max_tokens=9)
    world.test(client, scenario, prompts=["unused"])
    sent = [request for _, request in client.requests[1:]]
    assert [request.prompt for request in sent[:7]] == ["a", "b", "c", "a", "b", "c", "a"]
    assert {request.max_tokens for request in sent} == {9}


def test_prompts_are_sent_in_turn_when_an_open_loop_is_behind(world: Any, known_delay: MakeClient) -> None:
    client = known_delay()
    scenario = Scenario(
        request_rate=100_000.0, arrival="constant", duration_s=0.001, warmup_s=0, prompts=["a", "b", "c"]
    )
    world.test(client, scenario)
    assert [request.prompt for _, request in client.requests[1:7]] == ["a", "b", "c", "a", "b", "c"]


def test_a_dead_server_is_not_hammered(world: Any, known_delay: MakeClient) -> None:
    def refuse(number: int, request: GenerateRequest) -> None:
        if number >= 0:
            raise LacksError("cannot reach grpc://127.0.0.1:1: connection refused")

    result = world.test(known_delay(plan=refuse), Scenario(concurrency=2, duration_s=60, warmup_s=0))
    assert 100 < result.counts["error"] == result.counts["requests"] < 150
    assert result.counts["ok"] == 0
    assert "TK802" in ids(result.findings)


# The open loop.


def test_an_open_loop_sends_when_requests_are_due_however_slow_the_server(world: Any, known_delay: MakeClient) -> None:
    client = known_delay(ttft_ms=3000, chunks=1)
    scenario = Scenario(request_rate=100.0, arrival="constant", duration_s=2, warmup_s=0)
    result = world.test(client, scenario)
    assert client.most_in_flight == 200 == result.counts["ok"]
    assert latency(result, "schedule_error")["max"] == pytest.approx(0, abs=1e-3)
    np.testing.assert_allclose(np.diff(result.requests["sent"]), 10_000, atol=2)


def test_a_stall_of_the_client_is_not_omitted(world: Any, known_delay: MakeClient) -> None:
    """Coordinated omission: the load generator stands still for one second of ten, at 100 requests/s constant.

    100 requests come due meanwhile and wait 990, 980, ... ms; those in flight are late as well. From when they were
    due, p99 shows it; from when they went out, there is nothing to see.
    """

    def stall(number: int, request: GenerateRequest) -> None:
        if number == 400:
            world.loop.now += 1.0

    client = known_delay(plan=lambda number, request: stall(number, request) or (50, []))
    scenario = Scenario(request_rate=100.0, arrival="constant", duration_s=10, warmup_s=0)
    result = world.test(client, scenario)
    numbers = np.arange(1000)
    truth = np.full(1000, 50.0)
    truth[396:400] = 5000 - 10 * numbers[396:400]  # in flight when the stall began, at 4000 ms
    truth[400:501] = 5050 - 10 * numbers[400:501]  # due during the stall, sent at its end
    for key in ("e2e", "ttft"):
        for percent in (50, 90, 99):
            assert latency(result, key)[f"p{percent}"] == pytest.approx(np.percentile(truth, percent), abs=0.1)
    assert latency(result, "e2e_from_send")["p99"] == pytest.approx(50, abs=0.1)
    late = np.where((numbers > 400) & (numbers <= 500), 5000 - 10 * numbers, 0)
    assert latency(result, "schedule_error")["p99"] == pytest.approx(np.percentile(late, 99), abs=0.1)
    assert {"TK811", "TK812"} & ids(result.findings) == {"TK812"}  # a single stall shows in one lag sample of 200


def test_a_stall_of_the_server_counts_for_all_that_came_due(world: Any, known_delay: MakeClient) -> None:
    """The server stands still from second 4 to 5: every request due meanwhile is answered when it goes on."""
    start = world.now_ns()

    def plan(number: int, request: GenerateRequest) -> tuple[float, list[float]]:
        at = (world.now_ns() - start) / 1e9
        return (50 + max(0.0, 5.0 - at) * 1000 if at >= 4 else 50, [])

    result = world.test(
        known_delay(plan=plan), Scenario(request_rate=200.0, arrival="constant", duration_s=6, warmup_s=0)
    )
    expected = np.percentile(np.concatenate([np.full(1000, 50.0), 1050 - 5.0 * np.arange(200)]), 99)
    assert latency(result, "e2e")["p99"] == pytest.approx(expected, rel=0.01)


def test_beyond_the_limit_requests_are_dropped_and_counted(world: Any, known_delay: MakeClient) -> None:
    client = known_delay(ttft_ms=10_000, chunks=1)
    scenario = Scenario(request_rate=100.0, arrival="constant", duration_s=3, warmup_s=0)
    result = world.test(client, scenario, max_in_flight=50)
    assert client.most_in_flight == 50
    assert (result.counts["ok"], result.counts["dropped"], result.counts["requests"]) == (50, 250, 300)
    assert "TK804" in ids(result.findings)
    assert sum(result.series["timeline"]["dropped_per_s"]) * result.series["timeline"]["bin_s"] == pytest.approx(250)


def test_requests_that_pile_up_are_reported(world: Any, known_delay: MakeClient) -> None:
    """A server with one slot of 20 ms gets 100 requests/s: the queue grows without end."""
    free_at = 0

    def plan(number: int, request: GenerateRequest) -> tuple[float, list[float]]:
        nonlocal free_at
        free_at = max(free_at, world.now_ns()) + 20_000_000
        return ((free_at - world.now_ns()) / 1e6, [])

    result = world.test(known_delay(plan=plan), Scenario(request_rate=100.0, duration_s=10, warmup_s=1))
    assert "TK806" in ids(result.findings)
    steady = world.test(known_delay(), Scenario(request_rate=100.0, duration_s=10, warmup_s=1))
    assert "TK806" not in ids(steady.findings)


# Errors and ends.


def test_errors_are_counted_by_kind_and_never_leave_the_total(world: Any, known_delay: MakeClient) -> None:
    def plan(number: int, request: GenerateRequest) -> None:
        if number % 10 == 3:
            raise ServerError(
                f"[request id: {number}] out of memory after {number} tokens", status="INTERNAL", model="ensemble"
            )
        if number % 10 == 4:
            raise RequestTimeoutError("grpc://h:1", "ensemble", 1.0)
        if number % 10 == 5:
            raise OSError("socket closed")

    scenario = Scenario(request_rate=50.0, arrival="constant", duration_s=4, warmup_s=0)
    result = world.test(known_delay(plan=plan), scenario)
    assert result.counts == {"requests": 200, "ok": 140, "error": 60, "dropped": 0, "unfinished": 0, "outside": 0}
    assert sorted((entry["kind"], entry["count"]) for entry in result.errors) == [
        ("OSError: socket closed", 20),
        ("server error INTERNAL: out of memory after 3 tokens", 20),
        ("timeout", 20),
    ]
    assert "TK803" in ids(result.findings)
    assert latency(result, "e2e")["count"] == 140
    assert result.requests["ok"].count(False) == 60


def test_many_kinds_of_errors_stay_readable(world: Any, known_delay: MakeClient) -> None:
    def plan(number: int, request: GenerateRequest) -> None:
        raise ServerError("x" + "abcdefghijklmnopqrstuvwxyz"[number % 26])

    scenario = Scenario(request_rate=52.0, arrival="constant", duration_s=1, warmup_s=0)
    result = world.test(known_delay(plan=plan), scenario)
    assert len(result.errors) == 21
    assert result.errors[-1] == {"kind": "other kinds", "count": 12}
    assert sum(entry["count"] for entry in result.errors) == 52


def test_an_error_in_mid_stream_counts_as_an_error(world: Any, known_delay: MakeClient) -> None:
    class Breaks(type(known_delay())):  # type: ignore[misc]
        async def stream(self, request: GenerateRequest, *, timeout_s: float = 0) -> AsyncIterator[Chunk]:
            async for chunk in super().stream(request, timeout_s=timeout_s):
                yield chunk
                if len(self.requests) % 2 == 0:
                    raise ServerError("the connection broke")

    result = world.test(Breaks(world), Scenario(concurrency=1, duration_s=10, warmup_s=0))
    assert result.counts["error"] == pytest.approx(result.counts["requests"] / 2, abs=1)
    assert latency(result, "ttft")["count"] == result.counts["ok"]


def test_a_client_that_never_answers_ends_as_timeouts(world: Any, known_delay: MakeClient) -> None:
    def plan(number: int, request: GenerateRequest) -> tuple[float, list[float]] | None:
        return (1e9, []) if number >= 20 else None

    scenario = Scenario(concurrency=3, duration_s=5, warmup_s=0, timeout_s=10.0)
    result = world.test(known_delay(plan=plan), scenario)
    assert result.errors == [{"kind": "timeout", "count": 3}]
    assert result.complete


def test_no_text_is_reported(world: Any, known_delay: MakeClient) -> None:
    class Silent(type(known_delay())):  # type: ignore[misc]
        async def stream(self, request: GenerateRequest, *, timeout_s: float = 0) -> AsyncIterator[Chunk]:
            await asyncio.sleep(0.1)
            yield Chunk("", world.now_ns())

    result = world.test(Silent(world), Scenario(concurrency=1, duration_s=2, warmup_s=0))
    assert "TK805" in ids(result.findings)
    assert result.latency["ttft"] is None
    assert latency(result, "e2e")["p50"] == pytest.approx(100)


@settings(max_examples=25, deadline=None)
@given(
    limit=st.integers(1, 60),
    open_loop=st.booleans(),
    level=st.integers(1, 20),
    warmup=st.sampled_from([0.0, 0.5]),
    fails=st.integers(2, 9),
)
def test_counts_add_up_and_max_requests_is_kept(
    limit: int, open_loop: bool, level: int, warmup: float, fails: int
) -> None:
    from standin_known_delay import KnownDelayClient, World

    def plan(number: int, request: GenerateRequest) -> None:
        if number % fails == 1:
            raise ServerError("no")

    world = World()
    load: dict[str, Any] = {"request_rate": level * 10.0} if open_loop else {"concurrency": level}
    scenario = Scenario(**load, duration_s=3, warmup_s=warmup, max_requests=limit)
    result = world.test(KnownDelayClient(world, plan=plan), scenario)
    world.loop.close()
    counts = result.counts
    assert counts["requests"] == counts["ok"] + counts["error"] + counts["dropped"] + counts["unfinished"] <= limit
    assert counts["requests"] + counts["outside"] == len(result.requests["sent"])
    assert counts["error"] == sum(entry["count"] for entry in result.errors)
    if counts["requests"] == limit:
        assert result.window["ended_by"] == "max_requests"
        ends = [end for end, inside in zip(result.requests["end"], result.requests["measured"], strict=True) if inside]
        assert result.window["end_s"] == pytest.approx(max(ends) / 1e6, abs=1e-5)
    else:
        assert result.window["ended_by"] == "duration"


@pytest.mark.parametrize("load", [{"concurrency": 5}, {"request_rate": 50.0, "arrival": "constant"}])
def test_a_stop_returns_what_there_is_and_leaves_nothing_behind(world: Any, known_delay: MakeClient, load: Any) -> None:
    client = known_delay()

    async def interrupted() -> Result:
        stop = asyncio.Event()
        asyncio.get_running_loop().call_later(3.0, stop.set)
        scenario = Scenario(**load, duration_s=60, warmup_s=1)
        return await run_scenario(lambda: client, scenario, prompts=["p"], clock=world.clock, stop=stop)

    result = world.run(interrupted())
    assert not result.complete
    assert result.window["ended_by"] == "interrupt"
    assert result.counts["ok"] > 20
    assert result.counts["unfinished"] >= 5
    assert result.counts["error"] == 0
    assert 1.7 < result.window["seconds"] < 2.0  # the trial request took 0.18 s
    assert "TK801" in ids(result.findings)
    assert client.closed
    assert client.in_flight == 0


def test_a_stop_before_the_start_gives_an_empty_result(world: Any, known_delay: MakeClient) -> None:
    async def stopped() -> Result:
        stop = asyncio.Event()
        stop.set()
        scenario = Scenario(concurrency=2, duration_s=60)
        return await run_scenario(known_delay, scenario, prompts=["p"], clock=world.clock, stop=stop)

    result = world.run(stopped())
    assert result.counts["ok"] == 0
    assert result.throughput["requests_per_s"] is None
    result.to_dict()


def test_a_signal_ends_the_run_with_a_partial_result(world: Any) -> None:
    """In real time, since signals are; but the client itself raises SIGINT, so the machine's speed decides nothing."""
    import time

    class Signals:
        count = 0

        async def __aenter__(self) -> Signals:
            return self

        async def __aexit__(self, *exc: object) -> None:
            pass

        async def stream(self, request: GenerateRequest, *, timeout_s: float = 0) -> AsyncIterator[Chunk]:
            self.count += 1
            yield Chunk("a", time.perf_counter_ns())
            if self.count > 3:
                os.kill(os.getpid(), signal.SIGINT)
                await asyncio.sleep(1000)

    before = signal.getsignal(signal.SIGINT)
    result = run_blocking(Signals, Scenario(concurrency=1, duration_s=1000, warmup_s=0), prompts=["p"])
    assert not result.complete
    assert (result.counts["ok"], result.counts["unfinished"]) == (2, 1)
    assert signal.getsignal(signal.SIGINT) is before


# What is refused at once.


@pytest.mark.parametrize(
    "error", [InputError("model 'm' cannot stream"), LacksError("cannot reach http://127.0.0.1:1")]
)
def test_what_cannot_work_is_refused_before_the_start(world: Any, known_delay: MakeClient, error: Exception) -> None:
    def plan(number: int, request: GenerateRequest) -> None:
        raise error

    client = known_delay(plan=plan)
    with pytest.raises(type(error), match=str(error)):
        world.test(client, Scenario(concurrency=1, duration_s=1))
    assert len(client.requests) == 1
    assert client.closed


REFUSALS = [
    ("grpc", "NOT_FOUND", "Request for unknown model", True),
    ("grpc", "INVALID_ARGUMENT", "unexpected inference output", True),
    ("grpc", "", "a model's error inside a stream", False),
    ("grpc", "UNAVAILABLE", "exceeds maximum queue size", False),
    ("grpc", "INTERNAL", "out of memory", False),
    ("http", "404", "Request for unknown model", True),
    ("http", "501", "Unsupported method ('POST')", True),
    ("http", "200", "not JSON: <html>\n<head>", True),
    ("http", "", "400, message='Bad status line'", True),
    ("http", "429", "slow down", False),
    ("http", "500", "out of memory", False),
    ("http", "503", "exceeds maximum queue size", False),
]


@pytest.mark.parametrize(("protocol", "status", "message", "final"), REFUSALS)
def test_a_refusal_ends_the_test_and_a_passing_failure_does_not(
    world: Any, known_delay: MakeClient, protocol: Any, status: str, message: str, final: bool
) -> None:
    def plan(number: int, request: GenerateRequest) -> None:
        if number < 0:
            raise ServerError(message, status=status)

    client = known_delay(plan=plan)
    scenario = Scenario(concurrency=1, duration_s=1, warmup_s=0, protocol=protocol)
    if final:
        with pytest.raises(CheckFailedError, match=re.escape(message.rsplit(maxsplit=1)[-1])) as caught:
            world.test(client, scenario)
        assert "\n" not in caught.value.cause
        assert len(client.requests) == 1
    else:
        assert world.test(client, scenario).counts["error"] == 0


def test_no_prompts_is_an_error(world: Any, known_delay: MakeClient) -> None:
    with pytest.raises(InputError, match="scenario 'nightly' has no prompts"):
        world.test(known_delay(), Scenario(concurrency=1), prompts=[], name="nightly")


# What the client says about itself.


@pytest.mark.parametrize(("share", "warned"), [(0.84, False), (0.86, True)])
def test_a_busy_client_is_reported(world: Any, known_delay: MakeClient, share: float, warned: bool) -> None:
    world.cpu_share = share
    result = world.test(known_delay(), Scenario(concurrency=1, duration_s=5, warmup_s=1))
    assert result.client["cpu_share"] == pytest.approx(share, abs=0.001)
    assert ("TK813" in ids(result.findings)) == warned
    assert latency(result, "e2e")["p50"] == pytest.approx(180)  # numbers are labelled, not withheld


def test_a_lagging_event_loop_is_reported(world: Any, known_delay: MakeClient) -> None:
    def block(number: int, request: GenerateRequest) -> None:
        world.loop.now += 0.03

    result = world.test(known_delay(plan=block), Scenario(concurrency=8, duration_s=5, warmup_s=0))
    assert "TK811" in ids(result.findings)
    assert latency(result, "loop_lag")["p99"] > 5


def test_progress_tells_phases_and_counts(world: Any, known_delay: MakeClient) -> None:
    seen: list[Progress] = []
    scenario = Scenario(concurrency=2, duration_s=4, warmup_s=2)
    result = world.test(known_delay(ttft_ms=1200), scenario, on_progress=seen.append)
    assert [p.phase for p in seen[:4]] == ["warm-up"] * 3 + ["measuring"]
    assert seen[-1].phase == "draining"
    assert seen[-1].done <= result.counts["ok"] + result.counts["outside"]
    assert {p.p50_ms for p in seen if p.done} == {1200.0}
    assert all(p.in_flight <= 2 and p.total_s == 6 for p in seen)


def test_progress_without_a_terminal_is_a_line_every_few_seconds(
    world: Any, known_delay: MakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    with show_progress("night") as on_progress:
        world.test(
            known_delay(), Scenario(concurrency=1, duration_s=14, warmup_s=0, streaming=False), on_progress=on_progress
        )
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3  # after 0.5, 5.5 and 10.5 s
    assert lines[0] == "night: measuring 0/14 s, 2 done, 2.0/s, 1 in flight, end to end p50 180 ms"


def test_a_failing_progress_callback_is_not_swallowed(world: Any, known_delay: MakeClient) -> None:
    def fail(progress: Progress) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        world.test(known_delay(), Scenario(concurrency=1, duration_s=2), on_progress=fail)
