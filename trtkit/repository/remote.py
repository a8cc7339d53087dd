"""Model repositories in object stores: push and pull.

A store has no rename, so a folder cannot appear at once. Below the prefix lie

    MODEL/VERSION/...                     the files, as Triton reads them
    MODEL/config.pbtxt                    with the version policy spelt out: `specific` versions
    trtkit-claim.MODEL.VERSION.json       who may fill that version: the names and digests of its files
    trtkit-version.MODEL.VERSION.json     the same, written last: the version is complete

Every one of these JSON files is written on condition that it is not there, and never again. So of two that push one
version, the first claims it, and the other ends before it wrote a byte, unless it pushes the same: then either finishes
what the other began, and so does the next push after one that was killed.

What readers see: `pull` takes versions with the last file alone. A Triton that reads the bucket itself (s3://, gs://)
sees folders that are being filled, but serves what config.pbtxt lists, and that is one object, written after the
versions that it lists, on condition that it is still the one that was read. The files are in the root, where Triton
looks for folders only: inside a model they would count as changes of it.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trtkit import bytecode, pbtxt
from trtkit.errors import CheckFailedError, InputError, LacksError
from trtkit.remote import parse
from trtkit.remote.objects import Objects, is_plain_path
from trtkit.remote.stores import RemoteObject
from trtkit.repository import versions

Progress = Callable[[int, int], None]

PARALLEL = 4
"""Files under way at once; each is split into several connections by the store's library."""
EMPTY = ".gitkeep"
"""Stands for a version without files, such as an ensemble's: a store knows no empty folders."""

_POLICY = re.compile(r"^# version policy of the source: (\S+)$", re.MULTILINE)
_MANIFEST = re.compile(r"trtkit-version\.(.+)\.(\d+)\.json")
_MARKER = "trtkit-repository.json"


@dataclass(frozen=True)
class Manifest:
    """What a version consists of.

    Attributes:
        files: (size in bytes, SHA-256 in hex) by path inside the version's folder.
    """

    model: str
    version: int
    files: dict[str, tuple[int, str]]

    @property
    def size(self) -> int:
        return sum(size for size, _ in self.files.values())

    def name(self, kind: str) -> str:
        return f"trtkit-{kind}.{self.model}.{self.version}.json"

    def dumps(self) -> bytes:
        """The same for equal content, byte by byte."""
        files = {name: {"size": size, "sha256": digest} for name, (size, digest) in sorted(self.files.items())}
        data = {"format": 1, "model": self.model, "version": self.version, "files": files}
        return json.dumps(data, indent=1, sort_keys=True).encode() + b"\n"


@dataclass(frozen=True)
class VersionTransfer:
    """One version: `present` on both sides already, or `moved` (by a dry run: would be)."""

    model: str
    version: int
    state: str
    files: int
    bytes: int


@dataclass(frozen=True)
class Transfer:
    """What a push or a pull did, or would do.

    Attributes:
        configs: models whose config.pbtxt was written.
        done: False for a dry run.
    """

    url: str
    repository: str
    versions: tuple[VersionTransfer, ...]
    configs: tuple[str, ...]
    done: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def push(
    repository: Path,
    url: str,
    *,
    models: Sequence[str] = (),
    dry_run: bool = False,
    on_progress: Progress | None = None,
) -> Transfer:
    """Brings the versions of a repository into a store, and then their configs. A version is never overwritten.

    Run again, it goes on where it was killed, and what is there already costs one listing.

    Args:
        url: `s3://bucket/prefix` or `gs://bucket/prefix`; credentials and endpoint as for sources.
        models: those alone; empty takes all.
        on_progress: called with (bytes there, bytes of all files).

    Raises:
        InputError: no such repository, model or bucket; or a version is there with other content, or somebody else's.
        LacksError: an extra, credentials, permission or the network is missing.
    """
    objects = Objects(parse(url), write=not dry_run)
    chosen = _models_of(repository, models)
    manifests = [
        manifest_of(repository / name / str(number), name, number)
        for name in chosen
        for number in versions.version_numbers(repository / name)
    ]
    listed = objects.listing()
    todo = [manifest for manifest in manifests if not _is_complete(objects, listed, manifest)]
    moved = tuple(_as_transfer(manifest, manifest in todo) for manifest in manifests)
    if dry_run:
        return Transfer(objects.location.url, str(repository), moved, (), done=False)
    with _counted(on_progress, sum(manifest.size for manifest in todo)) as count:
        for manifest in todo:
            _push_version(objects, repository, manifest, listed, count)
    written = [name for name in chosen if _push_config(objects, repository / name, name)]
    _push_others(objects, repository, chosen, listed)
    return Transfer(objects.location.url, str(repository), moved, tuple(written), done=True)


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
    manifests = _complete(objects, listed, models)
    configs = {name: _restored(objects, name) for name in {manifest.model: None for manifest in manifests}}
    here = repository.is_dir() and any(repository.iterdir())
    todo = [manifest for manifest in manifests if not (here and _is_here(repository, manifest))]
    changed = [name for name, text in configs.items() if not here or _differs(repository / name, name, text)]
    moved = tuple(_as_transfer(manifest, manifest in todo) for manifest in manifests)
    if not dry_run:
        with _counted(on_progress, sum(manifest.size for manifest in todo)) as count:
            if here:
                _pull_into(objects, listed, repository, todo, {name: configs[name] for name in changed}, count)
            else:
                _pull_whole(objects, listed, repository, todo, configs, count)
    return Transfer(objects.location.url, str(repository), moved, tuple(changed), done=not dry_run)


