"""From a store into a local repository."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from trtkit import bytecode, pbtxt
from trtkit.errors import CheckFailedError, InputError, LacksError
from trtkit.remote import parse
from trtkit.remote.objects import Objects
from trtkit.remote.stores import RemoteObject
from trtkit.repository import swap
from trtkit.repository.diff import diff_configs
from trtkit.repository.remote.manifest import MARKER, Manifest, complete, manifest_of, sha256_of
from trtkit.repository.remote.transfers import Progress, Transfer, as_transfer, counted, in_parallel
from trtkit.repository.version_policy import parse_policy, with_policy
from trtkit.store import atomic_dir, digest

_POLICY = re.compile(r"^# version policy of the source: (\S+)$", re.MULTILINE)


def pull(
    url: str,
    repository: Path,
    *,
    models: Sequence[str] = (),
    dry_run: bool = False,
    on_progress: Progress | None = None,
) -> Transfer:
    """Brings the complete versions in a store into a local repository, verified by their SHA-256.

    A repository that is not there yet appears at once, and a killed pull of it goes on with what it had. Into one that
    is there, each missing version comes by one rename, and the config after it, as a polling server wants it.

    Raises:
        InputError: nothing that trtkit pushed is at `url`, or a version is here with other content.
        CheckFailedError: what was downloaded is not what was pushed.
        LacksError: as `push`.
    """
    objects = Objects(parse(url))
    listed = objects.listing()
    manifests = complete(objects, listed, models)
    configs = {name: _restored(objects, name) for name in {manifest.model: None for manifest in manifests}}
    here = repository.is_dir() and any(repository.iterdir())
    todo = [manifest for manifest in manifests if not (here and _is_here(repository, manifest))]
    changed = [name for name, text in configs.items() if not here or _differs(repository / name, name, text)]
    moved = tuple(as_transfer(manifest, manifest in todo) for manifest in manifests)
    if not dry_run:
        with counted(on_progress, sum(manifest.size for manifest in todo)) as count:
            if here:
                _pull_into(objects, listed, repository, _steps_first(todo, configs), configs, changed, count)
            else:
                _pull_whole(objects, listed, repository, todo, configs, count)
    return Transfer(objects.location.url, str(repository), moved, tuple(changed), done=not dry_run)


def _restored(objects: Objects, model: str) -> str:
    """The text of a model's config with the policy that it was pushed with."""
    there = objects.get(f"{model}/config.pbtxt")
    if there is None:
        raise InputError(
            f"{objects.location.url}/{model} has no config.pbtxt yet", "push again; its first push was interrupted"
        )
    text = there[0].decode("utf-8", errors="replace")
    config = pbtxt.loads(text, f"{objects.location.url}/{model}/config.pbtxt")
    policy = _POLICY.search(text)
    if policy is None:
        return text
    return pbtxt.dumps(with_policy(config, parse_policy(policy[1])))


def _is_here(repository: Path, manifest: Manifest) -> bool:
    folder = repository / manifest.model / str(manifest.version)
    if not folder.is_dir():
        return False
    if manifest_of(folder, manifest.model, manifest.version) != manifest:
        raise InputError(
            f"{folder} has other content than what was pushed, and versions are never overwritten",
            "pull into another folder",
        )
    return True


def _differs(directory: Path, name: str, text: str) -> bool:
    file = directory / "config.pbtxt"
    return not file.is_file() or any(True for _ in diff_configs(pbtxt.load(file), pbtxt.loads(text, name)))


def _pull_whole(
    objects: Objects,
    listed: dict[str, RemoteObject],
    repository: Path,
    manifests: list[Manifest],
    configs: dict[str, str],
    count: Callable[[int], None],
) -> None:
    key = digest({"url": objects.location.url, "files": [manifest.dumps().decode() for manifest in manifests]})
    try:
        with atomic_dir(repository, resume=key) as folder:
            _fill(objects, listed, folder, manifests, configs, count)
    except _KeptError as kept:
        raise kept.error from kept.error.__cause__


class _KeptError(BaseException):
    """Carries an error past `atomic_dir`, which keeps what is there for the next run as it does at an interrupt."""

    def __init__(self, error: LacksError) -> None:
        super().__init__()
        self.error = error


