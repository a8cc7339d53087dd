"""The model `llm` of the fused topology in a real Triton server: the tiny trained Llama behind the reference runtime.

Two servers: `wide` runs 8 requests at once, `narrow` one, with a short queue that nobody waits in for long.
"""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, aclosing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from trtkit import demo, hf
from trtkit.cli import main
from trtkit.cli.loadtest import command as loadtest
from trtkit.client import GenerateRequest, LLMClient, ServerError, connect
from trtkit.client.served import Served, find
from trtkit.client.tensors import Tensor, scalar, text_inputs
from trtkit.config_file import load_config
from trtkit.convert.conversion import convert
from trtkit.convert.source import plan_conversion
from trtkit.deploy.deployment import Deployment
from trtkit.deploy.local import running_server
from trtkit.repository.generate import render_repository, write_repository

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.xdist_group("llm_server")]

TINY = Path(__file__).parents[2] / "examples" / "tiny-llama"
CONFIG = """
name: llm-{name}
model: {{source: {source}}}
serving: {{runtime: reference, topology: fused, {serving}}}
validation: {{max_tokens: 16, prompts: [The, "def main(", "漢字 🎉", "import os\\n"]}}
loadtest:
  closed: {{concurrency: 4, duration_s: 30, warmup_s: 0, max_requests: 8, max_tokens: 8}}
"""
SERVING = {
    "wide": "max_batch_size: 8",
    "narrow": "max_batch_size: 1, max_queue_size: 2, queue: {default_timeout_microseconds: 300000}",
}
PROMPTS = [
    "The", "def main(", "import os\n", "Return a new", "class A:\n    ", " ", "\t\t", "é", "# Grüße aus Köln: ",
    "漢字", "説明「こんにちは世界」", "🎉", "👩‍👩‍👧 and 🚀", "a\u0301", "\ufffd", "x = [1, 2, 3]\nfor", "0" * 50,
    "<|user|>hi", "\\n", "'''",
]  # fmt: skip
LONG = 480
"""Tokens of an answer that takes a while."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configs of both servers and the checkpoint."""
    home = tmp_path_factory.mktemp("llm")
    for name, serving in SERVING.items():
        (home / f"{name}.yaml").write_text(CONFIG.format(name=name, source=TINY, serving=serving))
    source = hf.open_source(TINY)
    convert(plan_conversion(source, load_config(home / "wide.yaml").checkpoint), source, home / "checkpoint")
    return home


@pytest.fixture(scope="module")
def servers(home: Path) -> Iterator[Callable[[str], Deployment]]:
    """Starts a server on first use."""
    running: dict[str, Deployment] = {}
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setenv("TRTKIT_STATE_DIR", str(home / "state"))

        def started(name: str) -> Deployment:
            if name not in running:
                config = load_config(home / f"{name}.yaml")
                files = render_repository(config, tokenizer_dir=TINY, checkpoint_dir=home / "checkpoint")
                write_repository(files, home / name)
                server = running_server(home / name, name=config.name, exit_timeout_s=5)
                running[name] = stack.enter_context(server)
            return running[name]

        yield started


@pytest.fixture
def wide(servers: Callable[[str], Deployment]) -> Deployment:
    return servers("wide")


@pytest.fixture
def narrow(servers: Callable[[str], Deployment]) -> Deployment:
    return servers("narrow")


@pytest.fixture(params=["grpc", "http"])
def protocol(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
async def client(wide: Deployment, protocol: Any) -> AsyncIterator[LLMClient]:
    async with connect(wide.url(protocol), model="llm") as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY)


async def streamed(client: LLMClient, request: GenerateRequest) -> list[Any]:
    return [chunk async for chunk in client.stream(request)]


def joined(chunks: list[Any]) -> str:
    return "".join(chunk.text for chunk in chunks)


def counters(server: Deployment) -> dict[str, float]:
    """The model's own metrics, without their prefix."""
    with urllib.request.urlopen(server.metrics_url) as answer:  # noqa: S310
        lines = answer.read().decode().splitlines()
    found = {}
    for line in lines:
        if line.startswith("trtkit_llm_") and "_bucket" not in line:
            name, value = line.rsplit(" ", 1)
            found[name.partition("{")[0].removeprefix("trtkit_llm_").removesuffix("_total")] = float(value)
    return found


