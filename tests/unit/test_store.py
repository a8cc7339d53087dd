"""Folders appear whole or not at all; the store builds each artifact once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtkit.errors import InputError
from trtkit.store import ArtifactStore, atomic_dir, atomic_write, digest

FORK = multiprocessing.get_context("fork")


def test_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    with atomic_dir(out) as folder:
        (folder / "file").write_text("x")
        assert not out.exists()
    assert (out / "file").read_text() == "x"
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_dir(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_is_kept_unless_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with pytest.raises(InputError, match="exists already"), atomic_dir(out):
        pass
    with pytest.raises(RuntimeError), atomic_dir(out, replace=True) as folder:
        (folder / "new").write_text("new")
        raise RuntimeError
    assert [p.name for p in out.iterdir()] == ["old"]
    with atomic_dir(out, replace=True) as folder:
        (folder / "new").write_text("new")
        assert (out / "old").exists()
    assert [p.name for p in out.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match="is not a folder"), atomic_dir(tmp_path / "out", replace=True):
        pass
    assert (tmp_path / "out").read_text() == "mine"


def _fill_forever(out: Path) -> None:
    with atomic_dir(out) as folder:
        (folder / "half").write_text("x")
        time.sleep(600)


def test_leftovers_of_a_killed_process_are_removed_but_not_those_of_a_living_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    workers = [FORK.Process(target=_fill_forever, args=(out,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    while len(list(tmp_path.glob(".out.tmp-*/half"))) < 2:
        time.sleep(0.01)
    os.kill(workers[0].pid, signal.SIGKILL)
    workers[0].join()
    assert not out.exists()
    with atomic_dir(out) as folder:
        (folder / "file").write_text("x")
    assert len(list(tmp_path.glob(".out.tmp-*"))) == 1
    workers[1].kill()
    workers[1].join()
    with atomic_dir(out, replace=True):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_atomic_write_replaces_or_keeps(tmp_path: Path) -> None:
    file = tmp_path / "sub" / "file"
    atomic_write(file, "one")
    atomic_write(file, b"two")
    assert file.read_text() == "two"
    assert [p.name for p in file.parent.iterdir()] == ["file"]


def _build_and_count(root: Path) -> None:
    def make(folder: Path) -> None:
        with (root / "calls").open("a") as calls:
            calls.write("x")
        time.sleep(0.2)
        (folder / "result").write_text("done")

    path, _ = ArtifactStore(root / "store").build("kind", {"a": 1}, make)
    assert (path / "result").read_text() == "done"


def test_concurrent_builds_of_one_artifact_run_once(tmp_path: Path) -> None:
    workers = [FORK.Process(target=_build_and_count, args=(tmp_path,)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0, 0]
    assert (tmp_path / "calls").read_text() == "x"


def test_failed_build_is_tried_again(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)

    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        store.build("kind", {"a": 1}, fail)
    assert store.get("kind", {"a": 1}) is None
    path, reused = store.build("kind", {"a": 1}, lambda folder: None)
    assert not reused and store.get("kind", {"a": 1}) == path and not (path / "half").exists()
    assert store.build("kind", {"a": 1}, fail) == (path, True)


@given(st.dictionaries(st.text(), st.one_of(st.integers(), st.text(), st.none(), st.booleans())))
def test_digest_ignores_order_and_nothing_else(inputs: dict[str, object]) -> None:
    assert digest(inputs) == digest(dict(reversed(inputs.items())))
    assert digest(inputs) != digest({**inputs, "one more key": 1}) or "one more key" in inputs
