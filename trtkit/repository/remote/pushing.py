"""From a local repository into a store."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from trtkit import bytecode, pbtxt
from trtkit.errors import InputError
from trtkit.remote import parse
from trtkit.remote.objects import Objects, has_content
from trtkit.remote.stores import RemoteObject
from trtkit.repository.remote.manifest import (
    EMPTY,
    MARKER,
    NAME,
    Manifest,
    check_known,
    manifest_of,
    sha256_of,
)
from trtkit.repository.remote.transfers import Progress, Transfer, as_transfer, counted, in_parallel
from trtkit.repository.version_policy import policy_text, served, version_numbers, with_policy


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
        for number in version_numbers(repository / name)
    ]
    listed = objects.listing()
    todo = [manifest for manifest in manifests if not _is_complete(objects, listed, manifest)]
    moved = tuple(as_transfer(manifest, manifest in todo) for manifest in manifests)
    for name in chosen:
        there = {int(found[2]) for found in map(NAME.fullmatch, listed) if found and found[1] == name}
        _serving(repository / name, [*version_numbers(repository / name), *there], objects.location.url)
    if dry_run:
        return Transfer(objects.location.url, str(repository), moved, (), done=False)
    with counted(on_progress, sum(manifest.size for manifest in todo)) as count:
        for manifest in todo:
            _push_version(objects, repository, manifest, listed, count)
    _push_others(objects, repository, chosen, listed)
    written = [name for name in chosen if _push_config(objects, repository / name, name)]
    return Transfer(objects.location.url, str(repository), moved, tuple(written), done=True)


def _models_of(repository: Path, wanted: Sequence[str]) -> list[str]:
    """The models to push, ensembles last: what serves an ensemble needs its steps."""
    if not repository.is_dir():
        raise InputError(f"{repository} is no model repository", "give the folder that holds the model directories")
    found = {
        item.name: pbtxt.load(item / "config.pbtxt")
        for item in sorted(repository.iterdir())
        if item.is_dir() and (item / "config.pbtxt").is_file() and not item.name.startswith(".")
    }
    check_known(wanted, found, repository)
    chosen = [name for name in found if not wanted or name in wanted]
    empty = [name for name in chosen if not version_numbers(repository / name)]
    if empty or not chosen:
        what = f"model '{empty[0]}' has no version" if empty else f"{repository} holds no model"
        raise InputError(what, "see `trtkit repo lint`")
    return sorted(chosen, key=lambda name: (found[name].platform == "ensemble", name))


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
        # Only a pusher of the same content may write there, so this is a second line of defence.
        if remote not in listed or not has_content(listed[remote], folder / name):
            if name == EMPTY and not (folder / name).exists():
                objects.upload(b"", remote)
            else:
                objects.upload(folder / name, remote)
                if sha256_of(folder / name) != digest:
                    raise InputError(f"{folder / name} changed while it was pushed", "push when nobody writes there")
        count(size)

    in_parallel(upload, list(manifest.files))
    if not objects.put(manifest.name("version"), manifest.dumps(), expected=None):
        _check_equal(objects, manifest, "version")


def _push_config(objects: Objects, directory: Path, model: str) -> bool:
    """Writes the model's config with the complete versions that its policy serves; whether it was another before."""
    config = pbtxt.load(directory / "config.pbtxt")
    policy = policy_text(config)
    name = f"{model}/config.pbtxt"
    for _ in range(100):  # each time somebody else's push was faster, and is then part of ours
        there = objects.get(name)
        complete = [int(found[2]) for found in map(NAME.fullmatch, objects.listing()) if found and found[1] == model]
        serving = _serving(directory, complete, objects.location.url)
        fixed = with_policy(config, "specific:" + ",".join(map(str, serving)))
        text = f"# Pushed by trtkit.\n# version policy of the source: {policy}\n"
        data = (text + pbtxt.dumps(fixed).removeprefix(pbtxt.HEADER)).encode()
        if there is not None and there[0] == data:
            return False
        if objects.put(name, data, expected=None if there is None else there[1]):
            return True
    raise InputError(f"{objects.location.url}/{name} never stays the same", "push again when fewer others do")


def _serving(directory: Path, complete: Collection[int], url: str) -> tuple[int, ...]:
    """The versions that the model's policy serves of those that are, or will be, in the store.

    Raises:
        InputError: none, which a server would refuse.
    """
    policy = policy_text(pbtxt.load(directory / "config.pbtxt"))
    serving = served(sorted(set(complete)), policy)
    if not serving:
        listed = ", ".join(map(str, sorted(set(complete))))
        raise InputError(
            f"policy {policy} of '{directory.name}' serves none of the versions in {url} ({listed})",
            "push the versions that it serves, or change it with `trtkit repo set-policy`",
        )
    return serving


def _push_others(objects: Objects, repository: Path, models: list[str], listed: dict[str, RemoteObject]) -> None:
    """Files beside the versions, such as labels and warm-up data, which have no version: the last push wins."""
    paths = [repository / MARKER] if (repository / MARKER).is_file() else []
    for model in models:
        numbers = {str(number) for number in version_numbers(repository / model)}
        for path in sorted((repository / model).rglob("*")):
            parts = path.relative_to(repository / model).parts
            plain = not any(part.startswith(".") or part == bytecode.FOLDER for part in parts)
            if plain and path.is_file() and parts[0] not in numbers and parts != ("config.pbtxt",):
                paths.append(path)
    for path in paths:
        name = path.relative_to(repository).as_posix()
        if name not in listed or not has_content(listed[name], path):
            objects.upload(path, name)
