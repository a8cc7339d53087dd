"""The parts of the report's page, each as HTML with every text escaped. Pure.

Parts that hold charts add them to the list of all charts of the page; a chart's place in that list is its element's id.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from trtkit.loadtest.charts import Chart, comparison_charts, scenario_charts
from trtkit.loadtest.metrics import DEFINITIONS

LABELS = {
    "ttft": "Time to first token",
    "itl": "Inter-token latency",
    "tpot": "Time per output token",
    "e2e": "End to end",
    "ttft_from_send": "Time to first token, from send",
    "e2e_from_send": "End to end, from send",
    "schedule_error": "Schedule error",
    "loop_lag": "Event loop lag (load generator)",
}
STATISTICS = ("p50", "p90", "p99", "mean", "max")

_PROMPTS_SHOWN, _PROMPT_LENGTH = 8, 400


def milliseconds(value: float) -> str:
    """A latency for people: three significant digits where it is small, none after the point where it is large."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def rate(value: float | None) -> str:
    """A rate for people."""
    return (
        "–"
        if value is None
        else f"{value:,.0f}"
        if value >= 1000
        else f"{value:,.1f}"
        if value >= 10
        else f"{value:.2f}"
    )


def load_of(scenario: dict[str, Any]) -> str:
    """The load of a scenario in a few words."""
    if scenario["loop"] == "closed":
        return f"closed loop, {scenario['concurrency']} in flight"
    return f"open loop, {scenario['request_rate']:g} requests/s {scenario['arrival']}"


def header(results: Sequence[dict[str, Any]], title: str) -> str:
    scenario = results[0]["scenario"]
    where = f"model {scenario['model']}" + (f" at {scenario['target']}" if scenario["target"] else "")
    count = f"{len(results)} scenarios" if len(results) > 1 else f"scenario {scenario['name']}"
    facts = " · ".join([where, count, scenario["started_at"].replace("T", " ").replace("+00:00", " UTC")])
    return (
        f'<header><div><h1>{escape(title)}</h1><p class="muted">{escape(facts)}</p></div>'
        '<button id="theme" type="button">Dark</button></header>'
    )


def findings(results: Sequence[dict[str, Any]]) -> str:
    """What to know before the numbers, worst first. The same about several scenarios is said once."""
    order = {"error": 0, "warning": 1, "info": 2}
    places: dict[tuple[str, str, str, str], list[str]] = {}
    for finding in (finding for result in results for finding in result["findings"]):
        key = (finding["severity"], finding["id"], finding["cause"], finding["fix"])
        places.setdefault(key, []).append(finding["place"].removeprefix("scenario "))
    rows = []
    if all(severity == "info" for severity, *_ in places):
        rows.append('<li class="finding good"><b>Clean</b><div>Nothing went wrong in this run.</div></li>')
    for (severity, name, cause, fix), where in sorted(places.items(), key=lambda item: order[item[0][0]]):
        text = escape(_sentence(cause if len(results) == 1 else f"{', '.join(where)}: {cause}"))
        text += f' <span class="fix">{escape(_sentence(fix))}</span>' if fix else ""
        kind = escape(severity)
        rows.append(f'<li class="finding {kind}" title="{escape(name)}"><b>{kind}</b><div>{text}</div></li>')
    return f'<ul class="findings">{"".join(rows)}</ul>'


def side_by_side(results: Sequence[dict[str, Any]], charts: list[Chart]) -> str:
    unit = next((r["throughput"]["output_unit"] for r in results if r["throughput"]["output_unit"]), None)
    heads = ["Scenario", "OK", "Failed", "Requests/s", f"{unit or 'output'}/s".capitalize()]
    heads += ["TTFT p50", "TTFT p99", "ITL p50", "ITL p99", "E2E p50", "E2E p99"]
    rows = []
    for place, result in enumerate(results):
        cells = [f"{result['counts']['ok']:,}", f"{result['counts']['error']:,}"]
        cells += [rate(result["throughput"]["requests_per_s"]), rate(result["throughput"]["output_per_s"])]
        for entry in (result["latency"][key] for key in ("ttft", "itl", "e2e")):
            cells += [milliseconds(entry[name]) if entry else "–" for name in ("p50", "p99")]
        load = f'<span class="definition">{escape(load_of(result["scenario"]))}</span>'
        name = _key(place) + escape(result["scenario"]["name"]) + load
        rows.append(f"<tr><td>{name}</td>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    note = '<p class="small muted">TTFT: time to first token. ITL: inter-token latency. E2E: end to end. In ms.</p>'
    table = _table(heads, rows)
    return f'<h2>Side by side</h2><div class="card">{table}{note}</div>{_cards(comparison_charts(results), charts)}'


def scenario(result: dict[str, Any], charts: list[Chart], *, alone: bool) -> str:
    """Everything about one scenario; `alone`: with the distributions, which else stand side by side."""
    settings = result["scenario"]
    badges = [load_of(settings), "streaming" if settings["streaming"] else "not streaming", settings["protocol"]]
    badges += [f"at most {settings['max_tokens']} tokens", f"measured for {result['window']['seconds']:.1f} s"]
    badges += [] if result["complete"] else ["incomplete"]
    marks = "".join(f'<span class="badge">{escape(text)}</span>' for text in badges)
    own = [*(comparison_charts([result]) if alone else []), *scenario_charts(result)]
    return (
        f'<h2>Scenario {escape(settings["name"])}</h2><div class="badges">{marks}</div>{_tiles(result)}'
        f"{_latencies(result)}{_errors(result)}{_cards(own, charts)}{_settings(result)}"
    )


def definitions(results: Sequence[dict[str, Any]]) -> str:
    names = {"measurement": "Measurement", "due": "Due", "percentiles": "Percentiles"}
    names |= {"requests_per_s": "Requests/s", "output_per_s": "Output/s"}
    names |= {unit: unit.capitalize() for result in results if (unit := result["throughput"]["output_unit"])}
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(DEFINITIONS[key])}</dd>" for key, name in names.items())
    return f'<h2>How to read this</h2><div class="card"><dl class="first">{rows}</dl></div>'


