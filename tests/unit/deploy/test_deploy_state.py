"""The state folder: names, records, locks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtkit.config import NAME_PATTERN
from trtkit.deploy import state
from trtkit.errors import InputError

RECORD: dict[str, object] = {
    "name": "a",
    "target": "local",
    "phase": "running",
    "host": "127.0.0.1",
    "http_port": 1,
    "grpc_port": 2,
    "metrics_port": 3,
    "repository": "/m",
    "models": ["one"],
    "log_path": "/l",
    "started_at": 0.5,
    "token": "t",
    "shm_prefix": "p",
    "exit_timeout_s": 1,
}


def test_names_are_those_of_the_config() -> None:
    assert f"^{state.NAME.pattern}$" == NAME_PATTERN


@given(st.text(max_size=70))
def test_a_name_never_leaves_the_folder(name: str) -> None:
    root = state.state_dir() / "deployments"
    try:
        folder = state.folder_of(name)
    except InputError:
        return
    assert folder.parent == root
    assert Path(os.path.normpath(folder)) == folder


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-a", "a\n", "a b", "ä", "x" * 65])
def test_bad_names(name: str) -> None:
    with pytest.raises(InputError):
        state.folder_of(name)


def test_where_the_state_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRTKIT_STATE_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert state.state_dir() == tmp_path / "own"
    monkeypatch.delenv("TRTKIT_STATE_DIR")
    assert state.state_dir() == tmp_path / "xdg" / "trtkit"
    monkeypatch.delenv("XDG_STATE_HOME")
    assert state.state_dir() == tmp_path / ".local" / "state" / "trtkit"


def test_folders_are_private() -> None:
    folder = state.make_folder("a")
    assert [path.stat().st_mode & 0o777 for path in (folder, folder.parent, folder.parents[1])] == [0o700] * 3


def test_a_reader_sees_whole_records_only() -> None:
    folder = state.make_folder("a")
    state.write(folder, RECORD | {"n": 0, "filler": ""})
    seen: list[dict[str, object] | None] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            seen.append(state.read(folder))

    reader = threading.Thread(target=look)
    reader.start()
    for number in range(200):
        state.write(folder, RECORD | {"n": number, "filler": "x" * number * 50})
    stop.set()
    reader.join()
    assert seen
    assert all(record is not None and len(str(record["filler"])) == int(str(record["n"])) * 50 for record in seen)
    assert sorted(path.name for path in folder.iterdir()) == ["state.json"]


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}", "null", "\xff"])
def test_an_unreadable_record_is_none(content: str) -> None:
    folder = state.make_folder("a")
    (folder / "state.json").write_bytes(content.encode("latin-1"))
    assert state.read(folder) is None


@pytest.mark.parametrize("target", ["local", "docker"])
def test_a_record_with_a_hole_is_none(target: str) -> None:
    folder = state.make_folder("a")
    whole = RECORD | {"target": target, "container": "c", "stop_timeout_s": 1}
    state.write(folder, whole)
    assert state.read(folder) == whole
    needed = {"local": ["shm_prefix", "exit_timeout_s"], "docker": ["container", "stop_timeout_s"]}[target]
    for key in [*needed, "token", "name", "phase", "models", "log_path", "http_port", "target"]:
        for hole in ({other: value for other, value in whole.items() if other != key}, whole | {key: None}):
            state.write(folder, hole)
            assert state.read(folder) is None, key
    state.write(folder, whole | {"token": ""})
    assert state.read(folder) is None


def test_one_holder_at_a_time_and_children_inherit_it() -> None:
    folder = state.make_folder("a")
    lock = state.acquire(folder)
    assert lock is not None
    assert state.acquire(folder) is None
    assert state.is_locked(folder)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,)) as child:
        os.close(lock)
        assert state.is_locked(folder)
        assert not state.wait_unlocked(folder, 0.1)
        child.communicate(b"\n")
    assert state.wait_unlocked(folder, 30)
    assert not state.is_locked(folder)


def test_a_lock_of_a_removed_folder_guards_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between open and flock another process removes the folder: the lock must be that of the new one."""
    folder = state.make_folder("a")
    flock = state.fcntl.flock
    removed: list[bool] = []

    def remove_first(descriptor: int, how: int) -> None:
        if not removed:
            removed.append(True)
            state.remove(folder)
        flock(descriptor, how)

    monkeypatch.setattr(state.fcntl, "flock", remove_first)
    lock = state.acquire(folder)
    assert lock is not None
    assert os.path.samestat(os.fstat(lock), (folder / "lock").stat())
    assert state.acquire(folder) is None
    os.close(lock)


def test_only_folders_with_a_record_have_names() -> None:
    state.make_folder("empty")
    (state.make_folder("good") / "state.json").write_text(json.dumps({}))
    assert state.names() == ["good"]
