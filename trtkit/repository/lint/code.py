"""Lint rules about the code of a python model. It is parsed and never run."""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trtkit.findings import Finding
from trtkit.repository.lint.repository import Model
from trtkit.repository.lint.rules import finding

CLASS = "TritonPythonModel"
HELPER = "serving"
"""The package that generated models bring along."""
GIVEN = {"triton_python_backend_utils", "c_python_backend_utils"}
"""Modules that the server provides."""
TRUST = "trust_remote_code"


@dataclass(frozen=True)
class Code:
    """What a file of Python says.

    Attributes:
        problem: why it cannot be compiled; `line` is where.
        has_class: whether the name TritonPythonModel is given a meaning.
        imports: modules that are imported at the top of the file, by their whole name, with the line.
        trusts: lines on which code from elsewhere is trusted (trust_remote_code=True).
    """

    problem: str = ""
    line: int | None = None
    has_class: bool = False
    imports: tuple[tuple[str, int], ...] = ()
    trusts: tuple[int, ...] = ()


@functools.lru_cache(maxsize=1024)  # repositories hold the same file many times
def parse(code: bytes) -> Code:
    """Reads Python code."""
    try:
        tree = ast.parse(code)
        compile(tree, "model.py", "exec")
    except (SyntaxError, ValueError, RecursionError) as error:
        return Code(problem=str(getattr(error, "msg", error)), line=getattr(error, "lineno", None))
    return Code(has_class=_binds_class(tree), imports=_imports(tree), trusts=_trusts(tree, code))


def lint_code(model: Model) -> Iterator[Finding]:
    """Findings about model.py in every version that is served."""
    if model.is_ensemble or model.backend != "python":
        return
    name = model.config.default_model_filename or "model.py"
    for version in model.served_versions():
        file = model.path / str(version) / name
        place = f"{model.name}/{version}/{name}"
        if not file.is_file():
            cause = f"{name} is missing, and the server would wait for it without end"
            yield finding("TK107", place, cause, f"add {name}")
            continue
        code = parse(file.read_bytes())
        if code.problem:
            yield finding("TK108", f"{place}:{code.line}" if code.line else place, code.problem, "mend the syntax")
            continue
        if not code.has_class:
            yield finding("TK125", place, f"no class {CLASS}", f"define it: the server makes one {CLASS} per instance")
        # A packed environment has modules that nobody here can see.
        if "EXECUTION_ENV_PATH" not in model.config.parameters:
            yield from _missing(code, file, place, is_local=model.server.is_local)


def _missing(code: Code, file: Path, place: str, *, is_local: bool) -> Iterator[Finding]:
    for full, line in code.imports:
        name = full.partition(".")[0]
        if name == HELPER:
            path = file.parent.joinpath(*full.split("."))
            if path.with_suffix(".py").is_file() or path.is_dir():
                continue
        elif name in GIVEN or _is_installed(name) or _is_beside(name, file):
            continue
        rule = "TK126" if name == HELPER else "TK127"
        cause = f"module '{full if name == HELPER else name}' is neither beside {file.name} nor installed here"
        fix = "generate the repository again" if name == HELPER else "make sure that the server's Python has it"
        yield finding(rule, f"{place}:{line}", cause, fix, severity="error" if is_local else None)


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


def _imports(tree: ast.Module) -> tuple[tuple[str, int], ...]:
    """Imports at the top of the file; those in a `try` or a function may be meant to fail."""
    found: dict[tuple[str, int], None] = {}
    for node in tree.body:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module]
        else:
            continue
        found |= {(name, node.lineno): None for name in names}
    return tuple(found)


def _trusts(tree: ast.Module, code: bytes) -> tuple[int, ...]:
    if TRUST.encode() not in code:
        return ()
    lines = []
    for node in ast.walk(tree):
        value: ast.expr | None = None
        if isinstance(node, ast.keyword) and node.arg == TRUST:
            value = node.value
        elif isinstance(node, ast.Dict):
            keys = [key.value if isinstance(key, ast.Constant) else None for key in node.keys]
            value = node.values[keys.index(TRUST)] if TRUST in keys else None
        if isinstance(value, ast.Constant) and value.value is True:
            lines.append(value.lineno)
    return tuple(sorted(lines))


def _is_beside(name: str, file: Path) -> bool:
    """In the folder of the version or of the model, which the python backend both puts on the path."""
    for folder in (file.parent, file.parents[1]):
        if (folder / name).is_dir() or any(folder.glob(f"{name}.py")) or any(folder.glob(f"{name}.*so")):
            return True
    return False


@functools.cache
def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # ValueError: a module in memory that has no spec
        return True
