"""`trtkit convert` and `trtkit verify` as a user calls them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import safetensors.torch


def trtkit(*args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trtkit", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


def test_convert_then_verify(make_source: Any, tmp_path: Path) -> None:
    source = make_source()
    done = trtkit("convert", source, tmp_path / "out", "--tp", 2, "--pp", 2, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["tp"], summary["pp"], summary["dtype"], summary["rounded"]) == (2, 2, "bfloat16", 0)
    assert len(summary["rank_bytes"]) == 4
    assert "converting" in done.stderr

    done = trtkit("verify", source, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "passed: 48 tensors" in done.stdout and "no value was rounded" in done.stdout


def test_dry_run_writes_nothing(make_source: Any, tmp_path: Path) -> None:
    done = trtkit("convert", make_source(), tmp_path / "out", "--tp", 4, "--dry-run")
    assert done.returncode == 0
    assert "rank3.safetensors" in done.stdout
    assert not (tmp_path / "out").exists()


def test_existing_output_is_kept(make_source: Any, tmp_path: Path) -> None:
    source = make_source()
    assert trtkit("convert", source, tmp_path / "out").returncode == 0
    before = (tmp_path / "out" / "config.json").read_bytes()
    done = trtkit("convert", source, tmp_path / "out", "--tp", 2)
    assert done.returncode == 2
    assert "exists already" in done.stderr and "--force" in done.stderr and done.stdout == ""
    assert (tmp_path / "out" / "config.json").read_bytes() == before
    assert trtkit("convert", source, tmp_path / "out", "--tp", 2, "--force").returncode == 0
    assert (tmp_path / "out" / "rank1.safetensors").exists()


def test_verify_fails_with_exit_code_1_and_names_the_tensor(make_source: Any, tmp_path: Path) -> None:
    source = make_source()
    assert trtkit("convert", source, tmp_path / "out").returncode == 0
    state = safetensors.torch.load_file(tmp_path / "out" / "rank0.safetensors")
    state["transformer.layers.1.mlp.fc.weight"][2, 3] = 7
    safetensors.torch.save_file(state, tmp_path / "out" / "rank0.safetensors")
    done = trtkit("verify", source, tmp_path / "out")
    assert done.returncode == 1
    assert "model.layers.1.mlp.gate_proj.weight" in done.stdout


def test_verify_reports_damage_as_a_failed_check(make_source: Any, tmp_path: Path) -> None:
    source = make_source()
    assert trtkit("convert", source, tmp_path / "out", "--tp", 2).returncode == 0
    file = tmp_path / "out" / "rank1.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    done = trtkit("verify", source, tmp_path / "out", "--json")
    assert done.returncode == 1
    result = json.loads(done.stdout)
    assert not result["passed"] and "rank1.safetensors: truncated" in result["damage"]
    file.unlink()
    done = trtkit("verify", source, tmp_path / "out")
    assert done.returncode == 1 and "rank1.safetensors is missing" in done.stdout


def test_errors_are_a_cause_and_a_fix_without_traceback(make_source: Any, tmp_path: Path) -> None:
    done = trtkit("convert", make_source(), tmp_path / "out", "--tp", 3)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-2:] == [
        "error: TP 3 does not fit this model: num_attention_heads 8 is not a multiple of it",
        "  fix: valid TP sizes: 1, 2, 4, 8",
    ]
    assert "Traceback" in trtkit("--debug", "convert", tmp_path / "nowhere", tmp_path / "out").stderr
