"""Findings as SARIF 2.1.0, which code review tools show beside the lines.

Format: OASIS, Static Analysis Results Interchange Format (SARIF) Version 2.1.0, and its JSON schema.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from trtkit import __version__
from trtkit.findings import Finding
from trtkit.repository.lint.rules import RULES

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_LEVELS = {"error": "error", "warning": "warning", "info": "note"}
_BASE = "SRCROOT"


def to_sarif(findings: Sequence[Finding], repository: Path) -> dict[str, Any]:
    """The findings of a model repository as one SARIF log. Paths are relative to the git checkout around the model
    repository, or else to the working directory, or to the repository itself."""
    root = _root(repository)
    rules = list(RULES)
    return {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "trtkit",
                        "semanticVersion": __version__,
                        "rules": [_rule(name) for name in rules],
                    }
                },
                "columnKind": "unicodeCodePoints",
                "results": [_result(item, rules.index(item.id), repository, root) for item in findings],
            }
        ],
    }


def _rule(name: str) -> dict[str, Any]:
    rule = RULES[name]
    return {
        "id": name,
        "shortDescription": {"text": rule.title},
        "defaultConfiguration": {"level": _LEVELS[rule.severity]},
    }


def _result(item: Finding, index: int, repository: Path, root: Path) -> dict[str, Any]:
    match = re.fullmatch(r"(.*?)(?::(\d+))?", item.place, re.DOTALL)
    place, line = (match.group(1), match.group(2)) if match else (item.place, None)
    return {
        "ruleId": item.id,
        "ruleIndex": index,
        "level": _LEVELS[item.severity],
        "message": {"text": f"{item.cause}; fix: {item.fix}" if item.fix else item.cause},
        "locations": [
            {
                "physicalLocation": {
                    "artifactLocation": _location(repository, place, root),
                    "region": {"startLine": int(line or 1)},
                }
            }
        ],
    }


def _location(repository: Path, place: str, root: Path) -> dict[str, str]:
    """A path below the root; an engine may be elsewhere, and then stands for itself. What is no file, such as the
    server, is shown at the repository."""
    path = Path(os.path.abspath(repository / place))  # noqa: PTH100 - links stay as they are in the checkout
    if not path.exists() and not path.parent.exists():
        path = Path(os.path.abspath(repository))  # noqa: PTH100
    if path.is_relative_to(root):
        return {"uri": quote(path.relative_to(root).as_posix()), "uriBaseId": _BASE}
    return {"uri": path.as_uri()}


def _root(repository: Path) -> Path:
    path = Path(os.path.abspath(repository))  # noqa: PTH100
    for folder in (path, *path.parents):
        if (folder / ".git").exists():
            return folder
    return Path.cwd() if path.is_relative_to(Path.cwd()) else path
