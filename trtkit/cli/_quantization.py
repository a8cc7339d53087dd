"""What `trtkit convert` adds for quantisation: its options, its checks and its accuracy report."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trtkit.cli._common import note, print_json, print_table, progress_steps

if TYPE_CHECKING:
    from trtkit.convert.conversion import Options
    from trtkit.convert.plan import Plan
    from trtkit.convert.quantization import Quantization
    from trtkit.convert.source import Layout
    from trtkit.hf import Source
    from trtkit.quantized import Settings

TARGET_BITS = 5.0
FORMATS = ("int8_wo", "int4_wo", "int4_awq", "w4a8_awq", "int8_sq", "int8_sq_plugin", "fp8", "fp8_rowwise")

_OPTIONS = (
    click.option("--quantization", type=click.Choice(FORMATS), help="Format of the linears; needs the `torch` extra."),
    click.option(
        "--group-size", type=click.Choice(["64", "128"]), help="Inputs that share a scale, in int4 formats with groups."
    ),
    click.option("--kv-cache", type=click.Choice(["int8", "fp8"]), help="Dtype of the KV cache."),
    click.option(
        "--exclude", multiple=True, metavar="PATTERN", help="TRT-LLM modules to leave alone, e.g. '*.layers.0.*'."
    ),
    click.option(
        "--linear",
        "overrides",
        multiple=True,
        metavar="NAME=FORMAT",
        help="Another format for one linear, by its name.",
    ),
    click.option("--auto", is_flag=True, help="Choose a format for every linear by what it does to the predictions."),
    click.option("--target-bits", type=click.FloatRange(1, 16), help="Of --auto: bits per weight.  [default: 5.0]"),
    click.option(
        "--plot", type=click.Path(path_type=Path), help="Of --auto: draw what there was to choose from (SVG)."
    ),
    click.option(
        "--calibration", metavar="TEXT", help="A .txt, .jsonl, .parquet or .npy file, or a dataset of the hub."
    ),
    click.option("--calibration-samples", type=click.IntRange(1), help="Windows of it.  [default: 128]"),
    click.option("--calibration-length", type=click.IntRange(2), help="Tokens in each.  [default: 512]"),
    click.option("--calibration-seed", default=0, show_default=True, help="Draws the windows."),
    click.option("--device", default="cpu", show_default=True, help="Where layers run: cpu, cuda, cuda:1 ..."),
    click.option(
        "--runtime",
        default="tensorrtllm",
        show_default=True,
        type=click.Choice(["tensorrtllm", "llmapi"]),
        help="What will serve: llmapi gets a quantised Hugging Face checkpoint instead of ranks.",
    ),
    click.option(
        "--requantize", is_flag=True, help="Of a quantised FP8 source: allow q, k and v to be brought to one scale."
    ),
    click.option("--gpu", help="The GPU that will serve, e.g. H100 or sm90: what it cannot run is refused at once."),
    click.option("--release", help="The Triton release that will serve, YY.MM: the same."),
    click.option("--held-out", metavar="TEXT", help="Text to measure the accuracy on, like --calibration."),
    click.option(
        "--thorough", is_flag=True, help="Let later layers mend what earlier ones lose: int4, twice the time."
    ),
    click.option("--no-accuracy", is_flag=True, help="Do not measure what quantisation cost."),
    click.option("--max-perplexity-increase", "limit", metavar="LIMIT", help="Fail above it: 2%, or 0.02."),
)


def quantization_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """All options of quantisation, on a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def asked_quantization(
    quantization: str | None,
    group_size: str | None,
    kv_cache: Any,
    exclude: tuple[str, ...],
    overrides: tuple[str, ...],
    **rest: Any,
) -> Quantization:
    """What the options ask for.

    Raises:
        InputError: options that do not go together.
    """
    from trtkit.convert.quantization import Quantization
    from trtkit.errors import InputError

    linears: dict[str, str] = {}
    for each in overrides:
        name, equals, form = each.partition("=")
        if not equals:
            raise InputError(f"--linear '{each}' is not NAME=FORMAT", "e.g. transformer.layers.3.mlp.proj=fp8")
        linears[name] = form
    return Quantization(
        quantization,
        group_size=int(group_size) if group_size else None,
        kv_cache=kv_cache,
        exclude=exclude,
        overrides=linears,
    )