async def settled(server: Deployment) -> dict[str, float]:
    """The metrics when nothing runs and everything is counted: they come once a second."""
    before = counters(server)
    for _ in range(20):
        await asyncio.sleep(1.3)
        now = counters(server)
        if now == before and not now["running_sequences"] and not now["waiting_requests"]:
            return now
        before = now
    pytest.fail(f"the metrics do not come to rest: {before}")


async def growth(server: Deployment, before: dict[str, float]) -> dict[str, float]:
    after = await settled(server)
    return {name: after[name] - before[name] for name in after if "seconds" not in name or name.endswith("_count")}


# Text.


async def test_a_stream_is_the_whole_answer(client: LLMClient) -> None:
    pieces = 0
    for seed, prompt in enumerate(PROMPTS):
        # Greedy, and so hot that tokens cut characters anywhere.
        for options in ({"top_k": 1}, {"temperature": 4.0, "top_k": 200, "seed": seed}):
            request = GenerateRequest(prompt, max_tokens=24, **options)
            whole, chunks = await client.generate(request), await streamed(client, request)
            assert joined(chunks) == whole.text, (prompt, options)
            assert [chunk.ending is None for chunk in chunks[:-1]] == [True] * (len(chunks) - 1)
            told = (whole.finish_reason, whole.prompt_tokens, whole.completion_tokens)
            last = chunks[-1].ending
            assert (last.finish_reason, last.prompt_tokens, last.completion_tokens) == told
            assert whole.finish_reason in ("stop", "length")
            pieces += len(chunks)
    assert pieces > 5 * 2 * len(PROMPTS)


async def test_both_protocols_say_the_same(wide: Deployment) -> None:
    async with connect(wide.url("grpc"), model="llm") as one, connect(wide.url("http"), model="llm") as other:
        for prompt in PROMPTS:
            request = GenerateRequest(prompt, max_tokens=12, top_k=1, request_id="same")
            assert await one.generate(request) == await other.generate(request)


async def test_stop_words_across_tokens(client: LLMClient) -> None:
    request = GenerateRequest("def main(", max_tokens=32, top_k=1)
    whole = (await client.generate(request)).text
    assert len(whole) > 40
    for place in range(0, 36, 3):
        for word in (whole[place : place + 2], whole[place : place + 7]):
            stopped = replace(request, stop_words=["not there", word])
            done, chunks = await client.generate(stopped), await streamed(client, stopped)
            assert done.text == whole[: whole.index(word)] == joined(chunks)
            assert done.finish_reason == chunks[-1].ending.finish_reason == "stop"


async def test_messages_are_the_rendered_prompt(client: LLMClient, tokenizer: Any) -> None:
    chats = [
        [{"role": "user", "content": content}]
        for content in ("Hello", "漢字 🎉\n", " spaces ", "<|eot|>", '"\\ quotes')
    ]
    chats.append([{"role": "system", "content": "Be brief."}, *chats[0], {"role": "assistant", "content": "Hi"}])
    for chat in chats:
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        plain = GenerateRequest(prompt.removeprefix(tokenizer.bos_token), max_tokens=16, top_k=1)
        messages = replace(plain, prompt="", messages=chat)
        expected, done = await client.generate(plain), await client.generate(messages)
        assert (done.text, done.prompt_tokens) == (
            expected.text,
            len(tokenizer.encode(prompt, add_special_tokens=False)),
        )
        assert done.completion_tokens == expected.completion_tokens
        assert joined(await streamed(client, messages)) == done.text
    with pytest.raises(ServerError, match="the roles are system, user and assistant") as error:
        await client.generate(GenerateRequest(messages=[{"role": "robot", "content": "x"}]))
    assert error.value.status in ("", "400")  # over gRPC, an error in a stream has none


def asked(request: GenerateRequest, *more: Tensor, stream: bool) -> list[Tensor]:
    return [*text_inputs(request, stream=stream), *more]


async def test_cumulative_pieces(client: LLMClient) -> None:
    request = GenerateRequest("説明 def main(", max_tokens=20, top_k=1)
    whole = (await client.generate(request)).text
    answers = await client.infer("llm", asked(request, scalar("cumulative", "BOOL", True), stream=True))
    texts = [answer["text_output"].item() for answer in answers]
    assert len(texts) > 5 and texts[-1] == whole
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))


