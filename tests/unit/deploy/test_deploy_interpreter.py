"""The interpreter of the embedded server sees what this process does, although it ignores the environment."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from trtkit.deploy import interpreter, server
from trtkit.deploy.server import Server, environment, prepared
from trtkit.errors import LacksError

ROOT = Path(interpreter.trtkit.__file__).parents[1]


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An install in site-packages, or an editable one; nothing from the environment."""
    monkeypatch.setattr(sys, "path", ["", "/usr/lib/python3", str(ROOT)])
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def test_what_an_isolated_python_does_not_see(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert interpreter.unseen() == []
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.pathsep}here")
    assert interpreter.unseen() == [ROOT, tmp_path / "here"]
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.setattr(sys, "path", [str(ROOT), "/usr/lib/python3"])  # as in `python -m trtkit` in that folder
    assert interpreter.unseen() == [ROOT]
    monkeypatch.setattr(interpreter.site, "getusersitepackages", lambda: str(ROOT))
    monkeypatch.setattr(interpreter.site, "ENABLE_USER_SITE", True)
    monkeypatch.setattr(sys, "path", ["", str(ROOT)])
    assert interpreter.unseen() == [ROOT]


def target_install(root: Path) -> Path:
    """A folder as `pip install --target` makes it, with an old backport that must not take the standard module's place,
    and below it an editable install's .pth file."""
    folder = root / "it's a target"
    (folder / "only_there").mkdir(parents=True)
    (folder / "only_there" / "__init__.py").write_text("")
    (folder / "typing.py").write_text("raise SystemExit('the wrong typing')")
    (root / "editable").mkdir()
    (root / "editable" / "linked.py").write_text("")
    (folder / "editable.pth").write_text(f"{root / 'editable'}\n")
    return folder


def imports(python: Path, names: str) -> str:
    """What the python backend's stub could import: isolated, as it is."""
    code = f"import {names}, sys; print(sys.prefix)"
    done = subprocess.run([str(python), "-I", "-c", code], capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.strip() or done.stderr


def test_the_made_interpreter_sees_it_all(tmp_path: Path) -> None:
    folder = target_install(tmp_path)
    made = interpreter.make([folder], tmp_path / "cache")
    assert imports(made / "python3", "only_there, linked, typing, numpy, click") == str(made.parent)
    assert "No module named 'only_there'" in imports(Path(sys.executable), "only_there")
    before = {path: path.lstat().st_ino for path in made.parent.rglob("*")}
    assert interpreter.make([folder], tmp_path / "cache") == made
    assert {path: path.lstat().st_ino for path in made.parent.rglob("*")} == before
    assert interpreter.make([folder, tmp_path], tmp_path / "cache") != made


def test_many_may_make_it_at_once(tmp_path: Path) -> None:
    folder, failures = target_install(tmp_path), []

    def make() -> None:
        try:
            interpreter.make([folder], tmp_path / "cache")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    made = interpreter.make([folder], tmp_path / "cache")
    assert imports(made / "python3", "only_there") == str(made.parent)
    assert [path.name for path in made.iterdir()] == ["python3"]


def test_the_server_gets_it_first_on_its_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stub = tmp_path / "stubs" / "3" / server.STUB
    stub.parent.mkdir(parents=True)
    stub.write_text("stub")
    found = Server(Path("/s"), backends=tmp_path / "backends", stub=stub, path=(Path("/venv/bin"),))
    assert prepared(found).path == found.path
    assert not (tmp_path / "cache").exists()
    monkeypatch.setenv("PYTHONPATH", str(target_install(tmp_path)))
    first, *others = environment(prepared(found), {})["PATH"].split(os.pathsep)
    assert others[0] == "/venv/bin"
    assert "trtkit" in first and imports(Path(first) / "python3", "only_there") == str(Path(first).parent)
    assert prepared(Server(Path("/s"))).path == ()  # a server with a Python of its own


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(LacksError, match=r"does not see /target, and .* cannot be written") as lacking:
        interpreter.make([Path("/target")], tmp_path / "cache")
    assert "virtual environment" in lacking.value.fix
