"""When the requests of an open loop are due: computed before the test starts, so that nothing that happens during the
test can move an arrival."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trtkit.errors import InputError

NS = 1_000_000_000
"""Nanoseconds per second."""

MOST_ARRIVALS = 20_000_000
"""Longest schedule, 160 MB; also far more requests than one process can send and remember."""


def arrival_offsets(
    rate: float,
    *,
    warmup_s: float = 0.0,
    duration_s: float,
    arrival: Literal["poisson", "constant"] = "poisson",
    seed: int = 0,
    max_requests: int | None = None,
) -> NDArray[np.int64]:
    """Offsets of all arrivals from the start, int64 nanoseconds, sorted, all in `[0, warmup_s + duration_s)`.

    `constant` is `i / rate`. `poisson` draws exponential gaps with mean `1 / rate`; the same seed gives the same
    arrivals on every machine, and a longer duration only adds arrivals behind those of a shorter one.

    Args:
        rate: requests per second, > 0.
        warmup_s: part of the schedule, in seconds, that comes before the measurement.
        max_requests: at most so many arrivals behind the warm-up.

    Raises:
        InputError: the schedule would be longer than `MOST_ARRIVALS`.
    """
    end_ns = round((warmup_s + duration_s) * NS)
    if rate * end_ns / NS > MOST_ARRIVALS:
        raise InputError(
            f"{rate:g} requests/s for {end_ns / NS:g} s are more than {MOST_ARRIVALS:,} requests",
            "lower request_rate or duration_s",
        )
    if arrival == "constant":
        count = int(np.ceil(rate * end_ns / NS)) + 1
        offsets: NDArray[np.int64] = np.round(np.arange(count) * (NS / rate)).astype(np.int64)
    else:
        offsets = _poisson(rate, end_ns, np.random.Generator(np.random.PCG64(seed)))
    count = int(np.searchsorted(offsets, end_ns))
    if max_requests is not None:
        count = min(count, int(np.searchsorted(offsets, round(warmup_s * NS))) + max_requests)
    return offsets[:count]


def _poisson(rate: float, end_ns: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Arrivals until one lies at or behind `end_ns`. Blocks of one size keep the draws independent of the end."""
    blocks: list[NDArray[np.float64]] = []
    last = 0.0
    while not blocks or last < end_ns:
        times = last + np.cumsum(random.exponential(NS / rate, 1024))
        last = float(times[-1])
        blocks.append(times)
    return np.concatenate(blocks).astype(np.int64)
