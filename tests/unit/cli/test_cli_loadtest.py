"""The `loadtest` verb: which scenario it runs where, what it prints, and how it ends."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from trtkit.cli.loadtest import command
from trtkit.client.api import Chunk, Completion, GenerateRequest, ServerError
from trtkit.errors import CheckFailedError, InputError, LacksError, TrtkitError

CONFIG = """name: served
model: {source: m}
validation: {prompts: [one, two]}
loadtest:
  default: {concurrency: 2, duration_s: 30, warmup_s: 0, max_requests: 4, max_tokens: 3}
  rate: {request_rate: 500, arrival: constant, duration_s: 30, warmup_s: 0, max_requests: 5, protocol: http}
"""


class Echo:
    """Stand-in for a client: streams as many words as tokens are asked for; the prompt `fail` fails."""

    made: list[tuple[str, str, str]] = []  # noqa: RUF012 - shared on purpose
    requests: list[GenerateRequest] = []  # noqa: RUF012

    def __init__(self, url: str, *, model: str, protocol: str) -> None:
        self.made.append((url, model, protocol))

    async def __aenter__(self) -> Echo:
        return self

    async def __aexit__(self, *exc: object) -> None:
        pass

    async def stream(self, request: GenerateRequest, *, timeout_s: float = 0) -> AsyncIterator[Chunk]:
        import time

        self.requests.append(request)
        if request.prompt == "fail":
            raise ServerError("no such luck", status="INTERNAL")
        for number in range(request.max_tokens):
            yield Chunk(f"w{number} ", time.perf_counter_ns())

    async def generate(self, request: GenerateRequest, *, timeout_s: float = 0) -> Completion:
        return Completion("".join([chunk.text async for chunk in self.stream(request)]), "")


@pytest.fixture(autouse=True)
def echo(monkeypatch: pytest.MonkeyPatch) -> type[Echo]:
    monkeypatch.setattr("trtkit.loadtest.runner.connect", Echo)
    monkeypatch.setattr(Echo, "made", [])
    monkeypatch.setattr(Echo, "requests", [])
    return Echo


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "c.yaml").write_text(CONFIG)
    return str(tmp_path / "c.yaml")


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(command, list(arguments), catch_exceptions=False, standalone_mode=False)


def refused(*arguments: str) -> TrtkitError:
    with pytest.raises(TrtkitError) as caught:
        invoke(*arguments)
    return caught.value


def test_a_table_and_findings_on_stdout(config: str) -> None:
    done = invoke(config, "--url", "grpc://h:1")
    assert done.return_value == 0
    for text in ("default: closed loop, 2 in flight", "Time to first token", "p99", "4 ok, 0 failed", "TK822"):
        assert text in done.stdout
    assert Echo.made == [("grpc://h:1", "ensemble", "grpc")]
    assert {request.prompt for request in Echo.requests} == {"one", "two"}


def test_json_is_the_versioned_schema_without_raw_columns(config: str) -> None:
    data = json.loads(invoke(config, "--url", "grpc://h:1", "--json").stdout)
    assert (data["schema"], data["kind"]) == (1, "trtkit-loadtest")
    assert data["results"][0]["counts"]["ok"] == 4
    assert "requests" not in data["results"][0]
    assert "ttft" in data["definitions"]


def test_options_override_the_scenario(config: str) -> None:
    arguments = ["--rate", "400", "--arrival", "constant", "--max-requests", "2", "--max-tokens", "7", "--prompt", "p"]
    data = json.loads(
        invoke(config, "--url", "h:1", "--protocol", "http", "--no-streaming", *arguments, "--json").stdout
    )
    scenario = data["results"][0]["scenario"]
    expected = {"request_rate": 400, "concurrency": None, "max_requests": 2, "max_tokens": 7, "streaming": False}
    assert {key: scenario[key] for key in expected} == expected
    assert (scenario["protocol"], scenario["prompts"], scenario["loop"]) == ("http", ["p"], "open")
    assert Echo.made == [("h:1", "ensemble", "http")]


def test_the_scheme_of_the_url_decides_the_protocol(config: str) -> None:
    data = json.loads(invoke(config, "--url", "http://h:1", "--model", "m", "--json").stdout)
    assert data["results"][0]["scenario"]["protocol"] == "http"
    assert Echo.made == [("http://h:1", "m", "http")]


def test_the_model_is_that_of_the_topology_or_what_is_served(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = tmp_path / "fused.yaml"
    fused.write_text(Path(config).read_text() + "serving: {runtime: reference, topology: fused}\n")
    invoke(str(fused), "--url", "grpc://h:1")
    invoke(str(fused), "--url", "grpc://h:1", "--model", "m")
    asked: list[tuple[str, str | None]] = []

    class Server(Echo):
        url = "grpc://h:1"

        def __init__(self, url: str, *, protocol: str | None) -> None:
            asked.append((url, protocol))

        async def models(self, **options: object) -> dict[str, str]:
            return {"llm": "READY"}

    monkeypatch.setattr("trtkit.client.served.connect", Server)
    short = ("--prompt", "p", "--max-requests", "1", "--warmup", "0")
    invoke("--url", "h:1", "--protocol", "http", *short)
    invoke("--url", "grpc://h:1", *short)
    assert [model for _, model, _ in Echo.made] == ["llm", "m", "llm", "llm"]
    assert asked == [("h:1", "http"), ("grpc://h:1", None)]


def test_several_scenarios_become_one_report(config: str, tmp_path: Path) -> None:
    out = tmp_path / "out" / "r.html"
    done = invoke(config, "--url", "h:1", "--scenario", "rate", "--scenario", "default", "--output", str(out))
    assert "wrote" in done.stderr
    results = json.loads(out.with_suffix(".json").read_text())["results"]
    assert [result["scenario"]["name"] for result in results] == ["rate", "default"]
    assert len(results[0]["requests"]["sent"]) == 5
    assert "served: load test" in out.read_text()


def test_tokens_are_counted_with_a_tokenizer(config: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"?": 0}, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    done = invoke(config, "--url", "h:1", "--no-streaming", "--tokenizer", str(tmp_path), "--json")
    throughput = json.loads(done.stdout)["results"][0]["throughput"]
    assert (throughput["output_unit"], throughput["output_total"]) == ("tokens", 12)


def test_no_success_is_a_failed_check_after_the_report(config: str, tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    with pytest.raises(CheckFailedError, match="no request succeeded"):
        invoke(config, "--url", "h:1", "--prompt", "fail", "--output", str(out))
    assert json.loads(out.with_suffix(".json").read_text())["results"][0]["counts"]["error"] == 4


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_some_errors_are_a_warning_on_stderr(config: str, form: list[str]) -> None:
    done = invoke(config, "--url", "h:1", "--prompt", "a", "--prompt", "fail", *form)
    assert done.return_value == 0
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning")]
    assert warnings == ["warning: scenario 'default': 2 of 4 requests failed"]
    assert "warning" not in invoke(config, "--url", "h:1", *form).stderr


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("streaming", ["--streaming", "--no-streaming"])
def test_a_server_that_refuses_the_first_request_is_not_loaded(
    config: str, monkeypatch: pytest.MonkeyPatch, protocol: str, streaming: str
) -> None:
    sent: list[str] = []

    async def refuse(self: Echo, request: GenerateRequest, *, timeout_s: float = 0) -> AsyncIterator[Chunk]:
        sent.append(request.prompt)
        raise ServerError("unknown model", status="NOT_FOUND" if protocol == "grpc" else "404", model="nope")
        yield

    monkeypatch.setattr(Echo, "stream", refuse)
    error = refused(config, "--url", f"{protocol}://h:1", "--model", "nope", streaming)
    assert (type(error), error.exit_code) == (CheckFailedError, 1)
    assert "'nope'" in error.cause
    assert sent == ["one"]


def test_what_stops_a_later_scenario_loses_no_measurement(
    config: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = Echo.stream

    async def dies(self: Echo, request: GenerateRequest, *, timeout_s: float = 0) -> AsyncIterator[Chunk]:
        if len(self.made) > 1:
            raise LacksError("cannot reach h:1")
        async for chunk in stream(self, request):
            yield chunk

    monkeypatch.setattr(Echo, "stream", dies)
    arguments = ["--url", "h:1", "--scenario", "default", "--scenario", "rate", "--output", str(tmp_path / "r.html")]
    with pytest.raises(LacksError, match="cannot reach h:1"):
        command.main([config, *arguments], standalone_mode=False)
    assert "4 ok, 0 failed" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "r.json").read_text())["results"]) == 1


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_report_that_cannot_be_written_in_the_end_loses_no_measurement(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], form: list[str], tmp_path: Path
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trtkit.loadtest.report.atomic_write", full)
    with pytest.raises(OSError, match="No space"):
        command.main([config, "--url", "h:1", "--output", str(tmp_path / "r.html"), *form], standalone_mode=False)
    shown = capsys.readouterr().out
    assert json.loads(shown)["results"][0]["counts"]["ok"] == 4 if form else "4 ok, 0 failed" in shown


def test_an_output_that_cannot_be_written_is_refused(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "r.html").mkdir()
    assert "r.html is a folder" in refused(config, "--url", "h:1", "--output", str(tmp_path / "r.html")).cause
    monkeypatch.setattr("os.access", lambda path, mode, **options: not mode & os.W_OK)  # root may write anywhere
    error = refused(config, "--url", "h:1", "--output", str(tmp_path / "new" / "x.html"))
    assert f"no permission to write in {tmp_path}" in error.cause
    assert Echo.requests == []
    assert not (tmp_path / "new").exists()


def test_some_errors_are_shown_and_are_no_failure(config: str) -> None:
    done = invoke(config, "--url", "h:1", "--prompt", "a", "--prompt", "fail")
    assert done.return_value == 0
    assert "2 x server error INTERNAL: no such luck" in done.stdout
    assert "TK803" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--url", "h:1"], "no prompts to send"),
        (["--url", "h:1", "--scenario", "x", "--prompt", "p"], "--scenario needs CONFIG"),
        (["--prompt", "p"], "no server to test"),
        (["CONFIG", "--url", "h:1", "--scenario", "rte"], "no scenario 'rte'"),
        (["CONFIG", "--url", "h:1", "--rate", "1", "--concurrency", "1"], "exclude each other"),
        (["CONFIG", "--url", "h:1", "--concurrency", "0"], "--concurrency 0: input should be greater"),
        (["CONFIG", "--url", "h:1", "--duration", "-1"], "--duration -1.0: input should be greater"),
        (["CONFIG", "--url", "http://h:1", "--protocol", "grpc"], "contradicts protocol 'grpc'"),
        (["CONFIG", "--url", "h"], "not a url"),
        (["CONFIG", "--url", "h:1", "--tokenizer", "/nowhere"], "/nowhere: no such file"),
        (["missing.yaml", "--url", "h:1"], "cannot read missing.yaml"),
        (["CONFIG", "--url", "h:1", "--output", "/dev/null/x.html"], "/dev/null is not a folder"),
        (["CONFIG", "--url", "h:1", "--output", "/dev/null/new/folder"], "/dev/null is not a folder"),
    ],
)
def test_wrong_usage_is_one_line_and_sends_nothing(config: str, arguments: list[str], cause: str) -> None:
    error = refused(*(config if argument == "CONFIG" else argument for argument in arguments))
    assert isinstance(error, InputError)
    assert cause in error.cause
    assert error.fix
    assert Echo.requests == []


@pytest.mark.parametrize(("scenario", "url"), [("default", "grpc://127.0.0.1:2"), ("rate", "http://127.0.0.1:1")])
@pytest.mark.parametrize("target", ["local", "docker"])
def test_without_a_url_the_deployment_of_the_config_is_tested(
    config: str, deployed: Callable[..., None], scenario: str, url: str, target: str
) -> None:
    deployed("running", target=target)
    invoke(config, "--scenario", scenario)
    assert Echo.made[0][0] == url


def test_a_stopped_deployment_is_an_error(config: str, deployed: Callable[..., None]) -> None:
    for phase, alive in (("stopped", True), ("running", False)):
        deployed(phase, alive=alive)
        error = refused(config)
        assert isinstance(error, LacksError)
        assert error.cause == "no deployment 'served' is running"


@pytest.fixture
def deployed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Writes the record of a deployment 'served', and holds its lock while it is alive, as its supervisor would."""
    from trtkit.deploy import state

    monkeypatch.setenv("TRTKIT_STATE_DIR", str(tmp_path / "state"))
    locks: list[int] = []

    def write(phase: str, *, target: str = "local", alive: bool = True) -> None:
        folder = state.make_folder("served")
        while locks:
            os.close(locks.pop())
        ports = {"http_port": 1, "grpc_port": 2, "metrics_port": 3}
        own = {"shm_prefix": "none_such", "exit_timeout_s": 1, "container": "c", "stop_timeout_s": 1, "token": "none"}
        record = {"name": "served", "target": target, "phase": phase, "host": "127.0.0.1", "repository": "/r"}
        state.write(folder, record | ports | own | {"models": ["ensemble"], "log_path": "/l", "started_at": 0.0})
        if alive and (lock := state.acquire(folder)) is not None:
            locks.append(lock)

    yield write
    while locks:
        os.close(locks.pop())


