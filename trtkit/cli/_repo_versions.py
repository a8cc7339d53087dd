"""`trtkit repo add-version | set-policy | rollback`, and waiting until a running deployment has taken it over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from trtkit.cli._common import dry_run_option, json_option, note, print_findings, print_json, print_table

if TYPE_CHECKING:
    from trtkit.deploy.deployment import Deployment
    from trtkit.repository.versions import VersionChange

_Function = TypeVar("_Function", bound=Callable[..., Any])
_folder = click.Path(path_type=Path, file_okay=False)


def _wait_options(function: _Function) -> _Function:
    """What all three take alike."""
    options = [
        click.option(
            "--wait-for",
            metavar="DEPLOYMENT",
            help="Return when this deployment serves it; undo the change when that cannot load.",
        ),
        click.option(
            "--timeout", type=click.FloatRange(0, 86400), default=300.0, show_default=True, help="Of --wait-for, s."
        ),
        dry_run_option,
        json_option,
    ]
    for option in reversed(options):
        function = option(function)
    return function


@click.command("add-version")
@click.argument("repository", metavar="REPO", type=_folder)
@click.argument("model")
@click.argument("folder", type=_folder)
@click.option("--version", type=click.IntRange(1), metavar="N", help="Its number [default: the next free one].")
@click.option("--force", is_flag=True, help="Add it although the linter finds errors.")
@_wait_options
def add_version(
    repository: Path,
    model: str,
    folder: Path,
    version: int | None,
    force: bool,
    wait_for: str | None,
    timeout: float,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Add the files of FOLDER to REPO as a new version of MODEL, in one step.

    A server that polls the repository (deploy.model_control: poll) loads it beside the version that serves, and swaps
    when it is ready; no request fails. A version that does not load never takes over: with --wait-for it is reported
    with the server's reason and taken out again.

    \b
    Example:
      trtkit repo add-version ./models llm ./models/llm/1
      trtkit repo add-version ./models llm ./new --wait-for my-llm
    """
    from trtkit.repository import versions

    deployment = _deployment(wait_for, repository)
    log_from = _log_end(deployment)
    change = versions.add_version(repository, model, folder, version=version, force=force, dry_run=dry_run)
    number = change.version or 0
    if not as_json:
        print_findings(list(change.findings), "")
    if number in change.serves:
        _wait(
            deployment,
            change,
            timeout,
            log_from,
            lambda: versions.withdraw(repository, model, number),
            f"version {number} was taken out of the repository again",
        )
    _print(change, as_json, f"version {number} of '{model}' ({change.files} files, {change.bytes} bytes)", deployment)
    if number not in change.serves:
        note(f"version policy {change.policy} does not serve it; see `trtkit repo set-policy`")


@click.command("set-policy")
@click.argument("repository", metavar="REPO", type=_folder)
@click.argument("model")
@click.argument("policy", metavar="latest:N|all|specific:N,N")
@_wait_options
def set_policy(
    repository: Path, model: str, policy: str, wait_for: str | None, timeout: float, dry_run: bool, as_json: bool
) -> None:
    """Say which versions of MODEL are served.

    Requests that name no version get the highest of them. Comments inside config.pbtxt are lost.

    \b
    Example:
      trtkit repo set-policy ./models llm latest:2
      trtkit repo set-policy ./models llm specific:1,3 --wait-for my-llm
    """
    from trtkit.repository import versions

    deployment = _deployment(wait_for, repository)
    log_from = _log_end(deployment)
    change = versions.set_policy(repository, model, policy, dry_run=dry_run)
    _wait_or_restore(repository, deployment, change, timeout, log_from)
    _print(change, as_json, f"version policy of '{model}': {change.policy} (was {change.policy_before})", deployment)


@click.command()
@click.argument("repository", metavar="REPO", type=_folder)
@click.argument("model")
@click.option("--to", type=click.IntRange(0), metavar="N", help="Version [default: the one before what serves now].")
@_wait_options
def rollback(
    repository: Path, model: str, to: int | None, wait_for: str | None, timeout: float, dry_run: bool, as_json: bool
) -> None:
    """Make an earlier version of MODEL the only one that is served. No file is removed.

    It sets the policy specific:N, so versions added later are not served until `trtkit repo set-policy` says so.

    \b
    Example:
      trtkit repo rollback ./models llm
      trtkit repo rollback ./models llm --to 3 --wait-for my-llm
    """
    from trtkit.repository import versions

    deployment = _deployment(wait_for, repository)
    log_from = _log_end(deployment)
    change = versions.rollback(repository, model, to=to, dry_run=dry_run)
    _wait_or_restore(repository, deployment, change, timeout, log_from)
    _print(change, as_json, f"'{model}' back to version {change.version}", deployment)


def _deployment(name: str | None, repository: Path) -> Deployment | None:
    """The running deployment of that name, if it is one that takes over changes in this repository."""
    if name is None:
        return None
    from trtkit.deploy import versions
    from trtkit.deploy.deployment import running

    deployment = running(name)
    versions.check_polls(deployment, repository)
    return deployment


def _log_end(deployment: Deployment | None) -> int:
    from trtkit.deploy import versions

    return 0 if deployment is None else versions.log_end(deployment)


def _wait(
    deployment: Deployment | None,
    change: VersionChange,
    timeout: float,
    log_from: int,
    undo: Callable[[], object],
    undone: str,
) -> None:
    """Waits for the server; what it cannot load is undone, so that it does not try again and again. What is merely slow
    stays: a server that loads cannot be stopped from taking it over."""
    if deployment is None or not change.done:
        return
    from trtkit.deploy import state, versions
    from trtkit.errors import CheckFailedError

    folder, target = state.folder_of(deployment.name), deployment.target
    note(f"waiting until '{deployment.name}' serves version {', '.join(map(str, change.serves))} of '{change.model}'")
    try:
        versions.wait_for_versions(
            deployment,
            change.model,
            change.serves,
            timeout_s=timeout,
            log_from=log_from,
            alive=lambda: target != "local" or state.is_locked(folder),
        )
    except versions.StillLoadingError:
        raise
    except CheckFailedError as error:
        undo()
        raise CheckFailedError(f"{error.cause}; {undone}", error.fix) from error


def _wait_or_restore(
    repository: Path, deployment: Deployment | None, change: VersionChange, timeout: float, log_from: int
) -> None:
    from trtkit.repository import versions

    _wait(
        deployment,
        change,
        timeout,
        log_from,
        lambda: versions.set_policy(repository, change.model, change.policy_before),
        f"the policy is {change.policy_before} again",
    )


def _print(change: VersionChange, as_json: bool, what: str, deployment: Deployment | None) -> None:
    swapped = deployment is not None and change.done
    if as_json:
        print_json(change.to_dict() | {"deployment": deployment.name if deployment and swapped else None})
        return
    serving = ", ".join(map(str, change.serves)) or "none"
    rows = [
        ("versions", ", ".join(map(str, change.versions))),
        ("policy", change.policy),
        ("served", f"{serving} (before: {', '.join(map(str, change.serves_before)) or 'none'})"),
    ]
    if deployment is not None and swapped:
        rows.append(("serves now", f"{serving}, by deployment {deployment.name}"))
    print_table(("what", "value"), rows, title=what if change.done else f"would do: {what}")
