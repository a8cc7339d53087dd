"""What a version in a store consists of, and the JSON files that say so."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from trtkit.errors import InputError
from trtkit.remote.objects import Objects, is_plain_path
from trtkit.remote.stores import RemoteObject
from trtkit.repository import swap

EMPTY = ".gitkeep"
"""Stands for a version without files, such as an ensemble's: a store knows no empty folders."""

MARKER = "trtkit-repository.json"
"""The file in the root that says who generated the repository (see `trtkit.repository.generate`)."""

NAME = re.compile(r"trtkit-version\.(.+)\.(\d+)\.json")
"""The file that says that a version is complete."""


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


def manifest_of(folder: Path, model: str, version: int) -> Manifest:
    """The manifest of a version's folder, bytecode left out.

    Raises:
        InputError: a file's name cannot be an object's.
    """
    files = {}
    for path in swap.files_of(folder):
        name = path.as_posix()
        if not is_plain_path(name):
            raise InputError(f"{str(folder / path)!r}: a name with control characters or a backslash", "rename it")
        files[name] = ((folder / path).stat().st_size, sha256_of(folder / path))
    if not files:
        files[EMPTY] = (0, hashlib.sha256().hexdigest())
    return Manifest(model, version, files)


def complete(objects: Objects, listed: dict[str, RemoteObject], wanted: Sequence[str]) -> list[Manifest]:
    """The manifests of the complete versions, by model and number."""
    found = [match for match in map(NAME.fullmatch, sorted(listed)) if match]
    if not found:
        raise InputError(
            f"{objects.location.url} holds no version that trtkit pushed", "check the address, or push there first"
        )
    check_known(wanted, [match[1] for match in found], objects.location.url)
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


def check_known(wanted: Sequence[str], found: Collection[str], where: object) -> None:
    """Raises InputError for a wanted model that is not among those found."""
    for name in wanted:
        if name not in found:
            raise InputError(f"{where} has no model '{name}'", f"it has {', '.join(sorted(found)) or 'none'}")


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
