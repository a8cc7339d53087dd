"""The linter and a real Triton server agree: what the server refuses is an error, and what it serves is none."""

from __future__ import annotations

from pathlib import Path

import pytest
from lint_corpus import CORPUS, Case
from triton_process import Server, serve

from trtkit.findings import Finding, has_errors
from trtkit.repository.lint import Server as Known
from trtkit.repository.lint import lint_repository

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("repository_server")]

EMBEDDED = Known(release="24.10", gpus=0, cache=False, backends=frozenset({"python"}), agents=frozenset(), is_local=True)
"""What nvidia-pytriton's server is: 2.51 of release 24.10, with the python backend alone."""


def load(server: Server, name: str) -> tuple[int, str]:
    """Status of loading a model, and what the server says meanwhile in its answer and its log."""
    before = server.log.stat().st_size
    status, answer = server.http(f"repository/models/{name}/load", {}, timeout=30)
    with server.log.open("rb") as log:
        log.seek(before)
        return status, answer + log.read().decode(errors="replace")


def unload(server: Server, folder: Path) -> None:
    for path in folder.iterdir():
        server.http(f"repository/models/{path.name}/unload", {})


def disagreement(case: Case, findings: list[Finding], status: int, said: str) -> str:
    """What is not as the case says; empty when all is."""
    rules = {finding.id for finding in findings if finding.severity != "info"}
    told = f"linter {sorted(rules)}, server {status} {said[-400:]}"
    if case.rule and case.rule not in rules:
        return f"no {case.rule}: {told}"
    if not case.rule and rules:
        return f"findings: {told}"
    if case.but:
        return "" if has_errors(findings) and status in (0, 200) else f"not as said: {told}"
    if has_errors(findings) == (status == 200):
        return f"disagree: {told}"
    if (case.says is None) != (status == 200) or (case.says or "").lower() not in said.lower():
        return f"expected {case.says!r}: {told}"
    return ""


@pytest.mark.slow
def test_the_corpus(tmp_path: Path) -> None:
    served = tmp_path / "served"
    served.mkdir()
    surprises = []
    with serve(served, tmp_path, "--model-control-mode=explicit") as server:
        for number, case in enumerate(CORPUS):
            prefix = f"c{number}_"
            alone = tmp_path / f"alone{number}"
            case.write(alone, prefix)
            findings = lint_repository(alone, server=EMBEDDED)
            status, said = 0, ""
            if not case.but.startswith(("the load never", "it ends")):
                case.write(served, prefix)
                status, said = load(server, case.load.replace("~", prefix))
                unload(server, alone)
            if problem := disagreement(case, findings, status, said):
                surprises.append(f"{case.name}: {problem}")
        assert server.process.poll() is None
    assert not surprises, "\n".join([f"{len(surprises)} of {len(CORPUS)}", *surprises])
