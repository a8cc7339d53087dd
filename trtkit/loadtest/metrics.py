"""From noted times to measured quantities. Pure: the same run gives the same result.

Percentiles are exact: all values are kept, and `numpy.percentile` interpolates linearly between the two nearest.
`DEFINITIONS` says what each quantity is; the report prints it beside the numbers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtkit.config import Scenario
from trtkit.findings import Finding
from trtkit.loadtest.columns import Columns, columns_of
from trtkit.loadtest.records import Run
from trtkit.loadtest.selfcheck import check
from trtkit.loadtest.series import chart_series

SCHEMA = 1
"""Version of `Result.to_dict`: raised when a key changes its meaning or goes away."""

ENOUGH_FOR_P99 = 100
"""With fewer values than this, p99 is the largest value or close to it."""

DEFINITIONS = {
    "measurement": "The requests that were due (closed loop: sent) after the warm-up and before the end of the "
    "measurement. They count however late they end; rates count only what happened inside the measurement.",
    "due": "In an open loop a request is due when the schedule says so, however late it goes out: a stall of client or "
    "server counts for every request that came due meanwhile. In a closed loop it is due when it is sent.",
    "ttft": "From when the request was due until its first chunk with text arrived.",
    "itl": "Every single gap between two chunks with text of one answer, not a mean per request.",
    "tpot": "One value per request: (end to end - time to first token) / (output - output of its first chunk).",
    "e2e": "From when the request was due until its answer was complete.",
    "ttft_from_send": "The same from when the request really went out. It hides waiting inside the client.",
    "e2e_from_send": "The same from when the request really went out. It hides waiting inside the client.",
    "schedule_error": "How much later than due a request went out (open loop).",
    "loop_lag": "How late the load generator's event loop woke up: what it may add to any time above.",
    "percentiles": "Exact, from all values, with linear interpolation between neighbours (numpy.percentile). "
    "Latencies are of successful requests; failed ones are counted under errors and never left out of totals.",
    "tokens": "Output is counted by the served model (completion_tokens), if it does so for every answer, else by the "
    "given tokenizer, after the run.",
    "chunks": "Without either each streamed chunk with text counts as one, and is called a chunk: it may hold "
    "several tokens.",
    "requests_per_s": "Successful answers completed inside the measurement, per second.",
    "output_per_s": "Output that arrived inside the measurement, per second, over all requests.",
}


LATENCIES = ("ttft", "itl", "tpot", "e2e", "ttft_from_send", "e2e_from_send", "schedule_error")


@dataclass(frozen=True)
class Result:
    """What one scenario measured; every part is plain data, as `to_dict` returns it. Latencies in milliseconds."""

    scenario: dict[str, Any]
    environment: dict[str, Any]
    window: dict[str, Any]
    counts: dict[str, int]
    errors: list[dict[str, Any]]
    throughput: dict[str, Any]
    latency: dict[str, dict[str, Any] | None]
    client: dict[str, Any]
    findings: list[Finding]
    series: dict[str, Any]
    requests: dict[str, Any]

    @property
    def complete(self) -> bool:
        """False when the run was interrupted."""
        return bool(self.window["ended_by"] != "interrupt")

    def to_dict(self, *, raw: bool = True) -> dict[str, Any]:
        """The result as JSON-able data. `raw=False` leaves out the columns per request and the series of the charts."""
        data: dict[str, Any] = {"schema": SCHEMA, "complete": self.complete}
        for key in ("scenario", "environment", "window", "counts", "errors", "throughput", "latency", "client"):
            data[key] = getattr(self, key)
        data["findings"] = [finding.to_dict() for finding in self.findings]
        if raw:
            data["series"], data["requests"] = self.series, self.requests
        return data


def summarise(run: Run, count_tokens: Callable[[str], int] | None = None) -> Result:
    """The result of a run. `count_tokens` needs the texts that the run kept."""
    columns = columns_of(run, count_tokens)
    unit = columns.unit
    counts = count(columns)
    values = {**latency_values(columns, run.scenario), "loop_lag": np.frombuffer(run.lag_ns, np.int64)}
    latency = {key: None if column is None else summary(column) for key, column in values.items()}
    throughput = rates(columns, unit)
    client = {"cpu_share": run.cpu_share, "due": run.due, "sent": counts["requests"] - counts["dropped"]}
    window = {
        "start_s": columns.window[0] / 1e9,
        "end_s": columns.window[1] / 1e9,
        "seconds": (columns.window[1] - columns.window[0]) / 1e9,
        "ended_by": run.ended_by,
    }
    errors = error_counts(run, columns)
    return Result(
        scenario=_scenario(run),
        environment=_environment(run),
        window=window,
        counts=counts,
        errors=errors,
        throughput=throughput,
        latency=latency,
        client=client,
        findings=check(run, counts, latency, throughput, columns),
        series=chart_series(columns, values, unit),
        requests=_raw(run, columns, unit),
    )


def count(columns: Columns) -> dict[str, int]:
    """Measured requests by outcome; `requests` is their sum. `outside` were sent during the warm-up."""
    outcomes = Counter(columns.outcome[columns.measured].tolist())
    counts = {outcome: outcomes[outcome] for outcome in ("ok", "error", "dropped", "unfinished")}
    return {"requests": sum(counts.values()), **counts, "outside": int((~columns.measured).sum())}


def error_counts(run: Run, columns: Columns) -> list[dict[str, Any]]:
    """`{"kind", "count"}` of measured requests that failed, most frequent first; beyond 20 kinds the rest is one.

    Messages that differ only in numbers are one kind, named by its first message.
    """
    failed = [
        r.error for r, inside in zip(run.records, columns.measured, strict=True) if inside and r.outcome == "error"
    ]
    first: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for text in failed:
        kind = re.sub(r"\b[0-9a-f]{8,}\b|[0-9]+", "#", text)
        counts[first.setdefault(kind, text)] += 1
    common = counts.most_common(20)
    rest = len(failed) - sum(number for _, number in common)
    entries = [{"kind": kind, "count": number} for kind, number in common]
    return [*entries, {"kind": "other kinds", "count": rest}] if rest else entries


def rates(columns: Columns, unit: str | None) -> dict[str, Any]:
    """Throughput over the measurement; None where it cannot be told."""
    start, end = columns.window
    seconds = (end - start) / 1e9
    if seconds <= 0:
        return {"requests_per_s": None, "output_per_s": None, "output_unit": unit, "output_total": None}

    def inside(times: NDArray[np.int64]) -> NDArray[np.bool_]:
        return np.asarray((times > start) & (times <= end), dtype=np.bool_)

    finished = int((inside(columns.end) & (columns.outcome == "ok")).sum())
    output = float(columns.chunk_weight[inside(columns.chunk_time)].sum())
    return {
        "requests_per_s": finished / seconds,
        "output_per_s": output / seconds if unit else None,
        "output_unit": unit,
        "output_total": int(columns.output[columns.ok].sum()) if unit else None,
    }


def latency_values(columns: Columns, scenario: Scenario) -> dict[str, NDArray[Any] | None]:
    """All values of every latency, in nanoseconds; None where the scenario has no such thing."""
    start, end = columns.window
    ok, streaming, open_loop = columns.ok, scenario.streaming, scenario.request_rate is not None
    texts = ok & (columns.first >= 0)
    several = texts & (columns.output > columns.head)
    inside = (columns.gap_end > start) & (columns.gap_end <= end)
    sent = columns.measured & (columns.outcome != "dropped")
    values: dict[str, NDArray[Any] | None] = dict.fromkeys(LATENCIES)
    values["e2e"] = (columns.end - columns.intended)[ok]
    if streaming:
        values["ttft"] = (columns.first - columns.intended)[texts]
        values["itl"] = columns.gap[inside]
        values["tpot"] = (columns.end - columns.first)[several] / (columns.output - columns.head)[several]
    if open_loop:
        values["e2e_from_send"] = (columns.end - columns.sent)[ok]
        values["schedule_error"] = (columns.sent - columns.intended)[sent]
    if streaming and open_loop:
        values["ttft_from_send"] = (columns.first - columns.sent)[texts]
    return values


def summary(values_ns: NDArray[Any]) -> dict[str, Any] | None:
    """Count, percentiles, mean and max in milliseconds, and whether p99 has enough values; None without values."""
    if not len(values_ns):
        return None
    p50, p90, p99 = (float(value) / 1e6 for value in np.percentile(values_ns, [50, 90, 99]))
    return {
        "count": len(values_ns),
        "p50": p50,
        "p90": p90,
        "p99": p99,
        "mean": float(np.mean(values_ns)) / 1e6,
        "max": float(np.max(values_ns)) / 1e6,
        "enough_for_p99": len(values_ns) >= ENOUGH_FOR_P99,
    }


def _scenario(run: Run) -> dict[str, Any]:
    loop = "closed" if run.scenario.concurrency is not None else "open"
    return {
        "name": run.name,
        "loop": loop,
        **run.scenario.model_dump(mode="json"),
        "prompts": run.prompts,
        "target": run.target,
        "model": run.model,
        "started_at": run.started_at,
    }


def _environment(run: Run) -> dict[str, Any]:
    import os
    import platform

    from trtkit import __version__

    return {
        "trtkit": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }


def _raw(run: Run, columns: Columns, unit: str | None) -> dict[str, Any]:
    """One list per column, warm-up included: times in microseconds from the start, null where there is none."""

    def microseconds(values: NDArray[np.int64], missing: NDArray[np.bool_] | None = None) -> list[int | None]:
        column: list[int | None] = np.round(values / 1000).astype(np.int64).tolist()
        if missing is not None:
            column = [None if gone else value for value, gone in zip(column, missing, strict=True)]
        return column

    return {
        "time_unit": "us",
        "output_unit": unit,
        "prompt": [record.prompt for record in run.records],
        "intended": microseconds(columns.intended),
        "sent": microseconds(columns.sent),
        "first": microseconds(columns.first, columns.first < 0),
        "end": microseconds(columns.end),
        "output": [None if value < 0 else value for value in columns.output.tolist()],
        "ok": (columns.outcome == "ok").tolist(),
        "outcome": columns.outcome.tolist(),
        "measured": columns.measured.tolist(),
    }
