"""Is a streamed answer the same as one that comes at once, over every protocol?"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from typing import NamedTuple

from trtkit.client.api import Ending, LLMClient
from trtkit.findings import Finding
from trtkit.validate.contract import text_models
from trtkit.validate.results import CheckResult, Subject, plural, result, short, skipped

NAME = "streaming"

MULTI_BYTE_PROMPTS = ("# Grüße aus Köln, café №5: ", "説明「こんにちは世界」", "emoji 🎉🚀👩‍👩‍👧 ")
"""Sent besides the subject's: characters of two, three and four bytes, which tokenizers cut anywhere."""

REPLACEMENT = "\ufffd"


class _Answer(NamedTuple):
    protocol: str
    model: str
    prompt: str
    whole: str
    pieces: list[str]
    told: Ending
    """What was said about the whole answer."""
    endings: list[Ending | None]
    """What the pieces said of it."""

    @property
    def place(self) -> str:
        return f"{self.protocol} {self.model}"


async def check(subject: Subject, clients: Sequence[LLMClient]) -> CheckResult:
    """Asks every model that takes text, greedily, with and without streaming, and compares the texts."""
    if subject.streaming is False or not await is_decoupled(subject, clients[0], subject.model):
        return skipped(NAME, f"model '{subject.model}' does not stream (it is not decoupled)")
    answers = []
    models = await text_models(subject, clients[0])
    for prompt in dict.fromkeys([*subject.prompts, *MULTI_BYTE_PROMPTS]):
        for model, client in itertools.product(models, clients):
            whole = await client.generate(subject.request(prompt), model=model, timeout_s=subject.timeout_s)
            stream = client.stream(subject.request(prompt), model=model, timeout_s=subject.timeout_s)
            async with aclosing(stream) as chunks:
                pieces = [chunk async for chunk in chunks]
            told = Ending(whole.finish_reason, whole.prompt_tokens, whole.completion_tokens)
            texts, endings = [chunk.text for chunk in pieces], [chunk.ending for chunk in pieces]
            answers.append(_Answer(client.protocol, model, prompt, whole.text, texts, told, endings))
    findings = [finding for answer in answers for finding in _judge(answer)] + list(_across(answers))
    prompts, counts = len({answer.prompt for answer in answers}), [len(answer.pieces) for answer in answers]
    ways = f"{' and '.join(models)}, {' and '.join(client.protocol for client in clients)}"
    equal = sum("".join(answer.pieces) == answer.whole for answer in answers)
    detail = (
        f"{equal} of {plural(len(answers), 'stream')} equal the whole answer "
        f"({plural(prompts, 'prompt')}, {ways}, {min(counts)} to {max(counts)} pieces each)"
    )
    return result(NAME, detail, findings, streams=len(answers), equal=equal, pieces=counts)


async def is_decoupled(subject: Subject, client: LLMClient, model: str) -> bool:
    config = await client.model_config(model, timeout_s=subject.lookup_s)
    return bool(config.get("model_transaction_policy", {}).get("decoupled", False))


def _judge(answer: _Answer) -> Iterator[Finding]:
    place = f"{answer.place} {short(answer.prompt)}"
    streamed = "".join(answer.pieces)
    if streamed != answer.whole:
        at = next((i for i, (a, b) in enumerate(zip(streamed, answer.whole, strict=False)) if a != b), None)
        at = min(len(streamed), len(answer.whole)) if at is None else at
        cause = (
            f"the streamed text differs from the whole answer at character {at}: "
            f"{short(streamed[at : at + 20])} instead of {short(answer.whole[at : at + 20])}"
        )
        yield Finding("TK721", "error", place, cause, _why(answer, streamed))
    # One token is never several words, so an answer of several words has come in several pieces.
    if len(answer.pieces) < 2 and len(answer.whole.split()) > 1:
        cause = f"{plural(len(answer.pieces), 'piece')} for {short(answer.whole)}: it does not come as it is made"
        fix = "set serving.streaming: true, generate the repository again; see whether a proxy buffers"
        yield Finding("TK722", "error", place, cause, fix)

    said = [ending for ending in answer.endings if ending is not None]
    if answer.told != Ending() and (said != [answer.told] or answer.endings[-1] is None):
        cause = f"of the whole answer is told {answer.told}, of the stream {said or 'nothing'}"
        fix = "let the last piece, and no other, carry finish_reason and the counts of tokens"
        yield Finding("TK724", "error", place, cause, fix)


def _why(answer: _Answer, streamed: str) -> str:
    """The likely cause of a difference."""
    if streamed.count(REPLACEMENT) > answer.whole.count(REPLACEMENT):
        return "characters are cut between pieces: detokenise statefully, as the generated postprocessing model does"
    if sorted(streamed) == sorted(answer.whole):
        return "the pieces come in the wrong order: run one instance of postprocessing"
    if streamed.replace(" ", "") == answer.whole.replace(" ", ""):
        return "spaces get lost between pieces: detokenise statefully, as the generated postprocessing model does"
    if answer.pieces and answer.pieces[-1] == answer.whole:
        return "each piece repeats the whole text so far: send only what is new (accumulate_tokens off)"
    return "send the request again: if whole answers differ among themselves, the engine is not deterministic"


def _across(answers: list[_Answer]) -> Iterator[Finding]:
    """Differences between the protocols' whole answers."""
    first: dict[tuple[str, str], _Answer] = {}
    for answer in answers:
        known = first.setdefault((answer.model, answer.prompt), answer)
        if known.whole != answer.whole:
            cause = (
                f"{answer.protocol} answers {short(answer.whole)}, {known.protocol} answers {short(known.whole)}, "
                "to the same greedy request"
            )
            fix = "batch-dependent kernels can do this to near ties; otherwise compare what both send"
            yield Finding("TK723", "error", f"{answer.model} {short(answer.prompt)}", cause, fix)
