"""The process that a local deployment lives under. Standard library only, started by `trtkit.deploy.local`:

    python -m trtkit.deploy.supervisor

Its standard input is the lifeline: the first line is the order (JSON), and when the pipe closes before the word
`detach` arrived, whoever started the deployment is gone and the server goes too. It starts the server as its child and
keeps the record. Whatever dies first, nothing is left behind:

- the starter dies: the lifeline closes, the supervisor stops the server;
- the supervisor dies: the kernel kills the server (PR_SET_PDEATHSIG), and the guard, a second small process, kills what
  the server leaves behind, such as a python stub that is busy;
- the server dies: the supervisor reaps its orphans and writes down how it ended.

Supervisor and guard hold the deployment's lock, so a free lock means that nothing of it lives any more.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from trtkit.deploy import alias, processes, state

STOP_MARGIN_S = 5.0
"""Time beyond the server's own exit timeout before it is killed."""


def main() -> int:
    line = _read_line(0)
    if line is None:
        return 0  # the starter died before it gave the order
    order = json.loads(line)
    folder, record = Path(order["folder"]), dict(order["record"])
    wake = _wake_on_signals()
    processes.adopt_orphans()
    guard, let_go = _start_guard(folder, record)
    record["supervisor_pid"] = os.getpid()
    record["supervisor_start"] = processes.start_time(os.getpid())
    try:
        server = _start_server(order)
    except OSError as error:
        alias.remove(record.get("alias"))
        _finish(folder, record, "failed", None, f"cannot start {record['argv'][0]}: {error.strerror}")
        let_go()
        return 1
    record |= {"pid": server.pid, "pid_start": processes.start_time(server.pid), "phase": "running"}
    state.write(folder, record)
    exits: dict[int, int] = {}
    asked = _watch(server.pid, wake, exits)
    if asked is not None:
        state.write(folder, record | {"phase": "stopping", "reason": asked})
        _stop(server.pid, wake, exits, record["exit_timeout_s"] + STOP_MARGIN_S)
    processes.kill_members(record["token"], session=server.pid, parent=os.getpid(), spare={guard})
    _reap(exits)
    processes.remove_shared_memory(record["shm_prefix"])
    alias.remove(record.get("alias"))
    server.returncode = exits.get(server.pid, -signal.SIGKILL)
    _finish(folder, record, "failed" if asked is None else "stopped", server.returncode, asked or "")
    let_go()
    return 0


def _read_line(descriptor: int) -> bytes | None:
    """One line, byte by byte so that nothing behind it is swallowed; None when the other end closes before its end."""
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(descriptor, 1)
        if not piece:
            return None
        line += piece
    return line


def _wake_on_signals() -> int:
    """Turns SIGCHLD, SIGTERM, SIGINT and SIGHUP into bytes on a pipe; returns its reading end."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    os.set_blocking(reader, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    return reader


def _start_guard(folder: Path, record: dict[str, Any]) -> tuple[int, Callable[[], None]]:
    """Forks the guard. It sleeps until this process is gone, then kills whatever is left of the deployment.

    Returns its pid, and a function that dismisses it and waits until it is gone.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            _guard(reader, writer, folder, record)
        finally:
            os._exit(0)
    os.close(reader)

    def let_go() -> None:
        with suppress(OSError):  # somebody may have killed it
            os.write(writer, b"x")
            os.waitpid(pid, 0)

    return pid, let_go


def _guard(reader: int, writer: int, folder: Path, record: dict[str, Any]) -> None:
    os.close(writer)
    os.setsid()
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _forget_lifeline()  # it is the supervisor's alone
    if os.read(reader, 1):
        return  # dismissed: the supervisor finished its work
    latest = state.read(folder) or record
    if latest.get("token") != record["token"]:
        latest = record
    processes.kill_members(latest["token"], session=latest.get("pid"))
    processes.remove_shared_memory(latest["shm_prefix"])
    alias.remove(latest.get("alias"))
    if latest["phase"] not in state.ENDED:
        _finish(folder, latest, "crashed", None, "its supervisor was killed")


def _start_server(order: dict[str, Any]) -> subprocess.Popen[bytes]:
    with Path(order["record"]["log_path"]).open("ab") as log:
        return subprocess.Popen(
            order["record"]["argv"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=order["env"],
            cwd=order["folder"],
            start_new_session=True,
            preexec_fn=processes.die_with_parent(),  # noqa: PLW1509 - this process has one thread
        )


def _watch(server: int, wake: int, exits: dict[int, int]) -> str | None:
    """Waits until the server ends (None) or must end (the reason why)."""
    lifeline = [0]
    while True:
        ready, _, _ = select.select([wake, *lifeline], [], [])
        if wake in ready:
            signals = set(_drain(wake))
            _reap(exits)
            if server in exits:
                return None
            if signals & {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}:
                return "stopped on request"
        if 0 in ready:
            word = os.read(0, 65536)
            if not word:
                return "whoever started it is gone"
            if b"detach" in word:
                _forget_lifeline()
                lifeline = []


def _forget_lifeline() -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


def _stop(server: int, wake: int, exits: dict[int, int], seconds: float) -> None:
    """SIGTERM, then SIGKILL after `seconds` or at a second request."""
    processes.send(server, signal.SIGTERM)
    deadline = time.monotonic() + seconds
    while server not in exits and (left := deadline - time.monotonic()) > 0:
        select.select([wake], [], [], left)
        impatient = set(_drain(wake)) & {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
        _reap(exits)
        if impatient:
            break
    if server not in exits:
        processes.send(server, signal.SIGKILL)
        while server not in exits:
            select.select([wake], [], [], 1.0)
            _drain(wake)
            _reap(exits)


def _drain(wake: int) -> bytes:
    try:
        return os.read(wake, 65536)
    except BlockingIOError:
        return b""


def _reap(exits: dict[int, int]) -> None:
    """Waits for every child that has ended, adopted ones too, without blocking. Negative codes are signals."""
    try:
        while (found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG)) is not None:
            ended = found.si_code == os.CLD_EXITED
            exits[found.si_pid] = found.si_status if ended else -found.si_status
    except ChildProcessError:
        pass


def _finish(folder: Path, record: dict[str, Any], phase: str, code: int | None, reason: str) -> None:
    if phase == "failed" and not reason:
        killed = code is not None and code < 0
        reason = f"the server was ended by signal {-(code or 0)}" if killed else f"the server exited with code {code}"
    ended = {"phase": phase, "exit_code": code, "reason": reason, "ended_at": time.time()}
    state.write(folder, record | ended)


if __name__ == "__main__":
    sys.exit(main())
