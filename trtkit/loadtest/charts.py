"""What the charts of the report show, as plain data that `assets/report.js` draws. Pure.

A chart is `{"title", "note", "x", "y", "log_x", "data", "series", "window"}`: `data` is one list for x and one per
series; a series has a label, a colour (index into the palette, or "error") and a style (line, dash, steps or points).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Chart = dict[str, Any]

MOST_DOTS = 3000
"""Requests drawn one by one; of more, a regular sample and the slowest."""
MOST_BARS = 48
CURVE_POINTS = 240
LOG_FROM = 30
"""Ratio of largest to smallest value from which an axis is logarithmic."""


def comparison_charts(results: Sequence[dict[str, Any]]) -> list[Chart]:
    """Distributions, with one series per scenario."""
    charts = [
        cumulative(results, "e2e", "End-to-end latency", "Share of requests that were answered within this time."),
        cumulative(
            results, "ttft", "Time to first token", "Share of requests whose first token came within this time."
        ),
        histogram(results, "ttft", "Time to first token, distribution", "Share of requests per bar."),
        histogram(results, "itl", "Inter-token latency, distribution", "Share of all gaps between chunks per bar."),
    ]
    return [chart for chart in charts if chart is not None]


def scenario_charts(result: dict[str, Any]) -> list[Chart]:
    """What happened over time and by token position in one scenario."""
    charts = [latency_over_time(result), in_flight(result), completions(result), output(result)]
    charts += [by_position(result), schedule_error(result)]
    return [chart for chart in charts if chart is not None]


def cumulative(results: Sequence[dict[str, Any]], key: str, title: str, note: str) -> Chart | None:
    """The cumulative distribution of a latency, on one time axis for all scenarios."""
    found = [(place, result) for place, result in enumerate(results) if key in result["series"]["quantiles_ms"]]
    if not found:
        return None
    columns = [np.array(result["series"]["quantiles_ms"][key]) for _, result in found]
    low, high = min(column.min() for column in columns), max(column.max() for column in columns)
    log = _is_log(low, high)
    low, high = low * 0.95, high * 1.05 + 1e-3
    grid = np.geomspace(max(low, 1e-3), high, CURVE_POINTS) if log else np.linspace(low, high, CURVE_POINTS)
    # A step of many equal values keeps its edge only when its place is on the grid.
    grid = np.unique(np.concatenate([grid, *(np.percentile(column, [0, 50, 100]) for column in columns)]))
    data = [_round(grid)]
    for (_, result), column in zip(found, columns, strict=True):
        data.append(_round(np.interp(grid, column, np.array(result["series"]["percent"]), left=0.0, right=100.0)))
    series = [_series(result["scenario"]["name"], place) for place, result in found]
    return _chart(title, note, ("ms", "%"), data, series, log_x=log, y_range=[0, 100])


def histogram(results: Sequence[dict[str, Any]], key: str, title: str, note: str) -> Chart | None:
    """Bars of equal width on a logarithmic axis, the same for all scenarios."""
    found = [(place, result) for place, result in enumerate(results) if key in result["series"]["histogram_ms"]]
    if not found:
        return None
    per_decade = found[0][1]["series"]["bins_per_decade"]
    bins = [np.array(result["series"]["histogram_ms"][key], dtype=np.int64) for _, result in found]
    first, last = min(column[:, 0].min() for column in bins), max(column[:, 0].max() for column in bins)
    width = -(-int(last - first + 1) // MOST_BARS)
    first, bars = int(first) - 2 * width, int(last - first) // width + 5
    edges = 10 ** ((first + width * np.arange(bars + 1)) / per_decade)
    data = [_round(edges)]
    for column in bins:
        shares = np.zeros(bars + 1)
        np.add.at(shares, (column[:, 0] - first) // width, column[:, 1])
        data.append(_round(100 * shares / shares.sum()))
    series = [_series(result["scenario"]["name"], place, "steps") for place, result in found]
    return _chart(title, note, ("ms", "%"), data, series, log_x=_is_log(edges[0], edges[-1]))


def latency_over_time(result: dict[str, Any]) -> Chart | None:
    """One dot per request at the time it was due."""
    raw = result["requests"]
    went = [place for place, outcome in enumerate(raw["outcome"]) if outcome in ("ok", "error")]
    if not went:
        return None
    intended, end = (np.array([raw[key][place] for place in went], dtype=np.float64) for key in ("intended", "end"))
    first = np.array([np.nan if raw["first"][place] is None else raw["first"][place] for place in went])
    ok = np.array([raw["ok"][place] for place in went])
    chosen, note = _sample(end - intended)
    order = chosen[np.argsort(intended[chosen], kind="stable")]
    intended, end, first, ok = intended[order], end[order], first[order], ok[order]
    data = [_round(intended / 1e6), _round(np.where(ok, end - intended, np.nan) / 1e3)]
    series = [_series("end to end", 0, "points")]
    if not np.isnan(first).all():
        data.append(_round(np.where(ok, first - intended, np.nan) / 1e3))
        series.append(_series("time to first token", 1, "points"))
    if not ok.all():
        data.append(_round(np.where(ok, np.nan, end - intended) / 1e3))
        series.append(_series("failed", "error", "points"))
    return _chart("Latency over time", note, ("s", "ms"), data, series, window=_window(result))


def in_flight(result: dict[str, Any]) -> Chart:
    line = result["series"]["timeline"]
    note = "Sent and not yet answered. Rising: the server does not keep up."
    data = [line["t"], line["in_flight"]]
    return _chart("In flight", note, ("s", "requests"), data, [_series("in flight", 0, "area")], window=_window(result))


def completions(result: dict[str, Any]) -> Chart:
    line = result["series"]["timeline"]
    data, series = [line["t"], line["completed_per_s"]], [_series("completed", 0, "area")]
    for key, label, colour in (("errors_per_s", "failed", "error"), ("dropped_per_s", "dropped", 3)):
        if any(line[key]):
            data.append(line[key])
            series.append(_series(label, colour))
    note = f"Requests that ended, per second, in steps of {line['bin_s']:g} s."
    return _chart("Completed", note, ("s", "requests/s"), data, series, window=_window(result))


def output(result: dict[str, Any]) -> Chart | None:
    line, unit = result["series"]["timeline"], result["requests"]["output_unit"]
    if unit is None:
        return None
    note = f"Output that arrived, per second, in steps of {line['bin_s']:g} s."
    series = [_series(f"{unit}/s", 0, "area")]
    return _chart("Output", note, ("s", f"{unit}/s"), [line["t"], line["output_per_s"]], series, window=_window(result))


def by_position(result: dict[str, Any]) -> Chart | None:
    table = result["series"]["itl_by_position"]
    if not table["position"]:
        return None
    note = "The gap before the 2nd, 3rd, ... chunk. Rising: long answers get slower."
    data = [table["position"], table["p50_ms"], table["p99_ms"]]
    series = [_series("p50", 0), _series("p99", 1, "dash")]
    return _chart("Inter-token latency by position", note, ("position", "ms"), data, series)


def schedule_error(result: dict[str, Any]) -> Chart | None:
    if result["scenario"]["loop"] != "open":
        return None
    raw = result["requests"]
    went = [place for place, outcome in enumerate(raw["outcome"]) if outcome != "dropped"]
    if not went:
        return None
    intended, sent = (np.array([raw[key][place] for place in went], dtype=np.float64) for key in ("intended", "sent"))
    chosen, _ = _sample(sent - intended)
    order = chosen[np.argsort(intended[chosen], kind="stable")]
    data = [_round(intended[order] / 1e6), _round((sent - intended)[order] / 1e3)]
    note = "How much later than due a request went out. Part of every latency above."
    series = [_series("schedule error", 2, "points")]
    return _chart("Schedule error", note, ("s", "ms"), data, series, window=_window(result))


def _sample(values: NDArray[np.float64]) -> tuple[NDArray[np.int64], str]:
    """Indices to draw, and the note that says which."""
    note = "One dot per request, at the time it was due."
    if len(values) <= MOST_DOTS:
        return np.arange(len(values)), note
    step = -(-len(values) // (MOST_DOTS - 500))
    slowest = np.argpartition(values, -500)[-500:]
    note += f" Of {len(values):,} requests: one of {step}, and the 500 slowest."
    return np.unique(np.concatenate([np.arange(0, len(values), step), slowest])), note


def _chart(
    title: str,
    note: str,
    units: tuple[str, str],
    data: list[Any],
    series: list[dict[str, Any]],
    *,
    log_x: bool = False,
    y_range: list[float] | None = None,
    window: list[float] | None = None,
) -> Chart:
    return {
        "title": title,
        "note": note,
        "x": units[0],
        "y": units[1],
        "log_x": log_x,
        "y_range": y_range,
        "window": window,
        "data": data,
        "series": series,
    }


def _series(label: str, colour: int | str, style: str = "line") -> dict[str, Any]:
    return {"label": label, "colour": colour, "style": style}


def _window(result: dict[str, Any]) -> list[float]:
    return [result["window"]["start_s"], result["window"]["end_s"]]


def _is_log(low: float, high: float) -> bool:
    return bool(low > 0 and high / low > LOG_FROM)


def _round(values: NDArray[np.float64]) -> list[float | None]:
    return [None if np.isnan(value) else round(float(value), 4) for value in values]
