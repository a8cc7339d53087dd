"""SARIF, the lines that findings name, the options of `trtkit repo lint`, and that every rule has a case."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from lint_cases import CODE, MODEL
from lint_corpus import CORPUS
from lint_mutations import mutant
from test_lint import CASES
from test_lint_engine import ENGINES, TOKENIZERS

from trtkit import pbtxt
from trtkit.cli.repo import command
from trtkit.findings import Finding
from trtkit.repository.lint import RULES, lint_repository
from trtkit.repository.lint.parse import parse
from trtkit.repository.lint.positions import line_numbers
from trtkit.repository.lint.sarif import to_sarif


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository in a git checkout, with an error and a warning."""
    (tmp_path / ".git").mkdir()
    folder = tmp_path / "my models" / "m" / "1"
    folder.mkdir(parents=True)
    (folder.parent / "config.pbtxt").write_text(MODEL.replace("count: 1", "count: 0") + "dynamic_batching {\n}\n")
    (folder / "model.py").write_text("def f(:\n" + CODE)
    return tmp_path / "my models"


def test_every_rule_has_a_case() -> None:
    elsewhere = {  # with tests of their own
        *("TK181", "TK182", "TK183", "TK184", "TK185", "TK207", "TK221", "TK222", "TK223"),
        *("TK231", "TK232", "TK233", "TK241", "TK242", "TK243"),
    }
    tables = {case.expected for case in CASES} | {case.rule for case in CORPUS}
    tables |= {row[0] for row in ENGINES} | {row[0] for row in TOKENIZERS}
    assert tables - {""} | elsewhere == set(RULES)


def test_sarif(repository: Path) -> None:
    findings = lint_repository(repository)
    log = json.loads(json.dumps(to_sarif(findings, repository)))
    assert log["version"] == "2.1.0"
    assert log["$schema"].endswith("sarif-schema-2.1.0.json")
    (run,) = log["runs"]
    driver = run["tool"]["driver"]
    assert driver["name"] == "trtkit"
    assert [rule["id"] for rule in driver["rules"]] == list(RULES)
    assert len(run["results"]) == len(findings) == 2
    for result, finding in zip(run["results"], findings, strict=True):
        assert result["ruleId"] == finding.id == driver["rules"][result["ruleIndex"]]["id"]
        assert result["level"] == finding.severity
        assert result["message"]["text"] == f"{finding.cause}; fix: {finding.fix}"
    places = [result["locations"][0]["physicalLocation"] for result in run["results"]]
    assert [(p["artifactLocation"]["uri"], p["region"]["startLine"]) for p in places] == [
        ("my%20models/m/1/model.py", 1),
        ("my%20models/m/config.pbtxt", 5),
    ]


def test_sarif_of_what_has_no_line_or_is_elsewhere(repository: Path, tmp_path: Path) -> None:
    elsewhere = Finding("TK133", "error", "/nowhere/engine/config.json", "c", "f")
    server = Finding("TK182", "error", "server", "c", "f")
    results = to_sarif([elsewhere, server], repository)["runs"][0]["results"]
    first, second = (item["locations"][0]["physicalLocation"] for item in results)
    assert first["artifactLocation"]["uri"] in ("file:///nowhere/engine/config.json", "my%20models")
    assert second["region"] == {"startLine": 1}


def test_sarif_without_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "m").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    (result,) = to_sarif(lint_repository(Path("models")), Path("models"))["runs"][0]["results"]
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "models/m"


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(command, ["lint", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_command(repository: Path, tmp_path: Path) -> None:
    code, out, _ = run(str(repository), "--sarif", str(tmp_path / "lint.sarif"))
    assert code == 1
    assert "TK108" in out
    assert len(json.loads((tmp_path / "lint.sarif").read_text())["runs"][0]["results"]) == 2
    code, out, _ = run(str(repository), "--sarif")
    assert (code, json.loads(out)["version"]) == (1, "2.1.0")
    code, out, _ = run(str(repository), "--json")
    assert (code, [item["id"] for item in json.loads(out)]) == (1, ["TK108", "TK166"])
    assert run(str(repository), "--json", "--sarif")[0] == 2
    (repository / "m/1/model.py").write_text(CODE)
    code, out, _ = run(str(repository))
    assert (code, "TK166" in out) == (0, True)
    assert run()[0] == 2


def test_the_command_knows_the_server_of_a_build_config(repository: Path, tmp_path: Path) -> None:
    (repository / "m/1/model.py").write_text(CODE)
    text = MODEL.replace("KIND_CPU", "KIND_GPU gpus: 2")
    (repository / "m/config.pbtxt").write_text(text)
    config = tmp_path / "build.yaml"
    config.write_text("name: t\nmodel: {source: x}\ndeploy: {target: docker, gpus: '4,5'}\n")
    assert run(str(repository))[0] == 0
    code, out, _ = run(str(repository), "--config", str(config), "--json")
    assert (code, [item["id"] for item in json.loads(out)]) == (1, ["TK167"])
    config.write_text("name: t\nmodel: {source: x}\ndeploy: {target: docker, host: 0.0.0.0, model_control: poll}\n")
    code, out, _ = run(str(repository), "--config", str(config), "--json")
    assert (code, [item["id"] for item in json.loads(out)]) == (0, ["TK182"])


def test_lines_of_fields() -> None:
    text = """name: "a" # x {
input [
  { name: 'x'
    dims: [ -1,
      3 ] },
  < name: "y" dims: 4 reshape { } >
]
input { name: "}" "z" }
max_batch_size: 8
"""
    lines = line_numbers(text)
    expected = {"input[0]": 3, "input[0].dims[1]": 5, "input[1].reshape": 6, "input[2].name": 8, "max_batch_size": 9}
    assert {field: lines[field] for field in expected} == expected
    assert "input[3]" not in lines
    assert lines["input"] == 3


@given(text=st.text(alphabet="ab:{}<>[]\"'#\n \\1", max_size=60))
def test_lines_of_any_text(text: str) -> None:
    assert all(1 <= line <= text.count("\n") + 1 for line in line_numbers(text).values())


@given(seed=st.integers(0, 2**32), tail=st.sampled_from(["", "max_batch_size: 0\n", "nope: 1\n", "parameters {\n}\n"]))
@settings(max_examples=100)
def test_a_parsed_block_is_what_the_parser_says(seed: int, tail: str) -> None:
    for name, content in mutant(seed).items():
        if name.endswith("config.pbtxt"):
            assert _outcome(parse, str(content) + tail) == _outcome(pbtxt.loads, str(content) + tail)
            try:
                printed = pbtxt.dumps(pbtxt.loads(str(content)))
            except pbtxt.PbtxtError:
                continue
            assert _outcome(parse, printed + tail) == _outcome(pbtxt.loads, printed + tail)


def _outcome(function: object, text: str) -> object:
    try:
        return function(text, "file")  # type: ignore[operator]
    except pbtxt.PbtxtError as error:
        return str(error)
