"""The model `llm` in front of `tensorrt_llm`, in a real Triton server with the reference runtime.

One repository has the ensemble, its front `llm`, and beside them the model of the fused topology, called `fused`.
Two sequences run at a time. So whoever gets through behind two endless ones shows that these are gone.
"""

from __future__ import annotations

import http.client
import json
import queue
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient import grpc

from tests.integration.triton_process import Server, serve
from trtkit.config_file import parse_config
from trtkit.convert.conversion import convert
from trtkit.convert.source import plan_conversion
from trtkit.hf import open_source
from trtkit.repository.generate import render_repository, write_repository

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("front_server")]

SOURCE = Path(__file__).parents[2] / "examples/tiny-llama"
SLOTS = 2
ENDLESS = 400_000
"""Tokens that nobody waits for: minutes of work."""
PATIENCE_S = 60.0
PROMPTS = ("def main(", "import os\n", "class Tree:\n    def", "for i in range(", "return self.", "# The")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = parse_config(f"name: front\nmodel: {{source: {SOURCE}}}\ncheckpoint: {{dtype: float32}}\n")
    folder = tmp_path_factory.mktemp("front") / "checkpoint"
    source = open_source(SOURCE)
    convert(plan_conversion(source, config.checkpoint), source, folder)
    return folder


def write(folder: Path, checkpoint: Path, **serving: Any) -> None:
    settings = {"runtime": "reference", "max_batch_size": SLOTS, **serving}
    config = parse_config(
        f"name: front\nmodel: {{source: {SOURCE}}}\nengine: {{max_seq_len: {2 * ENDLESS}, max_batch_size: {SLOTS}}}\n"
        f"serving: {json.dumps(settings)}\n"
    )
    write_repository(render_repository(config, checkpoint_dir=checkpoint), folder)


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    work = tmp_path_factory.mktemp("server")
    repository = work / "repository"
    write(repository, checkpoint, topology="ensemble")
    write(work / "other", checkpoint, topology="fused")
    shutil.copytree(work / "other/llm", repository / "fused")
    file = repository / "fused/config.pbtxt"
    file.write_text(file.read_text().replace('name: "llm"', 'name: "fused"'))
    with serve(repository, work) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with grpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as connection:
        yield connection


def whole(server: Server, model: str, prompt: str, max_tokens: int = 40, **more: Any) -> dict[str, Any]:
    body = {"text_input": prompt, "max_tokens": max_tokens, **more}
    status, text = server.http(f"models/{model}/generate", body, timeout=PATIENCE_S)
    assert status == 200, text
    answer: dict[str, Any] = json.loads(text)
    return answer


def streamed(server: Server, model: str, prompt: str, max_tokens: int = 40, **more: Any) -> list[dict[str, Any]]:
    body = {"text_input": prompt, "max_tokens": max_tokens, "stream": True, **more}
    status, text = server.http(f"models/{model}/generate_stream", body, timeout=PATIENCE_S)
    assert status == 200, text
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]


class Stream:
    """A stream over gRPC."""

    def __init__(self, client: Any, prompt: str, max_tokens: int, *, stream: bool = True) -> None:
        self.answers: queue.Queue[Any] = queue.Queue()
        self._client = client
        client.start_stream(lambda result, error: self.answers.put(error or result))
        values = {
            "text_input": ("BYTES", prompt.encode()),
            "max_tokens": ("INT32", max_tokens),
            "stream": ("BOOL", stream),
        }
        inputs = []
        for name, (dtype, value) in values.items():
            tensor = grpc.InferInput(name, [1, 1], dtype)
            kinds = {"BYTES": np.object_, "INT32": np.int32, "BOOL": np.bool_}
            tensor.set_data_from_numpy(np.array([[value]], kinds[dtype]))
            inputs.append(tensor)
        client.async_stream_infer("llm", inputs, enable_empty_final_response=True)

    def piece(self) -> str:
        answer = self.answers.get(timeout=PATIENCE_S)
        if isinstance(answer, Exception):
            raise answer
        text: bytes = answer.as_numpy("text_output").item()
        return text.decode()

    def close(self) -> None:
        self._client.stop_stream(cancel_requests=True)


def everything_is_free(server: Server) -> None:
    """As many requests as there are slots get through, directly and by way of `llm`."""
    for model in ("llm", "ensemble"):
        with ThreadPoolExecutor(SLOTS) as pool:
            answers = list(pool.map(lambda prompt, model=model: whole(server, model, prompt, 5), PROMPTS[:SLOTS]))
        assert all(answer["text_output"] for answer in answers)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_all_ways_make_the_same_text(server: Server, prompt: str) -> None:
    front, fused, ensemble = (whole(server, model, prompt) for model in ("llm", "fused", "ensemble"))
    assert front["text_output"] == fused["text_output"] == ensemble["text_output"]
    assert {key: front[key] for key in ("finish_reason", "prompt_tokens", "completion_tokens")} == {
        key: fused[key] for key in ("finish_reason", "prompt_tokens", "completion_tokens")
    }
    pieces = streamed(server, "llm", prompt)
    assert "".join(piece["text_output"] for piece in pieces) == front["text_output"]
    assert len(pieces) > 5
    assert pieces[-1]["completion_tokens"] == front["completion_tokens"]


