"""The wrapper around a user's function, as the server calls it: batches, streams, and what the user's code may do."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trtkit.config_file import parse_config
from trtkit.repository.generate import render_repository

HEAD = """
import sys
from collections.abc import Iterator
from typing import Annotated
import numpy as np
from numpy.typing import NDArray

calls = []
"""

ADD = """
def infer(
    x: Annotated[NDArray[np.float16], -1], times: int = 2, name: str = "nobody"
) -> tuple[Annotated[NDArray[np.float16], "y", -1], Annotated[str, "said"], Annotated[np.int64, "large"]]:
    calls.append(len(x))
    factors = np.broadcast_to(times, len(x)).reshape(-1, 1)
    names = [name] * len(x) if isinstance(name, str) else list(name)
    return (x * factors).astype(np.float16).reshape(x.shape), ["ü" + one for one in names], np.full(len(x), 2**40)
"""

PICKY = """
class OwnError(Exception):
    pass

class Mute(Exception):
    def __str__(self):
        raise TypeError("no words")

def infer(kind: str) -> Annotated[str, "said"]:
    kinds = [kind] if isinstance(kind, str) else list(kind)
    for one in kinds:
        calls.append(one)
        if one == "lines":
            raise OwnError("first\\n  second\\tthird")
        if one == "silent":
            raise OwnError
        if one == "mute":
            raise Mute
        if one == "surrogate":
            raise OwnError("half \\ud83d")
        if one == "exit":
            sys.exit(3)
        if one == "stop":
            raise StopIteration
        if one == "none":
            return [None] * len(kinds)
        if one == "unwritable":
            return ["\\ud83d"] * len(kinds)
    return kinds if not isinstance(kind, str) else kind
"""

COUNT = """
closed = []

def infer(until: int, word: str = "") -> Iterator[tuple[Annotated[int, "number"], Annotated[str, "said"]]]:
    calls.append(until)
    try:
        for number in range(until):
            if word == "fail" and number == 2:
                raise ValueError("two\\nis too many")
            if word == "shape" and number == 1:
                yield number
            yield number, word
    finally:
        closed.append(until)
"""

RETURNS = """
answers = {
    "float": lambda: 1.5, "text": lambda: "1", "none": lambda: None, "large": lambda: 300, "negative": lambda: -1,
    "good": lambda: 255, "numpy": lambda: np.float32(2),
}

def infer(which: str) -> Annotated[np.uint8, "number"]:
    return answers[which]()
"""


@pytest.fixture
def function(tmp_path: Path, load: Callable[..., Any], config_of: Callable[[str], Any]) -> Callable[..., Any]:
    """`function(code)`: the wrapper and this code in a generated repository, loaded; `spoil` changes it before."""

    def make(code: str, *, batch: bool = True, served: str | None = None) -> Any:
        source = tmp_path / "source.py"
        source.write_text(HEAD + code)
        config = parse_config(
            f"name: t\nmodel: {{source: {source}}}\nserving: {{runtime: python, max_batch_size: 8, "
            f"python: {{batch: {str(batch).lower()}}}}}\n"
        )
        files: dict[str, Any] = dict(render_repository(config))
        folder = tmp_path / "1"
        folder.mkdir()
        (folder / "model.py").write_bytes(files["t/1/model.py"])
        if served is None:
            (folder / "function.py").write_bytes(files["t/1/function.py"])
        elif served:
            (folder / "function.py").write_text(served)
        return load(folder, config_of(files["t/config.pbtxt"]))

    return make


def texts(*words: str | bytes) -> Any:
    """A batch of texts; the server takes the 1 of [batch, 1] off."""
    return np.array([word if isinstance(word, bytes) else word.encode() for word in words], dtype=object)


def halves(*rows: list[float]) -> Any:
    return np.array(rows, dtype=np.float16)


def user() -> Any:
    """The user's module."""
    return sys.modules["function"]


