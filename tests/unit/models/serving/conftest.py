"""The serving model outside of Triton: a fake of the server's interface, and an engine that does what a test says."""

from __future__ import annotations

import importlib
import json
import queue
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_triton
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

PACKAGE = "trtkit.repository.models.serving"
TRITON_SIDE = ("answers", "kept", "metrics", "outbox", "reader", "llm")
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


class ScriptedEngine:
    """An engine whose steps a test gives. It notes what it was told."""

    def __init__(self, parameters: dict[str, str], *, slots: int) -> None:
        self.vocab_size = None
        self.max_seq_len = int(parameters["max_seq_len"]) if "max_seq_len" in parameters else None
        self.slots = slots
        self.jobs: list[Any] = []
        self.cancelled: list[int] = []
        self.closed = False
        self.refuses: Exception | None = None
        self._steps: queue.Queue[Any] = queue.Queue()

    def check(self, job: Any) -> None:
        pass

    def submit(self, job: Any) -> None:
        if self.refuses:
            raise self.refuses
        self.jobs.append(job)

    def cancel(self, key: int) -> None:
        self.cancelled.append(key)

    def step(self, timeout_s: float) -> list[Any]:
        try:
            steps = self._steps.get(timeout=min(timeout_s, 0.005))
        except queue.Empty:
            return []
        if isinstance(steps, Exception):
            raise steps
        return list(steps)

    def close(self) -> None:
        self.closed = True

    def give(self, *steps: Any) -> None:
        self._steps.put(steps)

    def fail(self, error: Exception) -> None:
        self._steps.put(error)


@pytest.fixture(scope="session")
def words() -> Tokenizer:
    """Byte-level BPE of single bytes and a few merges, so that tests can spell every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(["hello world, hello there, the end of the world"] * 4, trainer)
    return tokenizer


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    fake = fake_triton.module()
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake)
    names = [f"{PACKAGE}.{name}" for name in TRITON_SIDE]
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    scripted: Any = ModuleType(f"{PACKAGE}.engines.scripted")
    scripted.Engine = ScriptedEngine
    monkeypatch.setitem(sys.modules, scripted.__name__, scripted)
    yield fake
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(before)


class Server:
    """The loaded model with what a test needs around it."""

    def __init__(self, model: Any, fake: Any, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.engine: ScriptedEngine = model._engine
        self.metrics = fake.MetricFamily.made
        self.errors = fake.Logger.errors

    def send(self, *requests: fake_triton.Request) -> None:
        assert self.model.execute(list(requests)) is None

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text).ids)

    def job(self, number: int = -1) -> Any:
        """The newest job that the engine has, or the one of this number, once it is there."""
        self.until(lambda: len(self.engine.jobs) > max(number, 0))
        return self.engine.jobs[number]

    def answer(self, job: Any, text: str, finish: str = "stop") -> None:
        """Lets the engine write this text, one token per step, and end."""
        from trtkit.repository.models.serving.engine import Step

        for number in self.ids(text):
            self.engine.give(Step(job.key, (number,)))
        self.engine.give(Step(job.key, (), finish))

    @staticmethod
    def until(true: Callable[[], Any], timeout: float = 20) -> None:
        limit = time.monotonic() + timeout
        while not true():
            assert time.monotonic() < limit, "it did not happen"
            time.sleep(0.002)


@pytest.fixture
def serve(triton: Any, tmp_path: Path, words: Tokenizer) -> Iterator[Callable[..., Server]]:
    """`serve(max_queue_size="1", ...)` loads the model with these parameters, around a scripted engine."""
    loaded: list[Any] = []

    def load(
        *, decoupled: bool = True, max_batch_size: int = 8, template: str | None = TEMPLATE, **parameters: str
    ) -> Server:
        folder = tmp_path / "llm/1/tokenizer"
        folder.mkdir(parents=True, exist_ok=True)
        words.save(str(folder / "tokenizer.json"))
        config = {"bos_token": "<s>", "chat_template": template} if template else {}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        given = {"engine": "scripted", "tokenizer_dir": "tokenizer", "end_ids": "1", **parameters}
        model = importlib.import_module(f"{PACKAGE}.llm").ServingModel()
        model.initialize(
            {
                "model_config": json.dumps(
                    {
                        "max_batch_size": max_batch_size,
                        "model_transaction_policy": {"decoupled": decoupled},
                        "parameters": {name: {"string_value": value} for name, value in given.items()},
                    }
                ),
                "model_repository": str(tmp_path / "llm"),
                "model_version": "1",
                "model_name": "llm",
            }
        )
        loaded.append(model)
        return Server(model, triton, words)

    yield load
    for model in loaded:
        model.finalize()
        assert model._engine.closed
