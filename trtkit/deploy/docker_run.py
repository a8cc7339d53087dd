"""The `docker run` line of a deployment: a pure function from a build config to an argument list."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtkit import releases
from trtkit.deploy import engine_mount, state
from trtkit.deploy.command import mpi_command, server_arguments
from trtkit.deploy.supervisor import STOP_MARGIN_S
from trtkit.docker_cli import ULIMITS, Mount, gpus_option
from trtkit.errors import InputError
from trtkit.findings import Finding

if TYPE_CHECKING:
    from trtkit.config import BuildConfig

INSIDE = (8000, 8001, 8002)
"""HTTP, gRPC and metrics ports inside the container, and outside where the config says 0."""

LABEL = "trtkit.deployment"
START_LABEL = "trtkit.start"
"""Its value is the token of one start: what carries it is ours to stop and remove, whatever its name."""

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class DockerRun:
    """One container that serves a model repository.

    Attributes:
        name: of the deployment; the container is `trtkit-<name>`.
        ports: on this machine, of HTTP, gRPC and metrics.
        command: what runs inside.
        pass_environment: variables handed on by name, so that no value stands in an argument list.
        user: `--user`; None keeps the image's.
        stop_timeout_s: from SIGTERM to SIGKILL.
        findings: warnings about what does not exist yet; the container cannot start before it does.
    """

    name: str
    image: str
    host: str
    ports: tuple[int, int, int]
    mounts: tuple[Mount, ...]
    gpus: str
    shm_size: str
    command: tuple[str, ...]
    pass_environment: tuple[str, ...]
    user: str | None
    stop_timeout_s: int
    findings: tuple[Finding, ...] = ()

    @property
    def container(self) -> str:
        return f"trtkit-{self.name}"

    def argv(self, *, start: str | None = None) -> list[str]:
        """The whole command.

        In the foreground the container goes when it ends (`--rm`). A detached one stays until `down`, because a
        container that removes itself takes the reason of its failure along.

        Args:
            start: token of a detached start; None is the foreground.
        """
        address = f"[{self.host}]" if ":" in self.host else self.host
        argv = ["docker", "run", "--rm" if start is None else "--detach", "--init", "--name", self.container]
        argv += ["--label", f"{LABEL}={self.name}"]
        if start is not None:
            argv += ["--label", f"{START_LABEL}={start}"]
        argv += ["--stop-timeout", str(self.stop_timeout_s), "--gpus", self.gpus, "--shm-size", self.shm_size]
        argv += ULIMITS
        for outside, inside in zip(self.ports, INSIDE, strict=True):
            argv += ["--publish", f"{address}:{outside}:{inside}"]
        for mount in self.mounts:
            argv += ["--mount", mount.option()]
        for variable in self.pass_environment:
            argv += ["--env", variable]
        if self.user is not None:
            argv += ["--user", self.user]
        return [*argv, self.image, *self.command]

    def shell_line(self) -> str:
        """The foreground command, ready to paste into a shell."""
        return shlex.join(self.argv())

    def to_dict(self) -> dict[str, Any]:
        return {
            "container": self.container,
            "image": self.image,
            "host": self.host,
            "ports": dict(zip(("http", "grpc", "metrics"), self.ports, strict=True)),
            "argv": self.argv(),
        }


def render(
    config: BuildConfig,
    repository: str | Path,
    engine: str | Path | None = None,
    *,
    name: str | None = None,
    model_path_in_container: str | None = None,
    ports: tuple[int, int, int] | None = None,
    pass_environment: Sequence[str] = (),
    user: str | None = None,
) -> DockerRun:
    """The container that serves `repository` as `config.deploy` says. Reads what exists, and touches nothing.

    Args:
        repository: mounted read-only at its own path.
        engine: mounted read-only where the repository's `gpt_model_path` looks: `model_path_in_container`, else its
            own path.
        ports: on this machine; None takes those of the config, with Triton's 8000, 8001 and 8002 for 0.
        pass_environment: variables to hand on, such as `HF_TOKEN`; their values stay out of the command.
        user: as in `docker run --user`.

    Raises:
        InputError: a runtime that needs trtkit inside, GPUs that do not fit, a name that cannot be handed on, a folder
            without an engine, or one mounted elsewhere than the repository looks.
    """
    if config.serving.runtime == "reference":
        raise InputError(
            "the reference runtime needs trtkit beside the server, which the container does not have",
            "use --target local, or serving.runtime: tensorrtllm",
        )
    deploy = config.deploy
    world_size = config.checkpoint.tp * config.checkpoint.pp
    chosen = state.folder_of(name or config.name).name
    mounts = _mounts(repository, engine, model_path_in_container)
    for variable in pass_environment:
        if _VARIABLE.fullmatch(variable) is None:
            raise InputError(f"'{variable}' is not the name of a variable", "give the name alone, without a value")
    resolved = None if engine is None else mounts[1].source
    wanted = zip((deploy.http_port, deploy.grpc_port, deploy.metrics_port), INSIDE, strict=True)
    http, grpc, metrics = ports or (port or inside for port, inside in wanted)
    return DockerRun(
        name=chosen,
        image=deploy.image or releases.get(deploy.release).image,
        host=_publishable(deploy.host),
        ports=(http, grpc, metrics),
        mounts=tuple(mounts),
        gpus=gpus_option(_enough_gpus(deploy.gpu_ids, world_size)),
        shm_size=deploy.shm_size,
        command=_command(config, str(mounts[0].source), f"{chosen}_", world_size),
        pass_environment=tuple(pass_environment),
        user=user,
        stop_timeout_s=deploy.exit_timeout_s + int(STOP_MARGIN_S),
        findings=tuple(engine_mount.check(mounts[0].source, resolved, mounts[-1].target)),
    )


def _command(config: BuildConfig, repository: str, shm_prefix: str, world_size: int) -> tuple[str, ...]:
    """What runs inside the container.

    Raises:
        InputError: several MPI ranks that would poll: each would take over a change at a time of its own.
    """
    if config.deploy.model_control == "poll" and world_size > 1:
        raise InputError(
            f"deploy.model_control 'poll' cannot swap versions of an engine with {world_size} MPI ranks",
            "leave it at 'none', and start a second deployment for the new version",
        )
    arguments = server_arguments(
        repository,
        host="0.0.0.0",  # noqa: S104 - inside the container; the published ports decide who gets in
        http_port=INSIDE[0],
        grpc_port=INSIDE[1],
        metrics_port=INSIDE[2],
        exit_timeout_s=config.deploy.exit_timeout_s,
        shm_prefix=shm_prefix,
        model_control=config.deploy.model_control,
    )
    return tuple(mpi_command("tritonserver", arguments, world_size=world_size, shm_prefix=shm_prefix))


def _publishable(host: str) -> str:
    """The host as an IP address, which is all that docker's `--publish` takes.

    Raises:
        InputError: a name other than localhost. What it stands for may change, so the config should say it.
    """
    if host == "localhost":
        return "127.0.0.1"
    try:
        return str(ip_address(host))
    except ValueError:
        raise InputError(
            f"deploy.host '{host}' is not an IP address, and Docker publishes ports on those only",
            "give the address itself, such as 127.0.0.1",
        ) from None


def _mounts(repository: str | Path, engine: str | Path | None, target: str | None) -> list[Mount]:
    mounts = [Mount(Path(repository).resolve(), str(Path(repository).resolve()))]
    if engine is not None:
        mounts.append(Mount(Path(engine).resolve(), target or str(Path(engine).resolve())))
    for mount in mounts:
        if not mount.target.startswith("/"):
            raise InputError(f"'{mount.target}' is not an absolute path inside the container", "begin it with /")
    return mounts


def _enough_gpus(ids: Sequence[str] | None, world_size: int) -> Sequence[str] | None:
    if ids is not None and len(set(ids)) < world_size:
        raise InputError(
            f"deploy.gpus '{','.join(ids)}' names {len(set(ids))} GPUs, and tp times pp needs {world_size}",
            "name one per rank, or `all`",
        )
    return ids
