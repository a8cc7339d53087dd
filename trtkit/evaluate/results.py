"""What an evaluation finds, as data, and the limit it may be held against. Needs neither numpy nor torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from trtkit.errors import CheckFailedError, InputError


@dataclass(frozen=True)
class Scores:
    """A candidate compared with a reference.

    Attributes:
        tokens: predicted tokens: windows x (length - 1).
        windows: windows of tokens.
        reference_perplexity, candidate_perplexity: of the text.
        perplexity_increase: of the candidate over the reference, as a fraction (0.02 is 2 %).
        increase_error: its standard error, from the spread between windows; NaN with a single window. It says how much
            other text of the kind would change the increase, not what another calibration would.
        top1_agreement: fraction of positions.
        mean_kl: KL(reference || candidate), nats per token.
        kl_p99: its 99th percentile over the positions.
        max_kl: its largest value.
    """

    tokens: int
    windows: int
    reference_perplexity: float
    candidate_perplexity: float
    perplexity_increase: float
    increase_error: float
    top1_agreement: float
    mean_kl: float
    kl_p99: float
    max_kl: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN or infinity: they become None."""
        return _plain(self)


@dataclass(frozen=True)
class NextTokenScores:
    """A comparison where one side is a server that gives no logits: the greedy token after each of some prefixes.

    Attributes:
        prefixes: how many were compared.
        top1_agreement: fraction of them after which both sides choose the same token.
        log_prob_difference: mean of |ln p(t) - ln q(t)| in nats, t the served token (of two servers: where they agree);
            None where a server gives no log-probabilities, or nothing can be compared.
        disagreement_margin: where they disagree, the mean by which the model prefers its own token to the served one,
            ln p(own) - ln p(served) in nats: near 0 rounding decides. None without disagreement, or with two servers.
    """

    prefixes: int
    top1_agreement: float
    log_prob_difference: float | None
    disagreement_margin: float | None

    def to_dict(self) -> dict[str, Any]:
        return _plain(self)


def _plain(scores: Scores | NextTokenScores) -> dict[str, Any]:
    return {
        name: value if not isinstance(value, float) or math.isfinite(value) else None
        for name, value in asdict(scores).items()
    }


def check_limit(scores: Scores, limit: float) -> None:
    """Raises CheckFailedError where perplexity increased by more than `limit` (a fraction)."""
    if not scores.perplexity_increase <= limit:
        raise CheckFailedError(
            f"perplexity increased by {scores.perplexity_increase:.2%}, more than {limit:.2%} "
            f"(from {scores.reference_perplexity:.4g} to {scores.candidate_perplexity:.4g})",
            "quantise less, calibrate with text that is more like what the model will see, or raise the limit",
        )


def parse_limit(text: str) -> float:
    """A limit for an increase as a fraction: `2%` is 0.02, and so is `0.02`.

    Raises:
        InputError: not a number, negative, or a plain number of 1 and more, which was meant as per cent.
    """
    number, percent, rest = text.strip().partition("%")
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        value = math.nan
    if rest or not math.isfinite(value) or value < 0:
        raise InputError(f"'{text}' is no limit for an increase", "give per cent such as 2%, or a fraction: 0.02")
    if value >= 1 and not percent:
        raise InputError(
            f"an increase of {text} is {value:.0%}", f"write {text}% if you mean per cent, else {value:.0%}"
        )
    return value