def manifest_of(folder: Path, model: str, version: int) -> Manifest:
    """The manifest of a version's folder, bytecode left out.

    Raises:
        InputError: a file's name cannot be an object's.
    """
    files = {}
    for path in versions.files_of(folder):
        name = path.as_posix()
        if not is_plain_path(name):
            raise InputError(f"{str(folder / path)!r}: a name with control characters or a backslash", "rename it")
        files[name] = ((folder / path).stat().st_size, _sha256(folder / path))
    if not files:
        files[EMPTY] = (0, hashlib.sha256().hexdigest())
    return Manifest(model, version, files)


def _models_of(repository: Path, wanted: Sequence[str]) -> list[str]:
    """The models to push, ensembles last: what serves an ensemble needs its steps."""
    if not repository.is_dir():
        raise InputError(f"{repository} is no model repository", "give the folder that holds the model directories")
    found = {
        item.name: pbtxt.load(item / "config.pbtxt")
        for item in sorted(repository.iterdir())
        if item.is_dir() and (item / "config.pbtxt").is_file() and not item.name.startswith(".")
    }
    _check_known(wanted, found, repository)
    chosen = [name for name in found if not wanted or name in wanted]
    empty = [name for name in chosen if not versions.version_numbers(repository / name)]
    if empty or not chosen:
        what = f"model '{empty[0]}' has no version" if empty else f"{repository} holds no model"
        raise InputError(what, "see `trtkit repo lint`")
    return sorted(chosen, key=lambda name: (found[name].platform == "ensemble", name))


def _check_known(wanted: Sequence[str], found: Sequence[str] | dict[str, Any], where: object) -> None:
    for name in wanted:
        if name not in found:
            raise InputError(f"{where} has no model '{name}'", f"it has {', '.join(sorted(found)) or 'none'}")


def _is_complete(objects: Objects, listed: dict[str, RemoteObject], manifest: Manifest) -> bool:
    """Whether the version is there, as it is here.

    Raises:
        InputError: it is there, or claimed, with other content, or was not brought there by trtkit.
    """
    place = f"{objects.location.url}/{manifest.model}/{manifest.version}"
    for kind in ("version", "claim"):
        if manifest.name(kind) in listed:
            _check_equal(objects, manifest, kind)
            return kind == "version"
    if any(name.startswith(f"{manifest.model}/{manifest.version}/") for name in listed):
        raise InputError(f"{place} holds files that trtkit did not push", "use another version number")
    return False


def _check_equal(objects: Objects, manifest: Manifest, kind: str) -> None:
    there = objects.get(manifest.name(kind))
    if there is None or there[0] == manifest.dumps():
        return
    what = f"{objects.location.url}: version {manifest.version} of '{manifest.model}'"
    if kind == "version":
        raise InputError(
            f"{what} is there with other content, and versions are never overwritten", "use another version number"
        )
    raise InputError(
        f"{what} is being pushed with other content, or that push was interrupted",
        f"use another number; or, if nobody is pushing, remove {manifest.name(kind)} and that version's objects",
    )


