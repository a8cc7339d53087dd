"""The local target: Triton as a process of this machine.

    with running_server(repository) as deployment:      # lives as long as this block, whatever happens to the caller
        print(deployment.http_url)

    deployment = up(ServerSpec("my-model", repository))  # lives on until down("my-model")

`trtkit.deploy.supervisor` says how nothing is ever left behind, `trtkit.deploy.state` where the records are.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtkit.deploy import launch, processes, readiness, runtimes, serverlog, state
from trtkit.deploy.command import features_of
from trtkit.deploy.deployment import Deployment, damaged, from_record, settled, unknown
from trtkit.deploy.launch import Progress, ServerSpec
from trtkit.deploy.server import find_server
from trtkit.deploy.supervisor import STOP_MARGIN_S
from trtkit.errors import CheckFailedError, InputError

if TYPE_CHECKING:
    from trtkit.config import BuildConfig

__all__ = [
    "Deployment",
    "ServerSpec",
    "down",
    "forget",
    "forget_transient",
    "logs",
    "plan",
    "running_server",
    "spec_from_config",
    "status",
    "up",
]

_run_numbers = itertools.count(1)
_left_running: list[subprocess.Popen[bytes]] = []  # supervisors of `up`, kept so that they are reaped once they end


def spec_from_config(config: BuildConfig, repository: str | Path, name: str | None = None) -> ServerSpec:
    """The server that a build config asks for.

    Raises:
        InputError: the engine needs several MPI ranks, which the local target does not start.
    """
    ranks = config.checkpoint.tp * config.checkpoint.pp
    if config.serving.runtime == "tensorrtllm" and ranks > 1:
        raise InputError(
            f"an engine with tp {config.checkpoint.tp} and pp {config.checkpoint.pp} needs {ranks} MPI ranks, "
            "and the local target starts one process",
            "use --target docker, or the reference runtime",
        )
    deploy = config.deploy
    return ServerSpec(
        name or config.name,
        repository,
        host=deploy.host,
        http_port=deploy.http_port,
        grpc_port=deploy.grpc_port,
        metrics_port=deploy.metrics_port,
        ready_timeout_s=deploy.ready_timeout_s,
        exit_timeout_s=deploy.exit_timeout_s,
        model_control=deploy.model_control,
        features=features_of(config),
    )


def plan(spec: ServerSpec) -> list[str]:
    """The command that `up` would run, with 0 for ports that are yet to be chosen. Starts and changes nothing."""
    repository = _runnable(spec)
    state.folder_of(spec.name)
    return launch.command_of(replace(spec, repository=repository), find_server(spec.tritonserver), spec.ports, "TOKEN")


def _runnable(spec: ServerSpec) -> Path:
    """The repository of a deployment, if this machine can execute its models."""
    repository = Path(spec.repository).expanduser().resolve()
    readiness.models_of(repository)
    runtimes.check_local(repository, find_server(spec.tritonserver))
    return repository


def up(spec: ServerSpec, *, wait: bool = True, on_progress: Progress | None = None) -> Deployment:
    """Starts a server that outlives this process. Until it is ready it dies with this process.

    Args:
        wait: return when every model is ready; otherwise as soon as the server's process runs.
        on_progress: is told what is waited for, in a few words, whenever that changes.

    Raises:
        InputError: already running, no model in the repository, a bad host or name.
        LacksError: no tritonserver, or one that cannot execute the models; a port is taken.
        CheckFailedError: the server died, or was not ready in time; the cause quotes its log.
    """
    _reap_left_running()
    _runnable(spec)
    started = launch.start(spec, wait=wait, on_progress=on_progress)
    started.detach()
    _left_running.append(started.supervisor)
    return replace(started.deployment, ready=wait)


@contextmanager
def running_server(
    repository: str | Path,
    *,
    name: str | None = None,
    on_progress: Progress | None = None,
    exit_timeout_s: int = 10,
    ready_timeout_s: float = 300.0,
    log_path: str | Path | None = None,
    **options: Any,
) -> Iterator[Deployment]:
    """A server for the length of a block. It is ready on entry and gone, with all it started, on exit.

    It also goes when this process dies inside the block, by whatever signal.

    Args:
        name: shown by `trtkit deploy status` meanwhile; None makes one up, which is forgotten on a good
            exit, or once this process is gone.
        options: further fields of `ServerSpec`.

    Raises: as `up`.
    """
    forget_transient()
    chosen = name or f"run-{os.getpid()}-{next(_run_numbers)}"
    spec = ServerSpec(
        chosen,
        repository,
        exit_timeout_s=exit_timeout_s,
        ready_timeout_s=ready_timeout_s,
        log_path=log_path,
        transient=name is None,
        **options,
    )
    started = launch.start(spec, wait=True, on_progress=on_progress)
    try:
        yield replace(started.deployment, ready=True)
    except BaseException:
        started.stop()
        raise
    started.stop()
    if name is None:
        forget(chosen)


def status(name: str) -> Deployment:
    """How a deployment is. One whose processes died without a word is noticed here, and its remains are cleared away.

    Raises:
        InputError: nothing of this name was ever deployed.
    """
    folder = state.folder_of(name)
    record = state.read(folder)
    if record is None:
        return damaged(name)
    deployment = from_record(settled(folder, record))
    if deployment.phase != "running" or not launch.owns_ports(deployment):
        return deployment
    ready = not readiness.not_ready(deployment.host, deployment.http_port, deployment.models)
    return replace(deployment, ready=ready)


def down(name: str, *, on_progress: Progress | None = None) -> Deployment:
    """Stops a deployment and waits until nothing of it is left. Stopping a stopped one is fine. A damaged record is
    removed.

    Running requests get the exit timeout to finish; after that, and a margin, everything is killed.

    Raises:
        InputError: nothing of this name was ever deployed.
        CheckFailedError: something of it would not die.
    """
    folder = state.folder_of(name)
    record = state.read(folder)
    if record is None:
        return _clear_damaged(folder)
    if state.is_locked(folder):
        patience = record["exit_timeout_s"] + STOP_MARGIN_S
        if on_progress:
            on_progress(f"stopping {name}, at most {patience:.0f} s")
        _signal_supervisor(record, signal.SIGTERM)
        if not state.wait_unlocked(folder, patience + 5):
            _signal_supervisor(state.read(folder) or record, signal.SIGKILL)  # the guard clears away the rest
            if not state.wait_unlocked(folder, 15):
                raise CheckFailedError(
                    f"deployment '{name}' did not stop: somebody still holds {folder / 'lock'}",
                    f"see `fuser {folder / 'lock'}` for the process, and {record['log_path']} for its words",
                )
    _reap_left_running()
    return from_record(settled(folder, state.read(folder) or record))


def logs(name: str, lines: int, *, follow: bool = False) -> Iterator[str]:
    """The last lines of a deployment's log; with `follow` also those that come until it ends.

    Raises:
        InputError: nothing of this name was ever deployed.
    """
    folder = state.folder_of(name)
    record = state.read(folder)
    path = Path(damaged(name).log_path if record is None else record["log_path"])
    if follow and path.exists():
        yield from serverlog.follow(path, lines, lambda: state.is_locked(folder))
    else:
        yield from serverlog.tail(path, lines)


def _signal_supervisor(record: dict[str, Any], number: int) -> None:
    """Signals the supervisor of this record, and never a process that merely got its pid."""
    pid, started = record.get("supervisor_pid"), record.get("supervisor_start")
    if pid is not None and started is not None and processes.start_time(pid) == started:
        processes.send(pid, number)


def forget(name: str) -> bool:
    """Removes the record and the log of a deployment that is over, of either target; False when it is not over.

    Raises:
        InputError: nothing of this name was ever deployed.
    """
    if name not in state.names():
        raise unknown(name)
    folder = state.folder_of(name)
    lock = state.acquire(folder, patience_s=1.0)
    if lock is None:
        return False
    try:
        record = state.read(folder)
        over = record is None or record["phase"] in state.ENDED
        if over:
            state.remove(folder)
        return over
    finally:
        os.close(lock)


def forget_transient() -> None:
    """Forgets the runs with made-up names whose process is gone. A living one may still show its log to somebody."""
    for name in state.names():
        record = state.read(state.folder_of(name)) or {}
        owner = record.get("transient_of")
        if owner and processes.start_time(owner[0]) != owner[1]:
            with suppress(InputError):  # somebody else was faster
                settled(state.folder_of(name), record)
                forget(name)


def _clear_damaged(folder: Path) -> Deployment:
    deployment = damaged(folder.name)
    if not forget(folder.name):
        raise CheckFailedError(
            f"deployment '{folder.name}' may run, and its record {folder / 'state.json'} is damaged",
            f"see `fuser {folder / 'lock'}` for its supervisor, end that process, and run this again",
        )
    return replace(deployment, reason="its damaged record was cleared away")


def _reap_left_running() -> None:
    _left_running[:] = [supervisor for supervisor in _left_running if supervisor.poll() is None]