def test_loadtest_and_validate_say_the_same_without_a_deployment(
    config: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from trtkit.cli import validate

    monkeypatch.setenv("TRTKIT_STATE_DIR", str(tmp_path / "state"))
    with pytest.raises(LacksError) as other:
        validate.command.main([config, "--only", "contract"], standalone_mode=False)
    error = refused(config)
    assert isinstance(error, LacksError)
    assert (error.cause, error.fix) == (other.value.cause, other.value.fix)


def test_an_interrupted_run_is_shown_and_exits_with_130(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    stream = Echo.stream

    async def interrupted(self: Echo, request: GenerateRequest, *, timeout_s: float = 0) -> AsyncIterator[Chunk]:
        import asyncio

        if len(self.requests) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(100)
        async for chunk in stream(self, request):
            yield chunk

    monkeypatch.setattr(Echo, "stream", interrupted)
    done = invoke(config, "--url", "h:1", "--scenario", "default", "--scenario", "rate", "--concurrency", "1")
    assert done.return_value == 130
    assert "TK801" in done.stdout
    assert "2 ok, 0 failed, 1 cancelled" in done.stdout
    assert len(Echo.made) == 1  # the second scenario does not run


def test_help_holds_an_example() -> None:
    assert "Example:" in invoke("--help").stdout
