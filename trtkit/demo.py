"""The whole chain, for real, on the tiny model: source, checkpoint, repository, Triton, validation, load test, report.

Every step is the one that its own verb runs. The server is a real Triton, a local process that lives only as long as
the demo, unless it is asked to stay.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtkit import hf
from trtkit.checkpoint import open_checkpoint
from trtkit.client.api import GenerateRequest, connect
from trtkit.client.served import BY_TOPOLOGY
from trtkit.config import BuildConfig
from trtkit.config_file import load_config, ready_made_configs
from trtkit.convert.conversion import convert
from trtkit.convert.source import plan_conversion
from trtkit.convert.verify import verify
from trtkit.deploy import state
from trtkit.deploy.deployment import Deployment
from trtkit.deploy.local import ServerSpec, down, running_server, status, up
from trtkit.errors import CheckFailedError, InputError
from trtkit.findings import has_errors
from trtkit.loadtest.metrics import Result
from trtkit.loadtest.progress import line
from trtkit.loadtest.report import render_html
from trtkit.loadtest.runner import run_blocking
from trtkit.loadtest.tokens import token_counter
from trtkit.repository.generate import render_repository, write_repository
from trtkit.repository.lint import lint_repository
from trtkit.store import atomic_write
from trtkit.validate.results import CheckResult
from trtkit.validate.run import run_checks, subject_of

CONFIG = "tiny-llama"
NAME = "trtkit-demo"
PROMPT = "def get_name(self):\n    "
MARKER = ".trtkit-demo"


def _ignore(*_: object) -> None:
    pass


@dataclass
class Listener:
    """Who watches the demo. Every member is a function that may do nothing.

    Attributes:
        step: a step begins (title).
        done: it ended (detail, seconds).
        detail: what it waits for.
        progress: how far it is (done, total).
        text: a piece of streamed text.
    """

    step: Callable[[str], None] = _ignore
    done: Callable[[str, float], None] = _ignore
    detail: Callable[[str], None] = _ignore
    progress: Callable[[int, int], None] = _ignore
    text: Callable[[str], None] = _ignore


@dataclass
class DemoResult:
    """What the demo found.

    Attributes:
        checks: validation results.
        loads: load-test results.
        report: the HTML report.
        deployment: the server, when it was asked to stay.
    """

    seconds: float = 0.0
    checks: list[CheckResult] = field(default_factory=list)
    loads: list[Result] = field(default_factory=list)
    report: Path | None = None
    deployment: Deployment | None = None
    steps: list[tuple[str, str, float]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "seconds": round(self.seconds, 2),
            "steps": [{"step": s, "detail": d, "seconds": round(t, 2)} for s, d, t in self.steps],
            "checks": [check.to_dict() for check in self.checks],
            "loadtests": [load.to_dict() for load in self.loads],
            "report": str(self.report) if self.report else None,
            "deployment": self.deployment.to_dict() if self.deployment else None,
        }


def run(
    folder: Path, *, keep: bool = False, listener: Listener | None = None, config: BuildConfig | None = None
) -> DemoResult:
    """Runs the demo.

    Args:
        folder: gets `checkpoint/`, `model_repository/`, `server.log`, `report.html` and `report.json`. An earlier
            demo's are replaced; a folder with anything else in it is refused.
        keep: leave the server running, as deployment `trtkit-demo`.
        config: instead of the ready-made one of the tiny model; its source is a local folder, its runtime `reference`.

    Raises:
        CheckFailedError: checkpoint, repository, validation or load test has an error. The server is stopped then.
        TrtkitError: as raised by the steps.
    """
    demo = _Demo(folder.absolute(), listener or Listener(), DemoResult())
    started = time.monotonic()
    config = config or load_config(ready_made_configs()[CONFIG])
    with _claimed(demo.folder, keep):
        demo.run(config, keep)
    demo.result.seconds = time.monotonic() - started
    return demo.result


def plan(folder: Path, *, keep: bool = False) -> list[str]:
    """What `run` would do, in words. Touches nothing."""
    config = load_config(ready_made_configs()[CONFIG])
    options = config.checkpoint
    end = f"leave the server running as deployment '{NAME}'" if keep else "stop the server"
    return [
        f"convert {config.model.source} to {folder / 'checkpoint'} ({options.dtype}, TP {options.tp}) and verify it",
        f"generate and lint {folder / 'model_repository'}",
        f"start Triton on loopback, log to {folder / 'server.log'}",
        "stream one prompt, validate, load-test: " + ", ".join(config.loadtest),
        f"write {folder / 'report.html'} and {folder / 'report.json'}",
        end,
    ]


@dataclass
class _Demo:
    folder: Path
    listener: Listener
    result: DemoResult

    def run(self, config: BuildConfig, keep: bool) -> None:
        self.convert(config)
        self.generate(config)
        with self.serve(config, keep) as deployment:
            self.stream(config, deployment)
            self.validate(config, deployment)
            self.load(config, deployment)
            self.write_report()
            self.judge()
        if keep:
            self.result.deployment = deployment

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[list[str]]:
        """One step; the block puts what it found into the list."""
        self.listener.step(title)
        started = time.monotonic()
        details: list[str] = []
        yield details
        seconds = time.monotonic() - started
        self.listener.done(", ".join(details), seconds)
        self.result.steps.append((title, ", ".join(details), seconds))

    def convert(self, config: BuildConfig) -> None:
        with self.step("open the Hugging Face checkpoint") as details:
            source = hf.open_source(config.model.source)
            plan = plan_conversion(source, config.checkpoint)
            details += [source.architecture, f"{len(source.tensors)} tensors", f"{source.nbytes / 1e6:.1f} MB"]
        options = config.checkpoint
        out = self.folder / "checkpoint"
        with self.step(f"convert it to a TRT-LLM checkpoint ({options.dtype}, TP {options.tp})") as details:
            convert(plan, source, out, replace=True, on_progress=self.listener.progress)
            details += [f"{len(plan.ranks)} ranks", str(out)]
        with self.step("read the checkpoint back and compare it with its source") as details:
            verified = verify(source, open_checkpoint(out), on_progress=self.listener.progress)
            if not verified.passed:
                name = verified.first_difference
                raise CheckFailedError(f"{out}: '{name}' differs from the source", "check disk and memory")
            details += [f"{verified.elements:,} values equal", f"{verified.rounded} rounded"]

    def generate(self, config: BuildConfig) -> None:
        repository = self.folder / "model_repository"
        with self.step("generate and lint the model repository") as details:
            files = render_repository(
                config, tokenizer_dir=Path(config.model.source), checkpoint_dir=self.folder / "checkpoint"
            )
            write_repository(files, repository)
            findings = lint_repository(repository)
            if has_errors(findings):
                raise CheckFailedError(f"{repository}: {findings[0].cause}", findings[0].fix)
            details += [f"{len(files)} files", f"{len(findings)} findings", str(repository)]

    @contextlib.contextmanager
    def serve(self, config: BuildConfig, keep: bool) -> Iterator[Deployment]:
        """The server, ready. It stops at the end of the block, or outlives this process if it is kept."""
        repository, log = self.folder / "model_repository", self.folder / "server.log"
        with contextlib.ExitStack() as stack:
            with self.step("start Triton and wait until every model is ready") as details:
                if keep:
                    spec = ServerSpec(NAME, repository, ready_timeout_s=config.deploy.ready_timeout_s, log_path=log)
                    deployment = up(spec, on_progress=self.listener.detail)
                    stack.callback(down, deployment.name)
                else:
                    server = running_server(repository, log_path=log, on_progress=self.listener.detail)
                    deployment = stack.enter_context(server)
                details += [f"process {deployment.pid}", deployment.http_url, f"grpc {deployment.grpc_url}"]
            yield deployment
            if keep:
                stack.pop_all()
                return
            with self.step("stop the server") as details:
                stack.close()
                details.append("no process left")

    def stream(self, config: BuildConfig, deployment: Deployment) -> None:
        with self.step("generate text, streamed") as details:
            self.listener.text(PROMPT)
            chunks = asyncio.run(self._stream(deployment, _model(config)))
            self.listener.text("\n")
            details.append(f"{chunks} pieces over gRPC")

    async def _stream(self, deployment: Deployment, model: str) -> int:
        chunks = 0
        async with connect(deployment.url("grpc"), model=model) as client:
            async for chunk in client.stream(GenerateRequest(PROMPT, max_tokens=48, repetition_penalty=1.15)):
                self.listener.text(chunk.text)
                chunks += bool(chunk.text)
        return chunks

    def validate(self, config: BuildConfig, deployment: Deployment) -> None:
        with self.step("validate against the contract and the Hugging Face model") as details:
            urls = [deployment.url("grpc"), deployment.url("http")]
            self.result.checks = asyncio.run(run_checks(urls, subject_of(config), on_progress=self.listener.detail))
            passed = sum(check.passed for check in self.result.checks)
            details.append(f"{passed} of {len(self.result.checks)} checks passed")

    def load(self, config: BuildConfig, deployment: Deployment) -> None:
        count_tokens = token_counter(config.model.source)
        for name, scenario in config.loadtest.items():
            target = deployment.url(scenario.protocol)
            with self.step(f"load test '{name}'") as details:
                result = run_blocking(
                    target,
                    scenario,
                    name=name,
                    model=_model(config),
                    prompts=config.validation.prompts,
                    count_tokens=count_tokens,
                    on_progress=lambda progress: self.listener.detail(line(progress)),
                )
                self.result.loads.append(result)
                details.append(_headline(result))
                if not result.complete:
                    raise KeyboardInterrupt

    def write_report(self) -> None:
        with self.step("write the report") as details:
            loads = [result.to_dict() for result in self.result.loads]
            self.result.report = self.folder / "report.html"
            atomic_write(self.result.report, render_html(loads, "trtkit demo"))
            atomic_write(self.folder / "report.json", json.dumps(self.result.to_dict(), indent=1))
            details.append(str(self.result.report))

    def judge(self) -> None:
        """Fails the demo, after the report is written, when a check or a request failed."""
        for check in self.result.checks:
            if not check.passed:
                cause = next((f.cause for f in check.findings if f.severity == "error"), check.detail)
                raise CheckFailedError(f"validation check '{check.name}' failed: {cause}", "see report.json")
        for load in self.result.loads:
            failed = sum(error["count"] for error in load.errors)
            if failed:
                raise CheckFailedError(
                    f"load test '{load.scenario['name']}': {failed} requests failed", "see report.html"
                )


def _model(config: BuildConfig) -> str:
    """The served model that takes text."""
    return BY_TOPOLOGY[config.serving.layout or "ensemble"].text


@contextlib.contextmanager
def _claimed(folder: Path, keep: bool) -> Iterator[None]:
    """Makes the demo's folder, or makes sure that an existing one is an earlier demo's and that nobody uses it."""
    if folder.exists() and not (folder / MARKER).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not an earlier demo's", "choose another folder with --output")
    kept = _kept()
    if kept is not None and (keep or folder.resolve() in Path(kept.repository).resolve().parents):
        raise InputError(f"an earlier demo's server still runs ({kept.http_url})", f"trtkit deploy down {NAME}")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / MARKER).open("w") as marker:
        try:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another demo runs in {folder}", "wait for it, or choose another --output") from None
        yield


def _kept() -> Deployment | None:
    """The server that an earlier demo was asked to keep, if it still runs."""
    if NAME not in state.names():
        return None
    deployment = status(NAME)
    return deployment if deployment.running else None


def _headline(result: Result) -> str:
    rates, ttft, e2e = result.throughput, result.latency.get("ttft"), result.latency.get("e2e")
    parts = [f"{result.counts['ok']} requests"]
    if rates["output_per_s"] is not None:
        parts.append(f"{rates['output_per_s']:.0f} {rates['output_unit']}/s")
    parts += [f"{label} p50 {value['p50']:.0f} ms" for label, value in (("TTFT", ttft), ("end to end", e2e)) if value]
    return ", ".join(parts)
