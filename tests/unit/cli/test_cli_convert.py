"""`trtkit convert` and `trtkit verify` as a user calls them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
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
    assert "5 files equal their checksums" in done.stdout
    assert "48 tensors, 160,832 elements equal the source; no value was rounded" in done.stdout

    done = trtkit("verify", tmp_path / "out")
    assert (done.returncode, done.stdout) == (0, "passed: 5 files equal their checksums\n")
    rank = tmp_path / "out" / "rank3.safetensors"
    rank.write_bytes(rank.read_bytes()[:-1] + b"!")
    done = trtkit("verify", tmp_path / "out")
    assert done.returncode == 1 and "rank3.safetensors" in done.stdout


def test_verify_without_source_needs_checksums(make_source: Any, tmp_path: Path) -> None:
    assert trtkit("convert", make_source(), tmp_path / "out", "--no-checksum").returncode == 0
    done = trtkit("verify", tmp_path / "out")
    assert done.returncode == 2 and "has no checksums" in done.stderr
    assert trtkit("verify", "a", "b", "c").returncode == 2


def test_list_prints_every_family() -> None:
    from trtkit.architectures import FAMILIES

    done = trtkit("convert", "--list")
    assert done.returncode == 0 and all(name in done.stdout for name in FAMILIES)
    listed = {row["architecture"]: row for row in json.loads(trtkit("convert", "--list", "--json").stdout)}
    assert listed.keys() == FAMILIES.keys()
    assert listed["MixtralForCausalLM"]["ep"] and not listed["LlamaForCausalLM"]["ep"]
    assert not listed["Phi3ForCausalLM"]["pp"]


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("Qwen2VLForConditionalGeneration", ("near relatives: Qwen2ForCausalLM", "runtime `llmapi`")),
        ("DeepseekV3ForCausalLM", ("runtime `llmapi`", "without conversion")),
        ("PhiMoEForCausalLM", ("near relatives: PhiForCausalLM",)),
        ("GPTJForCausalLM", ("GPT2LMHeadModel",)),
    ],
)
def test_an_unsupported_architecture_is_named_with_a_way_out(
    name: str, advice: tuple[str, ...], make_source: Any, edit_config: Any, tmp_path: Path
) -> None:
    source = make_source()
    edit_config(source, architectures=[name])
    done = trtkit("convert", source, tmp_path / "out")
    cause, fix = done.stderr.splitlines()
    assert done.returncode == 2 and f"'{name}' is not supported" in cause
    assert all(part in fix for part in (*advice, "--list"))
    assert ("llmapi" in fix) == ("runtime `llmapi`" in advice)


def test_what_was_found_is_told(make_source: Any, tmp_path: Path) -> None:
    source = make_source()
    state = safetensors.torch.load_file(source / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e6
    state["model.layers.2.mlp.up_proj.weight"][1, 2] = float("nan")
    safetensors.torch.save_file(state, source / "model.safetensors")
    done = trtkit("convert", source, tmp_path / "out", "--dtype", "float16")
    assert done.returncode == 2 and "model.layers.1.mlp.up_proj.weight" in done.stderr and "--saturate" in done.stderr
    done = trtkit("convert", source, tmp_path / "out", "--dtype", "float16", "--saturate")
    assert done.returncode == 0
    assert "1 values beyond the range of float16" in done.stderr
    assert "'model.layers.2.mlp.up_proj.weight' holds NaN at [1, 2]" in done.stderr
    done = trtkit("convert", source, tmp_path / "out", "--dtype", "float16", "--saturate", "--force", "--json")
    account = json.loads(done.stdout)
    assert account["saturated"] == 1
    assert account["non_finite"] == [
        {"tensor": "model.layers.2.mlp.up_proj.weight", "index": [1, 2], "value": "NaN"},
    ]


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
