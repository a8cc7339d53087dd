"""The `reference` runtime's model as the server calls it: its answers are counted. The model behind it counts, too."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from trtkit import contract, pbtxt
from trtkit.repository.models.reference import __file__ as package
from trtkit.repository.models.reference import loading
from trtkit.repository.models.reference.generation import Generation
from trtkit.repository.models.reference.parameters import Parameters
from trtkit.repository.models.reference.worker import Counts, Worker

MODEL = Path(package).parent / "model.py"
METRICS = "trtkit.repository.models.serving.metrics"
PATIENCE_S = 30.0
ENDLESS = 10**8


class Counting:
    """A model whose next token is the last one plus one, from 999 back to 0. It can be held between two passes."""

    config = SimpleNamespace(vocab_size=1000)

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, input_ids: Any, past_key_values: Any, **_: Any) -> Any:
        assert self.gate.wait(PATIENCE_S)
        rows, columns = input_ids.shape
        past_key_values.update(torch.zeros(rows, 1, columns, 1), torch.zeros(rows, 1, columns, 1), 0)
        return SimpleNamespace(logits=torch.nn.functional.one_hot((input_ids[:, -1:] + 1) % 1000, 1000).float())

    def forward(self, input_ids: Any, past_key_values: Any) -> None:
        """Only its signature is looked at."""


@pytest.fixture
def counting() -> Counting:
    return Counting()


@pytest.fixture
def reference(
    counting: Counting, load: Any, config_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Any]]:
    """`reference(slots)`: the model with so many slots, around a model that counts instead of a checkpoint."""
    before = sys.modules.pop(METRICS, None)  # it keeps the fake that it has imported
    monkeypatch.setattr(loading, "load_checkpoint", lambda parameters, version: loading.Loaded(counting, 2 * ENDLESS))

    def make(slots: int) -> Any:
        message = pbtxt.model_config(
            "tensorrt_llm",
            inputs=contract.llm_inputs(reference=True),
            outputs=contract.llm_outputs(reference=True),
            max_batch_size=slots,
            decoupled=True,
            backend="python",
            parameters={"checkpoint_dir": "checkpoint"},
        )
        (tmp_path / "model.py").write_bytes(MODEL.read_bytes())
        return load(tmp_path, config_of(pbtxt.dumps(message)))

    yield make
    counting.gate.set()
    sys.modules.pop(METRICS, None)
    if before is not None:
        sys.modules[METRICS] = before


def ask(loaded: Any, prompt: list[int], count: int, request_id: str = "", **more: Any) -> Any:
    request = loaded.request(
        request_id=request_id,
        input_ids=np.array([prompt], np.int32),
        input_lengths=np.array([len(prompt)], np.int32),
        request_output_len=np.array([count], np.int32),
        streaming=np.array([[True]]),
        **more,
    )
    assert loaded.model.execute([request]) is None
    return request


def metrics(loaded: Any) -> dict[str, float]:
    return {
        name.removeprefix("trtkit_reference_"): metric.value for name, metric in loaded.triton.MetricFamily.made.items()
    }


def until(true: Callable[[], Any]) -> None:
    limit = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < limit, "it did not happen"
        time.sleep(0.002)


def test_everything_that_was_done_is_counted_in_the_end(reference: Any, counting: Counting) -> None:
    loaded = reference(2)
    assert {metric.labels["model"] for metric in loaded.triton.MetricFamily.made.values()} == {"m"}
    done = [ask(loaded, [10 * number], 5) for number in range(1, 4)]
    for request in done:
        request.wait()
    tokens = [[piece.tensors["output_ids"].item() for piece in request.sender.responses] for request in done]
    assert tokens == [[10 * number + step for step in range(1, 6)] for number in range(1, 4)]
    stopped = ask(loaded, [1], ENDLESS, "named")
    until(lambda: stopped.sender.responses)
    stop = loaded.request(request_id="named", stop=np.array([[True]]))
    loaded.model.execute([stop])
    gone = ask(loaded, [1], ENDLESS)
    gone.sender.cancelled = True
    for request in (stopped, gone):
        request.wait()
    refused = ask(loaded, [1000], 5)
    assert "not in the vocabulary" in str(refused.wait().error)
    pieces = sum(len(request.sender.responses) - 1 for request in (stopped, gone))  # the last one has no token
    expected = {
        "requests_total": 3,
        "generated_tokens_total": 15 + pieces,
        "cancelled_requests_total": 2,
        "running_sequences": 0,
        "waiting_requests": 0,
    }
    until(lambda: metrics(loaded) == expected)


def test_what_runs_and_what_waits_is_shown_meanwhile(reference: Any, counting: Counting) -> None:
    loaded = reference(2)
    counting.gate.clear()
    requests = [ask(loaded, [1], ENDLESS) for _ in range(5)]
    counting.gate.set()
    until(lambda: (metrics(loaded)["running_sequences"], metrics(loaded)["waiting_requests"]) == (2, 3))
    for request in requests[2:]:
        request.sender.cancelled = True
    until(lambda: metrics(loaded)["waiting_requests"] == 0)
    assert metrics(loaded)["running_sequences"] == 2
    assert metrics(loaded)["requests_total"] == 0


def test_a_watcher_that_raises_is_left_alone(counting: Counting) -> None:
    lines: list[str] = []
    shown: list[Counts] = []
    over = threading.Event()

    def watch(counts: Counts) -> None:
        shown.append(counts)
        raise ConnectionError("the server is gone")

    class Client:
        tokens = 0

        def progressed(self, progress: Any) -> None:
            self.tokens += progress.token is not None
            if progress.generation.done:
                over.set()

        def failed(self, message: str, code: str) -> None:
            raise AssertionError(message)

        def is_cancelled(self) -> bool:
            return False

    worker, client = Worker(counting, 1, lines.append, watch), Client()
    worker.submit(client, [Generation([1], 40)])
    assert over.wait(PATIENCE_S)
    worker.close()
    assert (client.tokens, len(shown)) == (40, 1)
    assert lines == ["the counts are shown no more: ConnectionError('the server is gone')"]


def test_both_models_load_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model gets one thread, unless it is told otherwise; a large one torch's own choice."""
    from trtkit import checkpoint
    from trtkit.convert import readback

    threads: list[int] = []
    sizes = iter([loading.SMALL - 1, loading.SMALL, 10])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(checkpoint, "open_checkpoint", lambda folder: SimpleNamespace(config={
        "max_position_embeddings": 64, "folder": folder,
    }))  # fmt: skip

    def model(folder: Path) -> Any:
        size = next(sizes)
        return SimpleNamespace(
            parameters=lambda: [SimpleNamespace(numel=lambda: size)],
            config=SimpleNamespace(vocab_size=7),
            folder=folder,
        )

    monkeypatch.setattr(readback, "load_transformers_model", model)
    for more in ({}, {}, {"torch_threads": "3", "max_seq_len": "32"}):
        loaded = loading.load_checkpoint(Parameters({"checkpoint_dir": "c", **more}), tmp_path)
        assert (loaded.model.folder, loaded.vocab_size) == (tmp_path / "c", 7)
        assert loaded.max_seq_len == int(more.get("max_seq_len", "64"))
    assert threads == [1, 3]