def _push_version(
    objects: Objects,
    repository: Path,
    manifest: Manifest,
    listed: dict[str, RemoteObject],
    count: Callable[[int], None],
) -> None:
    """Claims the version, uploads what is not there yet, and says that it is complete."""
    if not objects.put(manifest.name("claim"), manifest.dumps(), expected=None):
        _check_equal(objects, manifest, "claim")
    folder = repository / manifest.model / str(manifest.version)

    def upload(name: str) -> None:
        remote = f"{manifest.model}/{manifest.version}/{name}"
        size, digest = manifest.files[name]
        if not _has_content(listed.get(remote), folder / name, size):
            if name == EMPTY and not (folder / name).exists():
                objects.upload(b"", remote)
            else:
                objects.upload(folder / name, remote)
                if _sha256(folder / name) != digest:
                    raise InputError(f"{folder / name} changed while it was pushed", "push when nobody writes there")
        count(size)

    _in_parallel(upload, list(manifest.files))
    if not objects.put(manifest.name("version"), manifest.dumps(), expected=None):
        _check_equal(objects, manifest, "version")


def _has_content(item: RemoteObject | None, file: Path, size: int) -> bool:
    """Whether an object of an interrupted push is this file: by size, and by MD5 where the listing tells one.

    Only a pusher of the same content may write there, so this is a second line of defence.
    """
    if item is None or item.size != size or not file.is_file():
        return False
    if item.checksum is None or item.checksum[0] != "md5":
        return True
    return _digest(file, "md5") == item.checksum[1].hex()


def _push_config(objects: Objects, directory: Path, model: str) -> bool:
    """Writes the model's config with the complete versions that its policy serves; whether it was another before."""
    config = pbtxt.load(directory / "config.pbtxt")
    policy = versions.policy_text(config)
    name = f"{model}/config.pbtxt"
    for _ in range(100):  # each time somebody else's push was faster, and is then part of ours
        there = objects.get(name)
        complete = [
            int(found[2]) for found in map(_MANIFEST.fullmatch, objects.listing()) if found and found[1] == model
        ]
        serving = versions.served(complete, policy)
        if not serving:
            raise InputError(
                f"policy {policy} of '{model}' serves none of its versions in {objects.location.url} "
                f"({', '.join(map(str, sorted(complete)))})",
                "push the versions that it serves, or change it with `trtkit repo set-policy`",
            )
        fixed = versions.with_policy(config, "specific:" + ",".join(map(str, serving)))
        text = f"# Pushed by trtkit.\n# version policy of the source: {policy}\n"
        data = (text + pbtxt.dumps(fixed).removeprefix(pbtxt.HEADER)).encode()
        if there is not None and there[0] == data:
            return False
        if objects.put(name, data, expected=None if there is None else there[1]):
            return True
    raise InputError(f"{objects.location.url}/{name} never stays the same", "push again when fewer others do")


def _push_others(objects: Objects, repository: Path, models: list[str], listed: dict[str, RemoteObject]) -> None:
    """Files beside the versions, such as labels and warm-up data, which have no version: the last push wins."""
    paths = [repository / _MARKER] if (repository / _MARKER).is_file() else []
    for model in models:
        numbers = {str(number) for number in versions.version_numbers(repository / model)}
        for path in sorted((repository / model).rglob("*")):
            parts = path.relative_to(repository / model).parts
            plain = not any(part.startswith(".") or part == bytecode.FOLDER for part in parts)
            if plain and path.is_file() and parts[0] not in numbers and parts != ("config.pbtxt",):
                paths.append(path)
    for path in paths:
        name = path.relative_to(repository).as_posix()
        if not _has_content(listed.get(name), path, path.stat().st_size):
            objects.upload(path, name)


def _complete(objects: Objects, listed: dict[str, RemoteObject], wanted: Sequence[str]) -> list[Manifest]:
    """The manifests of the complete versions, by model and number."""
    found = [match for match in map(_MANIFEST.fullmatch, sorted(listed)) if match]
    if not found:
        raise InputError(
            f"{objects.location.url} holds no version that trtkit pushed", "check the address, or push there first"
        )
    _check_known(wanted, [match[1] for match in found], objects.location.url)
    manifests = [_loads(objects, match) for match in found if not wanted or match[1] in wanted]
    return sorted(manifests, key=lambda manifest: (manifest.model, manifest.version))


