"""What the linter says about the corpus. tests/integration/test_lint_server.py asks a real server about the same."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lint_cases import EMBEDDED, Case
from lint_corpus import CORPUS
from lint_mutations import STATEFUL, mutant, mutate

from trtkit.findings import has_errors
from trtkit.repository.lint import RULES, lint_repository


@pytest.mark.parametrize("case", CORPUS, ids=lambda case: case.name)
def test_the_corpus(tmp_path: Path, case: Case) -> None:
    case.write(tmp_path, "c_")
    findings = lint_repository(tmp_path, server=EMBEDDED)
    rules = {finding.id for finding in findings if finding.severity != "info"}
    assert case.rule in rules if case.rule else not rules, findings
    assert has_errors(findings) == (case.says is not None or bool(case.but)), findings
    for finding in findings:
        assert finding.id in RULES
        assert finding.cause
        assert finding.fix
        assert "\n" not in finding.cause + finding.fix + finding.place


def test_names_are_unique() -> None:
    assert len({case.name for case in CORPUS}) == len(CORPUS)


@given(seed=st.integers(0, 2**32))
@settings(max_examples=150)
def test_a_random_change_breaks_no_rule(seed: int) -> None:
    """The linter answers whatever the config says, and names a line that is there."""
    with tempfile.TemporaryDirectory() as folder:
        Case("mutant", mutant(seed)).write(Path(folder), "c_")
        for finding in lint_repository(Path(folder), server=EMBEDDED):
            file, _, line = finding.place.partition(":")
            if line:
                assert 1 <= int(line) <= len((Path(folder) / file).read_text().splitlines()) + 1


def test_mutations_change_something() -> None:
    changed = sum(mutate(STATEFUL, random.Random(seed)) != mutate(STATEFUL, random.Random(0)) for seed in range(1, 50))
    assert changed > 40
