"""Life and death of a local deployment, with a stand-in server; tests/integration does the same with the real one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trtkit.deploy import local, processes, state
from trtkit.deploy.local import ServerSpec
from trtkit.errors import CheckFailedError, InputError, LacksError


def eventually(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline, "did not come about in time"
        time.sleep(0.02)


def test_up_status_down(models: Path, tritonserver: str, state_folder: Path) -> None:
    told: list[str] = []
    deployment = local.up(ServerSpec("a", models, tritonserver=tritonserver), on_progress=told.append)
    assert deployment.ready
    assert deployment.models == ("one", "two")
    assert local.status("a").ready
    assert deployment.supervisor_pid is not None
    assert local.down("a").reason == "stopped on request"
    after = local.status("a")
    assert (after.phase, after.running, after.ready) == ("stopped", False, False)
    assert processes.members(deployment.token) == []
    assert processes.start_time(deployment.supervisor_pid) is None
    assert not state.is_locked(state_folder / "deployments" / "a")


def test_a_block_forgets_a_name_that_it_made_up(models: Path, tritonserver: str) -> None:
    with local.running_server(models, tritonserver=tritonserver) as deployment:
        assert state.names() == [deployment.name]
    assert state.names() == []
    with local.running_server(models, tritonserver=tritonserver, name="mine"):
        pass
    assert state.names() == ["mine"]


def test_no_wait_returns_while_models_load(models: Path, tritonserver: str) -> None:
    (models / "two" / "loading").touch()
    deployment = local.up(ServerSpec("a", models, tritonserver=tritonserver), wait=False)
    assert not deployment.ready
    assert local.status("a").phase == "running"
    assert not local.status("a").ready
    (models / "two" / "loading").unlink()
    eventually(lambda: local.status("a").ready)


def test_the_deadline_names_what_is_loading(models: Path, tritonserver: str) -> None:
    (models / "two" / "loading").touch()
    spec = ServerSpec("a", models, tritonserver=tritonserver, ready_timeout_s=1)
    with pytest.raises(CheckFailedError, match=r"still loading two \(1 of 2 models done\)"):
        local.up(spec)
    assert local.status("a").phase == "stopped"


def test_a_server_that_fails_is_quoted_and_its_log_kept(models: Path, tritonserver: str, tmp_path: Path) -> None:
    (models / "two" / "refuse").touch()
    spec = ServerSpec("a", models, tritonserver=tritonserver, log_path=tmp_path / "logs" / "my.log")
    with pytest.raises(CheckFailedError) as failed:
        local.up(spec)
    assert failed.value.cause.splitlines() == [
        "deployment 'a': the server exited with code 1",
        "  server: two: Internal: ValueError: refused on demand",
        "  server: creating server: Internal",
    ]
    assert str(tmp_path / "logs" / "my.log") in failed.value.fix
    (models / "two" / "refuse").unlink()
    assert local.up(spec).ready
    assert "refused" in (tmp_path / "logs" / "my.log.previous").read_text()
    assert "refused" not in (tmp_path / "logs" / "my.log").read_text()


def test_down_kills_a_server_that_ignores_it(models: Path, tritonserver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (models / "one" / "deaf").touch()
    deployment = local.up(ServerSpec("a", models, tritonserver=tritonserver, exit_timeout_s=1))
    assert local.down("a").exit_code == -signal.SIGKILL
    assert processes.members(deployment.token) == []


def test_a_second_request_to_stop_does_not_wait(models: Path, tritonserver: str) -> None:
    """The server ignores SIGTERM and has an hour; only the impatient second signal can end it within the test."""
    (models / "one" / "deaf").touch()
    deployment = local.up(ServerSpec("a", models, tritonserver=tritonserver, exit_timeout_s=3600))
    folder = state.folder_of("a")
    assert deployment.supervisor_pid is not None
    os.kill(deployment.supervisor_pid, signal.SIGTERM)
    eventually(lambda: (state.read(folder) or {})["phase"] == "stopping")
    os.kill(deployment.supervisor_pid, signal.SIGTERM)
    eventually(lambda: not state.is_locked(folder))
    assert local.status("a").phase == "stopped"


@pytest.mark.parametrize("victim", ["supervisor", "server", "guard"])
def test_what_a_killed_process_leaves(models: Path, tritonserver: str, victim: str) -> None:
    deployment = local.up(ServerSpec("a", models, tritonserver=tritonserver))
    pid, supervisor = deployment.pid, deployment.supervisor_pid
    assert pid is not None
    assert supervisor is not None
    if victim == "guard":
        children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
        (guard,) = {int(child) for child in children} - {pid}
        os.kill(guard, signal.SIGKILL)
        assert local.status("a").ready  # nothing depends on it until the supervisor dies
        assert local.down("a").phase == "stopped"
    else:
        os.kill(supervisor if victim == "supervisor" else pid, signal.SIGKILL)
        eventually(lambda: not state.is_locked(state.folder_of("a")))
        assert local.status("a").phase == ("crashed" if victim == "supervisor" else "failed")
    assert processes.start_time(pid) is None
    assert processes.members(deployment.token) == []
    assert local.up(ServerSpec("a", models, tritonserver=tritonserver)).ready


def test_a_record_without_processes_is_a_crash(models: Path, tritonserver: str) -> None:
    """As after a power cut: the record says running, nobody holds the lock, and the pid has another owner."""
    local.up(ServerSpec("a", models, tritonserver=tritonserver))
    local.down("a")
    folder = state.folder_of("a")
    record = state.read(folder)
    assert record is not None
    with subprocess.Popen(["sleep", "600"]) as innocent:
        try:
            state.write(folder, record | {"phase": "running", "pid": innocent.pid, "supervisor_pid": innocent.pid})
            region = Path("/dev/shm") / (record["shm_prefix"] + "left")  # noqa: S108
            region.touch()
            after = local.status("a")
            assert (after.phase, after.reason) == ("crashed", "its processes died without a word")
            assert not region.exists()
            assert local.down("a").phase == "crashed"
            assert innocent.poll() is None
        finally:
            innocent.kill()


def test_down_never_signals_a_recycled_pid(models: Path, tritonserver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    deployment = local.up(ServerSpec("a", models, tritonserver=tritonserver))
    folder = state.folder_of("a")
    record = state.read(folder)
    assert record is not None
    sent: list[int] = []
    with monkeypatch.context() as patch, subprocess.Popen(["sleep", "600"]) as innocent:
        patch.setattr(local.state, "wait_unlocked", lambda folder, seconds: False)
        patch.setattr(local.processes, "send", lambda pid, number: sent.append(pid))
        for supervisor in (innocent.pid, deployment.supervisor_pid):  # the second shows that the first could be seen
            state.write(folder, record | {"supervisor_pid": supervisor})
            with pytest.raises(CheckFailedError, match="did not stop"):
                local.down("a")
        innocent.kill()
    assert set(sent) == {deployment.supervisor_pid}


RACER = """
import sys
from trtkit.deploy.local import ServerSpec, up
from trtkit.errors import InputError
sys.stdin.readline()
try:
    print(up(ServerSpec("contested", sys.argv[1], tritonserver=sys.argv[2])).pid)
