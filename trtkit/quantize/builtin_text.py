"""The text that is always there: what trtkit brings, mixed with the documentation and code of Python's own library.

Calibration looks at how large the inputs of each layer get, so its text should be as varied as what a model meets in
service, and it must be there without a network. trtkit brings two texts written for this purpose (`text/`): prose of
many kinds and fourteen more languages, questions and answers, arithmetic, code, data and logs. They are shorter than
128 samples of 512 tokens, so the rest comes from what every Python has: the pages behind `help()`
(pydoc_data/topics.py), documentation strings and source code of the standard library.

Held-out text is the other of the two files, and those files of the library that calibration never reads. Which they are
depends on their path alone, and examples/tiny_text.py has the same rule, so the tiny model has not learnt them either.
"""

from __future__ import annotations

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

_PYTHON = ".".join(map(str, sys.version_info[:3]))
ORIGIN = {
    False: f"built-in calibration text and the library of Python {_PYTHON}",
    True: f"built-in held-out text and the library of Python {_PYTHON}",
}

SEPARATOR = "\n%%\n"
"""Between two documents of a text that trtkit brings."""
HELD_OUT_SHARE = 16
"""One file of the standard library in so many is held-out text."""

PIECE = 2000
"""Characters of a piece of the library: short, so that few samples already see many kinds."""
_DOCUMENTATION = " documentation"
_CHARS_PER_TOKEN = 2  # of a tokenizer with few tokens; with another one ours is spread over the first half

# Tests, installed packages, tables of bytes, and what the build of this very Python wrote.
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "idlelib", "lib2to3", "encodings"}
_SKIPPED_PREFIXES = ("_sysconfig", "config-")


def builtin_documents(*, tokens: int, seed: int, held_out: bool) -> Iterator[str]:
    """Texts in an order that `seed` determines: ours, spread over what about `tokens` tokens hold, with library text
    between them; then more of the library until it ends.

    The same seed gives the same text in every Python that has the same library.
    """
    ours = own_documents(held_out=held_out)
    ours.sort(key=lambda text: _rank(seed, text))
    library = library_documents(seed=seed, held_out=held_out)
    size = sum(map(len, ours))
    ratio = max(1.0, (tokens * _CHARS_PER_TOKEN - size) / size)  # of library text to ours; at least as much
    owed = 0.0
    for text in ours:
        yield text
        owed += ratio * len(text)
        while owed > 0 and (piece := next(library, "")):
            yield piece
            owed -= len(piece)
    yield from library


def own_documents(*, held_out: bool) -> list[str]:
    """The documents of one of the two texts that trtkit brings."""
    file = resources.files("trtkit.quantize") / "text" / ("heldout.txt" if held_out else "calibration.txt")
    text = file.read_text(encoding="utf-8")
    return [document.strip("\n") + "\n" for document in text.split(SEPARATOR) if document.strip()]


def library_documents(*, seed: int, held_out: bool) -> Iterator[str]:
    """Pieces of the standard library of at most about `PIECE` characters: one of each file or page, then a second of
    each, and so on. What cannot be read is left out."""
    pages = sorted(_library_pages(held_out=held_out), key=lambda page: _rank(seed, page[0]))
    readers = [_documentation(text) if name.endswith(_DOCUMENTATION) else _cut(text) for name, text in pages]
    while readers:
        left = []
        for reader in readers:
            if piece := next(reader, ""):
                yield piece
                left.append(reader)
        readers = left


def is_held_out(relative: str) -> bool:
    """Whether a file of the library is held-out text, by its path."""
    return hashlib.sha256(relative.encode()).digest()[0] % HELD_OUT_SHARE == 0


def _library_pages(*, held_out: bool) -> Iterator[tuple[str, str]]:
    """(name, text) of the files, twice of those with code, and of the pages of `help()`."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if _SKIPPED.intersection(relative.parts) or any(part.startswith(_SKIPPED_PREFIXES) for part in relative.parts):
            continue
        if is_held_out(relative.as_posix()) is not held_out:
            continue
        try:
            text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
        except (OSError, UnicodeDecodeError):
            continue
        if relative.parts[0] != "pydoc_data":
            yield relative.as_posix(), text
            yield relative.as_posix() + _DOCUMENTATION, text
        elif relative.name == "topics.py":
            yield from _topics(text)


def _topics(source: str) -> Iterator[tuple[str, str]]:
    """The pages of the language reference: the only dict of pydoc_data/topics.py."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Dict):
            yield from ast.literal_eval(node).items()


def _documentation(source: str) -> Iterator[str]:
    """Pieces of what the documentation strings of a file say; the file is parsed when the first is asked for."""
    yield from _cut("\n\n".join(_docstrings(source)))


def _cut(text: str) -> Iterator[str]:
    lines: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        size += len(line)
        if size >= PIECE:
            yield "".join(lines)
            lines, size = [], 0
    rest = "".join(lines)
    if rest.strip():
        yield rest


def _docstrings(source: str) -> list[str]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [text for node in ast.walk(tree) if isinstance(node, kinds) and (text := ast.get_docstring(node))]


def _rank(seed: int, name: str) -> bytes:
    """Where something stands in the order of a seed. A hash, since the orders of random modules differ by version."""
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()
