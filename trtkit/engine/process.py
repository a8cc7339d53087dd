"""Running one long command: its output line by line, its end, and its certain end when we are stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from trtkit.errors import LacksError

TAIL = 400
"""Lines kept for the error message."""

_GRACE_S = 5.0


def follow(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    log: Path,
    on_line: Callable[[str], None],
    on_stop: Sequence[str] | None = None,
) -> tuple[list[str], int]:
    """Runs a command in a process group of its own and waits for it.

    Args:
        argv: the command; no shell.
        env: variables on top of this process's.
        log: file that receives the command and every line (stdout and stderr together).
        on_line: called with every line.
        on_stop: command that ends what `argv` started elsewhere, such as a container.

    Returns:
        The last lines, and the exit status (negative: the signal that killed it). When anything is raised meanwhile,
        KeyboardInterrupt included, the whole group is stopped first.

    Raises:
        LacksError: the program cannot be started.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    tail: deque[str] = deque(maxlen=TAIL)
    with log.open("w", encoding="utf-8") as file:
        process = _start(argv, env)
        try:
            for line in process.stdout or ():
                text = line.rstrip("\n")
                tail.append(text)
                file.write(line)
                file.flush()
                on_line(text)
            returncode = process.wait()
        except BaseException:
            _stop(process, on_stop)
            raise
        finally:
            if process.stdout is not None:
                process.stdout.close()
    return list(tail), returncode


def _start(argv: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            list(argv),
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches us alone, and killpg reaches every worker
        )
    except OSError as error:
        raise LacksError(f"cannot start {argv[0]}: {error}", f"check the {argv[0]} that PATH finds") from error


def _stop(process: subprocess.Popen[str], on_stop: Sequence[str] | None) -> None:
    """Ends the process group, and what it started elsewhere; a second Ctrl-C cannot get in between."""
    previous = _ignore_signals()
    try:
        if on_stop is not None:
            _quietly(on_stop)
        _signal_group(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
        _signal_group(process, signal.SIGKILL)
        process.wait()
        _await_group(process)
        if on_stop is not None:
            _quietly(on_stop)  # a container that was only about to start the first time
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _signal_group(process: subprocess.Popen[str], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _await_group(process: subprocess.Popen[str]) -> None:
    """Waits for killed workers to be gone, since a dying one may still write where the caller is about to clean up."""
    deadline = time.monotonic() + _GRACE_S
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.01)


def _quietly(argv: Sequence[str]) -> None:
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(
            list(argv), stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=30, start_new_session=True
        )


def _ignore_signals() -> dict[signal.Signals, signal.Handlers | Callable[..., object] | int | None]:
    """Only the main thread may change handlers; elsewhere no KeyboardInterrupt arrives anyway."""
    try:
        return {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:
        return {}
