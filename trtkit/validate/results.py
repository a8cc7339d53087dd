"""What is checked, and what a check has to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trtkit.client.api import ENGINE, ENSEMBLE, GenerateRequest
from trtkit.config import ValidationConfig
from trtkit.findings import Finding, has_errors

LOOKUP_S = 10.0

Outcome = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Subject:
    """A served model and what is known about it. None means unknown, and checks that need it say that they skip it.

    Attributes:
        model: takes and returns text.
        engine: takes and returns tokens; None where `model` drives the engine in its own process.
        prompts: sent in turn.
        max_tokens: generated per prompt.
        source: folder of the Hugging Face checkpoint that the served model was made from.
        dtype: of the checkpoint: `float32`, `float16` or `bfloat16`.
        streaming: whether the models should be decoupled.
        max_batch_size: what the models should take.
        max_running: requests that the engine runs at once, where that is more than `max_batch_size`.
        max_input_len: longest prompt in tokens that the server should take.
        max_seq_len: longest prompt and answer together.
        chat_template: Jinja file that is served instead of the source's own.
        add_special_tokens: the server lets the tokenizer add its begin-of-sequence token.
        trust_remote_code: run Python code that comes with the source.
        timeout_s: every request must be answered within this time.
    """

    model: str = ENSEMBLE
    engine: str | None = ENGINE
    prompts: Sequence[str] = tuple(ValidationConfig().prompts)
    max_tokens: int = ValidationConfig().max_tokens
    source: Path | None = None
    dtype: str | None = None
    streaming: bool | None = None
    max_batch_size: int | None = None
    max_running: int | None = None
    max_input_len: int | None = None
    max_seq_len: int | None = None
    chat_template: Path | None = None
    add_special_tokens: bool = True
    trust_remote_code: bool = False
    timeout_s: float = 60.0

    @property
    def lookup_s(self) -> float:
        """Time limit of questions about the server, which need no model's work."""
        return min(self.timeout_s, LOOKUP_S)

    def request(self, prompt: str, max_tokens: int | None = None) -> GenerateRequest:
        """A greedy request."""
        return GenerateRequest(prompt, max_tokens=self.max_tokens if max_tokens is None else max_tokens, top_k=1)


@dataclass(frozen=True)
class CheckResult:
    """One check's answer.

    Attributes:
        detail: what was found, in one line with figures.
        findings: what is wrong or worth knowing; an error among them fails the check.
        figures: the numbers behind `detail`, for programs.
    """

    name: str
    outcome: Outcome
    detail: str
    findings: Sequence[Finding] = ()
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong; a skipped check found nothing wrong."""
        return self.outcome != "failed"

    def to_dict(self) -> dict[str, Any]:
        findings = [finding.to_dict() for finding in self.findings]
        return {
            "name": self.name,
            "outcome": self.outcome,
            "detail": self.detail,
            "figures": self.figures,
            "findings": findings,
        }


def result(name: str, detail: str, findings: Sequence[Finding] = (), **figures: Any) -> CheckResult:
    """The result of a check that ran: failed when a finding is an error."""
    outcome: Outcome = "failed" if has_errors(list(findings)) else "passed"
    return CheckResult(name, outcome, detail, tuple(findings), figures)


def skipped(name: str, why: str) -> CheckResult:
    return CheckResult(name, "skipped", why)


def short(text: str, limit: int = 40) -> str:
    """A text for one line of output: quoted, with control characters escaped, its middle left out when it is long."""
    if len(text) > limit:
        text = f"{text[: limit // 2]}…{text[-(limit // 2 - 1) :]}"
    return repr(text)


def plural(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
