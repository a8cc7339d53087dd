"""The conversion as a whole: killed at any moment, resumed, out of disk, with a manifest, honest in its account."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import pytest
import safetensors.torch
import torch

from trtkit import hf
from trtkit.checkpoint import open_checkpoint
from trtkit.convert import conversion, follow, progress
from trtkit.convert.conversion import Options, convert, write_checkpoint
from trtkit.convert.plan import Plan
from trtkit.convert.progress import Progress
from trtkit.convert.source import Layout, plan_conversion, source_tensors
from trtkit.convert.stream import write_ranks
from trtkit.convert.verify import check_files
from trtkit.errors import InputError, LacksError
from trtkit.store import atomic_dir

LAYOUT = Layout(tp=2, pp=2, dtype="float16", parallel_embedding="vocab")

# Runs a conversion that kills itself at the n-th of the calls that change the disk, or prints how many there were.
DRIVER = textwrap.dedent("""
    import os, signal, sys, threading
    source, out, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
    from pathlib import Path
    from trtkit import hf
    from trtkit.convert import conversion, stream
    from trtkit.convert.source import Layout, plan_conversion
    conversion.PROGRESS_BYTES = 1
    stream.BLOCK_BYTES = 4096
    calls, lock = 0, threading.Lock()
    def counted(function):
        def call(*args, **options):
            global calls
            with lock:
                calls += 1
                if calls == limit:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)
        return call
    for name in ("pwrite", "copy_file_range", "fsync", "rename", "replace", "unlink", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    opened = hf.open_source(source)
    layout = Layout(tp=2, pp=2, dtype="float16", parallel_embedding="vocab")
    conversion.convert(plan_conversion(opened, layout), opened, Path(out))
    print(calls)
""")


def drive(source: Path, out: Path, limit: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", DRIVER, str(source), str(out), str(limit)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_killed_at_twenty_random_moments_and_resumed(make_source: Any, tmp_path: Path) -> None:
    source = make_source()
    undisturbed = drive(source, tmp_path / "undisturbed", 0)
    assert undisturbed.returncode == 0, undisturbed.stderr
    expected = contents(tmp_path / "undisturbed")
    seed = random.randrange(1 << 30)  # pytest-randomly's own seed, which it prints, decides
    moments = random.Random(seed).sample(range(1, int(undisturbed.stdout) + 1), 20)
    went_on = 0
    for moment in moments:
        folder = tmp_path / f"killed-{moment}"
        killed = drive(source, folder / "out", moment)
        assert killed.returncode == -signal.SIGKILL
        partial = list(folder.glob(".out.partial-*"))
        finished = {}
        if not (folder / "out").exists() and partial:
            ranks: list[Any] = []
            if (partial[0] / "progress.json").is_file():
                ranks = json.loads((partial[0] / "progress.json").read_text())["finished"]
            elif (partial[0] / "conversion.json").is_file():  # all is done but publishing
                ranks = [0, 1, 2, 3]
            finished = {f"rank{rank}.safetensors": (partial[0] / f"rank{rank}.safetensors").stat() for rank in ranks}
        if not (folder / "out").exists():
            opened = hf.open_source(source)
            found = convert(plan_conversion(opened, LAYOUT), opened, folder / "out")
            assert (found.resumed_bytes > 0) == bool(finished)
        went_on += bool(finished)
        assert contents(folder / "out") == expected, (seed, moment)
        for name, before in finished.items():
            after = (folder / "out" / name).stat()
            assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns), moment
        assert [path.name for path in folder.iterdir()] == ["out"], moment
    assert went_on or min(moments) > int(undisturbed.stdout) // 2


def test_going_on_within_a_stage_copies_only_what_is_left(
    make_source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = hf.open_source(make_source())
    plan = plan_conversion(opened, Layout(tp=2))
    convert(plan, opened, tmp_path / "whole")
    monkeypatch.setattr(conversion, "PROGRESS_BYTES", 1)
    noted = []

    def interrupt(self: conversion.Progress, stage: int, unit: int, report: Any) -> None:
        original(self, stage, unit, report)
        noted.append(unit)
        if unit == 3:
            raise KeyboardInterrupt

    original = conversion.Progress.note
    with monkeypatch.context() as patch:
        patch.setattr(conversion.Progress, "note", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(plan, opened, tmp_path / "out")
    assert noted == [0, 1, 2, 3]
    assert not (tmp_path / "out").exists()

    copied: list[str] = []
    copy_tensor = conversion.write_ranks.__globals__["_copy_tensor"]

    def record(reader: Any, entry: Any, *rest: Any) -> Any:
        copied.append(entry.name)
        return copy_tensor(reader, entry, *rest)

    monkeypatch.setitem(conversion.write_ranks.__globals__, "_copy_tensor", record)
    convert(plan, opened, tmp_path / "out")
    assert copied and not any("layers.0." in name or "layers.2." in name or "embed" in name for name in copied)
    assert any("layers.3." in name for name in copied)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_after_a_restart_of_the_machine_an_unfinished_stage_begins_anew(
    make_source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was only in the page cache is gone then, although the notes say it was written."""
    opened = hf.open_source(make_source())
    plan = plan_conversion(opened, Layout(tp=2))
    convert(plan, opened, tmp_path / "whole")
    monkeypatch.setattr(conversion, "PROGRESS_BYTES", 1)
    with monkeypatch.context() as patch:
        patch.setattr(follow.Follower, "finish", lambda self: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            convert(plan, opened, tmp_path / "out")
    (partial,) = tmp_path.glob(".out.partial-*")
    for rank in ("rank0.safetensors", "rank1.safetensors"):
        with (partial / rank).open("r+b") as file:
            file.truncate(1000)
    monkeypatch.setattr(progress, "boot_id", lambda: "another boot")
    convert(plan, opened, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_stage_that_was_finished_in_part_elsewhere_is_completed(make_source: Any, tmp_path: Path) -> None:
    """Over a cluster, ranks of one stage finish one by one."""
    opened = hf.open_source(make_source())
    plan = plan_conversion(opened, LAYOUT)
    convert(plan, opened, tmp_path / "whole")

    def half(plan: Plan, source: Any, folder: Path, options: Options, progress: Progress, advance: Any) -> None:
        progress.finish(write_ranks(plan, source_tensors(source), folder, [1, 2]))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(plan, opened, tmp_path / "out", write=half)
    found = convert(plan, opened, tmp_path / "out")
    assert found.resumed_bytes == plan.rank_bytes(1) + plan.rank_bytes(2)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_is_finished_but_not_published_is_not_made_again(make_source: Any, tmp_path: Path) -> None:
    """`trtkit build` compares with the source before it publishes, which may be interrupted too."""
    opened = hf.open_source(make_source())
    plan = plan_conversion(opened, LAYOUT)
    with pytest.raises(KeyboardInterrupt), atomic_dir(tmp_path / "out", resume="key") as folder:
        write_checkpoint(plan, opened, folder)
        before = {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in folder.iterdir()}
        raise KeyboardInterrupt
    with atomic_dir(tmp_path / "out", resume="key") as folder:
        found = write_checkpoint(plan, opened, folder)
    assert {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in (tmp_path / "out").iterdir()} == before
    assert found.resumed_bytes == sum(plan.rank_bytes(rank) for rank in range(4))


def test_a_source_that_changes_meanwhile_is_an_error(make_source: Any, tmp_path: Path) -> None:
    source = make_source()
    opened = hf.open_source(source)

    def change(*args: Any) -> None:
        conversion.write_here(*args)
        (source / "model.safetensors").touch()

    with pytest.raises(InputError, match="was changed while it was read"):
        convert(plan_conversion(opened, LAYOUT), opened, tmp_path / "out", write=change)
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_other_options_do_not_go_on_with_it(make_source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = hf.open_source(make_source())
    with monkeypatch.context() as patch:
        patch.setattr(follow.Follower, "finish", lambda self: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            convert(plan_conversion(opened, Layout(tp=2)), opened, tmp_path / "out")
    assert len(list(tmp_path.glob(".out.partial-*"))) == 1
    found = convert(plan_conversion(opened, Layout(tp=4)), opened, tmp_path / "out")
    assert found.resumed_bytes == 0
    assert not list(tmp_path.glob(".out*"))
    assert len(list((tmp_path / "out").glob("rank*"))) == 4


def test_two_conversions_to_one_place_do_not_mix(
    make_source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = hf.open_source(make_source())
    plan = plan_conversion(opened, LAYOUT)

    def meanwhile(*args: Any) -> None:
        with pytest.raises(InputError, match="another process is writing"):
            convert(plan, opened, tmp_path / "out")
        conversion.write_here(*args)

    convert(plan, opened, tmp_path / "out", write=meanwhile)
    assert check_files(open_checkpoint(tmp_path / "out")).passed


@pytest.mark.parametrize("checked", [True, False], ids=["seen at the start", "seen while writing"])
def test_a_full_disk_is_one_error_and_leaves_nothing(checked: bool, make_source: Any, tmp_path: Path) -> None:
    """On a real filesystem of 64 KiB, mounted for the test in a namespace of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    hide = "" if checked else "conversion._check_space = lambda folder, total: None"
    script = textwrap.dedent(f"""
        import os, sys
        from trtkit.cli import main
        from trtkit.convert import conversion
        {hide}
        sys.argv = ["trtkit", "convert", {str(make_source())!r}, {str(disk / "out")!r}]
        try:
            main()
        except SystemExit as stop:
            print("exit", stop.code, os.listdir({str(disk)!r}))
    """)
    mounted = (
        f"mount -t tmpfs -o size=64k tmpfs {disk} && exec {sys.executable} -c '{script.replace(chr(39), chr(34))}'"
    )
    done = subprocess.run(["unshare", "-rm", "sh", "-c", mounted], capture_output=True, text=True, check=False)
    assert done.stdout == "exit 3 []\n", done.stderr
    cause, fix = done.stderr.splitlines()[-2:]
    assert cause.startswith(f"error: {disk}: ") and ("full" in cause or "free" in cause)
    assert fix.startswith("  fix: ")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(5, "Input/output error")])
def test_a_failing_disk_leaves_nothing(
    error: OSError, make_source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = hf.open_source(make_source())
    before = sorted(path.name for path in tmp_path.iterdir())
    count = 0
    pwrite = os.pwrite

    def fail(*args: Any) -> int:
        nonlocal count
        count += 1
        if count == 30:
            raise error
        return pwrite(*args)

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(LacksError if error.errno == 28 else OSError):
        convert(plan_conversion(opened, LAYOUT), opened, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_manifest_tells_what_was_made_of_what(make_source: Any, tmp_path: Path) -> None:
    source = make_source()
    opened = hf.open_source(source)
    convert(plan_conversion(opened, LAYOUT), opened, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert manifest["producer"]["name"] == "trtkit"
    assert manifest["source"] == {"origin": f"file:{source}", **opened.identity()}
    assert manifest["options"] == {
        "dtype": "float16", "tp": 2, "pp": 2, "ep": 1, "parallel_embedding": "vocab", "saturate": False,
        "checksum": True,
    }  # fmt: skip
    files = {file.name: file for file in (tmp_path / "out").iterdir() if file.name != "conversion.json"}
    assert manifest["files"].keys() == files.keys()
    for name, record in manifest["files"].items():
        data = files[name].read_bytes()
        assert record == {"bytes": len(data), "blake3": blake3.blake3(data).hexdigest()}


def test_a_flipped_bit_is_found_by_the_checksum(make_source: Any, tmp_path: Path) -> None:
    opened = hf.open_source(make_source())
    convert(plan_conversion(opened, LAYOUT), opened, tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert (check_files(checkpoint).checksums, check_files(checkpoint).files) == (5, {})
    data = bytearray((tmp_path / "out" / "rank2.safetensors").read_bytes())
    data[-7] ^= 4
    (tmp_path / "out" / "rank2.safetensors").write_bytes(data)
    assert check_files(checkpoint).files == {"rank2.safetensors": "its content is not the one in the manifest"}


def test_without_checksums(make_source: Any, tmp_path: Path) -> None:
    opened = hf.open_source(make_source())
    plan = plan_conversion(opened, LAYOUT)
    convert(plan, opened, tmp_path / "with")
    convert(plan, opened, tmp_path / "without", options=Options(checksum=False))
    for file in (tmp_path / "with").glob("rank*"):
        assert file.read_bytes() == (tmp_path / "without" / file.name).read_bytes()
    found = check_files(open_checkpoint(tmp_path / "without"))
    assert found.passed and found.checksums == 0


def test_outputs_are_deterministic(make_source: Any, tmp_path: Path) -> None:
    opened = hf.open_source(make_source())
    for name in ("a", "b"):
        convert(plan_conversion(opened, LAYOUT), opened, tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("tensor", "index", "value"),
    [
        ("model.layers.1.self_attn.k_proj.weight", (3, 5), float("nan")),
        ("model.layers.4.mlp.down_proj.weight", (63, 95), float("-inf")),
        ("model.norm.weight", (0,), float("inf")),
        ("lm_head.weight", (130, 63), float("nan")),
    ],
)
@pytest.mark.parametrize("tp", [1, 4])
def test_nan_and_infinity_are_reported_with_tensor_and_index(
    tp: int, tensor: str, index: tuple[int, ...], value: float, dtype: str, make_source: Any, tmp_path: Path
) -> None:
    source = make_source()
    state = safetensors.torch.load_file(source / "model.safetensors")
    state[tensor][index] = value
    safetensors.torch.save_file(state, source / "model.safetensors")
    opened = hf.open_source(source)
    found = convert(plan_conversion(opened, Layout(tp=tp, dtype=dtype)), opened, tmp_path / "out")
    kind = "NaN" if np.isnan(value) else "infinity"
    assert [(each.tensor, each.index, each.value) for each in found.non_finite] == [(tensor, index, kind)]
    manifest = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert manifest["non_finite"] == [{"tensor": tensor, "index": list(index), "value": kind}]


def test_every_tensor_that_holds_nan_is_named(make_source: Any, tmp_path: Path) -> None:
    """Also where they lie in one tensor of the checkpoint."""
    source = make_source()
    state = safetensors.torch.load_file(source / "model.safetensors")
    for which in "qkv":
        state[f"model.layers.1.self_attn.{which}_proj.weight"][5, 7:] = float("nan")
    safetensors.torch.save_file(state, source / "model.safetensors")
    opened = hf.open_source(source)
    found = convert(plan_conversion(opened, Layout(tp=2)), opened, tmp_path / "out").non_finite
    assert [(each.tensor[-13:], each.index) for each in found] == [(f"{w}_proj.weight", (5, 7)) for w in "kqv"]


def test_the_account_counts_every_source_value_once(make_source: Any, tmp_path: Path) -> None:
    """However many ranks hold a value."""
    source = make_source(dtype="float32", tie_word_embeddings=True)
    state = safetensors.torch.load_file(source / "model.safetensors")
    rounded = sum(int((tensor.half().float() != tensor).sum()) for tensor in state.values())
    flushed = sum(int(((tensor.half() == 0) & (tensor != 0)).sum()) for tensor in state.values())
    opened = hf.open_source(source)
    for tp, pp in ((1, 1), (8, 1), (4, 3)):
        plan = plan_conversion(opened, Layout(tp=tp, pp=pp))
        found = convert(plan, opened, tmp_path / f"{tp}-{pp}").report
        assert (found.rounded, found.flushed, found.saturated) == (rounded, flushed, 0)


def test_saturating_clips(make_source: Any, tmp_path: Path) -> None:
    source = make_source()
    state = safetensors.torch.load_file(source / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = -1e6
    safetensors.torch.save_file(state, source / "model.safetensors")
    opened = hf.open_source(source)
    plan = plan_conversion(opened, Layout(dtype="float16"))
    found = convert(plan, opened, tmp_path / "out", options=Options(saturate=True))
    assert found.report.saturated == 1
    ours = safetensors.torch.load_file(tmp_path / "out" / "rank0.safetensors")
    assert ours["transformer.layers.1.mlp.gate.weight"][3, 5] == -65504
    assert torch.isfinite(ours["transformer.layers.1.mlp.gate.weight"]).all()
