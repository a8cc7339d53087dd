"""Our reader and writer against the format's own library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trtkit.errors import InputError
from trtkit.safetensors_io import Reader, TensorSpec, Writer, read_header

TENSORS = st.dictionaries(
    st.text("abc.", min_size=1, max_size=6),
    st.sampled_from([np.float16, np.float32, np.int8, np.int64]).flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5))
    ),
    min_size=1,
    max_size=5,
)


@given(tensors=TENSORS)
@settings(deadline=None)
def test_reads_what_the_library_writes_and_the_other_way_round(tensors: dict[str, Any], tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("files")
    safetensors.numpy.save_file(tensors, folder / "theirs", metadata={"format": "np"})
    with Reader() as reader:
        for name, entry in read_header(folder / "theirs").items():
            assert reader.tensor(entry).tobytes() == tensors[name].tobytes()
            assert (entry.shape, entry.dtype) == (tensors[name].shape, tensors[name].dtype)
    writer = Writer(folder / "ours", [TensorSpec(name, t.dtype, t.shape) for name, t in tensors.items()])
    for name, tensor in tensors.items():
        flat = tensor.reshape(-1)
        writer.write(name, len(flat) // 2, flat[len(flat) // 2 :])
        writer.write(name, 0, flat[: len(flat) // 2])
    writer.close()
    back = safetensors.numpy.load_file(folder / "ours")
    assert {name: t.tobytes() for name, t in back.items()} == {name: t.tobytes() for name, t in tensors.items()}


def test_bfloat16_is_torchs(tmp_path: Path) -> None:
    values = torch.randn(7, 3).to(torch.bfloat16)
    writer = Writer(tmp_path / "file", [TensorSpec("x", np.dtype(ml_dtypes.bfloat16), (7, 3))])
    writer.write("x", 0, values.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    writer.close()
    assert torch.equal(safetensors.torch.load_file(tmp_path / "file")["x"], values)


def test_what_is_not_written_is_zero(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "file", [TensorSpec("x", np.dtype(np.float32), (2, 2))])
    writer.write("x", 1, np.array([5.0], dtype=np.float32))
    writer.close()
    assert safetensors.numpy.load_file(tmp_path / "file")["x"].tolist() == [[0, 5], [0, 0]]


def test_rows(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
    safetensors.numpy.save_file({"pad": np.zeros(3, np.int8), "x": values}, tmp_path / "file")
    with Reader() as reader:
        entry = read_header(tmp_path / "file")["x"]
        assert np.array_equal(
            reader.elements(entry, values[0].size, 2 * values[0].size).reshape(values[1:3].shape), values[1:3]
        )
        assert np.array_equal(reader.elements(entry, 5, 4), values.reshape(-1)[5:9])


@given(cut=st.integers(0, 200))
@settings(deadline=None)
def test_every_truncation_is_noticed(cut: int, tmp_path_factory: Any) -> None:
    file = tmp_path_factory.mktemp("files") / "file"
    safetensors.numpy.save_file({"x": np.ones((5, 5), np.float32), "y": np.ones(3, np.float16)}, file)
    data = file.read_bytes()
    file.write_bytes(data[: min(cut, len(data) - 1)])
    with pytest.raises(InputError, match="file"):
        read_header(file)


def header_file(path: Path, header: dict[str, Any], data: bytes) -> Path:
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, 4, "tensor 'x' claims 4 bytes"),
        ({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}, 4, r"tensor 'x' has shape \[-1\]"),
        ({"x": {"dtype": "Q4", "shape": [2], "data_offsets": [0, 1]}}, 1, "dtype Q4"),
        ({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, 8, "gap or overlaps"),
        ({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, 6, "2 bytes follow the last tensor"),
        ({"x": {"dtype": "F32", "shape": [1]}}, 4, "header is corrupt"),
        (
            {
                "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                "y": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            },
            4,
            "gap or overlaps",
        ),
    ],
)
def test_malformed_headers(header: dict[str, Any], size: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_header(header_file(tmp_path / "file", header, b"\0" * size))


def test_huge_header_length_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(InputError, match="truncated within its header"):
        read_header(tmp_path / "file")
