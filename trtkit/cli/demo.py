"""`trtkit demo`: the whole chain on the tiny model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from trtkit.cli._common import dry_run_option, json_option, print_findings, print_json, print_table

if TYPE_CHECKING:
    from trtkit.demo import DemoResult, Listener
    from trtkit.deploy.deployment import Deployment


@click.command("demo")
@click.option(
    "-o",
    "--output",
    "folder",
    default=Path("trtkit-demo"),
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder for everything the demo makes.",
)
@click.option("--keep", is_flag=True, help="Leave the server running and say how to use and stop it.")
@dry_run_option
@json_option
def command(folder: Path, keep: bool, dry_run: bool, as_json: bool) -> None:
    """Run the whole chain on the tiny model: convert, verify, serve with a real Triton, validate, load-test, report.

    \b
    Example:
      trtkit demo
      trtkit demo --keep --output /tmp/demo
    """
    from trtkit.demo import NAME, plan, run
    from trtkit.errors import missing_extra

    if dry_run:
        steps = plan(folder, keep=keep)
        if as_json:
            print_json(steps)
        else:
            click.echo("\n".join(steps))
        return
    try:
        import torch  # noqa: F401
    except ImportError:
        raise missing_extra("torch", "local,torch") from None
    screen = _Screen(quiet=as_json)
    with screen:
        result = run(folder, keep=keep, listener=screen.listener())
    if as_json:
        print_json(result.to_dict())
        return
    _print(result)
    if result.deployment is not None:
        click.echo(_how_to_use(result.deployment, NAME))


class _Screen:
    """Shows the demo as it runs: one line per step on stderr, streamed text on stdout."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False)
        self.status = self.console.status("")
        self.title = ""
        self.number = 0
        self.quiet = quiet

    def __enter__(self) -> None:
        self.status.start()

    def __exit__(self, *error: object) -> None:
        self.status.stop()
        if error[0] is not None and self.title:
            self.console.print(f"[red]✗[/] {self.title}")

    def listener(self) -> Listener:
        from trtkit.demo import Listener

        return Listener(self.step, self.done, self.detail, self.progress, self.text)

    def step(self, title: str) -> None:
        self.number += 1
        self.title = title
        self.status.update(f"{title} ...")

    def done(self, detail: str, seconds: float) -> None:
        self.console.print(f"[green]✓[/] {self.number:2d} {self.title} [dim]({seconds:.1f} s)[/]")
        self.console.print(f"     [dim]{detail}[/]", soft_wrap=True)
        self.title = ""

    def detail(self, text: str) -> None:
        self.status.update(f"{self.title}: {text}")

    def progress(self, done: int, total: int) -> None:
        self.status.update(f"{self.title}: {done * 100 // max(total, 1)} %")

    def text(self, piece: str) -> None:
        if self.quiet:
            return
        self.status.stop()
        sys.stdout.write(piece)
        sys.stdout.flush()


def _print(result: DemoResult) -> None:
    click.echo()
    print_table(["check", "result", "detail"], [(c.name, c.outcome, c.detail) for c in result.checks])
    for check in result.checks:
        if check.findings:
            print_findings(check.findings, "")
    rows = []
    for load in result.loads:
        scenario = load.scenario
        rate = f"{scenario['concurrency']} at once" if scenario["loop"] == "closed" else f"{scenario['request_rate']}/s"
        cells = [load.latency.get(name) for name in ("ttft", "itl", "e2e")]
        shown = [f"{c['p50']:.1f} / {c['p90']:.1f} / {c['p99']:.1f}" if c else "-" for c in cells]
        tokens = load.throughput["output_per_s"]
        errors = sum(error["count"] for error in load.errors)
        rows.append((scenario["name"], rate, load.counts["ok"], f"{tokens:.0f}" if tokens else "-", *shown, errors))
    columns = ["load test", "load", "requests", "tokens/s", "TTFT ms", "ITL ms", "end to end ms", "errors"]
    print_table(columns, rows, "latencies: p50 / p90 / p99")
    click.echo(f"report: {result.report}")
    click.echo(f"everything passed in {result.seconds:.0f} s")


def _how_to_use(deployment: Deployment, name: str) -> str:
    host, grpc = deployment.http_url, deployment.grpc_url
    body = '{"id": "1", "text_input": "import os", "max_tokens": 32}'
    stream = '{"id": "2", "text_input": "import os", "max_tokens": 32, "stream": true}'
    return f"""
The server stays, as deployment '{name}'.

With curl:
  curl -s {host}/v2/models/ensemble/generate -d '{body}'
  curl -sN {host}/v2/models/ensemble/generate_stream -d '{stream}'

With tritonclient:
  import numpy as np, queue, tritonclient.grpc as triton
  answers = queue.Queue()
  client = triton.InferenceServerClient("{grpc}")
  client.start_stream(lambda result, error: answers.put(error or result))
  text = triton.InferInput("text_input", [1, 1], "BYTES")
  text.set_data_from_numpy(np.array([["import os"]], dtype=object))
  count = triton.InferInput("max_tokens", [1, 1], "INT32")
  count.set_data_from_numpy(np.array([[32]], dtype=np.int32))
  client.async_stream_infer("ensemble", [text, count], request_id="3")
  print(answers.get().as_numpy("text_output"))
  client.stop_stream(); client.close()

Or with trtkit:
  trtkit validate --url grpc://{grpc}
  trtkit loadtest --url grpc://{grpc} --concurrency 8 --prompt "import os"

Stop it:
  trtkit deploy down {name}"""