async def test_several_sequences(client: LLMClient) -> None:
    request = GenerateRequest("def main(", max_tokens=10, temperature=1.0, top_k=50, seed=5)
    single = [(await client.generate(replace(request, seed=5 + number))).text for number in range(3)]
    assert len(set(single)) == 3
    three = scalar("num_return_sequences", "INT32", 3)
    (answer,) = await client.infer("llm", asked(request, three, stream=False))
    assert answer["text_output"].reshape(-1).tolist() == single
    assert answer["completion_tokens"].size == answer["finish_reason"].size == 3
    texts = ["", "", ""]
    for piece in await client.infer("llm", asked(request, three, stream=True)):
        texts[piece["sequence_index"].item()] += piece["text_output"].item()
    assert texts == single


async def test_tokens_are_counted_right(client: LLMClient, tokenizer: Any) -> None:
    for prompt in PROMPTS:
        for end_id in (None, -1):
            request = GenerateRequest(prompt, max_tokens=20, top_k=1, end_id=end_id)
            done = await client.generate(request)
            assert done.prompt_tokens == len(tokenizer.encode(prompt))
            probabilities = scalar("return_log_probs", "BOOL", True)
            (answer,) = await client.infer("llm", asked(request, probabilities, stream=False))
            assert answer["output_log_probs"].size == done.completion_tokens
            assert done.completion_tokens == 20 or (done.finish_reason, end_id) == ("stop", None)


async def test_many_streams_at_once_keep_their_order(client: LLMClient) -> None:
    """Four times as many as run at once."""
    requests = [
        GenerateRequest(f"{PROMPTS[n % len(PROMPTS)]}{n}", max_tokens=4 + n % 16, temperature=1.0, top_k=50, seed=n)
        for n in range(32)
    ]
    alone = [(await client.generate(request)).text for request in requests]
    together = await asyncio.gather(*(streamed(client, request) for request in requests))
    assert [joined(chunks) for chunks in together] == alone
    for chunks in together:
        times = [chunk.received_ns for chunk in chunks]
        assert times == sorted(times) and chunks[-1].ending is not None


# What is refused.


@pytest.mark.parametrize("stream", [False, True])
async def test_nonsense_is_refused(client: LLMClient, stream: bool) -> None:
    for request, words in (
        (GenerateRequest(""), "the prompt is empty"),
        (GenerateRequest("a", max_tokens=0), "max_tokens"),
        (GenerateRequest("a", max_tokens=10_000), "max_seq_len"),
        (GenerateRequest("a", temperature=-1.0), "temperature"),
        (GenerateRequest("a", messages=[{"role": "user", "content": "x"}]), "either text_input or messages"),
        (GenerateRequest(messages=[{"role": "user"}]), "content"),
    ):
        with pytest.raises(ServerError, match=words) as error:
            await (streamed(client, request) if stream else client.generate(request))
        assert error.value.status in ("", "400")  # over gRPC, an error in a stream has none


@pytest.mark.parametrize("stream", [False, True])
async def test_a_full_queue_and_a_deadline(narrow: Deployment, protocol: Any, stream: bool) -> None:
    """While one runs, two may wait, and not for long; the others are turned away at once."""
    unavailable = {"grpc": "UNAVAILABLE", "http": "503"}[protocol]
    async with connect(narrow.url(protocol), model="llm") as client:

        async def refused() -> ServerError:
            with pytest.raises(ServerError) as error:
                await (streamed(client, GenerateRequest("a")) if stream else client.generate(GenerateRequest("a")))
            return error.value

        async with aclosing(client.stream(GenerateRequest("def", max_tokens=LONG, end_id=-1))) as chunks:
            await anext(chunks)
            errors = await asyncio.gather(*(refused() for _ in range(6)))
        assert {error.status for error in errors} == {unavailable}
        messages = sorted(error.message.split(":")[0] for error in errors)
        assert messages == ["the deadline is exceeded"] * 2 + ["the queue is full"] * 4
        assert (await client.generate(GenerateRequest("a", max_tokens=2))).text


async def test_a_client_that_goes_away_frees_its_slot(narrow: Deployment, protocol: Any) -> None:
    before = await settled(narrow)
    async with connect(narrow.url(protocol), model="llm") as client:
        async with aclosing(client.stream(GenerateRequest("def", max_tokens=LONG, end_id=-1))) as chunks:
            await anext(chunks)
        done = await client.generate(GenerateRequest("a", max_tokens=2, end_id=-1))
        assert done.completion_tokens == 2
    grown = await growth(narrow, before)
    assert (grown["requests"], grown["cancelled_requests"], grown["completion_tokens"]) == (1, 1, 2)


