"""Annotations as tensors, read and never run; and the wrapper that calls the function."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtkit import pbtxt
from trtkit.config_file import parse_config
from trtkit.contract import Tensor
from trtkit.errors import InputError
from trtkit.repository.generate import render_repository
from trtkit.repository.layouts.signature import read_signature

HEAD = """
raise SystemExit("this file must not be run")
from collections.abc import Iterator
import typing as t
import numpy as np
from numpy.typing import NDArray
from typing import Annotated, Optional
"""


def signature(tmp_path: Path, code: str, function: str = "infer") -> Any:
    path = tmp_path / "m.py"
    path.write_text(HEAD + code)
    return read_signature(path, function)


@pytest.mark.parametrize(
    ("annotation", "dtype", "dims", "plain", "text"),
    [
        ("NDArray[np.float32]", "FP32", (-1,), False, False),
        ("np.typing.NDArray[numpy.int8]", "INT8", (-1,), False, False),
        ("Annotated[NDArray[np.uint8], -1, 224, 3]", "UINT8", (-1, 224, 3), False, False),
        ("t.Annotated[NDArray[np.bool_], 2]", "BOOL", (2,), False, False),
        ("NDArray[np.str_]", "STRING", (-1,), False, True),
        ("NDArray[np.bytes_]", "STRING", (-1,), False, False),
        ("NDArray[np.float16] | None", "FP16", (-1,), False, False),
        ("Optional[NDArray[np.uint64]]", "UINT64", (-1,), False, False),
        ("Annotated[NDArray[np.int16] | None, -1, 2]", "INT16", (-1, 2), False, False),
        ("'NDArray[np.float64]'", "FP64", (-1,), False, False),
        ("int", "INT64", (1,), True, False),
        ("float", "FP64", (1,), True, False),
        ("bool", "BOOL", (1,), True, False),
        ("str", "STRING", (1,), True, True),
        ("bytes | None", "STRING", (1,), True, False),
        ("np.float32", "FP32", (1,), True, False),
        ("np.uint32", "UINT32", (1,), True, False),
    ],
)
def test_annotations(
    annotation: str, dtype: str, dims: tuple[int, ...], plain: bool, text: bool, tmp_path: Path
) -> None:
    found = signature(tmp_path, f"def infer(x: {annotation}) -> int: ...\n")
    assert found.inputs == (Tensor("x", dtype, dims),)
    assert ("x" in found.plain, "x" in found.texts) == (plain, text)


def test_defaults_make_inputs_optional(tmp_path: Path) -> None:
    code = "def infer(a: int, b: float = 1.0, *, c: str, d: str = 'x') -> bool: ...\n"
    found = signature(tmp_path, code)
    assert [(tensor.name, tensor.optional) for tensor in found.inputs] == [
        ("a", False), ("b", True), ("c", False), ("d", True),
    ]  # fmt: skip
    assert found.outputs == (Tensor("output", "BOOL"),)


def test_outputs_have_names(tmp_path: Path) -> None:
    code = 'def run(a: int) -> tuple[Annotated[NDArray[np.int32], "ids", -1], Annotated[float, "score"]]: ...\n'
    found = signature(tmp_path, code, "run")
    assert found.outputs == (Tensor("ids", "INT32", (-1,)), Tensor("score", "FP64"))
    assert (found.plain, found.streams) == (("a", "score"), False)


def test_a_generator_streams(tmp_path: Path) -> None:
    for kind in ("Iterator[Annotated[str, 'word']]", "t.Generator[Annotated[str, 'word'], None, None]"):
        found = signature(tmp_path, f"def infer(a: int) -> {kind}: ...\n")
        assert (found.streams, found.outputs) == (True, (Tensor("word", "STRING"),))


def test_a_triton_model_may_bring_the_function(tmp_path: Path) -> None:
    code = "class TritonPythonModel:\n    def infer(self, a: int) -> Annotated[int, 'b']: ...\n"
    found = signature(tmp_path, code)
    assert found.is_triton_model
    assert [tensor.name for tensor in found.inputs] == ["a"]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def other(a: int) -> int: ...", "no function 'infer'"),
        ("async def infer(a: int) -> int: ...", ":8: 'infer' is asynchronous"),
        ("def infer() -> int: ...", "no arguments"),
        ("def infer(a) -> int: ...", ":8: 'a' has no annotation"),
        ("def infer(a: int): ...", "the result of 'infer' has no annotation"),
        ("def infer(a: list[int]) -> int: ...", "'a' is annotated as list[int]"),
        ("def infer(a: NDArray[np.complex64]) -> int: ...", "array of np.complex64"),
        ("def infer(a: Annotated[int, 3]) -> int: ...", "single value with dims"),
        ("def infer(a: Annotated[NDArray[np.int8], 0]) -> int: ...", "has 0 in its Annotated"),
        ("def infer(a: Annotated[NDArray[np.int8], N]) -> int: ...", "has N in its Annotated"),
        ("def infer(*a: int) -> int: ...", "*args"),
        ("def infer(a: int) -> tuple[int, str]: ...", "2 outputs, which need a name each"),
        ("def infer(a: int) -> Annotated[int, 'a']: ...", "'a' is an input and an output"),
        ("def infer(a: 'np.[') -> int: ...", "no expression"),
        ("def infer(", "'(' was never closed"),
    ],
)
def test_signatures_that_triton_cannot_have(code: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        signature(tmp_path, code + "\n")
    assert words in caught.value.cause
    assert "m.py" in caught.value.cause
    assert caught.value.fix


names = st.sampled_from(
    ["Annotated", "NDArray", "np.float32", "np.str_", "int", "str", "tuple", "Iterator", "Optional", "None", "()", "-1",
     "3", "'n'", "'m'", "0", "10**9", "99999999999999999999", "x"]
)  # fmt: skip
expressions = st.recursive(
    names,
    lambda inner: (
        st.tuples(names, st.lists(inner, min_size=1, max_size=3)).map(lambda p: f"{p[0]}[{', '.join(p[1])}]")
        | st.tuples(inner, inner).map(" | ".join)
        | inner.map(repr)
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(argument=expressions, result=expressions)
def test_any_annotation_is_a_tensor_or_an_error_for_the_user(
    argument: str, result: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    try:
        found = signature(tmp_path_factory.mktemp("code"), f"def infer(a: {argument}) -> {result}: ...\n")
    except InputError as error:
        assert "m.py" in error.cause
        return
    message = pbtxt.model_config(
        "m", inputs=found.inputs, outputs=found.outputs, max_batch_size=0, decoupled=False, backend="python"
    )
    assert pbtxt.loads(pbtxt.dumps(message)) == message
    assert message.output
    assert all(tensor.name and tensor.dims for tensor in [*message.input, *message.output])


@settings(deadline=None)
@given(code=st.text() | st.binary())
def test_any_file_is_an_error_for_the_user(code: str | bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("code") / "m.py"
    path.write_bytes(code.encode("utf-8", "surrogatepass") if isinstance(code, str) else code)
    with pytest.raises(InputError):
        read_signature(path)


def test_a_file_that_is_nested_too_deeply(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        signature(tmp_path, "def infer(a: " + "(" * 5000 + ")" * 5000 + ") -> int: ...\n")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no Python model at .*gone\.py"):
        read_signature(tmp_path / "gone.py")


CODE = """
from collections.abc import Iterator
from typing import Annotated
import numpy as np
from numpy.typing import NDArray

