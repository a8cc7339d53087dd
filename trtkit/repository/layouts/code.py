"""The Python files of trtkit's own models, as they are copied into a repository.

A model is one `model.py`; most bring the package `serving/` along, of which they get the modules that they import,
directly or not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from trtkit.repository.layouts.job import Files

MODELS = Path(__file__).parents[1] / "models"
PACKAGE = "serving"


def model_code(source: str, model: str | None = None, *, also: tuple[str, ...] = ()) -> Files:
    """One of trtkit's own models, as version 1 of `model`.

    Args:
        source: its folder in trtkit/repository/models.
        also: modules of the serving package that are imported by a name known only when the model runs, such as
            `engines/triton`.
    """
    file = MODELS / source / "model.py"
    files: Files = {"model.py": file.read_bytes()}
    wanted = [*_imports(file, PurePosixPath()), *map(PurePosixPath, also)]
    seen: set[PurePosixPath] = set()
    while wanted:
        module = wanted.pop()
        if module in seen:
            continue
        seen.add(module)
        path = MODELS / PACKAGE / f"{module}.py"
        files[f"{PACKAGE}/{module}.py"] = path.read_bytes()
        wanted += _imports(path, module)
        wanted.append(module.parent / "__init__")
    return {f"{model or source}/1/{name}": content for name, content in sorted(files.items())}


def _imports(file: Path, module: PurePosixPath) -> Iterator[PurePosixPath]:
    """Modules of the serving package that a file imports, as paths inside of it."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        names = node.module.split(".")
        if node.level:
            yield module.parents[node.level - 1].joinpath(*names)
        elif names[0] == PACKAGE:
            yield PurePosixPath(*names[1:])