def test_log_probs_seeds_and_stop_words(server: Server) -> None:
    for more in (
        {"return_log_probs": True},
        {"temperature": 1.0, "top_k": 50, "seed": 7, "return_log_probs": True},
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"stop_words": ["nothing", "args"]},
        {"bad_words": [" *"]},
        {"min_tokens": 30, "presence_penalty": 0.5},
    ):
        front, fused = (whole(server, model, PROMPTS[0], **more) for model in ("llm", "fused"))
        assert (front["text_output"], front["finish_reason"]) == (fused["text_output"], fused["finish_reason"]), more
        assert len(front.get("output_log_probs", [])) == (40 if "return_log_probs" in more else 0)
        assert front.get("output_log_probs", []) == pytest.approx(fused.get("output_log_probs", []), rel=1e-4)


def test_a_stop_word_ends_the_work(server: Server) -> None:
    for _ in range(SLOTS):
        answer = whole(server, "llm", PROMPTS[0], ENDLESS, stop_words=["args"])
        assert answer["finish_reason"] == "stop"
        assert "args" not in answer["text_output"]
    everything_is_free(server)


def test_every_end_id_ends(server: Server) -> None:
    """Tokens of a known answer as end ids: the first goes as end id, others as stop words."""
    plain = whole(server, "llm", PROMPTS[0])
    ids = _token_ids(plain["text_output"])
    cut = whole(server, "llm", PROMPTS[0], end_id=ids[4])
    assert cut["finish_reason"] == "stop"
    assert cut["completion_tokens"] == ids.index(ids[4])
    assert cut == {**whole(server, "fused", PROMPTS[0], end_id=ids[4]), "model_name": "llm"}


def _token_ids(text: str) -> list[int]:
    from tokenizers import Tokenizer

    ids: list[int] = Tokenizer.from_file(str(SOURCE / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    return ids


def test_several_sequences_and_many_requests(server: Server) -> None:
    expected = {prompt: whole(server, "llm", prompt)["text_output"] for prompt in PROMPTS}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda prompt: (prompt, streamed(server, "llm", prompt)), PROMPTS * 3))
    for prompt, pieces in answers:
        assert "".join(piece["text_output"] for piece in pieces) == expected[prompt]
    both = whole(server, "llm", PROMPTS[1], num_return_sequences=2)
    assert both["text_output"] == [expected[PROMPTS[1]]] * 2


def test_an_error_of_the_model_reaches_the_client(server: Server) -> None:
    body = {"text_input": "a", "max_tokens": 3 * ENDLESS}
    status, text = server.http("models/llm/generate", body)
    assert status == 400
    assert "max_tokens" in text or "request_output_len" in text


@pytest.mark.parametrize("stream", [True, False])
def test_cancelling_a_grpc_stream_stops_the_engine(server: Server, stream: bool) -> None:
    clients = [grpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") for _ in range(SLOTS)]
    streams = [Stream(client, PROMPTS[0], ENDLESS, stream=stream) for client in clients]
    if stream:
        assert "".join(one.piece() for one in streams for _ in range(3))
    for one in streams:
        one.close()
    everything_is_free(server)
    for client in clients:
        client.close()


def test_closing_the_http_socket_stops_the_engine(server: Server) -> None:
    connections = []
    for _ in range(SLOTS):
        connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=PATIENCE_S)
        body = json.dumps({"text_input": PROMPTS[0], "max_tokens": ENDLESS, "stream": True})
        connection.request("POST", "/v2/models/llm/generate_stream", body)
        response = connection.getresponse()
        assert response.readline().startswith(b"data: ")
        connections.append((connection, response))
    for connection, response in connections:
        response.close()
        connection.close()
    everything_is_free(server)


def test_stopping_one_leaves_the_other_alone(server: Server, client: Any) -> None:
    expected = whole(server, "llm", PROMPTS[2], 300)["text_output"]
    doomed = Stream(client, PROMPTS[2], ENDLESS)
    doomed.piece()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(streamed, server, "llm", PROMPTS[2], 300)
        doomed.piece()
        doomed.close()
        pieces = other.result(PATIENCE_S)
    assert "".join(piece["text_output"] for piece in pieces) == expected
    everything_is_free(server)


def test_a_model_that_does_not_stream(checkpoint: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    write(repository, checkpoint, topology="ensemble", streaming=False)
    with serve(repository, tmp_path) as server:
        for prompt in PROMPTS[:3]:
            front, ensemble = (whole(server, model, prompt) for model in ("llm", "ensemble"))
            assert front["text_output"] == ensemble["text_output"]
        status, text = server.http("models/llm/generate", {"text_input": "a", "max_tokens": 2, "stream": True})
        assert status == 400
        assert "stream" in text
