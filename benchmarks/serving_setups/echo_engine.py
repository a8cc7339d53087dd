"""The stand-in engine of echo_model.py inside the model `llm`: gives the prompt back without computing.

One call of `step` makes one token of every running sequence, or all of them where nobody reads along.
"""

from __future__ import annotations

import queue
import time
from typing import Any

from ..engine import Job, Step  # type: ignore[import-not-found]


class Engine:
    vocab_size = None
    max_seq_len = None

    def __init__(self, parameters: dict[str, str], *, slots: int) -> None:
        self.step_s = float(parameters.get("step_ms", "0")) / 1000
        self.inbox: queue.SimpleQueue[Job | int] = queue.SimpleQueue()
        self.running: dict[int, list[Any]] = {}
        self.last = 0.0

    def check(self, job: Job) -> None:
        pass

    def submit(self, job: Job) -> None:
        self.inbox.put(job)

    def cancel(self, key: int) -> None:
        self.inbox.put(key)

    def step(self, timeout_s: float) -> list[Step]:
        if not self.running:
            try:
                self.take(self.inbox.get(timeout=timeout_s))
            except queue.Empty:
                return []
        while not self.inbox.empty():
            self.take(self.inbox.get())
        if self.step_s:
            time.sleep(max(0.0, self.last + self.step_s - time.monotonic()))
            self.last = time.monotonic()
        steps = []
        for key, entry in list(self.running.items()):
            prompt, most, place, streams = entry
            end = place + 1 if streams else most
            tokens = [prompt[index % len(prompt)] for index in range(place, end)]
            entry[2] = end
            steps.append(Step(key, tokens, "length" if end == most else ""))
            if end == most:
                del self.running[key]
        return steps

    def take(self, item: Job | int) -> None:
        if isinstance(item, int):
            self.running.pop(item, None)
        else:
            self.running[item.key] = [item.prompt, item.max_tokens, 0, item.streams]

    def close(self) -> None:
        pass
