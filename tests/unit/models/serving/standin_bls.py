"""A stand-in of triton_python_backend_utils for BLS calls, and of a decoupled model `tensorrt_llm` behind them.

As in Triton: `exec` comes back with the first response and holds one of `POOL` threads until then; an iterator is to be
used up; an input that the model does not declare is an error, and so is a scalar that is not [1, 1]. The model's
tensors are those of `trtkit.contract`.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
from standin_model import Run, World, log_prob

from trtkit import contract

POOL = 32
_NUMPY = {"STRING": np.object_, "INT32": np.int32, "FP32": np.float32, "UINT64": np.uint64, "BOOL": np.bool_}


class TritonError(Exception):
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message: str, code: int) -> None:
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class Tensor:
    def __init__(self, name: str, array: Any) -> None:
        assert isinstance(array, np.ndarray)
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Any:
        return self._array


class Response:
    def __init__(self, tensors: list[Tensor], error: TritonError | None = None) -> None:
        self._tensors, self._error = tensors, error

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError:
        assert self._error is not None
        return self._error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors


class Model:
    """What is behind the name `tensorrt_llm`."""

    def __init__(self, slots: int, release: str | None, repeats_log_probs: bool) -> None:
        self.loses_errors = False  # those that are not the first response, as servers before 25.02 do
        self.world = World(slots)
        self.declared = {tensor.name: tensor for tensor in contract.llm_inputs(version=release)}
        self.requests: list[dict[str, Any]] = []
        self.repeats_log_probs = repeats_log_probs
        self.stops = 0
        self._running: dict[str, Run] = {}

    def run(self, name: str, outputs: list[str], inputs: dict[str, Any], answers: queue.SimpleQueue[Any]) -> None:
        """Queues responses, and None after the last one."""
        if wrong := self._wrong(inputs):
            answers.put(Response([], TritonError(wrong, TritonError.INVALID_ARG)))
            answers.put(None)
            return
        if "stop" in inputs:
            assert name
            self.stops += 1
            if name in self._running:
                self.world.stop(self._running[name])
            answers.put(Response([]))
            answers.put(None)
            return
        assert name not in self._running, "two requests of one id"
        self.requests.append(inputs)
        sequence = Run(
            inputs["input_ids"][0].tolist(),
            inputs["request_output_len"].item(),
            _Teller(self, name, outputs, inputs, answers),
            end_ids=[inputs["end_id"].item()],
            stop_ids=_ids(inputs.get("stop_words_list")),
            bad_ids=_ids(inputs.get("bad_words_list")),
        )
        self._running[name] = sequence
        self.world.add(sequence)

    def over(self, name: str) -> None:
        del self._running[name]

    def _wrong(self, inputs: dict[str, Any]) -> str:
        for name, array in inputs.items():
            tensor = self.declared.get(name)
            if tensor is None:
                return f"unexpected inference input '{name}'"
            if array.dtype != _NUMPY[tensor.dtype] or array.shape[0] != 1 or array.ndim != 1 + len(tensor.dims):
                return f"input '{name}' is {array.dtype}{array.shape}"
            if any(want not in (-1, have) for want, have in zip(tensor.dims, array.shape[1:], strict=True)):
                return f"input '{name}' has shape {array.shape}"
        missing = [name for name, tensor in self.declared.items() if not tensor.optional and name not in inputs]
        return f"missing inputs {missing}" if missing else ""


class _Teller:
    """Makes responses of what the world tells about a request."""

    def __init__(self, model: Model, name: str, outputs: list[str], inputs: dict[str, Any], answers: Any) -> None:
        self._model, self._name, self._answers, self._outputs = model, name, answers, outputs
        self._streams = bool(inputs["streaming"].item())
        self._tokens: list[int] = []
        self._log_probs: list[float] = []

    def __call__(self, token: int | None, finish: str, error: str) -> None:
        if token is not None:
            self._tokens.append(token)
            self._log_probs.append(log_prob(token))
        if (error or finish == "cancelled") and self._model.loses_errors and self._streams:
            self._model.over(self._name)
            return
        if error or finish == "cancelled":
            code = TritonError.CANCELLED if finish else TritonError.INTERNAL
            self._answers.put(Response([], TritonError(error or finish, code)))
        elif finish or self._streams:
            count = len(self._tokens)
            told = self._log_probs if self._model.repeats_log_probs else self._log_probs[len(self._log_probs) - count :]
            arrays = {
                "output_ids": np.array([[self._tokens]], np.int32).reshape(1, 1, count),
                "sequence_length": np.array([[count]], np.int32),
                "output_log_probs": np.array([[told]], np.float32).reshape(1, 1, len(told)),
            }
            self._answers.put(Response([Tensor(name, arrays[name]) for name in self._outputs]))
            self._tokens = []
        if finish or error:
            self._model.over(self._name)
            self._answers.put(None)


def _ids(words: Any) -> list[int]:
    """Words of one token; longer ones mean nothing here."""
    if words is None:
        return []
    ids, ends = words[0].tolist()
    bounds = [0, *(end for end in ends if end != -1)]
    return [ids[start] for start, end in pairwise(bounds) if end - start == 1]


def module(slots: int = 4, *, release: str | None = None, repeats_log_probs: bool = False) -> Any:
    """The stand-in as a module; `model` is what it calls."""
    it: Any = ModuleType("triton_python_backend_utils")
    it.Tensor, it.TritonError = Tensor, TritonError
    it.model = Model(slots, release, repeats_log_probs)
    it.Logger = type("Logger", (), {"errors": [], "log_error": classmethod(lambda cls, line: cls.errors.append(line))})
    pool = threading.Semaphore(POOL)

    class InferenceRequest:
        def __init__(
            self, *, model_name: str, request_id: str, requested_output_names: list[str], inputs: list[Tensor]
        ) -> None:
            self.model_name, self.request_id = model_name, request_id
            self.outputs = requested_output_names
            self.inputs = {tensor.name(): tensor.as_numpy() for tensor in inputs}
            assert len(self.inputs) == len(inputs)

        def exec(self, decoupled: bool = False) -> Iterator[Response]:
            assert decoupled, "the model is decoupled"
            if self.model_name != "tensorrt_llm":
                error = TritonError(
                    f"Failed for execute the inference request. Model '{self.model_name}' is not ready.", 0
                )
                return iter([Response([], error)])
            answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
            with pool:
                it.model.run(self.request_id, self.outputs, self.inputs, answers)
                first = answers.get()
            return _chain(first, answers)

    it.InferenceRequest = InferenceRequest
    return it


def _chain(first: Response, answers: Any) -> Iterator[Response]:
    yield first
    while (answer := answers.get()) is not None:
        yield answer