def chosen_quantization(
    source: Source,
    layout: Layout,
    *,
    as_json: bool,
    dry_run: bool,
    quantization: str | None,
    kv_cache: Any,
    overrides: tuple[str, ...],
    exclude: tuple[str, ...],
    target_bits: float | None,
    plot: Path | None,
    runtime: str,
    gpu: str | None,
    release: str | None,
    **given: Any,
) -> Quantization:
    """What --auto chooses; prints what there was to choose from."""
    from trtkit import releases
    from trtkit.convert.support import Target, gpu_generation
    from trtkit.errors import InputError
    from trtkit.quantize.pareto import HEADINGS
    from trtkit.quantized import choose_formats
    from trtkit.store import atomic_write

    _check_limit(given["limit"], given["no_accuracy"])
    if plot is not None and (plot.is_dir() or not plot.absolute().parent.is_dir()):
        raise InputError(f"--plot {plot}: no file can be written there", "give a file in a folder that exists")
    if quantization or overrides or exclude:
        raise InputError("--auto chooses the formats itself", "leave out --quantization, --linear and --exclude")
    version = releases.get(release).tensorrt_llm if release else None
    target = Target(runtime, source.architecture, version, gpu_generation(gpu) if gpu else None)
    bits = target_bits or TARGET_BITS
    with progress_steps() as on_step:
        choice = choose_formats(source, layout, _settings(given), target, bits, kv_cache=kv_cache, on_step=on_step)
    if plot is not None and not dry_run:
        atomic_write(plot, choice.drawing)
    if not as_json:
        print_table(HEADINGS, choice.rows, f"what there is to choose from, at most {bits:g} bits per weight")
    return choice.quantization


def _check_limit(limit: str | None, no_accuracy: bool) -> None:
    from trtkit.errors import InputError
    from trtkit.evaluate.results import parse_limit

    if limit is None:
        return
    parse_limit(limit)
    if no_accuracy:
        raise InputError("--max-perplexity-increase needs the accuracy", "leave out --no-accuracy")


def check_out(out: Path, source: Source, runtime: str, *, replace: bool) -> None:
    """Whether the command may write to `out`: ranks, or for llmapi the Hugging Face layout."""
    if runtime == "llmapi":
        from trtkit.quantize.huggingface import check_target
    else:
        from trtkit.convert.conversion import check_target
    check_target(out, source, replace=replace)


def check_asked(
    asked: Quantization,
    architecture: str,
    *,
    runtime: str,
    gpu: str | None,
    release: str | None,
    limit: str | None,
    no_accuracy: bool,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    **rest: Any,
) -> None:
    """Refuses what cannot run, and options that would do nothing, before any work."""
    from trtkit import releases
    from trtkit.convert.quantization import Quantization
    from trtkit.errors import InputError
    from trtkit.quantized import check_runs

    if runtime == "llmapi" and any(size > 1 for size in (tp, pp, ep)):
        raise InputError("llmapi splits the model when it loads it", "leave out --tp, --pp and --ep")
    if asked == Quantization():
        given = [
            key
            for key in ("gpu", "release", "calibration", "held_out", "target_bits", "plot", "thorough")
            if {**rest, "gpu": gpu, "release": release}.get(key)
        ]
        if limit is not None or given:
            name = "max-perplexity-increase" if limit is not None else given[0].replace("_", "-")
            raise InputError(f"--{name} is about quantisation, which was not asked for", "add --quantization")
        if runtime == "llmapi":
            raise InputError("llmapi serves the source as it is: there is nothing to convert", "add --quantization")
        return
    if given := [key for key in ("target_bits", "plot") if rest.get(key)]:
        raise InputError(f"--{given[0].replace('_', '-')} belongs to --auto", "add --auto, or leave it out")
    _check_limit(limit, no_accuracy)
    if limit is not None and runtime == "llmapi" and not asked.makes_tensors:
        raise InputError(
            f"{asked.format} is made when llmapi loads it, so its accuracy cannot be measured here",
            "leave out --max-perplexity-increase",
        )
    version = releases.get(release).tensorrt_llm if release else None
    check_runs(asked, architecture, runtime=runtime, tensorrt_llm=version, gpu=gpu)


