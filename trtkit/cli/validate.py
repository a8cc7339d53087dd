"""`trtkit validate`: check a served model against its contract and its source."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trtkit.cli._common import json_option, note, print_findings, print_json, print_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trtkit.client.served import Served
    from trtkit.config import BuildConfig
    from trtkit.validate.results import CheckResult, Subject

_names = click.Choice(["contract", "parity", "text", "streaming", "chat", "cancellation", "bad_requests"])


@click.command("validate")
@click.argument("config_file", metavar="[CONFIG]", required=False, type=click.Path(path_type=Path))
@click.option("--url", "urls", multiple=True, help="grpc://HOST:PORT or http://HOST:PORT; give both to check both.")
@click.option("--protocol", type=click.Choice(["grpc", "http"]), help="For a --url that is only HOST:PORT.")
@click.option("--model", help="Model that takes and returns text.  [default: of CONFIG's topology, or what is served]")
@click.option("--engine", help="Model that takes and returns tokens.  [default: tensorrt_llm, where it is served]")
@click.option(
    "--source",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Hugging Face checkpoint to compare with; by default model.source of CONFIG.",
)
@click.option("--prompt", "prompts", multiple=True, help="Instead of validation.prompts. Repeat for more.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Instead of validation.max_tokens.")
@click.option("--only", multiple=True, type=_names, help="Run this check. Repeat for more.")
@click.option("--skip", multiple=True, type=_names, help="Leave this check out. Repeat for more.")
@click.option("--timeout", "timeout_s", default=60.0, show_default=True, help="Seconds that each request may take.")
@json_option
def command(
    config_file: Path | None,
    urls: tuple[str, ...],
    only: tuple[str, ...],
    skip: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Check a served model against its contract and its source.

    With CONFIG, the running deployment of that name is checked; --url checks any server. A check that cannot run is
    skipped, and is an error when --only asks for it. The model `llm` (topology fused) drives its engine itself, so what
    would need the engine's tokens is seen from its text.

    \b
    Checks:
      contract      models, tensors, dtypes and shapes are what clients count on; streaming is as configured
      parity        greedy tokens equal those of the source, by transformers in float32 (needs the `torch` extra)
      text          answers equal the source tokenizer's decoding of those tokens, and tokens are counted right
      streaming     streamed answers equal whole ones, over gRPC and HTTP
      chat          chat messages are read as transformers' chat template says (needs the `torch` extra)
      cancellation  the engine stops working when its client goes away
      bad_requests  nonsense is refused soon, and the server lives on

    \b
    Example:
      trtkit validate build_configs/tiny-llama.yaml
      trtkit validate --url grpc://127.0.0.1:8001 --url http://127.0.0.1:8000 --source ./Llama-3.1-8B
      trtkit validate build_configs/tiny-llama.yaml --skip parity --skip text --json
    """
    import asyncio

    from trtkit.client.served import find
    from trtkit.config_file import load_config
    from trtkit.errors import InputError
    from trtkit.validate.run import choose, run_checks

    if config_file is None and not urls:
        raise InputError("nothing to check", "give a build config, or --url URL")
    names = choose(only, skip)
    config = load_config(config_file) if config_file else None
    protocol = options.pop("protocol")
    reached = list(urls) or _deployed(config.name if config else "")
    topology = config.serving.layout if config else None
    served = asyncio.run(find(reached[0], topology, model=options.pop("model"), protocol=protocol))
    subject = _subject(config, names, served, **options)
    checks = run_checks(reached, subject, protocol=protocol, only=only, skip=skip, on_progress=_tell)
    results = asyncio.run(checks)
    not_run = [result for result in results if result.outcome == "skipped" and result.name in only]
    if as_json:
        passed = not not_run and all(result.passed for result in results)
        print_json({"urls": reached, "passed": passed, "checks": [result.to_dict() for result in results]})
    else:
        _print(results)
    _judge(results, not_run)


def _tell(name: str) -> None:
    note(f"checking {name} ...")


def _judge(results: Sequence[CheckResult], not_run: Sequence[CheckResult]) -> None:
    """Raises what the command's exit code comes from, unless all is well."""
    from trtkit.errors import CheckFailedError, InputError

    if failed := [result.name for result in results if not result.passed]:
        cause = f"{len(failed)} of {len(results)} checks failed: {', '.join(failed)}"
        raise CheckFailedError(cause, "see each finding's fix")
    if not_run:
        cause = f"check '{not_run[0].name}' was asked for and cannot run: {not_run[0].detail}"
        raise InputError(cause, f"leave out --only {not_run[0].name}, or change what is in its way")


def _subject(
    config: BuildConfig | None,
    names: Sequence[str],
    served: Served,
    *,
    engine: str | None,
    source: Path | None,
    prompts: Sequence[str],
    max_tokens: int | None,
    **options: Any,
) -> Subject:
    """What is to be checked; `names` are the checks, of which some need the source, and `served` the usual models."""
    from dataclasses import replace

    from trtkit.hf import open_source
    from trtkit.validate.results import Subject
    from trtkit.validate.run import checkpoint_dtype, subject_of
    from trtkit.validate.source import position_limit

    options |= {"model": served.text, "engine": engine or served.engine}
    if config is not None:
        if source is None and {"parity", "text", "chat"} & set(names):
            # A hub id too: the build has left it in the local cache.
            source = open_source(config.model.source, revision=config.model.revision).path
        subject = subject_of(config, source=source, **options)
    else:
        limit = position_limit(source) if source else None
        subject = Subject(source=source, dtype=checkpoint_dtype("auto", source), max_seq_len=limit, **options)
    changes: dict[str, Any] = {}
    if prompts:
        changes["prompts"] = prompts
    if max_tokens is not None:
        changes["max_tokens"] = max_tokens
    return replace(subject, **changes)


def _deployed(name: str) -> list[str]:
    """Both urls of a running deployment."""
    from trtkit.deploy.deployment import running

    deployment = running(name)
    return [deployment.url("grpc"), deployment.url("http")]


def _print(results: Sequence[CheckResult]) -> None:
    from rich.text import Text

    colours = {"passed": "green", "failed": "red", "skipped": "yellow"}
    rows = [(result.name, Text(result.outcome, style=colours[result.outcome]), result.detail) for result in results]
    print_table(("check", "result", "detail"), rows)
    findings = [finding for result in results for finding in result.findings]
    if findings:
        print_findings(findings, "")
