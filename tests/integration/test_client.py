"""The client against a real Triton server.

`STAND_IN` takes the place of the generated models: python-backend models with the ensemble's and the engine's tensors,
the ensemble answering with the prompt's words and the engine counting upwards. `once` is the same, but not decoupled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from trtkit.client import GenerateRequest, LLMClient, RequestTimeoutError, ServerError, connect
from trtkit.client.tensors import Tensor, scalar
from trtkit.deploy.deployment import Deployment
from trtkit.deploy.local import running_server
from trtkit.errors import InputError

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("client_server")]

STAND_IN = """
import json, threading, time
from pathlib import Path
import numpy as np
import triton_python_backend_utils as pb

FINAL = pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.decoupled = config.get("model_transaction_policy", {}).get("decoupled", False)
        self.seen = Path(config["parameters"]["seen"]["string_value"])

    def execute(self, requests):
        if not self.decoupled:
            return [self.reply(self.whole(request)) for request in requests]
        for request in requests:
            threading.Thread(target=self.run, args=(request, request.get_response_sender()), daemon=True).start()

    def read(self, request, name, default=None):
        tensor = pb.get_input_tensor_by_name(request, name)
        return default if tensor is None else tensor.as_numpy().reshape(-1)[0]

    def reply(self, piece):
        if isinstance(piece, str):
            tensors = [pb.Tensor("text_output", np.array([[piece.encode()]], dtype=object))]
        else:
            tensors = [
                pb.Tensor("output_ids", np.array([[piece]], dtype=np.int32)),
                pb.Tensor("sequence_length", np.array([[len(piece)]], dtype=np.int32)),
            ]
        return pb.InferenceResponse(tensors)

    def pieces(self, request):
        ids = pb.get_input_tensor_by_name(request, "input_ids")
        if ids is not None:
            ids = ids.as_numpy()
            assert ids.shape[1] == self.read(request, "input_lengths"), ids.shape
            return [[int(ids[0, -1]) + 1 + i] for i in range(self.read(request, "request_output_len"))]
        stop = pb.get_input_tensor_by_name(request, "stop_words")
        stop = [] if stop is None else [word.decode() for word in stop.as_numpy().reshape(-1)]
        words = self.read(request, "text_input").decode().split(" ")[: self.read(request, "max_tokens")]
        kept = []
        for word in words:
            if word in stop:
                break
            kept.append(word + " ")
        return kept

    def whole(self, request):
        pieces = self.pieces(request)
        return "".join(pieces) if not pieces or isinstance(pieces[0], str) else sum(pieces, [])

    def run(self, request, sender):
        pieces = self.pieces(request)
        if not (self.read(request, "stream", False) or self.read(request, "streaming", False)):
            pieces = [self.whole(request)]
        with open(self.seen / "ids", "a") as file:
            file.write(request.request_id() + "\\n")
        for number, piece in enumerate(pieces):
            if sender.is_cancelled():
                (self.seen / "cancelled").write_text(str(number))
                break
            if piece == "error ":
                error = pb.TritonError("asked for an error", pb.TritonError.INVALID_ARG)
                sender.send(pb.InferenceResponse(error=error))
                break
            if piece == "slow ":
                time.sleep(0.02)
            sender.send(self.reply(piece))
        sender.send(flags=FINAL)
