"""The wrapper around onnxruntime, as the server calls it: requests share runs and never each other's fate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from trtkit.config_file import parse_config
from trtkit.repository.generate import render_repository

F32, F16, I64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64
TEXT, BOOL = TensorProto.STRING, TensorProto.BOOL


def tensor(name: str, kind: int, *shape: int | str) -> Any:
    return helper.make_tensor_value_info(name, kind, list(shape))


GRAPHS: dict[str, tuple[list[Any], list[Any], list[Any]]] = {
    "linear": (
        [helper.make_node("Add", ["x", "x"], ["twice"])],
        [tensor("x", F32, "batch", "length")],
        [tensor("twice", F32, "batch", "length")],
    ),
    "texts": (
        [helper.make_node("StringConcat", ["a", "b"], ["joined"])],
        [tensor("a", TEXT, "batch", "n"), tensor("b", TEXT, "batch", "n")],
        [tensor("joined", TEXT, "batch", "n")],
    ),
    "numbers": (
        [helper.make_node("Mul", ["i", "j"], ["product"]), helper.make_node("Neg", ["h"], ["negative"])],
        [tensor("i", I64, "batch"), tensor("j", I64, "batch"), tensor("h", F16, "batch", 2)],
        [tensor("product", I64, "batch"), tensor("negative", F16, "batch", 2)],
    ),
    "fixed": (
        [helper.make_node("Not", ["on"], ["off"])],
        [tensor("on", BOOL, 2, 3)],
        [tensor("off", BOOL, 2, 3)],
    ),
    # The rows that the mask keeps: as many as it says, whatever the batch.
    "shrinking": (
        [helper.make_node("Compress", ["x", "keep"], ["kept"], axis=0)],
        [tensor("x", F32, "batch", 2), tensor("keep", BOOL, "batch")],
        [tensor("kept", F32, "batch", 2)],
    ),
    "reshaping": (
        [helper.make_node("MatMul", ["x", "y"], ["z"])],
        [tensor("x", F32, "batch", "n", "m"), tensor("y", F32, "batch", "k", "l")],
        [tensor("z", F32, "batch", "n", "l")],
    ),
}


@pytest.fixture
def onnx_model(tmp_path: Path, load: Callable[..., Any], config_of: Callable[[str], Any]) -> Callable[..., Any]:
    """`onnx_model(name)`: one of GRAPHS in a generated repository, loaded; `spoil` changes its folder before."""

    def make(name: str, spoil: Callable[[Path], None] = lambda folder: None, options: str = "") -> Any:
        nodes, inputs, outputs = GRAPHS[name]
        model = helper.make_model(
            helper.make_graph(nodes, name, inputs, outputs), opset_imports=[helper.make_opsetid("", 20)], ir_version=9
        )
        source = tmp_path / f"{name}.onnx"
        onnx.save(model, source)
        config = parse_config(f"name: t\nmodel: {{source: {source}}}\nserving: {{runtime: onnxruntime, {options}}}\n")
        files: dict[str, Any] = dict(render_repository(config))
        folder = tmp_path / f"{name}-1"
        folder.mkdir(exist_ok=True)
        (folder / "model.py").write_bytes(files["t/1/model.py"])
        (folder / "model.onnx").write_bytes(source.read_bytes())
        spoil(folder)
        return load(folder, config_of(files["t/config.pbtxt"]))

    return make


def texts(*rows: list[str | bytes]) -> Any:
    coded = [[item if isinstance(item, bytes) else item.encode() for item in row] for row in rows]
    return np.array(coded, dtype=object).reshape(len(rows), -1)


def floats(*rows: list[float]) -> Any:
    return np.array(rows, dtype=np.float32)


def count_runs(loaded: Any) -> list[int]:
    """The batch size of every run from now on."""
    sizes: list[int] = []
    session = loaded.model.session

    class Counting:
        @staticmethod
        def run(wanted: list[str], feed: dict[str, Any]) -> Any:
            sizes.append(len(next(iter(feed.values()))))
            return session.run(wanted, feed)

    loaded.model.session = Counting
    return sizes


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(shapes=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=8))
def test_requests_of_one_shape_share_a_run(shapes: list[tuple[int, int]], onnx_model: Any) -> None:
    loaded = onnx_model("linear")
    sizes = count_runs(loaded)
    asked = [np.full(shape, index, np.float32) for index, shape in enumerate(shapes)]
    answers = loaded.ask(*({"x": x} for x in asked))
    for x, answer in zip(asked, answers, strict=True):
        assert answer.error is None
        np.testing.assert_array_equal(answer.tensors["twice"], 2 * x)
    widths = dict.fromkeys(width for _, width in shapes)
    assert sizes == [sum(rows for rows, width in shapes if width == one) for one in widths]


def test_texts_of_all_scripts(onnx_model: Any) -> None:
    loaded = onnx_model("texts")
    one, other = loaded.ask(
        {"a": texts(["ä", "漢"]), "b": texts(["", "🙂"])}, {"a": texts(["x", ""]), "b": texts(["y", ""])}
    )
    assert [text.decode() for text in one.tensors["joined"].reshape(-1)] == ["ä", "漢🙂"]
    assert other.tensors["joined"].tolist() == [[b"xy", b""]]


def test_large_integers_and_half_floats(onnx_model: Any) -> None:
    asked = [
        {"i": np.array([2**40]), "j": np.array([-3]), "h": np.array([[0.5, -65504]], np.float16)},
        {"i": np.array([7, 8]), "j": np.array([1, 2]), "h": np.zeros((2, 2), np.float16)},
    ]
    first, second = onnx_model("numbers").ask(*asked)
    assert first.tensors["product"].tolist() == [-3 * 2**40]
    assert first.tensors["negative"].tolist() == [[-0.5, 65504]]
    assert second.tensors["product"].tolist() == [7, 16]


def test_a_graph_without_batches_runs_each_request_alone(onnx_model: Any) -> None:
    loaded = onnx_model("fixed")
    masks = [np.arange(6).reshape(2, 3) % n == 0 for n in (1, 2, 3)]
    for mask, answer in zip(masks, loaded.ask(*({"on": mask} for mask in masks)), strict=True):
        np.testing.assert_array_equal(answer.tensors["off"], ~mask)


def test_only_the_asked_outputs_are_made(onnx_model: Any) -> None:
    loaded = onnx_model("numbers")
    inputs = {"i": np.array([2]), "j": np.array([3]), "h": np.zeros((1, 2), np.float16)}
    requests = [loaded.request(**inputs), loaded.request(**inputs)]
    requests[1]._names = {"product"}
    both, one = loaded.model.execute(requests)
    assert set(both.tensors) == {"product", "negative"}
    assert set(one.tensors) == {"product"}


GOOD = {"a": texts(["x"]), "b": texts(["y"])}
WRONG: dict[str, dict[str, Any]] = {
    "input 'b' is not UTF-8: byte 0": {"a": texts(["x"]), "b": texts([b"\xff"])},
    "input 'b' is missing": {"a": texts(["x"])},
    "the inputs have different batch sizes: [1, 2]": {"a": texts(["x"], ["z"]), "b": texts(["y"])},
}


@pytest.mark.parametrize("cause", WRONG)
def test_a_wrong_request_fails_alone(onnx_model: Any, cause: str) -> None:
    loaded = onnx_model("texts")
    before, bad, after = loaded.ask(GOOD, WRONG[cause], GOOD)
    assert str(bad.error).startswith(f"onnxruntime: {cause}")
    assert bad.error.code == loaded.triton.TritonError.INVALID_ARG
    for answer in (before, after):
        assert answer.tensors["joined"].tolist() == [[b"xy"]]


@pytest.mark.parametrize(
    "x",
    [np.zeros((1, 2), np.float64), np.zeros((1, 2), np.int32), np.zeros((1, 2, 2), np.float32), texts(["a", "b"])],
    ids=["float64", "int32", "rank", "texts"],
)
def test_a_wrong_dtype_or_rank_fails_alone_and_on_one_line(onnx_model: Any, x: Any) -> None:
    loaded = onnx_model("linear")
    sizes = count_runs(loaded)
    bad, *good = loaded.ask({"x": x}, {"x": floats([1, 2])}, {"x": floats([3, 4])})
    assert bad.error.code == loaded.triton.TritonError.INVALID_ARG
    assert "\n" not in str(bad.error)
    assert [answer.tensors["twice"].tolist() for answer in good] == [[[2, 4]], [[6, 8]]]
    assert sizes == [1, 2]  # the good ones were together, whatever came with them


def test_a_run_that_fails_for_one_is_made_again_for_each(onnx_model: Any) -> None:
    """Sizes that fit by themselves, and not each other: only the run can tell."""
    loaded = onnx_model("reshaping")
    good = {"x": np.ones((1, 2, 3), np.float32), "y": np.ones((1, 3, 2), np.float32)}
    bad = {"x": np.ones((1, 2, 3), np.float32), "y": np.ones((1, 4, 2), np.float32)}
    first, second, third = loaded.ask(bad, good, bad)
    for answer in (first, third):
        assert str(answer.error).startswith("onnxruntime: [ONNXRuntimeError]")
        assert "\n" not in str(answer.error)
    assert second.tensors["z"].tolist() == [[[3, 3], [3, 3]]]


def test_rows_that_do_not_belong_to_a_request_reach_nobody(onnx_model: Any) -> None:
    """A graph whose first axis is no batch, although its shapes look like one."""
    loaded = onnx_model("shrinking")
    all_kept = {"x": floats([1, 2]), "keep": np.array([True])}
    dropped = {"x": floats([3, 4]), "keep": np.array([False])}
    kept, gone, again = loaded.ask(all_kept, dropped, all_kept)
    assert kept.tensors["kept"].tolist() == again.tensors["kept"].tolist() == [[1, 2]]
    assert "output 'kept' has shape [0, 2] for a batch of 1" in str(gone.error)
    assert gone.error.code == loaded.triton.TritonError.INTERNAL


SPOILT: dict[str, Callable[[Path], Any]] = {
    "model.onnx: the file is missing": lambda folder: (folder / "model.onnx").unlink(),
    "model.onnx: [ONNXRuntimeError] : 7 : INVALID_PROTOBUF": lambda folder: (folder / "model.onnx").write_bytes(b"no"),
}


@pytest.mark.parametrize("cause", SPOILT)
def test_a_model_that_cannot_be_loaded_is_one_clear_line(onnx_model: Any, tmp_path: Path, cause: str) -> None:
    with pytest.raises(RuntimeError) as error:
        onnx_model("linear", SPOILT[cause])
    assert cause in str(error.value)
    assert str(error.value).startswith(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_model_of_another_configuration_is_named(onnx_model: Any, tmp_path: Path) -> None:
    onnx_model("linear")
    with pytest.raises(RuntimeError, match=r"its graph and config\.pbtxt do not both have the tensor 'on'"):
        onnx_model("fixed", lambda folder: (folder / "model.onnx").write_bytes((tmp_path / "linear.onnx").read_bytes()))


def test_threads_are_a_number(onnx_model: Any, load: Any, config_of: Any, tmp_path: Path) -> None:
    loaded = onnx_model("linear", options="onnx: {threads: 2}")
    assert loaded.model.session.get_session_options().intra_op_num_threads == 2
    config = {"max_batch_size": 1, "input": [], "output": [], "parameters": {"threads": {"string_value": "two"}}}
    with pytest.raises(RuntimeError, match="parameter 'threads' is 'two', which is no whole number"):
        load(tmp_path / "linear-1", config)
