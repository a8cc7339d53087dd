"""Load tests of a real Triton server, whose model has the ensemble's contract and answers with known delays."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from trtkit.cli.loadtest import command
from trtkit.config import Scenario
from trtkit.deploy.deployment import Deployment
from trtkit.deploy.local import running_server
from trtkit.errors import LacksError
from trtkit.loadtest.metrics import Result
from trtkit.loadtest.runner import run_blocking

pytestmark = [
    pytest.mark.server,
    pytest.mark.xdist_group("loadtest_server"),
]

FIRST_MS, GAP_MS = 60, 15

# Stand-in for an LLM: sleeps FIRST_MS before the first token and GAP_MS before each other one; never less.
MODEL = f"""
import os
import signal
import threading
import time

import numpy as np
import triton_python_backend_utils as pb


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            threading.Thread(target=self.answer, args=(request,), daemon=True).start()

    def answer(self, request):
        def read(name):
            return pb.get_input_tensor_by_name(request, name).as_numpy().reshape(-1)[0]

        sender = request.get_response_sender()
        prompt = read("text_input").decode()
        count, streaming = int(read("max_tokens")), bool(read("stream"))
        if prompt == "kill":
            os.kill(os.getppid(), signal.SIGKILL)
        words = []
        for place in range(count):
            time.sleep({FIRST_MS / 1000} if place == 0 else {GAP_MS / 1000})
            if prompt == "fail" and place == 1:
                error = pb.TritonError("out of pages for request %d" % (time.monotonic_ns() // 10**6))
                sender.send(pb.InferenceResponse(error=error), flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                return
            words.append("w%d " % place)
            if streaming:
                sender.send(self.text(words[-1]))
        if not streaming:
            sender.send(self.text("".join(words)))
        sender.send(flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def text(self, text):
        return pb.InferenceResponse([pb.Tensor("text_output", np.array([[text.encode()]], dtype=np.object_))])
"""
CONFIG = """name: "ensemble"
backend: "python"
max_batch_size: 8
model_transaction_policy { decoupled: true }
input [
  { name: "text_input" data_type: TYPE_STRING dims: [ 1 ] },
  { name: "max_tokens" data_type: TYPE_INT32 dims: [ 1 ] },
  { name: "stream" data_type: TYPE_BOOL dims: [ 1 ] },
  { name: "exclude_input_in_output" data_type: TYPE_BOOL dims: [ 1 ] optional: true }
]
output [ { name: "text_output" data_type: TYPE_STRING dims: [ 1 ] } ]
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    version = root / "ensemble" / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(MODEL)
    (version.parent / "config.pbtxt").write_text(CONFIG)
    return root


@pytest.fixture(scope="module", autouse=True)
def state_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRTKIT_STATE_DIR", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="module")
def server(repository: Path, state_folder: None) -> Iterator[Deployment]:
    with running_server(repository, name="tinytest", exit_timeout_s=1) as deployment:
        yield deployment


def url_of(server: Deployment, protocol: str) -> str:
    return f"grpc://{server.grpc_url}" if protocol == "grpc" else server.http_url


def check_counts(result: Result, requests: int, ok: int) -> None:
    assert (result.counts["requests"], result.counts["ok"]) == (requests, ok), result.errors
    assert sum(entry["count"] for entry in result.errors) == result.counts["error"] == requests - ok


@pytest.mark.parametrize("load", [{"concurrency": 4}, {"request_rate": 20.0}], ids=["closed", "open"])
@pytest.mark.parametrize("streaming", [True, False], ids=["streaming", "unary"])
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_measures_every_way_to_ask(server: Deployment, protocol: Any, streaming: bool, load: dict[str, Any]) -> None:
    scenario = Scenario(
        **load, streaming=streaming, duration_s=60, warmup_s=0, max_requests=16, max_tokens=6, prompts=["a", "b"]
    )
    result = run_blocking(url_of(server, protocol), scenario)
    check_counts(result, 16, 16)
    assert result.scenario["protocol"] == protocol
    whole_ms = FIRST_MS + 5 * GAP_MS
    raw = result.requests
    assert min(end - sent for end, sent in zip(raw["end"], raw["sent"], strict=True)) >= whole_ms * 1000
    assert all(sent >= intended for sent, intended in zip(raw["sent"], raw["intended"], strict=True))
    if not streaming:
        assert result.latency["ttft"] is None
        assert raw["first"] == [None] * 16
        return
    assert raw["output"] == [6] * 16
    assert min(first - sent for first, sent in zip(raw["first"], raw["sent"], strict=True)) >= FIRST_MS * 1000
    # Between first and last chunk lie the gaps, which arrive together only if somebody held them back.
    ttft, itl, e2e = (result.latency[key] for key in ("ttft", "itl", "e2e"))
    assert ttft and itl and e2e
    assert itl["count"] == 16 * 5
    assert ttft["mean"] + 5 * itl["mean"] <= e2e["mean"] + 0.01


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("streaming", [True, False], ids=["streaming", "unary"])
def test_counts_the_errors_of_the_model(server: Deployment, protocol: Any, streaming: bool) -> None:
    prompts = ["a", "a", "fail", "a"]
    scenario = Scenario(
        concurrency=2, streaming=streaming, duration_s=60, warmup_s=0, max_requests=20, max_tokens=3, prompts=prompts
    )
    result = run_blocking(url_of(server, protocol), scenario)
    check_counts(result, 20, 15)
    assert len(result.errors) == 1
    assert "out of pages for request" in result.errors[0]["kind"]


def test_a_request_over_its_time_is_a_timeout(server: Deployment) -> None:
    scenario = Scenario(
        concurrency=1, duration_s=60, warmup_s=0, max_requests=2, max_tokens=500, timeout_s=0.5, prompts=["a"]
    )
    result = run_blocking(url_of(server, "grpc"), scenario)
    assert result.errors == [{"kind": "timeout", "count": 2}]


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_server_that_dies_shows_as_errors(repository: Path, protocol: Any) -> None:
    """The fifth prompt makes the model kill its server."""
    scenario = Scenario(
        concurrency=1,
        duration_s=60,
        warmup_s=0,
        max_requests=8,
        max_tokens=3,
        timeout_s=20.0,
        prompts=["a"] * 4 + ["kill"],
    )
    with running_server(repository, exit_timeout_s=1) as deployment:
        result = run_blocking(url_of(deployment, protocol), scenario)
    check_counts(result, 8, 4)
    assert result.requests["ok"] == [True] * 4 + [False] * 4
    with pytest.raises(LacksError, match="cannot reach"):
        run_blocking(url_of(deployment, protocol), scenario)


def test_the_command_finds_the_deployment_and_writes_the_report(server: Deployment, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(
        "name: tinytest\nmodel: {source: m}\nvalidation: {prompts: [x, y]}\nloadtest:\n"
        "  closed: {concurrency: 2, duration_s: 60, warmup_s: 0, max_requests: 6, max_tokens: 4}\n"
        "  unary: {request_rate: 50, duration_s: 60, warmup_s: 0, max_requests: 6, streaming: false, protocol: http}\n"
    )
    arguments = [
        str(config),
        "--scenario",
        "closed",
        "--scenario",
        "unary",
        "--output",
        str(tmp_path / "out" / "r.html"),
    ]
    done = CliRunner().invoke(command, [*arguments, "--max-tokens", "3", "--json"], catch_exceptions=False)
    printed = json.loads(done.stdout)
    written = json.loads((tmp_path / "out" / "r.json").read_text())
    assert [result["counts"]["ok"] for result in printed["results"]] == [6, 6]
    assert [result["scenario"]["target"] for result in written["results"]] == [
        url_of(server, "grpc"),
        url_of(server, "http"),
    ]
    assert written["results"][0]["requests"]["output"] == [3] * 6
    assert written["results"][0]["scenario"]["prompts"] == ["x", "y"]
    assert "Side by side" in (tmp_path / "out" / "r.html").read_text()