"""

INPUTS = {
    "ensemble": "text_input:STRING:1 max_tokens:INT32:1 stop_words:STRING:-1 top_k:INT32:1 seed:UINT64:1 stream:BOOL:1 "
    "exclude_input_in_output:BOOL:1 temperature:FP32:1",
    "tensorrt_llm": "input_ids:INT32:-1 input_lengths:INT32:1 request_output_len:INT32:1 end_id:INT32:1 "
    "runtime_top_k:INT32:1 streaming:BOOL:1 exclude_input_in_output:BOOL:1",
}
OUTPUTS = {"ensemble": "text_output:STRING:-1", "tensorrt_llm": "output_ids:INT32:-1,-1 sequence_length:INT32:-1"}
REQUIRED = {"text_input", "max_tokens", "input_ids", "input_lengths", "request_output_len"}


def pbtxt(name: str, kind: str, seen: Path, *, decoupled: bool) -> str:
    lines = [f'name: "{name}"', 'backend: "python"', "max_batch_size: 8"]
    lines.append(f"model_transaction_policy {{ decoupled: {str(decoupled).lower()} }}")
    lines.append(f'parameters {{ key: "seen" value {{ string_value: "{seen}" }} }}')
    lines.append("instance_group { count: 1 kind: KIND_CPU }")
    for field, tensors in (("input", INPUTS[kind]), ("output", OUTPUTS[kind])):
        for item in tensors.split():
            tensor, dtype, dims = item.split(":")
            optional = "optional: true" if field == "input" and tensor not in REQUIRED else ""
            lines.append(f'{field} {{ name: "{tensor}" data_type: TYPE_{dtype} dims: [{dims}] {optional} }}')
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder where the stand-in notes what happens to it."""
    return tmp_path_factory.mktemp("seen")


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, seen: Path) -> Iterator[Deployment]:
    repository = tmp_path_factory.mktemp("repository")
    for name, kind, decoupled in (
        ("ensemble", "ensemble", True),
        ("tensorrt_llm", "tensorrt_llm", True),
        ("once", "ensemble", False),
        ("tokens_once", "tensorrt_llm", False),
    ):
        (repository / name / "1").mkdir(parents=True)
        (repository / name / "config.pbtxt").write_text(pbtxt(name, kind, seen, decoupled=decoupled))
        (repository / name / "1" / "model.py").write_text(STAND_IN)
    log = tmp_path_factory.mktemp("log") / "server.log"
    with running_server(repository, log_path=log, exit_timeout_s=5) as running:
        yield running


@pytest.fixture(params=["grpc", "http"])
def url(request: pytest.FixtureRequest, deployment: Deployment) -> str:
    return f"grpc://{deployment.grpc_url}" if request.param == "grpc" else deployment.http_url


async def pieces(client: LLMClient, request: GenerateRequest, **options: Any) -> list[str]:
    return [chunk.text async for chunk in client.stream(request, **options)]


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.02)
    pytest.fail("it did not happen within 20 s")


@pytest.mark.parametrize("model", ["ensemble", "once"])
async def test_generate(url: str, model: str) -> None:
    async with connect(url, model=model) as client:
        request = GenerateRequest('漢字 und "Grüße" 🎉\n\\ end', max_tokens=4, temperature=0.5, top_k=1, seed=2**64 - 1)
        assert (await client.generate(request)).text == '漢字 und "Grüße" 🎉\n\\ '
        for stop, text in ((["c"], "a b "), (["x", "b"], "a "), ([], "a b c ")):
            assert (await client.generate(GenerateRequest("a b c", stop_words=stop))).text == text


async def test_stream_comes_in_pieces_and_carries_the_id(url: str, seen: Path) -> None:
    async with connect(url) as client:
        request = GenerateRequest("漢字 two 🎉", request_id=f"id-{client.protocol}")
        assert await pieces(client, request) == ["漢字 ", "two ", "🎉 "]
        await client.generate(GenerateRequest("x"))
    ids = (seen / "ids").read_text().split()
    assert f"id-{client.protocol}" in ids and len(set(ids)) == len(ids)


@pytest.mark.parametrize("model", ["tensorrt_llm", "tokens_once"])
async def test_tokens(url: str, model: str) -> None:
    async with connect(url) as client:
        assert await client.generate_tokens([5, 6, 7], 3, model=model, end_id=2) == [8, 9, 10]
        assert await client.generate_tokens([5], 1, model=model, top_k=None) == [6]
        if model == "tensorrt_llm":
            assert [part async for part in client.stream_tokens([5], 3, end_id=-1)] == [[6], [7], [8]]


async def test_many_at_once(url: str) -> None:
    async with connect(url) as client:
        found = await asyncio.gather(*[pieces(client, GenerateRequest(f"{i} b")) for i in range(120)])
    assert found == [[f"{i} ", "b "] for i in range(120)]


