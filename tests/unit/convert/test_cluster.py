"""What a conversion over Ray decides without a cluster; tests/integration/test_convert_ray.py has one."""

from __future__ import annotations

import dataclasses
import pickle
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtkit import hf
from trtkit.config import CheckpointConfig
from trtkit.convert import cluster, conversion
from trtkit.convert.plan import Plan
from trtkit.convert.source import plan_conversion
from trtkit.errors import InputError, LacksError, TrtkitError


def make_plan(tp: int, pp: int) -> Plan:
    return Plan({"mapping": {"tp_size": tp, "pp_size": pp}}, [[] for _ in range(tp * pp)], {})


@pytest.mark.parametrize(
    ("tp", "pp", "finished", "nodes", "groups"),
    [
        (4, 2, [], 1, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (4, 2, [], 2, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (4, 2, [], 4, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (4, 2, [0, 1, 2, 3], 2, [[4, 5], [6, 7]]),
        (4, 2, [1, 6], 2, [[0, 2, 3], [4, 5, 7]]),
        (8, 1, [], 3, [[0, 1], [2, 3, 4], [5, 6, 7]]),
        (2, 1, [], 16, [[0], [1]]),
        (4, 3, [], 2, [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]),
    ],
)
def test_sharing_out(tp: int, pp: int, finished: list[int], nodes: int, groups: list[list[int]]) -> None:
    assert cluster.share_out(make_plan(tp, pp), finished, nodes) == groups


@given(tp=st.integers(1, 16), pp=st.integers(1, 8), nodes=st.integers(1, 40), data=st.data())
def test_every_missing_rank_is_in_one_group_of_its_stage(tp: int, pp: int, nodes: int, data: st.DataObject) -> None:
    finished = data.draw(st.sets(st.integers(0, tp * pp - 1), max_size=tp * pp - 1))
    groups = cluster.share_out(make_plan(tp, pp), finished, nodes)
    assert [rank for group in groups for rank in group] == [rank for rank in range(tp * pp) if rank not in finished]
    assert all(group and len({rank // tp for rank in group}) == 1 for group in groups)
    if not finished and tp >= nodes:
        assert len(groups) % nodes == 0  # every node has the same to do


def test_a_copy_has_the_same_fingerprint(make_source: Any) -> None:
    original, copy = (hf.open_source(make_source(max_shard_size="100KB")) for _ in range(2))
    assert len(cluster.fingerprint(original)) > 2
    assert cluster.fingerprint(original) == cluster.fingerprint(copy)
    assert original.identity() != copy.identity()


def test_other_weights_under_the_same_header_have_another_fingerprint(make_source: Any) -> None:
    source = hf.open_source(make_source())
    before = cluster.fingerprint(source)
    file = source.path / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2 :] = bytes(byte ^ 1 for byte in raw[len(raw) // 2 :])
    file.write_bytes(raw)
    assert {name for name, digest in cluster.fingerprint(source).items() if digest != before[name]} == {file.name}


def make_job(source: Path, folder: Path) -> cluster.Job:
    opened = hf.open_source(source)
    folder.mkdir()
    config = plan_conversion(opened, CheckpointConfig(tp=2)).config
    return cluster.Job(opened.path, cluster.fingerprint(opened), config, [1], folder, conversion.Options())


def test_a_job_writes_its_ranks(make_source: Any, tmp_path: Path) -> None:
    job = make_job(make_source(), tmp_path / "out")
    written = cluster._write(job, "here")
    assert [file.name for file in job.folder.iterdir()] == ["rank1.safetensors"]
    assert written.files[1].bytes == (job.folder / "rank1.safetensors").stat().st_size


def test_a_node_that_sees_something_else_says_so(make_source: Any, tmp_path: Path) -> None:
    source, other = make_source(), make_source(hidden_size=32)
    job = make_job(source, tmp_path / "out")
    cases = {
        rf"node1: the folder {tmp_path}/unshared does not exist there": {"folder": tmp_path / "unshared"},
        rf"node1: source '{tmp_path}/unshared' does not exist": {"source": tmp_path / "unshared"},
        rf"node1: {other}/config.json is not the same file there": {"source": other},
        r"node1 has trtkit \d\S*, this machine 9\.9": {"version": "9.9"},
    }
    for message, change in cases.items():
        with pytest.raises(LacksError, match=message) as caught:
            cluster._write(dataclasses.replace(job, **change), "node1")
        assert caught.value.fix
    assert not list(job.folder.iterdir())


@pytest.mark.parametrize("address", ["local", "", "head", "head:", ":6379", "head:port", "head:0", "ray://", "head:٣"])
def test_what_is_no_address_never_starts_a_cluster(address: str) -> None:
    with pytest.raises(InputError, match="not the address of a Ray cluster"):
        cluster._reachable(address)


def test_an_address_where_nothing_listens_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and never listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        for given_address in (address, f"ray://{address}", "auto"):
            with pytest.raises(LacksError, match=rf"no Ray cluster answers at (ray://)?{address}") as caught:
                cluster._reachable(given_address)
            assert "ray start" in caught.value.fix
        taken.listen()
        assert cluster._reachable("auto") == address


def test_without_ray_the_extra_is_named(make_source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = hf.open_source(make_source())
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(LacksError) as caught:
        conversion.convert(
            plan_conversion(source, CheckpointConfig()), source, tmp_path / "out", write=cluster.over_ray("auto")
        )
    assert caught.value.fix == "pip install 'trtkit[ray]'"
    assert not (tmp_path / "out").exists()


def test_errors_survive_the_way_back_from_a_node() -> None:
    for error in (InputError("tensor 'a' overflows", "clip"), OSError(28, "No space left on device", "/out/rank0")):
        again = pickle.loads(pickle.dumps(cluster.Outcome("node", error))).result  # noqa: S301
        assert (type(again), str(again)) == (type(error), str(error))
        assert not isinstance(error, TrtkitError) or again.fix == error.fix