except InputError as error:
    print("refused:", error)
"""


def test_of_many_starters_of_one_name_one_wins(models: Path, tritonserver: str) -> None:
    command = [sys.executable, "-c", RACER, str(models), tritonserver]
    racers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    said = [racer.communicate(timeout=120)[0].strip() for racer in racers]
    winners = [line for line in said if line.isdigit()]
    assert len(winners) == 1, said
    assert sum("already running" in line for line in said) == 3, said
    assert local.status("contested").pid == int(winners[0])


STARTER = """
import sys
from trtkit.deploy.local import ServerSpec, up
up(ServerSpec("orphan", sys.argv[1], tritonserver=sys.argv[2]))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_starter_that_dies_takes_its_server_along(
    models: Path, tritonserver: str, state_folder: Path, number: signal.Signals
) -> None:
    (models / "one" / "loading").touch()
    folder = state_folder / "deployments" / "orphan"
    command = [sys.executable, "-c", STARTER, str(models), tritonserver]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as starter:
        eventually(lambda: (state.read(folder) or {}).get("pid"))
        record = state.read(folder)
        assert record is not None
        starter.send_signal(number)
        starter.wait(60)
    eventually(lambda: not state.is_locked(folder))
    assert processes.members(record["token"]) == []
    assert processes.start_time(record["pid"]) is None
    assert local.status("orphan").reason == "whoever started it is gone"


