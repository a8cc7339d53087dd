"""`trtkit validate`: what it prints, and its exit codes. The server is a stand-in client."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from standin_client import StandInClient

from trtkit.cli import main
from trtkit.cli.validate import _names, command
from trtkit.client import served
from trtkit.deploy import state
from trtkit.validate import CHECKS, run


@pytest.fixture
def urls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand-in clients instead of connections; the list gets the url of each."""
    asked: list[str] = []

    def connect(url: str, **options: Any) -> StandInClient:
        asked.append(url)
        return StandInClient(url.partition(":")[0])

    monkeypatch.setattr(run, "connect", connect)
    monkeypatch.setattr(served, "connect", lambda url, **options: StandInClient())
    return asked


def trtkit(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `trtkit validate ARGS`."""
    with pytest.raises(SystemExit) as stop:
        main(["validate", *args])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_a_table_of_checks(urls: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = trtkit(capsys, "--url", "grpc://x:1", "--url", "http://x:2", "--skip", "cancellation")
    assert code == 0, out
    assert urls == ["grpc://x:1", "http://x:2"]
    for name in ("contract", "streaming", "bad_requests"):
        assert name in out and f"checking {name}" in err
    assert "passed" in out and "skipped" in out and "failed" not in out


def test_json(urls: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = trtkit(capsys, "--url", "grpc://x:1", "--only", "streaming", "--json")
    found = json.loads(out)
    assert code == 0 and found["passed"] is True and found["urls"] == ["grpc://x:1"]
    assert [check["name"] for check in found["checks"]] == ["streaming"]


def test_a_failed_check_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    client = StandInClient()
    client.split = lambda text: [text]
    for module in (run, served):
        monkeypatch.setattr(module, "connect", lambda url, **options: client)
    code, out, err = trtkit(capsys, "--url", "grpc://x:1", "--only", "streaming")
    assert code == 1 and "TK722" in out and "fix:" in out
    assert "1 of 1 checks failed: streaming" in err
    code, out, _ = trtkit(capsys, "--url", "grpc://x:1", "--only", "streaming", "--json")
    assert code == 1 and json.loads(out)["passed"] is False


def test_wrong_usage_is_exit_code_2(urls: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for args in ([], ["--only", "nonsense", "--url", "grpc://x:1"], [str(tmp_path / "absent.yaml")]):
        assert trtkit(capsys, *args)[0] == 2


@pytest.mark.parametrize(
    ("args", "cause"),
    [
        (["--only", "parity"], "error: check 'parity' has no source to compare with\n  fix: give --source DIR"),
        (["--only", "parity", "--skip", "parity"], "leave no check to run"),
        (["--only", "cancellation", "--engine", "nope"], "'cancellation' was asked for and cannot run: the server has"),
    ],
)
def test_a_check_that_is_asked_for_must_run(
    urls: list[str], capsys: pytest.CaptureFixture[str], args: list[str], cause: str
) -> None:
    code, out, err = trtkit(capsys, "--url", "grpc://x:1", *args, "--json")
    assert code == 2 and cause in err
    answer = json.loads(out)
    assert answer["passed"] is False if "passed" in answer else answer["error"]["exit_code"] == 2


def config_file(folder: Path) -> str:
    source = folder / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    file = folder / "config.yaml"
    file.write_text(f"name: my-model\nmodel: {{source: {source}}}\nserving: {{max_batch_size: 4}}\n")
    return str(file)


def test_a_config_finds_its_running_deployment(
    urls: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRTKIT_STATE_DIR", str(tmp_path / "state"))
    args = [
        config_file(tmp_path),
        *(word for name in ("parity", "text", "chat", "cancellation") for word in ("--skip", name)),
    ]
    code, _, err = trtkit(capsys, *args)
    assert code == 3 and "no deployment 'my-model' is running" in err and "trtkit deploy up" in err
    record = {
        "name": "my-model",
        "target": "local",
        "phase": "running",
        "host": "127.0.0.1",
        "http_port": 11,
        "grpc_port": 12,
        "metrics_port": 13,
        "repository": "r",
        "models": [],
        "log_path": "l",
        "started_at": 0.0,
        "token": "t",
        "shm_prefix": "s",
        "exit_timeout_s": 1,
    }
    folder = state.make_folder("my-model")
    state.write(folder, record)
    lock = state.acquire(folder)  # as its supervisor holds it
    assert lock is not None
    code, out, _ = trtkit(capsys, *args)
    assert code == 0, out
    assert urls == ["grpc://127.0.0.1:12", "http://127.0.0.1:11"]
    os.close(lock)
    assert trtkit(capsys, *args)[0] == 3, "a record whose supervisor died is no running deployment"
    state.write(folder, record | {"phase": "running", "target": "docker", "container": "c", "stop_timeout_s": 1})
    assert trtkit(capsys, *args)[0] == 0
    state.write(state.folder_of("my-model"), record | {"phase": "stopped"})
    assert trtkit(capsys, *args)[0] == 3


def test_the_help_names_every_check_and_shows_examples() -> None:
    assert list(_names.choices) == list(CHECKS)
    text = CliRunner().invoke(command, ["--help"]).output
    assert "Example:" in text
    assert all(f"\n    {name} " in text for name in CHECKS)
