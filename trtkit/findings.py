"""Findings: what a linter, a doctor or a validator has to say, in one shape."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

Severity = Literal["error", "warning", "info"]


@dataclass(frozen=True, order=True)
class Finding:
    """One result of a check.

    Attributes:
        id: stable identifier such as `TK101`, for documentation and for switching a rule off.
        severity: `error` stops the work, `warning` and `info` do not.
        place: file (with line where there is one), model or tensor.
        cause: what is wrong.
        fix: what to do about it.
    """

    id: str
    severity: Severity
    place: str
    cause: str
    fix: str = ""

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def has_errors(findings: list[Finding]) -> bool:
    return any(finding.severity == "error" for finding in findings)
