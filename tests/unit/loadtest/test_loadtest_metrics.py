"""From records to numbers, on runs made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtkit.config import Scenario
from trtkit.errors import InputError
from trtkit.loadtest.columns import columns_of
from trtkit.loadtest.metrics import DEFINITIONS, LATENCIES, summarise, summary
from trtkit.loadtest.records import Record, Run
from trtkit.loadtest.sections import LABELS
from trtkit.loadtest.series import histogram, timeline
from trtkit.loadtest.tokens import token_counter

MS = 1_000_000


def run_of(*records: Record, end_ms: float = 10_000, **scenario: Any) -> Run:
    scenario = {"concurrency": 1, "warmup_s": 0.0, **scenario}
    run = Run("s", Scenario(**scenario), ["p"], "", "m", "now", 0, 0, round(end_ms * MS))
    run.records.extend(records)
    return run


def answered(sent_ms: float, *chunks_ms: float, end_ms: float | None = None, due_ms: float | None = None) -> Record:
    record = Record(0, round((sent_ms if due_ms is None else due_ms) * MS), round(sent_ms * MS), outcome="ok")
    record.chunk_ns.extend(round(chunk * MS) for chunk in chunks_ms)
    record.end_ns = round((chunks_ms[-1] if end_ms is None else end_ms) * MS)
    return record


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=300))
def test_percentiles_are_ordered_and_within_the_values(values: list[int]) -> None:
    entry = summary(np.array(values))
    assert entry is not None
    low, high = min(values) / 1e6, max(values) / 1e6
    assert low <= entry["p50"] <= entry["p90"] <= entry["p99"] <= entry["max"] == high
    assert low * (1 - 1e-9) <= entry["mean"] <= high * (1 + 1e-9)
    assert entry["count"] == len(values)
    assert entry["enough_for_p99"] == (len(values) >= 100)


def test_percentiles_interpolate_linearly() -> None:
    entry = summary(np.arange(1, 101) * MS)
    assert entry is not None
    assert (entry["p50"], entry["p90"], entry["p99"]) == pytest.approx((50.5, 90.1, 99.01))


def test_tpot_leaves_out_the_first_chunk_and_needs_two() -> None:
    result = summarise(run_of(answered(0, 100, 120, 140, end_ms=160), answered(200, 300)))
    tpot = result.latency["tpot"]
    assert tpot is not None
    assert (tpot["count"], tpot["p50"]) == (1, 30)  # (160 - 100) / (3 - 1)


def test_tokens_are_counted_when_a_counter_is_given() -> None:
    record = answered(0, 100, 200, end_ms=300)
    record.texts.extend(["one two ", "three four five"])
    result = summarise(run_of(record), lambda text: len(text.split()))
    assert result.throughput == {
        "requests_per_s": 0.1,
        "output_per_s": 0.5,
        "output_unit": "tokens",
        "output_total": 5,
    }
    tpot = result.latency["tpot"]
    assert tpot is not None
    assert tpot["p50"] == pytest.approx(200 / 3)  # two tokens came with the first chunk
    assert "TK822" not in {finding.id for finding in result.findings}


def test_without_streaming_output_is_unknown_or_counted_at_the_end() -> None:
    record = answered(0, end_ms=400)
    record.texts.append("a b c d")
    unknown = summarise(run_of(record, streaming=False))
    assert unknown.throughput["output_unit"] is unknown.throughput["output_per_s"] is None
    assert unknown.requests["output"] == [None]
    assert "TK823" in {finding.id for finding in unknown.findings}
    counted = summarise(run_of(record, streaming=False), lambda text: len(text.split()))
    assert counted.throughput["output_per_s"] == 0.4
    assert counted.latency["itl"] is None


def test_events_behind_the_measurement_do_not_count_for_rates_but_their_latency_does() -> None:
    result = summarise(run_of(answered(0, 500, 900), answered(100, 950, 1500, 2000), end_ms=1000))
    assert result.throughput["requests_per_s"] == 1
    assert result.throughput["output_per_s"] == 3
    e2e, itl = result.latency["e2e"], result.latency["itl"]
    assert e2e is not None
    assert itl is not None
    assert (e2e["count"], e2e["max"]) == (2, 1900)
    assert (itl["count"], itl["max"]) == (1, 400)


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 4000)), min_size=1, max_size=40))
def test_timeline_keeps_totals(requests: list[tuple[int, int]]) -> None:
    run = run_of(*(answered(sent, sent + took) for sent, took in requests))
    line = timeline(columns_of(run), "chunks")
    bin_s = line["bin_s"]
    assert sum(line["completed_per_s"]) * bin_s == pytest.approx(len(requests), rel=1e-3)
    assert sum(line["output_per_s"]) * bin_s == pytest.approx(len(requests), rel=1e-3)
    busy_s = sum(took for _, took in requests) / 1000
    assert sum(line["in_flight"]) * bin_s == pytest.approx(busy_s, rel=1e-3, abs=1e-4 * len(line["t"]))


@given(st.lists(st.integers(0, 10**11), min_size=1, max_size=200))
def test_histogram_keeps_every_value_in_its_bin(values: list[int]) -> None:
    bins = histogram(np.array(values))
    assert sum(count for _, count in bins) == len(values)
    for place, _ in bins:
        low, high = 10 ** (place / 100), 10 ** ((place + 1) / 100)
        assert any(low * 0.999 <= max(value, 1000) / 1e6 < high * 1.001 for value in values)


def test_itl_by_position_finds_the_slow_token() -> None:
    run = run_of(*(answered(start, start + 10, start + 20, start + 70, start + 80) for start in range(0, 5000, 100)))
    table = summarise(run).series["itl_by_position"]
    assert table["position"] == [2, 3, 4]
    assert table["p50_ms"] == [10, 50, 10]
    assert table["count"] == [50, 50, 50]


def test_the_result_is_json_with_equally_long_columns() -> None:
    failed = answered(200, 300)
    failed.outcome, failed.error = "error", "timeout"
    data = json.loads(json.dumps(summarise(run_of(answered(0, 100), failed)).to_dict(), allow_nan=False))
    assert (data["schema"], data["complete"]) == (1, True)
    lengths = {len(column) for column in data["requests"].values() if isinstance(column, list)}
    assert lengths == {2}
    assert data["requests"]["first"] == [100_000, 300_000]
    assert data["requests"]["ok"] == [True, False]
    assert data["errors"] == [{"kind": "timeout", "count": 1}]
    short = summarise(run_of(answered(0, 100))).to_dict(raw=False)
    assert "requests" not in short
    assert "series" not in short


def test_every_latency_has_a_name_and_a_definition() -> None:
    assert {*LATENCIES, "loop_lag"} == set(LABELS) <= set(DEFINITIONS)


def test_counts_tokens_with_a_local_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert token_counter(tmp_path)("a b c d") == 4
    assert token_counter(tmp_path / "tokenizer.json")("") == 0


def test_a_bad_tokenizer_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        token_counter(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="not a tokenizer"):
        token_counter(tmp_path)
