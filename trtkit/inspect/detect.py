"""Which kind of thing a path is, from the names of its files and the keys of its config.json."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, get_args

from trtkit.errors import InputError
from trtkit.inspect.repository import model_folders
from trtkit.inspect.store import artifact_folders
from trtkit.store import MANIFEST
from trtkit.untrusted import printable, read_json, unreadable

Kind = Literal["source", "checkpoint", "engine", "repository", "store"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_ENDINGS = {
    ".safetensors": "give the folder that holds it and its config.json",
    ".engine": "give the folder that holds it and its config.json",
    ".json": "give the folder that holds it",
    ".pbtxt": "give the model repository: the folder that holds the model directories",
    ".yaml": "`trtkit config check` reads build configs",
    ".yml": "`trtkit config check` reads build configs",
}
_EXPECTED = (
    "expected a source (config.json and safetensors files), a checkpoint or engine (config.json and rank files), "
    "a model repository (directories with config.pbtxt) or an artifact store"
)


def detect(path: Path) -> Kind:
    """What a folder holds.

    Raises:
        InputError: no folder, nothing of the kind, or several things at once; says what is there.
    """
    try:
        if not path.is_dir():
            fix = _ENDINGS.get(path.suffix, "give a folder, or a hub id such as owner/name")
            raise InputError(f"{path} is a file, not a folder" if path.exists() else f"{path} does not exist", fix)
        found = _evidence(path)
        if not found:
            raise _nothing(path)
    except OSError as error:
        raise unreadable(Path(error.filename or path), error) from error
    kinds = list(dict.fromkeys(kind for kind, _ in found))
    if len(kinds) > 1:
        seen = "; ".join(f"{kind}: {why}" for kind, why in found)
        ways = " or ".join(f"--kind {kind}" for kind in kinds)
        raise InputError(f"{path} is ambiguous ({seen})", f"say which with {ways}, or move the other files away")
    return kinds[0]


def _evidence(path: Path) -> list[tuple[Kind, str]]:
    """What speaks for which kind."""
    found: list[tuple[Kind, str]] = []
    if (path / "config.json").exists():
        found += _by_keys(read_json(path / "config.json"))
    elif (path / "config.json").is_symlink():
        read_json(path / "config.json")  # raises: a link to nowhere
    else:
        found += _by_name(path, r"model\.safetensors(\.index\.json)?", "source")
    found += _by_name(path, r"rank\d+\.safetensors", "checkpoint") + _by_name(path, r"rank\d+\.engine", "engine")
    models = [folder for folder in model_folders(path) if (folder / "config.pbtxt").is_file()]
    if models:
        found.append(("repository", f"{printable(models[0].name)}/config.pbtxt is there"))
    if not found and artifact_folders(path):
        found.append(("store", f"artifacts ({MANIFEST}) are there"))
    return found


def _by_keys(config: dict[str, Any]) -> list[tuple[Kind, str]]:
    if {"pretrained_config", "build_config"} <= config.keys():
        return [("engine", "config.json has build_config")]
    found: list[tuple[Kind, str]] = []
    if "architecture" in config:
        found.append(("checkpoint", "config.json has architecture"))
    key = next((key for key in ("architectures", "model_type") if key in config), None)
    if key is not None and ("architecture" not in config or key == "architectures"):
        found.append(("source", f"config.json has {key}"))
    return found


def _by_name(path: Path, pattern: str, kind: Kind) -> list[tuple[Kind, str]]:
    first = min((file.name for file in path.iterdir() if re.fullmatch(pattern, file.name)), default=None)
    return [] if first is None else [(kind, f"{first} is there")]


def _nothing(path: Path) -> InputError:
    if (path / "config.pbtxt").is_file():
        return InputError(f"{path} is one model of a repository", f"give the repository: {path.absolute().parent}")
    if (path / "config.json").exists():
        cause = f"{path / 'config.json'} is neither a model's nor a checkpoint's nor an engine's"
        return InputError(f"{cause}: it has none of architectures, architecture, build_config", _EXPECTED)
    names = sorted(printable(item.name, 40) for item in path.iterdir())
    if not names:
        return InputError(f"{path} is empty", _EXPECTED)
    held = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return InputError(f"{path} holds nothing that trtkit knows ({held})", _EXPECTED)
