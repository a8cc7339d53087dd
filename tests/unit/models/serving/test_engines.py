"""All engines do the same with the same jobs. Those whose libraries need a GPU drive strict stand-ins of these."""

from __future__ import annotations

import importlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import standin_bls
import standin_executor
import standin_llmapi
import standin_vllm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from standin_model import LONGEST, VOCABULARY

from tests.conftest import write_source
from trtkit.repository.models.serving.engine import Job, Step

ENGINES = "trtkit.repository.models.serving.engines"
PROMPTS = ([5, 17, 3], [8], [40, 2, 9, 11, 60], [90, 90, 1, 7], [33, 12], [4, 4, 4, 4, 4, 4], [71, 8, 2])
PATIENCE_S = 60.0


@dataclass
class Bench:
    """An engine, and the library behind it (None for the reference runtime)."""

    engine: Any
    library: Any
    keys: Iterator[int] = field(default_factory=lambda: iter(range(1, 10**9)))

    def job(self, prompt: Sequence[int] = PROMPTS[0], max_tokens: int = 8, **settings: Any) -> Job:
        return Job(next(self.keys), list(prompt), max_tokens, **settings)

    def submit(self, *jobs: Job) -> None:
        for job in jobs:
            self.engine.check(job)
            self.engine.submit(job)

    def run(self, *jobs: Job) -> list[Heard]:
        self.submit(*jobs)
        return self.hear(*jobs)

    def hear(self, *jobs: Job) -> list[Heard]:
        """What comes of jobs until all of them are over."""
        heard = {job.key: Heard() for job in jobs}
        limit = time.monotonic() + PATIENCE_S
        while not all(one.over for one in heard.values()):
            assert time.monotonic() < limit, heard
            for step in self.engine.step(0.2):
                assert step.key in heard, f"a step of {step.key}, which nobody expects"
                heard[step.key].take(step)
        return list(heard.values())

    @property
    def idle(self) -> bool:
        """Nothing runs in the library any more."""
        if self.library is None:
            self.engine.step(0)
            return not (self.engine._batch.running or self.engine._waiting)
        return bool(self.library().world.idle)

    def until(self, true: Callable[[], bool]) -> None:
        limit = time.monotonic() + PATIENCE_S
        while not true():
            assert time.monotonic() < limit, "it did not happen"
            time.sleep(0.002)


