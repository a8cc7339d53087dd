"""The local target with the real Triton server: serving, stopping, and dying at every bad moment."""

from __future__ import annotations

import http.client
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trtkit.deploy import launch, local, processes, server, state
from trtkit.deploy.deployment import Deployment
from trtkit.errors import CheckFailedError, InputError, LacksError

SHM = Path("/dev/shm")  # noqa: S108 - where the python backend keeps its regions
pytestmark = [
    pytest.mark.server,
]

CONFIG = """name: "{name}"
backend: "python"
max_batch_size: 0
input [{{name: "x" data_type: TYPE_INT32 dims: [-1]}}]
output [{{name: "y" data_type: TYPE_INT32 dims: [-1]}}]
"""
DOUBLE = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        inputs = [pb_utils.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", 2 * x)]) for x in inputs]
"""
# Holds the interpreter lock inside execute, and starts programs that shake off what could tell whose they are: the
# marker in the environment (env -i), the session (setsid), the parent (&, in a shell that ends).
STUBBORN = """
import ctypes, os, subprocess

class TritonPythonModel:
    def initialize(self, args):
        for command in ("setsid sleep 600 &", "env -i sleep 600 &", "env -i setsid sleep 600 &"):
            subprocess.run(["sh", "-c", command])
        subprocess.Popen(["env", "-i", "setsid", "sleep", "600"])

    def execute(self, requests):
        ctypes.PyDLL(None).sleep(600)
"""
SLOW = """
import time

class TritonPythonModel:
    def initialize(self, args):
        time.sleep(600)
"""
ENVIRONMENT = """
import json, os
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        with open(os.path.join(args["model_repository"], "environment.json"), "w") as stream:
            json.dump(dict(os.environ), stream)

    def execute(self, requests):
        return []
"""


@pytest.fixture(autouse=True)
def state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A state folder of the test's own; whatever a failing test leaves running is stopped."""
    monkeypatch.setenv("TRTKIT_STATE_DIR", str(tmp_path / "state"))
    yield tmp_path / "state"
    for name in state.names():
        local.down(name)


def repository(root: Path, code: str | None, *, model: str = "double", config: str = CONFIG) -> Path:
    version = root / model / "1"
    version.mkdir(parents=True)
    (version.parent / "config.pbtxt").write_text(config.format(name=model))
    if code is not None:
        (version / "model.py").write_text(code)
    return root


def double(deployment: Deployment, values: list[int]) -> list[int]:
    tensor = {"name": "x", "datatype": "INT32", "shape": [len(values)], "data": values}
    connection = http.client.HTTPConnection("127.0.0.1", deployment.http_port, timeout=10)
    try:
        connection.request("POST", "/v2/models/double/infer", json.dumps({"inputs": [tensor]}))
        answer = json.loads(connection.getresponse().read())
    finally:
        connection.close()
    found: list[int] = answer["outputs"][0]["data"]
    return found


def send_and_leave(deployment: Deployment, model: str) -> http.client.HTTPConnection:
    """Sends a request whose answer never comes."""
    tensor = {"name": "x", "datatype": "INT32", "shape": [1], "data": [1]}
    connection = http.client.HTTPConnection("127.0.0.1", deployment.http_port, timeout=10)
    connection.request("POST", f"/v2/models/{model}/infer", json.dumps({"inputs": [tensor]}))
    return connection


def _has_ipv6_loopback() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def eventually(what: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "did not come about in time"
        time.sleep(0.05)


def nothing_left(folder: Path) -> bool:
    """No process, no shared memory, no lock of the deployment whose record lies in `folder`."""
    record = state.read(folder)
    assert record is not None
    regions = list(SHM.glob(record["shm_prefix"] + "*"))
    return not processes.members(record["token"]) and not regions and not state.is_locked(folder)


def test_serves_inside_the_block_and_is_gone_after_it(tmp_path: Path, state_folder: Path) -> None:
    told: list[str] = []
    with local.running_server(repository(tmp_path / "models", DOUBLE), on_progress=told.append) as deployment:
        assert deployment.ready
        assert deployment.models == ("double",)
        assert double(deployment, [1, 2, 21]) == [2, 4, 42]
        assert launch.owns_ports(deployment)
        assert state.names() == [deployment.name]
        assert local.status(deployment.name).ready
    assert told
    assert deployment.pid is not None
    assert processes.start_time(deployment.pid) is None
    assert processes.members(deployment.token) == []
    assert list(SHM.glob(f"trtkit_{deployment.token}_*")) == []
    assert list((state_folder / "deployments").iterdir()) == []


def test_an_error_inside_the_block_stops_the_server(tmp_path: Path, state_folder: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        local.running_server(repository(tmp_path / "models", DOUBLE), name="block", log_path=tmp_path / "my.log"),
    ):
        1 / 0  # noqa: B018
    assert nothing_left(state_folder / "deployments" / "block")
    assert "Started HTTPService" in (tmp_path / "my.log").read_text()
    assert local.status("block").phase == "stopped"


def test_up_twice_down_twice_and_a_neighbour(tmp_path: Path, state_folder: Path) -> None:
    models = repository(tmp_path / "models", DOUBLE)
    first = local.up(local.ServerSpec("first", models))
    second = local.up(local.ServerSpec("second", models))
    with pytest.raises(InputError, match="'first' is already running") as refused:
        local.up(local.ServerSpec("first", models))
    assert first.http_url in str(refused.value)
    assert first.grpc_url in str(refused.value)
    assert len({*_ports(first), *_ports(second)}) == 6
    assert [(name, local.status(name).ready) for name in state.names()] == [("first", True), ("second", True)]

    assert local.down("first").exit_code == 0
    assert nothing_left(state_folder / "deployments" / "first")
    assert local.down("first").phase == "stopped"
    assert double(second, [4]) == [8]
    assert local.up(local.ServerSpec("first", models)).ready
    with pytest.raises(InputError, match="no deployment 'third'; known: first, second"):
        local.down("third")
    assert (state_folder / "deployments" / "first").stat().st_mode & 0o077 == 0


def test_a_repository_with_a_blank_and_an_accent_in_its_path(tmp_path: Path, state_folder: Path) -> None:
    models = repository(tmp_path / "sp ace é" / "models", DOUBLE)
    deployment = local.up(local.ServerSpec("odd", models))
    assert double(deployment, [1, 21]) == [2, 42]
    assert deployment.repository == str(models)
    local.down("odd")
    assert nothing_left(state_folder / "deployments" / "odd")
    assert list((state_folder / "deployments" / "odd").glob("trtkit-alias-*")) == []


@pytest.mark.skipif(not _has_ipv6_loopback(), reason="no IPv6 loopback")
def test_ipv6(tmp_path: Path) -> None:
    with local.running_server(repository(tmp_path / "models", DOUBLE), host="::1") as deployment:
        assert deployment.http_url.startswith("http://[::1]:")
        for port in _ports(deployment):
            socket.create_connection(("::1", port), timeout=10).close()
            with pytest.raises(OSError, match="refused"):
                socket.create_connection(("127.0.0.1", port), timeout=10)


def _ports(deployment: Deployment) -> tuple[int, int, int]:
    return deployment.http_port, deployment.grpc_port, deployment.metrics_port


STARTER = """
import sys
from trtkit.deploy import local
if sys.argv[1] == "up":
    local.up(local.ServerSpec("orphan", sys.argv[2]))
else:
    with local.running_server(sys.argv[2], name="orphan"):
        input()
"""


@pytest.mark.parametrize("how", ["up", "block"])
def test_killing_the_starter_leaves_nothing(tmp_path: Path, state_folder: Path, how: str) -> None:
    """During start-up (`up` with a model that loads for ever), and in the middle of a foreground block."""
    models = repository(tmp_path / "models", SLOW if how == "up" else DOUBLE)
    folder = state_folder / "deployments" / "orphan"
    with subprocess.Popen([sys.executable, "-c", STARTER, how, str(models)], stdin=subprocess.PIPE) as starter:
        try:
            # The server and its stub run.
            eventually(lambda: len(processes.members((state.read(folder) or {}).get("token", "none"))) >= 2)
            if how == "block":
                eventually(lambda: local.status("orphan").ready)
        finally:
            starter.kill()
    eventually(lambda: not state.is_locked(folder))
    assert nothing_left(folder)
    after = local.status("orphan")
    assert (after.phase, after.reason) == ("stopped", "whoever started it is gone")


def test_interrupting_up_leaves_nothing(tmp_path: Path, state_folder: Path) -> None:
    models = repository(tmp_path / "models", SLOW)
    config = tmp_path / "config.yaml"
    config.write_text("name: slow\nmodel: {source: none/none}\nserving: {runtime: reference}\n")
    folder = state_folder / "deployments" / "slow"
    command = [sys.executable, "-m", "trtkit", "deploy", "up", str(config), "--repository", str(models)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as starter:
        try:
            assert starter.stderr is not None
            while "loading double (0 of 1 models done)" not in (line := starter.stderr.readline()):
                assert line, "it ended without saying what it waits for"
            starter.send_signal(signal.SIGINT)
            _, said = starter.communicate(timeout=60)
        finally:
            starter.kill()
    assert starter.returncode == 130
    assert said.splitlines()[-1] == "interrupted"
    assert nothing_left(folder)


@pytest.mark.parametrize("victim", ["supervisor", "server", "supervisor and guard"])
def test_killing_any_process_takes_the_rest_along(tmp_path: Path, state_folder: Path, victim: str) -> None:
    """The python stub is busy and its programs try to escape, so that nothing of it would die by itself."""
    models = repository(tmp_path / "models", STUBBORN, model="stubborn")
    deployment = local.up(local.ServerSpec("victim", models))
    assert deployment.pid is not None
    assert deployment.supervisor_pid is not None
    held = send_and_leave(deployment, "stubborn")
    family = _family(deployment)
    # Without marker, session and parent a program is known as the supervisor's adopted child alone.
    escaped = [pid for pid in family if _parent(pid) == deployment.supervisor_pid and not _tells(pid, deployment)]
    folder = state_folder / "deployments" / "victim"
    try:
        assert (len(family), len(escaped)) == (6, 1)
        if victim == "server":
            os.kill(deployment.pid, signal.SIGKILL)
        else:
            (guard,) = _children(deployment.supervisor_pid) - set(family)
            os.kill(deployment.supervisor_pid, signal.SIGSTOP)  # so that it cannot react to the guard's death
            if victim == "supervisor and guard":
                os.kill(guard, signal.SIGKILL)
            os.kill(deployment.supervisor_pid, signal.SIGKILL)
        eventually(lambda: processes.start_time(deployment.pid) is None)  # without anybody's looking
        eventually(lambda: not state.is_locked(folder))
        after = local.status("victim")
        assert after.phase == ("failed" if victim == "server" else "crashed")
        assert (
            after.reason
            == {
                "server": "the server was ended by signal 9",
                "supervisor": "its supervisor was killed",
                "supervisor and guard": "its processes died without a word",
            }[victim]
        )
        assert nothing_left(folder)
        left = [pid for pid in family if processes.start_time(pid) is not None]
        if victim == "server":
            assert left == []
        elif victim == "supervisor":
            assert left == escaped
        else:  # only the marker tells anything now
            assert all(_is_sleep(pid) for pid in left)
    finally:
        held.close()
        for pid in filter(_is_sleep, family):
            processes.send(pid, signal.SIGKILL)
    (tmp_path / "again").mkdir()
    again = local.up(local.ServerSpec("victim", repository(tmp_path / "again", DOUBLE)))
    assert double(again, [5]) == [10]


def _family(deployment: Deployment) -> list[int]:
    """The server, its stub and the four programs of `STUBBORN`, once they are what they will be."""
    assert deployment.supervisor_pid is not None
    everyone: list[int] = []

    def complete() -> bool:
        everyone[:] = processes.members(deployment.token, session=deployment.pid, parent=deployment.supervisor_pid)
        return sum(map(_is_sleep, everyone)) == 4

    eventually(complete)
    return [pid for pid in everyone if _is_sleep(pid) or b"triton" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def _children(pid: int) -> set[int]:
    return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _tells(pid: int, deployment: Deployment) -> bool:
    marked = deployment.token.encode() in Path(f"/proc/{pid}/environ").read_bytes()
    return marked or os.getsid(pid) == deployment.pid


def _is_sleep(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() == b"sleep\x00600\x00"
    except OSError:
        return False


def test_down_kills_a_server_that_cannot_finish(tmp_path: Path, state_folder: Path) -> None:
    models = repository(tmp_path / "models", STUBBORN, model="stubborn")
    deployment = local.up(local.ServerSpec("busy", models, exit_timeout_s=1))
    assert deployment.pid is not None
    family = _family(deployment)
    held = send_and_leave(deployment, "stubborn")
    try:
        assert local.down("busy").phase == "stopped"
    finally:
        held.close()
    assert [pid for pid in family if processes.start_time(pid) is not None] == []
    assert nothing_left(state_folder / "deployments" / "busy")


@pytest.mark.parametrize(
    ("code", "config", "said"),
    [
        ("class TritonPythonModel\n", CONFIG, "SyntaxError: expected ':' (model.py, line 1)"),
        (
            "class TritonPythonModel:\n    def initialize(self, args):\n        raise ValueError('too old: 0.9')\n",
            CONFIG,
            "broken: Internal: ValueError: too old: 0.9 At: ",
        ),
        ("import no_such_module\n", CONFIG, "ModuleNotFoundError: No module named 'no_such_module'"),
        (DOUBLE, CONFIG + "nonsense: 3\n", '6:9: Message type "inference.ModelConfig" has no field named "nonsense"'),
        (DOUBLE, CONFIG.replace("{name}", "other"), "directory name must equal model name"),
    ],
    ids=["syntax", "exception", "import", "config", "name"],
)
def test_a_model_that_does_not_load_is_explained_in_the_servers_words(
    tmp_path: Path, state_folder: Path, code: str, config: str, said: str
) -> None:
    models = repository(tmp_path / "models", code, model="broken", config=config)
    with pytest.raises(CheckFailedError, match="the server exited with code 1") as failed:
        local.up(local.ServerSpec("broken", models))
    assert said in failed.value.cause
    assert len(failed.value.cause.splitlines()) <= 3
    assert str(state_folder / "deployments" / "broken" / "server.log") in failed.value.fix
    assert local.status("broken").phase == "failed"
    assert nothing_left(state_folder / "deployments" / "broken")


def test_a_backend_that_the_server_lacks_is_refused_before_the_start(tmp_path: Path, state_folder: Path) -> None:
    config = CONFIG.replace("python", "tensorrtllm")
    models = repository(tmp_path / "models", DOUBLE, model="broken", config=config)
    with pytest.raises(LacksError, match="model 'broken' needs the backend tensorrtllm, which is not on this machine"):
        local.up(local.ServerSpec("broken", models))
    assert not (state_folder / "deployments" / "broken").exists()


def test_a_model_that_loads_for_ever_ends_at_the_deadline(tmp_path: Path, state_folder: Path) -> None:
    models = repository(tmp_path / "models", None)  # without model.py the server waits for its stub for ever
    with pytest.raises(CheckFailedError, match="not ready after 2 s, still loading double"):
        local.up(local.ServerSpec("hanging", models, ready_timeout_s=2, exit_timeout_s=1))
    assert nothing_left(state_folder / "deployments" / "hanging")


class _AlwaysReady(http.server.BaseHTTPRequestHandler):
    """Another server that answers every probe as ready."""

    asked = 0

    def do_GET(self) -> None:
        type(self).asked += 1
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_another_server_on_the_port_is_not_taken_for_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port is lost to another process between choice and bind: the next attempt takes other ports."""
    models = repository(tmp_path / "models", DOUBLE)
    impostor = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _AlwaysReady)
    threading.Thread(target=impostor.serve_forever, daemon=True).start()
    choose = launch.ports.choose
    choices: list[list[int]] = []

    def lose_the_first(host: str, wanted: tuple[int, ...]) -> list[int]:
        chosen = choose(host, wanted)
        choices.append([impostor.server_port, *chosen[1:]] if not choices else chosen)
        return choices[-1]

    monkeypatch.setattr(launch.ports, "choose", lose_the_first)
    told: list[str] = []
    try:
        with local.running_server(models, on_progress=told.append) as deployment:
            assert len(choices) == 2
            assert deployment.http_port == choices[1][0]
            assert double(deployment, [3]) == [6]
        assert any("another process took a port" in line for line in told)
        assert _AlwaysReady.asked == 0
        taken = local.ServerSpec("fixed", models, http_port=impostor.server_port)
        with pytest.raises(LacksError, match=f"port {impostor.server_port} on 127.0.0.1: already in use"):
            local.up(taken)
    finally:
        impostor.shutdown()
        impostor.server_close()


@pytest.mark.parametrize("private", [False, True], ids=["in place", "private copy"])
def test_the_server_sees_no_secrets_and_the_right_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private: bool
) -> None:
    monkeypatch.setenv("HF_TOKEN", "leaked-1")
    monkeypatch.setenv("NVIDIA_API_KEY", "leaked-2")
    monkeypatch.setenv("MY_LICENCE_TOKEN", "wanted")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    models = repository(tmp_path / "models", ENVIRONMENT, model="environment")
    install = server._install

    def read_only(source: Path, target: Path) -> None:
        if not target.is_relative_to(tmp_path):
            raise PermissionError(13, "Permission denied")
        install(source, target)

    if private:  # as where site-packages may not be written to; the tests may run as root, whom no permission stops
        monkeypatch.setattr(server, "_install", read_only)
    with local.running_server(models, pass_environment=["MY_LICENCE_TOKEN"]) as deployment:
        seen = json.loads((models / "environment" / "environment.json").read_text())
        programs = [Path(f"/proc/{pid}/exe").readlink() for pid in processes.members(deployment.token)]
    assert "leaked" not in json.dumps(seen)
    assert seen["MY_LICENCE_TOKEN"] == "wanted"  # noqa: S105
    assert seen["HF_HUB_OFFLINE"] == "1"
    assert seen["PATH"].split(":")[0] == str(Path(sys.executable).parent)
    stub = next(program for program in programs if program.name == "triton_python_backend_stub")
    assert stub.is_relative_to(tmp_path / "cache") == private
