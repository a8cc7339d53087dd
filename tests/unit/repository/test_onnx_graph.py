"""ONNX graphs as Triton's tensors: types, dynamic axes, batches, weights in other files, and what Triton has not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from trtkit.contract import Tensor
from trtkit.errors import InputError
from trtkit.repository.layouts.onnx_graph import read_graph

Shape = list[int | str | None]


def value(name: str, shape: Shape, kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def write(path: Path, inputs: list[Any], outputs: list[Any], **more: Any) -> Path:
    """A model that passes its inputs on."""
    nodes = [helper.make_node("Identity", [a.name], [b.name]) for a, b in zip(inputs, outputs, strict=True)]
    body = helper.make_graph(nodes, "g", inputs, outputs, more.get("weights", []))
    path.write_bytes(helper.make_model(body).SerializeToString())
    return path


@pytest.mark.parametrize(
    ("shapes", "batched"),
    [
        ([["batch", 3], ["batch", "n"]], True),
        ([[None, 3], [None]], True),
        ([["batch", 3], [None]], True),
        ([["batch"], ["batch", 2]], True),
        ([["batch", 3], ["rows", 3]], False),
        ([["batch", 3], [1, 3]], False),
        ([[2, 3]], False),
    ],
)
def test_a_graph_is_batched_where_all_tensors_begin_with_the_same_axis(
    shapes: list[Shape], batched: bool, tmp_path: Path
) -> None:
    inputs = [value(f"i{n}", shape) for n, shape in enumerate(shapes)]
    outputs = [value(f"o{n}", shape) for n, shape in enumerate(shapes)]
    path = write(tmp_path / "m.onnx", inputs, outputs)
    found = read_graph(path)
    assert found.batched is batched
    for tensor, shape in zip(found.inputs, shapes, strict=True):
        sizes = tuple(dim if isinstance(dim, int) else -1 for dim in (shape[1:] if batched else shape))
        assert (tensor.dims, tensor.scalar) == ((sizes, False) if sizes else ((1,), True))
    assert not read_graph(path, batch=False).batched
    if not batched:
        with pytest.raises(InputError, match=r"serving\.onnx\.batch is on"):
            read_graph(path, batch=True)


TYPES = {
    TensorProto.FLOAT: "FP32", TensorProto.FLOAT16: "FP16", TensorProto.DOUBLE: "FP64", TensorProto.BOOL: "BOOL",
    TensorProto.STRING: "STRING", TensorProto.INT8: "INT8", TensorProto.INT16: "INT16", TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT64", TensorProto.UINT8: "UINT8", TensorProto.UINT16: "UINT16",
    TensorProto.UINT32: "UINT32", TensorProto.UINT64: "UINT64",
}  # fmt: skip


@given(
    kinds=st.lists(st.sampled_from(list(TYPES)), min_size=1, max_size=4),
    dims=st.lists(st.integers(1, 99) | st.just("n"), max_size=3),
)
def test_names_types_and_dims_are_the_graphs(
    kinds: list[int], dims: list[int | str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("graph") / "m.onnx"
    inputs = [value(f"in {n}", ["b", *dims], kind) for n, kind in enumerate(kinds)]
    outputs = [value(f"out/{n}", ["b", *dims], kind) for n, kind in enumerate(kinds)]
    found = read_graph(write(path, inputs, outputs))
    sizes = tuple(-1 if isinstance(dim, str) else dim for dim in dims)
    expected = [(sizes or (1,), TYPES[kind]) for kind in kinds]
    for tensors, names in ((found.inputs, "in {}"), (found.outputs, "out/{}")):
        assert [tensor.name for tensor in tensors] == [names.format(n) for n in range(len(kinds))]
        assert [(tensor.dims, tensor.dtype) for tensor in tensors] == expected


def test_weights_are_no_inputs_even_where_old_files_list_them(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((2, 3), np.float32), "w")
    inputs, outputs = [value("x", ["b", 2]), value("w", [2, 3])], [value("y", ["b", 2]), value("v", [2, 3])]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    body = helper.make_graph(nodes, "g", inputs, outputs[:1], [weight])
    onnx.save(helper.make_model(body, ir_version=3, opset_imports=[helper.make_opsetid("", 9)]), tmp_path / "m.onnx")
    assert [tensor.name for tensor in read_graph(tmp_path / "m.onnx").inputs] == ["x"]


def with_outside_weights(folder: Path, location: str = "deep/weights.bin") -> Path:
    weight = numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    body = helper.make_graph(nodes, "g", [value("x", ["b", 64])], [value("y", ["b", 64])], [weight])
    (folder / location).parent.mkdir(parents=True, exist_ok=True)
    onnx.save(
        helper.make_model(body), folder / "m.onnx", save_as_external_data=True, location=location, size_threshold=0
    )
    return folder / "m.onnx"


def test_files_with_weights_are_found(tmp_path: Path) -> None:
    assert read_graph(with_outside_weights(tmp_path)).data_files == ("deep/weights.bin",)
    assert read_graph(with_outside_weights(tmp_path, "w.bin")).data_files == ("w.bin",)


def test_lost_weights_are_an_error(tmp_path: Path) -> None:
    path = with_outside_weights(tmp_path)
    (tmp_path / "deep" / "weights.bin").unlink()
    with pytest.raises(InputError, match="weights"):
        read_graph(path)


def test_weights_of_a_branch_are_found(tmp_path: Path) -> None:
    """An If node holds graphs of its own."""
    branches = []
    for name in ("yes", "no"):
        weight = numpy_helper.from_array(np.ones(4, np.float32), f"w_{name}")
        weight.data_location = TensorProto.EXTERNAL
        entry = weight.external_data.add()
        entry.key, entry.value = "location", f"{name}.bin"
        weight.ClearField("raw_data")
        (tmp_path / f"{name}.bin").write_bytes(bytes(16))
        node = helper.make_node("Identity", [f"w_{name}"], [f"r_{name}"])
        branches.append(helper.make_graph([node], name, [], [value(f"r_{name}", [4])], [weight]))
    node = helper.make_node("If", ["c"], ["y"], then_branch=branches[0], else_branch=branches[1])
    body = helper.make_graph([node], "g", [value("c", [1], TensorProto.BOOL)], [value("y", [4])])
    path = tmp_path / "m.onnx"
    path.write_bytes(helper.make_model(body).SerializeToString())
    assert read_graph(path).data_files == ("no.bin", "yes.bin")


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (value("x", [], TensorProto.FLOAT), "'x' is a scalar"),
        (value("x", ["b"], TensorProto.BFLOAT16), "'x' has type BFLOAT16"),
        (helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, ["b"]), "'x' is a sequence"),
        (value("x", ["b", 0]), "an axis of size 0"),
        (helper.make_tensor_value_info("x", TensorProto.FLOAT, None), "shape"),
    ],
)
def test_tensors_that_triton_has_not(tensor: Any, words: str, tmp_path: Path) -> None:
    other = type(tensor).FromString(tensor.SerializeToString())
    other.name = "y"
    with pytest.raises(InputError) as caught:
        read_graph(write(tmp_path / "m.onnx", [tensor], [other]))
    assert words in caught.value.cause
    assert str(tmp_path / "m.onnx") in caught.value.cause


@pytest.mark.parametrize("content", [None, b"", b"not a model", b"\x08\x07"])
def test_files_that_are_no_model(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"m\.onnx"):
        read_graph(path)


def test_a_scalar_beside_a_batch_becomes_one_of_the_batch(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", [value("x", ["b"])], [value("y", ["b"])])
    assert read_graph(path).outputs == (Tensor("y", "FP32", (1,), scalar=True),)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_damaged_file_is_read_or_an_error_for_the_user(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write(tmp_path_factory.mktemp("graph") / "m.onnx", [value("x", ["b", 3])], [value("y", ["b", 3])])
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    try:
        found = read_graph(path)
    except InputError as error:
        assert "m.onnx" in error.cause
    else:
        assert all(tensor.dims for tensor in (*found.inputs, *found.outputs))
