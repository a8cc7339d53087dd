"""Conversions over a real Ray cluster of two nodes (on this machine, so they do share a filesystem)."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import safetensors.torch

from trtkit import hf
from trtkit.config import CheckpointConfig
from trtkit.convert import cluster, conversion
from trtkit.convert.source import plan_conversion
from trtkit.errors import LacksError

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]

LAYOUT = CheckpointConfig(tp=4, pp=2, dtype="float16")
ARGUMENTS = ["--tp", "4", "--pp", "2", "--dtype", "float16"]

DIES_AFTER_THE_FIRST_RANKS = """
import os, signal, sys
from pathlib import Path
from trtkit import hf
from trtkit.config import CheckpointConfig
from trtkit.convert import cluster, conversion
from trtkit.convert.source import plan_conversion

source = hf.open_source(sys.argv[1])
die = lambda ranks, node: os.kill(os.getpid(), signal.SIGKILL)
plan = plan_conversion(source, CheckpointConfig(tp=4, pp=2, dtype="float16"))
conversion.convert(plan, source, Path(sys.argv[2]), write=cluster.over_ray(sys.argv[3], on_written=die))
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Address of a cluster of two nodes with one CPU each."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short, since the names of sockets in it may not be long
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", str(folder))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        from ray.cluster_utils import Cluster

        node = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
        ray_cluster = Cluster(initialize_head=True, head_node_args=node)
        try:
            ray_cluster.add_node(**node)
            ray_cluster.wait_for_nodes()
            yield ray_cluster.address
        finally:
            ray_cluster.shutdown()
            left = _wait_for_end(folder)
            shutil.rmtree(folder, ignore_errors=True)
    assert not left


def _wait_for_end(folder: Path) -> list[list[str]]:
    """Command lines of processes of the cluster in `folder` that outlive it, after a time of grace."""
    deadline = time.monotonic() + 20
    while True:
        commands = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
        left = [command for command in commands if any(str(folder) in word for word in command)]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


