"""Urls, requests and tensors: what is decided before a byte is sent."""

from __future__ import annotations

import json
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

from trtkit.client import GenerateRequest, connect
from trtkit.client.api import new_request_id, split_url
from trtkit.client.tensors import (
    Tensor,
    engine_inputs,
    from_bytes,
    new_tokens,
    split_strings,
    text_inputs,
    to_array,
)
from trtkit.errors import InputError


@pytest.mark.parametrize(
    ("url", "protocol", "expected"),
    [
        ("grpc://127.0.0.1:8001", None, ("grpc", "127.0.0.1:8001")),
        ("http://127.0.0.1:8000", None, ("http", "127.0.0.1:8000")),
        ("http://127.0.0.1:8000/", "http", ("http", "127.0.0.1:8000")),
        ("https://example.test/triton", None, ("https", "example.test/triton")),
        ("HTTP://example.test:1", None, ("http", "example.test:1")),
        ("grpcs://example.test:443", "grpc", ("grpcs", "example.test:443")),
        ("127.0.0.1:8001", "grpc", ("grpc", "127.0.0.1:8001")),
        ("127.0.0.1:8000", "http", ("http", "127.0.0.1:8000")),
        ("grpc://[::1]:8001", None, ("grpc", "[::1]:8001")),
        (" http://a.test:1 ", None, ("http", "a.test:1")),
    ],
)
def test_urls(url: str, protocol: str | None, expected: tuple[str, str]) -> None:
    assert split_url(url, protocol) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("url", "protocol", "named"),
    [
        ("127.0.0.1:8001", None, "which protocol"),
        ("ftp://127.0.0.1:8001", None, "'ftp'"),
        ("http://127.0.0.1:8001", "grpc", "contradicts"),
        ("grpc://127.0.0.1", None, "port"),
        ("grpc://127.0.0.1:port", None, "not a url"),
        ("grpc://127.0.0.1:99999", None, "not a url"),
        ("grpc://:8001", None, "host"),
        ("grpc://127.0.0.1:1/path", None, "path"),
        ("http://me:secret@127.0.0.1:1", None, "password"),
        ("http://127.0.0.1:1/?q=1", None, "not a url"),
        ("", "http", "host"),
    ],
)
def test_wrong_urls(url: str, protocol: str | None, named: str) -> None:
    with pytest.raises(InputError) as error:
        connect(url, protocol=protocol)  # type: ignore[arg-type]
    assert named in error.value.cause and "secret" not in error.value.cause
    assert "grpc://HOST:PORT" in error.value.fix


def test_connect_speaks_the_protocol_of_the_url() -> None:
    for url, protocol in (("grpc://127.0.0.1:8001", "grpc"), ("http://127.0.0.1:8000", "http")):
        client = connect(url, model="m")
        assert (client.url, client.protocol, client.model) == (url, protocol, "m")


def test_request_ids_are_unique_unless_given() -> None:
    assert new_request_id("mine") == "mine"
    assert len({new_request_id() for _ in range(1000)}) == 1000


def test_a_plain_request_sends_only_what_the_contract_requires_and_two_flags() -> None:
    inputs = {tensor.name: tensor for tensor in text_inputs(GenerateRequest("hi", max_tokens=3), stream=True)}
    assert set(inputs) == {"text_input", "max_tokens", "stream", "exclude_input_in_output"}
    assert inputs["stream"].data == (True,) and inputs["exclude_input_in_output"].data == (True,)
    assert all(tensor.shape == (1, 1) for tensor in inputs.values())


def test_messages_take_the_place_of_the_prompt() -> None:
    chat = [{"role": "user", "content": 'a "€"'}]
    inputs = {tensor.name: tensor for tensor in text_inputs(GenerateRequest(messages=chat), stream=False)}
    assert "text_input" not in inputs and inputs["messages"].shape == (1, 1)
    assert json.loads(inputs["messages"].data[0]) == chat
    both = {tensor.name for tensor in text_inputs(GenerateRequest("a", messages=chat), stream=False)}
    assert {"text_input", "messages"} <= both, "judging that is the server's work"
    with pytest.raises(InputError, match="messages: no JSON can say this"):
        text_inputs(GenerateRequest(messages=[{"role": object()}]), stream=False)


