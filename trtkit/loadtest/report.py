"""The report: one HTML file that needs no network, and the JSON beside it.

The page is written here with every text escaped; `assets/report.js` only draws the charts. A content security policy in
the page forbids it to load anything.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from trtkit.errors import InputError
from trtkit.loadtest import sections
from trtkit.loadtest.charts import Chart
from trtkit.loadtest.metrics import DEFINITIONS, SCHEMA
from trtkit.store import atomic_write

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"


def write_report(results: Sequence[dict[str, Any]], path: str | Path, title: str = "Load test") -> tuple[Path, Path]:
    """Writes `NAME.html` and `NAME.json`, each all or nothing.

    Args:
        results: of `Result.to_dict()`, one per scenario.
        path: `NAME.html` or `NAME.json`, or a folder, which gets `report.html` and `report.json`.

    Returns:
        The paths of the HTML and of the JSON file.
    """
    html, data = _paths(Path(path))
    page = render_html(results, title)
    atomic_write(data, json.dumps(json_document(results), ensure_ascii=False, allow_nan=False) + "\n")
    atomic_write(html, page)
    return html, data


def check_writable(path: str | Path) -> None:
    """Says before a test whether `write_report` can write there after it. Writes nothing.

    Raises:
        InputError: a file would replace a folder, or its folder is none, cannot become one or may not be written to.
    """
    fix = "give --output a file or folder that can be written"
    for file in _paths(Path(path)):
        try:
            if file.is_dir():
                raise InputError(f"{file} is a folder", fix)
            folder = next(parent for parent in file.absolute().parents if parent.exists())
        except OSError as error:
            raise InputError(f"{file}: {error.strerror}", fix) from None
        if not folder.is_dir():
            raise InputError(f"cannot write {file}: {folder} is not a folder", fix)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise InputError(f"cannot write {file}: no permission to write in {folder}", fix)


def _paths(path: Path) -> tuple[Path, Path]:
    """The HTML and the JSON file of a report at `path`."""
    base = path.with_suffix("") if path.suffix in (".html", ".json") else path / "report"
    return base.with_name(base.name + ".html"), base.with_name(base.name + ".json")


def json_document(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the JSON file holds: the results, what their quantities mean, and the version of the schema."""
    return {"schema": SCHEMA, "kind": "trtkit-loadtest", "definitions": DEFINITIONS, "results": list(results)}


def render_html(results: Sequence[dict[str, Any]], title: str = "Load test") -> str:
    """The page, for one or several results side by side.

    Raises:
        InputError: no result, or one of another schema version, or without its raw columns.
    """
    _check(results)
    charts: list[Chart] = []
    body = [
        sections.header(results, title),
        sections.findings(results),
        sections.side_by_side(results, charts) if len(results) > 1 else "",
        *(sections.scenario(result, charts, alone=len(results) == 1) for result in results),
        sections.definitions(results),
        f"<footer>Made by trtkit {escape(str(results[0]['environment']['trtkit']))}. "
        "This page is one file and loads nothing.</footer>",
    ]
    assets = resources.files("trtkit.loadtest") / "assets"

    def asset(name: str) -> str:
        return (assets / name).read_text(encoding="utf-8")

    return f"""<!doctype html>
<html lang="en" data-theme="light">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{asset("uPlot.min.css")}
{asset("report.css")}</style>
</head>
<body>
<main>
{"".join(body)}
</main>
<script type="application/json" id="data">{json_for_script(charts)}</script>
<script>{asset("uPlot.iife.min.js")}</script>
<script>{asset("report.js")}</script>
</body>
</html>
"""


def json_for_script(data: Any) -> str:
    """JSON that can stand inside a script element: no text in it can end the element or start a comment."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _check(results: Sequence[dict[str, Any]]) -> None:
    if not results:
        raise InputError("no load-test result to report on", "run at least one scenario")
    for result in results:
        if result.get("schema") != SCHEMA:
            raise InputError(
                f"load-test result of schema {result.get('schema')}, not {SCHEMA}", "run the load test again"
            )
        if "requests" not in result:
            raise InputError("load-test result without its columns per request", "pass Result.to_dict() as it is")
