"""What is shown on stderr while a test runs: one live line on a terminal, else a plain line every few seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from trtkit.loadtest.runner import Progress

PLAIN_PERIOD_S = 5.0


def line(progress: Progress) -> str:
    """How far a run is, in one line."""
    parts = [f"{progress.phase} {progress.elapsed_s:.0f}/{progress.total_s:.0f} s", f"{progress.done:,} done"]
    parts += [f"{progress.rps:.1f}/s", f"{progress.in_flight} in flight"]
    if progress.p50_ms is not None:
        parts.append(f"{progress.p50_of} p50 {progress.p50_ms:.0f} ms")
    parts += [f"{progress.errors:,} failed"] if progress.errors else []
    parts += [f"{progress.dropped:,} dropped"] if progress.dropped else []
    return ", ".join(parts)


@contextmanager
def show_progress(name: str) -> Iterator[Callable[[Progress], None]]:
    """Gives the function to pass as `on_progress`; `name` is the scenario's."""
    if not sys.stderr.isatty():
        yield _plain(name)
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    def text(state: str) -> Text:
        return Text(f"{name}: {state}", no_wrap=True, overflow="ellipsis")

    # Drawn only when there is news: a refreshing thread would take time from the event loop that is measured.
    with Live(text("connecting"), console=Console(stderr=True), auto_refresh=False, transient=True) as live:
        yield lambda progress: live.update(text(line(progress)), refresh=True)


def _plain(name: str) -> Callable[[Progress], None]:
    last_s = float("-inf")

    def show(progress: Progress) -> None:
        nonlocal last_s
        if progress.elapsed_s - last_s >= PLAIN_PERIOD_S:
            last_s = progress.elapsed_s
            sys.stderr.write(f"{name}: {line(progress)}\n")
            sys.stderr.flush()

    return show
