"""The linter and a real Triton server agree: what the server refuses is an error, and what it serves is none."""

from __future__ import annotations

import http.client
import random
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from triton_process import Server, serve

from trtkit.findings import Finding, has_errors
from trtkit.repository.lint import lint_repository

sys.path.append(
    str(Path(__file__).parents[1] / "unit" / "repository")
)  # the corpus, which tests without a server use too
from lint_cases import EMBEDDED, Case
from lint_corpus import CORPUS
from lint_mutations import mutant

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.xdist_group("repository_server")]

ENDLESS, FATAL = "the load never ends", "it ends the server"
MUTANTS = 120


def load(server: Server, name: str) -> tuple[int, str]:
    """Status of loading a model, and what the server says meanwhile in its answer and its log."""
    before = server.log.stat().st_size
    status, answer = server.http(f"repository/models/{name}/load", {}, timeout=20)
    with server.log.open("rb") as log:
        log.seek(before)
        return status, answer + log.read().decode(errors="replace")


def disagreement(case: Case, findings: list[Finding], status: int, said: str) -> str:
    """What is not as the case says; empty when all is."""
    told = f"linter {sorted({finding.id for finding in findings})}, server {status} {said[-400:]}"
    if case.but:  # the linter knows better than the server
        return "" if has_errors(findings) and status in (0, 200) else f"not as said: {told}"
    if status == 0 and has_errors(findings):
        return ""  # no answer is no service either
    if has_errors(findings) == (status == 200):
        return f"disagree: {told}"
    if (case.says is None) != (status == 200) or (case.says or "").lower() not in said.lower():
        return f"expected {case.says!r}: {told}"
    return ""


class Loader:
    """A server that is asked to load models. Now and then, and for no fault of the model that is asked for, a 2.51 dies
    while it unloads another or never answers: then another one is started and asked once more."""

    def __init__(self, work: Path) -> None:
        self.work, self.starts = work, 0
        self.stack = ExitStack()
        self.start()

    def start(self) -> None:
        self.stack.close()
        self.starts += 1
        self.folder = self.work / str(self.starts) / "served"
        self.folder.mkdir(parents=True)
        self.server = self.stack.enter_context(serve(self.folder, self.folder.parent, "--model-control-mode=explicit"))

    def load(self, case: Case, prefix: str) -> tuple[int, str]:
        for _ in range(2):
            case.write(self.folder, prefix)
            try:
                answer = load(self.server, case.load.replace("~", prefix))
                for path in self.folder.glob(f"{prefix}*"):
                    self.server.http(f"repository/models/{path.name}/unload", {})
            except OSError:
                self.start()
            else:
                return answer
        return 0, "no answer, twice"


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loader]:
    loader = Loader(tmp_path_factory.mktemp("corpus"))
    with loader.stack:
        yield loader


def judge(loader: Loader, case: Case, prefix: str, alone: Path) -> tuple[list[Finding], int, str]:
    """What the linter and the server say about a case."""
    case.write(alone, prefix)
    findings = lint_repository(alone, server=EMBEDDED)
    if case.but in (ENDLESS, FATAL):
        return findings, 0, ""
    return findings, *loader.load(case, prefix)


def test_the_corpus(loader: Loader, tmp_path: Path) -> None:
    surprises = []
    for number, case in enumerate(CORPUS):
        findings, status, said = judge(loader, case, f"c{number}_", tmp_path / str(number))
        if problem := disagreement(case, findings, status, said):
            surprises.append(f"{case.name}: {problem}")
    assert not surprises, "\n".join([f"{len(surprises)} of {len(CORPUS)}", *surprises])


def test_random_changes(loader: Loader, tmp_path: Path) -> None:
    """The seeds differ from run to run; a failure names the seed of the mutant."""
    first = random.randrange(10**6) * MUTANTS
    surprises: list[str] = []
    refused = 0
    for seed in range(first, first + MUTANTS):
        case = Case(str(seed), mutant(seed))
        if _is_dangerous(case, tmp_path / f"before{seed}"):
            continue
        findings, status, said = judge(loader, case, f"m{seed}_", tmp_path / str(seed))
        refused += status != 200
        # What shows in answers only: a stream out of order, a tensor that is an input and comes from a step.
        known = {"TK153", "TK156"} if status == 200 else set()
        if has_errors([finding for finding in findings if finding.id not in known]) == (status == 200):
            surprises.append(f"seed {seed}: {findings}, server {status} {said[-400:]}")
    assert not surprises, "\n".join(surprises)
    assert 0 < refused < MUTANTS


def _is_dangerous(case: Case, folder: Path) -> bool:
    """Whether the server would hang, or end."""
    case.write(folder, "x_")
    findings = lint_repository(folder, server=EMBEDDED)
    shutil.rmtree(folder)
    return any(item.id in {"TK107", "TK178"} or "would hang" in item.cause for item in findings)


def test_what_ends_the_server(tmp_path: Path) -> None:
    (case,) = (case for case in CORPUS if case.but == FATAL)
    (tmp_path / "served").mkdir()
    with serve(tmp_path / "served", tmp_path, "--model-control-mode=explicit") as doomed:
        case.write(tmp_path / "served", "x_")
        with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
            load(doomed, "x_m")
        assert doomed.process.wait(20) < 0