def _settings(given: dict[str, Any]) -> Settings:
    from trtkit.quantized import Settings

    return Settings(
        text=given["calibration"],
        samples=given["calibration_samples"],
        length=given["calibration_length"],
        seed=given["calibration_seed"],
        device=given["device"],
        accuracy=not given["no_accuracy"],
        held_out=given["held_out"],
        thorough=given["thorough"],
    )


def convert_and_report(
    plan: Plan,
    source: Source,
    out: Path,
    options: Options,
    summary: dict[str, Any],
    *,
    replace: bool,
    as_json: bool,
    limit: str | None,
    **given: Any,
) -> None:
    """Converts, prints the accuracy report, and fails where it exceeds the limit. The checkpoint is then there anyway:
    its measurement may be wanted, and its hours are spent."""
    from trtkit.accuracy import check, rows
    from trtkit.errors import CheckFailedError
    from trtkit.quantized import convert_quantized, export_quantized

    settings = _settings(given)
    started = time.monotonic()
    with progress_steps() as on_step:
        if given["runtime"] == "llmapi":
            report = export_quantized(plan, source, out, settings, options=options, replace=replace, on_step=on_step)
        else:
            found, report = convert_quantized(
                plan, source, out, settings, options=options, replace=replace, on_step=on_step
            )
            summary["resumed_bytes"] = found.resumed_bytes
    summary["seconds"] = round(time.monotonic() - started, 3)
    if as_json:
        print_json(summary | {"accuracy": report})
    else:
        algo = summary["quantization"].get("quant_algo", "KV cache only")
        print_table(["accuracy", ""], rows(report), f"{summary['architecture']} {algo} -> {out}")
    try:
        check(report, limit)
    except CheckFailedError:
        note(f"{out} was written all the same")
        raise


def import_and_report(
    source: Source,
    out: Path,
    layout: Layout,
    options: Options,
    *,
    replace: bool,
    dry_run: bool,
    as_json: bool,
    gpu: str | None,
    requantize: bool,
    runtime: str,
    **rest: Any,
) -> None:
    """Converts a source that somebody else quantised, and prints what was decided and what is not exact."""
    from trtkit.errors import InputError

    idle = ("auto", "target_bits", "plot", "calibration", "held_out", "limit", "thorough", "exclude", "overrides",
            "quantization", "group_size", "kv_cache")  # fmt: skip
    if given := [key for key in idle if rest.get(key)]:
        name = {"limit": "max-perplexity-increase", "overrides": "linear"}.get(given[0], given[0].replace("_", "-"))
        raise InputError(
            f"--{name} is about quantising, but {source.path} is quantised already",
            "leave it out; `trtkit evaluate` measures what the quantisation cost",
        )
    from trtkit.quantize.importing import import_plan
    from trtkit.quantized import import_export, import_quantized

    check_out(out, source, runtime, replace=replace)
    if dry_run:
        plan, lines, exact = (
            (found := import_plan(source, layout, gpu=gpu, requantize=requantize)).plan,
            found.notes,
            None,
        )
        account: dict[str, Any] = {}
    else:
        with progress_steps() as on_step:
            how: dict[str, Any] = {
                "requantize": requantize, "options": options, "replace": replace, "on_step": on_step
            }  # fmt: skip
            if runtime == "llmapi":
                found, kept = import_export(source, out, layout, **how)
            else:
                found, kept = import_quantized(source, out, layout, gpu=gpu, **how)
        plan, lines, exact, account = found.plan, found.notes, kept.exact, dict(vars(kept))
    quantization = {key: value for key, value in plan.config["quantization"].items() if value is not None}
    if as_json:
        print_json({"out": str(out), "quantization": quantization, "exact": exact, "account": account, "notes": lines})
        return
    verdict = {None: "not converted yet", True: "every weight exactly as in the source", False: "not all weights exact"}
    rows = [("format", str(quantization)), ("outcome", verdict[exact])]
    rows += [(name, f"{count:,}") for name, count in account.items() if count]
    print_table(["import", ""], rows, f"{plan.config['architecture']} -> {out}")
    for line in lines:
        note(f"note: {line}")
