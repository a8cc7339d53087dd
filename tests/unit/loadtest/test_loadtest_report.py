"""The report as text: escaping, what it says, and what it refuses. `test_report_browser.py` opens it in a browser."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtkit.config import Scenario
from trtkit.errors import InputError
from trtkit.loadtest.charts import MOST_DOTS, comparison_charts, scenario_charts
from trtkit.loadtest.report import json_for_script, render_html, write_report

EVIL = "</script><script>alert('x')</script><!-- <b onclick=\"y\">&amp;\u2028"


@pytest.fixture
def make(world: Any, known_delay: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    def result(name: str = "closed", prompts: list[str] | None = None, **load: Any) -> dict[str, Any]:
        scenario = Scenario(**(load or {"concurrency": 4}), duration_s=5, warmup_s=1)
        data: dict[str, Any] = world.test(known_delay(), scenario, name=name, prompts=prompts or ["p"]).to_dict()
        return data

    return result


class Page(HTMLParser):
    """Tags, the attributes that make a browser load something, and the text of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.attributes: set[str] = set()
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "action", "data")]
        self.attributes |= {name for name, _ in attributes}
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script" and self.scripts:
            self.scripts[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.tags.append(f"/{tag}")


def test_the_page_is_one_file_that_loads_nothing(make: Callable[..., dict[str, Any]]) -> None:
    page = render_html([make()])
    parsed = Page(page)
    assert parsed.loads == ["data:,"]
    assert not re.search(r"@import|url\(", page)
    assert "default-src 'none'" in page


def test_text_of_users_cannot_leave_its_place(make: Callable[..., dict[str, Any]]) -> None:
    plain = Page(render_html([make()], "title"))
    data = make(EVIL, [EVIL])
    data["errors"] = [{"kind": EVIL, "count": 1}]
    data["scenario"]["target"] = EVIL
    data["findings"].append({"id": EVIL, "severity": "info", "place": EVIL, "cause": EVIL, "fix": EVIL})
    page = render_html([data], EVIL)
    parsed = Page(page)
    assert parsed.tags.count("script") == plain.tags.count("script") == 3
    assert page.count("</script") == 3
    assert "<script>alert" not in page
    assert "onclick" not in parsed.attributes
    json.loads(parsed.scripts[0])


@given(
    st.recursive(
        st.text() | st.integers() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_json_in_a_script_survives_and_holds_nothing_a_browser_reads(data: Any) -> None:
    text = json_for_script(data)
    assert json.loads(text) == data
    assert not set(text) & set("<>&\u2028\u2029")


def test_it_says_what_was_measured_and_how(make: Callable[..., dict[str, Any]]) -> None:
    page = render_html([make("night", request_rate=20.0)], "Nightly")
    for text in ("Nightly", "Scenario night", "open loop, 20 requests/s poisson", "Schedule error", "TK822"):
        assert text in page
    assert "Every single gap between two chunks" in page
    assert "numpy.percentile" in page
    assert 'First token, p50</div><div class="value">100 <small>ms' in page


def test_warnings_stand_before_the_numbers(make: Callable[..., dict[str, Any]]) -> None:
    data = make()
    data["findings"] = [
        {"id": "TK9", "severity": "info", "place": "s", "cause": "small thing", "fix": ""},
        {"id": "TK8", "severity": "error", "place": "s", "cause": "big thing", "fix": "mend it"},
    ]
    page = render_html([data])
    assert page.index("Big thing") < page.index("Small thing") < page.index("Scenario closed")


def test_scenarios_stand_side_by_side(make: Callable[..., dict[str, Any]]) -> None:
    page = render_html([make("one"), make("two", request_rate=20.0)])
    assert "Side by side" in page
    assert page.count("<h2>Scenario ") == 2
    assert page.count("TK822") == 1  # said once for both


def test_charts_have_columns_of_one_length_and_rising_x(make: Callable[..., dict[str, Any]]) -> None:
    results = [make("one"), make("two", request_rate=30.0)]
    charts = comparison_charts(results) + [chart for result in results for chart in scenario_charts(result)]
    assert len(charts) == 4 + 5 + 6
    for chart in charts:
        assert len(chart["data"]) == len(chart["series"]) + 1
        assert len({len(column) for column in chart["data"]}) == 1
        x = chart["data"][0]
        assert x == sorted(x)
        assert any(value for column in chart["data"][1:] for value in column) or chart["title"] == "Schedule error"
    for chart in charts[:2]:
        for column in chart["data"][1:]:
            assert column == sorted(column)
            assert (column[0], column[-1]) == (0, 100)
    for chart in charts[2:4]:
        for column in chart["data"][1:]:
            assert sum(column) == pytest.approx(100, abs=0.1)


def test_many_requests_are_thinned_out_but_the_slowest_stay(world: Any, known_delay: Callable[..., Any]) -> None:
    def plan(number: int, request: Any) -> tuple[float, list[float]]:
        return (5000 if number == 4321 else 50, [])

    scenario = Scenario(request_rate=1000.0, arrival="constant", duration_s=8, warmup_s=0)
    data = world.test(known_delay(plan=plan), scenario).to_dict()
    chart = scenario_charts(data)[0]
    assert len(chart["data"][0]) <= MOST_DOTS < 8000
    assert max(chart["data"][1]) == pytest.approx(5000)
    assert "Of 8,000 requests: one of 4, and the 500 slowest" in chart["note"]


@pytest.mark.parametrize("name", ["r.html", "r.json", "folder"])
def test_html_and_json_are_written_together(make: Callable[..., dict[str, Any]], tmp_path: Path, name: str) -> None:
    html, data = write_report([make()], tmp_path / "new" / name)
    stem = "r" if "." in name else "report"
    assert (html.name, data.name) == (f"{stem}.html", f"{stem}.json")
    assert html.read_text() == render_html([json.loads(data.read_text())["results"][0]])
    assert json.loads(data.read_text())["schema"] == 1
    assert sorted(html.parent.iterdir()) == sorted([html, data])


def test_nothing_is_written_when_the_page_cannot_be_made(make: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="schema 7"):
        write_report([make() | {"schema": 7}], tmp_path / "r.html")
    assert list(tmp_path.iterdir()) == []


def test_results_without_columns_and_no_results_are_refused(make: Callable[..., dict[str, Any]]) -> None:
    data = make()
    del data["requests"]
    with pytest.raises(InputError, match="columns per request"):
        render_html([data])
    with pytest.raises(InputError, match="no load-test result"):
        render_html([])


def test_the_vendored_files_are_the_ones_the_readme_names() -> None:
    assets = resources.files("trtkit.loadtest") / "assets"
    named = re.findall(r"`(uPlot[\w.]+)` sha256 ([0-9a-f]{64})", (assets / "README.md").read_text())
    assert [name for name, _ in named] == ["uPlot.iife.min.js", "uPlot.min.css"]
    for name, digest in named:
        assert hashlib.sha256((assets / name).read_bytes()).hexdigest() == digest
    assert "MIT" in (assets / "LICENSE.uPlot").read_text()
