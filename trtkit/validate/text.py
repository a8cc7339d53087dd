"""Is the served text the text of the right tokens?

Those of the engine model where it can be asked, decoded by the source's tokenizer. Where it cannot, those of the source
itself: then rounding may have decided a near tie otherwise (see `trtkit.validate.parity`), which shows as the text of
another token that was almost as likely. Behind that nothing more is compared.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from trtkit.client.api import Completion, LLMClient
from trtkit.findings import Finding
from trtkit.validate.contract import text_models
from trtkit.validate.parity import open_source, served_tokens, tolerance
from trtkit.validate.results import CheckResult, Subject, plural, result, short, skipped
from trtkit.validate.source import GreedyAnswer, Source

NAME = "text"


class _Expected(NamedTuple):
    """What a prompt should be answered with.

    Attributes:
        ids: tokens of the prompt.
        tokens: those of the answer, without the one that ends it.
        answer: the source's, if they are its.
    """

    ids: list[int]
    tokens: list[int]
    answer: GreedyAnswer | None


async def check(subject: Subject, clients: Sequence[LLMClient]) -> CheckResult:
    """Compares the answers of every model that takes text with the source tokenizer's decoding of tokens."""
    if subject.source is None:
        return skipped(NAME, "no source to take a tokenizer from: give --source DIR")
    source = await asyncio.to_thread(open_source, subject.source, subject)
    findings: list[Finding] = []
    equal = ties = 0
    models = await text_models(subject, clients[0])
    for prompt in subject.prompts:
        expected = await _expected(subject, clients[0], source, prompt)
        wanted = source.continuation(expected.ids, expected.tokens)
        for model, client in itertools.product(models, clients):
            place = f"{client.protocol} {model} {short(prompt)}"
            done = await client.generate(subject.request(prompt), model=model, timeout_s=subject.timeout_s)
            # An answer may end inside a character; what to make of its first bytes is a matter of taste.
            if done.text.rstrip("\ufffd") == wanted.rstrip("\ufffd"):
                found = _miscounted(place, done, expected)
                equal += not found
            elif expected.answer is not None and near_tie(source, expected.answer, done.text, subject.dtype):
                found, ties = [_tie(place, done.text, wanted)], ties + 1
            else:
                found = [_different(place, prompt, done.text, wanted)]
            findings += found
    count, whose = len(subject.prompts) * len(models) * len(clients), "source" if subject.engine is None else "engine"
    detail = f"{equal} of {plural(count, 'answer')} equal the decoding of the {whose}'s tokens"
    if ties:
        detail += f", {plural(ties, 'near tie')}"
    return result(NAME, detail, findings, equal=equal, total=count, near_ties=ties)


async def _expected(subject: Subject, client: LLMClient, source: Source, prompt: str) -> _Expected:
    ids = source.encode(prompt, add_special_tokens=subject.add_special_tokens)
    if subject.engine is not None:
        tokens = await served_tokens(subject, client, subject.engine, source, ids)
        return _Expected(ids, _until_end(tokens, source.eos_ids), None)
    answer = await asyncio.to_thread(source.greedy, ids, subject.max_tokens)
    return _Expected(ids, _until_end(answer.tokens, source.eos_ids), answer)


def _until_end(tokens: Sequence[int], eos_ids: frozenset[int]) -> list[int]:
    end = next((position for position, token in enumerate(tokens) if token in eos_ids), len(tokens))
    return list(tokens[:end])


def near_tie(source: Source, answer: GreedyAnswer, served: str, dtype: str | None) -> bool:
    """Whether a served text parts from the source's where another token was as likely, within the tolerance."""
    for position in range(len(answer.tokens)):
        before = source.continuation(answer.prompt_ids, answer.tokens[:position])
        if not served.startswith(before.rstrip("\ufffd")):
            return False
        row, chosen = answer.logits[position], answer.tokens[position]
        limit = tolerance(dtype or "float16", answer.scale(position))
        for rival in (row >= row[chosen] - limit).nonzero().flatten().tolist():
            if rival == chosen:
                continue
            if rival in source.eos_ids:
                same = served.rstrip("\ufffd") == before.rstrip("\ufffd")
            else:
                text = source.continuation(answer.prompt_ids, [*answer.tokens[:position], rival])
                same = served.startswith(text.rstrip("\ufffd"))
            if same:
                return True
    return False


def _tie(place: str, text: str, wanted: str) -> Finding:
    cause = f"near tie: {short(text, 60)} instead of {short(wanted, 60)}"
    return Finding("TK711", "info", place, cause, "nothing: rounding decides here")


def _miscounted(place: str, done: Completion, expected: _Expected) -> list[Finding]:
    """Findings about the counts of tokens, where the server tells them."""
    findings = []
    for name, told, right in (
        ("prompt_tokens", done.prompt_tokens, len(expected.ids)),
        ("completion_tokens", done.completion_tokens, len(expected.tokens)),
    ):
        if told is not None and told != right:
            fix = "serve with the tokenizer and the end ids of the source"
            findings.append(Finding("TK716", "error", place, f"{name} is {told}, by the source it is {right}", fix))
    return findings


def _different(place: str, prompt: str, text: str, wanted: str) -> Finding:
    if text.endswith(wanted) and text.removesuffix(wanted).strip() == prompt.strip():
        why, fix = "the answer repeats the prompt", "let the engine model honour exclude_input_in_output"
    elif text.strip() == wanted.strip():
        why, fix = "only spaces at the ends differ", "decode the first token as one that follows others"
    elif text.startswith(wanted):
        why, fix = "the answer runs on past its end", "stop at every id of generation_config's eos_token_id"
    else:
        why, fix = "the texts differ", "serve with the tokenizer and the add_special_tokens of the source"
    return Finding("TK715", "error", place, f"{why}: {short(text, 60)} instead of {short(wanted, 60)}", fix)
