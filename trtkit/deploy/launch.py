"""Starts a local server under a supervisor and waits until it serves. The side effects behind `trtkit.deploy.local`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import trtkit
from trtkit import bytecode
from trtkit.deploy import alias, ports, processes, readiness, serverlog, state
from trtkit.deploy.command import ModelControl, server_arguments
from trtkit.deploy.deployment import Deployment, clear_crashed, from_record
from trtkit.deploy.server import Server, environment, find_server, prepared
from trtkit.deploy.supervisor import STOP_MARGIN_S
from trtkit.errors import CheckFailedError, InputError, LacksError

Progress = Callable[[str], None]
PORT_ATTEMPTS = 5
STUB_GRACE_S = 5.0
"""From a stub's death to giving up on a server that does not end by itself."""

_LINT = "check the repository with `trtkit repo lint`"


@dataclass(frozen=True)
class ServerSpec:
    """What to serve and how.

    Attributes:
        name: of the deployment; `trtkit.config.NAME_PATTERN` says what it may hold.
        repository: the model repository; every folder in it is a model.
        host: address to listen on.
        http_port, grpc_port, metrics_port: 0 takes a free one.
        ready_timeout_s: until every model must be ready.
        exit_timeout_s: how long running requests may finish after a stop.
        tritonserver: executable to use; None looks for one.
        pass_environment: variables that the server may see although their names look like secrets.
        log_path: None keeps `server.log` in the deployment's state folder.
        log_verbose: the server's verbosity, 0 to 3.
        transient: of a run that is over with this process: its record is forgotten some time after that.
        model_control: `poll` has the server take over what changes in the repository.
        features: further arguments of the server (`trtkit.deploy.command.features_of`).
    """

    name: str
    repository: str | Path
    host: str = "127.0.0.1"
    http_port: int = 0
    grpc_port: int = 0
    metrics_port: int = 0
    ready_timeout_s: float = 300.0
    exit_timeout_s: int = 10
    tritonserver: str | None = None
    pass_environment: Sequence[str] = ()
    log_path: str | Path | None = None
    log_verbose: int = 0
    transient: bool = False
    model_control: ModelControl = "none"
    features: tuple[str, ...] = ()

    @property
    def ports(self) -> tuple[int, int, int]:
        return self.http_port, self.grpc_port, self.metrics_port


@dataclass
class Launch:
    """A server that was started: its supervisor, our end of its lifeline, and the deployment as a value."""

    supervisor: subprocess.Popen[bytes]
    lifeline: IO[bytes]
    deployment: Deployment
    folder: Path
    exit_timeout_s: int

    def detach(self) -> None:
        """Lets the deployment live on without this process."""
        with suppress(BrokenPipeError):
            self.lifeline.write(b"detach\n")
            self.lifeline.close()
        _lifelines.discard(self.lifeline)

    def stop(self) -> None:
        """Closes the lifeline and waits until everything is gone. Impatience (Ctrl-C) or a deadline kills it."""
        with suppress(BrokenPipeError):
            self.lifeline.close()
        _lifelines.discard(self.lifeline)
        try:
            self.supervisor.wait(self.exit_timeout_s + STOP_MARGIN_S + 10)
        except BaseException as error:
            self.supervisor.kill()  # takes the server with it
            self.supervisor.wait()
            processes.kill_members(self.deployment.token)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise


_lifelines: set[IO[bytes]] = set()


def _let_go_of_lifelines() -> None:
    """A fork of this process must not keep its servers alive. The descriptors stay valid, but lead nowhere."""
    if _lifelines:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for lifeline in _lifelines:
            os.dup2(nowhere, lifeline.fileno(), inheritable=False)
        os.close(nowhere)


os.register_at_fork(after_in_child=_let_go_of_lifelines)


class _PortTakenError(Exception):
    """Another process took a port between the choice and the server's bind."""


