"""Versions of a model: whole or not there, never overwritten, and nothing that a polling server would trip over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from trtkit import bytecode, pbtxt
from trtkit.cli.repo import command
from trtkit.errors import CheckFailedError, InputError
from trtkit.repository import swap, version_policy, versions

CONFIG = """# Serves texts.
# Ask Ada before you change it.
name: "llm"
backend: "python"
max_batch_size: 4
input [{name: "x" data_type: TYPE_INT32 dims: [-1]}]
output [{name: "y" data_type: TYPE_INT32 dims: [-1]}]
"""
MODEL = "class TritonPythonModel:\n    def execute(self, requests):\n        return []\n"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    root = tmp_path / "sp ace" / "models"
    write(root / "llm" / "1")
    (root / "llm" / "config.pbtxt").write_text(CONFIG)
    return root


def write(folder: Path, code: str = MODEL) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(code)
    return folder


def policy(models: Path) -> str:
    return version_policy.policy_text(pbtxt.load(models / "llm" / "config.pbtxt"))


def tree(root: Path) -> dict[str, tuple[int, bytes]]:
    found = {}
    for path in sorted(root.rglob("*")):
        content = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(root))] = (path.stat().st_mtime_ns, content)
    return found


def test_adds_the_next_number(models: Path, tmp_path: Path) -> None:
    new = write(tmp_path / "new", MODEL + "# new\n")
    (new / "serving").mkdir()
    (new / "serving" / "text.py").write_text("x = 1\n")
    (new / "__pycache__").mkdir()
    (new / "__pycache__" / "stale.cpython-311.pyc").write_bytes(b"")
    os.utime(new / "model.py", (10, 10))
    change = versions.add_version(models, "llm", new)
    assert (change.version, change.versions, change.serves, change.serves_before) == (2, (1, 2), (2,), (1,))
    assert (change.files, change.done, change.findings) == (2, True, ())
    added = models / "llm" / "2"
    assert (added / "model.py").read_text() == (new / "model.py").read_text()
    assert (added / "model.py").stat().st_mtime > 1e9, "its time is that of the copy"
    assert not list(added.rglob("stale*"))
    assert sorted(path.name for path in models.parent.iterdir()) == ["models"]
    assert sorted(path.name for path in (models / "llm").iterdir()) == ["1", "2", "config.pbtxt"]
    assert versions.add_version(models, "llm", new, version=7).versions == (1, 2, 7)
    assert versions.add_version(models, "llm", new).version == 8


def test_bytecode_is_there_before_a_server_writes_it(models: Path, tmp_path: Path) -> None:
    """A second import, also of a moved copy, writes nothing: a polling server would take that for a change."""
    added = models / "llm" / "2"
    versions.add_version(models, "llm", write(tmp_path / "new"))
    before = tree(models)
    code = "import sys; sys.path.insert(0, sys.argv[1]); import model; print(model.__cached__)"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code, str(added)], check=True, capture_output=True, timeout=60)
    assert tree(models) == before
    bytecode.compile_models(models)
    assert list((models / "llm" / "1").rglob("*.pyc"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"version": 1}, "has a version 1 already"),
        ({"version": 0}, "0 is no version number"),
        ({"version": 2**63}, "is no version number"),
        ({"model": "nope"}, "has no model 'nope'"),
        ({"model": "../models/llm"}, "has no model"),
        ({"folder": "missing"}, "is no folder"),
        ({"folder": "empty"}, "holds no files"),
        ({"folder": "fifo"}, "neither a file nor a folder"),
        ({"folder": "linked"}, "neither a file nor a folder"),
        ({"folder": "models/llm"}, "is a model's directory"),
    ],
)
def test_refusals_change_nothing(models: Path, tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    places = {"models/llm": models / "llm", None: write(tmp_path / "new")}
    (tmp_path / "empty").mkdir()
    os.mkfifo(write(tmp_path / "fifo") / "pipe")
    (write(tmp_path / "linked") / "link").symlink_to(tmp_path / "new")
    name = arguments.pop("folder", None)
    before = tree(models)
    with pytest.raises(InputError, match=message):
        versions.add_version(models, arguments.pop("model", "llm"), places.get(name, tmp_path / str(name)), **arguments)
    assert tree(models) == before
    assert [path.name for path in models.parent.iterdir()] == ["models"]


def test_what_the_linter_refuses(models: Path, tmp_path: Path) -> None:
    broken = write(tmp_path / "broken", "class TritonPythonModel\n")
    before = tree(models)
    with pytest.raises(CheckFailedError, match=r"version 2 of 'llm' would not be served: TK\d+ .*"):
        versions.add_version(models, "llm", broken)
    assert tree(models) == before
    versions.set_policy(models, "llm", "specific:1")
    with pytest.raises(CheckFailedError, match="version 2 of 'llm' would not be served"):
        versions.add_version(models, "llm", broken)  # nobody serves it yet, but it is looked at
    assert versions.add_version(models, "llm", broken, force=True).serves == (1,)
    good = write(tmp_path / "good")  # what is wrong already is no reason against another version
    versions.set_policy(models, "llm", "all")
    assert versions.add_version(models, "llm", good).version == 3


def test_dry_runs(models: Path, tmp_path: Path) -> None:
    new = write(tmp_path / "new")
    before = tree(models)
    change = versions.add_version(models, "llm", new, dry_run=True)
    assert (change.version, change.serves, change.done) == (2, (2,), False)
    change = versions.set_policy(models, "llm", "all", dry_run=True)
    assert (change.policy, change.policy_before, change.done) == ("all", "latest:1", False)
    assert tree(models) == before
    versions.add_version(models, "llm", new)
    before = tree(models)
    assert versions.rollback(models, "llm", dry_run=True).serves == (1,)
    assert tree(models) == before


def test_policies(models: Path, tmp_path: Path) -> None:
    for _ in range(3):
        versions.add_version(models, "llm", models / "llm" / "1")
    assert versions.set_policy(models, "llm", "latest:2").serves == (3, 4)
    text = (models / "llm" / "config.pbtxt").read_text()
    assert text.startswith("# Serves texts.\n# Ask Ada before you change it.\n")
    assert pbtxt.load(models / "llm" / "config.pbtxt").max_batch_size == 4
    change = versions.rollback(models, "llm")
    assert (change.version, change.policy, change.serves_before) == (3, "specific:3", (3, 4))
    assert versions.rollback(models, "llm").version == 2
    assert versions.rollback(models, "llm", to=4).serves == (4,)
    assert versions.set_policy(models, "llm", "specific:3,1,3").policy == policy(models) == "specific:1,3"
    assert versions.set_policy(models, "llm", "all").serves == (1, 2, 3, 4)
    versions.rollback(models, "llm", to=1)
    with pytest.raises(InputError, match="serves version 1, and there is none before it"):
        versions.rollback(models, "llm")
    with pytest.raises(InputError, match="has no version 9"):
        versions.rollback(models, "llm", to=9)
    with pytest.raises(InputError, match="has no version 8, 9"):
        versions.set_policy(models, "llm", "specific:1,8,9")
    for nonsense in ("", "latest", "latest:0", "latest:x", "specific:", "specific:1,", "ALL", "all:1"):
        with pytest.raises(InputError, match="is no version policy"):
            versions.set_policy(models, "llm", nonsense)
    assert sorted(path.name for path in (models / "llm").iterdir()) == ["1", "2", "3", "4", "config.pbtxt"]
    assert [path.name for path in models.parent.iterdir()] == ["models"]


@given(st.sets(st.integers(0, 40), min_size=1), st.integers(1, 9), st.sets(st.integers(0, 40), min_size=1))
def test_what_a_policy_serves(numbers: set[int], latest: int, chosen: set[int]) -> None:
    """Against the plain meaning, and through the config and back."""
    expected = {
        f"latest:{latest}": sorted(numbers, reverse=True)[:latest],
        "specific:" + ",".join(map(str, sorted(chosen))): [number for number in numbers if number in chosen],
        "all": list(numbers),
    }
    for text, served in expected.items():
        assert version_policy.served(sorted(numbers), text) == tuple(sorted(served))
        config = version_policy.with_policy(pbtxt.loads(CONFIG), version_policy.parse_policy(text))
        assert version_policy.policy_text(pbtxt.loads(pbtxt.dumps(config))) == text


def test_a_polling_server_notices_despite_times_to_come(models: Path, tmp_path: Path) -> None:
    """It compares the newest time of anything in the model's directory."""
    future = time.time_ns() + 10**9 * 3600
    os.utime(models / "llm" / "1" / "model.py", ns=(future, future))
    before = swap.newest(models / "llm")
    steps = [
        lambda: versions.add_version(models, "llm", write(tmp_path / "new")),
        lambda: versions.rollback(models, "llm"),
        lambda: versions.withdraw(models, "llm", 2),
    ]
    for step in steps:
        step()
        assert swap.newest(models / "llm") > before
        before = swap.newest(models / "llm")
    assert version_policy.version_numbers(models / "llm") == (1,)


