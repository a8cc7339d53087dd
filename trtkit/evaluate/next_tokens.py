"""The greedy token after held-out prefixes, where a server is asked that gives tokens and log-probabilities alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from trtkit.errors import InputError
from trtkit.evaluate.results import NextTokenScores
from trtkit.evaluate.scores import Logits, Tokens
from trtkit.evaluate.served import NextToken, ServedModel

PREFIXES = 4
"""Of every window."""


def prefix_lengths(length: int, count: int) -> list[int]:
    """`count` lengths, evenly apart, the last `length` - 1: what follows each of them is in the window."""
    return sorted({max(1, round((step + 1) * (length - 1) / count)) for step in range(count)})


def compare_next_tokens(
    candidate: Logits | ServedModel,
    tokens: Tokens,
    reference: Logits | ServedModel,
    *,
    prefixes: int = PREFIXES,
    device: str | torch.device = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> NextTokenScores:
    """Compares what follows `prefixes` prefixes of every window (windows, length); at least one side is served.

    Raises:
        InputError: the windows are too short, or a served token is outside of the other side's vocabulary.
        ServerError, RequestTimeoutError, LacksError: a server refuses or does not answer.
    """
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise InputError(f"tokens of shape {list(tokens.shape)} have no prefixes", "give at least 1 window of 2 tokens")
    lengths = prefix_lengths(tokens.shape[1], prefixes)
    found = _Found()
    for done, window in enumerate(tokens, start=1):
        asked = [window[:length].tolist() for length in lengths]
        # One after the other: the reference may be slow, and a server's queue must not time out meanwhile.
        ours, theirs = (_answers(side, asked, window, lengths, device) for side in (reference, candidate))
        found.add(ours, theirs)
        if on_progress:
            on_progress(done, len(tokens))
    return found.scores()


def _answers(
    side: Logits | ServedModel, asked: list[list[int]], window: Tokens, lengths: list[int], device: str | torch.device
) -> torch.Tensor | list[NextToken]:
    """A server's answers, or a model's log-probabilities (prefixes, vocabulary)."""
    if isinstance(side, ServedModel):
        return side.next_tokens(asked)
    with torch.inference_mode():
        ids = torch.from_numpy(np.ascontiguousarray(window[None, : lengths[-1]])).to(device)
        rows = side(ids)[0, [length - 1 for length in lengths]]
        return rows.double().log_softmax(dim=-1).cpu()


@dataclass
class _Found:
    """Sums over the prefixes so far."""

    prefixes: int = 0
    agreed: int = 0
    differences: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)

    def add(self, reference: torch.Tensor | list[NextToken], candidate: torch.Tensor | list[NextToken]) -> None:
        match reference, candidate:
            case torch.Tensor() as rows, list() as answers:
                self._add_served(rows, answers)
            case list() as answers, torch.Tensor() as rows:
                self._add_served(rows, answers)
            case list() as ours, list() as theirs:
                self._add_two_servers(ours, theirs)
            case _:
                raise TypeError("two models that run here are compared by their logits")

    def _add_served(self, rows: torch.Tensor, answers: Sequence[NextToken]) -> None:
        for row, answer in zip(rows, answers, strict=True):
            if not 0 <= answer.token < len(row):
                cause = f"the server answers token {answer.token}, the model has {len(row):,}"
                raise InputError(cause, "compare models that share a tokenizer")
            own = int(row.argmax())
            self.prefixes += 1
            self.agreed += own == answer.token
            if own != answer.token:
                self.margins.append(float(row[own] - row[answer.token]))
            if answer.log_prob is not None:
                self.differences.append(abs(float(row[answer.token]) - answer.log_prob))

    def _add_two_servers(self, reference: Sequence[NextToken], candidate: Sequence[NextToken]) -> None:
        for one, other in zip(reference, candidate, strict=True):
            self.prefixes += 1
            self.agreed += one.token == other.token
            if one.token == other.token and one.log_prob is not None and other.log_prob is not None:
                self.differences.append(abs(one.log_prob - other.log_prob))

    def scores(self) -> NextTokenScores:
        return NextTokenScores(
            prefixes=self.prefixes,
            top1_agreement=self.agreed / self.prefixes,
            log_prob_difference=float(np.mean(self.differences)) if self.differences else None,
            disagreement_margin=float(np.mean(self.margins)) if self.margins else None,
        )
