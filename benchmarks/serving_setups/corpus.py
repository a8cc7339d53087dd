"""Prompts and a tokenizer for the serving-path benchmark, made from the Python files of this installation."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

VOCABULARY = 32_000
PROMPTS, MEAN_TOKENS = 500, 225
_SPECIAL = ["<|begin|>", "<|end|>"]
_BYTES = 24_000_000


def texts() -> list[str]:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    found, size = [], 0
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace")
        found.append(text)
        size += len(text)
        if size > _BYTES:
            break
    return found


def tokenizer_folder(work: Path) -> Path:
    """A byte-level BPE tokenizer with 32,000 tokens, trained on first use."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    folder = work / "tokenizer"
    if (folder / "tokenizer.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=_SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts(), trainer)
    begin = tokenizer.token_to_id(_SPECIAL[0])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_SPECIAL[0]} $A", special_tokens=[(_SPECIAL[0], begin)]
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": _SPECIAL[0], "eos_token": _SPECIAL[1],
        "pad_token": _SPECIAL[1], "model_max_length": 131072, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    generation = {"bos_token_id": begin, "eos_token_id": tokenizer.token_to_id(_SPECIAL[1])}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **generation}))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def prompts(folder: Path) -> list[tuple[str, list[int]]]:
    """Texts of 150 to 300 tokens, 225 on average, with their tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode("\n".join(texts()[:200]), add_special_tokens=False).ids
    found, place = [], 0
    for number in range(PROMPTS):
        length = 150 + (number * 37) % 151
        text = tokenizer.decode(ids[place : place + length])
        place += length
        found.append((text, tokenizer.encode(text).ids))
    return found
