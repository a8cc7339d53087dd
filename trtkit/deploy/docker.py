"""The docker target: Triton in the release's container, through the `docker` command.

Not run against a real Docker engine by the tests: a strict stand-in for the command checks every argument.
Unlike a local deployment, a container that is starting survives the death of trtkit; `down` removes it.

A container's name says nothing about whose it is: another state folder, user or program may have taken it. Every start
has a token, its container carries the token as a label, and a container without it counts as not there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtkit.deploy import ports as free_ports
from trtkit.deploy import readiness, serverlog, state
from trtkit.deploy.deployment import Deployment, clear_crashed, from_record, unknown
from trtkit.deploy.docker_run import START_LABEL, DockerRun, render
from trtkit.errors import CheckFailedError, InputError, LacksError, TrtkitError

if TYPE_CHECKING:
    from trtkit.config import BuildConfig

__all__ = ["DockerRun", "down", "logs", "render", "status", "up"]

Progress = Callable[[str], None]
_PORT_ATTEMPTS = 5
_QUICK_S = 60.0  # a docker command that only asks or removes


class _PortTakenError(Exception):
    """Another process took a port between the choice and the container's start."""


@dataclass(frozen=True)
class _Container:
    """A container that carries the token of its start."""

    id: str
    running: bool
    exit_code: int


def up(
    config: BuildConfig,
    repository: str | Path,
    engine: str | Path | None = None,
    *,
    wait: bool = True,
    on_progress: Progress | None = None,
    **options: Any,
) -> Deployment:
    """Starts the container that `render` describes and waits until every model is ready.

    Args:
        options: those of `render`. Ports that the config leaves at 0 become free ones.

    Raises:
        InputError: already deployed, somebody else's container has the name, nothing at `repository` or `engine`, and
            what `render` refuses.
        LacksError: no docker, no image, a port is taken.
        CheckFailedError: the server ended or was not ready in time; the cause quotes its log.
    """
    planned = render(config, repository, engine, **options)
    for finding in planned.findings:
        raise InputError(finding.cause, finding.fix)
    models = readiness.models_of(Path(repository).resolve())
    folder = state.make_folder(planned.name)
    lock = state.acquire(folder, patience_s=1.0)
    if lock is None:
        raise InputError(
            f"deployment '{folder.name}' is being started or runs locally", f"see `trtkit deploy status {folder.name}`"
        )
    try:
        _refuse_second(folder)
        wanted = (config.deploy.http_port, config.deploy.grpc_port, config.deploy.metrics_port)
        for _ in range(_PORT_ATTEMPTS if 0 in wanted else 1):
            http, grpc, metrics = free_ports.choose(planned.host, wanted)
            run = replace(planned, ports=(http, grpc, metrics))
            try:
                return _attempt(run, config, models, folder, wait, on_progress)
            except _PortTakenError:
                continue
        raise LacksError(f"another process took a port of {run.container}", "run again, or choose other ports")
    finally:
        os.close(lock)


def status(name: str) -> Deployment:
    """How a deployment's container is.

    Raises:
        InputError: nothing of this name was ever deployed.
        LacksError: docker does not answer.
    """
    folder = state.folder_of(name)
    record = state.read(folder)
    if record is None:
        raise unknown(name)
    deployment = from_record(record)
    if record["phase"] in state.ENDED:
        return deployment
    container = _find(record)
    if container is None:
        return _end(folder, record, "crashed", None, "its container is gone")
    if not container.running:
        code = container.exit_code
        return replace(deployment, phase="failed", exit_code=code, reason=f"the container exited with code {code}")
    ready = not readiness.not_ready(deployment.host, deployment.http_port, deployment.models)
    return replace(deployment, phase="running", ready=ready)


def down(name: str, *, on_progress: Progress | None = None) -> Deployment:
    """Stops and removes a deployment's container, and keeps its log. Stopping a stopped one is fine.

    Raises: as `status`.
    """
    folder = state.folder_of(name)
    record = state.read(folder)
    if record is None:
        raise unknown(name)
    if record["phase"] in state.ENDED:
        return from_record(record)
    container, patience = _find(record), int(record["stop_timeout_s"])
    if container is None:
        return _end(folder, record, "crashed", None, "its container is gone")
    if on_progress:
        on_progress(f"stopping container {record['container']}, at most {patience} s")
    _docker(["stop", "-t", str(patience), container.id], patience + _QUICK_S)
    after = _find(record)
    reason = "stopped on request"
    try:
        _keep_log(container, Path(record["log_path"]))
    except OSError as error:
        reason += f"; its log could not be kept: {error}"
    finally:
        _docker(["rm", "--force", container.id])
    return _end(folder, record, "stopped", after.exit_code if after else None, reason)


