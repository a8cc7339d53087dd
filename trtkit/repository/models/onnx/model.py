"""Runs the model.onnx beside it with onnxruntime: the same config.pbtxt, tensors and answers as Triton's own backend.

It needs numpy and onnxruntime and nothing else. Requests of equal shapes share one run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class BadRequestError(Exception):
    """What a request gets wrong, in words for its sender."""


class TritonPythonModel:
    """One instance: one onnxruntime session on the CPU."""

    def initialize(self, args: dict[str, str]) -> None:
        """Opens the model of this version.

        Raises:
            RuntimeError: model.onnx is missing or damaged, or has not the tensors of config.pbtxt; one line.
        """
        config = json.loads(args["model_config"])
        threads = config["parameters"].get("threads", {}).get("string_value", "0")
        self.batched = config["max_batch_size"] > 0
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.texts = {tensor["name"] for tensor in config["input"] if tensor["data_type"] == "TYPE_STRING"}
        self.types = {
            tensor["name"]: pb_utils.triton_string_to_numpy(tensor["data_type"]) for tensor in config["output"]
        }
        file = Path(__file__).parent / "model.onnx"
        problem = "" if file.is_file() else "the file is missing"
        if not threads.isdecimal():
            problem = f"config.pbtxt: parameter 'threads' is '{threads}', which is no whole number"
        if not problem:
            try:
                self.session = _session(file, int(threads))
                problem = self._strangers()
            except Exception as error:  # onnxruntime has a type for every kind of failure
                problem = _line(error)
        if problem:  # raised here, so that the server's log says no more than this line and where it comes from
            raise RuntimeError(f"{file}: {problem}")

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request, in order; what one gets wrong leaves the others alone."""
        responses: list[Any] = [None] * len(requests)
        groups: dict[Any, list[tuple[int, dict[str, Any]]]] = {}
        for index, request in enumerate(requests):
            try:
                feed = self._feed(request)
            except Exception as error:  # of whatever a client can send
                responses[index] = _failure(error)
                continue
            # One run answers requests with the same shapes behind the batch axis that ask for the same outputs.
            kinds = tuple((values.dtype, values.shape[1:]) for values in feed.values())
            key = (tuple(sorted(request.requested_output_names())), kinds) if self.batched else index
            groups.setdefault(key, []).append((index, feed))
        for members in groups.values():
            answers = self._answers([(requests[index], feed) for index, feed in members])
            for (index, _), answer in zip(members, answers, strict=True):
                responses[index] = answer
        return responses

    def _strangers(self) -> str:
        """Which tensors config.pbtxt and the graph do not share, if any."""
        inputs, outputs = (
            {item.name for item in items} for items in (self.session.get_inputs(), self.session.get_outputs())
        )
        wrong = sorted({*self.inputs} ^ inputs) or sorted({*self.types} - outputs)
        return f"its graph and config.pbtxt do not both have the tensor '{wrong[0]}'" if wrong else ""

    def _answers(self, members: list[tuple[Any, dict[str, Any]]]) -> list[Any]:
        """One run for all, or, when that fails, one for each: only the request that it fails for gets the error."""
        try:
            return self._run(members)
        except Exception as error:
            if len(members) == 1:
                return [_failure(error)]
            return [answer for member in members for answer in self._answers([member])]

    def _feed(self, request: Any) -> dict[str, Any]:
        feed = {}
        for name in self.inputs:
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            if tensor is None:
                raise BadRequestError(f"input '{name}' is missing")
            values = tensor.as_numpy()
            feed[name] = _decoded(name, values) if name in self.texts else values
        if self.batched and len(sizes := {len(values) for values in feed.values()}) > 1:
            raise BadRequestError(f"the inputs have different batch sizes: {sorted(sizes)}")
        return feed

    def _run(self, members: list[tuple[Any, dict[str, Any]]]) -> list[Any]:
        wanted = [name for name in members[0][0].requested_output_names() if name in self.types] or list(self.types)
        feeds = [feed for _, feed in members]
        joined = feeds[0]
        if len(feeds) > 1:
            joined = {name: np.concatenate([feed[name] for feed in feeds]) for name in self.inputs}
        results = self.session.run(wanted, joined)
        sizes = [len(feed[self.inputs[0]]) for feed in feeds] if self.batched else [0]
        for name, values in zip(wanted, results, strict=True):
            if self.batched and values.shape[:1] != (sum(sizes),):
                raise ValueError(f"output '{name}' has shape {list(values.shape)} for a batch of {sum(sizes)}")
        ends = np.cumsum(sizes)
        answers = []
        for end, size in zip(ends, sizes, strict=True):
            tensors = []
            for name, values in zip(wanted, results, strict=True):
                part = values[end - size : end] if self.batched else values
                tensors.append(pb_utils.Tensor(name, _encoded(part, self.types[name])))
            answers.append(pb_utils.InferenceResponse(tensors))
        return answers


def _session(file: Path, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def _decoded(name: str, values: Any) -> Any:
    """Triton's bytes as the str that onnxruntime takes."""
    try:
        flat = [text.decode("utf-8") if isinstance(text, bytes) else str(text) for text in values.reshape(-1)]
    except UnicodeDecodeError as error:
        raise BadRequestError(f"input '{name}' is not UTF-8: byte {error.start}: {error.reason}") from None
    return np.array(flat, dtype=object).reshape(values.shape)


def _encoded(values: Any, dtype: Any) -> Any:
    """An output in the dtype of config.pbtxt; texts as bytes."""
    if dtype in (np.object_, np.bytes_):
        flat = [text.encode("utf-8") if isinstance(text, str) else bytes(text) for text in values.reshape(-1)]
        return np.array(flat, dtype=np.object_).reshape(values.shape)
    return np.ascontiguousarray(values, dtype=dtype)


def _line(error: Exception) -> str:
    """The error on one line; onnxruntime's tables of sizes take several."""
    return " ".join(str(error).split()) or type(error).__name__


def _failure(error: Exception) -> Any:
    # onnxruntime's own types are not public; what it calls invalid arguments came with the request.
    wrong = isinstance(error, BadRequestError) or type(error).__name__ == "InvalidArgument"
    code = pb_utils.TritonError.INVALID_ARG if wrong else pb_utils.TritonError.INTERNAL
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"onnxruntime: {_line(error)}", code))
