"""`trtkit inspect`: what is in a source, a checkpoint, an engine, a model repository or an artifact store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from trtkit.cli._common import json_option, note, print_json, print_table

if TYPE_CHECKING:
    from trtkit.inspect import CheckpointReport, EngineReport, Kind, Report, SourceReport
    from trtkit.inspect.headers import DtypeShare
    from trtkit.inspect.model import ModelFacts, Quantization
    from trtkit.inspect.repository import ModelReport
    from trtkit.inspect.source import Layouts

Rows = Iterator[tuple[str, Any]]
"""Name and value of each line; a value of None or nothing is left out."""

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

    report = inspect_path(path, revision=revision, kind=kind, on_step=note)
    if as_json:
        print_json({"kind": report.kind, **asdict(report)})
        return
    print_report(report)


def print_report(report: Report) -> None:
    """A report as tables: what it is, its parts, what is wrong."""
    if report.kind in ("repository", "store"):
        _print_list(report)
    else:
        print_table([report.kind, report.path], _rows(report))
    for problem in report.problems:
        click.echo(f"problem: {problem.cause}")
        if problem.fix:
            click.echo(f"    fix: {problem.fix}")


def _rows(report: Any) -> list[tuple[str, str]]:
    describe: dict[str, Callable[[Any], Rows]] = {"source": _source, "checkpoint": _checkpoint, "engine": _engine}
    lines = describe[report.kind](report)
    return [(name, str(value)) for name, value in lines if value not in (None, "")]


def _source(report: SourceReport) -> Rows:
    closest = f"; closest: {', '.join(report.near)}" if report.near else ""
    yield (
        "architecture",
        report.architecture
        and (report.architecture if report.supported else f"{report.architecture} (not supported{closest})"),
    )
    yield "origin", None if report.origin == report.path or report.origin.startswith("file:") else report.origin
    if report.parameters:
        active = f", {_rounded(report.active_parameters)} active per token" if report.active_parameters else ""
        yield "parameters", f"{report.parameters:,} ({_rounded(report.parameters)}{active})"
    yield "weights", f"{_bytes(report.bytes)} in {report.tensors:,} tensors, {_plural(report.files, 'file')}"
    yield "dtypes", _dtypes(report.dtypes)
    yield from _model(report.model, report.quantization)
    if report.layouts:
        yield from _layouts(report.layouts, quantised=report.quantization is not None)
    yield "converts", "yes" if report.convertible else "no"
    for warning in report.warnings:
        yield "warning", warning


def _layouts(found: Layouts, *, quantised: bool) -> Rows:
    yield "TP sizes", ", ".join(map(str, found.tp))
    yield "PP sizes", f"1 to {found.pp_max}" if found.pp_max > 1 else "1"
    yield "EP sizes", "; ".join(f"{ep} with TP {', '.join(map(str, sizes))}" for ep, sizes in found.ep.items())
    stored = "of the unquantised model" if quantised else "converted" if found.converts_dtype else "as stored"
    yield "checkpoint dtype", f"{found.dtype}, {stored}"
    yield "bytes per rank", ", ".join(f"TP {tp}: {_bytes(size)}" for tp, size in found.rank_bytes.items())


def _checkpoint(report: CheckpointReport) -> Rows:
    yield (
        "architecture",
        report.architecture if report.supported else f"{report.architecture} (trtkit has no table of it)",
    )
    if report.parameters:
        yield "parameters", f"{report.parameters:,} ({_rounded(report.parameters)})"
    yield "dtype", report.dtype
    yield "layout", _layout(report)
    yield "ranks", _ranks(report)
    yield "stored dtypes", _dtypes(report.dtypes)
    yield from _model(report.model, report.quantization)
    made = report.conversion
    yield "made by", (made and made.made_by) or report.producer
    if made:
        yield "made from", made.origin
        yield "source digest", made.source_digest and f"config.json sha256 {made.source_digest}"
        yield "checksums", f"{made.checksums} of {made.files} files (`trtkit verify` compares them)"


def _engine(report: EngineReport) -> Rows:
    yield "architecture", report.architecture
    tags = f" (containers {', '.join(report.releases)})" if report.releases else ""
    yield "TensorRT-LLM", report.tensorrt_llm + tags
    yield "dtype", report.dtype
    yield "layout", _layout(report)
    yield "ranks", _ranks(report)
    yield from report.limits.items()
    yield "kv_cache_type", report.kv_cache_type
    yield "plugins", ", ".join(f"{name} {dtype}" for name, dtype in report.plugins.items())
    yield from _model(report.model, report.quantization)


def _model(model: ModelFacts, quantization: Quantization | None) -> Rows:
    """What sources, checkpoints and engines say alike."""
    yield "quantisation", _quantization(quantization)
    yield "layers", model.layers
    if model.heads:
        yield "heads", f"{model.heads} of size {model.head_size}, {model.kv_heads} for keys and values"
    yield "hidden size", model.hidden_size
    yield "expert size" if model.experts else "MLP size", model.intermediate_size
    if model.experts:
        yield "experts", f"{model.experts}, {model.experts_per_token} per token"
    if model.vocabulary:
        yield "vocabulary", f"{model.vocabulary:,}{', tied embeddings' if model.tied_embeddings else ''}"
    if model.context:
        times = f" x {model.rope_factor:g}" if model.rope_factor else ""
        scaling = f", rope scaling {model.rope_scaling}{times}" if model.rope_scaling else ""
        yield "context", f"{model.context:,} tokens{scaling}"


def _quantization(found: Quantization | None) -> str:
    if found is None:
        return "none"
    parts = [found.method or "weights plain"]
    parts += [f"{found.bits} bits"] if found.bits else []
    parts += [f"groups of {found.group_size}"] if found.group_size else []
    parts += [f"key/value cache {found.kv_cache}"] if found.kv_cache else []
    return ", ".join(parts)


def _print_list(report: Any) -> None:
    if report.kind == "repository":
        columns = [
            "model", "backend", "runtime", "versions", "max_batch_size", "decoupled", "instances", "inputs", "outputs",
        ]  # fmt: skip
        what = "".join(f"{each}, " for each in (*report.runtimes, *([report.topology] if report.topology else [])))
        title = f"repository {report.path}: {what}{_plural(report.files, 'file')}, {_bytes(report.bytes)}"
        print_table(columns, [_model_row(model) for model in report.models], title)
        click.echo(f"`trtkit repo lint`: {_plural(report.errors, 'error')}, {_plural(report.warnings, 'warning')}")
        return
    columns = ["artifact", "architecture", "dtype", "layout", "quantisation", "bytes", "created"]
    rows = [
        (
            each.path, each.report.architecture, _stored(each.report), _layout(each.report),
            _quantization(each.report.quantization), _bytes(each.report.bytes), _date(each.created),
        )
        for each in report.artifacts
    ]  # fmt: skip
    print_table(columns, rows, f"store {report.path}: {_plural(len(rows), 'artifact')}")


def _model_row(model: ModelReport) -> tuple[object, ...]:
    if model.max_batch_size is None:
        return model.name, "unreadable", *[""] * 7
    backend = f"ensemble: {' > '.join(model.steps)}" if model.steps else model.backend or "(Triton guesses)"
    runtime = f"asks {model.drives}" if model.drives else model.runtime or "-"
    decoupled = "yes" if model.decoupled else "no"
    instances = ", ".join(model.instances)
    versions = ", ".join(map(str, model.versions))
    return (
        model.name, backend, runtime, versions, model.max_batch_size, decoupled, instances, len(model.inputs),
        len(model.outputs),
    )  # fmt: skip


def _stored(report: CheckpointReport | EngineReport | SourceReport) -> str | None:
    from trtkit.inspect import SourceReport

    if isinstance(report, SourceReport):
        return max(report.dtypes, key=lambda each: each.share).dtype if report.dtypes else None
    return report.dtype


def _layout(report: CheckpointReport | EngineReport | SourceReport) -> str:
    from trtkit.inspect import SourceReport

    if isinstance(report, SourceReport):
        return "Hugging Face"
    experts = f" x EP {report.ep}" if report.ep > 1 else ""
    return f"TP {report.tp} x PP {report.pp}{experts}"


def _ranks(report: CheckpointReport | EngineReport) -> str:
    present = [rank for rank in report.ranks if rank.problem is None]
    sizes = sorted({rank.bytes for rank in present})
    each = "" if not sizes else _bytes(sizes[0]) if len(sizes) == 1 else f"{_bytes(sizes[0])} to {_bytes(sizes[-1])}"
    if len(present) < len(report.ranks):
        lacks = ", ".join(rank.file for rank in report.ranks if rank.problem is not None)
        return f"INCOMPLETE: {len(present)} of {len(report.ranks)} are good, not {lacks}"
    state = "" if report.complete else "INCOMPLETE: "
    return f"{state}{len(present)}, {each}{' each' if len(present) > 1 else ''}"


def _dtypes(found: list[DtypeShare]) -> str:
    return ", ".join(f"{each.dtype} {100 * each.share:.4g}%" for each in found)


def _bytes(count: int) -> str:
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return _plural(count, "byte")


def _rounded(count: int) -> str:
    for unit, name in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return str(count)


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _date(seconds: int | None) -> str:
    import time

    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
