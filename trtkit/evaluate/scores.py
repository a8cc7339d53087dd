"""How far the predictions of two models are apart, over the same windows of tokens.

Every token of a window but the first is predicted from those before it. With p the reference's and q the candidate's
distribution at a position, and t the token that follows in the text:

- perplexity of a model: exp of the mean of -ln p(t) over all predicted tokens;
- top-1 agreement: the share of positions where both models hold the same token for the likeliest;
- KL(p || q): the sum over the vocabulary of p (ln p - ln q), in nats. Unlike perplexity, which may even fall when a
  model is damaged, it is 0 only where the candidate predicts exactly what the reference does.

The sums are in float64. Logits exist for one batch of windows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trtkit.errors import CheckFailedError, InputError
from trtkit.evaluate.results import Scores

Tokens = npt.NDArray[np.int64]
Logits = Callable[[torch.Tensor], torch.Tensor]
"""Next-token logits (batch, length, vocabulary), float32, of token ids int64 (batch, length)."""

_BATCH_BYTES = 256 * 2**20
_ROWS_BYTES = 2 * 2**20
"""Of float64 logits at a time: what stays in a processor's cache is compared five times as fast as 64 MB."""
_ROWS_BYTES_CUDA = 64 * 2**20


def score(
    candidate: Any,
    tokens: Tokens,
    reference: Any,
    *,
    device: str | torch.device = "cpu",
    batch: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Runs both models over the same windows, batch by batch.

    Args:
        candidate, reference: transformers models (each is moved to `device`; they may be one object), or functions from
            token ids to logits.
        tokens: (windows, length) token ids, without padding. What the tokenizer puts in front of a text should begin
            every window, as it begins every request.
        batch: windows at once; None chooses so that the logits of both take at most about 512 MB.
        on_progress: called with (windows done, windows).

    Raises:
        InputError: the tokens are no windows, or the models have different vocabularies.
        CheckFailedError: a model's logits are not numbers; says which model's.
    """
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        shape = " x ".join(map(str, tokens.shape))
        raise InputError(f"tokens of shape {shape} hold nothing to predict", "give at least 1 window of 2 tokens")
    sides = {"reference": logits_of(reference, device), "candidate": logits_of(candidate, device)}
    tally = _Tally(*tokens.shape)
    total, done = len(tokens), 0
    size = batch or 1  # the first window shows how large the vocabulary is
    while done < total:
        ids = torch.from_numpy(np.ascontiguousarray(tokens[done : done + size])).to(device)
        with torch.inference_mode():
            p, q = (_checked(name, logits(ids)) for name, logits in sides.items())
            _check_shapes(p, q, ids)
            tally.add(p, q, ids)
        if batch is None and done == 0:
            size = max(1, int(_BATCH_BYTES // (4 * p[0].numel())))
        done += len(ids)
        del p, q
        if on_progress:
            on_progress(done, total)
    return tally.scores()


def logits_of(model: Any, device: str | torch.device = "cpu") -> Logits:
    """A transformers model as a function from token ids to logits; a function stays what it is."""
    if not isinstance(model, torch.nn.Module):
        function: Logits = model
        return function
    module: Any = model.to(device).eval()

    def logits(ids: torch.Tensor) -> torch.Tensor:
        # The mask says that every token counts; without it some models warn of padding ids in the text.
        output: torch.Tensor = module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        return output

    return logits


def _checked(name: str, logits: torch.Tensor) -> torch.Tensor:
    # The largest is NaN where any is. -inf is a token that is never predicted, unless all are.
    if not bool(logits.amax(dim=-1).isfinite().all()):
        raise CheckFailedError(f"the {name}'s logits are not all numbers (NaN or infinity)", "check its weights")
    return logits


def _check_shapes(p: torch.Tensor, q: torch.Tensor, ids: torch.Tensor) -> None:
    if p.shape != q.shape or p.shape[:2] != ids.shape:
        raise InputError(
            f"reference and candidate have different vocabularies or lengths: logits of shape {tuple(p.shape)} and "
            f"{tuple(q.shape)} for tokens of shape {tuple(ids.shape)}",
            "compare models that share a tokenizer",
        )
    if int(ids.max()) >= p.shape[-1] or int(ids.min()) < 0:
        wrong = int(ids.max()) if int(ids.max()) >= p.shape[-1] else int(ids.min())
        raise InputError(
            f"token id {wrong} is outside of the vocabulary of {p.shape[-1]:,} tokens", "use the models' own tokenizer"
        )


class _Tally:
    """What has been found so far.

    All memory that lasts is taken at the beginning: small arrays that are kept, taken between large ones that are not,
    would leave holes too small for the next large one, and the process would grow by gigabytes.
    """

    def __init__(self, windows: int, length: int) -> None:
        self._nll = np.empty((windows, length - 1, 2))  # of the reference and the candidate
        self._divergences = np.empty((windows, length - 1))
        self._agreed = np.empty((windows, length - 1), bool)
        self._done = 0

    def add(self, p: torch.Tensor, q: torch.Tensor, ids: torch.Tensor) -> None:
        """Takes the logits (batch, length, vocabulary) of reference and candidate for a batch of windows."""
        rows = max(1, (_ROWS_BYTES_CUDA if p.is_cuda else _ROWS_BYTES) // (8 * p.shape[-1]))
        last = ids.shape[1] - 1
        for window in range(len(ids)):
            for start in range(0, last, rows):
                part = slice(start, min(start + rows, last))
                self._rows(part, p[window, part], q[window, part], ids[window, part.start + 1 : part.stop + 1])
            self._done += 1

    def _rows(self, part: slice, p: torch.Tensor, q: torch.Tensor, targets: torch.Tensor) -> None:
        log_p, log_q = (logits.double().log_softmax(dim=-1) for logits in (p, q))
        terms = log_p.exp() * (log_p - log_q)
        # What the reference never predicts counts nothing, whatever the candidate says (0 ln 0 = 0).
        divergence = torch.where(torch.isneginf(log_p), 0.0, terms).sum(dim=-1)
        self._divergences[self._done, part] = divergence.clamp(min=0).cpu()  # below 0 only by rounding
        self._agreed[self._done, part] = (p.argmax(dim=-1) == q.argmax(dim=-1)).cpu()
        for side, log in enumerate((log_p, log_q)):
            self._nll[self._done, part, side] = -log.gather(1, targets[:, None])[:, 0].cpu()

    def scores(self) -> Scores:
        divergences = self._divergences
        with np.errstate(invalid="ignore"):  # of two infinities, where something is never predicted
            reference, candidate = self._nll.mean(axis=(0, 1))
            differences = (self._nll[:, :, 1] - self._nll[:, :, 0]).mean(axis=1)
            error = float(differences.std(ddof=1)) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
            ratio = _exp(candidate - reference)
            percentile = float(np.nan_to_num(np.percentile(divergences, 99), nan=math.inf, posinf=math.inf))
        return Scores(
            tokens=divergences.size,
            windows=len(differences),
            reference_perplexity=_exp(reference),
            candidate_perplexity=_exp(candidate),
            perplexity_increase=ratio - 1,
            increase_error=ratio * error,  # of the exponential, to first order
            top1_agreement=float(self._agreed.mean()),
            mean_kl=float(divergences.mean()),
            kl_p99=percentile,
            max_kl=float(divergences.max()),
        )


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
