"""The tensors of the ensemble and of the engine model, and their bytes on the wire.

Names, dtypes and shapes: the client-visible part of NVIDIA's `inflight_batcher_llm` model configs
(triton-inference-server/tensorrtllm_backend). Encoding: "Tensor Data" in the KServe v2 inference protocol; a BYTES
element is a little-endian 32-bit length and the bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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

# field of GenerateRequest -> (dtype of the ensemble's input); the input has the field's name
_OPTIONAL_INPUTS = {
    "temperature": "FP32",
    "top_k": "INT32",
    "top_p": "FP32",
    "repetition_penalty": "FP32",
    "presence_penalty": "FP32",
    "frequency_penalty": "FP32",
    "min_tokens": "INT32",
    "seed": "UINT64",
}


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


def ensemble_inputs(request: GenerateRequest, *, stream: bool) -> list[Tensor]:
    """The ensemble's inputs for one request. What the request leaves open is not sent; the prompt is not echoed."""
    inputs = [scalar("text_input", "BYTES", request.prompt), scalar("max_tokens", "INT32", request.max_tokens)]
    for name, datatype in _OPTIONAL_INPUTS.items():
        value = getattr(request, name)
        if value is not None:
            inputs.append(scalar(name, datatype, value))
    for name, words in (("stop_words", request.stop_words), ("bad_words", request.bad_words)):
        if words:
            inputs.append(vector(name, "BYTES", words))
    inputs.append(scalar("stream", "BOOL", stream))
    inputs.append(scalar("exclude_input_in_output", "BOOL", True))
    return inputs


def engine_inputs(
    input_ids: Sequence[int], max_tokens: int, *, end_id: int | None, top_k: int | None, stream: bool
) -> list[Tensor]:
    """The engine model's inputs for one request."""
    inputs = [
        vector("input_ids", "INT32", input_ids),
        scalar("input_lengths", "INT32", len(input_ids)),
        scalar("request_output_len", "INT32", max_tokens),
        scalar("streaming", "BOOL", stream),
        scalar("exclude_input_in_output", "BOOL", True),
    ]
    if end_id is not None:
        inputs.append(scalar("end_id", "INT32", end_id))
    if top_k is not None:
        inputs.append(scalar("runtime_top_k", "INT32", top_k))
    return inputs


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
