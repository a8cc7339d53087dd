"""Versions swapped in a running server under load: no request fails, and a broken version never takes over."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from trtkit.deploy import local, ports, readiness, state
from trtkit.deploy.command import server_arguments
from trtkit.deploy.deployment import Deployment
from trtkit.deploy.server import environment, find_server, prepared
from trtkit.deploy.versions import versions_of

pytestmark = [pytest.mark.server]

ROOT = Path(__file__).parents[2]
POLL = "  target: local\n  model_control: poll"

CONFIG = """name: "which"
backend: "python"
max_batch_size: 8
input [{name: "seconds" data_type: TYPE_FP32 dims: [1]}]
output [{name: "version" data_type: TYPE_INT32 dims: [1]}]
instance_group [{count: 2 kind: KIND_CPU}]
dynamic_batching {}
"""
ENSEMBLE = """name: "front"
platform: "ensemble"
max_batch_size: 8
input [{name: "seconds" data_type: TYPE_FP32 dims: [1]}]
output [{name: "version" data_type: TYPE_INT32 dims: [1]}]
ensemble_scheduling {
  step [{
    model_name: "which" model_version: -1
    input_map {key: "seconds" value: "seconds"} output_map {key: "version" value: "version"}
  }]
}
"""
MODEL = """
import time

import helper
import numpy as np
import triton_python_backend_utils as pb


class TritonPythonModel:
    def initialize(self, args):
        helper.check()
        self.version = int(args["model_version"])
        print("initialize version", self.version, flush=True)

    def execute(self, requests):
        answers = []
        for request in requests:
            seconds = pb.get_input_tensor_by_name(request, "seconds").as_numpy()
            time.sleep(float(seconds.max()))
            answers.append(pb.InferenceResponse([pb.Tensor("version", np.full(seconds.shape, self.version, np.int32))]))
        return answers