def _tiles(result: dict[str, Any]) -> str:
    throughput, counts = result["throughput"], result["counts"]
    total = f"of {counts['requests']:,} requests"
    tiles = [("Requests/s", rate(throughput["requests_per_s"]), "", f"{counts['ok']:,} answered", False)]
    if (unit := throughput["output_unit"]) is not None and throughput["output_total"] is not None:
        below = f"{throughput['output_total']:,} in all"
        tiles.append((f"{unit.capitalize()}/s", rate(throughput["output_per_s"]), "", below, False))
    for key, label in (("ttft", "First token"), ("itl", "Inter-token"), ("e2e", "End to end")):
        if entry := result["latency"][key]:
            below = f"p99 {milliseconds(entry['p99'])} ms"
            tiles.append((f"{label}, p50", milliseconds(entry["p50"]), "ms", below, False))
    tiles.append(("Failed", f"{counts['error']:,}", "", total, counts["error"] > 0))
    if counts["dropped"]:
        tiles.append(("Dropped", f"{counts['dropped']:,}", "", total, True))
    cells = [
        f'<div class="tile{" bad" if bad else ""}"><div class="label">{escape(label)}</div><div class="value">'
        f'{escape(value)} <small>{unit}</small></div><div class="label">{escape(below)}</div></div>'
        for label, value, unit, below, bad in tiles
    ]
    return f'<div class="tiles">{"".join(cells)}</div>'


def _latencies(result: dict[str, Any]) -> str:
    rows, few = [], False
    for key, label in LABELS.items():
        entry = result["latency"].get(key)
        if entry is None:
            continue
        few = few or not entry["enough_for_p99"]
        cells = [f"{entry['count']:,}", *(milliseconds(entry[name]) for name in STATISTICS)]
        cells[3] += "" if entry["enough_for_p99"] else "*"
        name = f'{escape(label)}<span class="definition">{escape(DEFINITIONS[key])}</span>'
        rows.append(f"<tr><td>{name}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    if not rows:
        return ""
    note = '<p class="small muted">* Fewer than 100 values: p99 is close to the largest.</p>' if few else ""
    return f'<div class="card">{_table(("Milliseconds", "Values", *STATISTICS), rows)}{note}</div>'


def _errors(result: dict[str, Any]) -> str:
    if not result["errors"]:
        return ""
    rows = [f'<tr><td class="wide">{escape(e["kind"])}</td><td>{e["count"]:,}</td></tr>' for e in result["errors"]]
    return f'<div class="card next">{_table(("Failed with", "Requests"), rows)}</div>'


def _cards(new: Sequence[Chart], charts: list[Chart]) -> str:
    cards = []
    for chart in new:
        keys = [f"<span>{_key(series['colour'])}{escape(series['label'])}</span>" for series in chart["series"]]
        legend = f'<div class="legend">{"".join(keys)}</div>' if len(keys) > 1 else ""
        cards.append(
            f'<div class="card chart"><h3>{escape(chart["title"])}</h3><p>{escape(chart["note"])}</p>'
            f'<div class="plot" id="chart-{len(charts)}"></div>{legend}</div>'
        )
        charts.append(chart)
    return f'<div class="charts">{"".join(cards)}</div>'


def _settings(result: dict[str, Any]) -> str:
    settings, environment, client = result["scenario"], result["environment"], result["client"]
    shown = {key: value for key, value in settings.items() if key not in ("prompts", "name", "loop")}
    pairs = [(key.replace("_", " "), value) for key, value in shown.items() if value not in (None, "")]
    machine = f"Python {environment['python']}, {environment['system']}, {environment['cpus']} processors"
    pairs += [("load generator", f"trtkit {environment['trtkit']}, {machine}")]
    pairs += [("load average", ", ".join(str(value) for value in environment["load_average"]))]
    if client["cpu_share"] is not None:
        pairs.append(("its CPU", f"{client['cpu_share']:.0%} of one core"))
    rows = "".join(f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>" for key, value in pairs)
    prompts = settings["prompts"]
    cut = [text if len(text) <= _PROMPT_LENGTH else f"{text[:_PROMPT_LENGTH]} …" for text in prompts[:_PROMPTS_SHOWN]]
    more = f" (the first {_PROMPTS_SHOWN} are shown)" if len(prompts) > _PROMPTS_SHOWN else ""
    texts = "".join(f"<pre>{escape(text)}</pre>" for text in cut)
    rows += f"<dt>prompts</dt><dd>{len(prompts)}, sent in turn{more}{texts}</dd>"
    return f'<details class="card"><summary>Scenario and environment</summary><dl>{rows}</dl></details>'


def _table(heads: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _key(colour: int | str) -> str:
    """The coloured square before the name of a series."""
    return f'<span class="key" data-colour="{colour}"></span>'


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")
