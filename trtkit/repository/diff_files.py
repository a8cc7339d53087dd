"""What changed in the files of a model directory: by key where a file is JSON or YAML, by content elsewhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BIG = 64 * 2**20
"""Files above this many bytes are not parsed: a tokenizer.json of the largest vocabularies has 40 MB."""


@dataclass(frozen=True)
class FileChange:
    """A file or one key of it. `before` or `after` is empty where it is not there at all."""

    file: str
    path: str
    before: str
    after: str


def compare_files(first: Path, second: Path) -> Iterator[FileChange]:
    """Differences between the files of two model directories, config.pbtxt, bytecode and hidden files left out."""
    files = [_files(first), _files(second)]
    for name in sorted(set(files[0]) | set(files[1])):
        sides = [files[side].get(name) for side in (0, 1)]
        if sides[0] is None or sides[1] is None:
            before, after = (_digest(path) if path is not None else "" for path in sides)
            yield FileChange(name, "", before, after)
        elif not _same(sides[0], sides[1]):
            yield from _contents(name, sides[0], sides[1])


def _files(folder: Path) -> dict[str, Path]:
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in name.parts)
        if path.is_file() and not hidden and str(name) != "config.pbtxt":
            found[name.as_posix()] = path
    return found


def _contents(name: str, first: Path, second: Path) -> Iterator[FileChange]:
    """Differences between two files whose bytes differ; none when they say the same in another format."""
    if first.name == "chat_template.jinja":
        yield FileChange(name, "chat_template", _digest(first), _digest(second))
        return
    values = [_parsed(first), _parsed(second)]
    if not all(isinstance(value, (dict, list)) for value in values):
        yield FileChange(name, "", _digest(first), _digest(second))
    elif first.name == "tokenizer.json" and all(isinstance(value, dict) for value in values):
        for path, before, after in _tokenizers(values[0], values[1]):
            yield FileChange(name, path, before, after)
    else:
        for path, before, after in _values(values[0], values[1], ""):
            yield FileChange(name, path, before, after)


def _parsed(path: Path) -> Any:
    """What a JSON or YAML file says; None for other files and for what cannot be read."""
    if path.suffix not in (".json", ".yaml", ".yml") or path.stat().st_size > _BIG:
        return None
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return json.loads(text)
        import yaml

        return yaml.safe_load(text)
    except Exception:  # whatever it is, its bytes differ
        return None


def _values(first: Any, second: Any, path: str) -> Iterator[tuple[str, str, str]]:
    """Differences between two parsed values as (path, before, after)."""
    if isinstance(first, dict) and isinstance(second, dict):
        for key in sorted({*map(str, first), *map(str, second)}):
            place = f"{path}.{key}" if path else key
            sides = [{str(name): value for name, value in side.items()} for side in (first, second)]
            if key not in sides[1]:
                yield place, _shown(sides[0][key], place), ""
            elif key not in sides[0]:
                yield place, "", _shown(sides[1][key], place)
            else:
                yield from _values(sides[0][key], sides[1][key], place)
    elif type(first) is not type(second) or first != second:
        yield path, _shown(first, path), _shown(second, path)


def _tokenizers(first: dict[str, Any], second: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Differences between two tokenizer.json: a vocabulary in numbers, added tokens one by one, the rest by key."""
    vocabularies = [_vocabulary(side) for side in (first, second)]
    added = [_added(side) for side in (first, second)]
    sizes = [len({*vocabulary, *tokens}) for vocabulary, tokens in zip(vocabularies, added, strict=True)]
    if sizes[0] != sizes[1]:
        yield "vocabulary size", str(sizes[0]), str(sizes[1])
    if vocabularies[0] != vocabularies[1]:
        gone, new = (len(set(a) - set(b)) for a, b in (vocabularies, vocabularies[::-1]))
        other = sum(token in vocabularies[1] and vocabularies[1][token] != at for token, at in vocabularies[0].items())
        yield "model.vocab", f"{gone} tokens gone", f"{new} tokens new, {other} with another id or score"
    for token in sorted(set(added[0]) | set(added[1])):
        sides = [side.get(token) for side in added]
        if sides[0] != sides[1]:
            kind = "special_tokens" if any(side and side.get("special") for side in sides) else "added_tokens"
            before, after = ("" if side is None else _shown(side, "") for side in sides)
            yield f"{kind}[{token}]", before, after
    yield from _values(_rest(first), _rest(second), "")


def _vocabulary(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Token to id (BPE, WordPiece, WordLevel) or to place and score (Unigram)."""
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, dict):
        return vocabulary
    return {str(entry[0]): (number, entry[1]) for number, entry in enumerate(vocabulary)}


def _added(tokenizer: dict[str, Any]) -> dict[str, Any]:
    return {str(token.get("content")): token for token in tokenizer.get("added_tokens") or []}


def _rest(tokenizer: dict[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in tokenizer.items() if key not in ("added_tokens", "model")}
    model = tokenizer.get("model") or {}
    return rest | {"model": {key: value for key, value in model.items() if key != "vocab"}}


def _shown(value: Any, path: str) -> str:
    """A value in few words; a long one by its size and digest."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    if len(text) <= 100 and "chat_template" not in path:
        return text
    return f"{len(text)} characters, sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _same(first: Path, second: Path) -> bool:
    return first.stat().st_size == second.stat().st_size and _digest(first) == _digest(second)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return f"sha256 {digest.hexdigest()[:12]}"
