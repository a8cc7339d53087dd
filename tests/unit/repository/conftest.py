"""Tokenizers trained on the spot, a source folder with one, and Triton's Python interface as a strict stand-in."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_triton
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from trtkit import contract

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "def main(argv: list[str]) -> int:\n    return sum(len(a) for a in argv)\n",
    "Grüße aus Köln; ça va, naïve façade? Ελληνικά και кириллица.",
    "漢字とかな交じり文。天地玄黃宇宙洪荒。",
    "emoji 🙂🚀 and\ttabs\r\nlines",
] * 4


def byte_level() -> Tokenizer:
    """Byte-level BPE, as in GPT-2, Llama 3 and Qwen; adds <s> in front of prompts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<s>", "</s>", "<|eot|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool é>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def sentencepiece() -> Tokenizer:
    """BPE with byte fallback and "▁" for spaces, as in Llama 2 and Mistral; adds <s> in front of prompts."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))  # noqa: S106 - a token of text
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    # Left out of the alphabet, and so spelt in bytes: everything but ASCII letters and a few signs.
    alphabet = [chr(c) for c in range(0x21, 0x7F)] + ["▁", "é"]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", "<s>", "</s>", *bytes_],
        limit_alphabet=len(alphabet),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    # The trainer marks the byte tokens as special, which they are not in real models: they would be skipped in texts.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.fixture(scope="session", params=["byte_level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return {"byte_level": byte_level, "sentencepiece": sentencepiece}[request.param]()


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    return byte_level()


@pytest.fixture(scope="session")
def sentencepiece_tokenizer() -> Tokenizer:
    return sentencepiece()


@pytest.fixture
def source(tmp_path: Path, byte_tokenizer: Tokenizer) -> Path:
    """A source folder as far as the generator reads it. Its model has two end ids."""
    folder = tmp_path / "source"
    folder.mkdir()
    byte_tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2], "pad_token_id": 1}')
    return folder


def strings(*rows: list[str | bytes]) -> Any:
    """A STRING tensor of these batch rows."""
    items = [[text if isinstance(text, bytes) else text.encode() for text in row] for row in rows]
    return np.array(items, dtype=object).reshape(len(rows), -1)


def ints(*rows: Any) -> Any:
    """An INT32 tensor of these batch rows."""
    return np.array(rows, dtype=np.int32)


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A stand-in for Triton's Python interface; `triton.load(folder, config)` loads a model as the server does."""
    module: Any = fake_triton.module(outputs=None, batch=None)
    module.warnings = module.Logger.others
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)
    loaded: list[str] = ["serving.metrics"]  # it keeps the module that it has imported

    def load(folder: Path, parameters: dict[str, str]) -> Any:
        import importlib.util

        tensors = (*contract.PREPROCESSING_OUTPUTS, *contract.POSTPROCESSING_OUTPUTS)
        module.InferenceResponse.outputs = {tensor.name: tensor for tensor in tensors}
        monkeypatch.syspath_prepend(str(folder))
        loaded.extend(path.stem for path in folder.glob("*.py"))
        spec = importlib.util.spec_from_file_location("triton_model_under_test", folder / "model.py")
        assert spec is not None
        assert spec.loader is not None
        code = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, code)
        spec.loader.exec_module(code)
        model = code.TritonPythonModel()
        config = {"parameters": {key: {"string_value": value} for key, value in parameters.items()}}
        model.initialize({"model_config": json.dumps(config), "model_name": "model", "model_version": "1"})
        return model

    module.load = load
    module.Request, module.strings, module.ints = fake_triton.Request, strings, ints
    yield module
    for name in [*loaded, *(name for name in sys.modules if name.split(".")[0] == "serving")]:
        sys.modules.pop(name, None)
