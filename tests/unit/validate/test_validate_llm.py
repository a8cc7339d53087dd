"""The checks of a server with the model `llm`, alone or beside an ensemble, against a stand-in client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from standin_client import StandInClient, config_of, fused_configs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from trtkit.client.api import Ending
from trtkit.config_file import parse_config
from trtkit.validate import Subject, bad_requests, cancellation, chat, contract, parity, streaming, subject_of, text
from trtkit.validate.source import GreedyAnswer, Source

SUBJECT = Subject(model="llm", engine=None, prompts=("a", "bb"), max_tokens=6, max_seq_len=256, timeout_s=20)


@pytest.fixture
def fused(client: StandInClient) -> StandInClient:
    """A stand-in client of a server that has `llm` only."""
    client.model, client.configs = "llm", fused_configs()
    return client


@pytest.fixture
def both(client: StandInClient) -> StandInClient:
    """One of a server that has `llm` beside an ensemble."""
    client.configs |= fused_configs()
    return client


async def test_the_contract_of_a_model_of_its_own(fused: StandInClient) -> None:
    found = await contract.check(replace(SUBJECT, streaming=True, max_batch_size=4), [fused])
    assert found.outcome == "passed" and found.findings == () and "1 model ready (llm)" in found.detail
    fused.configs["llm"]["input"] = [item for item in fused.configs["llm"]["input"] if item["name"] != "messages"]
    fused.configs["llm"]["output"][1]["data_type"] = "TYPE_INT32"
    found = await contract.check(replace(SUBJECT, streaming=False), [fused])
    places = {(finding.id, finding.place) for finding in found.findings}
    assert places == {("TK704", "llm/messages"), ("TK704", "llm/finish_reason"), ("TK706", "llm")}


async def test_the_contract_beside_an_ensemble(both: StandInClient) -> None:
    found = await contract.check(Subject(streaming=True), [both])
    assert found.findings == () and "5 models ready" in found.detail
    both.configs["llm"]["model_transaction_policy"]["decoupled"] = False
    assert [finding.place for finding in (await contract.check(Subject(streaming=True), [both])).findings] == ["llm"]


async def test_a_model_of_another_name_is_known_by_its_messages(fused: StandInClient) -> None:
    fused.configs = {"mine": config_of("mine", contract.LLM, decoupled=True)}
    mine = replace(SUBJECT, model="mine")
    assert (await contract.check(mine, [fused])).findings == ()
    assert await contract.chat_model(mine, fused) == "mine"


async def test_tokens_cannot_be_asked_for(fused: StandInClient, tmp_path: Path) -> None:
    found = await parity.check_tokens(replace(SUBJECT, source=tmp_path), [fused])
    assert found.outcome == "skipped" and "drives its engine itself" in found.detail


async def test_the_last_piece_must_tell_what_the_whole_answer_tells(fused: StandInClient) -> None:
    assert (await streaming.check(SUBJECT, [fused])).outcome == "passed"
    right = fused.ending
    fused.ending = lambda request, text, model: None if len(text) > 3 else right(request, text, model)  # type: ignore[method-assign]
    assert (await streaming.check(SUBJECT, [fused])).outcome == "passed", "nobody says anything"
    told = iter(range(1000))
    fused.ending = lambda request, text, model: Ending("stop", 1, next(told))  # type: ignore[method-assign]
    found = await streaming.check(SUBJECT, [fused])
    assert {finding.id for finding in found.findings} == {"TK724"}


async def test_the_model_beside_an_ensemble_must_stream_as_well(both: StandInClient) -> None:
    assert (await streaming.check(SUBJECT, [both])).figures["streams"] == 2 + len(streaming.MULTI_BYTE_PROMPTS)
    found = await streaming.check(replace(SUBJECT, model="ensemble"), [both])
    assert found.passed and found.figures["streams"] == 2 * (2 + len(streaming.MULTI_BYTE_PROMPTS))
    assert "ensemble and llm" in found.detail
    told = iter(range(1000))  # only `llm` tells of an ending
    right = both.ending
    both.ending = lambda request, text, model: right(request, text, model) and Ending("stop", 1, next(told))  # type: ignore[method-assign]
    found = await streaming.check(replace(SUBJECT, model="ensemble"), [both])
    assert {finding.id for finding in found.findings} == {"TK724"}
    assert all(finding.place.startswith("grpc llm '") for finding in found.findings)


async def test_bad_requests(fused: StandInClient) -> None:
    found = await bad_requests.check(SUBJECT, [fused])
    assert found.outcome == "passed" and found.figures["refused"] == 17, found
    fused.refuse = False
    places = " ".join(finding.place for finding in (await bad_requests.check(SUBJECT, [fused])).findings)
    for name in ("prompt and messages", "without a role", "no JSON", "end_id -2", "0 sequences", "empty prompt"):
        assert name in places
    assert "no max_tokens" not in places, "the model has a default"


async def test_cancellation_over_text(fused: StandInClient) -> None:
    found = await cancellation.check(SUBJECT, [fused])
    assert found.outcome == "passed" and set(found.figures["seconds"]) == {"grpc llm"}, found
    await asyncio.gather(*fused.going_on)
    assert fused.busy == 0


async def test_cancellation_that_is_ignored_over_text(fused: StandInClient) -> None:
    fused.honours_cancel = False
    found = await cancellation.check(SUBJECT, [fused])
    assert [finding.place for finding in found.findings] == ["grpc llm"], found
    await asyncio.gather(*fused.going_on)


async def test_beside_an_ensemble_both_are_cancelled(both: StandInClient) -> None:
    found = await cancellation.check(replace(SUBJECT, model="ensemble", engine="tensorrt_llm"), [both])
    assert found.outcome == "passed" and set(found.figures["seconds"]) == {"grpc tensorrt_llm", "grpc llm"}, found
    await asyncio.gather(*both.going_on)


async def test_a_model_that_says_how_many_it_runs(fused: StandInClient) -> None:
    fused.places = 2
    fused.configs["llm"]["parameters"] = {"slots": {"string_value": "2"}}
    found = await cancellation.check(SUBJECT, [fused])
    assert found.outcome == "passed" and found.figures["places"] == 2, found
    await asyncio.gather(*fused.going_on)


def test_the_subject_of_a_fused_config(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("x")
    text = f"name: x\nmodel: {{source: {tmp_path}}}\nserving: {{runtime: reference, topology: fused"
    subject = subject_of(parse_config(f"{text}, chat_template: {tmp_path}/t.jinja}}\n"))
    assert (subject.model, subject.engine, subject.chat_template) == ("llm", None, tmp_path / "t.jinja")
    assert subject_of(parse_config(text + "}\n"), model="m", engine="e").engine == "e"


# --- a source -----------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def source_folder(tmp_path: Path) -> Path:
    """A tokenizer of single bytes with a chat template, and no model."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return tmp_path


