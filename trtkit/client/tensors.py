"""The tensors of requests, for text (`trtkit.serving_contract`) or tokens (`trtkit.contract`), and their bytes.

Encoding: "Tensor Data" in the KServe v2 inference protocol; a BYTES element is a little-endian 32-bit length and the
bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from trtkit import contract, serving_contract
from trtkit.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from trtkit.client.api import GenerateRequest

_FORMATS = {
    "BOOL": "?",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
    "FP16": "e",
    "FP32": "f",
    "FP64": "d",
}
"""Triton dtype -> `struct` format; the same letters, little-endian, name the numpy dtypes."""


@dataclass(frozen=True)
class Tensor:
    """One named input of a request.

    Attributes:
        datatype: Triton's name, such as `INT32` or `BYTES`.
        shape: with the batch dimension, where the model has one.
        data: all elements in row-major order: numbers, or `str` for `BYTES`.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Sequence[Any]

    def to_bytes(self) -> bytes:
        """The elements as `raw_input_contents` of the gRPC protocol.

        Raises:
            InputError: an element does not fit the dtype.
        """
        try:
            if self.datatype == "BYTES":
                encoded = [text.encode() for text in self.data]
                return b"".join(struct.pack("<I", len(item)) + item for item in encoded)
            return struct.pack(f"<{len(self.data)}{_FORMATS[self.datatype]}", *self.data)
        except (struct.error, UnicodeEncodeError, OverflowError) as error:
            cause = f"input '{self.name}': not {self.datatype}: {error}"
            raise InputError(cause, "send a value of the input's type") from None


def scalar(name: str, datatype: str, value: object) -> Tensor:
    """One value for one request of a model that batches: shape [1, 1]."""
    return Tensor(name, datatype, (1, 1), (value,))


def vector(name: str, datatype: str, values: Sequence[object]) -> Tensor:
    """Several values for one request of a model that batches: shape [1, n]."""
    return Tensor(name, datatype, (1, len(values)), tuple(values))


def text_inputs(request: GenerateRequest, *, stream: bool) -> list[Tensor]:
    """The inputs of `llm` or of an ensemble for one request: all but `messages` are called the same in both.

    What the request leaves open is not sent; the prompt is not echoed.
    """
    values = {item.name: getattr(request, item.name) for item in fields(request)}
    values |= {"stream": stream, "exclude_input_in_output": True}
    values |= {name: values[name] or None for name in ("stop_words", "bad_words")}
    values["text_input"] = request.prompt if request.prompt or not request.messages else None
    values["messages"] = _as_json(request.messages) if request.messages else None
    return _given(serving_contract.INPUTS, values)


def _as_json(messages: Sequence[Mapping[str, Any]]) -> str:
    try:
        return json.dumps(list(messages), ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"messages: no JSON can say this: {error}", "send texts, numbers, lists and dicts") from None


def engine_inputs(
    input_ids: Sequence[int], max_tokens: int, *, end_id: int | None, top_k: int | None, stream: bool
) -> list[Tensor]:
    """The engine model's inputs for one request."""
    values = {
        "input_ids": input_ids,
        "input_lengths": len(input_ids),
        "request_output_len": max_tokens,
        "end_id": end_id,
        "runtime_top_k": top_k,
        "streaming": stream,
        "exclude_input_in_output": True,
    }
    return _given(contract.llm_inputs(), values)


def _given(table: Sequence[contract.Tensor], values: Mapping[str, Any]) -> list[Tensor]:
    """Those inputs of a model that have a value other than None."""
    found = []
    for tensor in table:
        if (value := values.get(tensor.name)) is not None:
            make = scalar if tensor.dims == (1,) else vector
            found.append(make(tensor.name, tensor.wire_dtype, value))
    return found


def from_bytes(datatype: str, shape: Sequence[int], raw: bytes) -> npt.NDArray[np.generic]:
    """An output tensor: `raw_output_contents` of the gRPC protocol, as an array. BYTES become `str` objects."""
    import numpy as np

    if datatype == "BYTES":
        return np.array(split_strings(raw), dtype=object).reshape(shape)
    return np.frombuffer(raw, dtype=f"<{_FORMATS[datatype]}").reshape(shape)


def split_strings(raw: bytes) -> list[str]:
    """The elements of a BYTES tensor. Bytes that are not UTF-8 become U+FFFD."""
    strings, at = [], 0
    while at < len(raw):
        (length,) = struct.unpack_from("<I", raw, at)
        strings.append(raw[at + 4 : at + 4 + length].decode(errors="replace"))
        at += 4 + length
    return strings


def to_array(datatype: str, data: object, shape: Sequence[int] | None = None) -> npt.NDArray[np.generic]:
    """An output tensor out of JSON, where one element may stand bare."""
    import numpy as np

    values = data if isinstance(data, list) else [data]
    array = np.array(values, dtype=object if datatype == "BYTES" else np.dtype(f"<{_FORMATS[datatype]}"))
    return array if shape is None else array.reshape(shape)


def new_tokens(output_ids: Sequence[int], length: int, input_ids: Sequence[int], max_tokens: int) -> list[int]:
    """The first beam's answer without padding behind it and without the prompt, which some engines always echo."""
    tokens = [int(token) for token in output_ids[:length]]
    if len(tokens) > max_tokens and tokens[: len(input_ids)] == list(input_ids):
        return tokens[len(input_ids) :]
    return tokens
