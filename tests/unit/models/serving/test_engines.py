"""All engines do the same with the same jobs. Those whose libraries need a GPU drive strict stand-ins of these."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import takewhile

import pytest
from engine_bench import KINDS, PATIENCE_S, PROMPTS, Bench, Heard, checkpoint_fixture, make_fixture  # noqa: F401
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from standin_model import LONGEST, VOCABULARY


@pytest.fixture(params=KINDS)
def bench(request: pytest.FixtureRequest, make: Callable[..., Bench]) -> Bench:
    return make(request.param)


def test_many_at_once_make_what_each_makes_alone(bench: Bench) -> None:
    alone = [bench.run(bench.job(prompt, 12))[0] for prompt in PROMPTS]
    assert all((len(one.tokens), one.finish) == (12, "length") for one in alone)
    for streams in (True, False):
        together = bench.run(*(bench.job(prompt, 12, streams=streams) for prompt in PROMPTS))
        assert [one.tokens for one in together] == [one.tokens for one in alone]
        assert {one.finish for one in together} == {"length"}
    bench.until(lambda: bench.idle)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_short_answers(bench: Bench, count: int) -> None:
    long, *short = bench.run(bench.job(max_tokens=3), *(bench.job(max_tokens=count) for _ in range(5)))
    assert all((one.tokens, one.finish) == (long.tokens[:count], "length") for one in short)


@pytest.mark.parametrize("streams", [True, False])
def test_every_end_id_ends_and_is_left_out(bench: Bench, streams: bool) -> None:
    plain = bench.run(bench.job(max_tokens=20))[0].tokens
    absent = next(number for number in range(VOCABULARY) if number not in plain)
    table = [(plain[0],), (plain[6],), (absent, plain[4]), (plain[9], plain[5], absent), (absent, absent, plain[2])]
    heard = bench.run(*(bench.job(max_tokens=20, end_ids=ends, streams=streams) for ends in table))
    for ends, one in zip(table, heard, strict=True):
        assert one.tokens == list(takewhile(lambda number, ends=ends: number not in ends, plain))
        assert one.finish == "stop"
    (unended,) = bench.run(bench.job(max_tokens=20, end_ids=(absent,), streams=streams))
    assert (unended.tokens, unended.finish) == (plain, "length")


@pytest.mark.parametrize("streams", [True, False])
def test_a_log_prob_for_each_token(bench: Bench, streams: bool) -> None:
    plain = bench.run(bench.job(max_tokens=15, log_probs=True))[0]
    assert len(plain.log_probs) == 15
    assert all(value <= 0 for value in plain.log_probs)
    assert len(set(plain.log_probs)) > 1
    end = plain.tokens[8]
    (cut,) = bench.run(bench.job(max_tokens=15, log_probs=True, end_ids=(VOCABULARY - 1, end), streams=streams))
    assert cut.log_probs == pytest.approx(plain.log_probs[: len(cut.tokens)], rel=1e-4)
    (without,) = bench.run(bench.job(max_tokens=4))
    assert without.log_probs == []


def test_forbidden_tokens(bench: Bench) -> None:
    plain = bench.run(bench.job())[0].tokens
    (other,) = bench.run(bench.job(bad_words=[[plain[0]], [plain[3]]]))
    assert not {plain[0], plain[3]} & set(other.tokens)
    assert other.finish == "length"


def test_a_cancelled_sequence_is_silent_and_gone(bench: Bench) -> None:
    doomed = [bench.job(max_tokens=bench.endless) for _ in range(3)]
    bench.submit(*doomed)
    first = bench.engine.step(10)
    assert first
    for job in doomed:
        bench.engine.cancel(job.key)
    bystanders = [bench.job(prompt) for prompt in PROMPTS]
    assert {one.finish for one in bench.run(*bystanders)} == {"length"}  # hears of no other key
    bench.until(lambda: bench.idle)


def test_one_that_waits_is_cancelled_without_a_token(bench: Bench) -> None:
    busy = [bench.job(max_tokens=60, prompt=prompt) for prompt in PROMPTS[:3]]
    waiting = [bench.job(max_tokens=bench.endless) for _ in range(3)]
    bench.submit(*busy, *waiting)
    for job in waiting:
        bench.engine.cancel(job.key)
    assert {one.finish for one in bench.hear(*busy)} == {"length"}
    bench.until(lambda: bench.idle)


def test_cancelling_what_is_over_means_nothing(bench: Bench) -> None:
    job = bench.job()
    (first,) = bench.run(job)
    bench.engine.cancel(job.key)
    bench.engine.cancel(job.key)
    bench.engine.cancel(12345)
    assert bench.run(bench.job())[0].tokens == first.tokens


def test_an_error_of_one_leaves_the_others_alone(bench: Bench) -> None:
    wrong = bench.job(bad_words=[[number] for number in range(VOCABULARY)])
    others = [bench.job(prompt, 20) for prompt in PROMPTS]
    failed, *fine = bench.run(wrong, *others)
    assert failed.error
    assert failed.code == "INTERNAL"
    assert {one.finish for one in fine} == {"length"}


@pytest.mark.parametrize("act", ["submit", "cancel"])
def test_a_waiting_step_wakes(bench: Bench, act: str) -> None:
    waiter = threading.Thread(target=bench.engine.step, args=(4 * PATIENCE_S,), daemon=True)
    waiter.start()
    time.sleep(0.05)  # most likely it waits by now; if not, nothing is lost
    if act == "submit":
        bench.submit(bench.job())
    else:
        bench.engine.cancel(0)
    waiter.join(PATIENCE_S)
    assert not waiter.is_alive()


@pytest.mark.parametrize("kind", KINDS)
def test_closing_ends_what_runs(kind: str, make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(threading.enumerate())
    bench = make(kind)
    if kind == "reference":  # runs in whoever steps; what its libraries start is not its own
        before = set(threading.enumerate())
    bench.submit(*(bench.job(prompt, bench.endless) for prompt in PROMPTS))
    bench.engine.step(10)
    bench.engine.close()
    monkeypatch.setattr(bench.engine, "close", lambda: None)
    if kind.startswith("triton"):
        bench.until(lambda: bench.idle)
        bench.library().world.close()  # the other model lives on
    bench.until(lambda: set(threading.enumerate()) <= before)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("kind", KINDS)
def test_any_schedule(kind: str, data: st.DataObject, make: Callable[..., Bench]) -> None:
    """Submits, cancels and steps in any order: who is not cancelled gets its own tokens and one end."""
    if not hasattr(make, "benches"):
        make.benches = {}  # type: ignore[attr-defined]
    benches: dict[str, Bench] = make.benches  # type: ignore[attr-defined]
    if kind not in benches:
        benches[kind] = make(kind)
    bench = benches[kind]
    jobs, heard, cancelled = {}, {}, set()  # type: ignore[var-annotated]

    def listen(timeout: float) -> None:
        for step in bench.engine.step(timeout):
            assert step.key in jobs, "a step of a former schedule"
            if step.key not in cancelled:
                heard[step.key].take(step)

    try:
        for _ in range(data.draw(st.integers(1, 10))):
            act = data.draw(st.sampled_from(["submit", "submit", "cancel", "step"]))
            if act == "submit":
                job = bench.job(data.draw(st.sampled_from(PROMPTS)), data.draw(st.integers(1, 25)))
                job = replace(job, streams=data.draw(st.booleans()), log_probs=data.draw(st.booleans()))
                jobs[job.key], heard[job.key] = job, Heard()
                bench.submit(job)
            elif act == "cancel" and jobs:
                place = data.draw(st.integers(0, len(jobs) - 1))
                bench.engine.cancel(list(jobs)[place])
                cancelled.add(list(jobs)[place])
            else:
                listen(0.001)
        limit = time.monotonic() + PATIENCE_S
        while not all(heard[key].over for key in jobs if key not in cancelled):
            assert time.monotonic() < limit
            listen(0.1)
    finally:
        for key in jobs:
            bench.engine.cancel(key)
        bench.until(lambda: bench.idle)
    same: dict[tuple[int, ...], list[int]] = {}
    for key in set(jobs) - cancelled:
        job, one = jobs[key], heard[key]
        assert (len(one.tokens), one.finish) == (job.max_tokens, "length")
        assert len(one.log_probs) == (job.max_tokens if job.log_probs else 0)
        tokens = same.setdefault(tuple(job.prompt), one.tokens)
        short = min(len(tokens), len(one.tokens))
        assert tokens[:short] == one.tokens[:short]


def test_limits(make: Callable[..., Bench]) -> None:
    for kind, longest in (("reference", 128), ("executor", LONGEST), ("vllm", LONGEST)):
        engine = make(kind).engine
        assert (engine.vocab_size, engine.max_seq_len) == (VOCABULARY, longest)
    assert make("triton", max_seq_len="77").engine.max_seq_len == 77
    assert make("llmapi", engine_args='{"max_seq_len": 55}').engine.max_seq_len == 55