def test_requests_with_the_same_arguments_share_a_call(function: Any) -> None:
    loaded = function(ADD)
    x = halves([1, 2])
    answers = loaded.ask(
        {"x": x}, {"x": x, "times": np.array([3])}, {"x": halves([5, 6], [7, 8])}, {"x": halves([0.5])},
        {"x": x, "times": np.array([4])}, {"x": x, "name": texts("漢")},
    )  # fmt: skip
    assert [answer.tensors["y"].tolist() for answer in answers] == [
        [[2, 4]], [[3, 6]], [[10, 12], [14, 16]], [[1]], [[4, 8]], [[2, 4]],
    ]  # fmt: skip
    said = [[text.decode() for text in answer.tensors["said"]] for answer in answers]
    assert said == [["ünobody"], ["ünobody"], ["ünobody"] * 2, ["ünobody"], ["ünobody"], ["ü漢"]]
    assert {answer.tensors["large"].dtype.name for answer in answers} == {"int64"}
    assert answers[2].tensors["large"].tolist() == [2**40] * 2
    assert sorted(user().calls) == [1, 1, 2, 3]


def test_without_batches_single_values_are_plain(function: Any) -> None:
    loaded = function(ADD, batch=False)
    (answer,) = loaded.ask({"x": np.ones(1, np.float16), "times": np.array([3]), "name": texts("ja")})
    assert answer.tensors["said"].tolist() == ["üja".encode()]
    assert user().calls == [1]


@pytest.mark.parametrize("batch", [True, False])
def test_inputs_that_may_be_missing_and_those_that_may_not(function: Any, batch: bool) -> None:
    loaded = function(ADD, batch=batch)
    x = halves([1.0]) if batch else np.ones(1, np.float16)
    bad, good = loaded.ask({"times": np.array([1])}, {"x": x})
    assert str(bad.error) == "input 'x' is missing"
    assert bad.error.code == loaded.triton.TritonError.INVALID_ARG
    assert good.tensors["said"].tolist() == ["ünobody".encode()]


def test_a_batch_of_nothing_but_defaults(function: Any) -> None:
    loaded = function("def infer(a: int = 4) -> Annotated[int, 'b']:\n    return [a] if isinstance(a, int) else a\n")
    assert [answer.tensors["b"].tolist() for answer in loaded.ask({}, {}, {"a": np.array([7])})] == [[4], [4], [7]]


WRONG: dict[str, dict[str, Any]] = {
    "input 'name' is not UTF-8": {"x": halves([1]), "name": texts(b"\xff")},
    "the inputs have different batch sizes: [1, 2]": {"x": halves([1]), "times": np.array([1, 2])},
    "more dimensions than allowed": {"x": halves([1]), "times": np.array([[[1, 2], [3, 4]]])},
    "ValueError: ": {"x": halves([1]), "times": np.array([[1, 2, 3]])},
}


@pytest.mark.parametrize("cause", WRONG)
def test_a_wrong_request_fails_alone(function: Any, cause: str) -> None:
    loaded = function(ADD)
    before, bad, after = loaded.ask({"x": halves([1])}, WRONG[cause], {"x": halves([2])})
    assert cause in str(bad.error)
    assert "\n" not in str(bad.error)
    assert [answer.tensors["y"].tolist() for answer in (before, after)] == [[[2]], [[4]]]


def test_another_dtype_does_not_change_that_of_the_others(function: Any) -> None:
    loaded = function(ADD)
    _, good = loaded.ask({"x": np.ones((1, 1), np.float64)}, {"x": halves([2049])})
    assert good.tensors["y"].tolist() == [[4096]]  # in half precision, 2049 is 2048
    assert user().calls == [1, 1]


RAISED = {
    "lines": "OwnError: first second third",
    "silent": "OwnError",
    "mute": "Mute: an error whose text cannot be made",
    "surrogate": "OwnError: half ?",
    "exit": "SystemExit: 3",
    "stop": "StopIteration",
    "none": "TypeError: output 'said' holds a NoneType where it should have texts",
    "unwritable": "UnicodeEncodeError: 'utf-8' codec can't encode character",
}


@pytest.mark.parametrize("kind", RAISED)
@pytest.mark.parametrize("batch", [True, False])
def test_what_the_function_raises_is_one_line_for_that_client_alone(function: Any, kind: str, batch: bool) -> None:
    loaded = function(PICKY, batch=batch)
    before, bad, after = loaded.ask({"kind": texts("a")}, {"kind": texts(kind)}, {"kind": texts("b")})
    assert str(bad.error).startswith(RAISED[kind])
    assert not [part for part in ("\n", "Traceback", "function.py") if part in str(bad.error)]
    assert bad.error.code == loaded.triton.TritonError.INTERNAL
    assert [before.tensors["said"].tolist(), after.tensors["said"].tolist()] == [[b"a"], [b"b"]]
    (log,) = loaded.triton.Logger.errors
    assert log.startswith("Traceback")


