"""Versions of a model: adding one, choosing which are served, going back. Safe beside a server that polls (`swap`)."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trtkit import bytecode, pbtxt
from trtkit.errors import CheckFailedError, InputError
from trtkit.findings import Finding
from trtkit.repository import swap
from trtkit.repository.version_policy import parse_policy, policy_text, served, version_numbers, with_policy

_MAX_VERSION = 2**63 - 1


@dataclass(frozen=True)
class VersionChange:
    """What a command did to the versions of one model, or would do.

    Attributes:
        version: the one that was added, or is gone back to; None for a new policy.
        versions: all that the model has afterwards, in order.
        policy: the version policy afterwards, such as `latest:1`.
        policy_before: the one before.
        serves: versions that this policy serves; the highest answers requests that name none.
        serves_before: those before.
        done: False for a dry run.
        findings: what the linter says about an added version.
        files, bytes: size of an added version.
    """

    model: str
    version: int | None
    versions: tuple[int, ...]
    policy: str
    policy_before: str
    serves: tuple[int, ...]
    serves_before: tuple[int, ...]
    done: bool
    findings: tuple[Finding, ...] = ()
    files: int = 0
    bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def add_version(
    repository: Path,
    model: str,
    folder: Path,
    *,
    version: int | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> VersionChange:
    """Copies `folder` into the repository as a version of `model`, which appears there whole or not at all.

    Bytecode is left behind and made anew. `folder` stays as it is.

    Args:
        version: its number; None takes the one after the highest.
        force: also when the linter finds errors that the repository did not have before.

    Raises:
        InputError: no such model or folder, the number is taken, or the folder holds nothing or what cannot be copied.
        CheckFailedError: the linter finds new errors.
    """
    with swap.opened(repository, model) as (root, directory, config):
        before, policy = version_numbers(directory), policy_text(config)
        number = max(before, default=0) + 1 if version is None else version
        _check_number(directory, number)
        files = _files_to_add(folder)
        with swap.staging_beside(root) as staging:
            staged = staging / str(number)
            _copy(folder, files, staged)
            bytecode.compile_folder(staged)
            findings = _new_findings(root, directory, config, staged, staging / "view")
            errors = [finding for finding in findings if finding.severity == "error"]
            if errors and not force:
                more = f" ({len(errors) - 1} more errors)" if len(errors) > 1 else ""
                raise CheckFailedError(
                    f"version {number} of '{model}' would not be served: "
                    f"{errors[0].id} {errors[0].place}: {errors[0].cause}{more}",
                    errors[0].fix or "mend it, or add it nevertheless with --force",
                )
            if not dry_run:
                with swap.noticed(directory):
                    swap.publish(staged, directory / str(number))
        size = sum((folder / name).stat().st_size for name in files)
    after = tuple(sorted({*before, number}))
    return VersionChange(
        model, number, after, policy, policy, served(after, policy), served(before, policy), not dry_run,
        tuple(findings), len(files), size,
    )  # fmt: skip


def set_policy(repository: Path, model: str, policy: str, *, dry_run: bool = False) -> VersionChange:
    """Rewrites the version policy in the model's config.pbtxt, in one step; comments inside the file are lost.

    Args:
        policy: `latest:N`, `all` or `specific:N,N`.

    Raises:
        InputError: no such model, no such policy, or one that serves none of the model's versions.
    """
    with swap.opened(repository, model) as (root, directory, config):
        return _change_policy(root, directory, config, parse_policy(policy), None, dry_run)


def rollback(repository: Path, model: str, *, to: int | None = None, dry_run: bool = False) -> VersionChange:
    """Makes an earlier version the only one that is served, by the policy. No file is removed.

    Args:
        to: that version; None takes the one before the highest that is served.

    Raises:
        InputError: no such model or version, or none before it.
    """
    with swap.opened(repository, model) as (root, directory, config):
        versions = version_numbers(directory)
        current = served(versions, policy_text(config))
        listed = ", ".join(map(str, versions)) or "none"
        if to is None:
            earlier = [number for number in versions if current and number < current[-1]]
            if not earlier:
                now = f"version {current[-1]}" if current else "no version"
                raise InputError(
                    f"'{model}' serves {now}, and there is none before it (it has {listed})",
                    "add one with `trtkit repo add-version`",
                )
            to = earlier[-1]
        elif to not in versions:
            raise InputError(f"'{model}' has no version {to} (it has {listed})", "choose one of those with --to")
        return _change_policy(root, directory, config, f"specific:{to}", to, dry_run)


def withdraw(repository: Path, model: str, version: int) -> None:
    """Takes a version out of the repository again and deletes it, such as one that a server could not load.

    Raises:
        InputError: there is no such version.
    """
    with swap.opened(repository, model) as (root, directory, _):
        if version not in version_numbers(directory):
            raise InputError(f"'{model}' has no version {version}", "see its folder for those it has")
        with swap.staging_beside(root) as staging, swap.noticed(directory):
            (directory / str(version)).rename(staging / str(version))
            swap.sync(directory)


def _check_number(directory: Path, number: int) -> None:
    if not 1 <= number <= _MAX_VERSION:
        raise InputError(f"{number} is no version number", "give a whole number from 1 on")
    if (directory / str(number)).exists():
        raise InputError(
            f"'{directory.name}' has a version {number} already, and versions are never overwritten",
            "leave --version out for the next free number",
        )


def _files_to_add(folder: Path) -> list[Path]:
    found = swap.files_of(folder)
    if not found:
        raise InputError(f"{folder} holds no files", "give the folder that holds the files of one version")
    if (folder / "config.pbtxt").is_file():
        raise InputError(f"{folder} is a model's directory, not a version of it", "give one of its numbered folders")
    return found


def _copy(folder: Path, files: list[Path], out: Path) -> None:
    """Copies files so that they survive a loss of power. Their times are new: a polling server goes by them."""
    for name in files:
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, target)
        shutil.copymode(folder / name, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())
    for path in (out, *out.rglob("*")):
        if path.is_dir():
            swap.sync(path)


def _change_policy(
    root: Path, directory: Path, config: Any, policy: str, version: int | None, dry_run: bool
) -> VersionChange:
    versions, before = version_numbers(directory), policy_text(config)
    absent = {int(number) for number in policy[9:].split(",")} - set(versions) if policy.startswith("specific") else ()
    if absent or not versions:
        listed = ", ".join(map(str, versions)) or "none"
        raise InputError(
            f"'{directory.name}' has no version {', '.join(map(str, sorted(absent))) or 'at all'} (it has {listed})",
            "name versions that it has, or add one with `trtkit repo add-version`",
        )
    if not dry_run and policy != before:
        _write_policy(root, directory, config, policy)
    return VersionChange(
        directory.name, version, versions, policy, before, served(versions, policy), served(versions, before),
        not dry_run,
    )  # fmt: skip


def _write_policy(root: Path, directory: Path, config: Any, policy: str) -> None:
    comments = re.match(r"(#[^\n]*\n|\s*\n)*", (directory / "config.pbtxt").read_text(encoding="utf-8"))
    text = pbtxt.dumps(with_policy(config, policy)).removeprefix(pbtxt.HEADER)
    swap.write_config(root, directory, (comments[0] if comments else "") + text)


def _new_findings(root: Path, directory: Path, config: Any, staged: Path, view: Path) -> list[Finding]:
    """What the linter says of the repository with the staged version, and does not say of it without.

    It sees a folder of links. There the new version is served, whatever the policy, for otherwise nothing looks at it.
    """
    from trtkit.repository.lint import lint_repository

    known = {(finding.id, finding.place, finding.cause) for finding in lint_repository(root)}
    (view / directory.name).mkdir(parents=True)
    for item in root.iterdir():
        if item.name != directory.name and not item.name.startswith("."):
            (view / item.name).symlink_to(item)
    for item in (*directory.iterdir(), staged):
        if item.name != "config.pbtxt":
            (view / directory.name / item.name).symlink_to(item)
    versions = (*version_numbers(directory), int(staged.name))
    is_served = int(staged.name) in served(versions, policy_text(config))
    text = (directory / "config.pbtxt").read_text(encoding="utf-8")
    text = text if is_served else pbtxt.dumps(with_policy(config, "all"))
    (view / directory.name / "config.pbtxt").write_text(text, encoding="utf-8")
    found = lint_repository(view)
    return [finding for finding in found if (finding.id, finding.place, finding.cause) not in known]
