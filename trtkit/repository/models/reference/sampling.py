"""Logits to tokens for a batch of requests with different settings, with the semantics of TensorRT-LLM.

Order of work and formulas: TensorRT-LLM, cpp/tensorrt_llm/kernels/penaltyKernels.cu (temperature, penalties, minimum
length), banBadWords.cu, samplingTopKKernels.cu (the walk down the sorted probabilities) and
cpp/include/tensorrt_llm/layers/defaultDecodingParams.h (defaults).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from trtkit.repository.models.reference.generation import Generation


class BatchSampler:
    """Chooses the next token of every row. Settings become tensors when the rows change, not at every token."""

    def __init__(self) -> None:
        self.set_rows([])

    def set_rows(self, rows: Sequence[Generation]) -> None:
        """The rows of the next logits, in order."""
        self._rows = list(rows)
        self._plain = all(row.plain for row in self._rows)
        if self._plain:
            return
        params = [row.params for row in self._rows]
        self._temperature = _column([p.temperature or 1.0 for p in params])
        self._scales = bool((self._temperature != 1).any())
        self._penalised = [index for index, p in enumerate(params) if p.penalises]
        self._repetition = _column([params[index].repetition_penalty for index in self._penalised])
        self._presence = _column([params[index].presence_penalty for index in self._penalised])
        self._frequency = _column([params[index].frequency_penalty for index in self._penalised])
        self._restricted = [index for index, row in enumerate(self._rows) if row.restricted]
        self._sampled = [index for index, p in enumerate(params) if not p.greedy]
        top_k = [params[index].top_k for index in self._sampled]
        self._largest_k = max(top_k) if top_k and all(top_k) else 0
        self._top_k = torch.tensor([k or torch.iinfo(torch.int64).max for k in top_k]).reshape(-1, 1)
        self._top_p = _column([params[index].top_p or 1.0 for index in self._sampled]).double()
        self._log_probs = any(row.wants_log_probs for row in self._rows)

    def choose(self, logits: torch.Tensor) -> tuple[list[int], list[float], list[bool]]:
        """The next token of each row.

        Args:
            logits: `[rows, vocabulary]`; left as they are.

        Returns:
            Per row: the token; the natural logarithm of its probability over the whole vocabulary after temperature and
            penalties (0 where no row of the batch asks for it); and whether the row failed, because a logit is infinite
            or not a number, or because every token is forbidden.
        """
        if not self._plain:
            logits = self._process(logits)
        best, tokens = logits.max(dim=-1)
        healthy = best.isfinite()
        failed = (~healthy).tolist()
        zeros = [0.0] * len(failed)
        if self._plain:
            return tokens.tolist(), zeros, failed
        if self._sampled:
            self._draw(logits, tokens)  # a failed row gets some token, which is thrown away
        if not self._log_probs:
            return tokens.tolist(), zeros, failed
        log_probs = logits.log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]
        return tokens.tolist(), log_probs.tolist(), failed

    def _process(self, logits: torch.Tensor) -> torch.Tensor:
        """A copy with temperature, penalties and forbidden tokens applied, in this order."""
        logits = logits / self._temperature if self._scales else logits.clone()
        if self._penalised:
            part = logits[self._penalised]
            counts = torch.stack([self._rows[index].counts(logits.shape[1]) for index in self._penalised])
            lowered = torch.where(part < 0, part * self._repetition, part / self._repetition)
            lowered = lowered - self._presence - self._frequency * counts
            logits[self._penalised] = torch.where(counts > 0, lowered, part)
        for index in self._restricted:
            if forbidden := self._rows[index].forbidden():
                logits[index, forbidden] = -torch.inf
        return logits

    def _draw(self, logits: torch.Tensor, tokens: torch.Tensor) -> None:
        """Replaces the tokens of the sampled rows: sorts the probabilities (float64, so that a drawn number falls on
        the same token in any company) and walks down them until the drawn share of `top_p` is reached."""
        part = logits[self._sampled].double()
        if self._largest_k:
            values, order = part.topk(min(self._largest_k, part.shape[-1]), dim=-1)
        else:
            values, order = part.sort(dim=-1, descending=True)
        beyond = torch.arange(values.shape[-1]) >= self._top_k
        mass = values.masked_fill(beyond, -torch.inf).softmax(dim=-1).cumsum(dim=-1)
        draws = torch.tensor([self._rows[index].draw() for index in self._sampled], dtype=torch.float64)
        position = (mass < draws[:, None] * self._top_p * mass[:, -1:]).sum(dim=-1, keepdim=True)
        tokens[self._sampled] = order.gather(1, position)[:, 0]


def _column(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(-1, 1)
