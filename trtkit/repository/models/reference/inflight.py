"""In-flight batching over a transformers model: requests join and leave a running batch between two tokens.

transformers has continuous batching of its own (`generate_batch`), but on a CPU it was 17 to 43 times slower than a
static batch (benchmarks/reference_runtime.py). Here all rows live in one left-padded cache, and a step is one plain
forward pass for one token per row. Checked with transformers 4.57 and 5.23 for every family of trtkit.architectures:
the tokens are those that transformers generates for each request alone, or, where the sliding cache of 4.57 is wrong
(Qwen2-MoE with windows), those that it finds without a cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from trtkit.repository.models.reference.cache import BatchCache, PrefillCache
from trtkit.repository.models.reference.generation import Generation
from trtkit.repository.models.reference.rope import separate_rows
from trtkit.repository.models.reference.sampling import BatchSampler

PREFILL_TOKENS = 8192
"""Padded tokens of one prefill: bounds its memory, and how long running requests wait for their next token."""


class Progress(NamedTuple):
    """What one step did for one request: a token, or None if the generation ended or failed without one."""

    generation: Generation
    token: int | None


class InflightBatch:
    """A batch that requests join and leave. Not thread-safe: one thread drives it.

    The greedy tokens of a request do not depend on its company, up to rounding: matrix products of different sizes may
    differ in the last bit of a float32.

    Args:
        model: a transformers causal language model in eval mode on the CPU.
        slots: most requests at a time.
    """

    def __init__(self, model: Any, slots: int) -> None:
        self.slots = slots
        self.running: list[Generation] = []
        self._model = model
        self._cache = BatchCache(slots)
        self._sampler = BatchSampler()
        self._tokens = torch.zeros(0, 1, dtype=torch.long)
        self._positions = torch.zeros(0, 1, dtype=torch.long)
        accepted = inspect.signature(model.forward).parameters
        # Models without position ids (ALiBi) take the positions from the mask.
        self._takes_positions = "position_ids" in accepted
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._anew_beyond = separate_rows(model)

    @property
    def free(self) -> int:
        """Requests that may join now."""
        return self.slots - len(self.running)

    def join(self, generations: Sequence[Generation]) -> list[Progress]:
        """Prefills requests (at most `free`) and chooses their first tokens. Those that are not done keep a slot.

        If a prefill of several raises, each is tried alone, so that one request cannot spoil another; those that still
        raise have `error` set.
        """
        progress: list[Progress] = []
        for group in _groups(generations):
            try:
                with torch.inference_mode():
                    progress.extend(self._prefill(group))
            except Exception as error:
                if len(group) == 1:
                    progress.append(_failed(group[0], error))
                    continue
                for generation in group:
                    progress.extend(self.join([generation]))
        self._rows_changed()
        return progress

    def step(self) -> list[Progress]:
        """One token for every running request; those that are done lose their slot.

        A forward pass that raises fails all running requests: nobody can tell whose fault it was.
        """
        outgrown = [] if self._anew_beyond is None else self._leave_outgrown(self._anew_beyond)
        try:
            with torch.inference_mode():
                progress = self._decode() if self.running else []
        except Exception as error:
            progress = [_failed(generation, error) for generation in self.running]
            self.clear()
        return progress + self.join(outgrown) if outgrown else progress

    def leave(self, generation: Generation) -> None:
        """Takes a request out before it is done; nothing happens if it does not run."""
        if generation in self.running:
            with torch.inference_mode():
                self._drop([self.running.index(generation)])

    def clear(self) -> None:
        """Takes all requests out and frees the cache."""
        self.running = []
        self._cache.clear()
        self._rows_changed()

    def _leave_outgrown(self, length: int) -> list[Generation]:
        """Takes out the requests whose last token is the first beyond this length: their keys must be computed anew."""
        outgrown = [generation for generation in self.running if len(generation.tokens) == length + 1]
        for generation in outgrown:
            self.leave(generation)
        return outgrown

    def _decode(self) -> list[Progress]:
        mask = self._cache.open_column()
        logits = self._forward(self._tokens, mask, self._positions, self._cache)
        self._cache.close_column()
        progress, tokens = _apply(self.running, self._sampler.choose(logits))
        self._tokens = torch.tensor(tokens)[:, None]
        self._positions = self._positions + 1
        if any(generation.done for generation in self.running):
            self._drop([row for row, generation in enumerate(self.running) if generation.done])
        return progress

    def _prefill(self, group: Sequence[Generation]) -> list[Progress]:
        lengths = [len(generation.tokens) for generation in group]
        longest = max(lengths)
        tokens = torch.tensor([[0] * (longest - len(g.tokens)) + g.tokens for g in group])
        columns = torch.arange(longest)
        padding = longest - torch.tensor(lengths)[:, None]
        mask = (columns >= padding).long()
        positions = (columns - padding).clamp(min=0)
        cache = PrefillCache()
        logits = self._forward(tokens, mask, positions, cache)
        self._cache.reserve(cache, longest)
        sampler = BatchSampler()
        sampler.set_rows(group)
        progress, chosen = _apply(group, sampler.choose(logits))
        staying = [row for row, generation in enumerate(group) if not generation.done]
        if staying:
            self._cache.join(cache, staying, lengths)
            self.running.extend(group[row] for row in staying)
            self._tokens = torch.cat([self._tokens, torch.tensor([[chosen[row]] for row in staying])])
            self._positions = torch.cat([self._positions, torch.tensor([[lengths[row]] for row in staying])])
        return progress

    def _forward(self, tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        """Logits `[rows, vocabulary]` of the last column."""
        options: dict[str, Any] = {"position_ids": positions} if self._takes_positions else {}
        output = self._model(
            input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True, **self._last_only, **options
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def _drop(self, rows: Sequence[int]) -> None:
        """Frees rows. The last row moves into each gap, here as in the cache."""
        order = list(range(len(self.running)))
        for row in sorted(rows, reverse=True):
            self._cache.leave(row)
            order[row] = order[-1]
            order.pop()
        self.running = [self.running[row] for row in order]
        self._tokens, self._positions = self._tokens[order], self._positions[order]
        self._rows_changed()

    def _rows_changed(self) -> None:
        if not self.running:
            self._tokens = self._positions = torch.zeros(0, 1, dtype=torch.long)
        self._sampler.set_rows(self.running)


def _apply(
    generations: Sequence[Generation], chosen: tuple[list[int], list[float], list[bool]]
) -> tuple[list[Progress], list[int]]:
    """Hands the chosen tokens to their requests."""
    progress = []
    for generation, token, log_prob, failed in zip(generations, *chosen, strict=True):
        if failed:
            generation.error = "the logits are not finite, or every token is forbidden"
            progress.append(Progress(generation, None))
        else:
            progress.append(Progress(generation, token if generation.take(token, log_prob) else None))
    return progress, chosen[0]


def _failed(generation: Generation, error: Exception) -> Progress:
    reason = str(error).partition("\n")[0]
    generation.error = f"the forward pass failed: {type(error).__name__}: {reason}"
    return Progress(generation, None)


def _groups(generations: Sequence[Generation]) -> Iterator[list[Generation]]:
    """Requests of similar length together, no more than `PREFILL_TOKENS` with padding (one alone may have more)."""
    group: list[Generation] = []
    for generation in sorted(generations, key=lambda g: len(g.tokens)):
        if group and (len(group) + 1) * len(generation.tokens) > PREFILL_TOKENS:
            yield group
            group = []
        group.append(generation)
    if group:
        yield group
