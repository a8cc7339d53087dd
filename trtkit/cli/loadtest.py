"""`trtkit loadtest`: measure latency and throughput of a served model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trtkit.cli._common import json_option, note, print_findings, print_json, print_table
from trtkit.errors import CheckFailedError, InputError, TrtkitError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trtkit.config import BuildConfig, Scenario
    from trtkit.findings import Finding
    from trtkit.loadtest.metrics import Result

DEFAULT_CONCURRENCY = 8

# option of the command line -> key of a scenario
_KEYS = {
    "concurrency": "concurrency",
    "rate": "request_rate",
    "arrival": "arrival",
    "duration": "duration_s",
    "warmup": "warmup_s",
    "max_requests": "max_requests",
    "timeout": "timeout_s",
    "protocol": "protocol",
    "streaming": "streaming",
    "max_tokens": "max_tokens",
    "seed": "seed",
}


@click.command(name="loadtest")
@click.argument("config", required=False, type=click.Path(path_type=Path))
@click.option("--url", help="Server to test, such as grpc://127.0.0.1:8001 or http://127.0.0.1:8000.")
@click.option("--model", help="Model to send text to.  [default: of CONFIG's topology, or what is served]")
@click.option("--scenario", "names", multiple=True, help="Scenario of CONFIG, repeatable [default: default, or all].")
@click.option("--concurrency", type=int, help="Closed loop: requests kept in flight.")
@click.option("--rate", type=float, help="Open loop: requests per second, however slow the answers.")
@click.option("--arrival", type=click.Choice(["poisson", "constant"]), help="Arrival process of the open loop.")
@click.option("--duration", type=float, help="Seconds to measure.")
@click.option("--warmup", type=float, help="Seconds to send before the measurement.")
@click.option("--max-requests", type=int, help="Measure at most so many requests.")
@click.option("--timeout", type=float, help="Seconds after which a request counts as failed.")
@click.option("--protocol", type=click.Choice(["grpc", "http"]), help="Protocol to speak.")
@click.option("--streaming/--no-streaming", default=None, help="Ask for the answer token by token, or at once.")
@click.option("--max-tokens", type=int, help="Tokens to ask for.")
@click.option("--prompt", "prompts", multiple=True, help="Prompt to send; several are sent in turn.")
@click.option("--seed", type=int, help="Seed of the poisson arrivals.")
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    help="Folder of tokenizer.json, to count tokens if the model does not.",
)
@click.option("--output", type=click.Path(path_type=Path), help="Write NAME.html and NAME.json (or into this folder).")
@json_option
def command(
    config: Path | None,
    url: str | None,
    model: str | None,
    names: tuple[str, ...],
    prompts: tuple[str, ...],
    tokenizer: Path | None,
    output: Path | None,
    as_json: bool,
    **options: Any,
) -> int:
    """Measure latency and throughput of a served model.

    \b
    Example:
      trtkit loadtest build_configs/tiny-llama.yaml --scenario closed --scenario open --output report.html
      trtkit loadtest --url grpc://127.0.0.1:8001 --rate 20 --duration 60 --prompt "def main("

    Without --url the server is the running deployment that CONFIG names. Options override the scenario's keys.
    A closed loop (--concurrency) keeps requests in flight; an open loop (--rate) sends on schedule and measures from
    when a request was due, so that a stall of the server is not left out. Ctrl-C shows what was measured so far.
    Exits with 0 when some requests failed (a warning on stderr tells how many), with 1 when none succeeded or the
    server refuses the first one, such as for an unknown model. --json leaves out the times of single requests;
    --output writes them.
    """
    from trtkit.client.api import split_url
    from trtkit.loadtest.report import check_writable
    from trtkit.loadtest.tokens import token_counter

    if output:
        check_writable(output)
    build_config = _load(config) if config else None
    changes = {_KEYS[key]: value for key, value in options.items() if value is not None}
    if prompts:
        changes["prompts"] = list(prompts)
    scenarios = _scenarios(build_config, names, changes)
    if url and "://" in url:
        split_url(url, options["protocol"])
    targets = {name: url or _deployed_url(build_config, scenario) for name, scenario in scenarios.items()}
    count_tokens = token_counter(tokenizer) if tokenizer else None
    fallback = build_config.validation.prompts if build_config else []
    model = model or _model(build_config, *next(iter(targets.items())), scenarios)
    results, failure = _run(scenarios, targets, model=model, prompts=fallback, count_tokens=count_tokens)
    _show(results, as_json)
    if output:
        _write(results, output, f"{build_config.name}: load test" if build_config else "Load test")
    if failure:
        raise failure
    if not all(result.complete for result in results):
        return 130
    if not all(result.counts["ok"] for result in results):
        raise CheckFailedError("no request succeeded", "see the errors above and the server's log")
    return 0


def _show(results: Sequence[Result], as_json: bool) -> None:
    """The results on stdout, and on stderr how many requests failed."""
    from trtkit.loadtest.report import json_document

    if as_json:
        print_json(json_document([result.to_dict(raw=False) for result in results]))
    else:
        _print(results)
    for result in results:
        if failed := result.counts["error"]:
            name = result.scenario["name"]
            note(f"warning: scenario '{name}': {failed:,} of {result.counts['requests']:,} requests failed")


def _write(results: Sequence[Result], output: Path, title: str) -> None:
    from trtkit.loadtest.report import write_report

    page, data = write_report([result.to_dict() for result in results], output, title)
    note(f"wrote {page} and {data}")


def _load(path: Path) -> BuildConfig:
    from trtkit.config_file import load_config

    return load_config(path)


def _scenarios(config: BuildConfig | None, names: Sequence[str], changes: dict[str, Any]) -> dict[str, Scenario]:
    """The scenarios to run, by name, with the options of the command line in them."""
    from trtkit.config import Scenario

    if config is None:
        if names:
            raise InputError("--scenario needs CONFIG", "give the build config that holds the scenario")
        known = {"default": Scenario(concurrency=DEFAULT_CONCURRENCY)}
        if not changes.get("prompts"):
            raise InputError("no prompts to send", "give --prompt, or a build config")
    else:
        known = config.loadtest
    chosen = list(dict.fromkeys(names)) or (["default"] if "default" in known else list(known))
    for name in chosen:
        if name not in known:
            raise InputError(f"no scenario '{name}' in the config", f"it holds: {', '.join(known)}")
    return {name: _changed(known[name], changes) for name in chosen}


def _changed(scenario: Scenario, changes: dict[str, Any]) -> Scenario:
    from pydantic import ValidationError

    from trtkit.config import Scenario

    if "concurrency" in changes and "request_rate" in changes:
        raise InputError("--concurrency and --rate exclude each other", "give one of them")
    values = scenario.model_dump() | changes
    if "concurrency" in changes:
        values["request_rate"] = None
    if "request_rate" in changes:
        values["concurrency"] = None
    try:
        return Scenario.model_validate(values)
    except ValidationError as error:
        options = {key: option for option, key in _KEYS.items()}
        lines = []
        for problem in error.errors():
            option = options.get(str(problem["loc"][0]), "prompt").replace("_", "-")
            lines.append(f"--{option} {problem['input']}: {problem['msg'][:1].lower()}{problem['msg'][1:]}")
        raise InputError("\n".join(lines), "see `trtkit loadtest --help`") from None


def _deployed_url(config: BuildConfig | None, scenario: Scenario) -> str:
    """The url of the deployment that the config names."""
    if config is None:
        raise InputError("no server to test", "give --url, or a build config whose deployment runs")
    from trtkit.deploy.deployment import running

    return running(config.name).url(scenario.protocol)


def _model(config: BuildConfig | None, name: str, url: str, scenarios: dict[str, Scenario]) -> str:
    """The model that takes text at the url of the scenario `name`."""
    import asyncio

    from trtkit.client.served import find

    protocol = None if "://" in url else scenarios[name].protocol
    return asyncio.run(find(url, config.serving.layout if config else None, protocol=protocol)).text


def _run(
    scenarios: dict[str, Scenario], targets: dict[str, str], **options: Any
) -> tuple[list[Result], TrtkitError | None]:
    """Runs one scenario after the other; an interrupted one is the last. What keeps a later one from running comes
    along with the results of those before it."""
    from trtkit.loadtest.progress import show_progress
    from trtkit.loadtest.runner import run_blocking

    results: list[Result] = []
    for name, scenario in scenarios.items():
        with show_progress(name) as on_progress:
            try:
                results.append(run_blocking(targets[name], scenario, name=name, on_progress=on_progress, **options))
            except TrtkitError as error:
                if not results:
                    raise
                return results, error
        if not results[-1].complete:
            break
    return results, None


def _print(results: Sequence[Result]) -> None:
    """Tables on stdout: one per scenario, then what to know about them."""
    from trtkit.loadtest.sections import LABELS, STATISTICS, load_of, milliseconds, rate

    for result in results:
        data = result.to_dict(raw=False)
        rows: list[list[object]] = []
        for key, label in LABELS.items():
            if entry := data["latency"].get(key):
                cells = [milliseconds(entry[name]) for name in STATISTICS]
                rows.append([label, *cells, f"{entry['count']:,}"])
        scenario, throughput, counts = data["scenario"], data["throughput"], data["counts"]
        print_table(["milliseconds", *STATISTICS, "values"], rows, f"{scenario['name']}: {load_of(scenario)}")
        facts = [f"{rate(throughput['requests_per_s'])} requests/s"]
        if throughput["output_unit"]:
            facts.append(f"{rate(throughput['output_per_s'])} {throughput['output_unit']}/s")
        facts += [f"{counts[key]:,} {name}" for key, name in _COUNTS.items() if counts[key] or key in ("ok", "error")]
        click.echo(", ".join(facts) + f", measured for {data['window']['seconds']:.1f} s")
        for error in data["errors"]:
            click.echo(f"  {error['count']:,} x {error['kind']}")
        click.echo()
    findings: list[Finding] = [finding for result in results for finding in result.findings]
    print_findings(findings, "nothing wrong with these runs")


_COUNTS = {"ok": "ok", "error": "failed", "dropped": "dropped", "unfinished": "cancelled"}
