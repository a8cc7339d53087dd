"""Sampling settings: against transformers' processors where both mean the same, against the formulas elsewhere."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from trtkit.repository.models.reference.generation import Generation, SamplingParams
from trtkit.repository.models.reference.sampling import BatchSampler

VOCABULARY = 23
PROMPT = [3, 4, 4, 9]


def logits_of(seed: int, rows: int = 1) -> Any:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def choose(logits: Any, *rows: Generation) -> list[int]:
    sampler = BatchSampler()
    sampler.set_rows(rows)
    before = logits.clone()
    tokens, _, failed = sampler.choose(logits)
    assert torch.equal(logits, before)
    assert not any(failed)
    return tokens


def ask(prompt: list[int] = PROMPT, **options: Any) -> Generation:
    fields = {name: options.pop(name) for name in list(options) if name in SamplingParams.__dataclass_fields__}
    return Generation(prompt, 1000, params=SamplingParams(**fields), **options)


def draws(logits: Any, generation: Generation, count: int = 1000) -> Counter[int]:
    """How often each token comes, over random numbers spread evenly."""
    result: Counter[int] = Counter()
    for index in range(count):
        generation._draws = [(index + 0.5) / count]
        result[choose(logits, generation)[0]] += 1
    return result


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.0, "top_k": 5, "top_p": 0.9},
        {"top_k": 1, "top_p": 0.5, "temperature": 3.0},
        {"temperature": 0.3},
    ],
    ids=["nothing", "temperature 0", "top_k 1", "temperature alone"],
)
def test_greedy(options: dict[str, float]) -> None:
    for seed in range(5):
        assert choose(logits_of(seed), ask(**options)) == [int(logits_of(seed).argmax())]


@pytest.mark.parametrize(
    ("options", "warpers"),
    [
        ({"top_k": 4}, ["TopKLogitsWarper(4)"]),
        ({"top_k": 4, "temperature": 2.5}, ["TemperatureLogitsWarper(2.5)", "TopKLogitsWarper(4)"]),
        ({"top_p": 0.8}, ["TopPLogitsWarper(0.8)"]),
        ({"top_p": 1.0}, []),
        ({"top_k": 6, "top_p": 0.7}, ["TopKLogitsWarper(6)", "TopPLogitsWarper(0.7)"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_the_tokens_that_take_part_are_those_of_transformers(options: dict[str, Any], warpers: list[str]) -> None:
    """The same tokens; and all but the last of a nucleus in proportion to their probabilities."""
    classes = {"TopKLogitsWarper", "TopPLogitsWarper", "TemperatureLogitsWarper"}
    for seed in range(3):
        logits = logits_of(seed)
        scores = logits
        for warper in warpers:
            name, _, value = warper.rstrip(")").partition("(")
            assert name in classes
            scores = getattr(transformers, name)(int(value) if "K" in name else float(value))(None, scores)
        kept = scores[0].softmax(0)
        found = draws(logits, ask(**options))
        assert set(found) <= {token for token in range(VOCABULARY) if kept[token] > 0}
        share = 1.0 if options.get("top_p", 1.0) == 1.0 else options["top_p"]
        scaled = logits / options.get("temperature", 1.0)
        if "top_k" in options:
            scaled = transformers.TopKLogitsWarper(options["top_k"])(None, scaled)
        weights = scaled[0].softmax(0) / share
        walked = 0.0
        for token in weights.argsort(descending=True).tolist():
            weight = min(float(weights[token]), max(1.0 - walked, 0.0))  # the last one gets what is left
            walked += weight
            assert abs(found[token] - 1000 * weight) <= 1.5


def test_penalties_follow_tensorrt_llm() -> None:
    """Temperature first, then repetition by sign, presence and frequency, each over prompt and output."""
    generation = ask(
        temperature=0.5, repetition_penalty=1.3, presence_penalty=0.7, frequency_penalty=0.2, wants_log_probs=True
    )
    generation.take(9, 0.0)
    generation.take(11, 0.0)
    logits = logits_of(1)
    expected = logits[0].tolist()
    for token in range(VOCABULARY):
        value = expected[token] / 0.5
        count = (*PROMPT, 9, 11).count(token)
        if count:
            value = (value * 1.3 if value < 0 else value / 1.3) - 0.7 - 0.2 * count
        expected[token] = value
    wanted = torch.tensor(expected)
    sampler = BatchSampler()
    sampler.set_rows([generation])
    tokens, log_probs, _ = sampler.choose(logits)
    assert tokens == [int(wanted.argmax())]
    assert log_probs[0] == pytest.approx(float(wanted.log_softmax(0).max()), abs=1e-5)
    assert torch.allclose(sampler._process(logits)[0], wanted, atol=1e-5)


def test_repetition_penalty_equals_transformers() -> None:
    for seed in range(5):
        processor = transformers.RepetitionPenaltyLogitsProcessor(1.8)
        expected = processor(torch.tensor([PROMPT]), logits_of(seed).clone())
        assert choose(logits_of(seed), ask(repetition_penalty=1.8)) == [int(expected.argmax())]


def test_counts_follow_the_output() -> None:
    """A token that came becomes less likely the next time."""
    generation = ask(prompt=[0], frequency_penalty=1.0)
    logits = torch.zeros(1, VOCABULARY)
    logits[0, :3] = torch.tensor([0.0, 5.0, 4.5])
    tokens = []
    for _ in range(4):
        tokens += choose(logits, generation)
        generation.take(tokens[-1], 0.0)
    assert tokens == [1, 2, 1, 2]


def test_min_tokens_forbids_every_end_id() -> None:
    generation = ask(min_tokens=2, end_ids=[5, 6])
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 5:8] = torch.tensor([9.0, 8.0, 7.0])
    for expected in (7, 7, 5):
        assert choose(logits, generation) == [expected]
        generation.take(expected, 0.0)
    assert generation.finish == "end_id"
    assert generation.output == [7, 7]


@pytest.mark.parametrize(
    ("bad_words", "expected"),
    [
        ([(7,)], 6),
        ([(7,), (6,)], 5),
        ([(9, 7)], 6),  # the prompt ends with 9
        ([(4, 9, 7), (9, 6)], 5),
        ([(8, 7)], 7),
        ([(4, 4, 7)], 7),
        ([(3, 4, 4, 9, 7)], 6),
        ([(1, 3, 4, 4, 9, 7)], 7),  # longer than what there is
    ],
)
def test_bad_words(bad_words: list[tuple[int, ...]], expected: int) -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 5:8] = torch.tensor([7.0, 8.0, 9.0])
    assert choose(logits, ask(bad_words=bad_words)) == [expected]


@pytest.mark.parametrize(
    ("stop_words", "output", "finish"),
    [
        ([(2,)], [1, 2], "stop_word"),
        ([(1, 2)], [1, 2], "stop_word"),
        ([(2, 1)], [1, 2, 3, 4], None),
        ([(2, 3), (9, 1)], [1], "stop_word"),  # begins in the prompt
        ([(9,)], [1, 2, 3, 4], None),  # only in the prompt
        ([(4, 9, 1, 2)], [1, 2], "stop_word"),
    ],
)
def test_stop_words_stay_in_the_output(stop_words: Any, output: list[int], finish: str | None) -> None:
    generation = ask(stop_words=stop_words)
    for token in (1, 2, 3, 4):
        if not generation.done:
            generation.take(token, 0.0)
    assert (generation.output, generation.finish) == (output, finish)


def test_an_end_id_wins_over_a_stop_word_and_is_not_output() -> None:
    generation = ask(stop_words=[(2,)], end_ids=[2, 3])
    assert generation.take(1, 0.0)
    assert not generation.take(2, 0.0)
    assert (generation.output, generation.finish) == ([1], "end_id")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_sick_rows_are_named_and_harm_nobody(value: float) -> None:
    logits = logits_of(0, rows=3)
    logits[1, 4] = value
    rows = [ask(), ask(top_k=5, seed=1), ask(top_p=0.9, seed=2, wants_log_probs=True)]
    sampler = BatchSampler()
    sampler.set_rows(rows)
    tokens, _, failed = sampler.choose(logits)
    assert failed == [False, True, False]
    assert tokens[0] == choose(logits[:1], ask())[0]
    assert tokens[2] == choose(logits[2:], ask(top_p=0.9, seed=2))[0]


def test_forbidding_every_token_is_a_failure() -> None:
    sampler = BatchSampler()
    sampler.set_rows([ask(bad_words=[(token,) for token in range(VOCABULARY)])])
    assert sampler.choose(logits_of(0))[2] == [True]


def test_seeds() -> None:
    def tokens(seed: int | None) -> list[int]:
        generation = ask(top_p=1.0, temperature=2.0, seed=seed)
        for step in range(20):
            generation.take(choose(logits_of(step), generation)[0], 0.0)
        return generation.output

    assert tokens(7) == tokens(7)
    assert tokens(7) != tokens(8)
    assert tokens(None) != tokens(None)  # 20 draws among 23 tokens: equal by chance less than once in a billion runs
    assert tokens(2**64 - 1) == tokens(2**64 - 1)


row_options = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.7, 1.0, 2.0]),
        "top_k": st.sampled_from([0, 1, 3, 100]),
        "top_p": st.sampled_from([0.0, 0.4, 0.9, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.5]),
        "frequency_penalty": st.sampled_from([0.0, 0.5]),
        "min_tokens": st.sampled_from([0, 2]),
        "seed": st.integers(0, 3),
        "bad_words": st.sampled_from([[], [(2,)], [(9, 5), (4,)]]),
    }
)


@settings(max_examples=60, deadline=None)
@given(options=st.lists(row_options, min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_rows_do_not_see_each_other(options: list[dict[str, Any]], seed: int) -> None:
    logits = logits_of(seed, rows=len(options))
    together = choose(logits, *(ask(end_ids=[1], **item) for item in options))
    alone = [choose(logits[row : row + 1], ask(end_ids=[1], **item))[0] for row, item in enumerate(options)]
    assert together == alone
