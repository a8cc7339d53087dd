"""`trtkit inspect`: what is in a source, a checkpoint, an engine, a model repository or an artifact store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trtkit.cli._common import json_option, print_json, print_table, progress

if TYPE_CHECKING:
    from trtkit.inspect import Kind, Report

_KINDS = click.Choice(["source", "checkpoint", "engine", "repository", "store"])


@click.command("inspect")
@click.argument("path")
@click.option("--revision", help="Commit, tag or branch of a hub id.")
@click.option("--kind", type=_KINDS, help="What to take PATH for, when it could be several things.")
@json_option
def command(path: str, revision: str | None, kind: Kind | None, as_json: bool) -> None:
    """Print what is in PATH: a source (a folder, a hub id, s3://... or gs://...), a TRT-LLM checkpoint, an engine, a
    model repository, or a folder of the artifact store.

    Only configs and headers are read, never weights: of a source that is not on this machine little is downloaded. A
    source that trtkit does not convert is described too, with the reason.

    \b
    Example:
      trtkit inspect examples/tiny-llama
      trtkit inspect meta-llama/Llama-3.1-8B --json
      trtkit inspect model_repository
    """
    from trtkit.inspect import inspect_path

    def download(name: str) -> Any:
        return progress(f"reading headers of {name}")

    report = inspect_path(path, revision=revision, kind=kind, on_download=download)
    if as_json:
        print_json({"kind": report.kind, **asdict(report)})
        return
    print_report(report)


def print_report(report: Report) -> None:
    """A report as tables."""
    rows: dict[str, Callable[[Any], Iterator[tuple[str, str]]]] = {
        "source": _source, "checkpoint": _checkpoint, "engine": _engine, "repository": _repository, "store": _store,
    }  # fmt: skip
    lines = list(rows[report.kind](report))
    for problem in report.problems:
        lines += [("problem", problem.cause), *([("fix", problem.fix)] if problem.fix else [])]
    print_table([report.kind, report.path], lines)
