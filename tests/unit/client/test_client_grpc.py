"""The gRPC client against a small server on a real socket that speaks Triton's service.

The server is a stand-in for Triton's gRPC front end: decoupled models answer on the stream only, as on a real one.
"""

# ruff: noqa: N802  (gRPC names the methods)

from __future__ import annotations

import asyncio
import struct
import time
import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from trtkit.client import Ending, GenerateRequest, LLMClient, RequestTimeoutError, ServerError, connect
from trtkit.client.tensors import engine_inputs
from trtkit.errors import InputError, LacksError

Answer = Any  # a ModelInferResponse, an error message, a pause in seconds, or a gRPC status


def text(*values: str | bytes) -> Any:
    raw = [value.encode() if isinstance(value, str) else value for value in values]
    response = service_pb2.ModelInferResponse(model_name="ensemble")
    response.outputs.add(name="text_output", datatype="BYTES", shape=[1, len(raw)])
    response.raw_output_contents.append(b"".join(struct.pack("<I", len(item)) + item for item in raw))
    return response


def ending(response: Any, reason: str, prompt_tokens: int, completion_tokens: list[int]) -> Any:
    """The response with what the model `llm` says with its last piece."""
    for name, datatype, shape, raw in (
        ("finish_reason", "BYTES", [1, 1], struct.pack("<I", len(reason)) + reason.encode()),
        ("prompt_tokens", "INT32", [1, 1], struct.pack("<i", prompt_tokens)),
        ("completion_tokens", "INT32", [1, len(completion_tokens)], np.array(completion_tokens, "<i4").tobytes()),
    ):
        response.outputs.add(name=name, datatype=datatype, shape=shape)
        response.raw_output_contents.append(raw)
    return response


def tokens(values: list[int], length: int | None = None) -> Any:
    response = service_pb2.ModelInferResponse(model_name="tensorrt_llm")
    response.outputs.add(name="output_ids", datatype="INT32", shape=[1, 1, len(values)])
    response.raw_output_contents.append(np.array(values, dtype="<i4").tobytes())
    response.outputs.add(name="sequence_length", datatype="INT32", shape=[1, 1])
    count = len(values) if length is None else length
    response.raw_output_contents.append(struct.pack("<i", count))
    return response


