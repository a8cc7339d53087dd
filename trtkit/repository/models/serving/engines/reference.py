"""The `reference` runtime: a TRT-LLM checkpoint on the CPU, in this process. No other engine needs trtkit installed."""

from __future__ import annotations

import threading
from collections import deque
from pathlib import Path
from typing import Any

from ..engine import Job, RequestError, Step


class Engine:
    """In-flight batching of the checkpoint in `checkpoint_dir`.

    Args:
        parameters: `checkpoint_dir`; optionally `max_seq_len` and `torch_threads`.
        slots: sequences that run at once; others wait in order of arrival.
    """

    def __init__(self, parameters: dict[str, str], *, slots: int) -> None:
        from trtkit.repository.models.reference.inflight import InflightBatch
        from trtkit.repository.models.reference.loading import load_checkpoint
        from trtkit.repository.models.reference.parameters import Parameters

        loaded = load_checkpoint(Parameters(parameters), Path(parameters["version_dir"]))
        self.max_seq_len: int | None = loaded.max_seq_len
        self.vocab_size: int | None = loaded.vocab_size
        self._batch = InflightBatch(loaded.model, slots)
        self._wake = threading.Condition()
        self._inbox: list[Job | int] = []  # what to run, or the key of what to stop
        # Only the thread that steps touches these.
        self._waiting: deque[Any] = deque()
        self._keys: dict[Any, int] = {}

    def check(self, job: Job) -> None:
        if job.sampling.lora_task_id is not None or job.sampling.guide_type or job.sampling.guide:
            raise RequestError("the reference runtime has neither LoRA adapters nor guided decoding", "UNSUPPORTED")
        numbers = [*job.prompt, *job.end_ids, *(number for word in job.bad_words for number in word)]
        if self.vocab_size is not None and (max(numbers) >= self.vocab_size or min(numbers) < 0):
            raise RequestError(f"a token id is not in the model's vocabulary of {self.vocab_size}")

    def submit(self, job: Job) -> None:
        self._tell(job)

    def cancel(self, key: int) -> None:
        self._tell(key)

    def step(self, timeout_s: float) -> list[Step]:
        with self._wake:
            if not (self._inbox or self._batch.running or self._waiting):
                self._wake.wait(timeout_s)
            inbox, self._inbox = self._inbox, []
        for item in inbox:
            if isinstance(item, int):
                self._stop(item)
            else:
                generation = _generation(item)
                self._keys[generation] = item.key
                self._waiting.append(generation)
        # A sequence that joins makes two tokens in its first round: each is told before the next one is made.
        steps = []
        if self._waiting and self._batch.free:
            count = min(self._batch.free, len(self._waiting))
            joined = self._batch.join([self._waiting.popleft() for _ in range(count)])
            steps += [self._step(generation, token) for generation, token in joined]
        if self._batch.running:
            steps += [self._step(generation, token) for generation, token in self._batch.step()]
        return _merged(steps)

    def close(self) -> None:
        self._batch.clear()

    def _tell(self, item: Job | int) -> None:
        with self._wake:
            self._inbox.append(item)
            self._wake.notify()

    def _stop(self, key: int) -> None:
        for generation in [generation for generation, number in self._keys.items() if number == key]:
            del self._keys[generation]
            self._batch.leave(generation)
            if generation in self._waiting:
                self._waiting.remove(generation)

    def _step(self, generation: Any, token: int | None) -> Step:
        key = self._keys[generation]
        if generation.done:
            del self._keys[generation]
        if generation.error is not None:
            return Step(key, error=generation.error)
        finish = "" if generation.finish is None else "length" if generation.finish == "length" else "stop"
        if token is None:
            return Step(key, finish=finish)
        return Step(key, (token,), finish, log_probs=generation.log_probs[-1:])


def _generation(job: Job) -> Any:
    from trtkit.repository.models.reference.generation import Generation, SamplingParams

    asked = job.sampling
    given = {
        name: value for name in SamplingParams.__dataclass_fields__ if (value := getattr(asked, name, None)) is not None
    }
    return Generation(
        job.prompt,
        job.max_tokens,
        params=SamplingParams(**given),
        end_ids=job.end_ids,
        bad_words=[tuple(word) for word in job.bad_words],
        wants_log_probs=job.log_probs,
    )


def _merged(steps: list[Step]) -> list[Step]:
    """One step per sequence: one that joins makes two tokens in its first round."""
    found: dict[int, Step] = {}
    for step in steps:
        before = found.get(step.key)
        found[step.key] = step if before is None else Step(
            step.key, (*before.tokens, *step.tokens), step.finish, step.error,
            log_probs=(*before.log_probs, *step.log_probs),
        )  # fmt: skip
    return list(found.values())