"""
HELPER = "def check():\n    pass\n"
BROKEN = "def check():\n    raise RuntimeError('the engine is for another GPU')\n"
SYNTAX = "def check()\n"


@pytest.fixture(autouse=True)
def state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRTKIT_STATE_DIR", str(tmp_path / "state"))
    yield
    for name in state.names():
        local.down(name)


def version_folder(path: Path, helper: str = HELPER) -> Path:
    path.mkdir(parents=True)
    (path / "model.py").write_text(MODEL)
    (path / "helper.py").write_text(helper)
    return path


def make_repository(root: Path) -> Path:
    version_folder(root / "which" / "1")
    (root / "which" / "config.pbtxt").write_text(CONFIG)
    (root / "front" / "1").mkdir(parents=True)
    (root / "front" / "config.pbtxt").write_text(ENSEMBLE)
    return root


def ask(deployment: Deployment, model: str, seconds: float = 0.0) -> tuple[int, Any]:
    """Status and, when it is good, the version that answered."""
    tensor = {"name": "seconds", "datatype": "FP32", "shape": [1, 1], "data": [seconds]}
    connection = http.client.HTTPConnection("127.0.0.1", deployment.http_port, timeout=60)
    try:
        connection.request("POST", f"/v2/models/{model}/infer", json.dumps({"inputs": [tensor]}))
        answer = connection.getresponse()
        body = answer.read()
    finally:
        connection.close()
    return answer.status, json.loads(body)["outputs"][0]["data"][0] if answer.status == 200 else body.decode()


class Load:
    """Requests from several threads, without a pause, until it is stopped."""

    def __init__(self, deployment: Deployment, models: list[str]) -> None:
        self.answers: list[tuple[int, Any]] = []
        self.ending = threading.Event()
        self.threads = [threading.Thread(target=self._run, args=(deployment, model)) for model in models]
        for thread in self.threads:
            thread.start()

    def _run(self, deployment: Deployment, model: str) -> None:
        while not self.ending.is_set():
            try:
                self.answers.append(ask(deployment, model, 0.001))
            except Exception as error:  # a failed request like any other
                self.answers.append((0, repr(error)))

    def more(self, count: int) -> None:
        """Waits for so many further answers."""
        wanted, deadline = len(self.answers) + count, time.monotonic() + 60
        while len(self.answers) < wanted:
            assert time.monotonic() < deadline, "requests do not come back"
            time.sleep(0.01)

    def stop(self) -> None:
        self.ending.set()
        for thread in self.threads:
            thread.join()


def trtkit(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trtkit", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def serving(deployment: Deployment, model: str = "which") -> list[int]:
    return [one.version for one in versions_of(deployment) if one.model == model and one.state == "READY"]


def test_swaps_under_load(tmp_path: Path) -> None:
    """Five swaps with an ensemble on top: two good versions, a broken one that does not take over, back, and forth."""
    models = make_repository(tmp_path / "models")
    deployment = local.up(local.ServerSpec("hot", models, model_control="poll"))
    load = Load(deployment, ["which", "which", "front"])
    slow: list[tuple[int, Any]] = []
    try:
        load.more(200)
        lingering = threading.Thread(target=lambda: slow.append(ask(deployment, "front", 4.0)))
        lingering.start()
        time.sleep(0.3)  # so that the old version has it

        wait = ["--wait-for", "hot", "--json"]
        two, four = version_folder(tmp_path / "two"), version_folder(tmp_path / "four")
        done = trtkit("repo", "add-version", models, "which", two, *wait)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["serves"] == [2]
        assert ask(deployment, "which") == (200, 2)
        load.more(200)

        broken = version_folder(tmp_path / "broken", BROKEN)
        done = trtkit("repo", "add-version", models, "which", broken, *wait)
        assert done.returncode == 1
        cause = json.loads(done.stdout)["error"]["cause"]
        assert "version 3 of 'which' does not load: RuntimeError: the engine is for another GPU" in cause
        assert "version 2 serves on; version 3 was taken out of the repository again" in cause
        assert not (models / "which" / "3").exists()
        assert serving(deployment) == [2]
        load.more(200)

        done = trtkit("repo", "add-version", models, "which", four, "--version", "4", *wait)
        assert done.returncode == 0, done.stderr
        load.more(200)
        done = trtkit("repo", "rollback", models, "which", *wait)
        assert (done.returncode, json.loads(done.stdout)["version"]) == (0, 2)
        assert ask(deployment, "front") == (200, 2)
        load.more(200)
        done = trtkit("repo", "set-policy", models, "which", "latest:1", *wait)
        assert done.returncode == 0, done.stderr
        assert ask(deployment, "front") == (200, 4)
        load.more(200)
        lingering.join()
    finally:
        load.stop()
    served = Counter(load.answers)
    assert sum(served.values()) >= 1200
    assert {status for status, _ in served} == {200}, served
    assert {version for _, version in served} == {1, 2, 4}
    assert slow == [(200, 1)], "a request that the old version had is finished by it"
    log = Path(deployment.log_path).read_text()
    # Every instance of a version starts once: nothing but the swap itself has it loaded, its own bytecode least of all.
    starts = Counter(line.split()[-1] for line in log.splitlines() if line.startswith("initialize version"))
    assert starts == {"1": 2, "2": 4, "4": 4}, starts
    shown = json.loads(trtkit("deploy", "status", "hot", "--json").stdout)
    states = {(one["model"], one["version"]): one["state"] for one in shown["versions"]}
    assert states[("which", 4)] == states[("front", 1)] == "READY"
    assert states[("which", 2)] in ("UNLOADING", "UNAVAILABLE")


@pytest.mark.parametrize("keep", ["half-written", "syntax"])
def test_what_others_write_into_the_repository(tmp_path: Path, keep: str) -> None:
    """By hand, without trtkit's rename: the served version goes on, and status tells what is wrong."""
    models = make_repository(tmp_path / "models")
    deployment = local.up(local.ServerSpec("hand", models, model_control="poll"))
    load = Load(deployment, ["which", "front"])
    try:
        if keep == "syntax":
            version_folder(models / "which" / "2", SYNTAX)
        else:
            (models / "which" / "2").mkdir()
            (models / "which" / "2" / "model.py").write_text(MODEL[: len(MODEL) // 2])
        deadline = time.monotonic() + 60
        while not any(one.broken for one in versions_of(deployment)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        load.more(100)
    finally:
        load.stop()
    assert set(load.answers) == {(200, 1)}
    shown = trtkit("deploy", "status", "hand")
    assert shown.returncode == 0
    row = next(line for line in shown.stdout.splitlines() if "UNAVAILABLE" in line)
    assert "which" in row and ("SyntaxError" in row or "Error" in row)
    assert local.status("hand").ready, "it serves, so it is ready"


def test_without_polling_nothing_changes_and_nobody_waits(tmp_path: Path) -> None:
    models = make_repository(tmp_path / "models")
    deployment = local.up(local.ServerSpec("still", models))
    done = trtkit("repo", "add-version", models, "which", version_folder(tmp_path / "two"), "--wait-for", "still")
    assert done.returncode == 2
    assert "does not look for changes" in done.stderr
    assert not (models / "which" / "2").exists(), "refused before anything was changed"
    assert serving(deployment) == [1]


def stream(deployment: Deployment, prompt: str) -> str:
    """The text of one streamed answer of the whole chain, put together."""
    body = {"text_input": prompt, "max_tokens": 24, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", deployment.http_port, timeout=120)
    try:
        connection.request("POST", "/v2/models/ensemble/generate_stream", json.dumps(body))
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        events = [json.loads(line[5:]) for line in answer.read().splitlines() if line.startswith(b"data:")]
    finally:
        connection.close()
    return "".join(event["text_output"] for event in events)


@pytest.mark.slow
def test_streams_go_on_while_steps_of_the_ensemble_are_swapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny example: the model that computes, and then the one that tokenises, get a second version."""
    monkeypatch.setenv("TRTKIT_STORE", str(tmp_path / "store"))
    text = (ROOT / "build_configs" / "tiny-llama.yaml").read_text()
    config = tmp_path / "tiny.yaml"
    source = ROOT / "examples" / "tiny-llama"
    config.write_text(text.replace("../examples/tiny-llama", str(source)).replace("  target: local", POLL))
    models = tmp_path / "models"
    for arguments in (["build", config], ["repo", "generate", config, "-o", models]):
        done = trtkit(*arguments)
        assert done.returncode == 0, done.stderr
    done = trtkit("deploy", "up", config, "--repository", models, "--name", "tiny", "--json")
    assert done.returncode == 0, done.stderr
    deployment = local.status("tiny")
    assert deployment.model_control == "poll"
    expected = stream(deployment, "def main(")
    assert expected
    answers: list[str] = []
    ending = threading.Event()

    def ask_on() -> None:
        while not ending.is_set():
            try:
                answers.append(stream(deployment, "def main("))
            except Exception as error:
                answers.append(repr(error))

    clients = [threading.Thread(target=ask_on) for _ in range(2)]
    for client in clients:
        client.start()
    try:
        for model in ("tensorrt_llm", "preprocessing"):
            done = trtkit("repo", "add-version", models, model, models / model / "1", "--wait-for", "tiny")
            assert done.returncode == 0, done.stderr
            assert serving(deployment, model) == [2]
            wanted = len(answers) + 5
            while len(answers) < wanted:
                time.sleep(0.05)
    finally:
        ending.set()
        for client in clients:
            client.join()
    assert set(answers) == {expected}
    log = Path(deployment.log_path).read_text()
    assert log.count("loading: tensorrt_llm:2") == log.count("loading: preprocessing:2") == 1


def test_a_version_that_loads_slowly_is_left_to_the_server(tmp_path: Path) -> None:
    models = make_repository(tmp_path / "models")
    deployment = local.up(local.ServerSpec("slow", models, model_control="poll"))
    slow = version_folder(tmp_path / "slow", "import time\n\n\ndef check():\n    time.sleep(6)\n")
    wait = ["--wait-for", "slow", "--timeout", "3"]
    done = trtkit("repo", "add-version", models, "which", slow, *wait)
    assert done.returncode == 1
    assert "does not serve version 2 after 3 s" in done.stderr
    assert ask(deployment, "which") == (200, 1), "meanwhile the old one serves"
    deadline = time.monotonic() + 60
    while serving(deployment) != [2]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert ask(deployment, "which") == (200, 2)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """moto as a stand-in for S3: its address, and a bucket of the test's own."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    settings = {"ENDPOINT_URL": url, "ACCESS_KEY_ID": "stand-in", "SECRET_ACCESS_KEY": "stand-in"}
    for name, value in (settings | {"DEFAULT_REGION": "us-east-1", "EC2_METADATA_DISABLED": "true"}).items():
        monkeypatch.setenv(f"AWS_{name}", value)
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    boto3.client("s3").create_bucket(Bucket=name)
    yield url, name
    server.stop()


def test_a_server_that_reads_the_bucket_itself(tmp_path: Path, bucket: tuple[str, str]) -> None:
    """Triton's own s3:// repository in poll mode: it sees a version that is being pushed, and serves it when it is
    complete."""
    import boto3

    models = make_repository(tmp_path / "models")
    version_folder(tmp_path / "new")
    assert trtkit("repo", "push", models, f"s3://{bucket[1]}/team").returncode == 0
    with reading(f"s3://{bucket[0]}/{bucket[1]}/team", tmp_path) as deployment:
        load = Load(deployment, ["which", "front"])
        try:
            half = {"Bucket": bucket[1], "Key": "team/which/2/model.py"}
            boto3.client("s3").put_object(**half, Body=MODEL[:100].encode())
            log = Path(deployment.log_path)
            looked = log.read_text().count("loading: which:1")
            while log.read_text().count("loading: which:1") == looked:  # it has seen the change
                load.more(10)
            done = trtkit("repo", "add-version", models, "which", tmp_path / "new", "--version", "3")
            assert done.returncode == 0, done.stderr
            assert trtkit("repo", "push", models, f"s3://{bucket[1]}/team").returncode == 0
            deadline = time.monotonic() + 60
            while ask(deployment, "front") != (200, 3):
                assert time.monotonic() < deadline
            load.more(20)
        finally:
            load.stop()
        text = log.read_text()
    assert set(load.answers) == {(200, 1), (200, 3)}
    assert "loading: which:2" not in text
    starts = Counter(line.split()[-1] for line in text.splitlines() if line.startswith("initialize version"))
    assert starts == {"1": 2, "3": 2}, "what was served was not loaded anew"


@contextmanager
def reading(url: str, folder: Path) -> Iterator[Deployment]:
    """A polling server on a repository that is no folder of this machine."""
    found, log = prepared(find_server()), folder / "server.log"
    chosen = ports.choose("127.0.0.1", (0, 0, 0))
    arguments = server_arguments(
        url,
        host="127.0.0.1",
        http_port=chosen[0],
        grpc_port=chosen[1],
        metrics_port=chosen[2],
        exit_timeout_s=3,
        shm_prefix=f"trtkit_{chosen[0]}_",
        backend_directory=str(found.backends),
        cache_directory=str(found.caches),
        model_control="poll",
    )
    variables = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    with log.open("w") as stream:
        server = subprocess.Popen(
            [str(found.binary), *arguments], stdout=stream, stderr=stream, env=environment(found, variables), cwd=folder
        )
    try:
        deadline = time.monotonic() + 60
        while readiness.not_ready("127.0.0.1", chosen[0], ["which", "front"]):
            assert server.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield Deployment("s3", "local", "running", "127.0.0.1", *chosen, url, ("which", "front"), str(log), 0.0)
    finally:
        server.terminate()
        server.wait(30)