def test_numbers_arrive_as_they_are_or_not_at_all(function: Any) -> None:
    loaded = function(RETURNS, batch=False)
    found = {}
    for which in ("good", "float", "numpy", "text", "none", "large", "negative"):
        (answer,) = loaded.ask({"which": texts(which)})
        found[which] = str(answer.error) if answer.error else answer.tensors["number"].tolist()
    assert found == {
        "good": [255],
        "float": "TypeError: output 'number' is float64 and should be uint8",
        "numpy": "TypeError: output 'number' is float32 and should be uint8",
        "text": "TypeError: output 'number' is <U1 and should be uint8",
        "none": "TypeError: output 'number' is object and should be uint8",
        "large": "OverflowError: output 'number' has numbers that uint8 has not",
        "negative": "OverflowError: output 'number' has numbers that uint8 has not",
    }


@pytest.mark.parametrize(
    ("result", "shape"), [("np.zeros((2, 4))", "[2, 4]"), ("np.zeros((2, 3, 1))", "[2, 3, 1]"), ("[1.0, 2.0]", "[2]")]
)
def test_an_output_of_another_shape_is_named(function: Any, result: str, shape: str) -> None:
    code = f"def infer(x: int) -> Annotated[NDArray[np.float64], 'y', 3]:\n    return {result}\n"
    (answer,) = function(code).ask({"x": np.array([1, 2])})
    assert str(answer.error) == f"ValueError: output 'y' has shape {shape} and should have [-1, 3]"


def test_whole_numbers_become_floats(function: Any) -> None:
    loaded = function("def infer(a: int) -> float:\n    return a if isinstance(a, int) else list(map(int, a))\n")
    (answer,) = loaded.ask({"a": np.array([3, 4])})
    assert answer.tensors["output"].tolist() == [3.0, 4.0]
    assert answer.tensors["output"].dtype == np.float64


def test_ragged_texts_are_no_text(function: Any) -> None:
    code = "def infer(a: int) -> Annotated[NDArray[np.str_], 'words', -1]:\n    return [['a'], ['b', 'c']]\n"
    (answer,) = function(code).ask({"a": np.array([1, 2])})
    assert str(answer.error) == "TypeError: output 'words' holds a list where it should have texts"


@pytest.mark.parametrize("result", ["1, 2", "[1, 2, 3]", "1"])
def test_a_result_of_another_form(function: Any, result: str) -> None:
    pair = "tuple[Annotated[int, 'a'], Annotated[int, 'b'], Annotated[int, 'c']]"
    (answer,) = function(f"def infer(x: int) -> {pair}:\n    return {result}\n", batch=False).ask({"x": np.array([1])})
    assert str(answer.error) == "ValueError: the function must return a tuple of 3"


def stream(loaded: Any, *requests: Any) -> None:
    assert loaded.model.execute(list(requests)) is None
    for request in requests:
        assert request.sender.closed.is_set()


def numbers(request: Any) -> list[int]:
    return [int(piece.tensors["number"][0]) for piece in request.sender.responses if not piece.error]


def test_each_piece_is_a_response(function: Any) -> None:
    loaded = function(COUNT)
    first, none, last = (loaded.request(until=np.array([n]), word=texts("é")) for n in (3, 0, 1))
    stream(loaded, first, none, last)
    assert [numbers(request) for request in (first, none, last)] == [[0, 1, 2], [], [0]]
    assert [piece.tensors["said"].tolist() for piece in first.sender.responses] == [["é".encode()]] * 3
    assert user().closed == [3, 0, 1]


@pytest.mark.parametrize(
    ("word", "message", "count"),
    [("fail", "ValueError: two is too many", 2), ("shape", "ValueError: the function must return a tuple of 2", 1)],
)
def test_a_stream_that_fails_ends_with_the_error(function: Any, word: str, message: str, count: int) -> None:
    loaded = function(COUNT)
    bad, good = loaded.request(until=np.array([9]), word=texts(word)), loaded.request(until=np.array([2]))
    stream(loaded, bad, good)
    assert len(numbers(bad)) == count
    assert str(bad.error) == message
    assert numbers(good) == [0, 1]
    assert user().closed == [9, 2]


