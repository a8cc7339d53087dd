"""`trtkit evaluate` with a served side: a random Llama in Triton, served by `reference`, over gRPC and HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trtkit import hf
from trtkit.cli import main
from trtkit.config_file import load_config
from trtkit.convert.conversion import convert
from trtkit.convert.source import plan_conversion
from trtkit.deploy.local import running_server
from trtkit.repository.generate import render_repository, write_repository

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.xdist_group("evaluate_server")]

SMALL = ("--samples", "3", "--length", "48", "--prefixes", "5")
CONFIG = """
name: evaluate
model: {{source: {source}}}
checkpoint: {{tp: 2, dtype: float32}}
serving: {{runtime: reference, max_batch_size: 8, streaming: {streaming}}}
"""


def write_source(folder: Path, seed: int) -> Path:
    """A random Llama that is sure of what it says, with a byte-level tokenizer."""
    torch.manual_seed(seed)
    settings = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(settings).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 3, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


@pytest.fixture(scope="module", params=["true", "false"], ids=["decoupled", "not decoupled"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Folders of the served `source`, of an `other` one and of the `checkpoint`, and both urls of the server."""
    home = tmp_path_factory.mktemp("evaluate")
    write_source(home / "source", seed=1)
    write_source(home / "other", seed=2)
    (home / "build.yaml").write_text(CONFIG.format(source=home / "source", streaming=request.param))
    config = load_config(home / "build.yaml")
    source = hf.open_source(home / "source")
    convert(plan_conversion(source, config.checkpoint), source, home / "checkpoint")
    files = render_repository(config, tokenizer_dir=home / "source", checkpoint_dir=home / "checkpoint")
    write_repository(files, home / "repository")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRTKIT_STATE_DIR", str(home / "state"))
        with running_server(home / "repository", name=config.name, exit_timeout_s=5) as deployment:
            folders = {name: str(home / name) for name in ("source", "other", "checkpoint")}
            yield {**folders, "grpc": deployment.url("grpc"), "http": deployment.url("http")}


def evaluate(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, dict[str, Any], str]:
    """Exit code, result and stderr of `trtkit evaluate ARGS --json`."""
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", *map(str, args), "--json"])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), json.loads(captured.out), captured.err


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_server_agrees_with_its_source_and_not_with_another(
    served: dict[str, str], capsys: pytest.CaptureFixture[str], protocol: str
) -> None:
    for side in ("source", "checkpoint"):
        folder = ("--tokenizer", served["source"])
        code, found, _ = evaluate(capsys, served[side], served[protocol], *SMALL, *folder)
        assert code == 0 and found["passed"] is True and found["scores"] is None
        assert found["candidate"] == {"kind": "served", "place": served[protocol]}
        assert found["next_tokens"]["prefixes"] == 15 and found["next_tokens"]["top1_agreement"] == 1.0
        assert found["next_tokens"]["log_prob_difference"] == pytest.approx(0, abs=1e-4)
        assert set(found["missing"]) == {"perplexity", "KL divergence"}
        assert "has no output 'context_logits'" in found["missing"]["perplexity"]
    code, found, _ = evaluate(capsys, served["other"], served[protocol], *SMALL)
    assert code == 0 and found["next_tokens"]["top1_agreement"] < 0.5
    assert found["next_tokens"]["log_prob_difference"] > 0.1 and found["next_tokens"]["disagreement_margin"] > 0


def test_two_servers_and_a_limit_that_nobody_can_keep(
    served: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ("--tokenizer", served["source"])
    code, found, _ = evaluate(capsys, served["grpc"], served["http"], *SMALL, *folder)
    assert code == 0 and found["next_tokens"]["top1_agreement"] == 1.0
    assert found["next_tokens"]["log_prob_difference"] == pytest.approx(0, abs=1e-5)
    code, found, err = evaluate(capsys, served["source"], served["grpc"], *SMALL, "--max-perplexity-increase", "2%")
    assert code == 2 and "gives no logits" in found["error"]["cause"] and "loading" not in err


def test_a_model_that_the_server_does_not_have(served: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    code, found, _ = evaluate(capsys, served["source"], served["grpc"], *SMALL, "--model", "nope")
    assert code == 1 and "nope" in found["error"]["cause"]
