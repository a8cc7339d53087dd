"""`trtkit convert`: a Hugging Face checkpoint becomes a TRT-LLM checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from trtkit.cli._common import dry_run_option, json_option, note, print_json, print_table, progress

if TYPE_CHECKING:
    from trtkit.convert.plan import Plan


@click.command("convert")
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--tp", default=1, show_default=True, type=click.IntRange(1, 64), help="Tensor-parallel size.")
@click.option("--pp", default=1, show_default=True, type=click.IntRange(1, 64), help="Pipeline-parallel size.")
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float16", "bfloat16", "float32"]),
    help="Dtype of the checkpoint; auto keeps the source's, with float32 becoming float16.",
)
@click.option(
    "--parallel-embedding",
    default="none",
    show_default=True,
    type=click.Choice(["none", "vocab", "hidden"]),
    help="Axis along which TP splits the token embedding.",
)
@click.option("--revision", help="Commit, tag or branch of a hub id.")
@click.option("--force", is_flag=True, help="Replace OUT if it is an earlier checkpoint.")
@dry_run_option
@json_option
def command(
    source: str,
    out: Path,
    tp: int,
    pp: int,
    dtype: Literal["auto", "float16", "bfloat16", "float32"],
    parallel_embedding: Literal["none", "vocab", "hidden"],
    revision: str | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Convert SOURCE (a folder or a hub id) to a TRT-LLM checkpoint in OUT.

    Needs no GPU, no TensorRT-LLM and no torch. OUT appears whole or not at all.

    \b
    Example:
      trtkit convert examples/tiny-llama /tmp/checkpoint --tp 2 --dtype float16
      trtkit convert meta-llama/Llama-3.1-8B ./checkpoint --revision main --tp 2 --pp 2
      trtkit convert ./Mistral-7B ./checkpoint --tp 4 --dry-run
    """
    from trtkit import hf
    from trtkit.config import CheckpointConfig
    from trtkit.convert.source import plan_conversion
    from trtkit.convert.conversion import check_target, convert

    opened = hf.open_source(source, revision=revision)
    plan = plan_conversion(opened, CheckpointConfig(tp=tp, pp=pp, dtype=dtype, parallel_embedding=parallel_embedding))
    check_target(out, opened, replace=force)
    summary = _summary(plan, opened.nbytes, out)
    if dry_run:
        _print(summary, plan, as_json)
        return
    started = time.monotonic()
    with progress(f"converting {opened.path.name} to {plan.config['dtype']}, TP {tp} x PP {pp}") as update:
        report = convert(plan, opened, out, replace=force, on_progress=update)
    summary["seconds"] = round(time.monotonic() - started, 3)
    summary |= {"rounded": report.rounded, "flushed_to_zero": report.flushed}
    _print(summary, plan, as_json)
    if report.flushed and not as_json:
        note(f"warning: {report.flushed} tiny values became zero in {plan.config['dtype']}")


def _summary(plan: Plan, source_bytes: int, out: Path) -> dict[str, Any]:
    return {
        "out": str(out),
        "architecture": plan.config["architecture"],
        "dtype": plan.config["dtype"],
        "tp": plan.config["mapping"]["tp_size"],
        "pp": plan.config["mapping"]["pp_size"],
        "source_tensors": len(plan.sources),
        "source_bytes": source_bytes,
        "rank_bytes": [plan.rank_bytes(rank) for rank in range(len(plan.ranks))],
    }


def _print(summary: dict[str, Any], plan: Plan, as_json: bool) -> None:
    from trtkit.checkpoint import rank_file

    if as_json:
        print_json(summary)
        return
    rows = [(rank_file(rank), len(plan.ranks[rank]), f"{size:,}") for rank, size in enumerate(summary["rank_bytes"])]
    title = f"{summary['architecture']} {summary['dtype']} TP {summary['tp']} x PP {summary['pp']} -> {summary['out']}"
    print_table(["file", "tensors", "bytes"], rows, title)