def rendered(messages: Any) -> str:
    if any(message["role"] == "system" for message in messages):
        return ""  # refused
    return "".join(f"[{message['role']}]{message['content']}" for message in messages) + "[assistant]"


@pytest.fixture
def chatty(fused: StandInClient) -> StandInClient:
    fused.render = rendered
    fused.ending = lambda request, text, model: Ending("stop", len(fused.prompt(request).encode()), 6)  # type: ignore[method-assign]
    return fused


async def test_chats_are_read_as_the_template_says(chatty: StandInClient, source_folder: Path) -> None:
    found = await chat.check(replace(SUBJECT, source=source_folder), [chatty])
    assert found.outcome == "passed" and found.findings == (), found
    assert (found.figures["equal"], found.figures["total"], found.figures["refused"]) == (2, 3, 1)


CHAT_FAULTS: list[tuple[Callable[[Any], str], str]] = [
    (lambda messages: rendered(messages).removesuffix("[assistant]"), "tokens long"),
    (lambda messages: rendered([{**message, "role": "user"} for message in messages]), "does not take such a chat"),
    (lambda messages: "", "refused"),
]


@pytest.mark.parametrize(("render", "words"), CHAT_FAULTS)
async def test_a_chat_that_is_read_otherwise(
    render: Callable[[Any], str], words: str, chatty: StandInClient, source_folder: Path
) -> None:
    chatty.render = render
    found = await chat.check(replace(SUBJECT, source=source_folder), [chatty])
    assert {finding.id for finding in found.findings} == {"TK751"}
    assert any(words in finding.cause for finding in found.findings), found


