"""Responses on their way to the server, carried by two threads.

Each response is a message to the server and an answer to wait for, about 150 us of which most is waiting. Two threads
that wait in turn carry half as many again (benchmarks/serving_path.py). The responses of one request go in order.
"""

from __future__ import annotations

import queue
import threading
from collections import deque

import triton_python_backend_utils as pb_utils

from .answers import Piece, Reply

Groups = deque[tuple[Reply, list[Piece]]]


class Outbox:
    """Collects responses and sends them together. One thread uses it; a second one helps while that waits."""

    def __init__(self) -> None:
        self._pieces: dict[Reply, list[Piece]] = {}
        self._broken: list[Reply] = []
        self._work: queue.SimpleQueue[Groups | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._helper = threading.Thread(target=self._help, name="llm-outbox", daemon=True)
        self._helper.start()

    def add(self, reply: Reply, pieces: list[Piece]) -> None:
        """Responses of one request with their flags, behind those that are there already."""
        self._pieces.setdefault(reply, []).extend(pieces)

    def deliver(self) -> list[Reply]:
        """Sends everything. Returns the requests whose responses could not be sent."""
        if not self._pieces:
            return []
        groups: Groups = deque(self._pieces.items())
        self._pieces = {}
        helped = len(groups) > 1
        if helped:
            self._work.put(groups)
        self._carry(groups)
        if helped:
            self._done.get()
        broken, self._broken = self._broken, []
        return broken

    def close(self) -> None:
        """Ends the helper."""
        self._work.put(None)
        self._helper.join(5)

    def _help(self) -> None:
        while (groups := self._work.get()) is not None:
            self._carry(groups)
            self._done.put(None)

    def _carry(self, groups: Groups) -> None:
        while True:
            try:
                reply, pieces = groups.popleft()
            except IndexError:
                return
            try:
                for response, flags in pieces:
                    reply.send(response, flags)
            except BaseException as error:
                pb_utils.Logger.log_error(f"a client was dropped: {error!r}")
                self._broken.append(reply)