@pytest.fixture
def source(make_source: Any) -> Path:
    """Shards in float32, with a NaN in rank 0, an infinity in rank 6, and another NaN in all ranks of a stage."""
    path: Path = make_source(dtype="float32", max_shard_size="400KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    poison(path, {"model.layers.0.self_attn.q_proj.weight": (0, float("nan"))})
    poison(path, {"model.layers.4.mlp.up_proj.weight": (50, float("inf"))})  # of 96 rows, 24 per rank
    poison(path, {"model.layers.3.input_layernorm.weight": (9, float("nan"))})
    return path


def poison(path: Path, values: dict[str, tuple[int, float]]) -> None:
    """Sets the first value of a row of some tensors."""
    for file in path.glob("*.safetensors"):
        state = safetensors.torch.load_file(file)
        for name in values.keys() & state.keys():
            state[name].reshape(len(state[name]), -1)[values[name][0], 0] = values[name][1]
        safetensors.torch.save_file(state, file, {"format": "pt"})


def convert(
    source: Path, out: Path, write: conversion.WriteRanks | None = None, layout: CheckpointConfig = LAYOUT
) -> conversion.Conversion:
    opened = hf.open_source(source)
    return conversion.convert(plan_conversion(opened, layout), opened, out, write=write)


def trtkit(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trtkit", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **environment}
    )


def assert_same(first: Path, second: Path) -> None:
    """Folders with the same files, byte for byte."""
    names = sorted(file.name for file in first.iterdir())
    assert names == sorted(file.name for file in second.iterdir())
    assert {"config.json", "conversion.json", "rank3.safetensors"} <= set(names)
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def leftovers(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.name.startswith("."))


def patient_worker(folder: Path) -> Callable[[cluster.Job], cluster.Outcome]:
    """`write_job`, begun when a second one is under way; on nodes of one CPU that is on another node."""
    real = cluster.write_job

    def write_job(job: cluster.Job) -> cluster.Outcome:
        (folder / f"started{job.ranks[0]}").touch()
        deadline = time.monotonic() + 60
        while len(list(folder.glob("started*"))) < 2:
            if time.monotonic() > deadline:
                raise TimeoutError("no other node took a task")
            time.sleep(0.02)
        return real(job)

    return write_job


@pytest.mark.parametrize(
    "layout", [LAYOUT, CheckpointConfig(tp=4, dtype="float16")], ids=["stages", "parts of a stage"]
)
def test_both_nodes_work_and_the_bytes_are_those_of_a_local_conversion(
    layout: CheckpointConfig, address: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = convert(source, tmp_path / "local", layout=layout)
    monkeypatch.setattr(cluster, "write_job", patient_worker(tmp_path))
    seen: dict[int, str] = {}
    on_written = lambda ranks, node: seen.update(dict.fromkeys(ranks, node))  # noqa: E731
    before = signal.getsignal(signal.SIGTERM)
    spread = convert(source, tmp_path / "spread", cluster.over_ray(address, on_written=on_written), layout)
    assert signal.getsignal(signal.SIGTERM) is before

    assert sorted(seen) == list(range(layout.tp * layout.pp))
    assert len(set(seen.values())) == 2, seen
    assert_same(tmp_path / "local", tmp_path / "spread")
    assert spread.report == local.report
    assert spread.report.rounded > 0
    assert {found.tensor: found.index for found in spread.non_finite} == {
        "model.layers.0.self_attn.q_proj.weight": (0, 0),
        "model.layers.3.input_layernorm.weight": (9,),
        "model.layers.4.mlp.up_proj.weight": (50, 0),
    }
    assert not leftovers(tmp_path)


def test_a_killed_conversion_goes_on_where_it_stopped(address: str, source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "local")
    killed = subprocess.run(
        [sys.executable, "-c", DIES_AFTER_THE_FIRST_RANKS, source, tmp_path / "out", address],
        timeout=120,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    (partial,) = tmp_path.glob(".out.partial-????????????????")
    assert list(tmp_path.glob(f"{partial.name}.ray-*"))  # what the other node was writing
    finished = {rank: partial / f"rank{rank}.safetensors" for rank in _finished(partial)}
    assert len(finished) == 4
    before = {rank: _stat(file) for rank, file in finished.items()}

    done = trtkit("convert", source, tmp_path / "out", *ARGUMENTS, "--ray", "auto", "--json", RAY_ADDRESS=address)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["resumed_bytes"] > 0
    assert before == {rank: _stat(tmp_path / "out" / file.name) for rank, file in finished.items()}
    assert_same(tmp_path / "local", tmp_path / "out")
    assert not leftovers(tmp_path)


def _finished(partial: Path) -> list[int]:
    return [int(rank) for rank in json.loads((partial / "progress.json").read_text())["finished"]]


def _stat(file: Path) -> tuple[int, int]:
    return file.stat().st_ino, file.stat().st_mtime_ns


def test_an_interrupted_conversion_goes_on_without_ray(address: str, source: Path, tmp_path: Path) -> None:
    def interrupt(ranks: list[int], node: str) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", cluster.over_ray(address, on_written=interrupt))
    (partial,) = tmp_path.glob(".out.*")  # and no folder of a task
    assert len(_finished(partial)) == 4
    assert convert(source, tmp_path / "out").resumed_bytes > 0
    convert(source, tmp_path / "local")
    assert_same(tmp_path / "local", tmp_path / "out")


def dying_worker(marker: Path, times: int) -> Callable[[cluster.Job], cluster.Outcome]:
    """`write_job`, in a process that is killed in the middle of it for the first few times."""
    real = cluster.write_job

    def write_job(job: cluster.Job) -> cluster.Outcome:
        for attempt in range(times if 4 in job.ranks else 0):
            with marker.with_suffix(f".{attempt}").open("a") as file:
                if not file.tell():
                    file.write("died")
                    file.flush()
                    (job.folder / "rank4.safetensors").write_bytes(b"half of it")
                    os.kill(os.getpid(), signal.SIGKILL)
        return real(job)

    return write_job


def test_the_ranks_of_a_dead_worker_are_written_again(
    address: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "write_job", dying_worker(tmp_path / "once", 1))
    convert(source, tmp_path / "spread", cluster.over_ray(address))
    assert (tmp_path / "once.0").read_text() == "died"
    convert(source, tmp_path / "local")
    assert_same(tmp_path / "local", tmp_path / "spread")


def test_a_worker_that_dies_again_ends_the_conversion(
    address: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "write_job", dying_worker(tmp_path / "twice", 2))
    with pytest.raises(LacksError, match="Ray worker for ranks 4 to 7 died 2 times") as caught:
        convert(source, tmp_path / "spread", cluster.over_ray(address))
    assert "\n" not in caught.value.cause
    assert not leftovers(tmp_path)


def test_a_full_disk_of_a_worker_is_told_as_one(
    address: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = cluster.write_job

    def full(job: cluster.Job) -> cluster.Outcome:
        def write_ranks(*args: Any, **options: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(job.folder / "rank0.safetensors"))

        cluster.write_ranks = write_ranks  # type: ignore[assignment]
        return real(job)

    monkeypatch.setattr(cluster, "write_job", full)
    with pytest.raises(LacksError, match="the disk is full"):
        convert(source, tmp_path / "spread", cluster.over_ray(address))
    assert not leftovers(tmp_path)


def test_an_overflow_is_one_line_and_exit_code_2(address: str, source: Path, tmp_path: Path) -> None:
    tensor = "model.layers.3.mlp.down_proj.weight"
    poison(source, {tensor: (3, 1e6)})
    run = trtkit("convert", source, tmp_path / "out", *ARGUMENTS, "--ray", address, "--json")
    assert run.returncode == 2
    error = json.loads(run.stdout)["error"]
    assert f"tensor '{tensor}' holds 1e+06, which overflows float16" in error["cause"]
    assert "--saturate" in error["fix"]
    _, cause, fix = run.stderr.splitlines()  # the first tells what is converted
    assert (cause, fix.strip()) == (f"error: {error['cause']}", f"fix: {error['fix']}")
    assert not (tmp_path / "out").exists() and not leftovers(tmp_path)


def test_without_a_cluster_it_says_how_to_get_one(source: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and never listens
        nowhere = f"127.0.0.1:{taken.getsockname()[1]}"
        run = trtkit("convert", source, tmp_path / "out", "--ray", nowhere, "--json")
    assert run.returncode == 3
    error = json.loads(run.stdout)["error"]
    assert error["cause"].startswith(f"no Ray cluster answers at {nowhere}")
    assert "ray start --head" in error["fix"]
    assert not (tmp_path / "out").exists() and not leftovers(tmp_path)
