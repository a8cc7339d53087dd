"""Does the served model say what its source says, token by token?

Two computations of one model differ by rounding, and greedy decoding turns the smallest difference into another token
where two tokens are equally likely. So a first difference is judged by the source's logits: if the served token is
within `tolerance` of the source's choice, the difference is a near tie and reported as such; beyond it, it is a fault.
Behind the first difference the two texts have different pasts, so nothing more is compared.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trtkit.client.api import LLMClient
from trtkit.findings import Finding
from trtkit.validate.results import CheckResult, Subject, plural, result, short, skipped
from trtkit.validate.source import GreedyAnswer, Source

TOKENS = "parity"

ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Unit roundoff of a dtype: the largest relative error of rounding one number to it (IEEE 754; bfloat16 has 8 bits)."""

SLACK = 8.0
"""Unit roundoffs, relative to the largest logit, that a whole forward pass may be off. An estimate: rounding errors of
many layers add up like a random walk and partly cancel. Float32 gets 256 times as much, because its kernels differ in
summation order and in fused or TF32 products rather than in rounding alone."""

DIFFERENT = "compare checkpoint and source with `trtkit verify`; if they agree, suspect the engine's dtype or plugins"


def tolerance(dtype: str, scale: float) -> float:
    """The largest logit margin that counts as a near tie.

    Args:
        dtype: of the checkpoint.
        scale: largest absolute logit at that position.
    """
    return ROUNDING[dtype] * SLACK * (256.0 if dtype == "float32" else 1.0) * scale


@dataclass(frozen=True)
class Comparison:
    """One prompt's answers side by side, up to the source's end or the first difference.

    Attributes:
        agreed: tokens that are equal, from the start.
        total: tokens of the source's answer (an end-of-sequence token included).
        margin, limit: at the first difference: the source's logit margin, and the tolerance there. None without one.
        wanted, got: the tokens at the first difference; got is None where the served answer ends early.
    """

    prompt: str
    agreed: int
    total: int
    wanted: int | None = None
    got: int | None = None
    margin: float | None = None
    limit: float | None = None

    @property
    def near_tie(self) -> bool:
        return self.margin is not None and self.limit is not None and self.margin <= self.limit

    @property
    def differs(self) -> bool:
        return self.wanted is not None


def compare(
    prompt: str, answer: GreedyAnswer, served: Sequence[int], eos_ids: frozenset[int], dtype: str
) -> Comparison:
    """Compares one served answer with the source's.

    An engine may or may not include the end-of-sequence token that ended its answer, and knows one such id where the
    source may have several; so an answer that ends where the source has an end-of-sequence token agrees with it, and
    what follows that token does not count.
    """
    total = len(answer.tokens)
    for position, wanted in enumerate(answer.tokens):
        got = served[position] if position < len(served) else None
        if got == wanted or (got is None and wanted in eos_ids):
            continue
        # A served answer that is too short has chosen to end: judge it by the likeliest end-of-sequence token.
        rivals = [got] if got is not None else sorted(eos_ids)
        margin = min((answer.margin(position, rival) for rival in rivals), default=None)
        limit = tolerance(dtype, answer.scale(position))
        return Comparison(prompt, position, total, wanted, got, margin, limit)
    return Comparison(prompt, total, total)


async def check_tokens(subject: Subject, clients: Sequence[LLMClient]) -> CheckResult:
    """Compares the engine model's tokens with the source's greedy tokens, prompt by prompt."""
    if subject.source is None:
        return skipped(TOKENS, "no source to compare with: give --source DIR")
    if subject.engine is None:
        return skipped(
            TOKENS, f"model '{subject.model}' drives its engine itself and takes no tokens; its text is compared"
        )
    source = await asyncio.to_thread(open_source, subject.source, subject)
    dtype = subject.dtype or "float16"
    comparisons = []
    for prompt in subject.prompts:
        ids = source.encode(prompt, add_special_tokens=subject.add_special_tokens)
        served = await served_tokens(subject, clients[0], subject.engine, source, ids)
        answer = await asyncio.to_thread(source.greedy, ids, subject.max_tokens)
        comparisons.append(compare(prompt, answer, served, source.eos_ids, dtype))
    return _tokens_result(comparisons, dtype, source)


def open_source(folder: Path, subject: Subject) -> Source:
    return Source(folder, trust_remote_code=subject.trust_remote_code)


async def served_tokens(subject: Subject, client: LLMClient, engine: str, source: Source, ids: list[int]) -> list[int]:
    """The engine model's greedy tokens; behind an end-of-sequence token they may go on."""
    end_id = min(source.eos_ids, default=None) if len(source.eos_ids) == 1 else -1
    return await client.generate_tokens(
        ids, subject.max_tokens, end_id=end_id, model=engine, timeout_s=subject.timeout_s
    )


def _tokens_result(comparisons: Sequence[Comparison], dtype: str, source: Source) -> CheckResult:
    findings = [_finding(item, dtype, source) for item in comparisons if item.differs]
    agreed, total = sum(item.agreed for item in comparisons), sum(item.total for item in comparisons)
    whole = sum(not item.differs for item in comparisons)
    ties = sum(item.differs and item.near_tie for item in comparisons)
    share = agreed / total if total else 0.0
    prompts = plural(len(comparisons), "prompt")
    detail = f"{agreed} of {total} tokens agree with the source ({share:.1%}), {whole} of {prompts} wholly"
    if ties:
        detail += f", {plural(ties, 'near tie')}"
    if not total:
        findings.append(Finding("TK712", "error", str(source.folder), "no tokens to compare", "set validation.prompts"))
    margins = [item.margin for item in comparisons if item.margin is not None]
    figures = {"agreed": agreed, "total": total, "agreement": share, "near_ties": ties, "margins": margins}
    return result(TOKENS, detail, findings, **figures)


def _finding(item: Comparison, dtype: str, source: Source) -> Finding:
    def shown(token: int | None) -> str:
        return "the end" if token is None else f"{token} {short(source.tokenizer.decode([token]))}"

    margin = "unknown" if item.margin is None else f"{item.margin:.4g}"
    cause = (
        f"token {item.agreed} of {item.total} is {shown(item.got)}, the source has {shown(item.wanted)} "
        f"(logit margin {margin}, near tie up to {item.limit:.4g} for {dtype})"
    )
    if item.near_tie:
        return Finding("TK711", "info", short(item.prompt), f"near tie: {cause}", "nothing: rounding decides here")
    return Finding("TK711", "error", short(item.prompt), cause, DIFFERENT)
