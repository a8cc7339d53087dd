"""Bytecode of python models, made before a server that polls sees them. Standard library only.

Python writes `__pycache__` beside the modules that it imports. A polling Triton takes that for a change of the version
and loads it a second time, beside the first: seconds for a tokenizer, and the memory of a second engine for an LLM. The
python backend's interpreter knows no environment variable that would keep it from writing, so the files are there
before. They are recognised by the source's digest, so that copies of them count too.
"""

from __future__ import annotations

import compileall
import py_compile
from pathlib import Path

FOLDER = "__pycache__"


def compile_folder(folder: Path) -> None:
    """Compiles every module below `folder` for this Python. What cannot be compiled or written is left alone."""
    compileall.compile_dir(folder, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)


def compile_models(repository: Path) -> None:
    """`compile_folder` for every version of every model in a repository."""
    for version in repository.glob("*/*"):
        if version.name.isdecimal() and version.is_dir() and not version.parent.name.startswith("."):
            compile_folder(version)
