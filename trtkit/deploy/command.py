"""The arguments of tritonserver, for one process or for one per rank under MPI. Pure functions.

Source of the options: triton-inference-server/server, src/command_line_parser.cc; of the MPI form (leader mode, one
block per rank): triton-inference-server/tensorrtllm_backend, scripts/launch_triton_server.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv6Address
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from trtkit.config import BuildConfig

ModelControl = Literal["none", "poll"]

POLL_SECONDS = 2
"""How often a polling server looks for changes; a version that cannot be loaded is tried again as often."""


def server_arguments(
    repository: str,
    *,
    host: str,
    http_port: int,
    grpc_port: int,
    metrics_port: int,
    exit_timeout_s: int,
    shm_prefix: str,
    backend_directory: str | None = None,
    cache_directory: str | None = None,
    log_verbose: int = 0,
    model_control: ModelControl = "none",
    features: Sequence[str] = (),
) -> list[str]:
    """Arguments of a server that serves everything in `repository` and lets no client change that.

    Model configurations must be complete (no auto-completion: it starts every python model twice), a model that does
    not load ends the server, and clients may not load models (that would let them run code).

    Args:
        shm_prefix: begins the names of the python backend's shared-memory regions; unique on the machine.
        model_control: `none`, or `poll`: the server takes over what changes in the repository, and clients still
            may not. Once a version failed to load, a strictly ready server would report itself as not ready for
            ever, although the version before it serves on; a polling one is ready when it takes requests, and
            every model is asked by itself.
        features: further arguments (see `features_of`).
    """
    control = ["--model-control-mode=none", "--strict-readiness=true"]
    if model_control == "poll":
        control = ["--model-control-mode=poll", f"--repository-poll-secs={POLL_SECONDS}", "--strict-readiness=false"]
    arguments = [
        f"--model-repository={repository}",
        *control,
        "--disable-auto-complete-config",
        "--exit-on-error=true",
        f"--exit-timeout-secs={exit_timeout_s}",
        f"--http-address={_http_address(host)}",
        f"--http-port={http_port}",
        f"--grpc-address={_grpc_address(host)}",
        f"--grpc-port={grpc_port}",
        f"--metrics-address={_http_address(host)}",
        f"--metrics-port={metrics_port}",
        "--allow-sagemaker=false",
        "--allow-vertex-ai=false",
        f"--backend-config=python,shm-region-prefix-name={shm_prefix}",
        f"--log-verbose={log_verbose}",
    ]
    if backend_directory is not None:
        arguments.append(f"--backend-directory={backend_directory}")
    if cache_directory is not None:
        arguments.append(f"--cache-directory={cache_directory}")
    return [*arguments, *features]


def features_of(config: BuildConfig) -> tuple[str, ...]:
    """Arguments for what a build config wants of the server beside its models: response cache and rate limiter. Both
    are off in a server that is not told, whatever its models' configurations say."""
    arguments = []
    if config.serving.response_cache:
        arguments.append(f"--cache-config=local,size={config.deploy.response_cache_bytes}")
    if config.serving.rate_limiter is not None:
        arguments.append("--rate-limit=execution_count")
        resources = config.deploy.rate_limit_resources
        arguments += [f"--rate-limit-resource={name}:{count}" for name, count in resources.items()]
    return tuple(arguments)


def mpi_command(
    server: str,
    arguments: Sequence[str],
    *,
    world_size: int,
    shm_prefix: str,
    llm_models: Sequence[str] = ("tensorrt_llm",),
) -> list[str]:
    """One server per rank under `mpirun`, or `server` alone for one rank.

    Rank 0 answers requests and loads everything. The others load only the models that hold the engine, which never
    return from their start, and open no ports. Every rank has shared-memory names of its own.

    Args:
        arguments: those of `server_arguments`.
        world_size: tensor parallel times pipeline parallel; TRT-LLM's leader mode insists on this number.
    """
    if world_size == 1:
        return [server, *arguments]
    command = ["mpirun", "--allow-run-as-root"]
    for rank in range(world_size):
        block = [_for_rank(argument, rank, shm_prefix) for argument in arguments]
        if rank > 0:
            command.append(":")
            block = [argument for argument in block if not argument.startswith(_LEADER_ONLY)]
            block += ["--model-control-mode=explicit", *(f"--load-model={model}" for model in llm_models)]
            block += ["--allow-http=false", "--allow-grpc=false", "--allow-metrics=false"]
        command += ["-n", "1", server, *block]
    return command


def _http_address(host: str) -> str:
    """IPv6 as libevhtp wants it, which serves HTTP and metrics (evhtp.c, evhtp_bind_socket)."""
    return f"ipv6:{host}" if _is_ipv6(host) else host


def _grpc_address(host: str) -> str:
    """IPv6 in brackets, so that the port can follow."""
    return f"[{host}]" if _is_ipv6(host) else host


def _is_ipv6(host: str) -> bool:
    try:
        IPv6Address(host)
    except ValueError:
        return False
    return True


_LEADER_ONLY = (
    "--model-control-mode=",
    "--http-address=",
    "--http-port=",
    "--grpc-address=",
    "--grpc-port=",
    "--metrics-address=",
    "--metrics-port=",
)


def _for_rank(argument: str, rank: int, shm_prefix: str) -> str:
    if argument.startswith("--backend-config=python,shm-region-prefix-name="):
        return f"--backend-config=python,shm-region-prefix-name={shm_prefix}{rank}_"
    return argument
