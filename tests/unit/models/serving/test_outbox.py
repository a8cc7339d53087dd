"""Responses of several requests go out side by side, those of one in order, and a broken client costs only itself."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import fake_triton
import pytest

PACKAGE = "trtkit.repository.models.serving"
PATIENCE_S = 20


class Reply:
    """The way to one client. `before` runs ahead of each response and may wait or fail."""

    def __init__(self, before: Callable[[], object] = lambda: None) -> None:
        self.before = before
        self.sent: list[tuple[Any, int]] = []

    def send(self, response: Any, flags: int) -> None:
        self.before()
        self.sent.append((response, flags))


@pytest.fixture
def outbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake_triton.module(None))
    names = [f"{PACKAGE}.{name}" for name in ("answers", "kept", "outbox")]
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    box = importlib.import_module(names[-1]).Outbox()
    yield box
    box.close()
    assert not box._helper.is_alive()
    for name in names:
        sys.modules.pop(name, None)


def test_two_requests_do_not_wait_for_each_other(outbox: Any) -> None:
    meeting = threading.Barrier(2)
    replies = [Reply(lambda: meeting.wait(PATIENCE_S)) for _ in range(2)]
    for reply in replies:
        outbox.add(reply, [("whole", 1)])
    assert outbox.deliver() == [], "each waited for the other to be sent as well"
    assert [reply.sent for reply in replies] == [[("whole", 1)]] * 2


def test_the_responses_of_a_request_keep_their_order(outbox: Any) -> None:
    replies = [Reply() for _ in range(50)]
    for part in range(10):
        for reply in replies:
            outbox.add(reply, [(2 * part, 0), (2 * part + 1, 0)])
        if part % 3 == 2:
            assert outbox.deliver() == []
    assert outbox.deliver() == []
    assert all(reply.sent == [(number, 0) for number in range(20)] for reply in replies)
    assert outbox.deliver() == [], "nothing goes out twice"
    assert all(len(reply.sent) == 20 for reply in replies)


def test_a_client_that_is_gone_costs_nobody_else(outbox: Any) -> None:
    def fail() -> None:
        raise RuntimeError("the stream is broken")

    replies = [Reply(fail if number % 2 else lambda: None) for number in range(10)]
    for reply in replies:
        outbox.add(reply, [("a", 0), ("b", 1)])
    assert {id(reply) for reply in outbox.deliver()} == {id(reply) for reply in replies[1::2]}
    assert [len(reply.sent) for reply in replies] == [2, 0] * 5
    outbox.add(replies[0], [("c", 0)])
    assert outbox.deliver() == [], "what was broken is told once"
