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
from trtkit.config_serving import LLM_RUNTIMES
from trtkit.deploy import model_mount, runtimes, state
from trtkit.deploy.command import features_of, mpi_command, server_arguments
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
        gpus: `--gpus`; None for a container without any.
        command: what runs inside.
        environment: variables with values, as `NAME=VALUE`; none of them a secret.
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
    gpus: str | None
    shm_size: str
    command: tuple[str, ...]
    pass_environment: tuple[str, ...]
    user: str | None
    stop_timeout_s: int
    findings: tuple[Finding, ...] = ()
    environment: tuple[str, ...] = ()

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
        argv += ["--stop-timeout", str(self.stop_timeout_s)]
        argv += [] if self.gpus is None else ["--gpus", self.gpus]
        argv += ["--shm-size", self.shm_size]
        argv += ULIMITS
        for outside, inside in zip(self.ports, INSIDE, strict=True):
            argv += ["--publish", f"{address}:{outside}:{inside}"]
        for mount in self.mounts:
            argv += ["--mount", mount.option()]
        for variable in (*self.environment, *self.pass_environment):
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
        engine: engine or Hugging Face checkpoint, mounted read-only where the repository looks for it:
            `model_path_in_container`, else its own path. None mounts what the repository names, from the same path of
            this machine or from the hub's cache.
        ports: on this machine; None takes those of the config, with Triton's 8000, 8001 and 8002 for 0.
        pass_environment: variables to hand on, such as `HF_TOKEN`; their values stay out of the command.
        user: as in `docker run --user`.

    Raises:
        InputError: a runtime that needs trtkit inside, a repository for another server, GPUs that do not fit, a name
            that cannot be handed on, a folder without an engine or checkpoint, or one mounted elsewhere than the
            repository looks.
    """
    if config.serving.runtime == "reference":
        raise InputError(
            "the reference runtime needs trtkit beside the server, which the container does not have",
            "use --target local, or serving.runtime: tensorrtllm",
        )
    deploy = config.deploy
    chosen = state.folder_of(name or config.name).name
    for variable in pass_environment:
        if _VARIABLE.fullmatch(variable) is None:
            raise InputError(f"'{variable}' is not the name of a variable", "give the name alone, without a value")
    models = Path(repository).resolve()
    mounts, environment, findings = _mounts(config, models, engine, model_path_in_container)
    if deploy.image is None:
        runtimes.check_container(models, config.serving.runtime)
    wanted = zip((deploy.http_port, deploy.grpc_port, deploy.metrics_port), INSIDE, strict=True)
    http, grpc, metrics = ports or (port or inside for port, inside in wanted)
    return DockerRun(
        name=chosen,
        image=deploy.image or releases.get(deploy.release).image_of(config.serving.runtime),
        host=_publishable(deploy.host),
        ports=(http, grpc, metrics),
        mounts=mounts,
        gpus=_gpus(config),
        shm_size=deploy.shm_size,
        command=_command(config, str(models), f"{chosen}_"),
        pass_environment=tuple(pass_environment),
        user=user,
        stop_timeout_s=deploy.exit_timeout_s + int(STOP_MARGIN_S),
        findings=findings,
        environment=environment,
    )


def _command(config: BuildConfig, repository: str, shm_prefix: str) -> tuple[str, ...]:
    """What runs inside the container. Only engines need a server per GPU: the other runtimes start their own workers.

    Raises:
        InputError: several MPI ranks that would poll: each would take over a change at a time of its own.
    """
    ranks = config.checkpoint.tp * config.checkpoint.pp if config.serving.runtime == "tensorrtllm" else 1
    if config.deploy.model_control == "poll" and ranks > 1:
        raise InputError(
            f"deploy.model_control 'poll' cannot swap versions of an engine with {ranks} MPI ranks",
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
        features=features_of(config),
    )
    holder = "llm" if config.serving.layout == "fused" else "tensorrt_llm"
    return tuple(mpi_command("tritonserver", arguments, world_size=ranks, shm_prefix=shm_prefix, llm_models=(holder,)))


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


def _mounts(
    config: BuildConfig, repository: Path, engine: str | Path | None, target: str | None
) -> tuple[tuple[Mount, ...], tuple[str, ...], tuple[Finding, ...]]:
    """The repository first, what it names, and the variables and warnings that come with it."""
    given = None if engine is None else Path(engine).resolve()
    if target is not None and not target.startswith("/"):
        raise InputError(f"'{target}' is not an absolute path inside the container", "begin it with /")
    adapters = config.serving.lora.adapters if config.serving.lora else {}
    found, environment, findings = model_mount.check(repository, given, target, tuple(adapters.values()))
    variables = tuple(f"{name}={value}" for name, value in environment.items())
    return (Mount(repository, str(repository)), *found), variables, tuple(findings)


def _gpus(config: BuildConfig) -> str | None:
    """Value of `--gpus`: at least as many as tp times pp. What is no language model takes what there is."""
    ids = config.deploy.gpu_ids
    if ids == []:
        return None
    world_size = config.checkpoint.tp * config.checkpoint.pp if config.serving.runtime in LLM_RUNTIMES else 1
    if ids is not None and len(set(ids)) < world_size:
        raise InputError(
            f"deploy.gpus '{','.join(ids)}' names {len(set(ids))} GPUs, and tp times pp needs {world_size}",
            "name one per rank, or `all`",
        )
    return gpus_option(ids)
