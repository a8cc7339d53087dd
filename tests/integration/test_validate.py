"""`trtkit validate` on the whole chain: a random Llama, converted with TP 2, served in Triton by `reference`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from trtkit import hf
from trtkit.cli import main
from trtkit.config_file import load_config
from trtkit.convert.conversion import convert
from trtkit.convert.source import plan_conversion
from trtkit.deploy.local import running_server
from trtkit.repository.generate import render_repository, write_repository

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.xdist_group("validate_server")]

CONFIG = """
name: validate-{kind}
model: {{source: {source}}}
checkpoint: {{tp: 2}}
serving: {{runtime: reference, max_batch_size: 4, streaming: {streaming}}}
validation: {{max_tokens: 16, prompts: [the quick, "漢字", "fox jumps over", a]}}
"""


def write_source(folder: Path, seed: int) -> Path:
    """A random Llama that is sure of what it says, with a byte-level tokenizer and two end ids."""
    torch.manual_seed(seed)
    settings = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(settings).to(torch.bfloat16).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<|eot|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    names["chat_template"] = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source, another source of the same shape, and the checkpoint of the first."""
    folder = tmp_path_factory.mktemp("chain")
    source = hf.open_source(write_source(folder / "source", seed=1))
    write_source(folder / "other", seed=2)
    config = load_config(write_config(folder, streaming=True))
    convert(plan_conversion(source, config.checkpoint), source, folder / "checkpoint")
    return folder


def write_config(folder: Path, *, streaming: bool) -> Path:
    kind = "streamed" if streaming else "whole"
    file = folder / f"{kind}.yaml"
    file.write_text(CONFIG.format(kind=kind, source=folder / "source", streaming=str(streaming).lower()))
    return file


@contextmanager
def served(folder: Path, home: Path, *, streaming: bool) -> Iterator[Path]:
    """The build config of a deployment that runs in this block."""
    file = write_config(folder, streaming=streaming)
    config = load_config(file)
    files = render_repository(config, tokenizer_dir=folder / "source", checkpoint_dir=folder / "checkpoint")
    write_repository(files, home / "repository")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRTKIT_STATE_DIR", str(home / "state"))
        with running_server(home / "repository", name=config.name, exit_timeout_s=5):
            yield file


@pytest.fixture(scope="module")
def config_file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The build config of a streaming deployment that runs while the tests do."""
    with served(folder, tmp_path_factory.mktemp("served"), streaming=True) as file:
        yield file


def validate(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, dict[str, Any]]:
    """Exit code and results by check of `trtkit validate ARGS --json`."""
    with pytest.raises(SystemExit) as stop:
        main(["validate", *map(str, args), "--json"])
    results = json.loads(capsys.readouterr().out)["checks"]
    return int(stop.value.code or 0), {result["name"]: result for result in results}


def test_everything_holds(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, results = validate(capsys, config_file)
    assert code == 0 and {result["outcome"] for result in results.values()} == {"passed"}, results
    assert results["parity"]["figures"]["agreement"] == 1.0
    assert results["parity"]["figures"]["total"] > 16
    assert results["text"]["figures"]["equal"] == 16
    assert results["contract"]["findings"] == []
    assert results["chat"]["figures"]["equal"] == 6
    assert len(results["cancellation"]["figures"]["seconds"]) == 4, "the engine and the model in front of it"
    figures = results["streaming"]["figures"]
    assert figures["equal"] == figures["streams"] == 28 and max(figures["pieces"]) > 4


def test_everything_holds_without_streaming(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with served(folder, tmp_path, streaming=False) as file:
        code, results = validate(capsys, file)
    assert code == 0, results
    skipped = {name for name, result in results.items() if result["outcome"] == "skipped"}
    assert skipped == {"streaming", "cancellation"}


def test_a_server_of_other_weights_fails_parity_and_nothing_else(
    config_file: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, results = validate(capsys, config_file, "--source", folder / "other", "--skip", "cancellation")
    assert code == 1
    assert [name for name, result in results.items() if result["outcome"] == "failed"] == ["parity"]
    finding = results["parity"]["findings"][0]
    assert finding["id"] == "TK711" and finding["severity"] == "error" and "logit margin" in finding["cause"]


def test_a_server_of_another_tokenizer_fails_the_text_check(
    config_file: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = shutil.copytree(folder / "source", tmp_path / "changed")
    tokenizer = json.loads((changed / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    ids = sorted(vocabulary.values())
    rotated = {
        token: ids[3 + (number - 3 + 1) % (len(ids) - 3)] if number > 2 else number
        for token, number in vocabulary.items()
    }
    tokenizer["model"]["vocab"] = rotated
    (changed / "tokenizer.json").write_text(json.dumps(tokenizer))
    code, results = validate(capsys, config_file, "--source", changed, "--only", "text")
    assert code == 1 and {finding["id"] for finding in results["text"]["findings"]} == {"TK715"}


def test_a_config_that_disagrees_with_what_is_served(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = config_file.read_text()
    changed = tmp_path / "changed.yaml"
    changed.write_text(text.replace("streaming: true", "streaming: false").replace("batch_size: 4", "batch_size: 8"))
    code, results = validate(capsys, changed, "--only", "contract")
    assert code == 1
    assert {finding["id"] for finding in results["contract"]["findings"]} == {"TK706", "TK707"}
