"""`trtkit convert`: a Hugging Face checkpoint becomes a TRT-LLM checkpoint."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from trtkit.cli._common import dry_run_option, json_option, note, open_source, print_json, print_table, progress
from trtkit.cli._quantization import (
    asked_quantization,
    check_asked,
    check_out,
    chosen_quantization,
    convert_and_report,
    import_and_report,
    quantization_options,
)

if TYPE_CHECKING:
    from trtkit.convert.conversion import Conversion
    from trtkit.convert.plan import Plan


@click.command("convert")
@click.argument("source", required=False)
@click.argument("out", required=False, type=click.Path(path_type=Path))
@click.option("--tp", default=1, show_default=True, type=click.IntRange(1, 64), help="Tensor-parallel size.")
@click.option("--pp", default=1, show_default=True, type=click.IntRange(1, 64), help="Pipeline-parallel size.")
@click.option(
    "--ep",
    default=1,
    show_default=True,
    type=click.IntRange(1, 64),
    help="Expert-parallel size, a divisor of --tp: groups of ranks that share the experts among them.",
)
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float16", "bfloat16", "float32"]),
    help="Dtype of the checkpoint; auto keeps the source's, with float32 becoming float16.",
)
@click.option("--saturate", is_flag=True, help="Clip values beyond the range of the dtype instead of stopping.")
@click.option(
    "--parallel-embedding",
    default="none",
    show_default=True,
    type=click.Choice(["none", "vocab", "hidden"]),
    help="Axis along which TP splits the token embedding.",
)
@quantization_options
@click.option("--revision", help="Commit, tag or branch of a hub id.")
@click.option("--force", is_flag=True, help="Replace OUT if it is an earlier checkpoint.")
@click.option("--no-checksum", is_flag=True, help="Leave out checksums, and the search for NaN and infinity.")
@click.option("--no-sync", is_flag=True, help="Do not wait for the disk: a loss of power may damage OUT.")
@click.option(
    "--ray",
    metavar="ADDRESS",
    help="Spread the ranks over the nodes of this Ray cluster, which must share SOURCE and OUT (auto: the local one).",
)
@click.option("--list", "list_families", is_flag=True, help="Print the supported architectures and what they allow.")
@dry_run_option
@json_option
def command(
    source: str | None,
    out: Path | None,
    tp: int,
    pp: int,
    ep: int,
    dtype: Literal["auto", "float16", "bfloat16", "float32"],
    saturate: bool,
    parallel_embedding: Literal["none", "vocab", "hidden"],
    revision: str | None,
    force: bool,
    no_checksum: bool,
    no_sync: bool,
    ray: str | None,
    list_families: bool,
    dry_run: bool,
    as_json: bool,
    **quantize: Any,
) -> None:
    """Convert SOURCE (a folder, a hub id, s3://... or gs://...) to a TRT-LLM checkpoint in OUT.

    Needs no GPU and no TensorRT-LLM, and without --quantization no torch. OUT appears whole or not at all; after an
    interruption the same command goes on where it stopped.

    \b
    Example:
      trtkit convert examples/tiny-llama /tmp/checkpoint --tp 2 --dtype float16
      trtkit convert meta-llama/Llama-3.1-8B ./checkpoint --revision main --tp 2 --pp 2
      trtkit convert ./Mixtral-8x7B ./checkpoint --tp 4 --ep 2 --dry-run
      trtkit convert ./Llama-3.1-8B ./int4 --quantization int4_awq --max-perplexity-increase 2%
      trtkit convert ./Llama-3.1-8B ./fp8 --quantization fp8 --kv-cache fp8 --runtime llmapi
      trtkit convert ./Llama-3.1-8B ./mixed --auto --target-bits 5 --plot front.svg
      trtkit convert ./Llama-3.1-8B-GPTQ ./checkpoint --tp 2
    """
    if list_families:
        _print_families(as_json)
        return
    if source is None or out is None:
        raise click.UsageError(f"Missing argument '{'SOURCE' if source is None else 'OUT'}'.")
    from trtkit.convert.conversion import Options, WriteRanks, convert, write_here
    from trtkit.convert.quantization import Quantization
    from trtkit.convert.source import Layout, plan_conversion
    from trtkit.hf_config import quantized_in

    opened = open_source(source, revision)
    asked = asked_quantization(**quantize)
    options = Options(checksum=not no_checksum, saturate=saturate, sync=not no_sync)
    layout = Layout(tp=tp, pp=pp, ep=ep, dtype=dtype, parallel_embedding=parallel_embedding, quantization=asked)
    packed = quantized_in(opened.path, opened.config)
    if ray is not None and (packed or quantize["auto"] or asked != Quantization()):
        raise click.UsageError("--ray spreads plain conversions only, without quantisation")
    if packed:
        import_and_report(opened, out, layout, options, replace=force, dry_run=dry_run, as_json=as_json, **quantize)
        return
    if quantize["auto"]:
        check_out(out, opened, quantize["runtime"], replace=force)
        asked = chosen_quantization(opened, layout, as_json=as_json, dry_run=dry_run, **quantize)
        layout = replace(layout, quantization=asked)
    else:
        check_asked(asked, opened.architecture, tp=tp, pp=pp, ep=ep, **quantize)
    plan = plan_conversion(opened, layout)
    check_out(out, opened, quantize["runtime"], replace=force)
    summary = _summary(plan, opened.nbytes, out)
    if dry_run:
        _print(summary, plan, as_json)
        return
    if asked != Quantization():
        convert_and_report(plan, opened, out, options, summary, replace=force, as_json=as_json, **quantize)
        return
    write: WriteRanks = write_here
    if ray is not None:
        from trtkit.convert.cluster import over_ray

        write = over_ray(ray)
    started = time.monotonic()
    with progress(f"converting {opened.path.name} to {plan.config['dtype']}, {_layout(summary)}") as update:
        found = convert(plan, opened, out, options=options, replace=force, on_progress=update, write=write)
    summary["seconds"] = round(time.monotonic() - started, 3)
    _print(summary | _account(found), plan, as_json)
    if not as_json:
        _print_warnings(found, plan.config["dtype"])


def _print_families(as_json: bool) -> None:
    from trtkit import architectures

    families = [(name, architectures.get(name)) for name in architectures.FAMILIES]
    if as_json:
        print_json(
            [
                {"architecture": name, "tp": True, "pp": f.pipeline, "ep": f.has_experts, "notes": f.notes or None}
                for name, f in families
            ]
        )
        return
    rows = [
        (name, "yes", "yes" if f.pipeline else "-", "yes" if f.has_experts else "-", f.notes) for name, f in families
    ]
    print_table(["architecture", "TP", "PP", "EP", "notes"], rows)


def _summary(plan: Plan, source_bytes: int, out: Path) -> dict[str, Any]:
    mapping = plan.config["mapping"]
    return {
        "out": str(out),
        "architecture": plan.config["architecture"],
        "dtype": plan.config["dtype"],
        "tp": mapping["tp_size"],
        "pp": mapping["pp_size"],
        "ep": mapping.get("moe_ep_size", 1),
        "quantization": {key: value for key, value in plan.config["quantization"].items() if value is not None},
        "source_tensors": len(plan.sources),
        "source_bytes": source_bytes,
        "rank_bytes": [plan.rank_bytes(rank) for rank in range(len(plan.ranks))],
    }


def _account(found: Conversion) -> dict[str, Any]:
    return {
        "resumed_bytes": found.resumed_bytes,
        "rounded": found.report.rounded,
        "flushed_to_zero": found.report.flushed,
        "saturated": found.report.saturated,
        "non_finite": [
            {"tensor": each.tensor, "index": list(each.index), "value": each.value} for each in found.non_finite
        ],
    }


def _layout(summary: dict[str, Any]) -> str:
    experts = f" x EP {summary['ep']}" if summary["ep"] > 1 else ""
    return f"TP {summary['tp']} x PP {summary['pp']}{experts}"


def _print(summary: dict[str, Any], plan: Plan, as_json: bool) -> None:
    from trtkit.checkpoint import rank_file

    if as_json:
        print_json(summary)
        return
    rows = [(rank_file(rank), len(plan.ranks[rank]), f"{size:,}") for rank, size in enumerate(summary["rank_bytes"])]
    title = f"{summary['architecture']} {summary['dtype']} {_layout(summary)} -> {summary['out']}"
    print_table(["file", "tensors", "bytes"], rows, title)


def _print_warnings(found: Conversion, dtype: str) -> None:
    if found.report.flushed:
        note(f"warning: {found.report.flushed:,} tiny values became zero in {dtype}")
    if found.report.saturated:
        note(f"warning: {found.report.saturated:,} values beyond the range of {dtype} became its largest value")
    for each in found.non_finite[:10]:
        note(f"warning: source tensor '{each.tensor}' holds {each.value} at {list(each.index)}")
    if len(found.non_finite) > 10:
        note(f"warning: and {len(found.non_finite) - 10} more tensors with NaN or infinity (--json lists all)")
