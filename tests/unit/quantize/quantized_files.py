"""Quantised checkpoints for tests: files with given tensors, and what a reader makes of them."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from trtkit.convert.number_formats import Float8Weight, IntegerWeight
from trtkit.quantize import imports
from trtkit.quantize.imports import Scheme
from trtkit.safetensors_io import Reader, TensorEntry, TensorSpec, Writer, read_header

Array = npt.NDArray[Any]
MODULE = "model.layers.0.mlp.up_proj"

SCALES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}


def write(folder: Path, tensors: Mapping[str, Array], config: Mapping[str, Any] | None) -> dict[str, TensorEntry]:
    """Writes a checkpoint of one linear; keys of `tensors` are suffixes of `MODULE`, or whole names with a dot."""
    named = {name if "." in name else f"{MODULE}.{name}": np.asarray(value) for name, value in tensors.items()}
    file = folder / "model.safetensors"
    file.unlink(missing_ok=True)
    writer = Writer(file, [TensorSpec(name, value.dtype, value.shape) for name, value in named.items()])
    for name, value in named.items():
        writer.write(name, 0, value)
    writer.close()
    if config is not None:
        (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return read_header(file)


@contextlib.contextmanager
def checkpoint(
    tensors: Mapping[str, Array], config: Mapping[str, Any]
) -> Iterator[tuple[Scheme, dict[str, TensorEntry], Reader]]:
    """A checkpoint in a folder of its own, which a property can make a hundred times."""
    with tempfile.TemporaryDirectory() as folder, Reader() as reader:
        entries = write(Path(folder), tensors, config)
        scheme = imports.detect({"quantization_config": config}, Path(folder))
        assert scheme is not None
        yield scheme, entries, reader


def read(tensors: Mapping[str, Array], config: Mapping[str, Any]) -> IntegerWeight | Float8Weight | None:
    """What the reader makes of `MODULE`."""
    with checkpoint(tensors, config) as (scheme, entries, reader):
        return imports.read(MODULE, scheme, entries, reader)


def read_integers(tensors: Mapping[str, Array], config: Mapping[str, Any]) -> IntegerWeight:
    weight = read(tensors, config)
    assert isinstance(weight, IntegerWeight)
    return weight


def same_bits(ours: Array, theirs: Array) -> bool:
    return ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes()


def values(codes: Array, zeros: Array | int, scales: Array, group: int) -> Array:
    """(code - zero) * scale in float32, (N, K), of codes (N, K) and scales (N, K / group) of any dtype."""
    wide = np.repeat(scales.astype(np.float32), group, axis=1)
    offsets = np.repeat(np.broadcast_to(np.asarray(zeros, np.int64), scales.shape), group, axis=1)
    return (codes.astype(np.int64) - offsets).astype(np.float32) * wide
