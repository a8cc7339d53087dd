"""The model's own metrics, beside those that Triton has for every model.

Triton's custom metrics live in the server, so each change is a message to it and back. Counts are therefore gathered
here and brought over once a second; only a histogram needs a message per request, which are spread over the rounds.
"""

from __future__ import annotations

from typing import Any

import triton_python_backend_utils as pb_utils

from .answers import Reply

INTERVAL_S = 1.0
OBSERVATIONS = 4
"""Times to first token that one round reports."""
TTFT_BUCKETS_S = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0]

COUNTERS = {
    "trtkit_llm_requests": "Requests answered to their end",
    "trtkit_llm_prompt_tokens": "Tokens of the prompts of these requests",
    "trtkit_llm_completion_tokens": "Tokens generated for them",
    "trtkit_llm_cancelled_requests": "Requests whose client went away",
    "trtkit_llm_refused_requests": "Requests refused: wrong, too late, or the queue was full",
}
GAUGES = {
    "trtkit_llm_running_sequences": "Sequences that the engine is generating",
    "trtkit_llm_waiting_requests": "Requests that wait for a slot",
}
TTFT = "trtkit_llm_time_to_first_token_seconds"


class Metrics:
    """Counts of one model version.

    Attributes:
        cancelled, refused: requests so far.
        running, waiting: now.
    """

    def __init__(self, model: str, version: str) -> None:
        labels = {"model": model, "version": version}
        self._families: list[Any] = []

        def metric(name: str, text: str, kind: Any, **more: Any) -> Any:
            family = pb_utils.MetricFamily(name=name, description=text, kind=kind)
            self._families.append(family)  # a metric lives as long as its family
            return family.Metric(labels=labels, **more)

        kinds = pb_utils.MetricFamily
        self._counters = {name: metric(name, text, kinds.COUNTER) for name, text in COUNTERS.items()}
        self._gauges = {name: metric(name, text, kinds.GAUGE) for name, text in GAUGES.items()}
        # Histograms came with release 24.09.
        histogram = getattr(kinds, "HISTOGRAM", None)
        self._ttft = (
            None
            if histogram is None
            else metric(TTFT, "From a request's arrival to its first text", histogram, buckets=TTFT_BUCKETS_S)
        )
        self._ttft_pending: list[float] = []
        self._requests = self._prompt_tokens = self._completion_tokens = 0
        self.cancelled = self.refused = 0
        self.running = self.waiting = 0
        self._reported: dict[str, int] = {}
        self._next = 0.0

    def first_text(self, seconds: float) -> None:
        """The first text of a request goes out, so long after the request came."""
        if self._ttft is not None:
            self._ttft_pending.append(seconds)

    def finished(self, reply: Reply) -> None:
        """A request is answered."""
        self._requests += 1
        self._prompt_tokens += reply.prompt_tokens
        self._completion_tokens += sum(answer.tokens for answer in reply.answers)

    def report(self, now: float) -> None:
        """Brings the counts over to the server, if it is time; `now` in seconds of the monotonic clock."""
        if self._ttft is not None:
            for seconds in self._ttft_pending[:OBSERVATIONS]:
                self._ttft.observe(seconds)
            del self._ttft_pending[:OBSERVATIONS]
        if now < self._next:
            return
        self._next = now + INTERVAL_S
        values = {
            **dict(zip(COUNTERS, self._counts(), strict=True)),
            **dict(zip(GAUGES, (self.running, self.waiting), strict=True)),
        }
        for name, value in values.items():
            before = self._reported.get(name, 0)
            if value == before:
                continue
            self._reported[name] = value
            if name in self._counters:
                self._counters[name].increment(value - before)
            else:
                self._gauges[name].set(value)

    def _counts(self) -> tuple[int, ...]:
        return (self._requests, self._prompt_tokens, self._completion_tokens, self.cancelled, self.refused)