class Triton(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Answers every inference with `answers`; remembers the requests and whether a client cancelled."""

    def __init__(self, answers: list[Answer], *, decoupled: bool) -> None:
        self.answers, self.decoupled = answers, decoupled
        self.outputs = ["text_output"]
        self.requests: list[Any] = []
        self.calls: list[str] = []
        self.asked = asyncio.Event()
        self.pausing = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def _answer(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.requests.append(request)
        self.asked.set()
        for answer in self.answers:
            if isinstance(answer, float):
                try:
                    self.pausing.set()
                    await asyncio.sleep(answer)
                except asyncio.CancelledError:
                    self.cancelled.set()
                    raise
            elif isinstance(answer, grpc.StatusCode):
                await context.abort(answer, "the server's own words")
            else:
                yield answer

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        self.calls.append("ModelInfer")
        if self.decoupled:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "ModelInfer RPC doesn't support decoupled models")
        async for answer in self._answer(request, context):
            return answer
        raise AssertionError("a unary call has an answer")

    async def ModelStreamInfer(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        self.calls.append("ModelStreamInfer")
        async for request in requests:
            async for answer in self._answer(request, context):
                if isinstance(answer, str):
                    yield service_pb2.ModelStreamInferResponse(error_message=answer)
                else:
                    yield service_pb2.ModelStreamInferResponse(infer_response=answer)

    async def ModelConfig(self, request: Any, context: Any) -> Any:
        self.calls.append("ModelConfig")
        if request.name == "nope":
            await context.abort(grpc.StatusCode.NOT_FOUND, "Request for unknown model: 'nope' is not found")
        response = service_pb2.ModelConfigResponse()
        response.config.name = request.name
        response.config.max_batch_size = 8
        response.config.model_transaction_policy.decoupled = self.decoupled
        for name in self.outputs:
            response.config.output.add(name=name)
        tensor = response.config.input.add(name="input_ids", data_type="TYPE_INT32", dims=[2, -1])
        tensor.optional = True
        response.config.parameters["key"].string_value = "value"
        return response

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        response = service_pb2.ModelMetadataResponse(name=request.name, versions=["1"])
        response.inputs.add(name="x", datatype="INT32", shape=[-1, 1])
        return response

    async def ModelStatistics(self, request: Any, context: Any) -> Any:
        response = service_pb2.ModelStatisticsResponse()
        response.model_stats.add(name=request.name).inference_stats.success.count = 2**40
        return response

    async def RepositoryIndex(self, request: Any, context: Any) -> Any:
        response = service_pb2.RepositoryIndexResponse()
        response.models.add(name="ensemble", state="READY")
        response.models.add(name="broken", state="UNAVAILABLE", reason="it is broken")
        return response

    async def ServerLive(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerReadyResponse(ready=False)

    async def ModelReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelReadyResponse(ready=request.name == "ensemble")


@asynccontextmanager
async def serving(*answers: Answer, decoupled: bool = True) -> AsyncIterator[tuple[Triton, LLMClient]]:
    triton = Triton(list(answers), decoupled=decoupled)
    server = grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(triton, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with connect(f"grpc://127.0.0.1:{port}") as client:
            yield triton, client
    finally:
        await server.stop(None)


async def texts(client: LLMClient, **options: Any) -> list[str]:
    return [chunk.text async for chunk in client.stream(GenerateRequest("x", max_tokens=9), **options)]


@pytest.mark.parametrize(("decoupled", "call"), [(True, "ModelStreamInfer"), (False, "ModelInfer")])
async def test_generate_uses_the_call_that_the_model_understands(decoupled: bool, call: str) -> None:
    async with serving(text("héllo"), decoupled=decoupled) as (triton, client):
        request = GenerateRequest("a€", max_tokens=3, top_k=1, stop_words=["x", "yz"], request_id="mine")
        done = await client.generate(request)
        assert (await client.generate(request)).text == "héllo"
    assert (done.text, done.request_id) == ("héllo", "mine")
    assert triton.calls == ["ModelConfig", call, call], "the config is asked for once"
    sent = triton.requests[0]
    shapes = {tensor.name: (tensor.datatype, list(tensor.shape)) for tensor in sent.inputs}
    assert shapes == {
        "text_input": ("BYTES", [1, 1]),
        "max_tokens": ("INT32", [1, 1]),
        "top_k": ("INT32", [1, 1]),
        "stop_words": ("BYTES", [1, 2]),
        "stream": ("BOOL", [1, 1]),
        "exclude_input_in_output": ("BOOL", [1, 1]),
    }
    raw = dict(zip([tensor.name for tensor in sent.inputs], sent.raw_input_contents, strict=True))
    assert raw["text_input"] == b"\x04\0\0\0a\xe2\x82\xac" and raw["max_tokens"] == b"\x03\0\0\0"
    assert raw["stream"] == b"\0" and raw["exclude_input_in_output"] == b"\1"
    assert [output.name for output in sent.outputs] == ["text_output"], "nothing that the client throws away"


async def test_request_ids_are_unique() -> None:
    async with serving(text("a")) as (triton, client):
        done = [await client.generate(GenerateRequest("x")) for _ in range(3)]
    ids = [request.id for request in triton.requests]
    assert ids == [completion.request_id for completion in done] and len(set(ids)) == 3 and all(ids)


async def test_the_last_piece_tells_about_the_whole_answer() -> None:
    last = ending(text("b"), "stop", 3, [2, 7])
    async with serving(text("a"), last) as (triton, client):
        triton.outputs += ["finish_reason", "prompt_tokens", "completion_tokens", "cum_log_probs"]
        done = await client.generate(GenerateRequest("x"))
        chunks = [chunk async for chunk in client.stream(GenerateRequest("x"))]
    assert (done.text, done.finish_reason, done.prompt_tokens, done.completion_tokens) == ("ab", "stop", 3, 2)
    assert [chunk.ending for chunk in chunks] == [None, Ending("stop", 3, 2)]
    wanted = ["text_output", "finish_reason", "prompt_tokens", "completion_tokens"]
    assert [[output.name for output in request.outputs] for request in triton.requests] == [wanted, wanted]


async def test_a_model_that_says_nothing_of_the_whole_answer() -> None:
    async with serving(text("a")) as (_, client):
        done = await client.generate(GenerateRequest("x"))
        (chunk,) = [chunk async for chunk in client.stream(GenerateRequest("x"))]
    assert (done.finish_reason, done.prompt_tokens, done.completion_tokens, chunk.ending) == (None, None, None, None)


async def test_another_model_can_be_asked() -> None:
    async with serving(text("a")) as (triton, client):
        await client.generate(GenerateRequest("x"), model="other")
        _ = [chunk async for chunk in client.stream(GenerateRequest("x"), model="third")]
    assert [request.model_name for request in triton.requests] == ["other", "third"]


async def test_no_answer_at_all_is_an_error() -> None:
    async with serving() as (_, client):
        for call in (client.generate(GenerateRequest("x")), texts(client)):
            with pytest.raises(ServerError, match="ended before it began"):
                await call


async def test_several_responses_and_a_bare_final_one_are_one_answer() -> None:
    empty = service_pb2.ModelInferResponse(model_name="ensemble")
    async with serving(text("a "), text("b", "second beam"), empty) as (_, client):
        assert (await client.generate(GenerateRequest("x"))).text == "a b"


async def test_a_stream_yields_each_piece_as_it_comes() -> None:
    async with serving(text("a"), text(""), 30.0) as (triton, client):
        begin = time.perf_counter_ns()
        async with aclosing(client.stream(GenerateRequest("x"))) as chunks:
            first, second = await anext(chunks), await anext(chunks)
        assert (first.text, second.text) == ("a", "")
        assert begin < first.received_ns <= second.received_ns < time.perf_counter_ns()
    assert (
        dict(zip([t.name for t in triton.requests[0].inputs], triton.requests[0].raw_input_contents, strict=True))[
            "stream"
        ]
        == b"\1"
    )


async def test_closing_a_stream_early_cancels() -> None:
    async with serving(text("a"), 30.0) as (triton, client):
        async with aclosing(client.stream(GenerateRequest("x"))) as chunks:
            async for _ in chunks:
                break
        await asyncio.wait_for(triton.cancelled.wait(), 10)


async def test_cancelling_the_task_cancels() -> None:
    async with serving(text("a"), 30.0) as (triton, client):
        task = asyncio.create_task(client.generate(GenerateRequest("x")))
        await asyncio.wait_for(triton.pausing.wait(), 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(triton.cancelled.wait(), 10)


async def test_an_error_inside_a_stream() -> None:
    async with serving(text("a"), "late error") as (_, client):
        with pytest.raises(ServerError) as error:
            await texts(client)
    assert (error.value.status, error.value.message) == ("", "late error")


@pytest.mark.parametrize(
    "message", ["the queue is full: 2 wait", "Request timeout expired", "[request id: 1] Exceeds maximum queue size"]
)
async def test_a_queue_that_is_full_is_a_status_of_its_own(message: str) -> None:
    async with serving(message) as (_, client):
        with pytest.raises(ServerError) as error:
            await texts(client)
    assert (error.value.status, error.value.message) == ("UNAVAILABLE", message)


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize(
    "code", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL]
)
async def test_errors_carry_status_and_message(code: grpc.StatusCode, decoupled: bool) -> None:
    """UNAVAILABLE too: a server with a full queue says it over a sound connection."""
    async with serving(code, decoupled=decoupled) as (_, client):
        with pytest.raises(ServerError) as error:
            await client.generate(GenerateRequest("x"))
    assert (error.value.status, error.value.message) == (code.name, "the server's own words")
    assert "'ensemble'" in error.value.cause


async def test_an_unknown_model() -> None:
    async with serving() as (_, client):
        with pytest.raises(ServerError, match="unknown model") as error:
            await client.generate_tokens([1], 1, model="nope")
    assert error.value.status == "NOT_FOUND"


@pytest.mark.parametrize("decoupled", [True, False])
async def test_a_late_answer_is_a_timeout_and_cancels(decoupled: bool) -> None:
    async with serving(30.0, text("late"), decoupled=decoupled) as (triton, client):
        with pytest.raises(RequestTimeoutError, match=r"'ensemble' within 0\.2 s"):
            await client.generate(GenerateRequest("x"), timeout_s=0.2)
        await asyncio.wait_for(triton.cancelled.wait(), 10)


async def test_nobody_listens(free_port: int) -> None:
    calls: list[Callable[[LLMClient], Any]] = [
        lambda client: client.generate(GenerateRequest("x")),
        lambda client: client.metadata(),
        lambda client: client.models(),
        texts,
    ]
    async with connect(f"grpc://127.0.0.1:{free_port}") as client:
        for call in calls:
            with pytest.raises(LacksError) as error:
                await call(client)
            assert f"grpc://127.0.0.1:{free_port}" in error.value.cause
            assert "trtkit deploy status" in error.value.fix
        assert await client.is_live() is False
        assert await client.is_ready("ensemble") is False


async def test_a_server_that_goes_away_is_unreachable_and_one_that_comes_back_is_found() -> None:
    triton = Triton([text("a"), 30.0], decoupled=True)
    server = grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(triton, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with connect(f"grpc://127.0.0.1:{port}") as client:
        task = asyncio.create_task(texts(client))
        await asyncio.wait_for(triton.asked.wait(), 10)
        await server.stop(None)
        with pytest.raises((LacksError, ServerError)):
            await asyncio.wait_for(task, 20)
        with pytest.raises(LacksError, match="cannot reach"):
            await client.generate(GenerateRequest("x"))
        again = grpc.aio.server()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Triton([text("b")], decoupled=True), again)
        again.add_insecure_port(f"127.0.0.1:{port}")
        await again.start()
        try:
            for _ in range(100):
                if await client.is_live():
                    break
                await asyncio.sleep(0.1)
            assert (await client.generate(GenerateRequest("x"))).text == "b"
        finally:
            await again.stop(None)


async def test_streaming_a_model_that_answers_once_is_refused_before_it_is_sent() -> None:
    async with serving(text("whole"), decoupled=False) as (triton, client):
        with pytest.raises(InputError, match="not decoupled"):
            await texts(client)
        with pytest.raises(InputError, match="not decoupled"):
            _ = [part async for part in client.stream_tokens([1], 1)]
    assert triton.requests == []


async def test_tokens_are_only_the_new_ones() -> None:
    async with serving(tokens([8, 9, 0, 0], length=2)) as (triton, client):
        assert await client.generate_tokens([5, 6], 3, end_id=2) == [8, 9]
        triton.answers = [tokens([5, 6, 8, 9, 9])]
        assert await client.generate_tokens([5, 6], 3) == [8, 9, 9], "an engine that echoes the prompt"
        triton.answers = [tokens([8]), tokens([9, 9]), service_pb2.ModelInferResponse()]
        assert await client.generate_tokens([5, 6], 3) == [8, 9, 9]
        assert [part async for part in client.stream_tokens([5, 6], 3)] == [[8], [9, 9], []]
    names = [[tensor.name for tensor in request.inputs] for request in triton.requests]
    assert "end_id" in names[0] and "end_id" not in names[1]
    assert {output.name for output in triton.requests[0].outputs} == {"output_ids", "sequence_length"}


async def test_infer_gives_every_response_with_its_shapes() -> None:
    async with serving(tokens([1, 2]), text("a", "b")) as (triton, client):
        inputs = engine_inputs([5, 6], 2, end_id=None, top_k=None, stream=True)
        first, second = await client.infer("any", inputs, request_id="r")
    assert first["output_ids"].tolist() == [[[1, 2]]] and first["sequence_length"].tolist() == [[2]]
    assert second["text_output"].tolist() == [["a", "b"]]
    assert triton.requests[0].id == "r" and not triton.requests[0].outputs


async def test_what_the_server_says_about_itself() -> None:
    async with serving() as (_, client):
        assert await client.is_live() is True
        assert await client.is_ready() is False
        assert await client.is_ready("ensemble") is True
        assert await client.is_ready("broken") is False
        assert await client.models() == {"ensemble": "READY", "broken": "UNAVAILABLE"}
        assert (await client.metadata())["inputs"] == [{"name": "x", "datatype": "INT32", "shape": [-1, 1]}]
        config = await client.model_config("m")
        assert config["input"] == [{"name": "input_ids", "data_type": "TYPE_INT32", "dims": [2, -1], "optional": True}]
        assert config["name"] == "m" and config["parameters"] == {"key": {"string_value": "value"}}
        assert (await client.statistics())["inference_stats"]["success"]["count"] == 2**40


async def test_many_at_once_over_one_client_without_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        async with serving(text("a"), text("b")) as (triton, client):
            done = await asyncio.gather(*[texts(client) for _ in range(50)])
            assert done == [["a", "b"]] * 50
            await client.close()
            assert await texts(client) == ["a", "b"], "a closed client connects again"
    assert len({request.id for request in triton.requests}) == 51
