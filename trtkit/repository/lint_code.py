"""Lint rules about the code of a python model. It is parsed and never run."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from trtkit.findings import Finding
from trtkit.repository.lint_rules import Model, finding

CLASS = "TritonPythonModel"
HELPERS = {"encoder", "detokenizer"}
"""Modules that generated models bring along."""
GIVEN = {"triton_python_backend_utils", "c_python_backend_utils"}
"""Modules that the server provides."""


def lint_code(model: Model) -> Iterator[Finding]:
    """Findings about model.py in every version that is served."""
    if model.config.backend != "python" or model.is_ensemble:
        return
    name = model.config.default_model_filename or "model.py"
    for version in model.served_versions():
        file = model.path / str(version) / name
        place = f"{model.name}/{version}/{name}"
        if not file.is_file():
            yield finding(
                "TK107", place, f"{name} is missing, and the server would wait for it without end", f"add {name}"
            )
            continue
        try:
            code = file.read_bytes()
            compile(code, str(file), "exec")
            tree = ast.parse(code)
        except (SyntaxError, ValueError) as error:
            line = getattr(error, "lineno", None)
            yield finding(
                "TK108", f"{place}:{line}" if line else place, str(getattr(error, "msg", error)), "mend the syntax"
            )
            continue
        if not _binds_class(tree):
            yield finding("TK125", place, f"no class {CLASS}", f"define it: the server makes one {CLASS} per instance")
        # A packed environment has modules that nobody here can see.
        if "EXECUTION_ENV_PATH" not in model.config.parameters:
            yield from _imports(tree, file, place)


def _binds_class(tree: ast.Module) -> bool:
    """Whether the name of the class is given a meaning somewhere; a star import may do that too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == CLASS:
            return True
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id == CLASS:
            return True
        if isinstance(node, ast.ImportFrom) and {alias.asname or alias.name for alias in node.names} & {CLASS, "*"}:
            return True
    return False


def _imports(tree: ast.Module, file: Path, place: str) -> Iterator[Finding]:
    """Imports at the top of the file; those in a `try` or a function may be meant to fail."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module]
        else:
            continue
        for name in dict.fromkeys(full.partition(".")[0] for full in names):
            if name in GIVEN or _is_beside(name, file) or _is_installed(name):
                continue
            rule = "TK126" if name in HELPERS else "TK127"
            cause = f"module '{name}' is neither beside {file.name} nor installed here"
            fix = "generate the repository again" if name in HELPERS else "make sure that the server's Python has it"
            yield finding(rule, f"{place}:{node.lineno}", cause, fix)


def _is_beside(name: str, file: Path) -> bool:
    """In the folder of the version or of the model, which the python backend both puts on the path."""
    for folder in (file.parent, file.parents[1]):
        if (folder / name).is_dir() or any(folder.glob(f"{name}.py")) or any(folder.glob(f"{name}.*so")):
            return True
    return False


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # ValueError: a module in memory that has no spec
        return True
