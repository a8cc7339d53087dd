"""Streaming, bad requests, cancellation and the runner, against a stand-in client with one fault at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from standin_client import StandInClient

from trtkit.client.api import ServerError
from trtkit.config_file import parse_config
from trtkit.errors import InputError, LacksError
from trtkit.validate import CHECKS, Subject, bad_requests, cancellation, run, run_checks, streaming, subject_of
from trtkit.validate.results import short

SUBJECT = Subject(prompts=("a", "bb"), max_tokens=6, max_seq_len=256, timeout_s=20)


async def test_equal_streams_pass_on_every_protocol(client: StandInClient) -> None:
    found = await streaming.check(SUBJECT, [client, StandInClient("http")])
    prompts = 2 + len(streaming.MULTI_BYTE_PROMPTS)
    assert found.outcome == "passed", found
    assert found.figures["streams"] == found.figures["equal"] == 2 * prompts
    assert found.figures["pieces"] == [6] * 2 * prompts


STREAM_FAULTS: list[tuple[str, Callable[[str], list[str]], str, str]] = [
    ("lost piece", lambda text: text.split(" ")[:-2], "TK721", "at character"),
    ("spaces lost", lambda text: text.split(), "TK721", "spaces get lost"),
    ("wrong order", lambda text: [part + " " for part in reversed(text.split())], "TK721", "wrong order"),
    ("everything so far", lambda text: [text[:2], text[:4], text], "TK721", "repeats the whole text"),
    ("cut characters", lambda text: [*list(text), "\ufffd"], "TK721", "statefully"),
    ("all at once", lambda text: [text], "TK722", "it does not come as it is made"),
    ("nothing", lambda text: [], "TK721", "at character 0"),
]


@pytest.mark.parametrize(("name", "split", "number", "words"), STREAM_FAULTS)
async def test_a_fault_of_streaming_is_named(
    name: str, split: Callable[[str], list[str]], number: str, words: str, client: StandInClient
) -> None:
    client.split = split
    found = await streaming.check(SUBJECT, [client])
    assert not found.passed
    finding = next(item for item in found.findings if item.id == number)
    assert words in finding.cause + finding.fix


async def test_protocols_that_disagree(client: StandInClient) -> None:
    other = StandInClient("http")
    other.tokens = lambda ids, n: [7] * n
    found = await streaming.check(SUBJECT, [client, other])
    assert not found.passed and {finding.id for finding in found.findings} == {"TK723"}


async def test_one_short_word_may_come_in_one_piece(client: StandInClient) -> None:
    assert (await streaming.check(replace(SUBJECT, max_tokens=1), [client])).outcome == "passed"


async def test_a_model_that_answers_once_is_not_asked_to_stream(client: StandInClient) -> None:
    client.configs["ensemble"]["model_transaction_policy"]["decoupled"] = False
    assert (await streaming.check(SUBJECT, [client])).outcome == "skipped"
    assert (await streaming.check(replace(SUBJECT, streaming=False), [StandInClient()])).outcome == "skipped"


async def test_bad_requests_that_are_refused(client: StandInClient) -> None:
    found = await bad_requests.check(SUBJECT, [client])
    assert found.outcome == "passed", found
    assert found.figures["sent"] == found.figures["refused"] == 8
    assert client.requests[-1].prompt == "a", "after each bad request comes a good one"


async def test_bad_requests_that_are_accepted(client: StandInClient) -> None:
    client.refuse = False
    found = await bad_requests.check(SUBJECT, [client])
    assert {finding.id for finding in found.findings} == {"TK741"}
    assert len(found.findings) == found.figures["sent"] == 8
    places = " ".join(finding.place for finding in found.findings)
    for name in (
        "empty prompt",
        "max_tokens 0",
        "max_tokens -1",
        "top_p 5",
        "no max_tokens",
        "unknown model",
        "256 tokens",
    ):
        assert name in places


async def test_a_server_that_a_bad_request_breaks(client: StandInClient) -> None:
    client.broken_by = ""
    found = await bad_requests.check(SUBJECT, [client])
    assert [finding.id for finding in found.findings] == ["TK745"]
    assert "empty prompt" in found.findings[0].place and "the model is gone" in found.findings[0].cause


async def test_too_long_a_prompt_needs_a_known_limit() -> None:
    names = [case.name for case in bad_requests.cases(replace(SUBJECT, max_seq_len=None))]
    assert not any("tokens" in name and "prompt" in name for name in names)
    names = [case.name for case in bad_requests.cases(replace(SUBJECT, max_input_len=9))]
    assert "prompt of more than 9 tokens" in names


async def test_cancelled_requests_give_their_places_back(client: StandInClient) -> None:
    found = await cancellation.check(SUBJECT, [client])
    assert found.outcome == "passed", found
    assert found.figures["places"] == 4
    await asyncio.gather(*client.going_on)
    assert client.busy == 0


async def test_cancelled_requests_that_go_on(client: StandInClient) -> None:
    client.honours_cancel = False
    found = await cancellation.check(SUBJECT, [client])
    assert [finding.id for finding in found.findings] == ["TK731"], found
    assert "kept their places" in found.findings[0].cause
    await asyncio.gather(*client.going_on)


async def test_cancellation_that_cannot_be_seen_is_skipped_and_says_why(client: StandInClient) -> None:
    client.places = 9
    assert "more than 4 requests at once" in (await cancellation.check(SUBJECT, [client])).detail
    short_model = replace(SUBJECT, max_seq_len=40)
    assert "too soon to tell" in (await cancellation.check(short_model, [StandInClient()])).detail
    client.configs["tensorrt_llm"]["max_batch_size"] = 10_000
    assert "too many" in (await cancellation.check(SUBJECT, [client])).detail
    client.configs["tensorrt_llm"]["model_transaction_policy"]["decoupled"] = False
    assert "not decoupled" in (await cancellation.check(SUBJECT, [client])).detail
    del client.configs["tensorrt_llm"]
    assert "no model" in (await cancellation.check(SUBJECT, [client])).detail


async def test_an_answer_that_ends_at_once_does_not_hang_the_check(client: StandInClient) -> None:
    client.tokens = lambda ids, n: [1]
    assert (await cancellation.check(SUBJECT, [client])).outcome == "skipped"
    client.tokens = lambda ids, n: []
    assert (await cancellation.check(SUBJECT, [client])).outcome == "skipped"


# --- the runner ---------------------------------------------------------------------------------------------------


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> list[StandInClient]:
    """Makes the runner use stand-in clients, one per url, which the test finds in this list."""
    made: list[StandInClient] = []

    def connect(url: str, **options: Any) -> StandInClient:
        made.append(StandInClient(url.partition(":")[0]))
        return made[-1]

    monkeypatch.setattr(run, "connect", connect)
    return made


async def test_checks_run_in_their_order_and_report(connected: list[StandInClient]) -> None:
    told: list[str] = []
    results = await run_checks(["grpc://x:1", "http://x:2"], SUBJECT, on_progress=told.append)
    assert told == list(CHECKS) == [result.name for result in results]
    outcomes = {result.name: result.outcome for result in results}
    assert outcomes["parity"] == outcomes["text"] == "skipped", "without a source"
    assert {outcomes[name] for name in ("contract", "streaming", "bad_requests", "cancellation")} == {"passed"}
    assert [client.protocol for client in connected] == ["grpc", "http"]
    assert all(set(result.to_dict()) == {"name", "outcome", "detail", "figures", "findings"} for result in results)


async def test_only_and_skip(connected: list[StandInClient]) -> None:
    results = await run_checks(["grpc://x:1"], SUBJECT, only=["streaming", "contract"], skip=["streaming"])
    assert [result.name for result in results] == ["contract"]
    with pytest.raises(InputError, match="did you mean 'streaming'"):
        await run_checks(["grpc://x:1"], SUBJECT, only=["streeming"])


async def test_nothing_to_run_is_an_error(connected: list[StandInClient]) -> None:
    with pytest.raises(InputError, match="no check to run"):
        await run_checks(["grpc://x:1"], SUBJECT, only=["parity"], skip=["parity"])
    with pytest.raises(InputError, match="no check to run"):
        await run_checks(["grpc://x:1"], SUBJECT, skip=list(CHECKS))


@pytest.mark.parametrize("name", ["parity", "text"])
async def test_a_comparison_that_is_asked_for_needs_a_source(connected: list[StandInClient], name: str) -> None:
    with pytest.raises(InputError, match=f"check '{name}' has no source") as caught:
        await run_checks(["grpc://x:1"], SUBJECT, only=["contract", name])
    assert "--source" in caught.value.fix
    assert connected == [], "said before anything is asked"


@pytest.mark.parametrize(("given", "used"), [(3.0, 3.0), (60.0, 10.0)])
async def test_questions_about_the_server_keep_the_time_limit(
    connected: list[StandInClient], monkeypatch: pytest.MonkeyPatch, given: float, used: float
) -> None:
    limits: list[float | None] = []

    def noted(name: str) -> Any:
        method = getattr(StandInClient, name)

        async def ask(self: StandInClient, *args: Any, timeout_s: float | None = None) -> Any:
            limits.append(timeout_s)
            return await method(self, *args)

        return ask

    for name in ("is_live", "is_ready", "models", "model_config"):
        monkeypatch.setattr(StandInClient, name, noted(name))
    only = ["contract", "streaming", "cancellation"]
    await run_checks(["grpc://x:1"], replace(SUBJECT, timeout_s=given), only=only)
    assert len(limits) > 8 and set(limits) == {used}


async def test_an_error_in_a_check_fails_that_check_alone(
    connected: list[StandInClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(*args: Any) -> Any:
        raise ServerError("the server's own words", status="500")

    monkeypatch.setitem(CHECKS, "contract", fails)
    first, second = await run_checks(["grpc://x:1"], SUBJECT, only=["contract", "streaming"])
    assert first.outcome == "failed" and "the server's own words" in first.findings[0].cause
    assert second.outcome == "passed"


async def test_a_dead_server_is_said_before_any_check(monkeypatch: pytest.MonkeyPatch) -> None:
    client = StandInClient()
    client.live = False
    monkeypatch.setattr(run, "connect", lambda url, **options: client)
    with pytest.raises(LacksError, match="cannot reach grpc://stand-in:1"):
        await run_checks(["grpc://x:1"], SUBJECT)


async def test_no_prompts(connected: list[StandInClient]) -> None:
    with pytest.raises(InputError, match="no prompts"):
        await run_checks(["grpc://x:1"], replace(SUBJECT, prompts=()))


def test_the_subject_of_a_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 77, "dtype": "bfloat16"}')
    text = f"name: x\nmodel: {{source: {tmp_path}}}\nvalidation: {{prompts: [p], max_tokens: 3}}\n"
    subject = subject_of(parse_config(text))
    assert (subject.source, subject.prompts, subject.max_tokens) == (tmp_path, ("p",), 3)
    assert (subject.dtype, subject.max_seq_len, subject.max_input_len) == ("bfloat16", 77, 1024)
    assert (subject.streaming, subject.max_batch_size, subject.max_running) == (True, 64, 64)
    reference = subject_of(parse_config(text + "serving: {runtime: reference, streaming: false}\n"))
    assert (reference.max_input_len, reference.max_running, reference.streaming) == (None, None, False)
    hub = subject_of(parse_config("name: x\nmodel: {source: owner/name}\n"))
    assert (hub.source, hub.dtype, hub.max_seq_len) == (None, None, None)


@pytest.mark.parametrize(
    ("wanted", "content", "expected"),
    [
        ("float32", '{"dtype": "bfloat16"}', "float32"),
        ("auto", '{"dtype": "bfloat16"}', "bfloat16"),
        ("auto", '{"torch_dtype": "float16"}', "float16"),
        ("auto", '{"dtype": "float32"}', "float16"),
        ("auto", "{}", "float16"),
        ("auto", "no json", None),
    ],
)
def test_the_dtype_of_a_checkpoint(wanted: str, content: str, expected: str | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    assert run.checkpoint_dtype(wanted, tmp_path) == expected


def test_short_texts() -> None:
    assert short("a\nb") == "'a\\nb'"
    assert len(short("x" * 500)) <= 42 and "…" in short("x" * 500)
