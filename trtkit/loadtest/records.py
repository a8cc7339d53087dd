"""What a run leaves behind: one record per request and the times that frame them, all as `Clock.now_ns` tells them."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from trtkit.config import Scenario

Outcome = Literal["ok", "error", "dropped", "unfinished"]
"""`dropped`: never sent, since too many were in flight. `unfinished`: still running when the run was interrupted."""


@dataclass(frozen=True)
class Clock:
    """Where time comes from. The client stamps its chunks with the first one's default, so both must agree."""

    now_ns: Callable[[], int] = time.perf_counter_ns
    cpu_ns: Callable[[], int] = time.process_time_ns
    """CPU time that this process has used."""


@dataclass(slots=True)
class Record:
    """One request.

    Attributes:
        prompt: index into the prompts.
        intended_ns: when it was due (open loop) or sent (closed loop).
        sent_ns: when it was handed to the client; 0 until then.
        end_ns: when its last response was in, or it failed, or was given up.
        error: what failed, when `outcome` is `error`.
        chunk_ns: when each chunk with text arrived (streaming only).
        texts: those chunks, or the whole answer; kept only when tokens are to be counted.
        tokens: of the answer, where the served model tells; -1 where it does not.
        empty: it succeeded without a single character.
    """

    prompt: int
    intended_ns: int
    sent_ns: int = 0
    end_ns: int = 0
    outcome: Outcome = "unfinished"
    error: str = ""
    chunk_ns: array[int] = field(default_factory=lambda: array("q"))
    texts: list[str] = field(default_factory=list)
    tokens: int = -1
    empty: bool = False


@dataclass
class Run:
    """Everything that was noted during one scenario.

    Attributes:
        start_ns: when the first request could be sent.
        window_start_ns: end of the warm-up, start of the measurement.
        window_end_ns: end of the measurement; requests still running then are waited for, but the rates leave that out.
        ended_by: what ended the measurement.
        lag_ns: by how much the event loop woke up late, sampled during the measurement.
        cpu_share: CPU time of this process per wall time during the measurement; 1.0 is one core.
        due: arrivals that the schedule holds for the measurement (open loop).
    """

    name: str
    scenario: Scenario
    prompts: list[str]
    target: str
    model: str
    started_at: str
    start_ns: int
    window_start_ns: int
    window_end_ns: int
    ended_by: Literal["duration", "max_requests", "interrupt"] = "duration"
    records: list[Record] = field(default_factory=list)
    lag_ns: array[int] = field(default_factory=lambda: array("q"))
    cpu_share: float | None = None
    due: int | None = None
