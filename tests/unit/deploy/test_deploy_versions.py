"""What is made of a server's repository index and log. The server is a stand-in with the answers of a real one."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from trtkit.config_file import parse_config
from trtkit.deploy import docker_run, versions
from trtkit.deploy.command import mpi_command, server_arguments
from trtkit.deploy.deployment import Deployment
from trtkit.errors import CheckFailedError, InputError, LacksError

SYNTAX = "Internal: SyntaxError: expected ':' (model.py, line 1)\n\nAt:\n  model.py(1): <module>\n"
OPTIONS: dict[str, Any] = {
    "host": "127.0.0.1",
    "http_port": 1,
    "grpc_port": 2,
    "metrics_port": 3,
    "exit_timeout_s": 4,
    "shm_prefix": "p_",
}


class Index:
    """Answers /v2/repository/index with the next of its states, and with the last for ever."""

    def __init__(self) -> None:
        self.states: list[list[dict[str, str]]] = [[]]
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v2/repository/index"
                state = index.states[0] if len(index.states) == 1 else index.states.pop(0)
                body = json.dumps(state).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def index() -> Iterator[Index]:
    standin = Index()
    yield standin
    standin.close()


@pytest.fixture
def deployment(index: Index, tmp_path: Path) -> Deployment:
    for number in (1, 2):
        (tmp_path / "models" / "llm" / str(number)).mkdir(parents=True)
    log = tmp_path / "server.log"
    log.write_text("")
    return Deployment(
        "name", "local", "running", "127.0.0.1", index.server.server_port, 2, 3, str(tmp_path / "models"), ("llm",),
        str(log), 0.0, model_control="poll",
    )  # fmt: skip


def entry(version: int, state: str, reason: str = "", model: str = "llm") -> dict[str, str]:
    known = {"name": model, "version": str(version), "state": state}
    return known | ({"reason": reason} if reason else {})


def wait(deployment: Deployment, wanted: tuple[int, ...] = (2,), **options: Any) -> None:
    options = {"timeout_s": 20.0, "log_from": 0} | options
    versions.wait_for_versions(deployment, "llm", wanted, **options)


def test_versions_of_a_server(index: Index, deployment: Deployment) -> None:
    gone = entry(7, "UNAVAILABLE", "unloaded")
    never_loaded = {"name": "other"}
    index.states = [
        [entry(2, "UNAVAILABLE", SYNTAX), never_loaded, gone, entry(1, "READY"), entry(1, "READY", "", "a")]
    ]
    found = versions.versions_of(deployment)
    assert [(one.model, one.version, one.state) for one in found] == [
        ("a", 1, "READY"),
        ("llm", 1, "READY"),
        ("llm", 2, "UNAVAILABLE"),
    ]
    assert found[2].broken and found[2].reason == "SyntaxError: expected ':' (model.py, line 1)"
    assert not found[1].broken


def test_waits_until_it_alone_serves(index: Index, deployment: Deployment) -> None:
    old = [entry(1, "READY")]
    both = [entry(1, "READY"), entry(2, "READY")]
    index.states = [old, old, [*old, entry(2, "LOADING")], both, [entry(1, "UNLOADING"), entry(2, "READY")]]
    wait(deployment)
    assert len(index.states) == 1


def test_what_is_broken_is_said_at_once(index: Index, deployment: Deployment) -> None:
    old = [entry(1, "READY")]
    index.states = [old, old, [*old, entry(2, "LOADING")], [*old, entry(2, "UNAVAILABLE", SYNTAX)]]
    with pytest.raises(CheckFailedError) as error:
        wait(deployment)
    expected = "version 2 of 'llm' does not load: SyntaxError: expected ':' (model.py, line 1); version 1 serves on"
    assert error.value.cause == expected


def test_an_old_failure_is_not_this_one(index: Index, deployment: Deployment) -> None:
    """The index still tells of a version of the same number that was taken out and mended."""
    old = [entry(1, "READY"), entry(2, "UNAVAILABLE", SYNTAX)]
    done = [entry(1, "UNAVAILABLE", "unloaded"), entry(2, "READY")]
    index.states = [old, old, old, [entry(1, "READY"), entry(2, "LOADING")], done]
    wait(deployment)


def test_a_config_that_cannot_be_read_is_in_the_log_alone(index: Index, deployment: Deployment) -> None:
    index.states = [[entry(1, "READY")]]
    line = "E1121 12:25:34.290374 5381 model_repository_manager.cc:1460] \"Poll failed for model directory '{}': {}\"\n"
    log = Path(deployment.log_path)
    log.write_text(line.format("llm", "an old story"))
    begin = versions.log_end(deployment)
    with log.open("a") as stream:
        stream.write(line.format("other", "no concern of ours"))
    with pytest.raises(versions.StillLoadingError, match=r"does not serve version 2 after 0\.3 s \(1 READY\)"):
        wait(deployment, timeout_s=0.3, log_from=begin)
    with log.open("a") as stream:
        stream.write(line.format("llm", "failed to read text proto"))
    with pytest.raises(CheckFailedError, match="cannot read 'llm': failed to read text proto; version 1 serves on"):
        wait(deployment, log_from=begin)


def test_a_deployment_that_ends_or_does_not_answer(index: Index, deployment: Deployment) -> None:
    with pytest.raises(LacksError, match="ended meanwhile"):
        wait(deployment, alive=lambda: False)
    index.close()
    index.thread.join()
    assert versions.versions_of(deployment) == []


def test_who_can_be_waited_for(deployment: Deployment, tmp_path: Path) -> None:

    versions.check_polls(deployment, tmp_path / "models")
    with pytest.raises(InputError, match="does not look for changes"):
        versions.check_polls(replace(deployment, model_control="none"), tmp_path / "models")
    with pytest.raises(InputError, match=r"serves .*models, not"):
        versions.check_polls(deployment, tmp_path / "elsewhere")


def test_the_arguments_of_a_server_that_polls() -> None:
    still, polling = server_arguments("/m", **OPTIONS), server_arguments("/m", **OPTIONS, model_control="poll")
    assert {"--model-control-mode=none", "--strict-readiness=true"} <= set(still)
    assert not any(word.startswith("--repository-poll-secs") for word in still)
    wanted = {"--model-control-mode=poll", "--repository-poll-secs=2", "--strict-readiness=false"}
    assert set(polling) - set(still) == wanted
    assert "explicit" not in " ".join(mpi_command("tritonserver", polling, world_size=1, shm_prefix="p_"))


@pytest.mark.parametrize("control", ["none", "poll"])
def test_containers(control: str, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    text = "name: c\nmodel: {{source: x/y}}\nserving: {{runtime: tensorrtllm}}\n{}deploy: {{model_control: {}}}\n"
    run = docker_run.render(parse_config(text.format("", control)), tmp_path / "models")
    assert f"--model-control-mode={control}" in run.command
    two = parse_config(text.format("checkpoint: {tp: 2}\n", control))
    if control == "none":
        assert "mpirun" in docker_run.render(two, tmp_path / "models").command
    else:
        with pytest.raises(InputError, match="cannot swap versions of an engine with 2 MPI ranks"):
            docker_run.render(two, tmp_path / "models")