calls = []

def infer(x: Annotated[NDArray[np.float32], -1], word: str = "?") -> tuple[
    Annotated[NDArray[np.float32], "y", -1], Annotated[NDArray[np.str_], "said", 1]
]:
    calls.append(len(x))
    if x.sum() < 0:
        raise ValueError("negative")
    words = [word] * len(x) if isinstance(word, str) else list(word)
    return x + 1, np.array([[one] for one in words], dtype=object)

def short(x: Annotated[NDArray[np.float32], -1]) -> Annotated[NDArray[np.float32], "y", -1]:
    return x[:1]
"""


def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, triton: Any, function: str = "infer") -> tuple[Any, Any]:
    """The wrapper with the user's file beside it, as it lies in a repository."""
    path = tmp_path / "f.py"
    path.write_text(CODE)
    config = parse_config(
        f"name: t\nmodel: {{source: {path}}}\nserving: {{runtime: python, python: {{function: {function}}}}}\n"
    )
    files = render_repository(config)
    for name in ("model.py", "function.py"):
        (tmp_path / name).write_bytes(files[f"t/1/{name}"])  # type: ignore[arg-type]
    message = pbtxt.loads(files["t/config.pbtxt"])  # type: ignore[arg-type]
    from google.protobuf.json_format import MessageToDict

    given = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    given["parameters"] = {key: {"string_value": item.string_value} for key, item in message.parameters.items()}
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "function", raising=False)
    spec = importlib.util.spec_from_file_location("served_function", tmp_path / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.pb_utils, "triton_string_to_numpy", numpy_type, raising=False)
    monkeypatch.setattr(module.pb_utils.Logger, "log_error", lambda text: None, raising=False)
    model = module.TritonPythonModel()
    model.initialize({"model_config": json.dumps(given)})
    user = sys.modules["function"]
    monkeypatch.delitem(sys.modules, "function")
    return model, user


def numpy_type(name: str) -> Any:
    return {"TYPE_FP32": np.float32, "TYPE_STRING": np.object_}[name]


def row(*numbers: float) -> Any:
    return np.array([numbers], np.float32)


def test_requests_of_one_shape_share_a_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, triton: Any) -> None:
    model, user = served(tmp_path, monkeypatch, triton)
    word = np.array([b"w\xc3\xa4"], dtype=object)  # the server takes the 1 of [batch, 1] off
    bad = np.array([b"\xff"], dtype=object)
    asked: list[dict[str, Any]] = [
        {"x": row(1, 2)}, {"x": row(5)}, {"x": row(3, 4)}, {"x": row(7), "word": word}, {"x": row(-9)},
        {"x": row(0), "word": bad},
    ]  # fmt: skip
    requests = [triton.Request(**tensors) for tensors in asked]
    answers = model.execute(requests)
    good = [answers[index].tensors["y"].tolist() for index in range(4)]
    assert good == [[[2, 3]], [[6]], [[4, 5]], [[8]]]
    assert answers[3].tensors["said"].tolist() == [["wä".encode()]]
    assert "negative" in str(answers[4].error)
    assert "UnicodeDecodeError" in str(answers[5].error)
    assert sorted(user.calls) == [1, 1, 1, 2, 2]  # the call that failed for one was made again for each


def test_an_output_of_another_length_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, triton: Any) -> None:
    model, _ = served(tmp_path, monkeypatch, triton, "short")
    answers = model.execute([triton.Request(x=row(1)), triton.Request(x=row(2))])
    assert [answer.tensors["y"].tolist() for answer in answers] == [[[1]], [[2]]]  # each alone has its one row
    (answer,) = model.execute([triton.Request(x=np.array([[1], [2]], np.float32))])
    assert "'y' has 1 rows for 2 requests" in str(answer.error)
