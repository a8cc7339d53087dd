"""Where the threads of an engine leave what is new, and its `step` collects it."""

from __future__ import annotations

import threading

from .engine import Step


class Mailbox:
    """Steps by key, merged: what comes under one key between two visits is one step. Safe for any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open: set[int] = set()
        self._steps: dict[int, Step] = {}
        self._woken = False

    def open(self, key: int) -> None:
        """From now on steps of this key are taken, until one says the end."""
        with self._changed:
            self._open.add(key)

    def put(self, step: Step) -> None:
        """Leaves a step; one that says nothing, or whose key is not open, is dropped."""
        with self._changed:
            if step.key not in self._open or not (step.tokens or step.finish or step.error):
                return
            if step.finish or step.error:
                self._open.remove(step.key)
            before = self._steps.get(step.key)
            if before is not None:
                tokens, log_probs = [*before.tokens, *step.tokens], [*before.log_probs, *step.log_probs]
                step = step._replace(tokens=tokens, log_probs=log_probs)
            self._steps[step.key] = step
            self._changed.notify()

    def close(self, key: int) -> bool:
        """Drops what is there and what will come under a key, and wakes `take`. Says whether the key was open."""
        with self._changed:
            known = key in self._open
            self._open.discard(key)
            self._steps.pop(key, None)
            self._woken = True
            self._changed.notify()
            return known

    def is_open(self, key: int) -> bool:
        return key in self._open

    def take(self, timeout_s: float) -> list[Step]:
        """All that has come; waits at most so long for something."""
        with self._changed:
            if not (self._steps or self._woken):
                self._changed.wait(timeout_s)
            steps, self._steps, self._woken = list(self._steps.values()), {}, False
        return steps
