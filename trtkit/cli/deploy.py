"""`trtkit deploy`: start, watch and stop Triton on this machine or in Docker."""

from __future__ import annotations

import ipaddress
import shlex
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import click

from trtkit.cli._common import dry_run_option, json_option, note, print_json, print_table

if TYPE_CHECKING:
    from trtkit.config import BuildConfig
    from trtkit.deploy.deployment import Deployment
    from trtkit.deploy.versions import ModelVersion

_Function = TypeVar("_Function", bound=Callable[..., Any])
_path = click.Path(path_type=Path)


def _server_options(function: _Function) -> _Function:
    """What `up` and `render` take alike."""
    options = [
        click.argument("config_file", metavar="CONFIG", type=_path),
        click.option("--repository", required=True, type=_path, help="The model repository to serve."),
        click.option("--target", type=click.Choice(["local", "docker"]), help="By default deploy.target of CONFIG."),
        click.option("--name", help="Of the deployment; by default that of CONFIG."),
        click.option("--tritonserver", metavar="PATH", help="Executable to use.  [local]"),
        click.option("--pass-env", multiple=True, metavar="NAME", help="Variable that the server may see; repeatable."),
        click.option(
            "--engine",
            "--checkpoint",
            "engine",
            type=_path,
            help="Engine, or Hugging Face checkpoint of llmapi and vllm, to mount into the container; by default what "
            "the repository names.  [docker]",
        ),
        click.option("--model-path-in-container", metavar="PATH", help="Where to mount it.  [docker]"),
        click.option("--user", help="User inside the container, such as 1000:1000.  [docker]"),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@click.group()
def command() -> None:
    """Start, watch and stop Triton.

    \b
    Example:
      trtkit deploy up build_configs/tiny-llama.yaml --repository ./models
      trtkit deploy status
      trtkit deploy down tiny-llama
    """


@command.command()
@_server_options
@click.option("--wait/--no-wait", default=True, show_default=True, help="Return only when every model is ready.")
@dry_run_option
@json_option
def up(config_file: Path, wait: bool, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Start a server for the model repository, as section `deploy` of CONFIG says, and leave it running.

    It listens on loopback unless deploy.host says otherwise; ports that are 0 become free ones. Interrupting this
    command before the server is ready leaves nothing running.

    \b
    Example:
      trtkit deploy up build_configs/tiny-llama.yaml --repository ./models
      trtkit deploy up llama-8b.yaml --repository ./models --engine ./engine --target docker
    """
    from trtkit.config_file import load_config
    from trtkit.deploy import docker, local, ports

    config = load_config(config_file)
    if dry_run:
        _print_plan(config, as_json, options)
        return
    local.forget_transient()
    ports.choose(config.deploy.host, [0])  # refuses a host that is none
    _warn_of_exposure(config.deploy.host)
    if _target(config, options) == "local":
        deployment = local.up(_local_spec(config, options), wait=wait, on_progress=note)
    else:
        deployment = docker.up(
            config, options["repository"], options["engine"], wait=wait, on_progress=note, **_docker_options(options)
        )
    if as_json:
        print_json(deployment.to_dict())
        return
    rows = [("HTTP", deployment.http_url), ("gRPC", deployment.grpc_url), ("metrics", deployment.metrics_url)]
    rows += [("models", ", ".join(deployment.models)), ("log", deployment.log_path)]
    print_table(("what", "where"), rows, title=f"{deployment.name}: {_phase(deployment)}")
    note(f"stop it with: trtkit deploy down {deployment.name}")


@command.command()
@_server_options
@json_option
def render(config_file: Path, as_json: bool, **options: Any) -> None:
    """Print the command that `up` would run, and run nothing.

    For target docker this is a complete `docker run` line, for which ports that are 0 become Triton's own 8000, 8001
    and 8002.

    \b
    Example:
      trtkit deploy render llama-8b.yaml --repository ./models --engine ./engine --target docker
    """
    from trtkit.config_file import load_config

    _print_plan(load_config(config_file), as_json, options)


@command.command()
@click.argument("name", required=False)
@json_option
def status(name: str | None, as_json: bool) -> None:
    """Show deployments that were started from here, or the one called NAME and the versions that it serves.

    \b
    Example:
      trtkit deploy status
      trtkit deploy status tiny-llama --json
    """
    from trtkit.deploy import local

    if name is None:
        local.forget_transient()
    found = [_room(name).status(name)] if name else _look_at_all()
    versions = _versions_of(found[0]) if name else []
    if as_json:
        listed = {"versions": [one.to_dict() for one in versions]}
        print_json(found[0].to_dict() | listed if name else [deployment.to_dict() for deployment in found])
        return
    if not found:
        note("nothing was deployed from here yet")
        return
    rows = [
        (one.name, one.target, _phase(one), one.http_url if one.running else "", one.grpc_url if one.running else "")
        for one in found
    ]
    print_table(("name", "target", "state", "HTTP", "gRPC"), rows)
    if versions:
        states = [(one.model, one.version, one.state, one.reason) for one in versions if one.reason != "unloaded"]
        print_table(("model", "version", "state", "reason"), states)
    for deployment in found:
        if deployment.phase == "unknown":
            note(f"{deployment.name}: {deployment.reason}")
        elif deployment.reason:
            note(f"{deployment.name}: {deployment.reason} (log: {deployment.log_path})")


@command.command()
@click.argument("name")
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, until the deployment ends.")
@click.option("-n", "--lines", type=click.IntRange(0), default=100, show_default=True, help="Lines from the end.")
def logs(name: str, follow: bool, lines: int) -> None:
    """Print what the server of a deployment said.

    \b
    Example:
      trtkit deploy logs tiny-llama -n 20 -f
    """
    for line in _room(name).logs(name, lines, follow=follow):
        click.echo(line)


@command.command()
@click.argument("name", required=False)
@click.option("--all", "everything", is_flag=True, help="Stop every deployment that runs.")
@click.option("--forget", is_flag=True, help="Remove its record and log too; with --all those of all that are over.")
@dry_run_option
@json_option
def down(name: str | None, everything: bool, forget: bool, dry_run: bool, as_json: bool) -> None:
    """Stop a deployment and wait until nothing of it is left.

    \b
    Example:
      trtkit deploy down tiny-llama
      trtkit deploy down --all --forget
    """
    from trtkit.deploy import local

    if bool(name) == everything:
        raise click.UsageError("give the NAME of a deployment, or --all")
    if dry_run:
        _print_what_would_stop(name, forget, as_json)
        return
    if name is None:
        local.forget_transient()
    running = [] if name else [one for one in _look_at_all() if one.running]
    # Those that need no docker first, which might not answer.
    names = [name] if name else [one.name for one in sorted(running, key=lambda one: one.target != "local")]
    stopped = []
    for each in names:
        room = _room(each)
        was_running = room.status(each).running
        deployment = room.down(each, on_progress=note)
        stopped.append(deployment)
        if not as_json:
            what = "stopped" if was_running else f"was not running ({deployment.phase})"
            click.echo(f"{each}: {deployment.reason if deployment.phase == 'unknown' else what}")
    if forget:
        _forget(name)
    if as_json:
        print_json([deployment.to_dict() for deployment in stopped])
    elif not names:
        click.echo("nothing is running")


def _print_what_would_stop(name: str | None, forget: bool, as_json: bool) -> None:
    """From the records alone: looking at a deployment more closely would clear away what is left of a crashed one."""
    from trtkit.deploy import state
    from trtkit.deploy.deployment import damaged, from_record

    known = {each: state.read(state.folder_of(each)) for each in ([name] if name else state.names())}
    found = [damaged(each) if record is None else from_record(record) for each, record in known.items()]
    shown = [one for one in found if name or one.running or forget]
    if as_json:
        print_json([one.to_dict() for one in shown])
        return
    for one in shown:
        where = f"container {one.container}" if one.target == "docker" else f"process {one.pid}"
        over = "would clear away its damaged record" if one.phase == "unknown" else f"is not running ({one.phase})"
        also = " and forget it" if forget and one.phase != "unknown" else ""
        click.echo(f"{one.name}: {f'would stop {where}' if one.running else over}{also}")
    if not shown:
        click.echo("nothing is running")


def _versions_of(deployment: Deployment) -> list[ModelVersion]:
    from trtkit.deploy.versions import versions_of

    return versions_of(deployment) if deployment.phase == "running" else []


def _forget(name: str | None) -> None:
    """Forgets a deployment that is over, or all that are."""
    from contextlib import suppress

    from trtkit.deploy import local, state
    from trtkit.errors import InputError

    for each in [name] if name else state.names():
        with suppress(InputError):  # a damaged one went with `down`
            if local.forget(each):
                note(f"{each}: forgotten")


def _room(name: str) -> ModuleType:
    """The module of the target that a deployment runs on."""
    from trtkit.deploy import docker, local, state

    record = state.read(state.folder_of(name)) or {}
    return docker if record.get("target") == "docker" else local


def _look_at_all() -> list[Deployment]:
    """Status of all: a docker that does not answer hides only its own deployments."""
    from dataclasses import replace

    from trtkit.deploy import state
    from trtkit.deploy.deployment import from_record
    from trtkit.errors import InputError, LacksError

    found = []
    for name in state.names():
        record = state.read(state.folder_of(name))
        try:
            found.append(_room(name).status(name))
        except LacksError as error:
            if record is not None:
                found.append(replace(from_record(record), reason=error.cause))
        except InputError:  # forgotten meanwhile
            continue
    return found


def _target(config: BuildConfig, options: dict[str, Any]) -> str:
    return str(options["target"] or config.deploy.target)


def _local_spec(config: BuildConfig, options: dict[str, Any]) -> Any:
    from dataclasses import replace

    from trtkit.deploy.local import spec_from_config

    spec = spec_from_config(config, options["repository"], options["name"])
    return replace(spec, tritonserver=options["tritonserver"], pass_environment=options["pass_env"])


def _docker_options(options: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": options["name"],
        "model_path_in_container": options["model_path_in_container"],
        "pass_environment": options["pass_env"],
        "user": options["user"],
    }


def _print_plan(config: BuildConfig, as_json: bool, options: dict[str, Any]) -> None:
    from trtkit.deploy import docker, local

    if _target(config, options) == "docker":
        run = docker.render(config, options["repository"], options["engine"], **_docker_options(options))
        for finding in run.findings:
            note(f"{finding.severity}: {finding.cause} (fix: {finding.fix})")
        data, line = run.to_dict(), run.shell_line()
    else:
        argv = local.plan(_local_spec(config, options))
        data, line = {"argv": argv}, shlex.join(argv)
    if as_json:
        print_json(data)
    else:
        click.echo(line)


def _warn_of_exposure(host: str) -> None:
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback:
        note(f"warning: listening on {host} lets other machines in, without authentication")


def _phase(deployment: Deployment) -> str:
    if deployment.phase != "running":
        return deployment.phase
    return "ready" if deployment.ready else "running, not ready"
