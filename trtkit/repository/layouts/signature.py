"""A function's annotations as Triton's tensors. The file is parsed and never run.

    from typing import Annotated
    import numpy as np
    from numpy.typing import NDArray

    def infer(
        pixels: Annotated[NDArray[np.uint8], -1, -1, 3],     # UINT8 [-1, -1, 3], required
        threshold: float = 0.5,                              # FP64 [1], optional: it has a default
    ) -> tuple[Annotated[NDArray[np.float32], "scores", -1], Annotated[NDArray[np.str_], "labels", -1]]: ...

An array is `NDArray[T]` (dims [-1]) or `Annotated[NDArray[T], dims...]`; a plain value is `bool`, `int` (INT64),
`float` (FP64), `str`, `bytes` or a numpy scalar type (dims [1]). `X | None` is X, and a default value makes an input
optional. An output's name stands in its `Annotated`; a single one without a name is `output`. A function that returns
`Iterator[X]` is a generator: each value that it yields is one response (a decoupled model).
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

from trtkit.contract_tensors import Tensor
from trtkit.errors import InputError

_NUMPY = {
    "bool_": "BOOL", "bool": "BOOL", "str_": "STRING", "bytes_": "STRING", "object_": "STRING",
    "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64",
    "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64",
    "float16": "FP16", "float32": "FP32", "float64": "FP64",
}  # fmt: skip
_PLAIN = {"bool": "BOOL", "int": "INT64", "float": "FP64", "str": "STRING", "bytes": "STRING"}
_STREAMS = {"Iterator", "Iterable", "Generator"}
_HELP = "see `trtkit repo generate --help` for the forms of annotations"


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of a function.

    Attributes:
        texts: inputs that the function takes as str.
        plain: inputs and outputs that are single values.
        streams: a generator.
        is_triton_model: the file has a TritonPythonModel of its own.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    texts: tuple[str, ...]
    plain: tuple[str, ...]
    streams: bool
    is_triton_model: bool


@dataclass(frozen=True)
class _Type:
    dtype: str
    dims: tuple[int, ...]
    name: str
    plain: bool
    text: bool


def read_signature(path: Path, function: str = "infer") -> Signature:
    """The signature of `function` in a file, at the top level or as a method of its TritonPythonModel.

    Raises:
        InputError: the file or the function is missing, or an annotation is none that Triton has; names the line.
    """
    try:
        tree = ast.parse(path.read_bytes())
    except OSError as error:
        raise InputError(f"no Python model at {path}: {error.strerror}", "give it in serving.python.model") from error
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: nested too deeply
        line = getattr(error, "lineno", None)
        raise InputError(f"{path}:{line or 1}: {getattr(error, 'msg', error)}", "mend the syntax") from error
    node, is_model = _find(path, tree, function)
    inputs, kinds = [], []
    for argument, default in _arguments(path, node, method=is_model):
        place = f"{path}:{argument.lineno}: '{argument.arg}'"
        kind = _read(place, argument.annotation)
        kinds.append((argument.arg, kind))
        inputs.append(Tensor(argument.arg, kind.dtype, kind.dims, optional=default))
    outputs, plain, streams = _outputs(f"{path}:{node.lineno}: the result of '{function}'", node.returns)
    twice = {tensor.name for tensor in inputs} & {tensor.name for tensor in outputs}
    if twice:
        raise InputError(f"{path}:{node.lineno}: '{min(twice)}' is an input and an output", "rename the output")
    if not inputs:
        raise InputError(f"{path}:{node.lineno}: '{function}' has no arguments, so requests could say nothing", _HELP)
    return Signature(
        tuple(inputs),
        outputs,
        tuple(name for name, kind in kinds if kind.text),
        (*(name for name, kind in kinds if kind.plain), *plain),
        streams,
        is_model,
    )


def _find(path: Path, tree: ast.Module, name: str) -> tuple[ast.FunctionDef, bool]:
    bodies = [(tree.body, False)]
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "TritonPythonModel":
            bodies.insert(0, (node.body, True))
    has_class = len(bodies) > 1
    for body, _ in bodies:
        for node in body:
            if isinstance(node, ast.AsyncFunctionDef) and node.name == name:
                raise InputError(f"{path}:{node.lineno}: '{name}' is asynchronous", "make it a plain function")
            if isinstance(node, ast.FunctionDef) and node.name == name:
                return node, has_class
    raise InputError(f"{path}: no function '{name}'", "define it, or name another one in serving.python.function")


def _arguments(path: Path, node: ast.FunctionDef, *, method: bool) -> list[tuple[ast.arg, bool]]:
    """Arguments, and whether each has a default."""
    given = node.args
    if given.vararg or given.kwarg or given.posonlyargs:
        raise InputError(
            f"{path}:{node.lineno}: '{node.name}' has *args, **kwargs or arguments without a name",
            "give every input a name of its own",
        )
    plain = [(one, False) for one in given.args[: len(given.args) - len(given.defaults)]]
    plain += [(one, True) for one in given.args[len(given.args) - len(given.defaults) :]]
    plain += [(one, default is not None) for one, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    return [pair for index, pair in enumerate(plain) if not (method and index == 0 and pair[0].arg == "self")]


def _outputs(place: str, node: ast.expr | None) -> tuple[tuple[Tensor, ...], tuple[str, ...], bool]:
    """Outputs, the names of those that are single values, and whether the function is a generator."""
    node = _unquoted(place, node)
    streams = isinstance(node, ast.Subscript) and _last(node.value) in _STREAMS
    if streams and isinstance(node, ast.Subscript):
        inner = node.slice
        node = _elements(inner)[0] if _elements(inner) else None
    parts: list[ast.expr | None] = [node]
    if isinstance(node, ast.Subscript) and _last(node.value) in ("tuple", "Tuple"):
        parts = [*_elements(node.slice)] or [None]
    kinds = [_read(place, part) for part in parts]
    names = [kind.name or ("output" if len(kinds) == 1 else "") for kind in kinds]
    if "" in names or len(set(names)) < len(names):
        raise InputError(
            f"{place} has {len(names)} outputs, which need a name each", 'Annotated[NDArray[T], "name", -1]'
        )
    named = list(zip(names, kinds, strict=True))
    plain = tuple(name for name, kind in named if kind.plain)
    return tuple(Tensor(name, kind.dtype, kind.dims) for name, kind in named), plain, streams


def _read(place: str, node: ast.expr | None) -> _Type:
    """One annotation."""
    node = _optional(_unquoted(place, node))
    if node is None:
        raise InputError(f"{place} has no annotation", _HELP)
    name, dims = "", None
    if isinstance(node, ast.Subscript) and _last(node.value) == "Annotated":
        parts = _elements(node.slice) or [node]
        node, extras = _optional(parts[0]), [_literal(place, part) for part in parts[1:]]
        name = next((one for one in extras if isinstance(one, str)), "")
        dims = tuple(one for one in extras if isinstance(one, int)) or None
    if isinstance(node, ast.Subscript) and _last(node.value) == "NDArray":
        leaf = _last(node.slice)
        dtype = _NUMPY.get(leaf)
        if dtype is None:
            raise InputError(f"{place} is an array of {ast.unparse(node.slice)}", f"use one of {', '.join(_NUMPY)}")
        return _Type(dtype, dims or (-1,), name, plain=False, text=leaf == "str_")
    leaf = _last(node) if node is not None else ""
    numpy_type = isinstance(node, ast.Attribute)
    dtype = (_NUMPY if numpy_type else _PLAIN).get(leaf)
    if dtype is None:
        shown = ast.unparse(node) if node is not None else "nothing"
        raise InputError(f"{place} is annotated as {shown}, which is no tensor", _HELP)
    if dims not in (None, (1,)):
        raise InputError(f"{place} is a single value with dims", "use NDArray for arrays")
    return _Type(dtype, (1,), name, plain=True, text=leaf in ("str", "str_"))


def _optional(node: ast.expr | None) -> ast.expr | None:
    """X of `X | None` and of `Optional[X]`."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        left, right = node.left, node.right
        if isinstance(right, ast.Constant) and right.value is None:
            return left
        if isinstance(left, ast.Constant) and left.value is None:
            return right
    if isinstance(node, ast.Subscript) and _last(node.value) == "Optional":
        return node.slice
    return node


def _unquoted(place: str, node: ast.expr | None) -> ast.expr | None:
    """The expression in an annotation that is written as a text."""
    if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
        return node
    try:
        return ast.parse(node.value, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"{place} is annotated as {node.value!r}, which is no expression", _HELP) from error


def _literal(place: str, node: ast.expr) -> int | str:
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        value = None
    if isinstance(value, str) and value and value.isprintable():
        return value
    if isinstance(value, int) and not isinstance(value, bool) and (value == -1 or 0 < value < 2**63):
        return value
    raise InputError(f"{place} has {ast.unparse(node)} in its Annotated", "dims are 1 or more, or -1 for any size")


def _elements(node: ast.expr) -> list[ast.expr]:
    """What stands between the brackets of `X[a, b]`."""
    return node.elts if isinstance(node, ast.Tuple) else [node]


def _last(node: ast.expr) -> str:
    """The last name of `a.b.c`."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""