class Heard:
    """All that an engine told about one sequence."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.log_probs: list[float] = []
        self.finish = self.error = self.code = ""
        self.steps = 0

    @property
    def over(self) -> bool:
        return bool(self.finish or self.error)

    def take(self, step: Step) -> None:
        assert not self.over, "a step after the end"
        self.tokens += step.tokens
        self.log_probs += step.log_probs
        self.finish, self.error, self.code = step.finish, step.error, step.code if step.error else ""
        self.steps += 1


def _engine(name: str, parameters: dict[str, str], slots: int) -> Any:
    sys.modules.pop(f"{ENGINES}.{name}", None)
    return importlib.import_module(f"{ENGINES}.{name}").Engine(parameters, slots=slots)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from trtkit.config import CheckpointConfig
    from trtkit.convert.conversion import convert
    from trtkit.convert.source import plan_conversion
    from trtkit.hf import open_source

    folder = tmp_path_factory.mktemp("engines")
    source = open_source(write_source(folder / "source", dtype="float32", vocab_size=VOCABULARY))
    convert(plan_conversion(source, CheckpointConfig(dtype="float32")), source, folder / "checkpoint")
    return folder / "checkpoint"


@pytest.fixture
def make(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Callable[..., Bench]]:
    """`make(name, slots=3, **parameters)` loads an engine; a name such as `vllm-old` has the library's older form."""
    made: list[Bench] = []

    def load(kind: str, slots: int = 3, **parameters: str) -> Bench:
        name, _, variant = kind.partition("-")
        old = variant == "old"
        library: Any = None
        if name == "reference":
            folder = request.getfixturevalue("checkpoint")
            given = {"checkpoint_dir": str(folder), "version_dir": str(tmp_path)}
        elif name == "executor":
            (tmp_path / "engine").mkdir(exist_ok=True)
            built = json.dumps({**standin_executor.CONFIG, **json.loads(parameters.pop("built", "{}"))})
            (tmp_path / "engine/config.json").write_text(built)
            bindings = standin_executor.module(slots, old=old)
            for module in ("tensorrt_llm", "tensorrt_llm.bindings"):
                monkeypatch.setitem(sys.modules, module, type(sys)(module))
            sys.modules["tensorrt_llm.bindings"].executor = bindings  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, bindings.__name__, bindings)
            given = {"gpt_model_path": "engine", "version_dir": str(tmp_path)}
            library = lambda: bindings.made  # noqa: E731
        elif name == "triton":
            release = "0.18.0" if old else None
            fake = standin_bls.module(slots, release=release, repeats_log_probs=old)
            monkeypatch.setitem(sys.modules, fake.__name__, fake)
            given = {"model_name": "tensorrt_llm", **({"model_release": release} if release else {})}
            library = lambda: fake.model  # noqa: E731
        else:
            modules = standin_llmapi.modules(slots) if name == "llmapi" else standin_vllm.modules(slots, old=old)
            for module_name, module in modules.items():
                monkeypatch.setitem(sys.modules, module_name, module)
            given = {"model": "some/model"}
            library = lambda: next(iter(modules.values())).made  # noqa: E731
        bench = Bench(_engine(name, {**given, **parameters}, slots), library)
        made.append(bench)
        return bench

    yield load
    for bench in made:
        bench.engine.close()


KINDS = ("reference", "executor", "executor-old", "llmapi", "vllm", "vllm-old", "triton", "triton-old")


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
    doomed = [bench.job(max_tokens=100) for _ in range(3)]
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
    waiting = [bench.job(max_tokens=100) for _ in range(3)]
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
    bench.submit(*(bench.job(prompt, 100) for prompt in PROMPTS))
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

    for _ in range(data.draw(st.integers(1, 10))):
        act = data.draw(st.sampled_from(["submit", "submit", "cancel", "step"]))
        if act == "submit":
            job = bench.job(data.draw(st.sampled_from(PROMPTS)), data.draw(st.integers(1, 25)))
            job = replace(job, streams=data.draw(st.booleans()), log_probs=data.draw(st.booleans()))
            jobs[job.key], heard[job.key] = job, Heard()
            bench.submit(job)
        elif act == "cancel" and jobs:
            key = data.draw(st.sampled_from(sorted(jobs)))
            bench.engine.cancel(key)
            cancelled.add(key)
        else:
            listen(0.001)
    limit = time.monotonic() + PATIENCE_S
    while not all(heard[key].over for key in jobs if key not in cancelled):
        assert time.monotonic() < limit
        listen(0.1)
    for key, job in jobs.items():
        if key not in cancelled:
            assert (len(heard[key].tokens), heard[key].finish) == (job.max_tokens, "length")
            assert len(heard[key].log_probs) == (job.max_tokens if job.log_probs else 0)
    bench.until(lambda: bench.idle)
    same: dict[tuple[int, ...], list[int]] = {}
    for key in (key for key in jobs if key not in cancelled):
        tokens = same.setdefault(tuple(jobs[key].prompt), heard[key].tokens)
        short = min(len(tokens), len(heard[key].tokens))
        assert tokens[:short] == heard[key].tokens[:short]


def test_limits(make: Callable[..., Bench]) -> None:
    for kind in ("reference", "executor", "vllm"):
        engine = make(kind).engine
        assert (engine.vocab_size, engine.max_seq_len) == (VOCABULARY, LONGEST)
    assert make("triton", max_seq_len="77").engine.max_seq_len == 77
    assert make("llmapi", engine_args='{"max_seq_len": 55}').engine.max_seq_len == 55
