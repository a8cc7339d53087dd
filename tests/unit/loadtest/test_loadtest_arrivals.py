"""Arrivals of the open loop: their rate, their bounds, and that nothing but the seed decides them."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtkit.errors import InputError
from trtkit.loadtest.arrivals import NS, arrival_offsets

ARRIVALS = st.sampled_from(["poisson", "constant"])
Arrival = Literal["poisson", "constant"]


@given(
    rate=st.floats(0.1, 5000),
    warmup=st.floats(0, 3),
    duration=st.floats(0.01, 5),
    arrival=ARRIVALS,
    seed=st.integers(0),
)
def test_sorted_inside_and_repeatable(rate: float, warmup: float, duration: float, arrival: Arrival, seed: int) -> None:
    def make() -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return arrival_offsets(rate, warmup_s=warmup, duration_s=duration, arrival=arrival, seed=seed)

    offsets = make()
    assert offsets.dtype == np.int64
    assert (np.diff(offsets) >= 0).all()
    assert not len(offsets) or (offsets[0] >= 0 and offsets[-1] < round((warmup + duration) * NS))
    np.testing.assert_array_equal(offsets, make())


@given(rate=st.floats(0.5, 2000), duration=st.floats(0.05, 10))
def test_constant_is_evenly_spaced(rate: float, duration: float) -> None:
    offsets = arrival_offsets(rate, duration_s=duration, arrival="constant")
    assert abs(len(offsets) - rate * duration) <= 1
    np.testing.assert_allclose(offsets, np.arange(len(offsets)) * NS / rate, atol=0.5001)


@given(seed=st.integers(0, 2**32))
def test_poisson_has_the_rate_and_the_spread_of_a_poisson_process(seed: int) -> None:
    offsets = arrival_offsets(200, duration_s=50, seed=seed)
    # 10,000 arrivals expected with a standard deviation of 100; six of them happen by chance once in 500 million draws.
    assert abs(len(offsets) - 10_000) < 600
    gaps = np.diff(offsets) / NS
    assert abs(gaps.mean() * 200 - 1) < 0.06
    assert abs(gaps.std() / gaps.mean() - 1) < 0.1
    per_second = np.histogram(offsets, np.arange(0, 51) * NS)[0]
    assert 0.2 < per_second.var() / per_second.mean() < 2.5  # 1 for Poisson, 0 for constant arrivals


@given(seed=st.integers(0, 1000), short=st.floats(0.1, 5), longer=st.floats(0, 50))
def test_a_longer_test_begins_like_a_shorter_one(seed: int, short: float, longer: float) -> None:
    first = arrival_offsets(100, duration_s=short, seed=seed)
    second = arrival_offsets(100, duration_s=short + longer, seed=seed)
    np.testing.assert_array_equal(first, second[: len(first)])


@given(limit=st.integers(1, 500), warmup=st.floats(0, 2), arrival=ARRIVALS, seed=st.integers(0, 1000))
def test_max_requests_counts_behind_the_warmup(limit: int, warmup: float, arrival: Arrival, seed: int) -> None:
    everything = arrival_offsets(100, warmup_s=warmup, duration_s=3, arrival=arrival, seed=seed)
    offsets = arrival_offsets(100, warmup_s=warmup, duration_s=3, arrival=arrival, seed=seed, max_requests=limit)
    behind = int((everything >= round(warmup * NS)).sum())
    assert int((offsets >= round(warmup * NS)).sum()) == min(limit, behind)
    np.testing.assert_array_equal(offsets, everything[: len(offsets)])


def test_different_seeds_differ() -> None:
    assert not np.array_equal(arrival_offsets(50, duration_s=1, seed=1), arrival_offsets(50, duration_s=1, seed=2))


def test_too_long_a_schedule_is_refused_before_memory_is_taken() -> None:
    with pytest.raises(InputError, match="more than 20,000,000 requests"):
        arrival_offsets(100_000, duration_s=86_400)