def logs(name: str, lines: int, *, follow: bool = False) -> Iterator[str]:
    """The last lines of what a deployment's container said; with `follow` also what it says until it ends.

    Raises: as `status`.
    """
    record = state.read(state.folder_of(name))
    if record is None:
        raise unknown(name)
    container = None if record["phase"] in state.ENDED else _find(record)
    if container is None:
        yield from serverlog.tail(Path(record["log_path"]), lines)
        return
    argv = [_program(), "logs", "--tail", str(lines), *(["--follow"] if follow else []), container.id]
    with subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        try:
            for line in process.stdout or ():
                yield line.rstrip("\n")
        finally:
            process.terminate()


def _attempt(
    run: DockerRun,
    config: BuildConfig,
    models: list[str],
    folder: Path,
    wait: bool,
    on_progress: Progress | None,
) -> Deployment:
    _ensure_image(run.image, on_progress)
    record = _record(run, models, folder) | {"model_control": config.deploy.model_control}
    state.write(folder, record)
    try:
        _start_container(run, record)
        if wait:
            _await_ready(run, record, models, config.deploy.ready_timeout_s, on_progress)
    except BaseException as error:  # Ctrl-C too
        _clear_away(folder, record, str(error).partition("\n")[0] or "interrupted")
        if isinstance(error, CheckFailedError):
            raise CheckFailedError(error.cause, f"{error.fix}; the whole log is {folder / 'server.log'}") from None
        raise
    record |= {"phase": "running"}
    state.write(folder, record)
    return replace(from_record(record), ready=wait)


def _record(run: DockerRun, models: list[str], folder: Path) -> dict[str, Any]:
    """The record of a start that is about to happen."""
    token = uuid.uuid4().hex
    return {
        "name": run.name,
        "target": "docker",
        "phase": "starting",
        "token": token,
        "container": run.container,
        "host": run.host,
        "http_port": run.ports[0],
        "grpc_port": run.ports[1],
        "metrics_port": run.ports[2],
        "repository": str(run.mounts[0].source),
        "models": models,
        "log_path": str(folder / "server.log"),
        "argv": run.argv(start=token),
        "stop_timeout_s": run.stop_timeout_s,
        "started_at": time.time(),
    }


def _clear_away(folder: Path, record: dict[str, Any], reason: str) -> None:
    """Removes the container of a start that failed, if it came to one, and raises nothing that would hide why.

    What cannot be done to the log does not keep the container alive. Where docker does not answer, the record goes on
    to live, so that `down` can remove the container later.
    """
    gone = False
    try:
        with suppress(OSError, TrtkitError):
            if (container := _find(record)) is not None:
                _keep_log(container, Path(record["log_path"]))
    finally:
        with suppress(OSError, TrtkitError):
            if (container := _find(record)) is not None:
                _docker(["rm", "--force", container.id])
            gone = True
        if gone:
            _end(folder, record, "failed", None, reason)
        else:
            state.write(folder, record | {"reason": f"{reason}; docker did not remove its container"})


def _start_container(run: DockerRun, record: dict[str, Any]) -> None:
    result = _docker(record["argv"][1:], 600.0, check=False)
    if result.returncode == 0:
        return
    said = result.stderr.strip() or f"exit code {result.returncode}"
    if "container name" in said and "already in use" in said:
        raise InputError(
            f"another container, which this deployment did not start, is called {run.container}",
            f"choose another --name, or see whose it is: docker inspect {run.container}",
        )
    if "port is already allocated" in said or "address already in use" in said:
        raise _PortTakenError(said)
    raise LacksError(
        f"docker could not start {run.container}: {_last_line(said)}",
        "check the image, and GPU access (NVIDIA Container Toolkit)",
    )


