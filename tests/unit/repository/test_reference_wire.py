"""Triton tensors to generations and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtkit import contract
from trtkit.errors import InputError
from trtkit.repository.models.reference import wire
from trtkit.repository.models.reference.generation import Generation, SamplingParams

LIMITS = wire.Limits(vocab_size=50, max_seq_len=20, end_ids=(2, 3), decoupled=True)


def int32(*values: Any) -> Any:
    return np.array(values, dtype=np.int32)


def inputs(**changes: Any) -> dict[str, Any]:
    base = {"input_ids": int32([5, 6, 7]), "input_lengths": int32([3]), "request_output_len": int32([4])}
    return {name: value for name, value in {**base, **changes}.items() if value is not None}


def test_the_contract_names_the_same_inputs() -> None:
    assert set(wire.INPUTS) == {tensor.name for tensor in contract.llm_inputs(reference=True)}
    named = wire.tensors([[1]], [1], [0.0], [[0.0]], 0)
    assert set(named) == {tensor.name for tensor in contract.llm_outputs(reference=True)}


def test_defaults() -> None:
    ask = wire.read_request(inputs(), LIMITS)
    (generation,) = ask.generations
    assert generation.tokens == [5, 6, 7]
    assert generation.max_new_tokens == 4
    assert generation.params == SamplingParams()
    assert generation.end_ids == {2, 3}
    assert not (ask.streaming or ask.exclude_input or generation.wants_log_probs)


@pytest.mark.parametrize("scalar", [False, True], ids=["[batch, 1]", "[batch]"])
def test_every_input_arrives(scalar: bool) -> None:
    values: dict[str, Any] = {
        "end_id": int32([9]),
        "pad_id": int32([8]),
        "temperature": np.float32([[0.5]]),
        "runtime_top_k": int32([3]),
        "runtime_top_p": np.float32([[0.25]]),
        "repetition_penalty": np.float32([[1.5]]),
        "presence_penalty": np.float32([[-2]]),
        "frequency_penalty": np.float32([[0.125]]),
        "min_tokens": int32([1]),
        "seed": np.array([[2**64 - 1]], dtype=np.uint64),
        "streaming": np.array([[True]]),
        "exclude_input_in_output": np.array([[True]]),
        "return_log_probs": np.array([[True]]),
        "beam_width": int32([1]),
        "num_return_sequences": int32([1]),
    }
    if scalar:
        values = {name: value.reshape(-1) for name, value in values.items()}
    words = {"stop_words_list": int32([[7, 8, 9], [1, 3, -1]]), "bad_words_list": int32([[4, 0], [1, -1]])}
    ask = wire.read_request(inputs(**values, **words), LIMITS)
    (generation,) = ask.generations
    assert generation.params == SamplingParams(0.5, 3, 0.25, 1.5, -2.0, 0.125, 1, 2**64 - 1)
    assert generation.end_ids == {9}
    assert generation.stop_words == [[7], [8, 9]]
    assert (generation.banned, generation.bad_sequences) == ([4], [])
    assert (ask.streaming, ask.exclude_input, ask.pad_id, generation.wants_log_probs) == (True, True, 8, True)


@pytest.mark.parametrize(("end_id", "expected"), [(2, {2}), (3, {3}), (9, {9}), (-1, set()), (None, {2, 3})])
def test_end_ids(end_id: int | None, expected: set[int]) -> None:
    given_id = None if end_id is None else int32([end_id])
    assert wire.read_request(inputs(end_id=given_id), LIMITS).generations[0].end_ids == expected


def test_a_batch_is_one_generation_per_row() -> None:
    rows = inputs(
        input_ids=int32([5, 6, 7], [8, 0, 0]),
        input_lengths=int32([3], [1]),
        request_output_len=int32([4], [2]),
        temperature=np.float32([[1], [2]]),
        stop_words_list=int32([[7, 0], [1, -1]], [[0, 0], [-1, -1]]),
    )
    first, second = wire.read_request(rows, LIMITS).generations
    assert (first.tokens, second.tokens) == ([5, 6, 7], [8])
    assert (first.max_new_tokens, second.max_new_tokens) == (4, 2)
    assert (first.params.temperature, second.params.temperature) == (1, 2)
    assert (first.stop_words, second.stop_words) == ([[7]], [])


WRONG: dict[str, dict[str, Any]] = {
    "input_ids: the tensor is missing": {"input_ids": None},
    "input_ids: shape [1, 0]": {"input_ids": np.zeros((1, 0), np.int32)},
    "input_ids: 50 is not in the vocabulary of 50": {"input_ids": int32([5, 50, 7])},
    "input_ids: -1 is not in the vocabulary": {"input_ids": int32([5, -1, 7])},
    "input_lengths: 0 is not at least 1 and at most 3": {"input_lengths": int32([0])},
    "input_lengths: 4 is not at least 1 and at most 3": {"input_lengths": int32([4])},
    "input_lengths: 2 values for 1 prompts": {"input_lengths": int32([3], [3])},
    "request_output_len: the tensor is missing": {"request_output_len": None},
    "request_output_len: 0 is not at least 1": {"request_output_len": int32([0])},
    "request_output_len: 18 tokens after a prompt of 3": {"request_output_len": int32([18])},
    "beam_width: 2 is not 1, the only value": {"beam_width": int32([2])},
    "num_return_sequences: 3 is not 1, the only value": {"num_return_sequences": int32([3])},
    "end_id: 50 is not at most 49": {"end_id": int32([50])},
    "temperature: nan is not finite": {"temperature": np.float32([[np.nan]])},
    "temperature: -0.5 is not at least 0": {"temperature": np.float32([[-0.5]])},
    "temperature: inf is not finite": {"temperature": np.float32([[np.inf]])},
    "temperature: 1e-38 is too small": {"temperature": np.float32([[1e-38]])},
    "repetition_penalty: 1e-38 is too small": {"repetition_penalty": np.float32([[1e-38]])},
    "runtime_top_k: -1 is not at least 0": {"runtime_top_k": int32([-1])},
    "runtime_top_p: 1.5 is not at least 0 and at most 1": {"runtime_top_p": np.float32([[1.5]])},
    "runtime_top_p: nan": {"runtime_top_p": np.float32([[np.nan]])},
    "repetition_penalty: 0 is not above 0": {"repetition_penalty": np.float32([[0]])},
    "presence_penalty: nan is not finite": {"presence_penalty": np.float32([[np.nan]])},
    "frequency_penalty: inf is not finite": {"frequency_penalty": np.float32([[np.inf]])},
    "min_tokens: -1 is not at least 0": {"min_tokens": int32([-1])},
    "stop_words_list: shape [2, 2] is not [1, 2, n]": {"stop_words_list": int32([1, 2], [1, -1])},
    "stop_words_list: the offsets [2, 1] do not rise": {"stop_words_list": int32([[1, 2], [2, 1]])},
    "stop_words_list: the offsets [0, 1] do not rise": {"stop_words_list": int32([[1, 2], [0, 1]])},
    "stop_words_list: the offsets [-1, 1] do not rise": {"stop_words_list": int32([[1, 2], [-1, 1]])},
    "stop_words_list: the offsets [-2, 1] do not rise": {"stop_words_list": int32([[1, 2], [-2, 1]])},
    "bad_words_list: offset 3 is beyond the 2 ids": {"bad_words_list": int32([[1, 2], [1, 3]])},
    "bad_words_list: 77 is not in the vocabulary": {"bad_words_list": int32([[1, 77], [1, 2]])},
    "bad_words_list: shape [2, 2, 1] is not [1, 2, n]": {"bad_words_list": np.zeros((2, 2, 1), np.int32)},
}


@pytest.mark.parametrize("cause", WRONG)
def test_wrong_tensors_are_named(cause: str) -> None:
    with pytest.raises(InputError) as error:
        wire.read_request(inputs(**WRONG[cause]), LIMITS)
    assert error.value.cause.startswith(cause)
    assert error.value.fix
    assert "\n" not in error.value.cause + error.value.fix


@pytest.mark.parametrize("value", [0.0, 1e-6, 1e-5])
def test_small_temperatures_that_work(value: float) -> None:
    wire.read_request(inputs(temperature=np.float32([[value]])), LIMITS)


def test_streaming_needs_a_decoupled_model() -> None:
    limits = wire.Limits(vocab_size=50, max_seq_len=20)
    with pytest.raises(InputError, match="streaming: the model is not decoupled"):
        wire.read_request(inputs(streaming=np.array([[True]])), limits)
    assert not wire.read_request(inputs(streaming=np.array([[False]])), limits).streaming


def test_rows_may_not_disagree_about_the_whole_request() -> None:
    rows = inputs(
        input_ids=int32([5], [6]),
        input_lengths=int32([1], [1]),
        request_output_len=int32([1], [1]),
        streaming=np.array([[True], [False]]),
    )
    with pytest.raises(InputError, match="streaming: the prompts of one request disagree"):
        wire.read_request(rows, LIMITS)


@given(words=st.lists(st.lists(st.integers(0, 49), min_size=1, max_size=4), max_size=5), padding=st.integers(0, 3))
def test_word_lists_come_back(words: list[list[int]], padding: int) -> None:
    """Written as NVIDIA's preprocessing does: flat ids, rising ends, both padded."""
    ids = [token for word in words for token in word] + [0] * padding
    ends = np.cumsum([len(word) for word in words]).tolist()
    ends += [-1] * (len(ids) - len(ends))
    array = np.array([[ids, ends]], dtype=np.int32).reshape(1, 2, len(ids))
    generation = wire.read_request(inputs(stop_words_list=array, bad_words_list=array), LIMITS).generations[0]
    assert generation.stop_words == words
    assert generation.bad_sequences == [word for word in words if len(word) > 1]
    assert generation.banned == sorted({word[0] for word in words if len(word) == 1})