def start(spec: ServerSpec, *, wait: bool, on_progress: Progress | None) -> Launch:
    """Starts a server; it dies with this process until it is detached. Errors as `trtkit.deploy.local.up`."""
    repository = Path(spec.repository).expanduser().resolve()
    models = readiness.models_of(repository)
    folder = state.make_folder(spec.name)
    log = Path(spec.log_path).expanduser().absolute() if spec.log_path else folder / "server.log"
    spec = replace(spec, repository=repository, log_path=log)
    lock = state.acquire(folder, patience_s=1.0)
    if lock is None:
        raise _already_running(folder, spec.name)
    try:
        if (old := state.read(folder)) is not None and old["phase"] not in state.ENDED:
            if old["target"] != "local":
                raise _already_running(folder, spec.name)
            clear_crashed(folder, old)
        server = prepared(find_server(spec.tritonserver))
        if spec.model_control == "poll":
            bytecode.compile_models(repository)
        for _ in range(PORT_ATTEMPTS if 0 in spec.ports else 1):
            serverlog.begin(log)
            with suppress(_PortTakenError):
                return _attempt(spec, server, models, folder, lock, wait, on_progress)
            if on_progress:
                on_progress("another process took a port meanwhile, trying again")
        raise failure(spec.name, log, "another process took a port of the server", "run again, or choose other ports")
    finally:
        os.close(lock)  # from here on the supervisor alone holds it, if there is one


def command_of(
    spec: ServerSpec, server: Server, chosen: Sequence[int], token: str, link: Path | None = None
) -> list[str]:
    """The command line of the server, which finds its models at `link` where there is one."""
    return [
        str(server.binary),
        *server_arguments(
            str(link or spec.repository),
            host=spec.host,
            http_port=chosen[0],
            grpc_port=chosen[1],
            metrics_port=chosen[2],
            exit_timeout_s=spec.exit_timeout_s,
            shm_prefix=_shm_prefix(token),
            backend_directory=str(server.backends) if server.backends else None,
            cache_directory=str(server.caches) if server.caches else None,
            log_verbose=spec.log_verbose,
            model_control=spec.model_control,
            features=spec.features,
        ),
    ]


def owns_ports(deployment: Deployment) -> bool:
    """Whether this deployment's own server listens on all of its ports, and not some other process."""
    if deployment.pid is None:
        return False
    wanted = {deployment.http_port, deployment.grpc_port, deployment.metrics_port}
    return wanted <= processes.listening_ports(deployment.pid)


def failure(name: str, log: Path, what: str, fix: str = _LINT) -> CheckFailedError:
    """The error of a start that failed, with the server's own words below."""
    said = serverlog.reasons(serverlog.read_end(log))
    quoted = "".join(f"\n  server: {line}" for line in said)
    return CheckFailedError(f"deployment '{name}': {what}{quoted}", f"{fix}; the whole log is {log}")


def _attempt(
    spec: ServerSpec,
    server: Server,
    models: list[str],
    folder: Path,
    lock: int,
    wait: bool,
    on_progress: Progress | None,
) -> Launch:
    """One try on one choice of ports. Whatever goes wrong, Ctrl-C too, nothing is left running."""
    chosen = ports.choose(spec.host, spec.ports)
    link = alias.make(Path(spec.repository), folder)
    try:
        record = _record(spec, server, models, chosen, link)
        state.write(folder, record)
        launch = _start_supervisor(folder, lock, record)
    except BaseException:
        alias.remove(str(link))
        raise
    try:
        marked = {processes.MARKER: record["token"]}
        order = {"folder": str(folder), "env": environment(server, marked, spec.pass_environment), "record": record}
        with suppress(BrokenPipeError):  # it died at once; the wait below says so
            launch.lifeline.write(json.dumps(order).encode() + b"\n")
            launch.lifeline.flush()
        _await_process(launch)
        if wait:
            _await_ready(launch, spec, on_progress)
    except BaseException:
        launch.stop()
        alias.remove(str(link))  # if it died before it had its order
        raise
    return launch


def _record(
    spec: ServerSpec, server: Server, models: list[str], chosen: Sequence[int], link: Path | None
) -> dict[str, Any]:
    """The record of a start that is about to happen."""
    token = uuid.uuid4().hex[:16]
    owner = (os.getpid(), processes.start_time(os.getpid()))
    return {
        "name": spec.name,
        "target": "local",
        "phase": "starting",
        "token": token,
        "host": spec.host,
        "http_port": chosen[0],
        "grpc_port": chosen[1],
        "metrics_port": chosen[2],
        "repository": str(spec.repository),
        "models": models,
        "log_path": str(spec.log_path),
        "argv": command_of(spec, server, chosen, token, link),
        "shm_prefix": _shm_prefix(token),
        "exit_timeout_s": spec.exit_timeout_s,
        "model_control": spec.model_control,
        "alias": None if link is None else str(link),
        "transient_of": owner if spec.transient else None,
        "started_at": time.time(),
    }


