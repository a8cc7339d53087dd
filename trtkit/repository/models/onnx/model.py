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


class TritonPythonModel:
    """One instance: one onnxruntime session on the CPU."""

    def initialize(self, args: dict[str, str]) -> None:
        """Opens the model of this version."""
        config = json.loads(args["model_config"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(config["parameters"].get("threads", {}).get("string_value", "0"))
        file = Path(__file__).parent / "model.onnx"
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.batched = config["max_batch_size"] > 0
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.texts = {tensor["name"] for tensor in config["input"] if tensor["data_type"] == "TYPE_STRING"}
        self.types = {
            tensor["name"]: pb_utils.triton_string_to_numpy(tensor["data_type"]) for tensor in config["output"]
        }

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
            shapes = tuple(values.shape[1:] for values in feed.values())
            key = (tuple(sorted(request.requested_output_names())), shapes) if self.batched else index
            groups.setdefault(key, []).append((index, feed))
        for members in groups.values():
            answers = self._answers([(requests[index], feed) for index, feed in members])
            for (index, _), answer in zip(members, answers, strict=True):
                responses[index] = answer
        return responses

    def _answers(self, members: list[tuple[Any, dict[str, Any]]]) -> list[Any]:
        """One run for all, or, when that fails, one for each: only the request that it fails for gets the error."""
        try:
            return self._run(members)
        except Exception as error:  # onnxruntime has a type for every kind of failure
            if len(members) == 1:
                return [_failure(error)]
            return [answer for member in members for answer in self._answers([member])]

    def _feed(self, request: Any) -> dict[str, Any]:
        feed = {}
        for name in self.inputs:
            values = pb_utils.get_input_tensor_by_name(request, name).as_numpy()
            feed[name] = _decoded(values) if name in self.texts else values
        return feed

    def _run(self, members: list[tuple[Any, dict[str, Any]]]) -> list[Any]:
        wanted = [name for name in members[0][0].requested_output_names() if name in self.types] or list(self.types)
        feeds = [feed for _, feed in members]
        joined = feeds[0]
        if len(feeds) > 1:
            joined = {name: np.concatenate([feed[name] for feed in feeds]) for name in self.inputs}
        results = self.session.run(wanted, joined)
        sizes = [len(feed[self.inputs[0]]) for feed in feeds] if self.batched else [0]
        ends = np.cumsum(sizes)
        answers = []
        for end, size in zip(ends, sizes, strict=True):
            tensors = []
            for name, values in zip(wanted, results, strict=True):
                part = values[end - size : end] if self.batched else values
                tensors.append(pb_utils.Tensor(name, _encoded(part, self.types[name])))
            answers.append(pb_utils.InferenceResponse(tensors))
        return answers


def _decoded(values: Any) -> Any:
    """Triton's bytes as the str that onnxruntime takes."""
    flat = [text.decode("utf-8") if isinstance(text, bytes) else str(text) for text in values.reshape(-1)]
    return np.array(flat, dtype=object).reshape(values.shape)


def _encoded(values: Any, dtype: Any) -> Any:
    """An output in the dtype of config.pbtxt; texts as bytes."""
    if dtype in (np.object_, np.bytes_):
        flat = [text.encode("utf-8") if isinstance(text, str) else bytes(text) for text in values.reshape(-1)]
        return np.array(flat, dtype=np.object_).reshape(values.shape)
    return np.ascontiguousarray(values, dtype=dtype)


def _failure(error: Exception) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"onnxruntime: {error}"))
