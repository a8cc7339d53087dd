"""Versions of a model: adding one, choosing which are served, going back. Safe beside a server that polls.

What such a server looks at (triton-inference-server/core, src/model_repository_manager, read and measured on 2.51):

- A model changed when the newest time of anything in its directory grew. A file or folder in it that is no version and
  not config.pbtxt, such as a temporary one, has every version of the model loaded anew; a name that begins with digits
  counts as a version. So everything is prepared outside the repository and comes in by one rename, and the time grows.
- Only a version that loads takes the place of those before it. One that fails is tried again at every look.
- A changed version policy alone loads and unloads versions, and leaves the others running.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trtkit import bytecode, pbtxt
from trtkit.errors import CheckFailedError, InputError
from trtkit.findings import Finding
from trtkit.store import remove_abandoned

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
    with opened(repository, model) as (root, directory, config):
        before, policy = version_numbers(directory), policy_text(config)
        number = max(before, default=0) + 1 if version is None else version
        _check_number(directory, number)
        files = _files_to_add(folder)
        with staging_beside(root) as staging:
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
                with noticed(directory):
                    publish(staged, directory / str(number))
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
    with opened(repository, model) as (root, directory, config):
        return _change_policy(root, directory, config, parse_policy(policy), None, dry_run)


def rollback(repository: Path, model: str, *, to: int | None = None, dry_run: bool = False) -> VersionChange:
    """Makes an earlier version the only one that is served, by the policy. No file is removed.

    Args:
        to: that version; None takes the one before the highest that is served.

    Raises:
        InputError: no such model or version, or none before it.
    """
    with opened(repository, model) as (root, directory, config):
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
    with opened(repository, model) as (root, directory, _):
        if version not in version_numbers(directory):
            raise InputError(f"'{model}' has no version {version}", "see its folder for those it has")
        with staging_beside(root) as staging, noticed(directory):
            (directory / str(version)).rename(staging / str(version))
            _sync(directory)


def parse_policy(text: str) -> str:
    """A version policy in its plain form: versions in order, each once.

    Raises:
        InputError: it is none of `latest:N`, `all` and `specific:N,N`.
    """
    kind, _, rest = text.strip().partition(":")
    if text.strip() == "all":
        return "all"
    if kind == "latest" and re.fullmatch(r"[1-9]\d{0,8}", rest):
        return text.strip()
    if kind == "specific" and re.fullmatch(r"\d{1,18}(,\d{1,18})*", rest):
        return "specific:" + ",".join(map(str, sorted({int(number) for number in rest.split(",")})))
    raise InputError(f"'{text}' is no version policy", "write latest:2, all or specific:1,3")


def policy_text(config: Any) -> str:
    """The version policy of a `ModelConfig` message; without one Triton serves the latest version."""
    choice = config.version_policy.WhichOneof("policy_choice")
    if choice == "all":
        return "all"
    if choice == "specific":
        return "specific:" + ",".join(map(str, sorted(set(config.version_policy.specific.versions))))
    return f"latest:{config.version_policy.latest.num_versions}" if choice == "latest" else "latest:1"


def served(versions: Sequence[int], policy: str) -> tuple[int, ...]:
    """The versions that a policy serves, in order."""
    kind, _, rest = policy.partition(":")
    if kind == "latest":
        return tuple(sorted(versions)[max(0, len(versions) - int(rest)) :])
    if kind == "specific":
        wanted = {int(number) for number in rest.split(",") if number}
        return tuple(sorted(wanted & set(versions)))
    return tuple(sorted(versions))


def version_numbers(directory: Path) -> tuple[int, ...]:
    """The versions in a model's directory, in order: folders whose names are numbers without leading zeros."""
    names = [item.name for item in directory.iterdir() if re.fullmatch(r"0|[1-9]\d{0,18}", item.name) and item.is_dir()]
    return tuple(sorted(map(int, names)))


@contextlib.contextmanager
def opened(repository: Path, model: str) -> Iterator[tuple[Path, Path, Any]]:
    """The repository, the model's directory and its config, for as long as nobody else changes versions there."""
    root = repository.expanduser().resolve()
    if not root.is_dir():
        raise InputError(f"{repository} is no model repository", "give the folder that holds the model directories")
    if model in ("", ".", "..") or "/" in model or not (root / model).is_dir():
        names = sorted(item.name for item in root.iterdir() if item.is_dir() and not item.name.startswith("."))
        raise InputError(f"{repository} has no model '{model}'", f"it has {', '.join(names) or 'none'}")
    lock = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield root, root / model, pbtxt.load(root / model / "config.pbtxt")
    finally:
        os.close(lock)