def test_every_option_has_its_dtype_and_shape() -> None:
    request = GenerateRequest(
        "hi",
        max_tokens=3,
        temperature=0.5,
        top_k=0,
        top_p=0.0,
        repetition_penalty=1.1,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        min_tokens=1,
        seed=2**64 - 1,
        stop_words=["a", "b"],
        bad_words=["c"],
        end_id=-1,
    )
    inputs = {tensor.name: tensor for tensor in text_inputs(request, stream=False)}
    dtypes = {name: tensor.datatype for name, tensor in inputs.items()}
    assert dtypes == {
        "text_input": "BYTES",
        "max_tokens": "INT32",
        "temperature": "FP32",
        "top_k": "INT32",
        "top_p": "FP32",
        "repetition_penalty": "FP32",
        "presence_penalty": "FP32",
        "frequency_penalty": "FP32",
        "min_tokens": "INT32",
        "seed": "UINT64",
        "stop_words": "BYTES",
        "bad_words": "BYTES",
        "end_id": "INT32",
        "stream": "BOOL",
        "exclude_input_in_output": "BOOL",
    }
    assert inputs["stop_words"].shape == (1, 2) and inputs["bad_words"].shape == (1, 1)
    assert inputs["top_k"].data == (0,), "zero is a value, not an omission"
    assert all(tensor.to_bytes() for tensor in inputs.values())


def test_engine_inputs() -> None:
    inputs = {tensor.name: tensor for tensor in engine_inputs([4, 5, 6], 7, end_id=-1, top_k=1, stream=False)}
    assert inputs["input_ids"] == Tensor("input_ids", "INT32", (1, 3), (4, 5, 6))
    assert inputs["input_lengths"].data == (3,) and inputs["request_output_len"].data == (7,)
    assert inputs["end_id"].data == (-1,) and inputs["runtime_top_k"].data == (1,)
    without = {tensor.name for tensor in engine_inputs([4], 7, end_id=None, top_k=None, stream=False)}
    assert not {"end_id", "runtime_top_k"} & without


@pytest.mark.parametrize(
    "tensor",
    [
        Tensor("x", "INT32", (1, 1), (2**31,)),
        Tensor("x", "UINT64", (1, 1), (-1,)),
        Tensor("x", "INT32", (1, 1), ("text",)),
        Tensor("x", "FP32", (1, 1), ("text",)),
        Tensor("x", "FP32", (1, 1), (1e300,)),
        Tensor("x", "BYTES", (1, 1), ("\ud800",)),
    ],
)
def test_values_that_do_not_fit_are_named(tensor: Tensor) -> None:
    with pytest.raises(InputError, match=r"input 'x': not " + tensor.datatype):
        tensor.to_bytes()


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_strings_are_encoded_as_tritonclient_does(texts: list[str]) -> None:
    raw = Tensor("x", "BYTES", (len(texts),), texts).to_bytes()
    theirs = serialize_byte_tensor(np.array([text.encode() for text in texts], dtype=object))
    assert raw == (theirs.item() if theirs.size else b"")
    assert split_strings(raw) == texts
    assert [item.decode() for item in deserialize_bytes_tensor(raw)] == texts


@pytest.mark.parametrize(
    ("datatype", "dtype"),
    [
        ("BOOL", "?"),
        ("INT8", "i1"),
        ("INT16", "i2"),
        ("INT32", "i4"),
        ("INT64", "i8"),
        ("UINT8", "u1"),
        ("UINT16", "u2"),
        ("UINT32", "u4"),
        ("UINT64", "u8"),
        ("FP16", "f2"),
        ("FP32", "f4"),
        ("FP64", "f8"),
    ],
)
def test_numbers_are_encoded_as_numpy_does(datatype: str, dtype: str) -> None:
    array = np.array([[1, 0, 1]], dtype=dtype)
    raw = Tensor("x", datatype, (1, 3), array.reshape(-1).tolist()).to_bytes()
    assert raw == array.astype(np.dtype(dtype).newbyteorder("<")).tobytes()
    back = from_bytes(datatype, [1, 3], raw)
    assert back.dtype == array.dtype and np.array_equal(back, array)
    assert np.array_equal(to_array(datatype, [1, 0, 1], [1, 3]), array)


def test_bytes_that_are_no_text_become_replacement_characters() -> None:
    assert split_strings(struct.pack("<I", 2) + b"\xe2\x82") == ["\ufffd"]


@pytest.mark.parametrize(
    ("output", "length", "expected"),
    [
        ([1, 2], 2, [1, 2]),
        ([1, 2, 9, 9], 2, [1, 2]),
        ([7, 8, 1, 2], 4, [1, 2]),  # longer than asked for and starting with the prompt: echoed
        ([7, 8, 1], 3, [7, 8, 1]),  # as long as asked for: an answer that happens to repeat the prompt
        ([], 0, []),
    ],
)
def test_new_tokens(output: list[int], length: int, expected: list[int]) -> None:
    assert new_tokens(output, length, [7, 8], 3) == expected


def test_importing_the_interface_imports_no_client_library() -> None:
    code = (
        "import sys, json, trtkit.client; "
        "print(json.dumps([m for m in ('numpy', 'grpc', 'aiohttp', 'tritonclient') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