def _start_supervisor(folder: Path, lock: int, record: dict[str, Any]) -> Launch:
    """The supervisor inherits the lock; it gets its order, and later our death, through its standard input."""
    source = str(Path(trtkit.__file__).parents[1])
    with Path(record["log_path"]).open("ab") as log:
        supervisor = subprocess.Popen(
            [sys.executable, "-s", "-m", "trtkit.deploy.supervisor"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", "PYTHONPATH": source},
            cwd=folder,
            pass_fds=(lock,),
            start_new_session=True,
        )
    lifeline = supervisor.stdin
    if lifeline is None:  # cannot be: it was asked for
        raise RuntimeError("no pipe to the supervisor")
    _lifelines.add(lifeline)
    return Launch(supervisor, lifeline, from_record(record), folder, record["exit_timeout_s"])


def _await_process(launch: Launch) -> None:
    """Waits until the supervisor has started the server."""
    deadline = time.monotonic() + 60
    log = Path(launch.deployment.log_path)
    while (record := state.read(launch.folder) or {}).get("pid") is None:
        if record.get("phase") == "failed":
            raise LacksError(str(record["reason"]), "check --tritonserver, or reinstall: pip install 'trtkit[local]'")
        if launch.supervisor.poll() is not None or time.monotonic() > deadline:
            raise failure(launch.deployment.name, log, "the supervisor did not start the server", "run again")
        time.sleep(0.01)
    launch.deployment = from_record(record)


def _await_ready(launch: Launch, spec: ServerSpec, on_progress: Progress | None) -> None:
    """Waits until our own server has every model ready, it dies, or the deadline passes."""
    deployment, log = launch.deployment, Path(launch.deployment.log_path)
    deadline = time.monotonic() + spec.ready_timeout_s
    told = ""
    how, doomed_at = None, None
    while True:
        missing = ["server"]
        if owns_ports(deployment):  # otherwise another server might answer
            missing = readiness.not_ready(deployment.host, deployment.http_port, deployment.models)
        record = state.read(launch.folder) or {}
        if record.get("phase") in state.ENDED or launch.supervisor.poll() is not None:
            raise _why_it_ended(launch, record, log)
        if not missing:
            return
        now = _waiting_for(log, missing, deployment.models)
        if doomed_at is None and (how := serverlog.died(serverlog.read_end(log))) is not None:
            doomed_at = time.monotonic()
        if doomed_at is not None and time.monotonic() >= doomed_at + STUB_GRACE_S:
            raise failure(spec.name, log, f"a process of the server died while {now}: {how}")
        if time.monotonic() >= deadline:
            late = f"not ready after {spec.ready_timeout_s:g} s, still {now}"
            raise failure(spec.name, log, late, f"raise deploy.ready_timeout_s, or {_LINT}")
        if on_progress and now != told:
            told = now
            on_progress(now)
        time.sleep(0.1)


def _why_it_ended(launch: Launch, record: dict[str, Any], log: Path) -> Exception:
    """The error for a server that ended before it was ready."""
    text, name, reason = serverlog.read_end(log), launch.deployment.name, record.get("reason")
    if serverlog.port_taken(text):
        return _PortTakenError()
    if (record.get("exit_code") or 0) >= 0 and record.get("phase") == "failed" and not serverlog.is_triton(text):
        said = "".join(f"\n  it said: {line}" for line in serverlog.tail(log, 2))
        return CheckFailedError(
            f"deployment '{name}': {record['argv'][0]} is no tritonserver, or cannot run here: {reason}, and nothing "
            f"was started{said}",
            f"check --tritonserver and the variable TRITONSERVER; the whole log is {log}",
        )
    return failure(name, log, reason or "the server died while it started")


def _waiting_for(log: Path, missing: list[str], models: Sequence[str]) -> str:
    """What the server is at, in a few words, from its log."""
    loading = serverlog.loading(serverlog.read_end(log))
    pending = [model for model in loading.begun if model not in loading.done]
    if pending:
        return f"loading {', '.join(pending)} ({len(loading.done)} of {len(models)} models done)"
    if missing != ["server"]:
        return f"waiting for {', '.join(missing)}"
    return "opening the ports" if loading.done else "starting the server"


def _shm_prefix(token: str) -> str:
    return f"trtkit_{token}_"


def _already_running(folder: Path, name: str) -> InputError:
    record = state.read(folder)
    where = ""
    if record is not None and record["phase"] in ("starting", "running"):
        deployment = from_record(record)
        where = f": HTTP {deployment.http_url}, gRPC {deployment.grpc_url}, metrics {deployment.metrics_url}"
    return InputError(
        f"deployment '{name}' is already running{where}",
        f"use it, stop it with `trtkit deploy down {name}`, or choose another --name",
    )