@contextlib.contextmanager
def staging_beside(root: Path) -> Iterator[Path]:
    """A folder beside the repository, on the same filesystem, that nobody serves; gone afterwards.

    Where the repository is a mount of its own, or nothing may be written beside it, the folder is a hidden one inside:
    a server that polls then complains in its log for that time, and one that starts in it fails.
    """
    remove_abandoned(root)
    staging, lock = _claim_beside(root)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(lock)


def _claim_beside(root: Path) -> tuple[Path, int]:
    """A staging folder and the descriptor that holds its lock, without which the next one would remove it."""
    while True:
        staging = _make_beside(root)
        with contextlib.suppress(FileNotFoundError):  # removed before the lock was ours
            lock = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if staging.is_dir():
                return staging, lock
            os.close(lock)


def _make_beside(root: Path) -> Path:
    prefix = f".{root.name}.tmp-"
    with contextlib.suppress(OSError):
        staging = Path(tempfile.mkdtemp(prefix=prefix, dir=root.parent))
        if staging.stat().st_dev == root.stat().st_dev:
            return staging
        staging.rmdir()
    return Path(tempfile.mkdtemp(prefix=prefix, dir=root))


@contextlib.contextmanager
def noticed(directory: Path) -> Iterator[None]:
    """A change inside that a polling server sees, also where files carry times that are yet to come."""
    before = _newest(directory)
    yield
    if _newest(directory) <= before:
        os.utime(directory, ns=(before + 10**6, before + 10**6))


def _newest(folder: Path) -> int:
    times = [folder.stat().st_mtime_ns]
    for item in folder.rglob("*"):
        with contextlib.suppress(OSError):
            times.append(item.stat().st_mtime_ns)
    return max(times)


def _check_number(directory: Path, number: int) -> None:
    if not 1 <= number <= _MAX_VERSION:
        raise InputError(f"{number} is no version number", "give a whole number from 1 on")
    if (directory / str(number)).exists():
        raise InputError(
            f"'{directory.name}' has a version {number} already, and versions are never overwritten",
            "leave --version out for the next free number",
        )


def files_of(folder: Path) -> list[Path]:
    """Paths of the files below a version's folder, relative to it and sorted, without bytecode.

    Raises:
        InputError: it is no folder, or holds what is no file, such as a link to a folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder", "give the folder that holds the files of one version")
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if bytecode.FOLDER in name.parts:
            continue
        mode = path.stat().st_mode if path.exists() else 0
        if stat.S_ISREG(mode):
            found.append(name)
        elif path.is_symlink() or not stat.S_ISDIR(mode):
            raise InputError(f"{path} is neither a file nor a folder of its own", "remove it, or put a copy there")
    return found


def _files_to_add(folder: Path) -> list[Path]:
    found = files_of(folder)
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
            _sync(path)


def publish(staged: Path, target: Path) -> None:
    try:
        staged.rename(target)
    except OSError as error:
        if target.exists():  # by another way than trtkit, since the repository is locked
            raise InputError(f"{target} appeared meanwhile", "run again for the next free number") from error
        raise
    _sync(target.parent)


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
    write_config(root, directory, (comments[0] if comments else "") + text)


def write_config(root: Path, directory: Path, text: str) -> None:
    """Replaces the model's config.pbtxt in one step, so that a polling server sees the change and nothing else."""
    file = directory / "config.pbtxt"
    with staging_beside(root) as staging, noticed(directory):
        staged = staging / "config.pbtxt"
        staged.write_text(text, encoding="utf-8")
        if file.exists():
            shutil.copymode(file, staged)
        with staged.open("rb") as stream:
            os.fsync(stream.fileno())
        staged.replace(file)
        _sync(directory)


def with_policy(config: Any, policy: str) -> Any:
    """A copy of a `ModelConfig` message with another version policy."""
    changed = type(config)()
    changed.CopyFrom(config)
    changed.ClearField("version_policy")
    kind, _, rest = policy.partition(":")
    if kind == "all":
        changed.version_policy.all.SetInParent()
    elif kind == "latest":
        changed.version_policy.latest.num_versions = int(rest)
    else:
        changed.version_policy.specific.versions.extend(int(number) for number in rest.split(","))
    return changed


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


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
