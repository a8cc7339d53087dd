"""Every supported family in a running batch: the tokens that transformers generates from the source, one by one."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from trtkit import hf
from trtkit.config import CheckpointConfig
from trtkit.convert.conversion import convert
from trtkit.convert.readback import load_transformers_model
from trtkit.convert.source import plan_conversion
from trtkit.repository.models.reference.generation import Generation
from trtkit.repository.models.reference.inflight import InflightBatch

sys.path.insert(0, str(Path(__file__).parents[1] / "convert"))
families = importlib.import_module("test_families")

VOCABULARY = 131
SLOTS = 3
REQUESTS = ((0, 3, 16), (0, 17, 6), (1, 9, 11), (2, 5, 8), (3, 30, 9), (5, 1, 8), (8, 15, 4))
"""Steps at which they arrive, tokens of the prompt, tokens asked for. The windows of the cases are 8 tokens, and
long rope changes its frequencies at 16 or 32: some requests begin beyond, some get there, some stay below."""


def _rope(**more: Any) -> dict[str, Any]:
    return {**families.LLAMA_LIKE, "rope_parameters": {"rope_theta": 500.0, **more}}


CASES = {
    **families.CASES,
    # Frequencies for every length beyond 16, not only for two.
    "llama-dynamic": families.Case("llama", {**_rope(rope_type="dynamic", factor=2.0), "max_position_embeddings": 16}),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny operations on several threads crawl when other tests run beside them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def prompt_of(seed: int, length: int) -> list[int]:
    tokens: list[int] = torch.randint(1, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return tokens


def write_source(case: Any, folder: Path) -> None:
    """A random model, with weights large enough that greedy answers wander about instead of repeating one token."""
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(case.model_type, **case.settings)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)


def generated(model: Any, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log probabilities, by transformers alone."""
    model = copy.deepcopy(model)  # "dynamic" rope remembers the longest sequence of all that came before
    result = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = result.sequences[0, len(prompt) :].tolist()
    steps = zip(result.logits, tokens, strict=True)
    return tokens, [float(logits[0].float().log_softmax(-1)[token]) for logits, token in steps]


def run(batch: InflightBatch) -> list[Generation]:
    """The requests, each of which joined at its step or when a slot was free."""
    generations = [
        Generation(prompt_of(seed, length), count, wants_log_probs=True)
        for seed, (_, length, count) in enumerate(REQUESTS)
    ]
    waiting = list(generations)
    for step in range(200):
        arrived = [g for g, (when, _, _) in zip(generations, REQUESTS, strict=True) if when <= step and g in waiting]
        if due := arrived[: batch.free]:
            batch.join(due)
            waiting = [generation for generation in waiting if generation not in due]
        if batch.running:
            batch.step()
        elif not waiting:
            return generations
    raise AssertionError("the batch does not come to an end")


def both(case: Any, folder: Path) -> tuple[Any, Any]:
    """The source as transformers loads it, and the model that the runtime makes of its checkpoint."""
    write_source(case, folder / "source")
    source = hf.open_source(folder / "source")
    convert(plan_conversion(source, CheckpointConfig(dtype="float32")), source, folder / "out")
    original = transformers.AutoModelForCausalLM.from_pretrained(folder / "source", dtype=torch.float32).eval()
    return original, load_transformers_model(folder / "out")


@pytest.mark.parametrize("name", CASES)
def test_tokens_equal_those_of_the_source(name: str, tmp_path: Path) -> None:
    original, model = both(CASES[name], tmp_path)
    batch = InflightBatch(model, SLOTS)
    for generation in run(batch):
        prompt = generation.tokens[: generation.prompt_length]
        tokens, log_probs = generated(original, prompt, generation.max_new_tokens)
        assert generation.error is None
        assert generation.output == tokens, f"prompt of {len(prompt)}"
        assert generation.log_probs == pytest.approx(log_probs, abs=1e-4)
    assert batch.free == SLOTS


@pytest.mark.parametrize("name", ["phi3-long", "llama-dynamic"])
def test_frequencies_do_not_depend_on_what_ran_before(name: str, tmp_path: Path) -> None:
    """Several batches, one after the other, on the same model, with prompts on both sides of the length."""
    original, model = both(CASES[name], tmp_path)
    prompts = [prompt_of(seed, length) for seed, length in enumerate((20, 4, 40, 16, 17))]
    expected = [generated(original, prompt, 1) for prompt in prompts]
    for chosen in ([0, 1, 2, 3, 4], [1], [0], [3, 1], [4, 2]):
        together = [Generation(prompts[index], 1, wants_log_probs=True) for index in chosen]
        InflightBatch(model, len(chosen)).join(together)
        for index, generation in zip(chosen, together, strict=True):
            assert generation.output == expected[index][0]
            assert generation.log_probs == pytest.approx(expected[index][1], abs=1e-4)