def test_a_wrong_request_to_a_generator(function: Any) -> None:
    loaded = function(COUNT)
    missing, shape = loaded.request(), loaded.request(until=np.array([1, 2]))
    stream(loaded, missing, shape)
    assert [str(missing.error), str(shape.error)] == [
        "input 'until' is missing", "input 'until' has shape [2] and must be one value",
    ]  # fmt: skip
    assert user().calls == []


def test_a_client_that_goes_ends_its_generator(function: Any) -> None:
    loaded = function(COUNT)
    going, gone, staying = (loaded.request(until=np.array([n])) for n in (10**9, 5, 3))
    send = going.sender.send

    def leave_after_three(response: Any = None, flags: int = 0) -> None:
        send(response, flags)
        going.sender.cancelled = len(going.sender.responses) == 3

    going.sender.send = leave_after_three  # type: ignore[method-assign]
    gone.sender.cancelled = True
    stream(loaded, going, gone, staying)
    assert numbers(going) == [0, 1, 2]
    assert [(str(one.error), one.error.code) for one in (going, gone) if one.error] == [
        ("cancelled", loaded.triton.TritonError.CANCELLED)
    ] * 2
    assert numbers(staying) == [0, 1, 2]
    assert user().calls == [10**9, 3]  # the one that had gone while it waited was never begun
    assert user().closed == [10**9, 3]
    assert loaded.triton.Logger.errors == []


def test_a_broken_stream_ends_its_generator_and_no_other(function: Any) -> None:
    loaded = function(COUNT)
    broken, healthy = loaded.request(until=np.array([10**9])), loaded.request(until=np.array([2]))
    broken.sender.broken = True
    assert loaded.model.execute([broken, healthy]) is None
    assert numbers(healthy) == [0, 1]
    assert user().closed == [10**9, 2]
    assert "a client could not be told that its stream has ended" in loaded.triton.Logger.errors[-1]


def test_an_iterator_need_not_be_a_generator(function: Any) -> None:
    loaded = function("def infer(n: int) -> Iterator[Annotated[int, 'number']]:\n    return range(n)\n")
    request = loaded.request(n=np.array([2]))
    stream(loaded, request)
    assert numbers(request) == [0, 1]


def test_load_is_called_once_with_the_folder(function: Any, tmp_path: Path) -> None:
    loaded = function(ADD + "\n\ndef load(folder):\n    calls.append(folder)\n")
    loaded.ask({"x": halves([1])})
    assert user().calls == [str(tmp_path / "1"), 1]


OK = "def infer(x: int) -> int:\n    return x\n"
UNLOADABLE = {
    "function.py: the file is missing": "",
    "function.py: no function 'infer'": "def other():\n    pass\n",
    "function.py:2: SyntaxError: '(' was never closed": "x = 1\ny = (\n",
    "function.py:1: ModuleNotFoundError: No module named 'trtkit_has_no_such'": "import trtkit_has_no_such\n",
    "function.py:3: KeyError: 'key'": "def helper():\n    x = {}\n    return x['key']\n\nhelper()\n",
    "function.py:2: OSError: no weights here": f"def load(folder):\n    raise OSError('no weights\\nhere')\n\n{OK}",
    "function.py:2: SystemExit: 1": f"import sys\nsys.exit(1)\n{OK}",
}


@pytest.mark.parametrize("cause", UNLOADABLE)
def test_a_file_that_cannot_be_loaded_is_one_clear_line(function: Any, tmp_path: Path, cause: str) -> None:
    with pytest.raises(RuntimeError) as error:
        function(OK, served=UNLOADABLE[cause])
    assert str(error.value).startswith(f"{tmp_path / '1'}/{cause}")
    assert "\n" not in str(error.value)
    assert error.value.__suppress_context__ or error.value.__context__ is None


def test_the_users_file_wins_over_an_installed_module(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "function", sys)
    loaded = function(OK)
    assert loaded.ask({"x": np.array([5])})[0].tensors["output"].tolist() == [5]
