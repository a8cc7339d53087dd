"""Small random models, as transformers objects and as source folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCABULARY = 300


def make_llama(seed: int = 0, **changes: Any) -> Any:
    """A random Llama that is sure of what it says."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
        **changes,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer that begins every text with token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture
def llama() -> Callable[..., Any]:
    return make_llama


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Source folders: `one`, its `twin` with one row of one weight changed, `other` with other weights, and `small`
    with another vocabulary."""
    folder = tmp_path_factory.mktemp("sources")
    made = {"one": make_llama(), "twin": make_llama(), "other": make_llama(1), "small": make_llama(vocab_size=290)}
    with torch.no_grad():
        made["twin"].model.layers[0].mlp.down_proj.weight[3] *= 1.5
    for name, model in made.items():
        model.to(torch.bfloat16).save_pretrained(folder / name)
        write_tokenizer(folder / name)
    return {name: folder / name for name in made}
