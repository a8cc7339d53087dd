"""The load-test report in a real browser: every chart is drawn, nothing is logged as an error, nothing is requested.

Needs a Chromium on PATH. Without one these tests fail, unless TRTKIT_NO_BROWSER=1 says that none is wanted.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from trtkit.config import Scenario
from trtkit.loadtest.metrics import summarise
from trtkit.loadtest.records import Record, Run
from trtkit.loadtest.report import render_html

BROWSERS = ("chromium", "chromium-browser", "google-chrome")

pytestmark = pytest.mark.skipif(os.environ.get("TRTKIT_NO_BROWSER") == "1", reason="TRTKIT_NO_BROWSER=1 is set")

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--enable-logging=stderr",
    "--virtual-time-budget=10000",
    "--dump-dom",
]


@dataclass
class Seen:
    """What a browser made of a page."""

    dom: str
    console: list[str]
    requests: list[str]

    def data(self, name: str) -> str | None:
        found = re.search(rf'<html[^>]* data-{name}="([^"]*)"', self.dom)
        return found[1] if found else None


def open_page(page: str, folder: Path) -> Seen:
    """Opens the page from a file, without a network beyond this machine."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.fail(f"none of {', '.join(BROWSERS)} is on PATH: install one, or set TRTKIT_NO_BROWSER=1")
    (folder / "page.html").write_text(page, encoding="utf-8")
    netlog = folder / "net.json"
    arguments = [
        *FLAGS,
        f"--user-data-dir={folder / 'profile'}",
        f"--log-net-log={netlog}",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ]
    done = subprocess.run(
        [browser, *arguments, f"file://{folder / 'page.html'}"], capture_output=True, text=True, timeout=120, check=True
    )
    events = json.loads(netlog.read_text())["events"]
    params = [event.get("params", {}) for event in events]
    # The browser's own requests have no origin; those of a page have one ("null" for a file).
    requests = [p["url"] for p in params if "url" in p and p.get("initiator", "not an origin") != "not an origin"]
    return Seen(done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line], requests)


def result(name: str, **load: Any) -> dict[str, Any]:
    """A made-up run of 40 requests of 10 chunks, one of which failed."""
    ms = 1_000_000
    prompts = [
        "def main(",
        "</script><script>document.title = 'owned'</script><!--",
        "\u2028 <img src=x onerror=alert(1)>",
    ]
    scenario = Scenario(**load, duration_s=4.0, warmup_s=0.5)
    run = Run(
        name,
        scenario,
        prompts,
        "grpc://127.0.0.1:8001",
        "ensemble",
        "2026-01-01T00:00:00+00:00",
        0,
        500 * ms,
        4500 * ms,
    )
    for number in range(40):
        due = number * 110 * ms
        record = Record(number % 3, due, due + number % 4 * ms, outcome="ok")
        for place in range(10):
            record.chunk_ns.append(record.sent_ns + (50 + number % 7 + 12 * place + place % 3) * ms)
        record.end_ns = record.chunk_ns[-1] + ms
        run.records.append(record)
    run.records[30].outcome, run.records[30].error = "error", "server error: <b>& no 'memory'</b></script>"
    run.lag_ns.extend([ms] * 50)
    run.cpu_share = 0.3
    return summarise(run).to_dict()


def test_every_chart_is_drawn_and_nothing_is_requested(tmp_path: Path) -> None:
    results = [result("closed", concurrency=4), result("<i>open</i>", request_rate=9.0)]
    seen = open_page(render_html(results, "Two </title><script>alert(1)</script>"), tmp_path)
    # Four for both scenarios, five over time and position for each, and the schedule error of the open loop.
    assert seen.data("charts") == seen.data("drawn") == str(4 + 5 + 6)
    assert seen.dom.count("<canvas") == 15
    assert seen.console == []
    assert seen.requests == []
    assert "<title>Two &lt;/title&gt;&lt;script&gt;alert(1)&lt;/script&gt;</title>" in seen.dom


def test_a_result_without_any_answer_still_makes_a_page(tmp_path: Path) -> None:
    run = Run("none", Scenario(concurrency=1), ["p"], "", "m", "2026-01-01T00:00:00+00:00", 0, 0, 10**9, "interrupt")
    seen = open_page(render_html([summarise(run).to_dict()]), tmp_path)
    assert seen.console == []
    assert seen.data("charts") == "3"


def test_this_check_sees_what_it_is_to_see(tmp_path: Path) -> None:
    """Without the page's policy and with a script that fails, errors and requests do show, and charts do not."""
    page = render_html([result("closed", concurrency=4)])
    page = page.replace('http-equiv="Content-Security-Policy"', 'name="nothing"')
    page = page.replace("<main>", '<img src="http://127.0.0.1:9/image.png"><script>uPlot = undefined.x;</script><main>')
    page = page.replace("var uPlot=", "var notPlot=")
    seen = open_page(page, tmp_path)
    assert seen.requests == ["http://127.0.0.1:9/image.png"]
    assert any("TypeError" in line for line in seen.console)
    assert seen.data("drawn") is None


def test_the_policy_of_the_page_forbids_requests(tmp_path: Path) -> None:
    page = render_html([result("closed", concurrency=4)])
    seen = open_page(page.replace("<main>", '<main><img src="http://127.0.0.1:9/image.png">'), tmp_path)
    assert seen.requests == []
    assert any("Content Security Policy" in line for line in seen.console)
