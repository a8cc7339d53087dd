"""One request while it generates: what was asked, the tokens so far, and when to stop."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Word = tuple[int, ...]
Finish = Literal["end_id", "stop_word", "length"]


@dataclass(frozen=True)
class SamplingParams:
    """How one request chooses its tokens.

    Attributes:
        temperature: divides the logits; 0 means greedy.
        top_k: how many of the likeliest tokens take part, 0 for no limit. Both `top_k` and `top_p` 0 mean greedy.
        top_p: probability mass (of what `top_k` left) that takes part, 0 for no limit.
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt and output.
        presence_penalty: subtracted once from the logits of tokens in prompt and output.
        frequency_penalty: subtracted per occurrence from the logits of tokens in prompt and output. TensorRT-LLM
            counts the prompt for all three penalties (cpp/tensorrt_llm/kernels/penaltyKernels.cu).
        min_tokens: end ids are forbidden before so many output tokens.
        seed: makes the request reproducible whatever else runs; None draws one.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0
    seed: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1 or (self.top_k == 0 and self.top_p == 0)

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


class Generation:
    """State of one request in the running batch.

    Args:
        prompt: token ids, at least one, inside the vocabulary.
        max_new_tokens: most output tokens, at least one.
        params: how tokens are chosen.
        end_ids: each ends the generation and is not part of the output.
        stop_words: token sequences that end the generation and stay in the output. As in TensorRT-LLM
            (stopCriteriaKernels.cu) the beginning of one may lie in the prompt.
        bad_words: token sequences that may not appear; of one with several tokens the last is forbidden when the tokens
            before it, prompt included, are the others (banBadWords.cu).
        wants_log_probs: keep the logarithm of each output token's probability.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        params: SamplingParams | None = None,
        end_ids: Collection[int] = (),
        stop_words: Sequence[Word] = (),
        bad_words: Sequence[Word] = (),
        wants_log_probs: bool = False,
    ) -> None:
        self.params = params or SamplingParams()
        self.tokens = list(prompt)
        self.prompt_length = len(self.tokens)
        self.max_new_tokens = max_new_tokens
        self.end_ids = frozenset(end_ids)
        self.stop_words = [list(word) for word in stop_words]
        self.banned = sorted({word[0] for word in bad_words if len(word) == 1})
        self.bad_sequences = [list(word) for word in bad_words if len(word) > 1]
        self.wants_log_probs = wants_log_probs
        self.log_probs: list[float] = []
        self.finish: Finish | None = None
        self.error: str | None = None
        self._counts: torch.Tensor | None = None
        self._draws: list[float] = []

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def done(self) -> bool:
        return self.finish is not None or self.error is not None

    @property
    def restricted(self) -> bool:
        """Whether `forbidden` may ever return something."""
        return bool(self.banned or self.bad_sequences or self.params.min_tokens)

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is all that is asked for, now and later."""
        return self.params.greedy and not (self.wants_log_probs or self.params.penalises or self.restricted)

    def take(self, token: int, log_prob: float) -> bool:
        """Receives the chosen token; returns whether it is part of the output, and sets `finish` if it was the last."""
        if token in self.end_ids:
            self.finish = "end_id"
            return False
        self.tokens.append(token)
        if self.wants_log_probs:
            self.log_probs.append(log_prob)
        if self._counts is not None:
            self._counts[token] += 1
        if any(word[-1] == token and self.tokens[-len(word) :] == word for word in self.stop_words):
            self.finish = "stop_word"
        elif self.generated >= self.max_new_tokens:
            self.finish = "length"
        return True

    def forbidden(self) -> list[int]:
        """Tokens that may not come next."""
        tokens = list(self.banned)
        tokens.extend(word[-1] for word in self.bad_sequences if self.tokens[1 - len(word) :] == word[:-1])
        if self.generated < self.params.min_tokens:
            tokens.extend(self.end_ids)
        return tokens

    def counts(self, vocab_size: int) -> torch.Tensor:
        """How often each token occurs in prompt and output, int64 `[vocabulary]`."""
        if self._counts is None:
            self._counts = torch.bincount(torch.tensor(self.tokens), minlength=vocab_size)
        return self._counts

    def draw(self) -> float:
        """The random number in [0, 1) of the next token.

        All numbers are drawn at once: one call per request instead of one per token, and no state that others touch.
        """
        if not self._draws:
            generator = torch.Generator()
            generator.manual_seed(secrets.randbits(64) if self.params.seed is None else self.params.seed)
            self._draws = torch.rand(self.max_new_tokens, generator=generator, dtype=torch.float64).tolist()
        return self._draws[self.generated]