async def test_closing_a_stream_early_cancels_it_on_the_server(url: str, seen: Path) -> None:
    (seen / "cancelled").unlink(missing_ok=True)
    async with connect(url) as client:
        async with aclosing(client.stream(GenerateRequest("slow " * 500, max_tokens=500))) as chunks:
            async for _ in chunks:
                break
        await until((seen / "cancelled").exists)
    assert int((seen / "cancelled").read_text()) < 400


async def test_a_timeout_cancels_too(url: str, seen: Path) -> None:
    (seen / "cancelled").unlink(missing_ok=True)
    async with connect(url) as client:
        with pytest.raises(RequestTimeoutError):
            await pieces(client, GenerateRequest("slow " * 500, max_tokens=500), timeout_s=0.5)
        await until((seen / "cancelled").exists)
        assert await pieces(client, GenerateRequest("still there")) == ["still ", "there "]


async def test_errors_are_the_servers_words(url: str) -> None:
    async with connect(url) as client:
        with pytest.raises(ServerError, match="asked for an error"):
            await pieces(client, GenerateRequest("a error b"))
        with pytest.raises(ServerError, match="nope"):
            await client.generate_tokens([1], 1, model="nope")
        with pytest.raises(ServerError):
            await client.infer("ensemble", [scalar("text_input", "INT32", 7), scalar("max_tokens", "INT32", 2)])
        with pytest.raises(ServerError, match="max_tokens"):
            await client.infer("ensemble", [scalar("text_input", "BYTES", "x")])
        assert (await client.generate(GenerateRequest("fine"))).text == "fine "
    async with connect(url, model="nope") as client:
        with pytest.raises(ServerError, match="nope") as error:
            await client.generate(GenerateRequest("x"))
    assert error.value.status in ("NOT_FOUND", "404", "400")


async def test_a_model_that_answers_once_does_not_stream(url: str) -> None:
    async with connect(url, model="once") as client:
        with pytest.raises(InputError, match="not decoupled"):
            await pieces(client, GenerateRequest("x"))


async def succeeded(client: LLMClient) -> int:
    count: int = (await client.statistics("once"))["inference_stats"]["success"].get("count", 0)
    return count


async def test_what_the_server_says_about_itself(url: str) -> None:
    async with connect(url) as client:
        assert await client.is_live() and await client.is_ready() and await client.is_ready("once")
        assert not await client.is_ready("nope")
        states = {"ensemble": "READY", "once": "READY", "tensorrt_llm": "READY", "tokens_once": "READY"}
        assert await client.models() == states
        inputs = {item["name"]: item for item in (await client.metadata("tensorrt_llm"))["inputs"]}
        assert inputs["input_ids"] == {"name": "input_ids", "datatype": "INT32", "shape": [-1, -1]}
        config = await client.model_config()
        seed = next(item for item in config["input"] if item["name"] == "seed")
        assert (seed["data_type"], seed["dims"], seed["optional"]) == ("TYPE_UINT64", [1], True)
        assert config["model_transaction_policy"] == {"decoupled": True}
        before = await succeeded(client)
        await client.infer("once", [scalar("text_input", "BYTES", "x"), scalar("max_tokens", "INT32", 1)])
        for _ in range(500):  # the server counts a request a moment after it has answered
            if await succeeded(client) == before + 1:
                break
            await asyncio.sleep(0.02)
        else:
            pytest.fail("the request was not counted")


async def test_infer_of_both_kinds_of_model(url: str) -> None:
    inputs = [
        Tensor("input_ids", "INT32", (1, 2), (5, 6)),
        scalar("input_lengths", "INT32", 2),
        scalar("request_output_len", "INT32", 2),
        scalar("streaming", "BOOL", True),
    ]
    async with connect(url) as client:
        answers = await client.infer("tensorrt_llm", inputs)
        assert [answer["output_ids"].reshape(-1).tolist() for answer in answers] == [[7], [8]]
        (answer,) = await client.infer("tokens_once", inputs)
        assert answer["output_ids"].tolist() == [[[7, 8]]]
