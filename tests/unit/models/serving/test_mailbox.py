"""The mailbox between an engine's threads and its step."""

from __future__ import annotations

import threading

from trtkit.repository.models.serving.engine import Step
from trtkit.repository.models.serving.mailbox import Mailbox


def test_steps_of_one_key_are_one() -> None:
    mail = Mailbox()
    mail.open(1)
    mail.open(2)
    mail.put(Step(1, [5], log_probs=[-1.0]))
    mail.put(Step(2, [7]))
    mail.put(Step(1, [6, 8], log_probs=[-2.0, -3.0]))
    mail.put(Step(1, finish="stop"))
    assert mail.take(0) == [Step(1, [5, 6, 8], "stop", log_probs=[-1.0, -2.0, -3.0]), Step(2, [7])]
    assert mail.take(0) == []


def test_nothing_comes_before_open_nor_after_an_end_nor_after_close() -> None:
    mail = Mailbox()
    mail.put(Step(1, [5]))
    mail.open(1)
    mail.put(Step(1))  # says nothing
    mail.put(Step(1, [6], error="broken", code="INVALID_ARG"))
    mail.put(Step(1, [7]))
    assert mail.take(0) == [Step(1, [6], error="broken", code="INVALID_ARG")]
    mail.open(2)
    mail.put(Step(2, [5]))
    assert mail.close(2)
    assert not mail.close(2)
    mail.put(Step(2, [6]))
    assert mail.take(0) == []
    assert not mail.is_open(2)


def test_closing_wakes_whoever_waits() -> None:
    mail = Mailbox()
    waiter = threading.Thread(target=mail.take, args=(600,), daemon=True)
    waiter.start()
    mail.close(3)
    waiter.join(60)
    assert not waiter.is_alive()
