"""Serves the typed function in function.py beside it. config.pbtxt was derived from its annotations.

Triton's tensors become the function's arguments by name: texts as str (bytes where it asks for bytes), numbers as numpy
arrays, and arguments annotated as plain values as such when requests are not batched. What it returns becomes the
outputs in the order of config.pbtxt; what a generator yields becomes one response each.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

FILE = Path(__file__).parent / "function.py"
"""The user's file."""
USERS_ERRORS = (Exception, SystemExit)
"""What the user's code may raise; an exit() in it must end one request and not the server's process."""


class BadRequestError(Exception):
    """What a request gets wrong, in words for its sender."""


class TritonPythonModel:
    """One instance."""

    def initialize(self, args: dict[str, str]) -> None:
        """Finds the function, and lets the file load what it needs: `load(folder)` is called once if it exists.

        Raises:
            RuntimeError: the file is missing, has no such function, or raises; one line.
        """
        config = json.loads(args["model_config"])
        parameters = {key: item["string_value"] for key, item in config["parameters"].items()}
        self.call: Any = None
        self.batched = config["max_batch_size"] > 0
        self.decoupled = config["model_transaction_policy"]["decoupled"]
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.optional = {tensor["name"] for tensor in config["input"] if tensor.get("optional")}
        self.texts = set(filter(None, parameters["texts"].split(",")))
        self.plain = set(filter(None, parameters["plain"].split(",")))
        self.outputs = [
            (tensor["name"], pb_utils.triton_string_to_numpy(tensor["data_type"]), self._shape(tensor))
            for tensor in config["output"]
        ]
        problem = "" if FILE.is_file() else f"{FILE}: the file is missing"
        if not problem:
            try:
                function = _module()
                self.call = getattr(function, parameters["function"], None)
                if not callable(self.call):
                    problem = f"{FILE}: no function '{parameters['function']}'"
                elif hasattr(function, "load"):
                    function.load(str(FILE.parent))
            except USERS_ERRORS as error:
                pb_utils.Logger.log_info(_clean("".join(traceback.format_exception(error))))
                problem = f"{_place(error)}: {_line(error)}"
        if problem:  # raised here, so that the server's log says no more than this line and where it comes from
            raise RuntimeError(problem)

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
            kinds = tuple((name, values.dtype, values.shape[1:]) for name, values in arguments.items() if self.batched)
            groups.setdefault(kinds or index, []).append((index, arguments))
        for members in groups.values():
            answers = self._answers([arguments for _, arguments in members])
            for (index, _), answer in zip(members, answers, strict=True):
                responses[index] = answer
        return responses

    def _shape(self, tensor: dict[str, Any]) -> list[int]:
        """What the function's arrays must look like: -1 is any size, the first axis counts requests if batched."""
        dims = tensor["reshape"].get("shape", []) if "reshape" in tensor else tensor["dims"]
        return [*([-1] if self.batched else []), *map(int, dims)]

    def _answers(self, calls: list[dict[str, Any]]) -> list[Any]:
        """One call for all, or, when that fails, one for each: only the request that it fails for gets the error."""
        try:
            return self._run(calls)
        except USERS_ERRORS as error:
            if len(calls) == 1:
                return [_failure(error)]
            return [answer for one in calls for answer in self._answers([one])]

    def _arguments(self, request: Any) -> dict[str, Any]:
        arguments = {}
        for name in self.inputs:
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            if tensor is None:
                if name not in self.optional:
                    raise BadRequestError(f"input '{name}' is missing")
                continue  # the function's own default
            values = tensor.as_numpy()
            if name in self.texts:
                values = _decoded(name, values)
            if name in self.plain and not self.batched:
                if values.size != 1:
                    raise BadRequestError(f"input '{name}' has shape {list(values.shape)} and must be one value")
                values = values.reshape(-1)[0]
            arguments[name] = values
        if self.batched and len(sizes := {len(values) for values in arguments.values()}) > 1:
            raise BadRequestError(f"the inputs have different batch sizes: {sorted(sizes)}")
        return arguments

    def _run(self, calls: list[dict[str, Any]]) -> list[Any]:
        joined = calls[0]
        if len(calls) > 1:
            joined = {name: np.concatenate([call[name] for call in calls]) for name in calls[0]}
        results = self._tensors(self.call(**joined))
        if not self.batched:
            return [pb_utils.InferenceResponse([pb_utils.Tensor(name, values) for name, values in results])]
        sizes = [len(next(iter(call.values()), [None])) for call in calls]  # without inputs it is a batch of one
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
        """One response per piece, and the end. What goes wrong with one stream leaves those after it alone."""
        sender = request.get_response_sender()
        try:
            last = self._send_pieces(request, sender)
        except USERS_ERRORS as error:
            last = _failure(error)
        try:
            sender.send(last, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except Exception as error:
            pb_utils.Logger.log_error(f"a client could not be told that its stream has ended: {_line(error)}")

    def _send_pieces(self, request: Any, sender: Any) -> Any:
        """Returns the error for a client that has gone, else None."""
        cancelled = pb_utils.TritonError("cancelled", pb_utils.TritonError.CANCELLED)
        if sender.is_cancelled():  # while it waited for another stream
            return pb_utils.InferenceResponse(error=cancelled)
        pieces = iter(self.call(**self._arguments(request)))
        try:
            for piece in pieces:
                if sender.is_cancelled():
                    return pb_utils.InferenceResponse(error=cancelled)
                tensors = [pb_utils.Tensor(name, values) for name, values in self._tensors(piece)]
                sender.send(pb_utils.InferenceResponse(tensors))
        finally:
            if hasattr(pieces, "close"):
                pieces.close()  # what it has open is closed before the client hears that it is over
        return None

    def _tensors(self, result: Any) -> list[tuple[str, Any]]:
        """Names and arrays of what the function returned, in the types of config.pbtxt."""
        values = result if len(self.outputs) > 1 else (result,)
        if len(self.outputs) > 1 and (not isinstance(values, tuple) or len(values) != len(self.outputs)):
            raise ValueError(f"the function must return a tuple of {len(self.outputs)}")
        return [
            (name, _array(name, value, dtype, shape))
            for value, (name, dtype, shape) in zip(values, self.outputs, strict=True)
        ]


def _module() -> Any:
    """The user's file as the module `function`, whatever else of that name is installed."""
    spec = importlib.util.spec_from_file_location("function", FILE)
    if spec is None or spec.loader is None:
        raise ImportError(f"{FILE} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules["function"] = module  # dataclasses in it look themselves up there
    spec.loader.exec_module(module)
    return module


def _decoded(name: str, values: Any) -> Any:
    """Triton's bytes as str."""
    try:
        flat = [text.decode("utf-8") if isinstance(text, bytes) else str(text) for text in values.reshape(-1)]
    except UnicodeDecodeError as error:
        raise BadRequestError(f"input '{name}' is not UTF-8: {_line(error)}") from None
    return np.array(flat, dtype=object).reshape(values.shape)


def _array(name: str, value: Any, dtype: Any, shape: list[int]) -> Any:
    """An output as Triton takes it: texts as bytes; a plain value gets the axes that it lacks."""
    if dtype in (np.object_, np.bytes_):
        array = np.array(value, dtype=object)
        for text in array.reshape(-1):
            if not isinstance(text, (str, bytes)):
                raise TypeError(f"output '{name}' holds a {type(text).__name__} where it should have texts")
        flat = [text if isinstance(text, bytes) else text.encode() for text in array.reshape(-1)]
        array = np.array(flat, dtype=np.object_).reshape(array.shape)
    else:
        array = _numbers(name, np.asarray(value), np.dtype(dtype))
    array = array if array.ndim else array.reshape((1,) * max(len(shape), 1))
    if len(shape) != array.ndim or any(size not in (-1, own) for size, own in zip(shape, array.shape, strict=True)):
        raise ValueError(f"output '{name}' has shape {list(array.shape)} and should have {shape}")
    return array


def _numbers(name: str, given: Any, dtype: Any) -> Any:
    """An array in the dtype of config.pbtxt, unless its numbers would become others: 1.5 is no int, nor 300 an int8."""
    kinds = "biuf" if dtype.kind == "f" else "biu" if dtype.kind in "iu" else "b"
    if given.size and given.dtype.kind not in kinds:
        raise TypeError(f"output '{name}' is {given.dtype} and should be {dtype}")
    array = np.asarray(given, dtype=dtype, order="C")
    if dtype.kind in "iu" and not np.array_equal(array, given):
        raise OverflowError(f"output '{name}' has numbers that {dtype} has not")
    return array


def _place(error: BaseException) -> str:
    """The last line of the user's file that an error went through, or the file."""
    if isinstance(error, SyntaxError) and error.filename == str(FILE):
        return f"{FILE}:{error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(FILE)]
    return f"{FILE}:{lines[-1]}" if lines else str(FILE)


def _line(error: BaseException) -> str:
    """Type and text of an error on one line."""
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = "an error whose text cannot be made"
    return _clean(f"{type(error).__name__}: {text}" if text else type(error).__name__)


def _clean(text: str) -> str:
    """What has no UTF-8 form, which Triton demands, as question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _failure(error: BaseException) -> Any:
    """The error as clients see it: its type and text. The traceback goes to the server's log only."""
    if isinstance(error, BadRequestError):
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
    pb_utils.Logger.log_error(_clean("".join(traceback.format_exception(type(error), error, error.__traceback__))))
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(_line(error), pb_utils.TritonError.INTERNAL))
