"""Lint rules about the inputs and outputs of one model, and about its warmup requests.

The rules are those of triton-inference-server/core: src/model_config_utils.cc (ValidateIOShape, ValidateModelInput)
and src/backend_model_instance.cc (GenerateWarmupData).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

from trtkit.findings import Finding
from trtkit.repository.lint.repository import Model, enum_name
from trtkit.repository.lint.rules import finding

_SIZES = {
    "BOOL": 1, "UINT8": 1, "UINT16": 2, "UINT32": 4, "UINT64": 8, "INT8": 1, "INT16": 2, "INT32": 4, "INT64": 8,
    "FP16": 2, "FP32": 4, "FP64": 8, "BF16": 2,
}  # fmt: skip
"""Bytes of an element."""


def lint_tensors(model: Model) -> Iterator[Finding]:
    """Findings about inputs, outputs and warmup requests."""
    for kind, tensors in (("input", model.config.input), ("output", model.config.output)):
        seen: set[str] = set()
        for number, tensor in enumerate(tensors):
            yield from _tensor(model, kind, f"{kind}[{number}]", tensor)
            if tensor.name in seen:
                cause = f"{kind} '{tensor.name}' is given twice"
                yield finding("TK122", model.at(f"{kind}[{number}].name"), cause, "remove one of them")
            seen.add(tensor.name)
    for number, warmup in enumerate(model.config.model_warmup):
        yield from _warmup(model, number, warmup)


def _tensor(model: Model, kind: str, here: str, tensor: Any) -> Iterator[Finding]:
    lacks = [
        part
        for part, missing in (
            ("name", not tensor.name),
            ("data_type", not tensor.data_type),
            ("dims", not tensor.dims or any(dim == 0 or dim < -1 for dim in tensor.dims)),
        )
        if missing
    ]
    if lacks:
        cause = f"{kind} '{tensor.name}' has no valid {' and '.join(lacks)}"
        fix = "dims are 1 or more, or -1 for any size" if "dims" in lacks else "add what is missing"
        yield finding("TK121", model.at(f"{here}.{lacks[0]}"), cause, fix)
    elif problem := _reshape_problem(tensor, model.config.max_batch_size):
        place = model.at(f"{here}.reshape")
        yield finding("TK123", place, f"{kind} '{tensor.name}' {problem}", "make the two equal")
    for option in ("is_shape_tensor", "is_non_linear_format_io"):
        if getattr(tensor, option) and model.config.platform != "tensorrt_plan":
            cause = f"{kind} '{tensor.name}' has {option}, which only TensorRT plans have"
            yield finding("TK174", model.at(f"{here}.{option}"), cause, f"remove {option}")
    if kind == "input" and tensor.format in (1, 2) and len(tensor.dims) != 3:
        cause = f"input '{tensor.name}' has an image format and {len(tensor.dims)} dims"
        yield finding("TK174", model.at(f"{here}.format"), cause, "give height, width and channels, or remove format")
    if kind == "output" and tensor.label_filename and not (model.path / tensor.label_filename).is_file():
        place = model.at(f"{here}.label_filename")
        cause = f"label_filename {tensor.label_filename} of output '{tensor.name}' is not in the model's folder"
        yield finding("TK176", place, cause, "add the file, or remove label_filename")


def _reshape_problem(tensor: Any, max_batch_size: int) -> str | None:
    if not tensor.HasField("reshape"):
        return None
    dims, shape = list(tensor.dims), list(tensor.reshape.shape)
    if not shape and max_batch_size == 0:
        return "reshapes to nothing without a batch dimension"
    if _runs(dims) != _runs(shape) or any(dim == 0 or dim < -1 for dim in shape):
        return f"reshapes {dims} to {shape}"
    return None


def _runs(dims: list[int]) -> list[int]:
    """Elements between the dims of any size, which must stay where they are."""
    groups = itertools.groupby(dims, key=lambda dim: dim == -1)
    runs = [1]
    for is_any, group in groups:
        if is_any:
            runs += [1] * len(list(group))
        else:
            runs[-1] *= math.prod(group)
    return runs


def _warmup(model: Model, number: int, warmup: Any) -> Iterator[Finding]:
    """The server sends a warmup request before it says ready, and a refusal ends the load."""
    inputs = {tensor.name: tensor for tensor in model.config.input}
    name, place = f"warmup '{warmup.name}'", model.at(f"model_warmup[{number}].name", f"model_warmup[{number}]")
    if not warmup.batch_size:
        return  # the server leaves such a request out
    if not warmup.inputs:
        yield finding("TK173", place, f"{name} has no inputs", "add them, or remove the warmup")
    controls = {tensor.name for tensor in model.config.sequence_batching.control_input}
    if "" in warmup.inputs:
        fix = "write the name of an input"
        yield finding("TK173", place, f"{name} has an input without a name, and the server would hang on it", fix)
    for unknown in sorted(set(warmup.inputs) - set(inputs) - controls - {""}):
        yield finding("TK124", model.place(unknown), f"{name} has unknown input '{unknown}'", "remove it")
    for tensor in model.config.input:
        if warmup.inputs and not tensor.optional and tensor.name not in warmup.inputs:
            yield finding("TK173", place, f"{name} lacks input '{tensor.name}'", "add it to the warmup's inputs")
    for key, item in warmup.inputs.items():
        if key in inputs and (problem := _warmup_problem(model, inputs[key], item)):
            yield finding("TK173", place, f"{name}, input '{key}': {problem[0]}", problem[1])
    if warmup.batch_size > max(model.config.max_batch_size, 1):
        cause = f"{name} has batch_size {warmup.batch_size}, and the model {model.config.max_batch_size}"
        yield finding("TK173", place, cause, "make it max_batch_size at most")


def _warmup_problem(model: Model, tensor: Any, item: Any) -> tuple[str, str] | None:
    """Cause and fix."""
    from tritonclient.grpc import model_config_pb2 as pb

    dims, wanted = list(item.dims), list(tensor.dims)
    dtype = enum_name(pb.DataType, item.data_type).removeprefix("TYPE_")
    kind = item.WhichOneof("input_data_type")
    if any(dim < 0 for dim in dims):
        return f"dims {dims} are not fixed", "give the size of each"
    if kind is None:
        return "no data", "add zero_data: true, random_data: true or input_data_file"
    if item.data_type != tensor.data_type:
        return f"type {dtype}", f"use {enum_name(pb.DataType, tensor.data_type)} like the input"
    if len(dims) != len(wanted) or any(b not in (a, -1) for a, b in zip(dims, wanted, strict=True)):
        return f"dims {dims}, and the input has {wanted}", "make them fit, without the batch dimension"
    return _warmup_file(model, item, math.prod(dims) * _SIZES.get(dtype, 0)) if kind == "input_data_file" else None


def _warmup_file(model: Model, item: Any, need: int) -> tuple[str, str] | None:
    """Cause and fix, when the file lacks some of the bytes needed."""
    file = model.path / "warmup" / item.input_data_file
    if not file.is_file():
        return f"the file warmup/{item.input_data_file} is missing", "add it to the model's folder"
    if file.stat().st_size < need:
        return f"warmup/{item.input_data_file} has less than {need} bytes", "write the whole tensor into it"
    return None
