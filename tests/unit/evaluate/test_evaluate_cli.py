"""`trtkit evaluate`: its sides, what it prints, its exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trtkit import hf
from trtkit.cli import main
from trtkit.config import CheckpointConfig
from trtkit.convert.conversion import convert
from trtkit.convert.source import plan_conversion
from trtkit.errors import InputError, LacksError
from trtkit.evaluate.models import load_checkpoint, load_source, usable_device

SMALL = ("--samples", "4", "--length", "24")


@pytest.fixture(scope="session")
def checkpoint(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "out"
    source = hf.open_source(sources["one"])
    convert(plan_conversion(source, CheckpointConfig(tp=2)), source, folder)
    return folder


def trtkit(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `trtkit evaluate ARGS`."""
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", *map(str, args)])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_a_checkpoint_costs_nothing(
    sources: dict[str, Path], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = trtkit(capsys, sources["one"], checkpoint, *SMALL, "--max-perplexity-increase", "0%")
    assert code == 0, err
    for line in ("perplexity increase", "+0.00% (standard error 0.00%)", "100.00% of 92 tokens", "nats per token"):
        assert line in out
    assert "loading checkpoint" in err and "loading" not in out


def test_json(sources: dict[str, Path], checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = trtkit(capsys, checkpoint, sources["one"], *SMALL, "--json")
    found = json.loads(out)
    assert code == 0 and found["passed"] is True and found["max_perplexity_increase"] is None
    assert found["reference"] == {"kind": "checkpoint", "place": str(checkpoint)}
    assert found["candidate"] == {"kind": "source", "place": str(sources["one"])}
    assert found["scores"]["mean_kl"] == pytest.approx(0, abs=1e-9) and found["scores"]["tokens"] == 4 * 23
    assert found["missing"] == {} and found["next_tokens"] is None
    assert (found["text"]["samples"], found["text"]["length"], found["text"]["prefix"]) == (4, 24, 1)
    assert "held-out" in found["text"]["origin"] and len(found["text"]["digest"]) == 64


def test_a_changed_model_fails_the_limit(sources: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    args = (sources["one"], sources["other"], *SMALL, "--json")
    code, out, err = trtkit(capsys, *args)
    increase = json.loads(out)["scores"]["perplexity_increase"]
    assert code == 0 and abs(increase) > 1e-4
    low, high = (args, args[1::-1] + args[2:]) if increase > 0 else (args[1::-1] + args[2:], args)
    code, out, err = trtkit(capsys, *low, "--max-perplexity-increase", "0.001%")
    found = json.loads(out)
    assert code == 1 and found["passed"] is False and found["max_perplexity_increase"] == pytest.approx(1e-5)
    assert "perplexity increased by" in err
    assert trtkit(capsys, *high, "--max-perplexity-increase", "0.001%")[0] == 0  # the other way round it is better


def test_a_small_change_is_seen(sources: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = trtkit(capsys, sources["one"], sources["twin"], *SMALL, "--json")
    scores = json.loads(out)["scores"]
    assert code == 0 and 0 < scores["mean_kl"] < 0.2 and scores["max_kl"] >= scores["kl_p99"] >= scores["mean_kl"]


def test_text_of_your_own(sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = np.random.default_rng(0).integers(0, 300, (5, 9))
    np.save(tmp_path / "ids.npy", ids)
    code, out, _ = trtkit(capsys, sources["one"], sources["one"], "--text", tmp_path / "ids.npy", "--json")
    found = json.loads(out)
    assert (
        code == 0 and found["scores"]["tokens"] == 5 * 8 and found["text"]["origin"] == f"file:{tmp_path / 'ids.npy'}"
    )
    with torch.inference_mode():
        log = load_source(sources["one"])(torch.from_numpy(ids)).logits.double().log_softmax(-1)
    nll = -log[:, :-1].gather(2, torch.from_numpy(ids[:, 1:, None])).mean()
    assert found["scores"]["reference_perplexity"] == pytest.approx(float(nll.exp()), rel=1e-6)
    (tmp_path / "a.txt").write_text("the quick brown fox " * 40)
    code, out, _ = trtkit(capsys, sources["one"], sources["one"], *SMALL, "--text", tmp_path / "a.txt", "--json")
    assert code == 0 and json.loads(out)["text"]["origin"].endswith("a.txt")


def test_a_hub_id_may_name_a_revision(
    sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, str | None]] = []

    def download(name: str, revision: str | None) -> Path:  # a stand-in for the hub
        asked.append((name, revision))
        return sources["one"]

    monkeypatch.setattr(hf, "download", download)
    code, out, _ = trtkit(capsys, "owner/name@v2", "owner/name", *SMALL, "--json")
    assert code == 0 and asked == [("owner/name", "v2"), ("owner/name", None)]
    assert json.loads(out)["reference"]["place"] == str(sources["one"])


def test_two_checkpoints_need_a_tokenizer(
    sources: dict[str, Path], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = trtkit(capsys, checkpoint, checkpoint, *SMALL)
    assert code == 2 and "no tokenizer for the text" in err and "--tokenizer DIR" in err
    assert trtkit(capsys, checkpoint, checkpoint, *SMALL, "--tokenizer", sources["one"])[0] == 0
    np.save(tmp_path / "ids.npy", np.ones((2, 4), np.int64))
    assert trtkit(capsys, checkpoint, checkpoint, "--text", tmp_path / "ids.npy")[0] == 0


def wrong_usage(sources: dict[str, Path], tmp_path: Path) -> dict[str, tuple[list[Any], int, str]]:
    one = sources["one"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "config.json").write_text('{"pretrained_config": {}, "build_config": {}}')
    return {
        "nothing": ([], 2, "Missing argument"),
        "absent": ([one, tmp_path / "absent"], 2, "absent does not exist"),
        "empty folder": ([one, tmp_path / "empty"], 2, "is empty"),
        "engine": ([one, tmp_path / "engine"], 2, "is an engine, which cannot be evaluated here"),
        "limit": ([one, one, "--max-perplexity-increase", "2"], 2, "write 2% if you mean per cent"),
        "device": ([one, one, *SMALL, "--device", "abacus"], 2, "'abacus' is no device"),
        "long windows": ([one, one, "--samples", "1", "--length", "200"], 2, "longer than the 128 positions"),
        "short text": ([one, one, "--text", tmp_path / "short.txt"], 2, "has 2 tokens; 64 samples of 128 need"),
        "other vocabulary": ([one, sources["small"], *SMALL], 2, "different vocabularies"),
        "no server": ([one, "grpc://127.0.0.1:9", *SMALL], 3, "no server answers at grpc://127.0.0.1:9"),
        "no url": ([one, "grpc://nowhere", *SMALL], 2, "not a url with a host and a port"),
    }


CASES = ["nothing", "absent", "empty folder", "engine", "limit", "device", "long windows", "short text",
         "other vocabulary", "no server", "no url"]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_wrong_usage(sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    (tmp_path / "short.txt").write_text("a")
    table = wrong_usage(sources, tmp_path)
    assert list(table) == CASES
    args, wanted, cause = table[case]
    code, out, err = trtkit(capsys, *args)
    assert code == wanted and cause in err and not out, err


# --- models -----------------------------------------------------------------------------------------------------------


def test_models_run_in_float32_without_the_source_s_code(sources: dict[str, Path], checkpoint: Path) -> None:
    for model in (load_source(sources["one"]), load_checkpoint(checkpoint)):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32} and not model.training


def test_a_source_with_code_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((sources["one"] / "config.json").read_text())
    config |= {"model_type": "made-up", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(InputError, match="cannot load the model"):
        load_source(tmp_path)


def test_devices() -> None:
    assert usable_device("cpu").type == "cpu"
    for name in ("", "meta", "tpu"):
        with pytest.raises(InputError):
            usable_device(name)
    with pytest.raises(LacksError, match="torch sees no device"):
        usable_device("cuda:99")