FORKER = """
import os, sys, time
from trtkit.deploy.local import running_server
with running_server(sys.argv[1], tritonserver=sys.argv[2], name="orphan"):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(600)
"""


def test_a_fork_of_the_starter_does_not_keep_the_server(models: Path, tritonserver: str, state_folder: Path) -> None:
    command = [sys.executable, "-c", FORKER, str(models), tritonserver]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None
        child = int(starter.stdout.readline())
        try:
            starter.kill()
            eventually(lambda: not state.is_locked(state_folder / "deployments" / "orphan"))
            assert processes.start_time(child) is not None
        finally:
            os.kill(child, signal.SIGKILL)
    assert local.status("orphan").reason == "whoever started it is gone"


def test_a_supervisor_without_an_order_goes_quietly() -> None:
    command = [sys.executable, "-m", "trtkit.deploy.supervisor"]
    done = subprocess.run(command, input=b'{"half": ', capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_a_program_that_cannot_run_is_named(models: Path, tmp_path: Path) -> None:
    broken = tmp_path / "tritonserver"
    broken.write_text("#!/no/such/interpreter\n")
    broken.chmod(0o755)
    with pytest.raises(LacksError, match=f"cannot start {broken}: No such file or directory"):
        local.up(ServerSpec("a", models, tritonserver=str(broken)))
    assert local.status("a").phase == "failed"


def test_bad_repositories_and_names(tmp_path: Path, models: Path, tritonserver: str) -> None:
    with pytest.raises(InputError, match="no model repository at"):
        local.up(ServerSpec("a", tmp_path / "nothing", tritonserver=tritonserver))
    (tmp_path / "empty" / ".hidden").mkdir(parents=True)
    with pytest.raises(InputError, match="no model in"):
        local.up(ServerSpec("a", tmp_path / "empty", tritonserver=tritonserver))
    with pytest.raises(InputError, match=r"'\.\./a' is not a deployment name"):
        local.up(ServerSpec("../a", models, tritonserver=tritonserver))
    with pytest.raises(InputError, match="no deployment 'a'; nothing was deployed from here yet"):
        local.status("a")


def test_follow_ends_with_the_deployment(models: Path, tritonserver: str) -> None:
    local.up(ServerSpec("a", models, tritonserver=tritonserver))
    lines = local.logs("a", 1, follow=True)
    assert "successfully loaded 'two'" in next(lines)
    with Path(local.status("a").log_path).open("a") as log:
        log.write("one more line\nand the last, unfinished")
    assert next(lines) == "one more line"
    local.down("a")
    assert list(lines) == ["and the last, unfinished"]
    assert len(list(local.logs("a", 2))) == 2


@pytest.fixture
def odd_models(models: Path, tmp_path: Path) -> Path:
    """A repository that the python backend could not read at its own path."""
    return models.rename(tmp_path / "sp ace é")


@pytest.mark.parametrize("end", ["down", "crash", "power cut", "server"])
def test_a_repository_with_an_odd_name_gets_a_plain_one(odd_models: Path, tritonserver: str, end: str) -> None:
    deployment = local.up(ServerSpec("a", odd_models, tritonserver=tritonserver))
    folder = state.folder_of("a")
    (link,) = folder.glob("trtkit-alias-*/models")
    assert deployment.repository == str(odd_models)
    assert deployment.pid is not None
    assert deployment.supervisor_pid is not None
    assert f"--model-repository={link}".encode() in Path(f"/proc/{deployment.pid}/cmdline").read_bytes().split(b"\0")
    record = state.read(folder)
    assert record is not None
    if end == "down":
        local.down("a")
    else:
        os.kill(deployment.pid if end == "server" else deployment.supervisor_pid, signal.SIGKILL)
        eventually(lambda: not state.is_locked(folder))
    if end == "power cut":  # nobody was left to clear away
        link.parent.mkdir()
        link.symlink_to(odd_models)
        state.write(folder, record)
        assert local.status("a").phase == "crashed"
    assert list(folder.glob("trtkit-alias-*")) == []
    assert (odd_models / "one").is_dir()


def test_a_start_that_fails_leaves_no_alias(
    odd_models: Path, tritonserver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (odd_models / "one" / "refuse").touch()
    with pytest.raises(CheckFailedError, match="refused on demand"):
        local.up(ServerSpec("a", odd_models, tritonserver=tritonserver))

    def fail(*_: object) -> None:
        raise OSError("no process")

    monkeypatch.setattr(local.launch, "_start_supervisor", fail)
    with pytest.raises(OSError, match="no process"):
        local.up(ServerSpec("a", odd_models, tritonserver=tritonserver))
    assert list(state.folder_of("a").glob("trtkit-alias-*")) == []


def test_a_stub_that_dies_ends_the_wait(
    models: Path, tritonserver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server waits for it for ever, and the deadline is an hour away."""
    monkeypatch.setattr(local.launch, "STUB_GRACE_S", 0.0)
    (models / "one" / "loading").touch()
    log = tmp_path / "my.log"

    def kill(_: str) -> None:
        with log.open("a") as stream:
            stream.write("terminate called after throwing an instance of 'std::x'\n  what():  stol\n")

    spec = ServerSpec("a", models, tritonserver=tritonserver, log_path=log, ready_timeout_s=3600)
    with pytest.raises(CheckFailedError, match=r"died while .*: terminated by std::x: stol"):
        local.up(spec, on_progress=kill)
    assert not state.is_locked(state.folder_of("a"))


@pytest.mark.parametrize("content", ["{}", "{", '{"phase": "running", "target": "local"}'])
def test_a_damaged_record(models: Path, tritonserver: str, content: str) -> None:
    folder = state.make_folder("a")
    (folder / "state.json").write_text(content)
    found = local.status("a")
    assert (found.phase, found.running, str(folder / "state.json") in found.reason) == ("unknown", False, True)
    assert list(local.logs("a", 3)) == []
    lock = state.acquire(folder)
    assert lock is not None
    with pytest.raises(CheckFailedError, match="may run, and its record"):
        local.down("a")
    with pytest.raises(InputError, match="'a' is already running"):
        local.up(ServerSpec("a", models, tritonserver=tritonserver))
    os.close(lock)
    assert local.down("a").reason == "its damaged record was cleared away"
    assert state.names() == []
    (state.make_folder("a") / "state.json").write_text(content)
    assert local.up(ServerSpec("a", models, tritonserver=tritonserver)).ready


INTERRUPTED = """
import sys
from trtkit.deploy.local import running_server
with running_server(sys.argv[1], tritonserver=sys.argv[2]) as deployment:
    print(deployment.name, flush=True)
    sys.stdin.readline()
    raise KeyboardInterrupt
"""


@pytest.mark.parametrize("how", ["interrupted", "killed"])
def test_made_up_names_are_forgotten(models: Path, tritonserver: str, how: str) -> None:
    command = [sys.executable, "-c", INTERRUPTED, str(models), tritonserver]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **pipes) as runner:  # type: ignore[call-overload]
        assert runner.stdout is not None
        name = runner.stdout.readline().strip()
        local.forget_transient()
        assert local.status(name).ready  # its process lives
        if how == "killed":
            runner.kill()
        else:
            runner.communicate("\n", timeout=60)
    eventually(lambda: not state.is_locked(state.folder_of(name)))
    assert state.names() == [name]
    with local.running_server(models, tritonserver=tritonserver) as other:
        assert state.names() == [other.name]


def test_forget_only_what_is_over(models: Path, tritonserver: str) -> None:
    local.up(ServerSpec("a", models, tritonserver=tritonserver))
    assert not local.forget("a")
    local.down("a")
    assert local.forget("a")
    assert state.names() == []
    with pytest.raises(InputError, match="no deployment 'a'"):
        local.forget("a")


def test_a_program_that_is_no_tritonserver_is_named(models: Path) -> None:
    with pytest.raises(CheckFailedError, match="/bin/true is no tritonserver, or cannot run here") as failed:
        local.up(ServerSpec("a", models, tritonserver="/bin/true"))
    assert "lint" not in failed.value.fix
    assert "exited with code 0" in failed.value.cause