def _fill(
    objects: Objects,
    listed: dict[str, RemoteObject],
    folder: Path,
    manifests: list[Manifest],
    configs: dict[str, str],
    count: Callable[[int], None],
) -> None:
    try:
        for manifest in manifests:
            _fetch(objects, listed, manifest, folder / manifest.model / str(manifest.version), count)
        for name, text in configs.items():
            (folder / name / "config.pbtxt").write_text(text, encoding="utf-8")
        for name in _others(listed, configs):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            objects.download(listed[name], folder / name, lambda done: None)
    except LacksError as error:  # such as the network: hours of download are not to be lost
        raise _KeptError(error) from error


def _pull_into(
    objects: Objects,
    listed: dict[str, RemoteObject],
    repository: Path,
    manifests: list[Manifest],
    configs: dict[str, str],
    changed: list[str],
    count: Callable[[int], None],
) -> None:
    """What is missing, each by one rename: files beside the versions, versions, new models, and then the configs."""
    root = repository.resolve()
    with swap.locked(root):
        known = [name for name in _others(listed, configs) if (root / name).parent.is_dir()]
        for name in [name for name in known if not (root / name).exists()]:
            with swap.staging_beside(root) as staging:
                objects.download(listed[name], staging / "file", lambda done: None)
                (staging / "file").replace(root / name)
        for manifest in manifests:
            with swap.staging_beside(root) as staging:
                staged = staging / manifest.model / str(manifest.version)
                _fetch(objects, listed, manifest, staged, count)
                directory = root / manifest.model
                if directory.is_dir():
                    with swap.noticed(directory):
                        swap.publish(staged, directory / str(manifest.version))
                else:
                    _complete_model(objects, listed, staged.parent, configs[manifest.model])
                    swap.publish(staged.parent, directory)
        for name in changed:
            if _differs(root / name, name, configs[name]):
                swap.write_config(root, root / name, configs[name])


def _complete_model(objects: Objects, listed: dict[str, RemoteObject], folder: Path, config: str) -> None:
    """Adds to a new model what belongs to no version. Without its config a server would complain."""
    (folder / "config.pbtxt").write_text(config, encoding="utf-8")
    for name in _others(listed, {folder.name: config}):
        if name != MARKER:
            target = folder.parent / name
            target.parent.mkdir(parents=True, exist_ok=True)
            objects.download(listed[name], target, lambda done: None)


def _steps_first(manifests: list[Manifest], configs: dict[str, str]) -> list[Manifest]:
    """Ensembles last: a server that polls looks for their steps at once."""
    ensembles = {name for name, text in configs.items() if pbtxt.loads(text, name).platform == "ensemble"}
    return sorted(manifests, key=lambda manifest: (manifest.model in ensembles, manifest.model, manifest.version))


def _others(listed: dict[str, RemoteObject], models: dict[str, str]) -> Iterator[str]:
    """Objects that belong to no version: the repository's marker, and what lies beside the versions of these models."""
    for name in listed:
        parts = name.split("/")
        beside = (
            parts[0] in models and len(parts) > 1 and not parts[1].isdecimal() and name != f"{parts[0]}/config.pbtxt"
        )
        if beside or name == MARKER:
            yield name


def _fetch(
    objects: Objects,
    listed: dict[str, RemoteObject],
    manifest: Manifest,
    folder: Path,
    count: Callable[[int], None],
) -> None:
    """Downloads a version, file by file to a name of its digest, which becomes the file once it is verified."""
    parts = folder.parent / f".{folder.name}.parts"
    parts.mkdir(parents=True, exist_ok=True)

    def download(name: str) -> None:
        size, digest = manifest.files[name]
        target = folder / name
        if not (target.is_file() and sha256_of(target) == digest):
            remote = f"{manifest.model}/{manifest.version}/{name}"
            if remote not in listed:
                raise InputError(f"{objects.location.url}/{remote} is gone", "push that version under another number")
            part = parts / hashlib.sha256(name.encode()).hexdigest()
            objects.download(listed[remote], part, lambda done: None)
            if (part.stat().st_size, sha256_of(part)) != (size, digest):
                part.unlink()
                raise CheckFailedError(
                    f"{objects.location.url}/{remote} is not what was pushed: its SHA-256 differs",
                    "push that version under another number",
                )
            part.touch()
            target.parent.mkdir(parents=True, exist_ok=True)
            part.replace(target)
        count(size)

    in_parallel(download, list(manifest.files))
    parts.rmdir()
    bytecode.compile_folder(folder)
