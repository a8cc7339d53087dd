"""A run as arrays, which everything that is reported is computed from. Pure.

What the output of a request is counted in, best first: tokens as the served model counts them, tokens as a given
tokenizer does, chunks. All requests of a run are counted alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trtkit.loadtest.records import Run

Unit = Literal["tokens", "chunks"] | None


@dataclass(frozen=True)
class Columns:
    """The run as arrays, one element per request: times in int64 nanoseconds from the start of the run.

    Attributes:
        unit: what `output` counts, None where nothing tells.
        first: first chunk with text; -1 where there is none.
        output: tokens or chunks; -1 where unknown.
        head: those of them in the first chunk.
        measured: whether the request was due inside the measurement.
        chunk_time, chunk_weight: of all output of all requests: when it arrived, and how many tokens or chunks it was.
        gap_end, gap, gap_position: of all gaps between chunks: when it ended, its length, its place in its answer,
            counted from 1.
        window: start and end of the measurement.
    """

    unit: Unit
    intended: NDArray[np.int64]
    sent: NDArray[np.int64]
    first: NDArray[np.int64]
    end: NDArray[np.int64]
    output: NDArray[np.int64]
    head: NDArray[np.int64]
    outcome: NDArray[np.str_]
    measured: NDArray[np.bool_]
    chunk_time: NDArray[np.int64]
    chunk_weight: NDArray[np.float64]
    gap_end: NDArray[np.int64]
    gap: NDArray[np.int64]
    gap_position: NDArray[np.int64]
    window: tuple[int, int]

    @property
    def ok(self) -> NDArray[np.bool_]:
        """Measured and successful."""
        return np.asarray(self.measured & (self.outcome == "ok"), dtype=np.bool_)


def columns_of(run: Run, count_tokens: Callable[[str], int] | None = None) -> Columns:
    """Arrays of a run."""
    records, start = run.records, run.start_ns
    window = (run.window_start_ns - start, run.window_end_ns - start)
    intended = np.array([r.intended_ns for r in records], dtype=np.int64) - start
    chunks = np.array([len(r.chunk_ns) for r in records], dtype=np.int64)
    times = np.concatenate([np.zeros(0, np.int64), *(np.frombuffer(r.chunk_ns, np.int64) for r in records)]) - start
    output, head, unit = _output(run, chunks, count_tokens)
    owner = np.repeat(np.arange(len(records)), chunks)
    position = np.arange(len(times)) - np.repeat(np.cumsum(chunks) - chunks, chunks)
    follows = position > 0
    gaps = np.diff(times, prepend=0)
    weight = np.where(chunks > 0, np.maximum(output, 0) / np.maximum(chunks, 1), 0.0)[owner]
    if not run.scenario.streaming and unit is not None:
        times = np.array([r.end_ns for r in records], dtype=np.int64) - start
        weight = np.maximum(output, 0).astype(np.float64)
    return Columns(
        unit=unit,
        intended=intended,
        sent=np.array([r.sent_ns for r in records], dtype=np.int64) - start,
        first=np.array([r.chunk_ns[0] - start if r.chunk_ns else -1 for r in records], dtype=np.int64),
        end=np.array([r.end_ns for r in records], dtype=np.int64) - start,
        output=output,
        head=head,
        outcome=np.array([r.outcome for r in records], dtype=np.str_),
        measured=(intended >= window[0]) & ((intended < window[1]) | (run.ended_by == "max_requests")),
        chunk_time=times,
        chunk_weight=weight,
        gap_end=times[follows] if run.scenario.streaming else np.zeros(0, np.int64),
        gap=gaps[follows] if run.scenario.streaming else np.zeros(0, np.int64),
        gap_position=position[follows] if run.scenario.streaming else np.zeros(0, np.int64),
        window=window,
    )


def _output(
    run: Run, chunks: NDArray[np.int64], count_tokens: Callable[[str], int] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64], Unit]:
    """Output per request, how much of it came with the first chunk, and what it is counted in."""
    records = run.records
    heads = np.minimum(chunks, 1)
    if count_tokens is not None:
        firsts = [max(1, count_tokens(r.texts[0])) if r.texts else 0 for r in records]
        heads = np.array(firsts, dtype=np.int64)
    told = np.array([r.tokens for r in records], dtype=np.int64)
    succeeded = np.array([r.outcome == "ok" for r in records], dtype=np.bool_)
    if succeeded.any() and (told[succeeded] >= 0).all():
        # One that failed was not counted to its end; each of its chunks is a token at least.
        totals = np.where(told < 0, chunks, told)
        return totals, np.minimum(heads, totals), "tokens"
    if count_tokens is not None:
        lengths = [count_tokens("".join(r.texts)) if r.texts else 0 for r in records]
        return np.array(lengths, dtype=np.int64), heads, "tokens"
    if run.scenario.streaming:
        return chunks, heads, "chunks"
    return np.full(len(chunks), -1, np.int64), np.zeros(len(chunks), np.int64), None