# What is told.


async def test_the_metrics_add_up(wide: Deployment) -> None:
    before = await settled(wide)
    prompt_tokens = completion_tokens = 0
    for protocol in ("grpc", "http"):
        async with connect(wide.url(protocol), model="llm") as client:
            for n in range(5):
                done = await client.generate(GenerateRequest(PROMPTS[n], max_tokens=3 + n))
                (*_, last) = await streamed(client, GenerateRequest(PROMPTS[n], max_tokens=4))
                prompt_tokens += (done.prompt_tokens or 0) + last.ending.prompt_tokens
                completion_tokens += (done.completion_tokens or 0) + last.ending.completion_tokens
            with pytest.raises(ServerError):
                await client.generate(GenerateRequest("a", temperature=-1.0))
    grown = await growth(wide, before)
    assert grown == {
        "requests": 20,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "refused_requests": 2,
        "cancelled_requests": 0,
        "failed_requests": 0,
        "running_sequences": 0,
        "waiting_requests": 0,
        "time_to_first_token_seconds_count": 20,
    }


async def test_the_model_is_found(wide: Deployment, protocol: Any) -> None:
    assert await find(wide.url(protocol)) == Served("llm", None)


# The verbs.


def verb(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, Any]:
    with pytest.raises(SystemExit) as stop:
        main([*map(str, args), "--json"])
    return int(stop.value.code or 0), json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("given", ["config", "urls"])
def test_validate(wide: Deployment, home: Path, capsys: pytest.CaptureFixture[str], given: str) -> None:
    urls = ["--url", wide.url("grpc"), "--url", wide.url("http"), "--source", TINY]
    code, found = verb(capsys, "validate", *([home / "wide.yaml"] if given == "config" else urls))
    outcomes = {check["name"]: check["outcome"] for check in found["checks"]}
    assert code == 0 and outcomes.pop("parity") == "skipped" and set(outcomes.values()) == {"passed"}, found
    details = {check["name"]: check["detail"] for check in found["checks"]}
    assert "drives its engine itself" in details["parity"] and "source's tokens" in details["text"]
    assert "grpc llm" in details["cancellation"] and "http llm" in details["cancellation"]


def test_loadtest_counts_tokens_as_the_model_does(wide: Deployment, home: Path) -> None:
    for options in ([], ["--no-streaming"], ["--url", wide.http_url]):
        done = CliRunner().invoke(loadtest, [str(home / "wide.yaml"), "--scenario", "closed", *options, "--json"])
        (result,) = json.loads(done.stdout)["results"]
        assert result["scenario"]["model"] == "llm" and result["counts"]["ok"] == 8, result
        assert result["throughput"]["output_unit"] == "tokens" and result["throughput"]["output_total"] <= 64


def test_evaluate_says_what_is_missing(wide: Deployment, capsys: pytest.CaptureFixture[str], protocol: Any) -> None:
    small = ("--samples", "1", "--length", "16")
    code, found = verb(capsys, "evaluate", TINY, wide.url(protocol), *small)
    assert code == 2 and "'llm' takes text and there is no model 'tensorrt_llm'" in found["error"]["cause"]
    code, found = verb(capsys, "evaluate", TINY, wide.url(protocol), *small, "--model", "llm")
    assert code == 2 and "no tokens" in found["error"]["cause"] and "evaluate the checkpoint" in found["error"]["fix"]


def test_the_demo_runs_a_fused_config(home: Path, tmp_path: Path) -> None:
    texts: list[str] = []
    begun = time.monotonic()
    listener = demo.Listener(text=texts.append)
    result = demo.run(tmp_path / "demo", config=load_config(home / "wide.yaml"), listener=listener)
    assert {check.name: check.outcome for check in result.checks} == {
        name: "skipped" if name == "parity" else "passed"
        for name in ("contract", "parity", "text", "streaming", "chat", "cancellation", "bad_requests")
    }
    assert [load.scenario["model"] for load in result.loads] == ["llm"] and result.seconds <= time.monotonic() - begun
    assert len("".join(texts)) > len(demo.PROMPT) + 20 and (tmp_path / "demo" / "report.html").is_file()