def finished(prompt: list[int], output: list[int], **options: Any) -> Generation:
    generation = Generation(prompt, len(output) or 1, **options)
    for position, token in enumerate(output):
        generation.take(token, -0.5 - position)
    return generation


def test_answers() -> None:
    rows = [finished([5, 6, 7], [1, 2], wants_log_probs=True), finished([8], [9], wants_log_probs=True)]
    whole = wire.answer_tensors(rows, 0, exclude_input=False, pad_id=4)
    assert whole["output_ids"].tolist() == [[[5, 6, 7, 1, 2]], [[8, 9, 4, 4, 4]]]
    assert whole["sequence_length"].tolist() == [[5], [2]]
    assert whole["cum_log_probs"].tolist() == [[-2.0], [-0.5]]
    assert whole["output_log_probs"].tolist() == [[[-0.5, -1.5]], [[-0.5, 0.0]]]
    assert whole["batch_index"].tolist() == [[0], [1]]
    assert whole["sequence_index"].tolist() == [[0], [0]]
    bare = wire.answer_tensors(rows[1:], 1, exclude_input=True, pad_id=4)
    assert (bare["output_ids"].tolist(), bare["sequence_length"].tolist()) == ([[[9]]], [[1]])
    assert bare["batch_index"].tolist() == [[1]]


