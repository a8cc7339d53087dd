"""A thin, strict fake of triton_python_backend_utils: what trtkit's own python models use of it.

The real one takes down the whole server when a request that is over is asked whether it was cancelled (2.51), so here
that is an error; so are a second final response, a response after it, and tensors that no config.pbtxt declares.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

import numpy as np

from trtkit import serving_contract
from trtkit.contract_tensors import Tensor as Declared

_NUMPY = {
    "STRING": np.object_, "BOOL": np.bool_, "FP16": np.float16, "FP32": np.float32, "FP64": np.float64,
    "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64,
    "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64,
}  # fmt: skip
INPUTS = {tensor.name: tensor for tensor in serving_contract.INPUTS}


class TritonError(Exception):
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message: str, code: int = 1) -> None:
        message.encode()  # the real one refuses what has no UTF-8 form
        super().__init__(message)
        self.code = code


class Tensor:
    def __init__(self, name: str, array: Any) -> None:
        assert isinstance(array, np.ndarray), name
        assert array.dtype.type in _NUMPY.values(), (name, array.dtype)
        if array.dtype == np.object_:
            assert all(isinstance(item, bytes) for item in array.reshape(-1)), name
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Any:
        return self._array


class InferenceResponse:
    outputs: Mapping[str, Declared] | None = None
    """What config.pbtxt declares; None for any tensors."""
    batch: int | None = None
    """The size of the batch axis; None for any, 0 for a model without one."""

    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        assert (error is None) != (output_tensors is None)
        self.error = error
        self.tensors: dict[str, Any] = {}
        for tensor in output_tensors or []:
            assert tensor.name() not in self.tensors
            self._check(tensor)
            self.tensors[tensor.name()] = tensor.as_numpy()

    def _check(self, tensor: Tensor) -> None:
        """Whether it is as declared."""
        if self.outputs is None:
            return
        name, array = tensor.name(), tensor.as_numpy()
        declared = self.outputs[name]
        axes = () if self.batch == 0 else (self.batch or -1,)
        dims = (*axes, *(() if declared.scalar else declared.dims))
        assert array.dtype == _NUMPY[declared.dtype], (name, array.dtype)
        assert array.ndim == len(dims), (name, array.shape)
        assert all(dim in (-1, size) for dim, size in zip(dims, array.shape, strict=True)), (name, array.shape, dims)


class Sender:
    """The response sender of one request, and what came out of it."""

    def __init__(self, names: set[str]) -> None:
        self.names = names
        self.responses: list[InferenceResponse] = []
        self.closed = threading.Event()
        self.cancelled = False
        self.asked = 0
        self.broken = False

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        assert not self.closed.is_set(), "a response after the final one"
        assert response is not None or flags == 1
        if self.broken:
            raise RuntimeError("the stream is broken")
        if response is not None:
            assert set(response.tensors) <= self.names
            self.responses.append(response)
        if flags == 1:
            self.closed.set()

    def is_cancelled(self) -> bool:
        assert not self.closed.is_set(), "the server dies when a request that is over is asked this"
        self.asked += 1
        return self.cancelled


class Request:
    """A request with these inputs. For the model `llm`, values become tensors `[1, n]` of the declared type.

    Args:
        outputs: the names that are asked for; None is all outputs of `llm`.
    """

    def __init__(
        self, request_id: str = "", *, timeout_us: int = 0, outputs: Iterable[str] | None = None, **inputs: Any
    ) -> None:
        self._id = request_id
        self._tensors = []
        for name, value in inputs.items():
            array = value
            if not isinstance(value, np.ndarray):
                values = value if isinstance(value, list) else [value]
                coded = [item.encode() if isinstance(item, str) else item for item in values]
                array = np.array([coded], dtype=_NUMPY[INPUTS[name].dtype])
            self._tensors.append(Tensor(name, array))
        names = (tensor.name for tensor in serving_contract.OUTPUTS) if outputs is None else outputs
        self._names = set(names)
        self._timeout = timeout_us
        self.sender = Sender(self._names)

    def request_id(self) -> str:
        return self._id

    def inputs(self) -> list[Tensor]:
        return self._tensors

    def requested_output_names(self) -> set[str]:
        return self._names

    def get_response_sender(self) -> Sender:
        return self.sender

    def timeout(self) -> int:
        return self._timeout

    # What tests ask.

    def wait(self, timeout: float = 20) -> Request:
        assert self.sender.closed.wait(timeout), "no final response"
        return self

    @property
    def error(self) -> TritonError | None:
        return self.sender.responses[-1].error

    @property
    def pieces(self) -> list[str]:
        return [
            response.tensors["text_output"][0, 0].decode() for response in self.sender.responses if not response.error
        ]

    @property
    def text(self) -> str:
        assert self.error is None, self.error
        return "".join(self.pieces)

    def last(self, name: str) -> Any:
        """The values of an output in the final response."""
        array = self.sender.responses[-1].tensors[name]
        return [item.decode() if isinstance(item, bytes) else item for item in array[0].tolist()]


class MetricFamily:
    COUNTER, GAUGE, HISTOGRAM = range(3)
    made: dict[str, Metric] = {}  # noqa: RUF012 - the whole module is made anew for each test

    def __init__(self, *, name: str, description: str, kind: int) -> None:
        assert description
        assert name not in self.made, "a family of this name exists"
        self._name, self._kind = name, kind

    def Metric(self, *, labels: dict[str, str], buckets: list[float] | None = None) -> Metric:  # noqa: N802 - its name
        assert (buckets is not None) == (self._kind == self.HISTOGRAM)
        metric = Metric(self._kind, labels)
        self.made[self._name] = metric
        return metric


class Metric:
    def __init__(self, kind: int, labels: dict[str, str]) -> None:
        self._kind, self.labels = kind, labels
        self.value = 0.0
        self.observed: list[float] = []

    def increment(self, by: float) -> None:
        assert self._kind == MetricFamily.GAUGE or (self._kind == MetricFamily.COUNTER and by >= 0)
        self.value += by

    def set(self, value: float) -> None:
        assert self._kind == MetricFamily.GAUGE
        self.value = value

    def observe(self, value: float) -> None:
        assert self._kind == MetricFamily.HISTOGRAM
        self.observed.append(value)


class Logger:
    errors: list[str] = []  # noqa: RUF012 - as above
    others: list[str] = []  # noqa: RUF012

    @classmethod
    def log_error(cls, line: str) -> None:
        line.encode()
        cls.errors.append(line)

    @classmethod
    def log_warn(cls, line: str) -> None:
        line.encode()
        cls.others.append(line)

    log_info = log_warn


def module(outputs: Iterable[Declared] | None = serving_contract.OUTPUTS, *, batch: int | None = 1) -> ModuleType:
    """The fake as a module, to be put into sys.modules.

    Args:
        outputs: what the model's config.pbtxt declares; responses with anything else fail. None lets all through.
        batch: rows of every response; None for any number, 0 for a model without a batch axis.
    """
    fake: Any = ModuleType("triton_python_backend_utils")
    fake.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    fake.TritonError, fake.Tensor = TritonError, Tensor
    declared = None if outputs is None else {tensor.name: tensor for tensor in outputs}
    fake.InferenceResponse = type("InferenceResponse", (InferenceResponse,), {"outputs": declared, "batch": batch})
    fake.MetricFamily = type("MetricFamily", (MetricFamily,), {"made": {}})
    fake.Logger = type("Logger", (Logger,), {"errors": [], "others": []})
    fake.using_decoupled_model_transaction_policy = lambda config: config["model_transaction_policy"]["decoupled"]
    fake.triton_string_to_numpy = lambda name: _NUMPY[name.removeprefix("TYPE_")]
    fake.get_input_tensor_by_name = lambda request, name: next(
        (tensor for tensor in request.inputs() if tensor.name() == name), None
    )
    return fake