def test_what_a_watcher_sees(models: Path, tmp_path: Path) -> None:
    """At any moment: no name but whole versions and the config, in the model's directory and in the root."""
    new = write(tmp_path / "new")
    for number in range(200):
        (new / f"file{number}").write_text(str(number))
    ending, seen = threading.Event(), set()

    def watch() -> None:
        while not ending.is_set():
            for version in (models / "llm").iterdir():
                count = len(list(version.iterdir())) if version.is_dir() else 0
                seen.add((version.name, count))
            seen.update((path.name, -1) for path in models.iterdir())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(3):
            versions.add_version(models, "llm", new)
        versions.rollback(models, "llm")
    finally:
        ending.set()
        watcher.join()
    whole = {(str(number), 202) for number in (2, 3, 4)}  # with model.py and its bytecode
    assert seen <= whole | {("1", 1), ("config.pbtxt", 0), ("llm", -1)}


def test_two_at_once_get_two_numbers(models: Path, tmp_path: Path) -> None:
    new, numbers = write(tmp_path / "new"), []
    threads = [
        threading.Thread(target=lambda: numbers.append(versions.add_version(models, "llm", new).version))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == [2, 3, 4, 5]


KILLED = """
import os, sys, time
from pathlib import Path
from trtkit.repository import versions
versions._copy, copy = lambda *a: (copy(*a), print("copied", flush=True), time.sleep(60)), versions._copy
versions.add_version(Path(sys.argv[1]), "llm", Path(sys.argv[2]))
"""


def test_a_killed_one_leaves_nothing_behind(models: Path, tmp_path: Path) -> None:
    new = write(tmp_path / "new")
    before = tree(models)
    with subprocess.Popen([sys.executable, "-c", KILLED, models, new], stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "copied\n"
        finally:
            child.send_signal(signal.SIGKILL)
    assert tree(models) == before
    assert len(list(models.parent.iterdir())) == 2
    assert versions.add_version(models, "llm", new).version == 2
    assert [path.name for path in models.parent.iterdir()] == ["models"]


def test_a_repository_that_nothing_can_be_put_beside(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a mount of its own. What a killed process left inside is removed, too: a server would stumble over it."""
    make = tempfile.mkdtemp

    def refuse(**options: Any) -> str:
        if options["dir"] == models.parent:
            raise PermissionError(13, "Permission denied")
        return make(**options)

    monkeypatch.setattr(swap.tempfile, "mkdtemp", refuse)
    (models / ".models.tmp-abandoned").mkdir()
    assert versions.add_version(models, "llm", write(tmp_path / "new")).version == 2
    assert versions.rollback(models, "llm").version == 1
    assert [path.name for path in models.iterdir()] == ["llm"]


def test_names_that_are_no_versions(models: Path) -> None:
    for name in ("01", "v2", ".3.tmp", "3.tmp", "-4"):
        (models / "llm" / name).mkdir()
    (models / "llm" / "5").write_text("a file")
    assert version_policy.version_numbers(models / "llm") == (1,)
    with pytest.raises(InputError, match="has a version 5 already"):
        versions.add_version(models, "llm", models / "llm" / "1", version=5)


def test_the_commands(models: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    new = str(write(tmp_path / "new"))
    done = run(command, ["add-version", str(models), "llm", new, "--json"])
    answer = json.loads(done.stdout)
    assert (done.exit_code, answer["version"], answer["serves"], answer["deployment"]) == (0, 2, [2], None)
    done = run(command, ["rollback", str(models), "llm", "--dry-run"])
    assert done.exit_code == 0 and "would do: 'llm' back to version 1" in done.stdout
    assert policy(models) == "latest:1"
    assert run(command, ["rollback", str(models), "llm"]).exit_code == 0
    assert policy(models) == "specific:1"
    done = run(command, ["add-version", str(models), "llm", new])
    assert "version policy specific:1 does not serve it" in done.stderr
    done = run(command, ["set-policy", str(models), "llm", "latest:2", "--json"])
    assert json.loads(done.stdout)["serves"] == [2, 3]