def test_an_answer_without_tokens() -> None:
    empty = wire.answer_tensors([Generation([5], 3)], 0, exclude_input=True, pad_id=0)
    assert empty["output_ids"].shape == empty["output_log_probs"].shape == (1, 1, 0)
    assert empty["sequence_length"].tolist() == [[0]]


def test_pieces_of_a_stream() -> None:
    generation = finished([5], [1, 2], wants_log_probs=True)
    piece = wire.token_tensors(generation, 3, 2)
    assert (piece["output_ids"].tolist(), piece["sequence_length"].tolist()) == ([[[2]]], [[1]])
    assert (piece["cum_log_probs"].tolist(), piece["output_log_probs"].tolist()) == ([[-2.0]], [[[-1.5]]])
    assert piece["batch_index"].tolist() == [[3]]
    last = wire.token_tensors(generation, 3, None)
    assert last["output_ids"].shape == last["output_log_probs"].shape == (1, 1, 0)
    assert last["sequence_length"].tolist() == [[0]]


def test_dtypes_are_those_of_the_contract() -> None:
    names = {"INT32": np.int32, "FP32": np.float32}
    made = wire.token_tensors(finished([5], [1]), 0, 1)
    for tensor in contract.llm_outputs(reference=True):
        assert made[tensor.name].dtype == names[tensor.dtype]
        assert made[tensor.name].ndim == len(tensor.dims) + 1  # the batch
