"""Loads engines for tests, with a stand-in where the real library needs a GPU, and listens to them."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import standin_bls
import standin_executor
import standin_llmapi
import standin_vllm
from standin_model import VOCABULARY

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

    @property
    def endless(self) -> int:
        """Tokens that nobody waits for, so that a test hangs if what makes them is not ended."""
        return 100 if self.library is None else 500_000

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


@pytest.fixture(scope="module", name="checkpoint")
def checkpoint_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from trtkit.config import CheckpointConfig
    from trtkit.convert.conversion import convert
    from trtkit.convert.source import plan_conversion
    from trtkit.hf import open_source

    folder = tmp_path_factory.mktemp("engines")
    source = open_source(write_source(folder / "source", dtype="float32", vocab_size=VOCABULARY))
    convert(plan_conversion(source, CheckpointConfig(dtype="float32")), source, folder / "checkpoint")
    return folder / "checkpoint"


@pytest.fixture(name="make")
def make_fixture(
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
            bindings = standin_executor.module(slots, old=old, leads=variant != "follows")
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
