"""Processes as /proc tells them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trtkit.deploy import processes


def test_start_time_names_one_process() -> None:
    own = processes.start_time(os.getpid())
    assert own is not None
    with subprocess.Popen(["sleep", "600"]) as child:
        later = processes.start_time(child.pid)
        assert later is not None
        assert later >= own
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, not reaped
        assert processes.start_time(child.pid) is None
    assert processes.start_time(child.pid) is None


def test_a_name_with_brackets_does_not_confuse(tmp_path: Path) -> None:
    program = tmp_path / "a) Z 1 (b"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([str(program), "600"]) as child:
        deadline = time.monotonic() + 30
        while Path(f"/proc/{child.pid}/comm").read_text() != "a) Z 1 (b\n":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert processes.start_time(child.pid) is not None
        child.kill()


def test_listening_ports_are_those_of_the_process_itself() -> None:
    code = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); input()"
    with (
        socket.create_server(("127.0.0.1", 0)) as mine,
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other,
    ):
        assert other.stdout is not None
        theirs = int(other.stdout.readline())
        assert processes.listening_ports(other.pid) == {theirs}
        assert mine.getsockname()[1] in processes.listening_ports(os.getpid())
        assert theirs not in processes.listening_ports(os.getpid())
        # A connection to a listening port is no listening.
        with socket.create_connection(("127.0.0.1", theirs)) as connection:
            assert connection.getsockname()[1] not in processes.listening_ports(os.getpid())
        other.communicate(b"\n")
    assert processes.listening_ports(other.pid) == set()


def test_members_are_found_by_marker_session_parent_and_ancestry() -> None:
    nested = "sleep 600 & env -i setsid sleep 600 & wait"
    marked = subprocess.Popen(["sh", "-c", nested], env={"PATH": os.environ["PATH"], processes.MARKER: "tok"})
    session = subprocess.Popen(["sleep", "600"], start_new_session=True)
    other = subprocess.Popen(["sleep", "600"], env={processes.MARKER: "tok2"})
    try:
        deadline = time.monotonic() + 30
        while len(processes.members("tok")) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert session.pid not in processes.members("tok")
        assert session.pid in processes.members("tok", session=session.pid)
        assert other.pid not in processes.members("tok", session=session.pid)
        assert other.pid in processes.members("none", parent=os.getpid())
        assert other.pid not in processes.members("none", parent=os.getpid(), spare={other.pid})
        assert os.getpid() not in processes.members("none", parent=os.getppid())
        killed = processes.kill_members("tok")
        assert len(killed) == 3
        assert processes.members("tok") == []
        assert other.poll() is None
    finally:
        for process in (marked, session, other):
            process.kill()
            process.wait()


def test_only_regions_with_the_prefix_are_removed(tmp_path: Path) -> None:
    for name in ("trtkit_a_1", "trtkit_a_2", "trtkit_b_1", "other"):
        (tmp_path / name).touch()
    assert processes.remove_shared_memory("trtkit_a_", tmp_path) == ["trtkit_a_1", "trtkit_a_2"]
    assert processes.remove_shared_memory("", tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "trtkit_b_1"]


def test_a_process_of_another_user_spares_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signalling it is refused, as for a program with the setuid bit; the others are killed all the same."""
    kill, foreign = os.kill, subprocess.Popen(["sleep", "600"], env={processes.MARKER: "tok3"})
    own = subprocess.Popen(["sleep", "600"], env={processes.MARKER: "tok3"})

    def refusing(pid: int, number: int) -> None:
        if pid == foreign.pid:
            raise PermissionError(1, "Operation not permitted")
        kill(pid, number)

    monkeypatch.setattr(processes.os, "kill", refusing)
    monkeypatch.setattr(processes.time, "sleep", lambda seconds: None)
    try:
        assert processes.send(foreign.pid, signal.SIGTERM) is False
        assert processes.kill_members("tok3") == [own.pid]
        assert own.wait(30) == -signal.SIGKILL
        assert foreign.poll() is None
    finally:
        monkeypatch.undo()
        for process in (own, foreign):
            process.kill()
            process.wait()
