"""The curves of the report, small enough for a file: quantiles, histograms and what happened over time. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtkit.loadtest.columns import Columns

PERCENT = np.unique(np.concatenate([np.linspace(0, 100, 201), np.linspace(99, 100, 21)]))
"""Where the distribution curves are sampled, in percent; denser in the tail."""
BINS_PER_DECADE = 100
"""Of the histograms: bin k holds `10**(k/100) <= milliseconds < 10**((k+1)/100)`, so bins of any two runs agree."""
DISTRIBUTIONS = ("e2e", "e2e_from_send", "ttft", "itl")
MOST_POINTS = 80
"""Points of a curve over time, and of the one over token positions."""


def chart_series(columns: Columns, values_ns: Mapping[str, NDArray[Any] | None], unit: str | None) -> dict[str, Any]:
    """Everything that the charts draw except the single requests, which `requests` holds."""
    drawn = {key: column for key in DISTRIBUTIONS if (column := values_ns[key]) is not None and len(column)}
    inside = (columns.gap_end > columns.window[0]) & (columns.gap_end <= columns.window[1])
    return {
        "percent": np.round(PERCENT, 3).tolist(),
        "quantiles_ms": {key: quantiles(column) for key, column in drawn.items()},
        "bins_per_decade": BINS_PER_DECADE,
        "histogram_ms": {key: histogram(column) for key, column in drawn.items()},
        "itl_by_position": by_position(columns.gap[inside], columns.gap_position[inside]),
        "timeline": timeline(columns, unit),
    }


def quantiles(values_ns: NDArray[np.int64]) -> list[float]:
    """Milliseconds at each of `PERCENT`."""
    return _round(np.percentile(values_ns, PERCENT) / 1e6)


def histogram(values_ns: NDArray[np.int64]) -> list[list[int]]:
    """`[bin, count]` of every bin that is not empty. Values below 1 microsecond count as 1 microsecond."""
    bins = np.floor(np.log10(np.maximum(values_ns, 1000) / 1e6) * BINS_PER_DECADE).astype(np.int64)
    places, counts = np.unique(bins, return_counts=True)
    return [[int(place), int(number)] for place, number in zip(places, counts, strict=True)]


def by_position(gaps_ns: NDArray[np.int64], positions: NDArray[np.int64]) -> dict[str, list[Any]]:
    """Median and p99 of the gaps before the 2nd, 3rd, ... chunk. In long answers neighbours share a point."""
    result: dict[str, list[Any]] = {"position": [], "count": [], "p50_ms": [], "p99_ms": []}
    if not len(gaps_ns):
        return result
    width = -(-int(positions.max()) // MOST_POINTS)
    group = (positions - 1) // width
    order = np.argsort(group, kind="stable")
    groups, starts = np.unique(group[order], return_index=True)
    for number, part in zip(groups.tolist(), np.split(gaps_ns[order], starts[1:]), strict=True):
        p50, p99 = np.percentile(part, [50, 99]) / 1e6
        result["position"].append(number * width + 1 + (width - 1) / 2 + 1)
        result["count"].append(len(part))
        result["p50_ms"].append(round(float(p50), 4))
        result["p99_ms"].append(round(float(p99), 4))
    return result


def timeline(columns: Columns, unit: str | None) -> dict[str, Any]:
    """What happened in each stretch of time, from start until the last answer.

    Returns:
        `bin_s`: length of a stretch; `t`: its middle, in seconds from the start; `in_flight`: mean over the stretch;
        `completed_per_s`, `errors_per_s`, `dropped_per_s`; `output_per_s` (absent without a unit).
    """
    went = columns.outcome != "dropped"
    last = max(int(columns.end.max(initial=0)), int(columns.window[1]), 1)
    bin_ns = _nice_step(last / MOST_POINTS)
    edges = np.arange(0, last + bin_ns, bin_ns, dtype=np.int64)
    seconds = bin_ns / 1e9

    def per_second(times: NDArray[np.int64], weights: NDArray[np.float64] | None = None) -> list[float]:
        return _round(np.histogram(times, edges, weights=weights)[0] / seconds)

    busy = _area_before(edges, columns.sent[went]) - _area_before(edges, columns.end[went])
    result: dict[str, Any] = {
        "bin_s": seconds,
        "t": _round((edges[:-1] + bin_ns / 2) / 1e9),
        "in_flight": _round(np.diff(busy) / bin_ns),
        "completed_per_s": per_second(columns.end[columns.outcome == "ok"]),
        "errors_per_s": per_second(columns.end[columns.outcome == "error"]),
        "dropped_per_s": per_second(columns.intended[~went]),
    }
    if unit is not None:
        result["output_per_s"] = per_second(columns.chunk_time, columns.chunk_weight)
    return result


def _area_before(edges: NDArray[np.int64], times: NDArray[np.int64]) -> NDArray[np.float64]:
    """For each edge, the sum over all earlier times of how much earlier they are."""
    times = np.sort(times)
    passed = np.searchsorted(times, edges)
    sums = np.concatenate([[0.0], np.cumsum(times, dtype=np.float64)])
    return np.asarray(passed * edges - sums[passed], dtype=np.float64)


def _nice_step(nanoseconds: float) -> int:
    """The next of 1, 2, 5, 10, ... milliseconds."""
    for power in range(12):
        for factor in (1, 2, 5):
            if factor * 10**power * 1_000_000 >= nanoseconds:
                return int(factor * 10**power * 1_000_000)
    raise ValueError(f"no step of {nanoseconds} ns")


def _round(values: NDArray[np.float64]) -> list[float]:
    return [round(float(value), 4) for value in values]
