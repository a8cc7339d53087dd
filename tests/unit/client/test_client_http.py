"""The HTTP client against a small server on a real socket that says exactly what a test tells it to.

The server is a stand-in for Triton's HTTP front end; the answers are those a real tritonserver 2.51 gives.
"""

from __future__ import annotations

import asyncio
import json
import time
import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from trtkit.client import Ending, GenerateRequest, LLMClient, RequestTimeoutError, ServerError, connect
from trtkit.client.tensors import engine_inputs, scalar
from trtkit.errors import InputError, LacksError

CONFIG = {"name": "ensemble", "model_transaction_policy": {"decoupled": True}}
Pieces = list[bytes | float | None]
"""What the server sends: bytes, pauses in seconds, or None for a connection that breaks off."""


def response(body: bytes, status: str = "200 OK") -> Pieces:
    return [f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body]


def answer(value: Any, status: str = "200 OK") -> Pieces:
    return response(json.dumps(value).encode(), status)


def events(*pieces: bytes | float, end: bool = True) -> Pieces:
    """A chunked event stream; each piece of bytes is a chunk of its own."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
    sent: Pieces = [head]
    sent += [b"%x\r\n%s\r\n" % (len(p), p) if isinstance(p, bytes) else p for p in pieces]
    return [*sent, b"0\r\n\r\n" if end else None]


class Server:
    """Answers by path; remembers what it was asked and whether a client went away before the end."""

    def __init__(self, answers: dict[str, Pieces]) -> None:
        self.answers = {"/v2/models/ensemble/config": answer(CONFIG)} | answers
        self.requests: list[tuple[str, Any]] = []
        self.hung_up = asyncio.Event()
        self.connections = 0
        self.open = 0
        self.all_closed = asyncio.Event()
        self.all_closed.set()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        self.all_closed.clear()
        try:
            while await self._serve_one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            self.hung_up.set()
        finally:
            writer.close()
            self.open -= 1
            if not self.open:
                self.all_closed.set()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        _, path, _ = head[0].split(" ")
        headers = {line.split(":")[0].lower(): line.split(":", 1)[1].strip() for line in head[1:] if line}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        self.requests.append((path, json.loads(body) if body else None))
        for piece in self.answers.get(path, answer({"error": "no such thing"}, "404 Not Found")):
            if piece is None:
                return False
            if isinstance(piece, float):
                gone = asyncio.create_task(reader.read(1))
                done, _ = await asyncio.wait([gone], timeout=piece)
                if done:
                    raise ConnectionError
                gone.cancel()
            else:
                writer.write(piece)
                await writer.drain()
        return True


@asynccontextmanager
async def serving(**answers: Pieces) -> AsyncIterator[tuple[Server, LLMClient]]:
    """A server with answers for paths below `/v2/models/ensemble/`, and a client of it."""
    state = Server({f"/v2/models/ensemble/{path}".rstrip("/"): pieces for path, pieces in answers.items()})
    server = await asyncio.start_server(state.handle, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        async with connect(f"http://127.0.0.1:{port}") as client:
            yield state, client
        await asyncio.wait_for(state.all_closed.wait(), 10)  # else the client left a connection open
    finally:
        server.close()


async def texts(client: LLMClient, **options: Any) -> list[str]:
    return [chunk.text async for chunk in client.stream(GenerateRequest("x", max_tokens=9), **options)]


async def test_generate_sends_the_contract_and_reads_the_text() -> None:
    async with serving(generate=answer({"text_output": "héllo", "model_name": "ensemble"})) as (server, client):
        request = GenerateRequest('a"b\n€', max_tokens=3, top_k=1, seed=7, stop_words=["x"], bad_words=["y", "z"])
        done = await client.generate(request)
    assert done.text == "héllo"
    path, body = server.requests[-1]
    assert path == "/v2/models/ensemble/generate"
    assert body == {
        "id": done.request_id,
        "text_input": 'a"b\n€',
        "max_tokens": 3,
        "top_k": 1,
        "seed": 7,
        "stop_words": "x",
        "bad_words": ["y", "z"],
        "stream": False,
        "exclude_input_in_output": True,
    }


async def test_request_ids_are_sent_and_unique_or_the_callers() -> None:
    async with serving(generate=answer({"text_output": ""})) as (server, client):
        for request_id in ("", "", "mine"):
            await client.generate(GenerateRequest("x", request_id=request_id))
    ids = [body["id"] for path, body in server.requests if path.endswith("generate")]
    assert ids[0] and ids[1] and ids[0] != ids[1] and ids[2] == "mine"


@pytest.mark.parametrize("value", ["one", ["one"], ["one", "second beam"]])
async def test_the_text_may_stand_bare_or_in_a_list(value: object) -> None:
    async with serving(generate=answer({"text_output": value})) as (_, client):
        assert (await client.generate(GenerateRequest("x"))).text == "one"


async def test_the_last_piece_tells_about_the_whole_answer() -> None:
    told = {"finish_reason": ["length", "stop"], "prompt_tokens": 3, "completion_tokens": [2, 7]}
    pieces = [{"text_output": "a"}, {"text_output": "b", **told}]
    stream = events(*(b"data: " + json.dumps(piece).encode() + b"\n\n" for piece in pieces))
    async with serving(generate=answer({"text_output": "ab", **told}), generate_stream=stream) as (_, client):
        done = await client.generate(GenerateRequest("x"))
        chunks = [chunk async for chunk in client.stream(GenerateRequest("x"))]
    assert (done.text, done.finish_reason, done.prompt_tokens, done.completion_tokens) == ("ab", "length", 3, 2)
    assert [chunk.ending for chunk in chunks] == [None, Ending("length", 3, 2)]


async def test_a_stream_without_an_answer_is_an_error() -> None:
    async with serving(generate_stream=events()) as (_, client):
        with pytest.raises(ServerError, match="ended before it began"):
            await texts(client)


STREAM = (
    b'data: {"text_output":"a "}\n\ndata: {"text_output":"\xe2\x82\xac"}\r\n\r\n: note\n\ndata: {"text_output":""}\n\n'
)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 26, 27, 28, 1000])
async def test_a_stream_however_the_network_cuts_it(size: int) -> None:
    cut = [STREAM[at : at + size] for at in range(0, len(STREAM), size)]
    async with serving(generate_stream=events(*cut)) as (server, client):
        assert await texts(client) == ["a ", "€", ""]
    assert server.requests[-1][1]["stream"] is True


async def test_pieces_arrive_when_they_are_sent() -> None:
    """The stream holds back its end until the test has seen its beginning, so nothing may be buffered."""
    async with serving(generate_stream=events(b'data: {"text_output":"a"}\n\n', 30.0)) as (_, client):
        begin = time.perf_counter_ns()
        async with aclosing(client.stream(GenerateRequest("x"))) as chunks:
            first = await anext(chunks)
            assert first.text == "a"
            assert begin < first.received_ns < time.perf_counter_ns()


async def test_closing_a_stream_early_hangs_up() -> None:
    async with serving(generate_stream=events(b'data: {"text_output":"a"}\n\n', 30.0)) as (server, client):
        async with aclosing(client.stream(GenerateRequest("x"))) as chunks:
            async for _ in chunks:
                break
        await asyncio.wait_for(server.hung_up.wait(), 10)


async def test_cancelling_the_task_hangs_up() -> None:
    async with serving(generate_stream=events(b'data: {"text_output":"a"}\n\n', 30.0)) as (server, client):
        begun = asyncio.Event()

        async def read() -> None:
            async for _ in client.stream(GenerateRequest("x")):
                begun.set()

        task = asyncio.create_task(read())
        await asyncio.wait_for(begun.wait(), 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(server.hung_up.wait(), 10)


ERRORS: list[tuple[str, Pieces, str, str]] = [
    ("generate", answer({"error": "unknown input 'x'"}, "400 Bad Request"), "400", "unknown input 'x'"),
    ("generate", answer({"error": "exactly 1 response"}), "200", "exactly 1 response"),
    ("generate", response(b"<html>bad gateway</html>", "502 Bad Gateway"), "502", "<html>bad gateway</html>"),
    ("generate", response(b"", "500 Internal Server Error"), "500", "no message"),
    ("generate", response(b"plain"), "200", "not JSON: plain"),
    ("generate", answer({"error": ""}, "503 Service Unavailable"), "503", ""),
    ("generate_stream", answer({"error": "queue is full"}, "503 Service Unavailable"), "503", "queue is full"),
    (
        "generate_stream",
        response(b'data: {"error":"temperature: -1 must be 0 or more"}\n\n', "400 Bad Request"),
        "400",
        "temperature: -1 must be 0 or more",
    ),
    ("generate", answer({"error": "the queue is full: 2 wait"}, "400 Bad Request"), "503", "the queue is full: 2 wait"),
    ("generate_stream", events(b'data: {"text_output":"a"}\n\n', b'data: {"error":"late"}\n\n'), "200", "late"),
    ("generate_stream", events(b"data: half a {\n\n"), "200", "not JSON: half a {"),
]


@pytest.mark.parametrize(("path", "pieces", "status", "message"), ERRORS)
async def test_errors_carry_status_and_message(path: str, pieces: Pieces, status: str, message: str) -> None:
    async with serving(**{path: pieces}) as (_, client):
        with pytest.raises(ServerError) as error:
            await (texts(client) if path == "generate_stream" else client.generate(GenerateRequest("x")))
    assert (error.value.status, error.value.message) == (status, message)
    assert "'ensemble'" in error.value.cause and status in error.value.cause


async def test_a_stream_that_breaks_off_is_an_error_and_not_an_end() -> None:
    pieces = events(b'data: {"text_output":"a"}\n\n', end=False)
    async with serving(generate_stream=pieces) as (_, client):
        with pytest.raises(ServerError, match="connection broke inside the answer"):
            await texts(client)


@pytest.mark.parametrize(
    "call", [lambda c: c.generate(GenerateRequest("x"), timeout_s=0.2), lambda c: texts(c, timeout_s=0.2)]
)
async def test_a_late_answer_is_a_timeout_and_hangs_up(call: Callable[[LLMClient], Any]) -> None:
    slow: Pieces = [30.0]
    async with serving(generate=slow, generate_stream=events(b'data: {"text_output":"a"}\n\n', 30.0)) as (
        server,
        client,
    ):
        with pytest.raises(RequestTimeoutError, match=r"'ensemble' within 0\.2 s"):
            await call(client)
        await asyncio.wait_for(server.hung_up.wait(), 10)


async def test_nobody_listens(free_port: int) -> None:
    async with connect(f"http://127.0.0.1:{free_port}") as client:
        for call in (client.generate(GenerateRequest("x")), client.metadata(), texts(client), client.models()):
            with pytest.raises(LacksError) as error:
                await call
            assert f"http://127.0.0.1:{free_port}" in error.value.cause
            assert "trtkit deploy status" in error.value.fix
        assert await client.is_live() is False
        assert await client.is_ready("ensemble") is False


async def test_a_connection_closed_without_an_answer_is_unreachable() -> None:
    async with serving(generate=[None]) as (_, client):
        with pytest.raises(LacksError, match="cannot reach"):
            await client.generate(GenerateRequest("x"))


async def test_streaming_a_model_that_answers_once_is_refused_before_it_is_sent() -> None:
    async with serving(config=answer({"name": "ensemble"}), generate=answer({"text_output": "whole"})) as (
        server,
        client,
    ):
        with pytest.raises(InputError, match="not decoupled"):
            await texts(client)
        assert (await client.generate(GenerateRequest("x"))).text == "whole"
    assert [path for path, _ in server.requests if "stream" in path] == []


async def test_tokens_in_every_form_that_json_gives_them() -> None:
    bare = answer({"output_ids": 8, "sequence_length": 1})
    async with serving(generate=bare) as (server, client):
        assert await client.generate_tokens([5, 6], 1, model="ensemble", end_id=2) == [8]
        server.answers["/v2/models/ensemble/generate"] = answer({"output_ids": [8, 9, 2], "sequence_length": [2]})
        assert await client.generate_tokens([5], 3, model="ensemble", top_k=None) == [8, 9]
    first, second = (body for path, body in server.requests if path.endswith("generate"))
    assert first["input_ids"] == [5, 6] and first["input_lengths"] == 2 and first["request_output_len"] == 1
    assert first["end_id"] == 2 and first["runtime_top_k"] == 1 and "runtime_top_k" not in second
    assert second["input_ids"] == 5, "one token stands bare, as the generate extension wants single elements"


async def test_streamed_tokens() -> None:
    pieces = events(b'data: {"output_ids":8,"sequence_length":1}\n\ndata: {"output_ids":[9,9],"sequence_length":2}\n\n')
    async with serving(generate_stream=pieces) as (_, client):
        assert [part async for part in client.stream_tokens([5], 3, model="ensemble")] == [[8], [9, 9]]


async def test_a_number_that_the_server_would_cut_is_refused() -> None:
    async with serving() as (server, client):
        with pytest.raises(InputError, match="input 'max_tokens': not INT32"):
            await client.generate(GenerateRequest("x", max_tokens=2**40))
    assert server.requests == []


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize(("datatype", "value"), [("INT32", 2**31), ("UINT8", -1), ("INT32", 1.5)])
async def test_infer_refuses_such_numbers_too(decoupled: bool, datatype: str, value: object) -> None:
    config = {"model_transaction_policy": {"decoupled": decoupled}}
    async with serving(config=answer(config), **{"": answer({"outputs": []})}) as (server, client):
        with pytest.raises(InputError, match=f"input 'n': not {datatype}"):
            await client.infer("ensemble", [scalar("n", datatype, value)])
    assert not [path for path, _ in server.requests if path.endswith(("infer", "generate_stream"))]


async def test_infer_of_both_kinds_of_model() -> None:
    inputs = engine_inputs([5, 6], 2, end_id=None, top_k=None, stream=False)
    described = {"outputs": [{"name": "output_ids", "datatype": "INT32", "shape": [-1, -1, -1]}]}
    stream = events(b'data: {"output_ids":[1,2],"model_name":"m"}\n\n')
    async with serving(**{"": answer(described), "generate_stream": stream}) as (_, client):
        (only,) = await client.infer("ensemble", inputs)
        assert only["output_ids"].tolist() == [1, 2] and set(only) == {"output_ids"}
    tensor = {"name": "output_ids", "datatype": "INT32", "shape": [1, 1, 2], "data": [1, 2]}
    async with serving(config=answer({}), infer=answer({"outputs": [tensor]})) as (server, client):
        (only,) = await client.infer("ensemble", inputs)
        assert only["output_ids"].tolist() == [[[1, 2]]]
    assert server.requests[-1][1]["inputs"][0] == {
        "name": "input_ids",
        "datatype": "INT32",
        "shape": [1, 2],
        "data": [5, 6],
    }


async def test_what_the_server_says_about_itself() -> None:
    async with serving(ready=response(b"")) as (server, client):
        server.answers |= {
            "/v2/health/live": response(b""),
            "/v2/health/ready": response(b"", "400 Bad Request"),
            "/v2/repository/index": answer([{"name": "a", "state": "READY"}, {"name": "b"}]),
            "/v2/models/ensemble/stats": answer({"model_stats": [{"name": "ensemble"}]}),
        }
        assert await client.is_live() is True
        assert await client.is_ready() is False
        assert await client.is_ready("ensemble") is True
        assert await client.is_ready("a/../b") is False
        assert await client.models() == {"a": "READY", "b": ""}
        assert await client.statistics() == {"name": "ensemble"}
        assert (await client.model_config())["name"] == "ensemble"
    assert "/v2/models/a%2F..%2Fb/ready" in [path for path, _ in server.requests], "a name never leaves its place"


async def test_more_than_a_hundred_requests_wait_for_no_connection() -> None:
    """Each answer comes only when all requests have arrived: a client that queues some would never finish."""
    count = 150
    arrived = 0
    everybody = asyncio.Event()

    class Meeting(Server):
        async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
            nonlocal arrived
            await reader.readuntil(b"\r\n\r\n")
            arrived += 1
            if arrived == count:
                everybody.set()
            await everybody.wait()
            writer.write(answer({"text_output": "met"})[0])  # type: ignore[arg-type]
            return False

    server = await asyncio.start_server(Meeting({}).handle, "127.0.0.1", 0)
    try:
        async with connect(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as client:
            done = await asyncio.gather(*[client.generate(GenerateRequest("x")) for _ in range(count)])
        assert [completion.text for completion in done] == ["met"] * count
    finally:
        server.close()


async def test_connections_are_used_again_and_no_warning_is_left() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        async with serving(generate=answer({"text_output": "a"}), generate_stream=events(STREAM)) as (server, client):
            for _ in range(5):
                await client.generate(GenerateRequest("x"))
                await texts(client)
            await client.close()
            assert (await client.generate(GenerateRequest("x"))).text == "a", "a closed client connects again"
    assert server.connections == 2
