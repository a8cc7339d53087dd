"""The worker's thread: order, cancellation, clients that break, closing. The model counts, so that steps are fast."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trtkit.repository.models.reference.generation import Generation
from trtkit.repository.models.reference.inflight import Progress
from trtkit.repository.models.reference.worker import Worker

PATIENCE_S = 30.0
POISON = 91
ENDLESS = 10**9


class Counting:
    """A model whose next token is the last one plus one, from 999 back to 0. It can be held between two passes."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.largest = 0
        self.immune = False
        self.config = SimpleNamespace()

    def __call__(self, input_ids: Any, past_key_values: Any, **_: Any) -> Any:
        assert self.gate.wait(PATIENCE_S)
        if (input_ids == POISON).any() and not self.immune:
            raise RuntimeError("poison")
        rows, columns = input_ids.shape
        self.largest = max(self.largest, rows)
        past_key_values.update(torch.zeros(rows, 1, columns, 1), torch.zeros(rows, 1, columns, 1), 0)
        return SimpleNamespace(logits=torch.nn.functional.one_hot((input_ids[:, -1:] + 1) % 1000, 1000).float())

    def forward(self, input_ids: Any, past_key_values: Any) -> None:
        """Only its signature is looked at."""


class Recorder:
    """A client that writes everything down."""

    def __init__(self, on_token: Callable[[Recorder], None] = lambda client: None) -> None:
        self.tokens: list[int | None] = []
        self.error: tuple[str, str] | None = None
        self.cancelled = False
        self.over = threading.Event()
        self.left = 1
        self._on_token = on_token

    def progressed(self, progress: Progress) -> None:
        assert not self.over.is_set()
        self.tokens.append(progress.token)
        self.left -= progress.generation.done
        self._on_token(self)
        if not self.left:
            self.over.set()

    def failed(self, message: str, code: str) -> None:
        assert not self.over.is_set()
        self.error = (message, code)
        self.over.set()

    def is_cancelled(self) -> bool:
        return self.cancelled

    def wait(self) -> Recorder:
        assert self.over.wait(PATIENCE_S), "no answer"
        return self


@pytest.fixture
def model() -> Counting:
    return Counting()


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def make_worker(model: Counting, lines: list[str]) -> Iterator[Callable[[int], Worker]]:
    workers: list[Worker] = []

    def make(slots: int) -> Worker:
        workers.append(Worker(model, slots, lines.append))
        return workers[-1]

    yield make
    model.gate.set()
    for worker in workers:
        worker.close()


def test_more_requests_than_slots_are_served_in_order(make_worker: Any, model: Counting) -> None:
    worker = make_worker(3)
    finished: list[int] = []
    clients = [Recorder() for _ in range(10)]
    model.gate.clear()
    for index, client in enumerate(clients):
        client._on_token = lambda client, index=index: finished.append(index) if not client.left else None
        worker.submit(client, [Generation([index], 5)])
    model.gate.set()
    for index, client in enumerate(clients):
        assert client.wait().tokens == [index + 1 + step for step in range(5)]
        assert client.error is None
    assert finished == sorted(finished)
    assert model.largest == 3


def test_the_rows_of_one_client_run_together(make_worker: Any, model: Counting) -> None:
    client = Recorder()
    client.left = 4
    make_worker(4).submit(client, [Generation([10 * row], 3) for row in range(4)])
    assert sorted(client.wait().tokens) == sorted(10 * row + step for row in range(4) for step in (1, 2, 3))
    assert model.largest == 4


def test_a_cancelled_client_frees_its_slot(make_worker: Any) -> None:
    worker = make_worker(1)

    def cancel(client: Recorder) -> None:
        client.cancelled = True

    first, second = Recorder(cancel), Recorder()
    worker.submit(first, [Generation([0], ENDLESS)])
    worker.submit(second, [Generation([7], 2)])
    assert first.wait().error == ("cancelled", "CANCELLED")
    assert len(first.tokens) <= 4
    assert second.wait().tokens == [8, 9]
    assert not worker._jobs


def test_every_running_client_is_asked(make_worker: Any, model: Counting) -> None:
    worker = make_worker(3)
    model.gate.clear()
    clients = [Recorder() for _ in range(3)]
    for client in clients:
        worker.submit(client, [Generation([100], ENDLESS)])
    model.immune = True  # they count on and on
    model.gate.set()
    for client in reversed(clients):
        client.cancelled = True
        assert client.wait().error == ("cancelled", "CANCELLED")


def test_a_waiting_client_can_be_cancelled(make_worker: Any, model: Counting) -> None:
    worker = make_worker(1)
    running, waiting, behind = Recorder(), Recorder(), Recorder()
    model.immune = True
    waiting.cancelled = True
    worker.submit(running, [Generation([0], ENDLESS)])
    worker.submit(waiting, [Generation([5], 3)])
    worker.submit(behind, [Generation([7], 2)])
    assert waiting.wait().error == ("cancelled", "CANCELLED")
    assert waiting.tokens == []
    assert not running.over.is_set()
    running.cancelled = True
    assert behind.wait().tokens == [8, 9]