def _await_ready(
    run: DockerRun, record: dict[str, Any], models: list[str], seconds: float, on_progress: Progress | None
) -> None:
    deadline = time.monotonic() + seconds
    told = ""
    while True:
        container = _find(record)
        if container is None or not container.running:
            code = "" if container is None else f" with code {container.exit_code}"
            fix = "check the repository with `trtkit repo lint`"
            raise _failure(run, container, f"the container exited{code}", fix)
        missing = readiness.not_ready(run.host, run.ports[0], models)
        if not missing:
            return
        if time.monotonic() >= deadline:
            waited = f"not ready after {seconds:g} s, still waiting for {', '.join(missing)}"
            raise _failure(run, container, waited, "raise deploy.ready_timeout_s")
        now = f"waiting for {', '.join(missing)} in container {run.container}"
        if on_progress and now != told:
            told = now
            on_progress(now)
        time.sleep(0.5)


def _failure(run: DockerRun, container: _Container | None, what: str, fix: str) -> CheckFailedError:
    said = serverlog.reasons(_logs(container)) if container else []
    quoted = "".join(f"\n  server: {line}" for line in said)
    return CheckFailedError(f"deployment '{run.name}': {what}{quoted}", fix)


def _refuse_second(folder: Path) -> None:
    record = state.read(folder)
    if record is None or record["phase"] in state.ENDED:
        return
    if record["target"] == "local":
        clear_crashed(folder, record)  # we hold its lock, so it does not live
    elif _find(record) is not None:
        where = from_record(record).http_url
        raise InputError(
            f"deployment '{folder.name}' already has a container, {record['container']} at {where}",
            f"use it, remove it with `trtkit deploy down {folder.name}`, or choose another --name",
        )


def _ensure_image(image: str, on_progress: Progress | None) -> None:
    known = _docker(["image", "inspect", image], check=False)
    if known.returncode == 0:
        return
    if "no such image" not in known.stderr.lower():
        raise _silent(known.stderr)
    if on_progress:
        on_progress(f"pulling {image}, which may take long")
    # Its progress goes to our standard error; standard output is for results.
    if subprocess.run([_program(), "pull", image], stdin=subprocess.DEVNULL, stdout=2, check=False).returncode != 0:
        raise LacksError(f"docker could not pull {image}", "check the release, the network and `docker login`")


def _find(record: dict[str, Any]) -> _Container | None:
    """The container of this very start; None when there is none of its name, or it carries another token."""
    wanted = "[{{json .Id}},{{json .State}},{{json .Config.Labels}}]"
    result = _docker(["inspect", "--type", "container", "--format", wanted, record["container"]], check=False)
    if result.returncode != 0:
        if "no such" in result.stderr.lower():
            return None
        raise _silent(result.stderr)
    number, container, labels = json.loads(result.stdout)
    if (labels or {}).get(START_LABEL) != record["token"]:
        return None
    return _Container(number, bool(container["Running"]), int(container["ExitCode"]))


def _logs(container: _Container) -> str:
    result = _docker(["logs", container.id], check=False)
    return result.stdout + result.stderr


def _keep_log(container: _Container, path: Path) -> None:
    text = _logs(container)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        stream.write(text)


def _end(folder: Path, record: dict[str, Any], phase: str, code: int | None, reason: str) -> Deployment:
    record = record | {"phase": phase, "exit_code": code, "reason": reason, "ended_at": time.time()}
    state.write(folder, record)
    return from_record(record)


def _docker(arguments: list[str], seconds: float = _QUICK_S, *, check: bool = True) -> subprocess.CompletedProcess[str]:
    try:
        result = subprocess.run(
            [_program(), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise LacksError(
            f"`docker {arguments[0]}` did not answer within {seconds:.0f} s", "look at the Docker engine"
        ) from None
    if check and result.returncode != 0:
        raise _silent(result.stderr)
    return result


def _silent(said: str) -> LacksError:
    return LacksError(f"docker: {_last_line(said) or 'no answer'}", "start the Docker engine, or use --target local")


def _program() -> str:
    found = shutil.which("docker")
    if found is None:
        raise LacksError(
            "no `docker` on PATH", "install Docker Engine and the NVIDIA Container Toolkit, or use --target local"
        )
    return found


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""
