"""Lint rules about models of ONNX Runtime: config.pbtxt against the graph.

Format: triton-inference-server/onnxruntime_backend, src/onnxruntime.cc (ValidateInputs, ValidateOutputs) and README.md.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtkit.findings import Finding
from trtkit.repository.lint.repository import Model, enum_name
from trtkit.repository.lint.rules import finding

_DTYPES = {
    "FLOAT": "FP32", "DOUBLE": "FP64", "FLOAT16": "FP16", "BFLOAT16": "BF16", "INT8": "INT8", "INT16": "INT16",
    "INT32": "INT32", "INT64": "INT64", "UINT8": "UINT8", "UINT16": "UINT16", "UINT32": "UINT32", "UINT64": "UINT64",
    "BOOL": "BOOL", "STRING": "STRING",
}  # fmt: skip


@dataclass(frozen=True)
class _Tensor:
    """An input or output of a graph; `dims` is None where the graph does not say, -1 stands for any size."""

    dtype: str
    dims: tuple[int, ...] | None


def lint_onnx(model: Model) -> Iterator[Finding]:
    """Findings about a model of ONNX Runtime in every served version."""
    if model.is_ensemble or model.backend != "onnxruntime":
        return
    name = model.config.default_model_filename or "model.onnx"
    for version in model.served_versions():
        file, place = model.path / str(version) / name, f"{model.name}/{version}/{name}"
        if file.is_dir():  # a large model: the graph and its weights
            file = file / "model.onnx"
        if not file.is_file():
            yield finding("TK241", place, "the file is missing", "export the model there")
            continue
        stat = file.stat()
        graph = _read(file, stat.st_mtime_ns, stat.st_size)
        if isinstance(graph, str):
            yield finding("TK241", place, graph, "export the model again")
            continue
        for kind, tensors in (("input", model.config.input), ("output", model.config.output)):
            yield from _compare(model, kind, tensors, graph[kind])


@functools.lru_cache(maxsize=64)
def _read(file: Path, mtime: int, size: int) -> dict[str, dict[str, _Tensor]] | str:
    """Inputs and outputs of a graph by name, or what is wrong with it. Weights in files of their own stay there."""
    import onnx

    try:
        graph = onnx.load(str(file), load_external_data=False).graph
    except Exception as error:  # protobuf's errors, and those of the file
        return f"not an ONNX model: {' '.join(str(error).split())[:200]}"
    if not graph.output:
        return "not an ONNX model: the graph has no output"
    weights = {tensor.name for tensor in graph.initializer}  # older exports list them among the inputs
    return {
        "input": {item.name: _tensor(item) for item in graph.input if item.name not in weights},
        "output": {item.name: _tensor(item) for item in graph.output},
    }


def _tensor(item: Any) -> _Tensor:
    import onnx

    kind = item.type.tensor_type
    dtype = _DTYPES.get(onnx.TensorProto.DataType.Name(kind.elem_type), "")
    if not kind.HasField("shape"):
        return _Tensor(dtype, None)
    return _Tensor(dtype, tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim))


def _compare(model: Model, kind: str, tensors: Any, graph: dict[str, _Tensor]) -> Iterator[Finding]:
    from tritonclient.grpc import model_config_pb2 as pb

    batches = model.config.max_batch_size > 0
    for number, tensor in enumerate(tensors):
        place, name = model.at(f"{kind}[{number}].name"), f"{kind} '{tensor.name}'"
        found = graph.get(tensor.name)
        if found is None:
            fix = f"use one of {', '.join(sorted(graph)) or 'none'}"
            yield finding("TK242", place, f"the graph has no {name}", fix)
            continue
        dtype = enum_name(pb.DataType, tensor.data_type).removeprefix("TYPE_")
        if found.dtype and dtype != found.dtype:
            cause = f"{name} is {dtype}, and {found.dtype} in the graph"
            yield finding("TK242", model.at(f"{kind}[{number}].data_type"), cause, f"write TYPE_{found.dtype}")
        if found.dims is None:
            continue
        if batches and (not found.dims or found.dims[0] != -1):
            cause = f"{name} has dims {list(found.dims)} in the graph, whose first is no batch of any size"
            fix = "export with a dynamic first axis, or set max_batch_size: 0"
            yield finding("TK243", model.at("max_batch_size"), cause, fix)
            continue
        dims = list(tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims)
        wanted = list(found.dims[1:] if batches else found.dims)
        fits = len(dims) == len(wanted) and all(b in (a, -1) for a, b in zip(dims, wanted, strict=True))
        if not fits and not (not batches and wanted == [] and dims == [1]):
            cause = f"{name} has dims {dims}, and {wanted} in the graph"
            yield finding("TK242", model.at(f"{kind}[{number}].dims"), cause, f"write dims: {wanted}")
    missing = sorted(set(graph) - {tensor.name for tensor in tensors}) if kind == "input" and len(tensors) else []
    for name in missing:
        cause = f"input '{name}' of the graph is not in config.pbtxt"
        yield finding("TK242", model.at("input"), cause, "add it: ONNX Runtime needs every input")
