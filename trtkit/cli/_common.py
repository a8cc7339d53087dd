"""What the verbs share: options, tables, JSON and progress. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from trtkit.findings import Finding
    from trtkit.hf import Source

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Print what would be done and change nothing.")


def print_json(data: Any) -> None:
    """The result as JSON on stdout. When the command fails after it, the result stays the only document there."""
    click.echo(json.dumps(data, indent=2, ensure_ascii=False))
    context = click.get_current_context(silent=True)
    if context is not None and isinstance(context.obj, dict):  # made by `trtkit.cli.main`
        context.obj["answered"] = True


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None) -> None:
    """A table on stdout. Wide cells wrap at the terminal's width; into a file or pipe they stay whole."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if title:
        click.echo(title)
    table = Table(header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else str(cell) for cell in row))
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 1000, highlight=False).print(table)


def print_findings(findings: Sequence[Finding], nothing: str) -> None:
    """Findings as lines `severity id place: cause` with the fix below, or `nothing` when there are none."""
    colours = {"error": "red", "warning": "yellow", "info": "blue"}
    for finding in findings:
        click.secho(finding.severity, fg=colours[finding.severity], nl=False)
        click.echo(f" {finding.id} {finding.place}: {finding.cause}")
        if finding.fix:
            click.echo(f"    fix: {finding.fix}")
    if not findings:
        click.echo(nothing)


def note(text: str) -> None:
    """A line of progress or log, on stderr."""
    click.echo(text, err=True)


@contextmanager
def progress(label: str, unit: str = "bytes") -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, as a function `update(done, total)`.

    Without a terminal it prints one line when the work starts and one when it ends, so that CI logs stay short.
    """
    if not sys.stderr.isatty():
        note(f"{label} ...")
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    amount = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def progress_steps() -> Iterator[Callable[[str, str, int, int], None]]:
    """Progress of work in several steps, as a function `update(what, unit, done, total)`: a bar for each, one after the
    other."""
    with ExitStack() as stack:
        current = ""
        update: Callable[[int, int], None] = lambda done, total: None  # noqa: E731

        def step(what: str, unit: str, done: int, total: int) -> None:
            nonlocal current, update
            if what != current:
                stack.close()
                current, update = what, stack.enter_context(progress(what, unit))
            update(done, total)

        yield step


def open_source(source: str, revision: str | None = None) -> Source:
    """`hf.open_source`, with a progress bar for downloads from a bucket (the hub's library has its own).

    Raises: what `hf.open_source` raises.
    """
    from trtkit import hf, remote

    if not remote.is_remote(source):
        return hf.open_source(source, revision=revision)
    with progress(f"downloading {remote.parse(source).url}") as update:
        return hf.open_source(source, revision=revision, on_progress=update)
