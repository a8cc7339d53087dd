"""Requests that share a batch get the tokens that they would get alone, and the tokens of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from trtkit.repository.models.reference.generation import Generation, SamplingParams
from trtkit.repository.models.reference.inflight import InflightBatch

VOCABULARY = 67
POSITIONS = 1100


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny operations on several threads crawl when other tests run beside them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def randomised(model: Any) -> Any:
    """Weights large enough that greedy answers wander about instead of repeating one token."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def settings_of(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": 0,
        "max_position_embeddings": POSITIONS,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        **more,
    }


@cache
def llama() -> Any:
    """In double precision, so that no two logits are closer than what batching can change."""
    config = transformers.LlamaConfig(**settings_of(num_key_value_heads=2))
    return randomised(transformers.LlamaForCausalLM(config)).double()


ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "grouped heads": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**settings_of(num_key_value_heads=2))
    ),
    "sliding window": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**settings_of(num_key_value_heads=2, sliding_window=6))
    ),
    "biases, tied": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**settings_of(num_key_value_heads=2, tie_word_embeddings=True))
    ),
    "part rotary": lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**settings_of())),
    "alibi": lambda: transformers.FalconForCausalLM(transformers.FalconConfig(**settings_of(alibi=True))),
    "alibi without positions": lambda: transformers.BloomForCausalLM(
        transformers.BloomConfig(hidden_size=32, n_layer=3, n_head=4, vocab_size=VOCABULARY)
    ),
}


@cache
def expected(prompt: tuple[int, ...], count: int) -> list[int]:
    return generated(llama(), prompt, count)


def generated(model: Any, prompt: tuple[int, ...], count: int) -> list[int]:
    """What transformers says, one prompt at a time."""
    tokens = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    answer: list[int] = tokens[0, len(prompt) :].tolist()
    return answer


def run(batch: InflightBatch, arrivals: list[tuple[int, Generation]]) -> None:
    """Steps until all are done. A request joins at its step or when a slot is free, in order."""
    waiting = list(arrivals)
    for step in range(10_000):
        due = [generation for when, generation in waiting if when <= step][: batch.free]
        waiting = [item for item in waiting if item[1] not in due]
        if due:
            batch.join(due)
        if batch.running:
            batch.step()
        elif not waiting:
            return
    raise AssertionError("the batch does not come to an end")