def test_stop_by_name(make_worker: Any, model: Counting) -> None:
    worker = make_worker(2)
    model.gate.clear()
    named, other = Recorder(), Recorder()
    worker.submit(named, [Generation([0], ENDLESS)], "a")
    worker.submit(other, [Generation([0], 3)], "b")
    worker.stop("a")
    worker.stop("nobody")
    model.gate.set()
    assert named.wait().error == ("cancelled", "CANCELLED")
    assert other.wait().tokens == [1, 2, 3]


def test_stop_does_not_reach_later_requests_of_the_name(make_worker: Any) -> None:
    worker = make_worker(1)
    worker.stop("a")
    later = Recorder()
    worker.submit(later, [Generation([0], 2)], "a")
    assert later.wait().tokens == [1, 2]


def test_a_client_that_raises_is_dropped_alone(make_worker: Any, lines: list[str]) -> None:
    worker = make_worker(2)

    def break_down(client: Recorder) -> None:
        raise ConnectionError("gone")

    broken, healthy = Recorder(break_down), Recorder()
    worker.submit(broken, [Generation([0], ENDLESS)])
    worker.submit(healthy, [Generation([0], 4)])
    assert healthy.wait().tokens == [1, 2, 3, 4]
    assert broken.tokens == [1]
    assert "gone" in lines[0]
    third = Recorder()
    worker.submit(third, [Generation([0], 1), Generation([5], 1)])
    third.left = 2
    assert sorted(third.wait().tokens) == [1, 6]


def test_a_failing_request_gets_an_error_and_the_others_go_on(make_worker: Any) -> None:
    worker = make_worker(2)
    bad, good = Recorder(), Recorder()
    worker.submit(bad, [Generation([POISON], 5)])
    worker.submit(good, [Generation([1], 3)])
    message, code = bad.wait().error or ("", "")
    assert "RuntimeError: poison" in message
    assert code == "INTERNAL"
    assert good.wait().tokens == [2, 3, 4]


def test_a_step_that_fails_ends_those_who_run_and_no_one_else(make_worker: Any) -> None:
    worker = make_worker(1)
    victim, next_one = Recorder(), Recorder()
    worker.submit(victim, [Generation([POISON - 3], 9)])
    worker.submit(next_one, [Generation([1], 2)])
    assert victim.wait().error is not None
    assert victim.tokens == [POISON - 2, POISON - 1, POISON]
    assert next_one.wait().tokens == [2, 3]


def test_an_error_in_the_loop_itself_is_told_and_survived(
    make_worker: Any, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker(1)
    broken = threading.Event()
    look = worker._look_for_cancelled

    def break_once() -> None:
        if not broken.is_set():
            broken.set()
            raise ZeroDivisionError("bug")
        look()

    monkeypatch.setattr(worker, "_look_for_cancelled", break_once)
    first, second = Recorder(), Recorder()
    worker.submit(first, [Generation([0], ENDLESS)])
    message, code = first.wait().error or ("", "")
    assert "ZeroDivisionError: bug" in message
    assert code == "INTERNAL"
    worker.submit(second, [Generation([0], 2)])
    assert second.wait().tokens == [1, 2]
    assert "bug" in lines[0]


def test_clients_that_cannot_even_be_asked_or_told(make_worker: Any, lines: list[str]) -> None:
    class Gone(Recorder):
        def is_cancelled(self) -> bool:
            raise ConnectionError("cannot ask")

        def failed(self, message: str, code: str) -> None:
            raise ConnectionError("cannot tell")

    worker = make_worker(2)
    worker.submit(Gone(), [Generation([0], ENDLESS)])
    worker.submit(Gone(), [Generation([POISON], ENDLESS)])
    worker.submit(Gone(), [Generation([0], ENDLESS)], "a")
    worker.stop("a")
    healthy = Recorder()
    worker.submit(healthy, [Generation([0], 5)])
    assert healthy.wait().tokens == [1, 2, 3, 4, 5]
    assert {"ask", "tell"} <= set(" ".join(lines).replace("'", " ").split())


def test_closing_answers_everybody(model: Counting) -> None:
    worker = Worker(model, 1)
    model.immune = True
    clients = [Recorder() for _ in range(3)]
    running = threading.Event()
    clients[0]._on_token = lambda client: running.set()
    for client in clients:
        worker.submit(client, [Generation([0], ENDLESS)])
    assert running.wait(PATIENCE_S)
    worker.close()
    late = Recorder()
    worker.submit(late, [Generation([0], 1)])
    for client in (*clients, late):
        assert client.wait().error == ("the model is being unloaded", "UNAVAILABLE")
    assert not worker._thread.is_alive()
