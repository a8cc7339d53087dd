"""The model `llm` around an engine that does what the test says."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import fake_triton
import numpy as np
import pytest
from fake_triton import Request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trtkit.repository.models.serving.engine import Step

Serve = Callable[..., Any]
TEXT = "hello world, naïve 🙂 the end"


def test_a_whole_answer_with_its_counts(serve: Serve) -> None:
    server = serve()
    request = Request(text_input="hello", max_tokens=50)
    server.send(request)
    job = server.job()
    assert (job.prompt, job.max_tokens, job.end_ids, job.streams) == (server.ids("hello"), 50, (1,), False)
    server.answer(job, TEXT)
    request.wait()
    assert request.pieces == [TEXT]
    assert request.last("finish_reason") == ["stop"]
    assert request.last("prompt_tokens") == [len(server.ids("hello"))]
    assert request.last("completion_tokens") == [len(server.ids(TEXT))]
    assert "cum_log_probs" not in request.sender.responses[-1].tensors


def test_a_stream_sends_complete_characters_as_they_come(serve: Serve) -> None:
    server = serve()
    request = Request(text_input="a", stream=True)
    server.send(request)
    server.answer(server.job(), TEXT, finish="length")
    request.wait()
    assert len(request.pieces) > 5
    assert request.text == TEXT
    assert not any("\ufffd" in piece for piece in request.pieces)
    assert request.last("finish_reason") == ["length"]
    assert all("finish_reason" not in response.tensors for response in request.sender.responses[:-1])


def test_a_cumulative_stream_repeats_what_was_before(serve: Serve) -> None:
    server = serve()
    request = Request(text_input="a", stream=True, cumulative=True)
    server.send(request)
    server.answer(server.job(), TEXT)
    request.wait()
    assert all(after.startswith(before) for before, after in zip(request.pieces, request.pieces[1:], strict=False))
    assert request.pieces[-1] == TEXT


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stops", "include", "expected"),
    [
        (["orl"], False, "hello w"),
        (["orl"], True, "hello worl"),
        (["x", " world, n"], False, "hello"),
        (["", "hello"], False, ""),
        (["world!"], False, TEXT),
        ([" end of"], False, TEXT),
    ],
)
def test_stop_words_across_tokens(serve: Serve, stream: bool, stops: list[str], include: bool, expected: str) -> None:
    server = serve()
    request = Request(text_input="a", stream=stream, stop_words=stops, include_stop_words=include)
    server.send(request)
    job = server.job()
    server.answer(job, TEXT)
    request.wait()
    assert request.text == expected
    assert request.last("finish_reason") == ["stop"]
    if expected != TEXT:
        server.until(lambda: job.key in server.engine.cancelled)  # the engine must not go on for nobody
        assert request.last("completion_tokens")[0] < len(server.ids(TEXT))


def test_several_sequences(serve: Serve) -> None:
    server = serve()
    whole = Request(text_input="a", num_return_sequences=2, seed=7)
    stream = Request(text_input="a", num_return_sequences=2, stream=True)
    server.send(whole, stream)
    server.until(lambda: len(server.engine.jobs) == 4)
    one, two, three, four = server.engine.jobs
    assert (one.sampling.seed, two.sampling.seed, three.sampling.seed) == (7, 8, None)
    for job, text in ((two, "second"), (one, "first"), (four, "fourth"), (three, "third")):
        server.answer(job, text)
    whole.wait()
    stream.wait()
    assert [text.decode() for text in whole.sender.responses[0].tensors["text_output"][0]] == ["first", "second"]
    assert whole.last("completion_tokens") == [len(server.ids("first")), len(server.ids("second"))]
    texts = ["", ""]
    for response in stream.sender.responses:
        texts[response.tensors["sequence_index"][0, 0]] += response.tensors["text_output"][0, 0].decode()
    assert texts == ["third", "fourth"]


def test_prompt_in_front_and_log_probs(serve: Serve) -> None:
    server = serve()
    request = Request(text_input="hello ", exclude_input_in_output=False, return_log_probs=True)
    server.send(request)
    job = server.job()
    assert job.log_probs
    server.engine.give(Step(job.key, server.ids("ab")[:1], log_probs=(-0.5,)))
    server.engine.give(Step(job.key, server.ids("c")[:1], "stop", log_probs=(-0.25,)))
    request.wait()
    assert request.text.startswith("hello a")
    assert request.last("cum_log_probs") == [-0.75]
    assert request.last("output_log_probs") == [[-0.5, -0.25]]


def test_chat_messages_are_written_by_the_template(serve: Serve) -> None:
    server = serve()
    request = Request(messages=json.dumps([{"role": "user", "content": "hello"}]), max_tokens=5)
    server.send(request)
    job = server.job()
    assert server.tokenizer.decode(job.prompt, skip_special_tokens=False) == "<s>user: hello\nassistant:"
    server.answer(job, "yes")
    assert request.wait().text == "yes"


def test_only_what_was_asked_for_is_sent(serve: Serve) -> None:
    server = serve()
    request = Request(text_input="a", outputs={"text_output"})
    server.send(request)
    server.answer(server.job(), "b")
    request.wait()
    assert set(request.sender.responses[-1].tensors) == {"text_output"}


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "text_input: send either"),
    ({"text_input": "a", "messages": "[]"}, "text_input: send either"),
    ({"text_input": ""}, "text_input: the prompt is empty"),
    ({"text_input": b"\xff"}, "text_input: not UTF-8"),
    ({"text_input": ["a", "b"]}, "text_input: shape [1, 2]"),
    ({"text_input": "a", "max_tokens": 0}, "max_tokens: 0 must be 1 or more"),
    ({"text_input": "a", "max_tokens": 200}, "max_tokens: 200 tokens after a prompt of 1"),
    ({"text_input": "a" * 300}, "max_tokens: 1 tokens after a prompt of 300"),
    ({"text_input": "a", "temperature": -1.0}, "temperature: -1.0 must be 0 or more"),
    ({"text_input": "a", "temperature": float("nan")}, "temperature: nan is no finite number"),
    ({"text_input": "a", "temperature": 1e-9}, "must be 0 (greedy) or 1e-06 or more"),
    ({"messages": '[{"role": "user", "content": "a"}]', "chat_template_kwargs": '{"name": []}'}, "must be text"),
    ({"text_input": "a", "top_p": 1.5}, "top_p: 1.5 must be 0 to 1"),
    ({"text_input": "a", "top_k": -1}, "top_k: -1 must be 0 or more"),
    ({"text_input": "a", "num_return_sequences": 99}, "num_return_sequences: 99 must be 1 to 16"),
    ({"text_input": "a", "stop_words": ["x"] * 999}, "stop_words: more than 256 words"),
    ({"text_input": "a", "stop_words": b"\xff"}, "stop_words: not UTF-8"),
    ({"text_input": "a", "stop_words": ["x" * 4000 + str(number) for number in range(9)]}, "stop_words: "),
    ({"text_input": "a", "chat_template_kwargs": "{}"}, "chat_template_kwargs: only with messages"),
    ({"messages": "{"}, "messages: the chat messages are no JSON"),
    ({"messages": "[]"}, "messages: the chat messages must be a list"),
    ({"messages": '[{"role": "user", "content": "a"}]', "chat_template_kwargs": "[]"}, "must be a JSON object"),
    ({"messages": '[{"role": "user", "content": "a"}]', "chat_template_kwargs": "{"}, "chat_template_kwargs: no JSON"),
    (
        {"messages": '[{"role": "user", "content": "a"}]', "chat_template_kwargs": '{"self": 1}'},
        "cannot be given there",
    ),
]


@pytest.mark.parametrize(("inputs", "message"), BAD, ids=[message for _, message in BAD])
def test_a_bad_request_is_told_why_and_leaves_the_others_alone(
    serve: Serve, inputs: dict[str, Any], message: str
) -> None:
    server = serve(max_seq_len="128")
    bad, good = Request(**inputs), Request(text_input="a")
    server.send(bad, good)
    assert message in str(bad.wait().error)
    assert bad.error is not None
    assert bad.error.code == fake_triton.TritonError.INVALID_ARG
    server.answer(server.job(), "fine")
    assert good.wait().text == "fine"
    assert not server.errors


def test_messages_without_a_template_are_unsupported(serve: Serve) -> None:
    server = serve(template=None)
    request = Request(messages='[{"role": "user", "content": "a"}]')
    server.send(request)
    assert request.wait().error.code == fake_triton.TritonError.UNSUPPORTED


def test_streams_need_a_decoupled_model(serve: Serve) -> None:
    server = serve(decoupled=False)
    request = Request(text_input="a", stream=True)
    server.send(request)
    assert "whole answers only" in str(request.wait().error)


def test_end_ids_of_the_request_come_first(serve: Serve) -> None:
    server = serve(end_ids="1,0")
    server.send(Request(text_input="a"), Request(text_input="a", end_id=5), Request(text_input="a", end_id=-1))
    server.until(lambda: len(server.engine.jobs) == 3)
    assert [job.end_ids for job in server.engine.jobs] == [(1, 0), (5,), ()]


def test_max_tokens_has_a_default_and_fits(serve: Serve) -> None:
    server = serve(max_seq_len="128", default_max_tokens="100")
    server.send(Request(text_input="a"), Request(text_input="a" * 60))
    server.until(lambda: len(server.engine.jobs) == 2)
    assert [job.max_tokens for job in server.engine.jobs] == [100, 68]


def test_requests_beyond_the_slots_wait_in_order_and_beyond_the_queue_are_refused(serve: Serve) -> None:
    server = serve(max_batch_size=1, max_queue_size="2")
    requests = [Request(text_input=f"{number}") for number in range(4)]
    server.send(*requests)
    error = requests[3].wait().error
    assert error.code == fake_triton.TritonError.UNAVAILABLE
    assert "the queue is full: 2 requests wait" in str(error)
    for number, request in enumerate(requests[:3]):
        server.until(lambda number=number: len(server.engine.jobs) == number + 1)
        server.answer(server.engine.jobs[number], f"answer {number}")
        assert request.wait().text == f"answer {number}"


@pytest.mark.parametrize(
    ("parameters", "timeout_us", "late"),
    [
        ({"timeout_ms": "20"}, 0, True),
        ({"timeout_ms": "20"}, 10**9, True),
        ({"allow_timeout_override": "true"}, 20_000, True),
        ({}, 20_000, False),
        ({"timeout_ms": "60000", "allow_timeout_override": "true"}, 20_000, True),
    ],
)
def test_a_request_waits_no_longer_than_its_deadline(
    serve: Serve, parameters: dict[str, str], timeout_us: int, late: bool
) -> None:
    server = serve(max_batch_size=1, **parameters)
    first, second = Request(text_input="a"), Request(text_input="b", timeout_us=timeout_us)
    server.send(first, second)
    if late:
        error = second.wait().error
        assert (error.code, "the deadline is exceeded" in str(error)) == (fake_triton.TritonError.UNAVAILABLE, True)
    server.answer(server.job(0), "one")
    assert first.wait().text == "one"
    if not late:
        server.answer(server.job(1), "two")
        assert second.wait().text == "two"


def test_a_client_that_goes_away_frees_its_slot(serve: Serve) -> None:
    server = serve(max_batch_size=1)
    gone, next_one = Request(text_input="a", stream=True), Request(text_input="b")
    server.send(gone, next_one)
    job = server.job()
    server.engine.give(Step(job.key, server.ids("a")))
    gone.sender.cancelled = True
    assert gone.wait().error.code == fake_triton.TritonError.CANCELLED
    assert job.key in server.engine.cancelled
    server.engine.give(Step(job.key, server.ids("late")))  # what an engine may still have had
    server.answer(server.job(1), "b")
    assert next_one.wait().text == "b"
    server.until(lambda: server.metrics["trtkit_llm_cancelled_requests_total"].value == 1)


def test_a_waiting_client_that_goes_away_is_never_started(serve: Serve) -> None:
    server = serve(max_batch_size=1)
    first, gone, third = (Request(text_input=text) for text in "abc")
    server.send(first, gone, third)
    gone.sender.cancelled = True
    server.answer(server.job(), "one")
    assert gone.wait().error.code == fake_triton.TritonError.CANCELLED
    server.answer(server.job(1), "three")
    assert third.wait().text == "three"
    assert len(server.engine.jobs) == 2


def test_a_broken_stream_is_dropped_and_the_rest_goes_on(serve: Serve) -> None:
    server = serve()
    broken, fine = Request(text_input="a", stream=True), Request(text_input="b")
    server.send(broken, fine)
    server.until(lambda: len(server.engine.jobs) == 2)
    broken.sender.broken = True
    server.engine.give(Step(server.engine.jobs[0].key, server.ids("a")))
    server.until(lambda: server.engine.jobs[0].key in server.engine.cancelled)
    server.answer(server.engine.jobs[1], "fine")
    assert fine.wait().text == "fine"


def test_an_error_of_the_engine_ends_one_request(serve: Serve) -> None:
    server = serve()
    bad, good = Request(text_input="a", stream=True), Request(text_input="b")
    server.send(bad, good)
    server.until(lambda: len(server.engine.jobs) == 2)
    server.engine.give(Step(server.engine.jobs[0].key, error="out of blocks", code="UNAVAILABLE"))
    server.answer(server.engine.jobs[1], "fine")
    assert (str(bad.wait().error), bad.error.code) == ("out of blocks", fake_triton.TritonError.UNAVAILABLE)
    assert good.wait().text == "fine"


def test_an_engine_that_raises_leaves_nobody_waiting(serve: Serve) -> None:
    server = serve(max_batch_size=1)
    running, waiting = Request(text_input="a"), Request(text_input="b")
    server.send(running, waiting)
    server.engine.fail(ValueError("boom"))
    assert "internal error: ValueError: boom" in str(running.wait().error)
    assert "internal error" in str(waiting.wait().error)
    after = Request(text_input="c")
    server.send(after)
    server.answer(server.job(), "goes on")
    assert after.wait().text == "goes on"


def test_an_engine_that_never_recovers_answers_everybody(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(max_batch_size=1)

    def broken(*_: Any) -> Any:
        raise ValueError("gone")

    monkeypatch.setattr(server.engine, "step", broken)
    monkeypatch.setattr(server.engine, "cancel", broken)
    for number in range(3):
        request = Request(text_input=f"{number}")
        server.send(request)
        assert "ValueError: gone" in str(request.wait().error)
    monkeypatch.undo()
    after = Request(text_input="b")
    server.send(after)
    server.until(lambda: server.engine.jobs[-1].prompt == server.ids("b"))
    server.answer(server.engine.jobs[-1], "fine")
    assert after.wait().text == "fine"


def test_a_client_that_leaves_the_queue_frees_its_place(serve: Serve) -> None:
    server = serve(max_batch_size=1, max_queue_size="1")
    running, gone = Request(text_input="a"), Request(text_input="b")
    server.send(running, gone)
    gone.sender.cancelled = True
    assert gone.wait().error.code == fake_triton.TritonError.CANCELLED
    after = Request(text_input="c")
    server.send(after)
    server.answer(server.job(0), "one")
    server.answer(server.job(1), "three")
    assert (running.wait().text, after.wait().text) == ("one", "three")


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_behind_a_stop_word_do_not_count(serve: Serve, stream: bool) -> None:
    server = serve()
    request = Request(text_input="a", stop_words=["b"], stream=stream, return_log_probs=True)
    server.send(request)
    ids = [number for letter in "xbyz" for number in server.ids(letter)]
    server.engine.give(Step(server.job().key, ids, "length", log_probs=(-1.0, -2.0, -4.0, -8.0)))
    assert request.wait().text == "x"
    assert request.last("completion_tokens") == [2]
    assert request.last("cum_log_probs") == [-3.0]


def test_an_engine_that_refuses_a_job_leaves_its_slot_free(serve: Serve) -> None:
    server = serve(max_batch_size=1)
    server.engine.refuses = ValueError("no")
    refused = Request(text_input="a")
    server.send(refused)
    assert "ValueError: no" in str(refused.wait().error)
    server.engine.refuses = None
    after = Request(text_input="b")
    server.send(after)
    server.answer(server.job(), "fine")
    assert after.wait().text == "fine"


def test_requests_from_a_busy_thread_are_all_answered(serve: Serve) -> None:
    server = serve(max_batch_size=2, timeout_ms="60000")
    requests = [Request(text_input=f"{number}", stream=bool(number % 2)) for number in range(200)]

    def send() -> None:
        for request in requests:
            server.send(request)

    sender = threading.Thread(target=send)
    sender.start()
    for number in range(len(requests)):
        server.until(lambda number=number: len(server.engine.jobs) > number)
        server.answer(server.engine.jobs[number], server.tokenizer.decode(server.engine.jobs[number].prompt))
    sender.join()
    assert [request.wait().text for request in requests] == [f"{number}" for number in range(200)]
    assert not server.errors


def test_unloading_ends_what_runs(serve: Serve) -> None:
    server = serve(max_batch_size=1)
    running, waiting = Request(text_input="a"), Request(text_input="b")
    server.send(running, waiting)
    server.job()
    server.model.finalize()
    assert running.wait().error.code == fake_triton.TritonError.UNAVAILABLE
    assert waiting.wait().error.code == fake_triton.TritonError.UNAVAILABLE
    late = Request(text_input="c")
    server.send(late)
    assert late.wait().error.code == fake_triton.TritonError.UNAVAILABLE


def test_tokens_wait_for_company_but_the_first_does_not(serve: Serve) -> None:
    server = serve(max_token_wait_ms="1000")  # noqa: S106 - a number of milliseconds
    request = Request(text_input="a", stream=True)
    server.send(request)
    job = server.job()
    server.engine.give(Step(job.key, server.ids("x")))
    server.until(lambda: request.sender.responses)
    for letter in "bcdef":
        server.engine.give(Step(job.key, server.ids(letter)))
    server.engine.give(Step(job.key, (), "length"))
    assert request.wait().pieces == ["x", "bcdef"]


def test_held_tokens_go_when_their_time_has_come(serve: Serve) -> None:
    server = serve(max_token_wait_ms="5")  # noqa: S106 - a number of milliseconds
    request = Request(text_input="a", stream=True)
    server.send(request)
    job = server.job()
    server.engine.give(Step(job.key, server.ids("x")))
    server.until(lambda: request.sender.responses)
    server.engine.give(Step(job.key, server.ids("y")))
    server.until(lambda: request.pieces == ["x", "y"])
    server.engine.give(Step(job.key, (), "length"))
    request.wait()


@pytest.mark.parametrize(("coalesce", "pieces"), [("true", ["abc"]), ("false", ["a", "b", "c"])])
def test_tokens_that_are_ready_together_go_together_unless_told_otherwise(
    serve: Serve, coalesce: str, pieces: list[str]
) -> None:
    server = serve(coalesce=coalesce)
    request = Request(text_input="a", stream=True)
    server.send(request)
    ids = [number for letter in "abc" for number in server.ids(letter)]
    server.engine.give(Step(server.job().key, ids, "length"))
    assert request.wait().pieces == pieces


def test_metrics_add_up(serve: Serve) -> None:
    server = serve()
    requests = [Request(text_input="hello", stream=bool(number % 2)) for number in range(4)]
    server.send(*requests, Request(text_input="a", top_p=2.0))
    server.until(lambda: len(server.engine.jobs) == 4)
    for job in server.engine.jobs:
        server.answer(job, "hello there")
    for request in requests:
        request.wait()
    values = {
        "trtkit_llm_requests_total": 4,
        "trtkit_llm_prompt_tokens_total": 4 * len(server.ids("hello")),
        "trtkit_llm_completion_tokens_total": 4 * len(server.ids("hello there")),
        "trtkit_llm_refused_requests_total": 1,
        "trtkit_llm_cancelled_requests_total": 0,
        "trtkit_llm_running_sequences": 0,
    }
    for name, value in values.items():
        server.until(lambda name=name, value=value: server.metrics[name].value == value)
    server.until(lambda: len(server.metrics["trtkit_llm_time_to_first_token_seconds"].observed) == 4)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"engine": "../x"}, "parameter 'engine'"),
        ({"max_token_wait_ms": "soon"}, "parameter 'max_token_wait_ms'"),
        ({"slots": "0"}, "parameter 'slots'"),
        ({"end_ids": "1;2"}, "parameter 'end_ids'"),
        ({"coalesce": "maybe"}, "parameter 'coalesce'"),
    ],
)
def test_a_wrong_parameter_is_named(serve: Serve, parameters: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        serve(**parameters)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(alphabet="ab 🙂é漢", max_size=30),
    stops=st.lists(st.text(alphabet="ab 🙂é漢", max_size=4), max_size=3),
    cuts=st.lists(st.integers(1, 4), max_size=60),
)
def test_streamed_text_is_the_whole_text(serve: Serve, text: str, stops: list[str], cuts: list[int]) -> None:
    server = serve_once(serve)
    whole = Request(text_input="a", stop_words=stops or [""])
    stream = Request(text_input="a", stop_words=stops or [""], stream=True)
    before = len(server.engine.jobs)
    server.send(whole, stream)
    server.until(lambda: len(server.engine.jobs) == before + 2)
    ids = server.ids(text)
    one, other = server.engine.jobs[before:]
    server.engine.give(Step(one.key, ids, "length"))
    place = 0
    for cut in [*cuts, len(ids) or 1]:
        server.engine.give(Step(other.key, ids[place : place + cut]))
        place += cut
    server.engine.give(Step(other.key, (), "length"))
    whole.wait()
    stream.wait()
    assert stream.text == whole.text
    assert (whole.text, whole.last("finish_reason")[0]) == cut_at_stop(text, stops)


def cut_at_stop(text: str, stops: list[str]) -> tuple[str, str]:
    """The text up to the first stop word to be complete (of several the longest), and the finish reason."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if complete:
            return text[: end - len(max(complete, key=len))], "stop"
    return text, "length"


_servers: dict[int, Any] = {}


def serve_once(serve: Serve) -> Any:
    """One model for all examples of a test."""
    if id(serve) not in _servers:
        _servers.clear()
        _servers[id(serve)] = serve()
    return _servers[id(serve)]


def test_inputs_of_other_shapes_are_read(serve: Serve) -> None:
    server = serve()
    server.send(Request(text_input="a", max_tokens=np.array([7], dtype=np.int32)))
    assert server.job().max_tokens == 7
