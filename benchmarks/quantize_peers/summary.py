"""From the results of all jobs to the table: means over draws, ours against the best peer, what it cost."""

from __future__ import annotations

import statistics
from typing import Any

Result = dict[str, Any]
Row = dict[str, Any]


def summarise(results: list[Result], base: dict[str, float]) -> dict[str, Any]:
    """Rows, one per tool, method and file format, and verdicts, one per model and own method.

    Args:
        results: finished jobs: tool, method, kind (what it competes in), model, draw, and the report of its process
            with `perplexity` per file format.
        base: model -> perplexity unquantised.
    """
    keys = dict.fromkeys((r["kind"], r["tool"], r["method"], f) for r in results for f in r["perplexity"])
    rows = [_row(key, results, base) for key in keys]
    rows.sort(key=lambda row: (row["kind"], row["tool"] != "trtkit"))
    verdicts = [
        _verdict(row, [p for p in rows if p["kind"] == row["kind"] and p["tool"] != "trtkit"], model)
        for row in rows
        if row["tool"] == "trtkit"
        for model in row["models"]
    ]
    return {"base": base, "rows": rows, "verdicts": [verdict for verdict in verdicts if verdict]}


def _row(key: tuple[str, str, str, str], results: list[Result], base: dict[str, float]) -> Row:
    kind, tool, method, files = key
    own = [r for r in results if (r["kind"], r["tool"], r["method"]) == key[:3] and files in r["perplexity"]]
    models = {}
    for model, unquantised in base.items():
        values = [r["perplexity"][files] for r in own if r["model"] == model]
        if values:
            mean = statistics.fmean(values)
            models[model] = {
                "mean": mean,
                "deviation": statistics.stdev(values) if len(values) > 1 else None,
                "min": min(values),
                "max": max(values),
                "draws": len(values),
                "increase": mean / unquantised - 1,
            }
    return {
        "kind": kind,
        "tool": tool,
        "method": method,
        "files": files,
        "repeatable": not own[0]["draws"],
        "models": models,
        "cpu_s": statistics.median(r["stages"]["quantise"]["cpu_s"] for r in own),
        "all_cpu_s": statistics.median(sum(s["cpu_s"] for s in r["stages"].values()) for r in own),
        "growth_mb": statistics.median(r["growth_mb"] for r in own),
    }


def _verdict(ours: Row, peers: list[Row], model: str) -> dict[str, Any] | None:
    """Ours against the peer whose mean is lowest. Inside the spread, which is the larger of the two standard deviations
    over draws, a difference is a tie; without one, nothing is said."""
    peers = [row for row in peers if model in row["models"]]
    if not peers:
        return None
    best = min(peers, key=lambda row: float(row["models"][model]["mean"]))
    mine, theirs = ours["models"][model], best["models"][model]
    difference = mine["mean"] - theirs["mean"]
    deviations = [value["deviation"] for value in (mine, theirs) if value["deviation"] is not None]
    if mine["deviation"] is None and not ours["repeatable"]:
        said = "unproven (one draw)"
    elif abs(difference) <= max(deviations, default=0.0):
        said = "tie (inside the spread)"
    else:
        said = "better" if difference < 0 else "worse"
    return {
        "model": model,
        "kind": ours["kind"],
        "ours": ours["method"],
        "our_increase": mine["increase"],
        "best_peer": f"{best['tool']} {best['method']} ({best['files']})",
        "best_peer_increase": theirs["increase"],
        "ratio": mine["increase"] / theirs["increase"] if theirs["increase"] > 0 else None,
        "spread": max(deviations, default=None),
        "difference": difference,
        "verdict": said,
    }


def print_summary(summary: dict[str, Any]) -> None:
    models = summary["base"]
    print("unquantised: " + ", ".join(f"{model} {value:.3f}" for model, value in models.items()))
    head = "".join(f"{model:>10}{'sd':>7}{'min':>8}{'max':>8}{'+%':>7}" for model in models)
    print(f"{'':54}{head}{'CPU s':>9}{'x ours':>8}{'all':>8}{'MB':>7}{'x ours':>8}")
    kind = None
    for row in summary["rows"]:
        if row["kind"] != kind:
            kind = row["kind"]
            print(kind)
        ours = next((r for r in summary["rows"] if r["kind"] == kind and r["tool"] == "trtkit"), None)
        name = f"  {row['tool']} {row['method']} ({row['files']})"
        costs = _cost(row, ours, "cpu_s", "9.2f") + f"{row['all_cpu_s']:8.2f}" + _cost(row, ours, "growth_mb", "7.0f")
        print(f"{name:54}{''.join(_cells(row['models'].get(model)) for model in models)}{costs}")
    for verdict in summary["verdicts"]:
        ratio = "-" if verdict["ratio"] is None else f"{100 * verdict['ratio']:.0f} %"
        print(
            f"{verdict['model']}, {verdict['kind']}: trtkit {verdict['ours']} {100 * verdict['our_increase']:+.2f} %, "
            f"best peer {verdict['best_peer']} {100 * verdict['best_peer_increase']:+.2f} %: {ratio} of it, "
            f"{verdict['verdict']}"
        )


def _cells(value: dict[str, Any] | None) -> str:
    if value is None:
        return f"{'-':>10}{'':30}"
    deviation = "-" if value["deviation"] is None else f"{value['deviation']:.3f}"
    increase = 100 * value["increase"]
    return f"{value['mean']:10.3f}{deviation:>7}{value['min']:8.3f}{value['max']:8.3f}{increase:+7.2f}"


def _cost(row: Row, ours: Row | None, key: str, width: str) -> str:
    """A cost and how many times ours it is."""
    times = f"{row[key] / ours[key]:7.1f}x" if ours and ours[key] > 0 else ""
    return f"{row[key]:{width}}{times:>8}"