async def test_a_difference_that_no_count_shows(chatty: StandInClient, source_folder: Path) -> None:
    chatty.render = lambda messages: rendered(messages).removesuffix("[assistant]")
    chatty.counts = False
    chatty.ending = lambda request, text, model: None  # type: ignore[method-assign]
    found = await chat.check(replace(SUBJECT, source=source_folder), [chatty])
    assert [finding.cause.startswith("the answer is") for finding in found.findings] == [True, True]


async def test_a_template_of_its_own(chatty: StandInClient, source_folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.jinja"
    own.write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    subject = replace(SUBJECT, source=source_folder, chat_template=own)
    assert not (await chat.check(subject, [chatty])).passed
    chatty.render = lambda messages: "".join(f"<{message['content']}>" for message in messages)
    found = await chat.check(subject, [chatty])
    assert found.outcome == "passed" and found.figures["equal"] == 3, found


async def test_what_keeps_chats_from_being_checked(chatty: StandInClient, source_folder: Path) -> None:
    assert "no source" in (await chat.check(SUBJECT, [chatty])).detail
    (source_folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert "no chat template" in (await chat.check(replace(SUBJECT, source=source_folder), [chatty])).detail
    ensemble = StandInClient()
    assert "no model that takes chat" in (await chat.check(Subject(source=source_folder), [ensemble])).detail


def test_a_near_tie_shows_as_the_text_of_the_other_token(source_folder: Path) -> None:
    source = Source(source_folder)
    prompt, tokens = source.encode("ab"), source.encode("xyz")
    logits = torch.zeros(3, 256)
    for place, token in enumerate(tokens):
        logits[place, token] = 10.0
    rival = source.encode("Q")[0]
    logits[1, rival] = 9.99
    answer = GreedyAnswer(prompt, tokens, logits)
    assert text.near_tie(source, answer, "xQ and whatever follows", "bfloat16")
    assert not text.near_tie(source, answer, "xQ", "float32"), "too far for so fine a dtype"
    assert not text.near_tie(source, answer, "xR", "bfloat16")
    assert not text.near_tie(source, answer, "QQ", "bfloat16"), "no tie there"


async def test_text_and_counts_against_the_source(
    fused: StandInClient, source_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source(source_folder)

    def greedy(self: Source, ids: list[int], count: int) -> GreedyAnswer:
        tokens = source.encode("".join(f"{token} " for token in range(len(ids) + 1, len(ids) + 1 + 6)))
        logits = torch.zeros(len(tokens), 256)
        logits[range(len(tokens)), tokens] = 10.0
        return GreedyAnswer(ids, tokens, logits)

    monkeypatch.setattr(Source, "greedy", greedy)
    fused.ending = lambda request, words, model: Ending("stop", len(request.prompt), len(words))  # type: ignore[method-assign]
    subject = replace(SUBJECT, source=source_folder)
    found = await text.check(subject, [fused])
    assert found.outcome == "passed" and found.figures["equal"] == 2 and "source's tokens" in found.detail, found
    fused.ending = lambda request, words, model: Ending("stop", 99, len(words) + 1)  # type: ignore[method-assign]
    found = await text.check(subject, [fused])
    assert [finding.id for finding in found.findings] == ["TK716"] * 4 and "is 99, by the source" in found.findings[
        0
    ].cause
    fused.text = lambda request: "something else"  # type: ignore[method-assign]
    assert {finding.id for finding in (await text.check(subject, [fused])).findings} == {"TK715"}
