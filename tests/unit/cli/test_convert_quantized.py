"""`trtkit convert --quantization`, and what else deals with quantised checkpoints: verify, build, evaluate's report."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from trtkit.cli import main

TINY = Path(__file__).parents[3] / "examples" / "tiny-llama"
QUICK = ["--calibration-samples", "4", "--calibration-length", "32"]


@dataclass(frozen=True)
class Result:
    exit_code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


def run(*arguments: object) -> Result:
    """In this process, which has torch already."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        main([str(each) for each in arguments])
    return Result(int(end.value.code or 0), out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama that groups of 128 fit, with the tiny model's tokenizer."""
    folder = tmp_path_factory.mktemp("source")
    config = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=128,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = transformers.LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TINY / name).read_bytes())
    return folder


def test_a_quantised_conversion_ends_with_its_accuracy(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("convert", source, out, "--quantization", "int4_awq", *QUICK, "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["quantization"] == {
        "quant_algo": "W4A16_AWQ", "group_size": 128, "has_zero_point": False, "pre_quant_scale": True
    }  # fmt: skip
    scores = answer["accuracy"]["scores"]
    assert scores["reference_perplexity"] != scores["candidate_perplexity"]
    assert 0.5 < scores["top1_agreement"] <= 1
    assert json.loads((out / "accuracy.json").read_text()) == answer["accuracy"]
    manifest = json.loads((out / "conversion.json").read_text())
    assert manifest["options"]["quantization"]["calibration"]["samples"] == 4
    verified = run("verify", source, out)
    assert verified.exit_code == 0, verified.output
    assert "10 quantised linears resemble the source's" in verified.stdout


@pytest.mark.parametrize("form", ["int8_wo", "int4_wo", "w4a8_awq", "int8_sq", "int8_sq_plugin", "fp8_rowwise"])
def test_verify_passes_in_every_format(form: str, source: Path, tmp_path: Path) -> None:
    assert run("convert", source, tmp_path / "out", "--quantization", form, *QUICK, "--no-accuracy").exit_code == 0
    verified = run("verify", source, tmp_path / "out")
    assert verified.exit_code == 0, verified.output
    assert "10 quantised linears" in verified.stdout


def test_verify_notices_the_weights_of_another_model(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("convert", source, out, "--quantization", "fp8", *QUICK, "--no-accuracy").exit_code == 0
    other = tmp_path / "other"
    other.mkdir()
    for file in source.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tensors = safetensors.torch.load_file(other / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name].flip(0).contiguous()
    safetensors.torch.save_file(tensors, other / "model.safetensors", {"format": "pt"})
    result = run("verify", other, out)
    assert result.exit_code == 1
    assert "transformer.layers.1.mlp.proj" in result.stdout
    assert "differs by" in result.stdout


def test_the_limit_fails_but_keeps_the_checkpoint(tmp_path: Path) -> None:
    result = run("convert", TINY, tmp_path / "out", "--quantization", "int4_wo", "--max-perplexity-increase", "0.01%")
    report = json.loads((tmp_path / "out" / "accuracy.json").read_text())
    assert report["scores"]["perplexity_increase"] > 1e-4
    assert result.exit_code == 1
    assert "was written all the same" in result.stderr
    assert "more than 0.01%" in result.stderr


REFUSED = {
    "a group that does not fit": (["--quantization", "int4_awq", "--tp", "4"], "input features"),
    "no GPU for it": (["--quantization", "int4_awq", "--gpu", "B200"], "int4_awq"),
    "no release for it": (["--quantization", "fp8_rowwise", "--release", "24.04"], "fp8_rowwise"),
    "unknown GPU": (["--quantization", "fp8", "--gpu", "Voodoo2"], "no known GPU"),
    "group size without groups": (["--quantization", "fp8", "--group-size", "64"], "group size 64"),
    "calibration without quantisation": (["--calibration", "x.txt"], "not asked for"),
    "bits without a choice": (["--quantization", "fp8", "--target-bits", "5"], "belongs to --auto"),
    "a limit that auto would meet too late": (["--auto", "--max-perplexity-increase", "2"], "200%"),
    "a format beside auto": (["--auto", "--quantization", "fp8"], "chooses the formats itself"),
    "a pattern that excludes nothing": (["--quantization", "fp8", "--exclude", "layers.9.*"], "excludes nothing"),
    "ranks for llmapi": (["--quantization", "fp8", "--runtime", "llmapi", "--tp", "2"], "splits the model when"),
    "a drawing in no folder": (["--auto", "--plot", "nowhere/front.svg"], "no file can be written"),
    "limit without quantisation": (["--max-perplexity-increase", "2%"], "not asked for"),
    "limit without accuracy": (
        ["--quantization", "fp8", "--max-perplexity-increase", "2%", "--no-accuracy"], "needs the accuracy"
    ),
    "limit that is none": (["--quantization", "fp8", "--max-perplexity-increase", "2"], "200%"),
    "linear without format": (["--quantization", "fp8", "--linear", "mlp.fc"], "NAME=FORMAT"),
    "linear that is none": (
        ["--quantization", "fp8", "--linear", "transformer.layers.9.mlp.fc=int8_sq"], "no linear of this model"
    ),
    "text that is too short": (["--quantization", "int8_sq", "--calibration", "short.txt"], "tokens"),
    "text that is not there": (["--quantization", "int8_sq", "--calibration", "none.txt"], "none.txt"),
    "no such device": (["--quantization", "fp8", "--device", "abacus"], "abacus"),
}  # fmt: skip


@pytest.mark.parametrize("options", REFUSED.values(), ids=REFUSED)
def test_refused_before_any_work(
    options: tuple[list[str], str], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("too short")
    given, words = options
    result = run("convert", source, tmp_path / "out", *given)
    assert result.exit_code in (2, 3), result.output
    assert words in result.stderr
    assert result.stderr.count("error:") == 1
    assert "fix:" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["short.txt"]


def test_dry_run_says_the_sizes(source: Path, tmp_path: Path) -> None:
    result = run("convert", source, tmp_path / "out", "--quantization", "int4_awq", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    plain = run("convert", source, tmp_path / "out", "--dry-run", "--json")
    linears = 2 * 128 * (4 + 2 + 2) * 64 + 2 * 4 * 64 * 128 + 2 * 3 * 128 * 256
    saved = json.loads(plain.stdout)["rank_bytes"][0] - json.loads(result.stdout)["rank_bytes"][0]
    assert 1.3 * linears < saved < 1.5 * linears  # 16 bits become 4 and a scale of 32 per 128
    assert not (tmp_path / "out").exists()


CONFIG = """
name: quantised
model: {{source: {source}}}
checkpoint:
  quantization:
    format: int8_sq
    calibration: {{samples: 4, length: 32}}
    max_perplexity_increase: {limit}
serving: {{runtime: reference}}
"""


def test_build_quantises_once_and_holds_the_limit(source: Path, tmp_path: Path) -> None:
    config, store = tmp_path / "config.yaml", tmp_path / "store"
    config.write_text(CONFIG.format(source=source, limit="50%"))
    first = run("build", config, "--store", store, "--json")
    assert first.exit_code == 0, first.output
    (built,) = json.loads(first.stdout)
    report = json.loads((Path(built["checkpoint"]) / "accuracy.json").read_text())
    assert report["scores"]["perplexity_increase"] < 0.5
    (again,) = json.loads(run("build", config, "--store", store, "--json").stdout)
    assert again["checkpoint_reused"]
    report["scores"] |= {"perplexity_increase": 0.6}  # as if it had been measured so
    (Path(built["checkpoint"]) / "accuracy.json").write_text(json.dumps(report))
    failed = run("build", config, "--store", store)
    assert failed.exit_code == 1
    assert "perplexity increased by 60.00%" in failed.stderr
    config.write_text(CONFIG.format(source=source, limit="50%").replace("samples: 4", "samples: 5"))
    (other,) = json.loads(run("build", config, "--store", store, "--json").stdout)
    assert other["checkpoint"] != built["checkpoint"]


@pytest.mark.parametrize("form", ["fp8_rowwise", "int4_awq"])
def test_a_quantised_source_stays_the_same_in_the_hugging_face_layout(form: str, source: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    options = ["--quantization", form, "--runtime", "llmapi", "--no-accuracy", *QUICK]
    assert run("convert", source, first, *options).exit_code == 0
    result = run("convert", first, second, "--runtime", "llmapi", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["exact"]
    for name in ("model.safetensors", "hf_quant_config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_the_hugging_face_layout_is_measured_from_its_files(source: Path, tmp_path: Path) -> None:
    result = run(
        "convert", source, tmp_path / "out", "--quantization", "fp8", "--kv-cache", "fp8", "--runtime", "llmapi",
        "--requantize", *QUICK, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    scores = json.loads(result.stdout)["accuracy"]["scores"]
    assert scores["mean_kl"] > 0
    assert scores["top1_agreement"] > 0.5


def test_auto_chooses_within_the_bits(source: Path, tmp_path: Path) -> None:
    result = run(
        "convert", source, tmp_path / "out", "--auto", "--target-bits", "6", "--plot", tmp_path / "front.svg",
        "--no-accuracy", *QUICK,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "<- chosen" in result.stdout
    assert (tmp_path / "front.svg").read_text().startswith("<svg")
    table = json.loads((tmp_path / "out" / "quant_cfg.json").read_text())["quantized_layers"]
    assert {entry["quant_algo"] for entry in table.values()} <= {"W4A16_AWQ", "FP8", "W8A8_SQ_PER_CHANNEL"}
    assert run("verify", source, tmp_path / "out").exit_code == 0


def test_force_replaces_an_earlier_export(source: Path, tmp_path: Path) -> None:
    options = ["--quantization", "fp8", "--runtime", "llmapi", "--no-accuracy", *QUICK]
    assert run("convert", source, tmp_path / "out", *options).exit_code == 0
    again = run("convert", source, tmp_path / "out", *options)
    assert again.exit_code == 2 and "exists already" in again.stderr
    assert run("convert", source, tmp_path / "out", *options, "--force").exit_code == 0
    refused = run("evaluate", source, tmp_path / "out")
    assert refused.exit_code == 2 and "convert it first" in refused.stderr
    limited = run("convert", tmp_path / "out", tmp_path / "other", "--max-perplexity-increase", "2%")
    assert limited.exit_code == 2 and "quantised already" in limited.stderr


def test_a_dry_run_of_auto_writes_nothing(source: Path, tmp_path: Path) -> None:
    (tmp_path / "front.svg").write_text("mine")
    result = run("convert", source, tmp_path / "out", "--auto", "--plot", tmp_path / "front.svg", "--dry-run", *QUICK)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "front.svg").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["front.svg"]


def test_what_depends_on_no_activations_needs_no_text(source: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((source / name).read_bytes())
    result = run("convert", bare, tmp_path / "out", "--quantization", "fp8_rowwise", "--no-accuracy")
    assert result.exit_code == 0, result.output
    refused = run("convert", bare, tmp_path / "other", "--quantization", "fp8", "--no-accuracy")
    assert refused.exit_code == 2 and "tokenizer" in refused.stderr
