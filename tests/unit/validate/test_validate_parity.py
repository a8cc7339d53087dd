"""Parity: what counts as equal, as a near tie and as a fault; and the source model as the judge."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from standin_client import StandInClient
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from trtkit.errors import InputError
from trtkit.validate import Subject, parity, text
from trtkit.validate.results import CheckResult
from trtkit.validate.source import GreedyAnswer, Source, position_limit

EOS = frozenset({1, 2})


def answer(tokens: list[int], *, margin: float = 1.0, vocabulary: int = 12, scale: float = 10.0) -> GreedyAnswer:
    """An answer whose chosen tokens have logit `scale` and all others `margin` less."""
    logits = torch.full((len(tokens), vocabulary), scale - margin)
    for position, token in enumerate(tokens):
        logits[position, token] = scale
    return GreedyAnswer([5], tokens, logits)


@pytest.mark.parametrize(
    ("reference", "served", "agreed", "wanted", "got"),
    [
        ([3, 4, 5], [3, 4, 5], 3, None, None),
        ([3, 4, 1], [3, 4, 1], 3, None, None),
        ([3, 4, 1], [3, 4], 3, None, None),  # the engine leaves the end id out
        ([3, 4, 2], [3, 4, 2, 7, 8], 3, None, None),  # the engine does not know the second end id
        ([3, 4, 5], [3, 4, 6], 2, 5, 6),
        ([3, 4, 5], [3, 9, 5], 1, 4, 9),
        ([3, 4, 5], [3, 4], 2, 5, None),
        ([3, 4, 5], [], 0, 3, None),
        ([3, 4, 1], [3, 4, 5], 2, 1, 5),
        ([1], [], 1, None, None),
    ],
)
def test_first_difference(
    reference: list[int], served: list[int], agreed: int, wanted: int | None, got: int | None
) -> None:
    found = parity.compare("p", answer(reference), served, EOS, "float16")
    assert (found.agreed, found.total, found.wanted, found.got) == (agreed, len(reference), wanted, got)
    assert found.differs == (wanted is not None)
    assert not found.near_tie


@pytest.mark.parametrize(("margin", "dtype", "near"), [(0.03, "float16", True), (0.05, "float16", False)])
@pytest.mark.parametrize("served", [[3, 9], [3]])
def test_a_difference_within_the_tolerance_is_a_near_tie(
    margin: float, dtype: str, near: bool, served: list[int]
) -> None:
    found = parity.compare("p", answer([3, 4], margin=margin), served, EOS, dtype)
    assert found.near_tie is near and found.margin == pytest.approx(margin, abs=1e-5)


def test_a_short_answer_of_a_source_without_an_end_is_a_fault() -> None:
    found = parity.compare("p", answer([3, 4], margin=0.0), [3], frozenset(), "bfloat16")
    assert found.differs and found.margin is None and not found.near_tie


def test_the_tolerance_grows_with_the_logits_and_with_the_dtypes_coarseness() -> None:
    assert parity.tolerance("float32", 10) < parity.tolerance("float16", 10) < parity.tolerance("bfloat16", 10)
    assert parity.tolerance("float16", 20) == 2 * parity.tolerance("float16", 10)
    for dtype, roundoff in parity.ROUNDING.items():
        assert torch.finfo(getattr(torch, dtype)).eps == 2 * roundoff


@given(st.lists(st.integers(3, 11), min_size=1, max_size=9), st.lists(st.integers(0, 11), max_size=9))
def test_agreement_is_the_common_beginning(reference: list[int], served: list[int]) -> None:
    common = next(
        (i for i, (a, b) in enumerate(zip(reference, served, strict=False)) if a != b), min(len(reference), len(served))
    )
    found = parity.compare("p", answer(reference), served, EOS, "float16")
    assert found.agreed == common
    assert found.differs == (common < len(reference))


# --- with a real model --------------------------------------------------------------------------------------------


@pytest.fixture
def source_folder(make_source: Callable[..., Path]) -> Path:
    """A random Llama with a byte-level tokenizer, two end ids and a generation config that bends sampling."""
    folder = make_source(vocab_size=300, bos_token_id=0, eos_token_id=1)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>", "<|eot|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the quick brown fox"] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    bent = {"eos_token_id": [1, 2], "repetition_penalty": 5.0, "do_sample": True, "temperature": 3.0}
    (folder / "generation_config.json").write_text(json.dumps(bent))
    return folder


def test_greedy_is_greedy_whatever_the_generation_config_says(source_folder: Path) -> None:
    source = Source(source_folder)
    ids = source.encode("the fox")
    found = source.greedy(ids, 12)
    model = transformers.AutoModelForCausalLM.from_pretrained(source_folder).float().eval()
    tokens = list(ids)
    with torch.no_grad():
        for _ in range(len(found.tokens)):  # without a cache, as the plainest definition
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert found.tokens == tokens[len(ids) :]
    assert found.logits.shape == (len(found.tokens), 300)
    assert all(int(row.argmax()) == token for row, token in zip(found.logits, found.tokens, strict=True))
    assert found.margin(0, found.tokens[0]) == 0.0


def test_greedy_stops_behind_any_of_several_end_ids(source_folder: Path) -> None:
    ids = Source(source_folder).encode("the fox")
    free = Source(source_folder).greedy(ids, 12).tokens
    (source_folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [299, free[3]]}))
    source = Source(source_folder)
    assert source.eos_ids == {299, free[3]}
    assert source.greedy(ids, 12).tokens == free[: free.index(free[3]) + 1]


def test_the_continuation_is_the_text_behind_the_prompt(source_folder: Path) -> None:
    source = Source(source_folder)
    ids = source.encode("the fox")
    more = source.encode(" quick €", add_special_tokens=False)
    assert source.continuation(ids, [*more, 1]) == " quick €"
    assert source.encode("the fox", add_special_tokens=False) == ids[1:]


def test_the_space_in_front_of_a_continuation_stays(source_folder: Path) -> None:
    """A sentencepiece-like tokenizer drops the space of a text's first word, which decoding alone would lose."""
    unknown = "<unk>"
    tokenizer = Tokenizer(models.WordLevel({"▁the": 0, "▁fox": 1, unknown: 2}, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.save(str(source_folder / "tokenizer.json"))
    source = Source(source_folder)
    assert source.encode("the fox", add_special_tokens=False) == [0, 1]
    assert source.continuation([0], [1]) == " fox"


class Served(StandInClient):
    """A stand-in for a server of that very source."""

    def __init__(self, folder: Path, protocol: str = "grpc") -> None:
        super().__init__(protocol)
        self.source = Source(folder)
        self.tokens = self.right
        self.change: Callable[[str], str] = lambda text: text

    def right(self, ids: Any, count: int) -> list[int]:
        return self.source.greedy(list(ids), count).tokens

    def text(self, request: Any) -> str:
        ids = self.source.encode(request.prompt)
        tokens = self.tokens(ids, request.max_tokens)
        return self.change(self.source.continuation(ids, text._until_end(tokens, self.source.eos_ids)))


@pytest.fixture
def subject(source_folder: Path) -> Subject:
    return Subject(prompts=("the fox", "漢字", "quick"), max_tokens=8, source=source_folder, dtype="bfloat16")


async def test_a_server_that_says_what_its_source_says(subject: Subject, source_folder: Path) -> None:
    served = Served(source_folder)
    found = await parity.check_tokens(subject, [served])
    assert found.outcome == "passed" and found.findings == ()
    assert found.figures["agreed"] == found.figures["total"] == 24 and found.figures["agreement"] == 1.0
    texts = await text.check(subject, [served, Served(source_folder, "http")])
    assert texts.outcome == "passed" and texts.figures["equal"] == 6


async def test_a_wrong_token_is_named_with_its_place_and_margin(subject: Subject, source_folder: Path) -> None:
    served = Served(source_folder)

    def worst(ids: Any, count: int) -> list[int]:
        right = served.source.greedy(list(ids), count)
        least = int(right.logits[5].argmin())
        return [*right.tokens[:5], least, *right.tokens[6:]]

    served.tokens = worst
    found = await parity.check_tokens(subject, [served])
    assert not found.passed and found.figures["agreed"] == 15
    assert "15 of 24 tokens agree with the source (62.5%), 0 of 3 prompts wholly" in found.detail
    for finding in found.findings:
        assert finding.severity == "error" and "token 5 of 8" in finding.cause and "logit margin" in finding.cause


async def test_a_near_tie_is_told_and_passes(subject: Subject, source_folder: Path) -> None:
    served = Served(source_folder)

    def second(ids: Any, count: int) -> list[int]:
        right = served.source.greedy(list(ids), count)
        return [*right.tokens[:5], int(right.logits[5].topk(2).indices[1]), *right.tokens[6:]]

    served.tokens = second
    margins = (await parity.check_tokens(subject, [served])).figures["margins"]
    scale = max(margins) / parity.tolerance("bfloat16", 1.0)  # at this scale of logits, and above, all three are ties
    original = GreedyAnswer.scale
    try:
        GreedyAnswer.scale = lambda self, position: scale  # type: ignore[method-assign]
        found = await parity.check_tokens(subject, [served])
    finally:
        GreedyAnswer.scale = original  # type: ignore[method-assign]
    assert found.passed and found.figures["near_ties"] == 3 and "3 near ties" in found.detail
    assert {finding.severity for finding in found.findings} == {"info"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[1:], "texts differ"),
        (lambda text: text + "!", "runs on past its end"),
        (lambda text: text + " ", "spaces at the ends"),
        (lambda text: "quick" + text, "repeats the prompt"),
    ],
)
async def test_wrong_text_is_named(change: Any, words: str, subject: Subject, source_folder: Path) -> None:
    served = Served(source_folder)
    served.change = change
    found = await text.check(replace(subject, prompts=("quick",)), [served])
    assert [words in finding.cause for finding in found.findings] == [True], found


async def test_a_character_that_the_end_cuts_may_be_left_out_or_replaced(subject: Subject, source_folder: Path) -> None:
    served = Served(source_folder)
    served.change = lambda text: text.rstrip("\ufffd") + "\ufffd"
    assert (await text.check(subject, [served])).passed


async def test_without_a_source_there_is_nothing_to_compare(client: StandInClient) -> None:
    results: list[CheckResult] = [
        await parity.check_tokens(Subject(), [client]),
        await text.check(Subject(), [client]),
    ]
    assert [found.outcome for found in results] == ["skipped", "skipped"]


def test_a_folder_that_is_no_source_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="cannot load the tokenizer"):
        Source(tmp_path)


@pytest.mark.parametrize(("content", "limit"), [('{"max_position_embeddings": 9}', 9), ("{}", None), ("x", None)])
def test_position_limit(content: str, limit: int | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    assert position_limit(tmp_path) == limit
