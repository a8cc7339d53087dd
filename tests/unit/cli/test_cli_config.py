from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trtkit import config_file
from trtkit.cli import main
from trtkit.config import BuildConfig
from trtkit.config_file import load_config

NAME = "llama-3.1-8b-fp16"
GOOD = "name: good\nmodel: {source: owner/name}\n"


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def trtkit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`trtkit("config", "ls")` runs the command in an empty folder and returns exit code, stdout and stderr."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr("signal.signal", lambda *_: None)  # the handler belongs to a process of its own

    def run(*args: str) -> Result:
        with pytest.raises(SystemExit) as stop:
            main(list(args))
        captured = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return Result(stop.value.code, captured.out, captured.err)

    return run


def test_ls_lists_every_config(trtkit: Any) -> None:
    result = trtkit("config", "ls", "--json")
    rows = json.loads(result.out)
    folder = config_file._config_folder()
    assert [row["name"] for row in rows] == sorted(file.stem for file in folder.glob("*.yaml"))
    row = next(row for row in rows if row["name"] == "llama-3.1-70b-bf16-tp4-pp2")
    assert (row["dtype"], row["tp"], row["pp"], row["runtime"]) == ("bfloat16", 4, 2, "tensorrtllm")
    assert row["about"].startswith("Llama 3.1 70B")
    table = trtkit("config", "ls")
    assert (table.code, table.err) == (0, "")
    assert NAME in table.out


def test_configs_are_found_in_an_installed_package(tmp_path: Path) -> None:
    package = tmp_path / "site-packages" / "trtkit"
    assert config_file._config_folder(package) == tmp_path / "site-packages" / "build_configs"
    (package / "_data" / "build_configs").mkdir(parents=True)
    assert config_file._config_folder(package) == package / "_data" / "build_configs"


def test_an_incomplete_package_is_said_to_be_one(trtkit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_file, "_config_folder", lambda: tmp_path / "nothing")
    result = trtkit("config", "ls")
    assert (result.code, result.out) == (3, "")
    assert "no build configs in" in result.err


def test_cp_copies_here_and_never_overwrites(trtkit: Any) -> None:
    result = trtkit("config", "cp", NAME)
    assert (result.code, result.out) == (0, f"{NAME}.yaml\n")
    copy = Path(f"{NAME}.yaml")
    assert copy.read_bytes() == (config_file._config_folder() / copy.name).read_bytes()
    copy.write_text("mine")
    refused = trtkit("config", "cp", NAME)
    assert (refused.code, copy.read_text()) == (2, "mine")
    assert "--force" in refused.err
    assert trtkit("config", "cp", NAME, "--force").code == 0
    assert copy.read_text() != "mine"


@pytest.mark.parametrize(("dest", "file"), [("sub/my.yaml", "sub/my.yaml"), ("folder", f"folder/{NAME}.yaml")])
def test_cp_to_a_file_or_a_folder(trtkit: Any, dest: str, file: str) -> None:
    Path("folder").mkdir()
    assert trtkit("config", "cp", f"{NAME}.yaml", dest).out == f"{file}\n"
    assert load_config(file).name == NAME


def test_cp_dry_run_writes_nothing(trtkit: Any) -> None:
    result = trtkit("config", "cp", NAME, "--dry-run")
    assert (result.code, result.out) == (0, "")
    assert f"would write {NAME}.yaml" in result.err
    assert list(Path.cwd().iterdir()) == []


def test_cp_of_an_unknown_name_suggests_a_near_one(trtkit: Any) -> None:
    result = trtkit("config", "cp", "llama-3.1-8b-fp15")
    assert result.code == 2
    assert f"did you mean '{NAME}'" in result.err


