"""Lint rules about sequence batching, and about the tensors that the server itself makes for a batch.

The rules are those of triton-inference-server/core: src/model_config_utils.cc (GetBooleanSequenceControlProperties,
GetTypedSequenceControlProperties, ValidateBatchIO) and src/sequence_batch_scheduler/sequence_batch_scheduler.cc.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trtkit.findings import Finding
from trtkit.repository.lint.repository import Model, enum_name
from trtkit.repository.lint.rules import finding

_VALUES = ("int32_false_true", "fp32_false_true", "bool_false_true")
_CORRELATION_TYPES = ("TYPE_UINT64", "TYPE_INT64", "TYPE_UINT32", "TYPE_INT32", "TYPE_STRING")


def lint_sequences(model: Model) -> Iterator[Finding]:
    """Findings about sequence_batching, batch_input and batch_output."""
    if model.config.HasField("sequence_batching"):
        yield from _controls(model)
        yield from _sizes(model)
        yield from _states(model)
    yield from _batch_tensors(model)


def _controls(model: Model) -> Iterator[Finding]:
    from tritonclient.grpc import model_config_pb2 as pb

    names: set[str] = set()
    kinds: set[int] = set()
    for number, tensor in enumerate(model.config.sequence_batching.control_input):
        here = f"sequence_batching.control_input[{number}]"
        if not tensor.name:
            yield finding("TK162", model.at(here), "a control tensor has no name", "add its name")
        elif tensor.name in names:
            fix = "put all controls of a tensor into one control_input"
            yield finding("TK162", model.at(f"{here}.name"), f"control tensor '{tensor.name}' is given twice", fix)
        names.add(tensor.name)
        for index, control in enumerate(tensor.control):
            place = model.at(f"{here}.control[{index}]")
            if control.kind not in pb.ModelSequenceBatching.Control.Kind.values():
                continue
            kind = pb.ModelSequenceBatching.Control.Kind.Name(control.kind)
            if control.kind in kinds:
                yield finding("TK162", place, f"{kind} is given twice", "keep one of them")
            kinds.add(control.kind)
            if problem := _control_problem(control, kind):
                yield finding("TK162", place, *problem)


def _control_problem(control: Any, kind: str) -> tuple[str, str] | None:
    """Cause and fix."""
    from tritonclient.grpc import model_config_pb2 as pb

    given = [name for name in _VALUES if getattr(control, name)]
    if kind == "CONTROL_SEQUENCE_CORRID":
        if given:
            return f"{kind} with {given[0]}", f"remove {given[0]}: the tensor holds the id of the sequence"
        dtype = enum_name(pb.DataType, control.data_type)
        if dtype not in _CORRELATION_TYPES:
            return f"{kind} has type {dtype}", f"set data_type to one of {', '.join(_CORRELATION_TYPES)}"
        return None
    if len(given) != 1:
        return f"{kind} has {len(given)} of {', '.join(_VALUES)}", "give exactly one, such as fp32_false_true: [ 0, 1 ]"
    if (count := len(getattr(control, given[0]))) != 2:
        return f"{given[0]} has {count} values", "give the value for false and the value for true"
    return None


def _sizes(model: Model) -> Iterator[Finding]:
    batching, size = model.config.sequence_batching, model.config.max_batch_size
    for number, preferred in enumerate(batching.oldest.preferred_batch_size):
        if not 1 <= preferred <= size:
            cause = f"preferred_batch_size {preferred} with max_batch_size {size}"
            place = model.at(f"sequence_batching.oldest.preferred_batch_size[{number}]")
            yield finding("TK112", place, cause, f"use sizes from 1 to {size}" if size else "remove it")
    if not 0 <= batching.direct.minimum_slot_utilization <= 1:
        place = model.at("sequence_batching.direct.minimum_slot_utilization")
        cause = f"minimum_slot_utilization is {batching.direct.minimum_slot_utilization:g}"
        yield finding("TK163", place, cause, "use a number from 0 to 1")


def _states(model: Model) -> Iterator[Finding]:
    seen: set[str] = set()
    for number, state in enumerate(model.config.sequence_batching.state):
        place = model.at(f"sequence_batching.state[{number}]")
        name = f"state '{state.input_name}'"
        if len(state.initial_state) > 1:
            yield finding("TK163", place, f"{name} has {len(state.initial_state)} initial states", "keep one")
        elif state.initial_state:
            if state.input_name in seen:
                yield finding("TK163", place, f"{name} is given twice", "remove one of them")
            seen.add(state.input_name)
            if problem := _initial_problem(model, state, state.initial_state[0]):
                yield finding("TK163", place, f"the initial state of {name} {problem[0]}", problem[1])


def _initial_problem(model: Model, state: Any, initial: Any) -> tuple[str, str] | None:
    """Cause and fix."""
    dims, wanted = list(initial.dims), list(state.dims)
    if initial.data_type != state.data_type:
        return "has another type", "make the two data_type equal"
    if not initial.name:
        return "has no name", "add a name"
    if len(dims) != len(wanted) or any(b not in {a, -1} for a, b in zip(dims, wanted, strict=True)) or -1 in dims:
        return f"has dims {dims}, and the state {wanted}", "give dims of fixed size that fit the state's"
    kind = initial.WhichOneof("state_data")
    if kind is None:
        return "has no data", "add zero_data: true or data_file"
    if kind == "data_file" and not (model.path / "initial_state" / initial.data_file).is_file():
        return f"is in initial_state/{initial.data_file}, which is missing", "add the file"
    return None


def _batch_tensors(model: Model) -> Iterator[Finding]:
    from tritonclient.grpc import model_config_pb2 as pb

    config = model.config
    inputs = {tensor.name for tensor in config.input}
    outputs = {tensor.name for tensor in config.output}
    for field in ("batch_input", "batch_output"):
        for number, item in enumerate(getattr(config, field)):
            place = model.at(f"{field}[{number}]")
            if len(item.source_input) != 1:
                cause = f"{field} has {len(item.source_input)} source_input"
                yield finding("TK164", place, cause, "name exactly one input")
            for name in item.source_input:
                if name not in inputs:
                    yield finding("TK164", place, f"source_input '{name}' is no input of the model", "name an input")
            if field == "batch_input" and item.data_type not in (pb.TYPE_INT32, pb.TYPE_FP32):
                cause = f"batch_input has type {enum_name(pb.DataType, item.data_type)}"
                yield finding("TK164", place, cause, "use TYPE_INT32 or TYPE_FP32")
            for name in item.target_name if field == "batch_output" else ():
                if name not in outputs or list(item.target_name).count(name) > 1:
                    cause = f"target_name '{name}' is {'given twice' if name in outputs else 'no output of the model'}"
                    yield finding("TK164", place, cause, "name each output once")
