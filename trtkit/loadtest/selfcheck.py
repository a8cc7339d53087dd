"""What the reader of a result must know before believing it. Numbers are never withheld: they are labelled. Pure."""

from __future__ import annotations

from typing import Any

import numpy as np

from trtkit.findings import Finding
from trtkit.loadtest.columns import Columns
from trtkit.loadtest.records import Run

LAG_LIMIT_MS = 5.0
SCHEDULE_LIMIT_MS = 3.0
SCHEDULE_LIMIT_SHARE = 0.02
"""Of the median time to first token (end to end without streaming), where that is more than `SCHEDULE_LIMIT_MS`."""
CPU_LIMIT = 0.85
SENT_LIMIT = 0.99

Latency = dict[str, dict[str, Any] | None]


def check(
    run: Run, counts: dict[str, int], latency: Latency, throughput: dict[str, Any], columns: Columns
) -> list[Finding]:
    """Findings about a run, worst first."""
    place = f"scenario '{run.name}'"
    found = [
        *_about_requests(run, counts, columns, place),
        *_about_client(run, counts, latency, place),
        *_about_numbers(latency, throughput, counts, place),
    ]
    order = {"error": 0, "warning": 1, "info": 2}
    return sorted(found, key=lambda finding: order[finding.severity])


def _about_requests(run: Run, counts: dict[str, int], columns: Columns, place: str) -> list[Finding]:
    found = []
    total, ok, errors = counts["requests"], counts["ok"], counts["error"]
    if run.ended_by == "interrupt":
        cause = f"interrupted: the run is incomplete, with {counts['unfinished']} requests cancelled in flight"
        found.append(Finding("TK801", "warning", place, cause, "let the run end for numbers to compare"))
    if ok == 0:
        cause = f"none of {total} requests succeeded" if total else "no request was sent during the measurement"
        fix = "see the errors" if errors else "raise duration_s, or lower warmup_s"
        found.append(Finding("TK802", "error", place, cause, fix))
    elif errors:
        cause = f"{errors} of {total} requests failed; latencies are of the {ok} others"
        found.append(Finding("TK803", "warning", place, cause, "see the errors and the server's log"))
    if counts["dropped"]:
        cause = f"{counts['dropped']} of {total} requests were never sent, since too many were in flight"
        found.append(Finding("TK804", "warning", place, cause, "lower request_rate: the server does not keep up"))
    empty = sum(record.empty for record, inside in zip(run.records, columns.ok, strict=True) if inside)
    if empty:
        cause = f"{empty} of {ok} successful requests returned no text"
        found.append(Finding("TK805", "warning", place, cause, "look at the prompts and the model's answers"))
    if _piles_up(run, columns):
        cause = "requests pile up: more and more are in flight, so latencies depend on how long the run is"
        found.append(Finding("TK806", "warning", place, cause, "lower request_rate: it exceeds what the server can do"))
    return found


def _about_client(run: Run, counts: dict[str, int], latency: Latency, place: str) -> list[Finding]:
    found = []
    fix = "the numbers may be about the load generator: run it on a quieter machine, or with less load"
    lag, late = latency["loop_lag"], latency["schedule_error"]
    if lag is not None and lag["p99"] > LAG_LIMIT_MS:
        cause = f"the load generator's event loop woke up {lag['p99']:.1f} ms late (p99; limit {LAG_LIMIT_MS:g} ms)"
        found.append(Finding("TK811", "warning", place, cause, fix))
    base = latency["ttft"] or latency["e2e"]
    limit = max(SCHEDULE_LIMIT_MS, SCHEDULE_LIMIT_SHARE * base["p50"] if base else 0.0)
    if late is not None and late["p99"] > limit:
        cause = f"requests went out {late['p99']:.1f} ms late (p99; limit {limit:.1f} ms)"
        found.append(Finding("TK812", "warning", place, cause, fix))
    if run.cpu_share is not None and run.cpu_share > CPU_LIMIT:
        cause = f"the load generator used {run.cpu_share:.0%} of a CPU core (limit {CPU_LIMIT:.0%})"
        found.append(Finding("TK813", "warning", place, cause, fix))
    if run.due and run.ended_by == "duration" and counts["requests"] < SENT_LIMIT * run.due:
        cause = f"only {counts['requests']} of {run.due} scheduled requests were sent"
        found.append(Finding("TK814", "warning", place, cause, fix))
    return found


def _about_numbers(latency: Latency, throughput: dict[str, Any], counts: dict[str, int], place: str) -> list[Finding]:
    found = []
    few = [key for key in ("ttft", "itl", "tpot", "e2e") if (entry := latency[key]) and not entry["enough_for_p99"]]
    if few:
        cause = f"fewer than 100 values behind p99 of {', '.join(few)}: it is close to the largest value"
        found.append(Finding("TK821", "info", place, cause, "raise duration_s"))
    if counts["ok"] and throughput["output_unit"] == "chunks":
        cause = "output is counted in chunks, not tokens, since neither the served model nor a tokenizer counts them"
        found.append(Finding("TK822", "info", place, cause, "give the folder of the model's tokenizer.json"))
    if counts["ok"] and throughput["output_unit"] is None:
        cause = "without streaming, and with neither a served model nor a tokenizer that counts them, output is unknown"
        found.append(Finding("TK823", "info", place, cause, "stream, or give the folder of the model's tokenizer.json"))
    return found


def _piles_up(run: Run, columns: Columns) -> bool:
    """Open loop only: whether clearly more are in flight in the last quarter of the measurement than in the first."""
    start, end = columns.window
    if run.scenario.request_rate is None or end <= start or run.ended_by == "max_requests":
        return False
    went = columns.outcome != "dropped"
    sent, done = np.sort(columns.sent[went]), np.sort(columns.end[went])
    times = np.linspace(start, end, 101)
    in_flight = np.searchsorted(sent, times) - np.searchsorted(done, times)
    early, late = float(in_flight[:25].mean()), float(in_flight[-25:].mean())
    return late > 2 * early + 10
