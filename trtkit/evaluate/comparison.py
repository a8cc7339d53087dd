"""Two sides, each a source, a checkpoint or a served model, compared on the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

from trtkit.errors import InputError, missing_extra
from trtkit.evaluate.results import NextTokenScores, Scores, check_limit

Kind = Literal["source", "checkpoint", "served"]

LOGIT_METRICS = ("perplexity", "KL divergence")


@dataclass(frozen=True)
class Side:
    """One of the two.

    Attributes:
        kind: what it is.
        place: its folder, or its url.
        model: the engine model of a server.
    """

    kind: Kind
    place: str
    model: str = "tensorrt_llm"

    def __str__(self) -> str:
        return f"{self.kind} {self.place}"


@dataclass(frozen=True)
class Evaluation:
    """What came out.

    Attributes:
        scores: everything, where both sides have logits; else None.
        next_tokens: what a served side without logits allows; else None.
        missing: metric -> why it could not be measured.
        limit: of the increase of perplexity, as a fraction.
    """

    reference: Side
    candidate: Side
    scores: Scores | None = None
    next_tokens: NextTokenScores | None = None
    missing: dict[str, str] | None = None
    limit: float | None = None

    @property
    def passed(self) -> bool:
        return self.limit is None or (self.scores is not None and self.scores.perplexity_increase <= self.limit)

    def check(self) -> None:
        """Raises CheckFailedError where the limit is exceeded."""
        if self.limit is not None and self.scores is not None:
            check_limit(self.scores, self.limit)

    def to_dict(self) -> dict[str, Any]:
        sides = {name: {"kind": side.kind, "place": side.place} for name, side in self._sides().items()}
        return {
            **sides,
            "scores": self.scores.to_dict() if self.scores else None,
            "next_tokens": self.next_tokens.to_dict() if self.next_tokens else None,
            "missing": self.missing or {},
            "max_perplexity_increase": self.limit,
            "passed": self.passed,
        }

    def _sides(self) -> dict[str, Side]:
        return {"reference": self.reference, "candidate": self.candidate}


def evaluate(
    reference: Side,
    candidate: Side,
    tokens: Any,
    *,
    device: str = "cpu",
    batch: int | None = None,
    prefixes: int = 4,
    limit: float | None = None,
    timeout_s: float = 120.0,
    on_step: Callable[[str], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Runs both sides over the same windows, an int64 array (windows, length).

    Sources and checkpoints run here, in float32. A served model runs where it is, in its own precision: if it returns
    logits it is measured like the others, else by the greedy token after `prefixes` prefixes of every window.

    Args:
        device: of the models that run here.
        batch: windows at once; None chooses.
        limit: of the increase of perplexity, as a fraction: 0.02 is 2 %. `Evaluation.check` judges it.
        timeout_s: of every request to a server.

    Raises:
        LacksError: torch is missing, the device is, or a server does not answer.
        InputError: a side cannot be loaded, the sides do not fit together, or there is a limit and no perplexity.
    """
    try:
        import torch  # noqa: F401
    except ImportError:
        raise missing_extra("torch", "torch") from None
    from trtkit.evaluate.models import load_checkpoint, load_source, usable_device
    from trtkit.evaluate.next_tokens import compare_next_tokens
    from trtkit.evaluate.scores import logits_of, score
    from trtkit.evaluate.served import ServedModel, open_served

    where = usable_device(device)
    say = on_step or (lambda text: None)
    sides = (reference, candidate)
    with ExitStack() as stack:
        servers: dict[Side, ServedModel] = {}
        for side in dict.fromkeys(side for side in sides if side.kind == "served"):
            say(f"asking {side.place} for logits")
            servers[side] = stack.enter_context(open_served(side.place, side.model, timeout_s=timeout_s))
            servers[side].probe(tokens[0].tolist())
        blind = {str(side): server.missing for side, server in servers.items() if server.missing}
        if blind and limit is not None:
            place, why = next(iter(blind.items()))
            raise InputError(
                f"{place} gives no logits ({why}), so perplexity has no limit to keep",
                "compare the checkpoint behind it, or leave out the limit",
            )
        runs: dict[Side, Any] = {}
        for side in dict.fromkeys(sides):
            if side in servers:
                runs[side] = servers[side] if servers[side].missing else servers[side].logits
            else:
                say(f"loading {side}")
                load = load_source if side.kind == "source" else load_checkpoint
                runs[side] = logits_of(load(side.place), where)
        one, other = runs[reference], runs[candidate]
        if not blind:
            scores = score(other, tokens, one, device=where, batch=batch, on_progress=on_progress)
            return Evaluation(reference, candidate, scores=scores, limit=limit)
        found = compare_next_tokens(other, tokens, one, prefixes=prefixes, device=where, on_progress=on_progress)
    missing = dict.fromkeys(LOGIT_METRICS, "; ".join(f"{place}: {why}" for place, why in blind.items()))
    if found.log_prob_difference is None:
        missing["log-probability of the chosen token"] = "a server does not tell it, or no token agrees"
    return Evaluation(reference, candidate, next_tokens=found, missing=missing)
