"""Ways to break a model repository."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

Fault = Callable[[Path], None]


def edit(model: str, old: str, new: str, *, count: int = 1) -> Fault:
    """Replaces the regular expression `old` in the model's config.pbtxt."""

    def apply(repository: Path) -> None:
        file = repository / model / "config.pbtxt"
        text, times = re.subn(old, new, file.read_text(), count=count, flags=re.DOTALL)
        assert times, f"{old} is not in {file}"
        file.write_text(text)

    return apply


def append(model: str, text: str) -> Fault:
    def apply(repository: Path) -> None:
        with (repository / model / "config.pbtxt").open("a") as file:
            file.write(text)

    return apply


def remove(path: str) -> Fault:
    def apply(repository: Path) -> None:
        target = repository / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    return apply


def write(path: str, text: str) -> Fault:
    return lambda repository: (repository / path).write_text(text) and None


def both(*steps: Fault) -> Fault:
    def apply(repository: Path) -> None:
        for step in steps:
            step(repository)

    return apply


def move(old: str, new: str) -> Fault:
    return lambda repository: (repository / old).rename(repository / new) and None