def _loads(objects: Objects, match: re.Match[str]) -> Manifest:
    """A manifest, checked: names in it become paths here."""
    there = objects.get(match[0])
    try:
        data = json.loads(there[0] if there else b"")
        files = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in data["files"].items()}
        manifest = Manifest(str(data["model"]), int(data["version"]), files)
        sound = data["format"] == 1 and (manifest.model, str(manifest.version)) == (match[1], match[2])
    except (ValueError, KeyError, TypeError, AttributeError):
        sound, files = False, {}
    names = [match[1], *files]
    if not sound or not all(map(is_plain_path, names)) or "/" in match[1]:
        raise InputError(f"{objects.location.url}/{match[0]} is damaged", "push that version under another number")
    if any(re.fullmatch(r"[0-9a-f]{64}", digest) is None for _, digest in files.values()):
        raise InputError(f"{objects.location.url}/{match[0]} is damaged", "push that version under another number")
    return manifest


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
    return pbtxt.dumps(versions.with_policy(config, versions.parse_policy(policy[1])))


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
    from trtkit.repository.diff import diff_configs

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
    from trtkit.store import atomic_dir, digest

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
    count: Callable[[int], None],
) -> None:
    root = repository.resolve()
    for manifest in manifests:
        directory = root / manifest.model
        with versions.staging_beside(root) as staging:
            staged = staging / str(manifest.version)
            _fetch(objects, listed, manifest, staged, count)
            if directory.is_dir():
                with versions.noticed(directory):
                    versions.publish(staged, directory / str(manifest.version))
            else:  # a new model comes with its config: without one a server complains
                whole = staging / manifest.model
                whole.mkdir()
                staged.rename(whole / str(manifest.version))
                (whole / "config.pbtxt").write_text(configs[manifest.model], encoding="utf-8")
                versions.publish(whole, directory)
    for name, text in configs.items():
        versions.write_config(root, root / name, text)


def _others(listed: dict[str, RemoteObject], models: dict[str, str]) -> Iterator[str]:
    """Objects that belong to no version: the repository's marker, and what lies beside the versions of these models."""
    for name in listed:
        parts = name.split("/")
        beside = (
            parts[0] in models and len(parts) > 1 and not parts[1].isdecimal() and name != f"{parts[0]}/config.pbtxt"
        )
        if beside or name == _MARKER:
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
        if not (target.is_file() and _sha256(target) == digest):
            remote = f"{manifest.model}/{manifest.version}/{name}"
            if remote not in listed:
                raise InputError(f"{objects.location.url}/{remote} is gone", "push that version under another number")
            part = parts / hashlib.sha256(name.encode()).hexdigest()
            objects.download(listed[remote], part, lambda done: None)
            if (part.stat().st_size, _sha256(part)) != (size, digest):
                part.unlink()
                raise CheckFailedError(
                    f"{objects.location.url}/{remote} is not what was pushed: its SHA-256 differs",
                    "push that version under another number",
                )
            part.touch()
            target.parent.mkdir(parents=True, exist_ok=True)
            part.replace(target)
        count(size)

    _in_parallel(download, list(manifest.files))
    parts.rmdir()
    bytecode.compile_folder(folder)


def _in_parallel(work: Callable[[str], None], names: list[str]) -> None:
    """At the first error nothing further is begun."""
    pool = ThreadPoolExecutor(PARALLEL)
    try:
        for done in [pool.submit(work, name) for name in names]:
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _counted(on_progress: Progress | None, total: int) -> Iterator[Callable[[int], None]]:
    """A function that adds bytes to what is done, from any thread."""
    done, lock = 0, threading.Lock()

    def count(size: int) -> None:
        nonlocal done
        with lock:
            done += size
            if on_progress:
                on_progress(done, total)

    count(0)
    yield count


def _as_transfer(manifest: Manifest, moves: bool) -> VersionTransfer:
    state = "moved" if moves else "present"
    return VersionTransfer(manifest.model, manifest.version, state, len(manifest.files), manifest.size)


def _sha256(path: Path) -> str:
    return _digest(path, "sha256")


def _digest(path: Path, kind: str) -> str:
    digest = hashlib.new(kind, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
