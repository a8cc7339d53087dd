"""Where calibration and held-out text comes from: what is built in, a local file, or a dataset of the hub."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from trtkit.errors import InputError, LacksError, missing_extra
from trtkit.quantize.builtin_text import ORIGIN, builtin_documents
from trtkit.untrusted import open_plain, parse_json, printable

SUFFIXES = (".txt", ".jsonl", ".parquet", ".npy")
OLDEST_DATASETS = 4
"""Earlier ones may run a Python script that comes with a dataset."""

_LARGEST_LINE = 50_000_000
_BLOCK = 1_000_000
_HUB_NAME = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(/(?P<subset>[\w.-]+))?"
    r"(@(?P<revision>[\w./-]+))?(:(?P<split>[\w.-]+))?"
)
_FORMS = "give a .txt, .jsonl, .parquet or .npy file, or a dataset of the hub: owner/name[/subset][@revision][:split]"

Message = dict[str, Any]


@dataclass(frozen=True)
class Document:
    """A piece of text.

    Attributes:
        text: what it says; empty where `messages` say it.
        messages: a conversation (`role` and `content`), which the tokenizer's chat template makes text of.
        place: where it stands, for errors.
        ends: whether the text ends here; False for all blocks of a large file but the last.
    """

    text: str = ""
    messages: tuple[Message, ...] = ()
    place: str = ""
    ends: bool = True


@dataclass(frozen=True)
class Documents:
    """Text in its own order, read as it is asked for.

    Attributes:
        origin: where it is from, for reports.
    """

    origin: str
    items: Iterator[Document]


def open_documents(text: str | Path | None, *, tokens: int, seed: int, held_out: bool) -> Documents:
    """The text that a user named, or the built-in one.

    Args:
        text: None for the built-in text, a file, or `owner/name[/subset][@revision][:split]` of the hub.
        tokens: about how many will be read; of what is built in, so much is mixed.
        seed, held_out: of the built-in text.

    Raises:
        InputError: there is no such file or dataset, or it has no text; names the line or column.
        LacksError: the extra `calibration` is needed, or the hub cannot be reached.
    """
    if text is None:
        texts = builtin_documents(tokens=tokens, seed=seed, held_out=held_out)
        return Documents(ORIGIN[held_out], (Document(item, place="built-in text") for item in texts))
    path = Path(text).expanduser()
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix in readers and (path.exists() or not _HUB_NAME.fullmatch(str(text))):
        return Documents(f"file:{path.absolute()}", readers[path.suffix](path))
    if path.exists():
        kind = "a folder" if path.is_dir() else f"a file of unknown kind ('{path.suffix}')"
        raise InputError(f"calibration text {path} is {kind}", _FORMS)
    if match := _HUB_NAME.fullmatch(str(text)):
        return _open_hub(match)
    raise InputError(f"calibration text '{printable(text)}' does not exist", _FORMS)


def _read_txt(path: Path) -> Iterator[Document]:
    """One text, in blocks that end at line breaks."""
    with open_plain(path) as file:
        left = b""
        while block := file.read(_BLOCK):
            whole, newline, rest = (left + block).rpartition(b"\n")
            left = rest if newline else left + block
            if newline:
                yield Document(_decoded(path, whole + newline), place=str(path), ends=False)
            elif len(left) > _LARGEST_LINE:
                raise InputError(f"{path}: a line is longer than {_LARGEST_LINE:,} bytes", "is this a text file?")
    yield Document(_decoded(path, left), place=str(path))


def _decoded(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error.reason})", "save the text as UTF-8") from error


def _read_jsonl(path: Path) -> Iterator[Document]:
    with open_plain(path) as file:
        number = 0
        while line := file.readline(_LARGEST_LINE + 1):
            number += 1
            place = f"{path}:{number}"
            if len(line) > _LARGEST_LINE:
                raise InputError(f"{place}: longer than {_LARGEST_LINE:,} bytes", "put one document on each line")
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except ValueError as error:
                raise InputError(f"{place}: not valid JSON ({error})", "put one JSON object on each line") from error
            if not isinstance(row, dict):
                raise InputError(f"{place}: not a JSON object", 'put {"text": "..."} on each line')
            yield _document(row, place)


def _document(row: dict[str, Any], place: str) -> Document:
    """A row with `text`, or else with `messages`; one that leaves both empty (null) is no document.

    Raises:
        InputError: it has neither, or not of the right type.
    """
    text, messages = row.get("text"), row.get("messages")
    if isinstance(text, str):
        return Document(text, place=place)
    if isinstance(messages, list) and messages and all(_is_message(item) for item in messages):
        return Document(messages=tuple(messages), place=place)
    if messages is None and text is None and row.keys() & {"text", "messages"}:
        return Document(place=place, ends=False)
    keys = ", ".join(printable(key, 40) for key in list(row)[:8]) or "nothing"
    raise InputError(
        f"{place}: neither 'text' (a string) nor 'messages' (objects with role and content); it has {keys}",
        "name the column with the text 'text'",
    )


def _is_message(item: object) -> bool:
    return isinstance(item, dict) and isinstance(item.get("role"), str) and isinstance(item.get("content"), str)


def _read_parquet(path: Path) -> Iterator[Document]:
    """Rows of a parquet file, some at a time. Read by pyarrow itself, which `datasets` brings: `datasets` takes the
    brackets and stars in a local path for wildcards."""
    open_plain(path).close()
    parquet = _import("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            names = [name for name in ("text", "messages") if name in file.schema_arrow.names]
            if not names:
                _document(dict.fromkeys(file.schema_arrow.names, 0), str(path))  # raises, naming the columns
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=names):
                for row in batch.to_pylist():
                    number += 1
                    yield _document(row, f"{path}: row {number}")
    except (OSError, ValueError) as error:  # of pyarrow; its own errors are ValueErrors
        reason = printable((str(error) or type(error).__name__).splitlines()[0], 200)
        raise InputError(f"{path}: not a readable parquet file ({reason})", "write the file again") from error


def _import(name: str) -> ModuleType:
    """A module of the extra `calibration`.

    Raises:
        LacksError: it is not installed, or not usable here.
    """
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name in (package, name):
            raise missing_extra(package, "calibration") from None
        raise
    except ImportError as error:  # a pyarrow that wants numpy 2, next to packages that want numpy 1
        reason = printable(error, 200)
        fix = f"install another version of {package}"
        raise LacksError(f"the Python package '{package}' does not work here: {reason}", fix) from error


def _open_hub(match: re.Match[str]) -> Documents:
    """A split of a dataset of the hub, as a stream: only what is read is downloaded, and no code runs.

    The revision becomes the commit that it stands for now, so that the origin in a report names one text for ever.
    """
    text, name, subset, split = match[0], match["name"], match["subset"], match["split"] or "train"
    datasets = _import("datasets")
    version = metadata.version("datasets")
    if int(version.partition(".")[0]) < OLDEST_DATASETS:
        raise LacksError(
            f"datasets {version} may run code that comes with a dataset", f"pip install 'datasets>={OLDEST_DATASETS}'"
        )
    commit = _commit(name, match["revision"])
    try:
        rows = datasets.load_dataset(name, subset, split=split, revision=commit, streaming=True)
    except Exception as error:
        raise _hub_failure(text, error) from error
    origin = f"hub:{name}{f'/{subset}' if subset else ''}@{commit}:{split}"
    return Documents(origin, _hub_rows(text, rows))


def _commit(name: str, revision: str | None) -> str:
    import huggingface_hub
    import huggingface_hub.errors as hub

    try:
        return str(huggingface_hub.HfApi().dataset_info(name, revision=revision).sha)
    except hub.GatedRepoError as error:
        fix = f"accept its terms at the hub's page of {name}, then set HF_TOKEN"
        raise LacksError(f"dataset '{name}' is gated and this machine has no access to it", fix) from error
    except hub.RevisionNotFoundError as error:
        raise InputError(f"dataset '{name}' has no revision '{revision}'", "give a commit, tag or branch") from error
    except hub.RepositoryNotFoundError as error:
        raise InputError(f"'{name}' is neither a file here nor a dataset on the hub", _FORMS) from error
    except (hub.HTTPError, OSError) as error:  # type: ignore[attr-defined]
        reason = printable((str(error) or type(error).__name__).splitlines()[0], 200)
        raise LacksError(
            f"cannot reach the hub for dataset '{name}' ({reason})", "use the built-in text, or a file on this machine"
        ) from error


def _hub_rows(text: str, rows: Any) -> Iterator[Document]:
    number = 0
    iterator = iter(rows)
    while True:
        try:
            row = next(iterator, None)
        except Exception as error:  # of any of the libraries that read over the network
            raise _hub_failure(text, error) from error
        if row is None:
            return
        number += 1
        yield _document(row, f"{text}: row {number}")


def _hub_failure(text: str, error: Exception) -> InputError | LacksError:
    reason = printable(" ".join(str(error).split()) or type(error).__name__, 300)
    if "script" in reason:
        return InputError(f"dataset '{text}' is a program, not data ({reason})", "use another dataset, or a local file")
    if isinstance(error, (ValueError, KeyError)):  # an unknown split, a subset that must be chosen
        return InputError(f"dataset '{text}': {reason}", "give owner/name[/subset][@revision][:split]")
    return LacksError(f"dataset '{text}' cannot be read: {reason}", "try again, or give a local file")
