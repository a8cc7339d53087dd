"""Serves the typed function in function.py beside it. config.pbtxt was derived from its annotations.

Triton's tensors become the function's arguments by name: texts as str (bytes where it asks for bytes), numbers as numpy
arrays, and arguments annotated as plain values as such when requests are not batched. What it returns becomes the
outputs in the order of config.pbtxt; what a generator yields becomes one response each.
"""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

import function  # type: ignore[import-not-found]  # the user's file, beside this one in a repository
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """One instance."""

    def initialize(self, args: dict[str, str]) -> None:
        """Finds the function, and lets the file load what it needs: `load(folder)` is called once if it exists."""
        config = json.loads(args["model_config"])
        parameters = {key: item["string_value"] for key, item in config["parameters"].items()}
        self.call = getattr(function, parameters["function"])
        self.batched = config["max_batch_size"] > 0
        self.decoupled = config["model_transaction_policy"]["decoupled"]
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.texts = set(filter(None, parameters["texts"].split(",")))
        self.plain = set(filter(None, parameters["plain"].split(",")))
        self.outputs = [
            (tensor["name"], pb_utils.triton_string_to_numpy(tensor["data_type"]), len(tensor["dims"]))
            for tensor in config["output"]
        ]
        if hasattr(function, "load"):
            function.load(str(Path(__file__).parent))

    def execute(self, requests: list[Any]) -> list[Any] | None:
        """Responses in order, or, for a generator, through each request's sender."""
        if self.decoupled:
            for request in requests:
                self._stream(request)
            return None
        responses: list[Any] = [None] * len(requests)
        groups: dict[Any, list[tuple[int, dict[str, Any]]]] = {}
        for index, request in enumerate(requests):
            try:
                arguments = self._arguments(request)
            except Exception as error:  # of whatever a client can send
                responses[index] = _failure(error)
                continue
            # One call answers requests with the same arguments and the same shapes behind the batch axis.
            shapes = tuple((name, values.shape[1:]) for name, values in arguments.items()) if self.batched else ()
            groups.setdefault(shapes if self.batched else index, []).append((index, arguments))
        for members in groups.values():
            answers = self._answers([arguments for _, arguments in members])
            for (index, _), answer in zip(members, answers, strict=True):
                responses[index] = answer
        return responses

    def _answers(self, calls: list[dict[str, Any]]) -> list[Any]:
        """One call for all, or, when that fails, one for each: only the request that it fails for gets the error."""
        try:
            return self._run(calls)
        except Exception as error:  # of the user's code
            if len(calls) == 1:
                return [_failure(error)]
            return [answer for one in calls for answer in self._answers([one])]

    def _arguments(self, request: Any) -> dict[str, Any]:
        arguments = {}
        for name in self.inputs:
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            if tensor is None:
                continue  # the function's own default
            values = tensor.as_numpy()
            if name in self.texts:
                flat = [text.decode("utf-8") if isinstance(text, bytes) else str(text) for text in values.reshape(-1)]
                values = np.array(flat, dtype=object).reshape(values.shape)
            arguments[name] = values.reshape(-1)[0] if name in self.plain and not self.batched else values
        return arguments

    def _run(self, calls: list[dict[str, Any]]) -> list[Any]:
        joined = calls[0]
        if len(calls) > 1:
            joined = {name: np.concatenate([call[name] for call in calls]) for name in calls[0]}
        results = self._tensors(self.call(**joined))
        if not self.batched:
            return [pb_utils.InferenceResponse([pb_utils.Tensor(name, values) for name, values in results])]
        sizes = [len(next(iter(call.values()))) for call in calls]
        for name, values in results:
            if len(values) != sum(sizes):
                raise ValueError(f"output '{name}' has {len(values)} rows for {sum(sizes)} requests")
        answers, start = [], 0
        for size in sizes:
            parts = [pb_utils.Tensor(name, values[start : start + size]) for name, values in results]
            answers.append(pb_utils.InferenceResponse(parts))
            start += size
        return answers

    def _stream(self, request: Any) -> None:
        sender = request.get_response_sender()
        try:
            for piece in self.call(**self._arguments(request)):
                if sender.is_cancelled():
                    break
                tensors = [pb_utils.Tensor(name, values) for name, values in self._tensors(piece)]
                sender.send(pb_utils.InferenceResponse(tensors))
        except Exception as error:  # of the user's code
            sender.send(_failure(error), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            return
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _tensors(self, result: Any) -> list[tuple[str, Any]]:
        """Names and arrays of what the function returned, in the types of config.pbtxt."""
        values = result if len(self.outputs) > 1 else (result,)
        if len(self.outputs) > 1 and (not isinstance(values, tuple) or len(values) != len(self.outputs)):
            raise ValueError(f"the function must return a tuple of {len(self.outputs)}")
        return [
            (name, _array(value, dtype, rank)) for value, (name, dtype, rank) in zip(values, self.outputs, strict=True)
        ]


def _array(value: Any, dtype: Any, rank: int) -> Any:
    """An output as Triton takes it: texts as bytes; a plain value gets the axes that it lacks."""
    if dtype in (np.object_, np.bytes_):
        array = np.array(value, dtype=object)
        flat = [text if isinstance(text, bytes) else str(text).encode() for text in array.reshape(-1)]
        array = np.array(flat, dtype=np.object_).reshape(array.shape)
    else:
        array = np.ascontiguousarray(value, dtype=dtype) if np.ndim(value) else np.array(value, dtype=dtype)
    return array if array.ndim else array.reshape((1,) * max(rank, 1))


def _failure(error: Exception) -> Any:
    """The error as clients see it: its type and text. The traceback goes to the server's log only."""
    pb_utils.Logger.log_error("".join(traceback.format_exception(type(error), error, error.__traceback__)))
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"{type(error).__name__}: {error}"))
