"""Perplexity, agreement and divergence against an independent computation, and what may go wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trtkit.errors import CheckFailedError, InputError
from trtkit.evaluate import scores as scores_module
from trtkit.evaluate.results import Scores, check_limit, parse_limit
from trtkit.evaluate.scores import score

MakeLlama = Callable[..., Any]


def windows(count: int, length: int, *, vocabulary: int = 300, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, vocabulary, (count, length)).astype(np.int64)


def fixed(logits: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """A model that predicts the same in every window: logits (length, vocabulary)."""
    table = torch.tensor(logits, dtype=torch.float32)
    return lambda ids: table[: ids.shape[1]].expand(len(ids), -1, -1)


def by_hand(p: Any, q: Any, tokens: Any) -> dict[str, float]:
    """The figures from logits (windows, length, vocabulary), one position after the other, by the definitions."""
    nll_p, nll_q, divergences, agreed = [], [], [], []
    for window in range(tokens.shape[0]):
        for position in range(tokens.shape[1] - 1):
            weights = [np.exp(x - x.max()) for x in (p[window, position], q[window, position])]
            a, b = (weight / weight.sum() for weight in weights)
            target = tokens[window, position + 1]
            nll_p.append(-math.log(a[target]))
            nll_q.append(-math.log(b[target]))
            divergences.append(sum(x * math.log(x / y) for x, y in zip(a, b, strict=True)))
            agreed.append(int(np.argmax(p[window, position])) == int(np.argmax(q[window, position])))
    ordered = sorted(divergences)
    place = 0.99 * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    means = np.array(nll_q).reshape(len(tokens), -1).mean(1) - np.array(nll_p).reshape(len(tokens), -1).mean(1)
    ratio = math.exp(sum(nll_q) / len(nll_q) - sum(nll_p) / len(nll_p))
    return {
        "reference_perplexity": math.exp(sum(nll_p) / len(nll_p)),
        "candidate_perplexity": math.exp(sum(nll_q) / len(nll_q)),
        "perplexity_increase": ratio - 1,
        "increase_error": ratio * math.sqrt(((means - means.mean()) ** 2).sum() / (len(means) - 1) / len(means)),
        "top1_agreement": sum(agreed) / len(agreed),
        "mean_kl": sum(divergences) / len(divergences),
        "kl_p99": ordered[low] + (place - low) * (ordered[high] - ordered[low]),
        "max_kl": ordered[-1],
    }


@pytest.mark.parametrize("batch", [None, 1, 3, 50])
def test_the_figures_are_those_of_the_definitions(llama: MakeLlama, batch: int | None) -> None:
    reference, candidate, tokens = llama(), llama(), windows(5, 12)
    with torch.no_grad():
        candidate.lm_head.weight.add_(torch.randn_like(candidate.lm_head.weight) * 0.05)
        ids = torch.from_numpy(tokens)
        p, q = (model(ids).logits.double().numpy() for model in (reference, candidate))
    found = score(candidate, tokens, reference, batch=batch)
    assert (found.tokens, found.windows) == (5 * 11, 5)
    for name, value in by_hand(p, q, tokens).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-5, abs=1e-9), name
    assert found.mean_kl > 0 and found.perplexity_increase != 0 and 0 < found.top1_agreement < 1


LOGITS = hnp.arrays(np.float32, (5, 7), elements=st.floats(-20, 20, width=32))


@given(LOGITS, LOGITS, hnp.arrays(np.int64, (3, 6), elements=st.integers(0, 6)))
def test_any_logits(p: Any, q: Any, tokens: Any) -> None:
    p, q = (np.concatenate([logits, np.zeros((1, 7), np.float32)]) for logits in (p, q))
    found = score(fixed(q), tokens, fixed(p))
    wanted = by_hand(np.stack([p] * 3).astype(np.float64), np.stack([q] * 3).astype(np.float64), tokens)
    for name in ("reference_perplexity", "candidate_perplexity", "mean_kl", "kl_p99", "max_kl", "top1_agreement"):
        assert getattr(found, name) == pytest.approx(wanted[name], rel=1e-6, abs=1e-9), name
    assert found.mean_kl >= 0 and found.max_kl >= found.kl_p99 >= 0
    same = score(fixed(p), tokens, fixed(p))
    assert (same.mean_kl, same.max_kl, same.top1_agreement, same.perplexity_increase) == (0, 0, 1, 0)


def test_a_model_and_its_copy_do_not_differ(llama: MakeLlama) -> None:
    found = score(llama(), windows(4, 20), llama())
    assert (found.mean_kl, found.kl_p99, found.max_kl) == (0, 0, 0)
    assert found.top1_agreement == 1 and found.perplexity_increase == 0 and found.increase_error == 0
    assert found.reference_perplexity == found.candidate_perplexity > 1


def test_uniform_predictions_have_the_vocabulary_for_perplexity() -> None:
    found = score(fixed(np.zeros((4, 16))), windows(2, 4, vocabulary=16), fixed(np.zeros((4, 16))))
    assert found.reference_perplexity == pytest.approx(16)


def test_small_pieces_give_the_same_figures(llama: MakeLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = windows(3, 30)
    whole = score(llama(1), tokens, llama())
    monkeypatch.setattr(scores_module, "_ROWS_BYTES", 8 * 300 * 7)  # seven positions at a time
    monkeypatch.setattr(scores_module, "_BATCH_BYTES", 1)
    pieces = score(llama(1), tokens, llama())
    for name, value in whole.to_dict().items():
        assert getattr(pieces, name) == pytest.approx(value, rel=1e-5), name


def test_memory_holds_one_batch_of_logits(llama: MakeLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores_module, "_BATCH_BYTES", 4 * 300 * 10 * 2)  # two windows of ten tokens
    sizes: list[int] = []

    def watched(ids: torch.Tensor) -> torch.Tensor:
        sizes.append(len(ids))
        return torch.zeros(len(ids), 10, 300)

    seen: list[tuple[int, int]] = []
    score(watched, windows(6, 10), watched, on_progress=lambda done, total: seen.append((done, total)))
    assert sizes == [1, 1, 2, 2, 2, 2, 1, 1]
    assert seen == [(1, 6), (3, 6), (5, 6), (6, 6)]


def test_padding_ids_in_the_text_count_like_others(llama: MakeLlama, recwarn: pytest.WarningsRecorder) -> None:
    tokens = windows(2, 8)
    tokens[:, 3:5] = 2  # the pad token of the model
    model = llama()
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens), attention_mask=torch.ones(2, 8)).logits.double().numpy()
    found = score(model, tokens, model)
    assert found.reference_perplexity == pytest.approx(by_hand(logits, logits, tokens)["reference_perplexity"])


@pytest.mark.filterwarnings("error")
def test_a_token_that_is_never_predicted() -> None:
    p, q = np.zeros((3, 4)), np.zeros((3, 4))
    p[:, 3] = q[:, 3] = -np.inf
    tokens = np.array([[0, 1, 2], [0, 1, 2]])
    assert score(fixed(q), tokens, fixed(p)).mean_kl == 0
    q[:, 1] = -np.inf  # the candidate excludes what the reference does not
    found = score(fixed(q), tokens, fixed(p))
    assert found.mean_kl == math.inf and found.candidate_perplexity == math.inf
    assert found.to_dict()["mean_kl"] is None
    with pytest.raises(CheckFailedError):
        check_limit(found, 1e9)
    assert math.isnan(score(fixed(q), tokens, fixed(q)).perplexity_increase)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("side", ["reference", "candidate"])
def test_logits_that_are_no_numbers(side: str, value: float) -> None:
    good, bad = np.zeros((4, 8)), np.zeros((4, 8))
    bad[2, 5] = value
    models = {"reference": fixed(good), "candidate": fixed(good), side: fixed(bad)}
    with pytest.raises(CheckFailedError, match=f"the {side}'s logits are not all numbers"):
        score(models["candidate"], windows(1, 4, vocabulary=8), models["reference"])


def test_models_of_different_vocabularies(llama: MakeLlama) -> None:
    with pytest.raises(InputError, match="different vocabularies"):
        score(llama(vocab_size=290), windows(1, 4, vocabulary=290), llama())


def test_tokens_that_the_models_do_not_have() -> None:
    for token in (8, -1):
        with pytest.raises(InputError, match=f"token id {token} is outside of the vocabulary of 8"):
            score(fixed(np.zeros((3, 8))), np.array([[1, token, 2]]), fixed(np.zeros((3, 8))))


@pytest.mark.parametrize("shape", [(0, 4), (3, 1), (5,)])
def test_nothing_to_predict(llama: MakeLlama, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="nothing to predict"):
        score(llama(), np.zeros(shape, np.int64), llama())


def test_one_window_has_no_spread(llama: MakeLlama) -> None:
    found = score(llama(1), windows(1, 6), llama())
    assert math.isnan(found.increase_error) and found.to_dict()["increase_error"] is None


# --- the limit --------------------------------------------------------------------------------------------------------

LIMITS = {"2%": 0.02, " 2 % ": 0.02, "0.02": 0.02, "0": 0.0, "0%": 0.0, "150%": 1.5, "1e-3": 0.001, "0.5%": 0.005}


@pytest.mark.parametrize("text", LIMITS)
def test_limits(text: str) -> None:
    assert parse_limit(text) == pytest.approx(LIMITS[text])


@pytest.mark.parametrize("text", ["", "%", "two", "2", "1", "-1%", "nan", "inf", "inf%", "2%%", "2%3", "-0.1"])
def test_no_limits(text: str) -> None:
    with pytest.raises(InputError) as error:
        parse_limit(text)
    assert error.value.fix


def scores_with(increase: float) -> Scores:
    return Scores(10, 1, 20.0, 20.0 * (1 + increase), increase, 0.0, 1.0, 0.0, 0.0, 0.0)


def test_the_limit_is_the_largest_increase_that_passes() -> None:
    check_limit(scores_with(0.02), 0.02)
    check_limit(scores_with(-0.5), 0.0)
    for increase in (0.0201, math.nan, math.inf):
        with pytest.raises(CheckFailedError) as error:
            check_limit(scores_with(increase), 0.02)
        assert error.value.exit_code == 1
    with pytest.raises(CheckFailedError, match=r"increased by 2\.01%, more than 2\.00% \(from 20 to 20\.4\)"):
        check_limit(scores_with(0.0201), 0.02)