def prompt_of(seed: int, length: int) -> list[int]:
    return torch.randint(1, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@settings(max_examples=40, deadline=None)
@given(
    slots=st.integers(1, 4),
    requests=st.lists(
        st.tuples(st.integers(0, 12), st.integers(1, 24), st.integers(1, 12), st.integers(0, 5)), min_size=1, max_size=8
    ),
)
def test_tokens_do_not_depend_on_company(slots: int, requests: list[tuple[int, int, int, int]]) -> None:
    arrivals = [(when, Generation(prompt_of(seed, length), count)) for when, length, count, seed in requests]
    batch = InflightBatch(llama(), slots)
    run(batch, arrivals)
    for (_, generation), (_, length, count, seed) in zip(arrivals, requests, strict=True):
        assert generation.output == expected(tuple(prompt_of(seed, length)), count)
        assert generation.finish == "length"
    assert batch.free == slots


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_equal_transformers(name: str) -> None:
    """Positions, masks and windows of every kind, in a batch where requests come and go."""
    model = randomised(ARCHITECTURES[name]())
    prompts = [prompt_of(seed, length) for seed, length in enumerate((3, 17, 9, 5))]
    generations = [Generation(prompt, 20) for prompt in prompts]
    run(InflightBatch(model, 3), list(zip((0, 0, 2, 3), generations, strict=True)))
    assert [g.output for g in generations] == [generated(model, tuple(prompt), 20) for prompt in prompts]


def test_cache_outlives_its_capacity() -> None:
    """600 columns through buffers of 256: the window moves and grows, also for a prompt longer than all before."""
    plan = [(0, 4, 500), (3, 20, 30), (200, 300, 40), (260, 5, 300), (420, 700, 10)]
    arrivals = [(when, Generation(prompt_of(when, length), count)) for when, length, count in plan]
    run(InflightBatch(llama(), 3), arrivals)
    for (_, generation), (when, length, count) in zip(arrivals, plan, strict=True):
        assert generation.output == expected(tuple(prompt_of(when, length)), count)


def test_memory_follows_the_window_and_not_the_time() -> None:
    batch = InflightBatch(llama(), 2)
    generations = [Generation(prompt_of(seed, 10), 90) for seed in range(12)]
    run(batch, [(45 * index, generation) for index, generation in enumerate(generations)])
    assert batch._cache.capacity <= 512  # 540 steps passed, no two requests ever held more than 100 columns
    assert all(generation.finish == "length" for generation in generations)


def test_padding_goes_when_the_longest_request_leaves() -> None:
    batch = InflightBatch(llama(), 3)
    lengths = (5, 60, 9)
    generations = [Generation(prompt_of(length, length), 4 if length == 60 else 8) for length in lengths]
    batch.join(generations)
    widths = []
    while batch.running:
        batch.step()
        widths.append(batch._cache.end - batch._cache.start)
    assert widths == [61, 62, 12, 13, 14, 15, 0]


def test_leaving_early_changes_nobody_else() -> None:
    batch = InflightBatch(llama(), 3)
    generations = [Generation(prompt_of(seed, 4 + 9 * (seed == 0)), 12) for seed in range(3)]
    batch.join(generations)
    batch.step()
    batch.leave(generations[0])
    batch.leave(generations[0])  # has left already
    late = Generation(prompt_of(7, 30), 12)
    run(batch, [(0, late)])
    assert len(generations[0].output) == 2
    for generation in (*generations[1:], late):
        assert generation.output == expected(tuple(generation.tokens[: generation.prompt_length]), 12)


def test_one_token_and_end_at_once_need_no_slot() -> None:
    prompt = prompt_of(1, 6)
    first = expected(tuple(prompt), 1)[0]
    one, ended = Generation(prompt, 1), Generation(prompt, 9, end_ids=[first])
    batch = InflightBatch(llama(), 2)
    progress = batch.join([one, ended])
    assert not batch.running
    assert (one.output, one.finish) == ([first], "length")
    assert (ended.output, ended.finish) == ([], "end_id")
    assert [step.token for step in progress] == [first, None]


class Sick:
    """A model that misbehaves when token 66 is in its input."""

    def __init__(self, symptom: str) -> None:
        self.model = llama()
        self.config = self.model.config
        self.symptom = symptom
        self.calls = 0

    def __call__(self, **inputs: Any) -> Any:
        self.calls += 1
        ill = (inputs["input_ids"] == 66).any(dim=1)
        if self.symptom == "raises" and ill.any():
            raise RuntimeError("token 66")
        output = self.model(**inputs)
        logits = output.logits.masked_fill(ill[:, None, None], torch.nan)
        return SimpleNamespace(logits=logits)

    def forward(
        self, input_ids: Any, attention_mask: Any, position_ids: Any, past_key_values: Any, use_cache: bool
    ) -> None:
        """Only its signature is looked at."""


@pytest.mark.parametrize(("symptom", "said"), [("raises", "RuntimeError: token 66"), ("not a number", "not finite")])
def test_a_request_that_fails_at_once_fails_alone(symptom: str, said: str) -> None:
    batch = InflightBatch(Sick(symptom), 4)
    running = Generation(prompt_of(0, 5), 8)
    batch.join([running])
    good, bad = Generation(prompt_of(1, 7), 8), Generation([3, 66, 4, 5], 8)
    if symptom != "raises":
        bad = Generation([3, 4, 66], 8)
    batch.join([good, bad])
    assert said in (bad.error or "")
    run(batch, [])
    for generation in (running, good):
        assert generation.error is None
        assert generation.output == expected(tuple(generation.tokens[: generation.prompt_length]), 8)


def test_a_step_that_raises_fails_the_running_and_the_batch_lives_on() -> None:
    sick = Sick("raises")
    batch = InflightBatch(sick, 2)
    victims = [Generation(prompt_of(seed, 5), 8) for seed in range(2)]
    batch.join(victims)
    batch._tokens = torch.tensor([[66], [1]])
    assert {step.generation for step in batch.step()} == set(victims)
    assert all("token 66" in (victim.error or "") for victim in victims)
    assert batch.free == 2
    healthy = Generation(prompt_of(5, 5), 8)
    run(batch, [(0, healthy)])
    assert healthy.output == expected(tuple(prompt_of(5, 5)), 8)


def test_what_a_failed_request_leaves_in_the_cache_does_no_harm() -> None:
    """Keys and values that are not numbers stay in a freed row; whoever gets the row next must not see them."""
    model = llama()
    batch = InflightBatch(model, 2)
    batch.join([Generation(prompt_of(0, 9), 20), Generation(prompt_of(1, 20), 20)])
    with torch.inference_mode():
        for buffer in (*batch._cache._keys, *batch._cache._values):
            buffer[1] = torch.nan
    batch.leave(batch.running[1])
    late = Generation(prompt_of(2, 3), 12)
    run(batch, [(0, late)])
    assert late.output == expected(tuple(prompt_of(2, 3)), 12)


def test_sampled_tokens_with_a_seed_do_not_depend_on_company() -> None:
    def asked(seed: int) -> Generation:
        params = SamplingParams(temperature=1.5, top_k=20, top_p=0.9, repetition_penalty=1.2, seed=seed)
        return Generation(prompt_of(3, 6), 15, params=params)

    alone = asked(11)
    run(InflightBatch(llama(), 1), [(0, alone)])
    together = [asked(11), asked(12), asked(11), Generation(prompt_of(4, 9), 20)]
    run(InflightBatch(llama(), 3), list(zip((2, 0, 3, 0), together, strict=True)))
    assert together[0].output == together[2].output == alone.output
    assert together[1].output != alone.output


def test_long_prefills_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trtkit.repository.models.reference.inflight.PREFILL_TOKENS", 40)
    sick = Sick("none")
    generations = [Generation(prompt_of(length, length), 4) for length in (12, 60, 11, 13)]
    batch = InflightBatch(sick, 4)
    batch.join(generations)
    assert sick.calls == 2  # three short ones fit together, the long one is alone
    run(batch, [])
    for generation in generations:
        assert generation.output == expected(tuple(prompt_of(generation.prompt_length, generation.prompt_length)), 4)
