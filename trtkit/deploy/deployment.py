"""A deployment as a value: what its record says, and what became of it when its processes died without a word."""

from __future__ import annotations

import difflib
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from trtkit.deploy import alias, processes, state
from trtkit.deploy.readiness import url_host
from trtkit.errors import InputError, LacksError


@dataclass(frozen=True)
class Deployment:
    """One server and where to reach it.

    Attributes:
        target: `local` or `docker`; `unknown` with a damaged record.
        phase: starting, running, stopping; or, when it is over, stopped (on request), failed (the server ended by
            itself), crashed (its supervisor was killed). `unknown` with a damaged record.
        ready: every model answers as ready; False when nobody asked.
        pid, supervisor_pid: processes of the local target.
        container: name of the container of the docker target.
        exit_code: of the server, once it ended; negative for a signal.
        reason: why it ended, or is ending.
        started_at, ended_at: seconds since the epoch.
        token: names this very start; every process of it carries the token in its environment.
        model_control: `poll` when the server takes over what changes in the repository, else `none`.
    """

    name: str
    target: str
    phase: str
    host: str
    http_port: int
    grpc_port: int
    metrics_port: int
    repository: str
    models: tuple[str, ...]
    log_path: str
    started_at: float
    ready: bool = False
    pid: int | None = None
    supervisor_pid: int | None = None
    container: str | None = None
    exit_code: int | None = None
    reason: str = ""
    ended_at: float | None = None
    token: str = ""
    model_control: str = "none"

    @property
    def running(self) -> bool:
        return self.phase in state.LIVE

    @property
    def http_url(self) -> str:
        return f"http://{url_host(self.host)}:{self.http_port}"

    @property
    def grpc_url(self) -> str:
        """Host and port, as gRPC clients want them."""
        return f"{url_host(self.host)}:{self.grpc_port}"

    def url(self, protocol: Literal["grpc", "http"]) -> str:
        """Where a client of that protocol finds it, as `trtkit.client.connect` wants it."""
        return f"grpc://{self.grpc_url}" if protocol == "grpc" else self.http_url

    @property
    def metrics_url(self) -> str:
        return f"http://{url_host(self.host)}:{self.metrics_port}/metrics"

    def to_dict(self) -> dict[str, Any]:
        urls = {"http_url": self.http_url, "grpc_url": self.grpc_url, "metrics_url": self.metrics_url}
        return asdict(self) | {"models": list(self.models), "running": self.running} | urls


def from_record(record: Mapping[str, Any]) -> Deployment:
    """The deployment that a record of `trtkit.deploy.state` describes."""
    known = {name: record[name] for name in Deployment.__dataclass_fields__ if name in record}
    return Deployment(**known | {"models": tuple(record.get("models", ()))})


def running(name: str) -> Deployment:
    """The deployment of that name, of either target, as one that serves. Whether a container lives is not asked.

    Raises:
        LacksError: it does not run, or was never started.
    """
    folder = state.folder_of(name)
    record = state.read(folder)
    if record is None or not (deployment := from_record(settled(folder, record))).running:
        raise LacksError(
            f"no deployment '{name}' is running", "start it with `trtkit deploy up`, or name a server with --url"
        )
    return deployment


def unknown(name: str) -> InputError:
    """The error for a name that no record has."""
    names = state.names()
    near = difflib.get_close_matches(name, [other for other in names if other != name], n=1)
    if near:
        return InputError(f"no deployment '{name}'", f"did you mean '{near[0]}'? `trtkit deploy status` lists all")
    listed = f"known: {', '.join(names)}" if names else "nothing was deployed from here yet"
    return InputError(f"no deployment '{name}'; {listed}", "start one with `trtkit deploy up CONFIG --repository DIR`")


def damaged(name: str) -> Deployment:
    """What can be said of a deployment whose record cannot be read.

    Raises:
        InputError: there is no record at all.
    """
    if name not in state.names():
        raise unknown(name)
    folder = state.folder_of(name)
    return Deployment(
        name,
        target="unknown",
        phase="unknown",
        host="",
        http_port=0,
        grpc_port=0,
        metrics_port=0,
        repository="",
        models=(),
        log_path=str(folder / "server.log"),
        started_at=0.0,
        reason=f"its record {folder / 'state.json'} is damaged; `trtkit deploy down {name}` clears it away",
    )


def settled(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The record as it truly is: a local one that claims to live while nobody holds its lock crashed."""
    if record["phase"] in state.ENDED or record["target"] != "local":
        return record
    lock = state.acquire(folder)
    if lock is None:
        return record
    try:
        latest = state.read(folder) or record
        return latest if latest["phase"] in state.ENDED else clear_crashed(folder, latest)
    finally:
        os.close(lock)


def clear_crashed(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Clears away what a crash left and writes it down. The caller holds the lock.

    Only the marker in their environment tells what belongs to it: pids may have new owners since.
    """
    processes.kill_members(record["token"])
    processes.remove_shared_memory(record["shm_prefix"])
    alias.remove(record.get("alias"))
    record = record | {"phase": "crashed", "reason": "its processes died without a word", "ended_at": time.time()}
    state.write(folder, record)
    return record
