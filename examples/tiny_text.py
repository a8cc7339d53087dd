"""The text that the tiny model learns: the standard library's source, its docstrings as prose, and chats about them."""

from __future__ import annotations

import ast
import hashlib
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BOS, END, EOT, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|eot|>", "<|pad|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SYSTEM_PROMPT = "You explain the Python standard library."

HELD_OUT_SHARE = 16  # one file in so many is never trained on
# Left out: tests, installed packages, tables of bytes, and what the build of this very Python wrote (it names paths).
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "idlelib", "lib2to3", "encodings"}
SKIPPED_PREFIXES = ("_sysconfig", "config-")


def library_files() -> dict[str, str]:
    """Source text of the standard library by relative path, in path order; files that are not UTF-8 are left out."""
    root = Path(sysconfig.get_path("stdlib"))
    files = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts) or any(p.startswith(SKIPPED_PREFIXES) for p in relative.parts):
            continue
        try:
            files[relative.as_posix()] = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue
    return files


def is_held_out(relative: str) -> bool:
    """Whether a file is never trained on. Depends on nothing but its path, so every Python version agrees."""
    return hashlib.sha256(relative.encode()).digest()[0] % HELD_OUT_SHARE == 0


def docstrings(relative: str, source: str) -> Iterator[tuple[str, str]]:
    """Each (dotted name, docstring) of a module, and the pages of the language reference that pydoc carries."""
    module = re.sub(r"(/__init__)?\.py$", "", relative).replace("/", ".")
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    pending: list[tuple[str, Any]] = [(module, tree)]
    while pending:
        name, node = pending.pop()
        text = ast.get_docstring(node)
        if text:
            yield name, text
        inner = [n for n in node.body if isinstance(n, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))]
        pending.extend((f"{name}.{n.name}", n) for n in reversed(inner))
    if module == "pydoc_data.topics":
        for pages in (node for node in ast.walk(tree) if isinstance(node, ast.Dict)):
            yield from ast.literal_eval(pages).items()


def chats(described: list[tuple[str, str]], chooser: random.Random) -> Iterator[str]:
    """Conversations of one to three questions about one module, as the chat template renders them (without BOS)."""
    pairs = []
    for name, text in described:
        first = re.split(r"(?<=[.!?])\s|\n\s*\n", text, maxsplit=1)[0]
        first = " ".join(first.split())
        if 20 <= len(first) <= 200 and "._" not in name:
            pairs.append((name, first))
    while pairs:
        turns, pairs = pairs[: (size := chooser.randint(1, 3))], pairs[size:]
        opening = f"{SYSTEM}{SYSTEM_PROMPT}{EOT}" if chooser.random() < 0.25 else ""
        yield opening + "".join(f"{USER}What does {n} do?{EOT}{ASSISTANT}{t}{EOT}" for n, t in turns)


def documents(files: dict[str, str], seed: int) -> list[str]:
    """The training text: every file, its docstrings once more as prose, and chats about them; shuffled."""
    chooser = random.Random(seed)
    found = []
    for relative, source in files.items():
        described = list(docstrings(relative, source))
        if not relative.startswith("pydoc_data/"):  # its source is escaped prose; the prose itself is in `described`
            found.append(source + END)
        for start in range(0, len(described), 8):
            found.append("\n\n".join(text for _, text in described[start : start + 8]) + END)
        if not relative.startswith("pydoc_data/"):
            found.extend(chats(described, chooser))
    chooser.shuffle(found)
    return found
