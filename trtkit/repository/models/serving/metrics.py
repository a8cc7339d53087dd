"""A python model's own metrics, beside those that Triton has for every model.

Triton's custom metrics live in the server, so each change is a message to it and back, about 60 us of CPU. Counters and
gauges are therefore gathered here and brought over once a second; what a histogram has seen is spread over the calls.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import triton_python_backend_utils as pb_utils

INTERVAL_S = 1.0
OBSERVATIONS = 4
"""Observations that one call of `report` hands over, at least."""
SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0]
"""Upper bounds of the buckets of a histogram."""


class Metrics:
    """The metrics of one model version.

    Args:
        labels: of every metric.
        counters, gauges, histograms: full name and description of each. Histograms are of seconds, and a server older
            than release 24.09 does not have them.

    Attributes:
        values: counters and gauges by name, to be changed by the model.
    """

    def __init__(
        self,
        labels: Mapping[str, str],
        *,
        counters: Mapping[str, str],
        gauges: Mapping[str, str] | None = None,
        histograms: Mapping[str, str] | None = None,
    ) -> None:
        self._families: list[Any] = []  # a metric lives as long as its family
        kinds = pb_utils.MetricFamily
        self._counters = {name: self._metric(labels, name, text, kinds.COUNTER) for name, text in counters.items()}
        self._gauges = {name: self._metric(labels, name, text, kinds.GAUGE) for name, text in (gauges or {}).items()}
        histogram = getattr(kinds, "HISTOGRAM", None)
        self._histograms = {
            name: self._metric(labels, name, text, histogram, buckets=SECONDS)
            for name, text in (histograms or {}).items()
            if histogram is not None
        }
        self.values: dict[str, float] = dict.fromkeys([*self._counters, *self._gauges], 0)
        self._reported = dict(self.values)
        self._observed: deque[tuple[Any, float]] = deque()
        self._next = 0.0

    def observe(self, name: str, seconds: float) -> None:
        """One more value of a histogram."""
        if name in self._histograms:
            self._observed.append((self._histograms[name], seconds))

    def report(self, now: float) -> None:
        """Brings over what is due; `now` in seconds of the monotonic clock. To be called often."""
        for _ in range(min(max(OBSERVATIONS, len(self._observed) // 16), len(self._observed))):
            histogram, seconds = self._observed.popleft()
            histogram.observe(seconds)
        if now < self._next:
            return
        self._next = now + INTERVAL_S
        for name, value in self.values.items():
            before = self._reported[name]
            if value == before:
                continue
            self._reported[name] = value
            if name in self._counters:
                self._counters[name].increment(value - before)
            else:
                self._gauges[name].set(value)

    def _metric(self, labels: Mapping[str, str], name: str, text: str, kind: Any, **more: Any) -> Any:
        family = pb_utils.MetricFamily(name=name, description=text, kind=kind)
        self._families.append(family)
        return family.Metric(labels=dict(labels), **more)