@pytest.mark.parametrize("folder", ["model", "mo'del", "mo:del #1"])
def test_a_copy_finds_a_source_that_stands_beside_the_original(
    trtkit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    ready = tmp_path / "ready"
    (tmp_path / folder).mkdir()
    ready.mkdir()
    text = f'# About.\nname: near\nmodel:\n  source: "../{folder}"   # kept\n  revision: null\n'
    (ready / "near.yaml").write_text(text)
    monkeypatch.setattr(config_file, "_config_folder", lambda: ready)
    assert trtkit("config", "cp", "near", "far/away.yaml").code == 0
    assert load_config("far/away.yaml").model.source == str(tmp_path / folder)
    copied = Path("far/away.yaml").read_text().splitlines()
    assert copied[:3] + copied[4:] == text.splitlines()[:3] + text.splitlines()[4:]
    assert copied[3].endswith("   # kept")


def test_check_says_ok(trtkit: Any) -> None:
    Path("a.yaml").write_text(GOOD)
    Path("b.yaml").write_text(GOOD)
    result = trtkit("config", "check", "a.yaml", "b.yaml")
    assert (result.code, result.out, result.err) == (0, "a.yaml: ok\nb.yaml: ok\n", "")
    assert json.loads(trtkit("config", "check", "a.yaml", "--json").out) == [
        {"file": "a.yaml", "ok": True, "problems": []}
    ]


WRONG = {
    "keys.yaml": ("name: x\nmodle: {source: a/b}\n", ["keys.yaml:2: unknown key 'modle', did you mean 'model'?"]),
    "syntax.yaml": ("name: [\n", ["syntax.yaml:2: not valid YAML"]),
    "release.yaml": (GOOD + 'deploy: {release: "24.10"}\n', ["release.yaml: TensorRT-LLM 0.14.0 is too old"]),
    "unreleased.yaml": (GOOD + 'deploy: {release: "99.01"}\n', ["unreleased.yaml: no release '99.01'"]),
    "fusion.yaml": (GOOD + "engine: {reduce_fusion: true}\n", ["fusion.yaml: engine.reduce_fusion fuses"]),
    "source.yaml": ("name: x\nmodel: {source: ./none}\n", ["source.yaml: model.source: no folder './none'"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_check_names_what_is_wrong(trtkit: Any, name: str) -> None:
    text, expected = WRONG[name]
    Path(name).write_text(text)
    result = trtkit("config", "check", name)
    assert (result.code, result.out) == (2, "")
    for line in expected:
        assert f"error: {line}" in result.err


def test_check_names_every_problem_of_every_file(trtkit: Any) -> None:
    for name, (text, _) in WRONG.items():
        Path(name).write_text(text)
    Path("good.yaml").write_text(GOOD)
    result = trtkit("config", "check", "none.yaml", *WRONG, "good.yaml")
    assert (result.code, result.out) == (2, "good.yaml: ok\n")
    assert "cannot read none.yaml" in result.err
    for name in WRONG:
        assert f"error: {name}:" in result.err
    as_json = trtkit("config", "check", *WRONG, "good.yaml", "--json")
    assert as_json.code == 2
    rows = json.loads(as_json.out)
    assert [row["ok"] for row in rows] == [False] * len(WRONG) + [True]
    assert all(row["problems"] for row in rows[:-1])


def test_the_reference_runtime_needs_no_engine(trtkit: Any) -> None:
    Path("a.yaml").write_text(GOOD + "engine: {reduce_fusion: true}\nserving: {runtime: reference}\n")
    assert trtkit("config", "check", "a.yaml").code == 0


def test_schema_is_the_json_schema_of_a_build_config(trtkit: Any) -> None:
    assert json.loads(trtkit("config", "schema").out) == BuildConfig.model_json_schema()


def test_every_command_has_an_example(trtkit: Any) -> None:
    for words in (["config"], *(["config", name] for name in ("ls", "cp", "check", "schema"))):
        assert "Example:" in trtkit(*words, "--help").out


def test_as_a_process(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("name: x\n")
    command = [sys.executable, "-m", "trtkit", "config", "check", "bad.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "error: bad.yaml:1: required key 'model' is missing",
        "  fix: `trtkit config schema` shows every key, its type and range",
    ]
