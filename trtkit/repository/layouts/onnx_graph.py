"""Inputs and outputs of an ONNX graph as Triton's tensors.

Sources: the ONNX specification, docs/IR.md (graph inputs, symbolic dimensions, external data); ONNX Runtime backend
(triton-inference-server/onnxruntime_backend, README.md and src/onnxruntime.cc) for what Triton makes of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtkit.contract_tensors import Tensor
from trtkit.errors import InputError

_TYPES = {
    "FLOAT": "FP32", "FLOAT16": "FP16", "DOUBLE": "FP64", "BOOL": "BOOL", "STRING": "STRING",
    "INT8": "INT8", "INT16": "INT16", "INT32": "INT32", "INT64": "INT64",
    "UINT8": "UINT8", "UINT16": "UINT16", "UINT32": "UINT32", "UINT64": "UINT64",
}  # fmt: skip
"""TensorProto.DataType -> Triton's type; what is not here, neither onnxruntime's backend nor numpy can take."""

Dim = int | str | None
"""A size, the name of a dynamic axis, or a dynamic axis without a name."""


@dataclass(frozen=True)
class Graph:
    """What config.pbtxt needs of a model.

    Attributes:
        inputs, outputs: without the batch axis when `batched`.
        batched: axis 0 of every tensor counts requests.
        data_files: files beside the model that hold its weights, relative to it.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    batched: bool
    data_files: tuple[str, ...]


def read_graph(path: Path, *, batch: bool | None = None) -> Graph:
    """The tensors of a model file. Its weights are not read.

    Args:
        batch: axis 0 counts requests; None where all tensors begin with the same dynamic axis.

    Raises:
        InputError: the file is missing or no valid model, a tensor has a type or shape that Triton lacks, or the graph
            cannot be batched although `batch` says so.
    """
    model = _checked(path)
    given = {tensor.name for tensor in model.graph.initializer}
    given |= {tensor.values.name for tensor in model.graph.sparse_initializer}
    inputs = [(value.name, *_type_of(path, value)) for value in model.graph.input if value.name not in given]
    outputs = [(value.name, *_type_of(path, value)) for value in model.graph.output]
    if not inputs or not outputs:
        raise InputError(f"{path}: the graph has no {'outputs' if inputs else 'inputs'}", "export the model again")
    batched = _can_batch([dims for _, _, dims in inputs + outputs])
    if batch and not batched:
        name = next((n for n, _, dims in inputs + outputs if not dims or isinstance(dims[0], int)), inputs[0][0])
        raise InputError(
            f"{path}: serving.onnx.batch is on, but axis 0 of '{name}' is not the dynamic axis that all tensors share",
            "export with a dynamic batch axis, or set serving.onnx.batch: false",
        )
    batched = batched if batch is None else batch
    return Graph(
        tuple(_tensor(path, name, dtype, dims, batched) for name, dtype, dims in inputs),
        tuple(_tensor(path, name, dtype, dims, batched) for name, dtype, dims in outputs),
        batched,
        _data_files(path, model),
    )


def _checked(path: Path) -> Any:
    import onnx

    if not path.is_file():
        raise InputError(f"no ONNX model at {path}", "give the .onnx file in serving.onnx.model or model.source")
    try:
        onnx.checker.check_model(str(path))  # by path: it finds external data, and is not bound to 2 GiB
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's and onnx's own types, none of them public
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"{path} is not a valid ONNX model: {first}", "export the model again") from error


def _type_of(path: Path, value: Any) -> tuple[str, list[Dim]]:
    import onnx

    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        raise InputError(
            f"{path}: '{value.name}' is a {str(kind).removesuffix('_type')}, and Triton has tensors only",
            "export the model with tensors (classifiers of skl2onnx: options zipmap=False)",
        )
    tensor = value.type.tensor_type
    name = onnx.TensorProto.DataType.Name(tensor.elem_type)
    if name not in _TYPES:
        raise InputError(f"{path}: '{value.name}' has type {name}", f"export it as one of {', '.join(sorted(_TYPES))}")
    if not tensor.HasField("shape"):
        raise InputError(
            f"{path}: '{value.name}' has no shape", "run onnx.shape_inference on the model, or export again"
        )
    dims: list[Dim] = []
    for dim in tensor.shape.dim:
        which = dim.WhichOneof("value")
        dims.append(dim.dim_value if which == "dim_value" else (dim.dim_param or None) if which else None)
    return _TYPES[name], dims


def _can_batch(shapes: list[list[Dim]]) -> bool:
    """Every tensor has a dynamic first axis, and those that have a name have the same."""
    if any(not dims or isinstance(dims[0], int) for dims in shapes):
        return False
    return len({dims[0] for dims in shapes if dims[0] is not None}) <= 1


def _tensor(path: Path, name: str, dtype: str, dims: list[Dim], batched: bool) -> Tensor:
    sizes = tuple(dim if isinstance(dim, int) else -1 for dim in (dims[1:] if batched else dims))
    if any(size == 0 for size in sizes):
        raise InputError(f"{path}: '{name}' has an axis of size 0", "export the model again")
    if sizes:
        return Tensor(name, dtype, sizes)
    if not batched:
        raise InputError(f"{path}: '{name}' is a scalar, which Triton has not", "give it shape [1] in the model")
    return Tensor(name, dtype, (1,), scalar=True)  # clients send [batch, 1], the graph sees [batch]


def _data_files(path: Path, model: Any) -> tuple[str, ...]:
    """Files with weights that the model names, each inside its folder."""
    found = set()
    for tensor in _weights(model.graph):
        for item in tensor.external_data:
            if item.key != "location":
                continue
            target = (path.parent / item.value).resolve()
            if not target.is_relative_to(path.parent.resolve()) or not target.is_file():
                raise InputError(
                    f"{path}: its weights lie in '{item.value}', which is not beside it", "copy the file there"
                )
            found.add(item.value)
    return tuple(sorted(found))


def _weights(graph: Any) -> Iterator[Any]:
    """Every tensor in a graph: initializers, attributes of nodes, and those of the graphs inside nodes."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                if inner.node or inner.initializer:
                    yield from _weights(inner)
