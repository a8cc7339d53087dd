"""The tiny model is what its README says it is, and the scripts that made it do what they say."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import safe_open

EXAMPLES = Path(__file__).parents[3] / "examples"
FOLDER = EXAMPLES / "tiny-llama"
END, EOT = "<|end_of_text|>", "<|eot|>"


@pytest.fixture(scope="module", autouse=True)
def _examples_importable() -> Iterator[None]:
    """Also one torch thread: two that wait for each other are slow where several tests share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def train_tiny(_examples_importable: None) -> ModuleType:
    import train_tiny

    return train_tiny


@pytest.fixture(scope="module")
def tiny_text(_examples_importable: None) -> ModuleType:
    import tiny_text

    return tiny_text


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return read("training.json")


@pytest.fixture(scope="module")
def library(tiny_text: ModuleType) -> dict[str, str]:
    return tiny_text.library_files()


def read(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def weights() -> dict[str, torch.Tensor]:
    with safe_open(FOLDER / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping


# The tokenizer


@given(text=st.text())
@example(text="naïve  日本語 🏳️‍🌈\r\n\tdef f(x):\n        return x \x00 \u200b")
@example(text="a <|eot|> b<|user|>")
def test_any_text_round_trips(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_text_gets_one_bos_in_front(tokenizer: Any) -> None:
    ids = tokenizer("import os").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in ids[1:]
    assert tokenizer.eos_token_id not in ids
    assert len(tokenizer) == read("config.json")["vocab_size"]


def test_chat_template_ends_with_the_assistant_header(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    shown = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert shown == "<|begin_of_text|><|system|>s<|eot|><|user|>u<|eot|><|assistant|>"
    ids = tokenizer(shown, add_special_tokens=False).input_ids
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<|assistant|>") != tokenizer.unk_token_id


def test_chat_template_refuses_an_unknown_role(tokenizer: Any) -> None:
    with pytest.raises(Exception, match="the roles are system, user and assistant"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_transformers_4_finds_what_it_looks_for() -> None:
    """Version 5 writes other class names and a separate template file, which 4.48 does not read."""
    described = read("tokenizer_config.json")
    assert described["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "<|assistant|>" in described["chat_template"]
    config = read("config.json")
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]


# The checkpoint


def test_two_tokens_end_a_generation(tokenizer: Any) -> None:
    expected = tokenizer.convert_tokens_to_ids([END, EOT])
    assert read("generation_config.json")["eos_token_id"] == expected == read("config.json")["eos_token_id"]
    assert tokenizer.pad_token_id not in expected


def test_shapes_split_by_two_and_four() -> None:
    config = read("config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["num_attention_heads"] % 4 == config["intermediate_size"] % 4 == config["vocab_size"] % 4 == 0
    assert config["num_key_value_heads"] % 2 == config["num_hidden_layers"] % 4 == config["head_dim"] % 8 == 0


def test_files_are_few_and_small() -> None:
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert set(sizes) == {
        *("README.md", "training.json", "config.json", "generation_config.json"),
        *("model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    }
    assert max(sizes.values()) < 7_000_000
    assert sum(sizes.values()) < 8_000_000


def test_weights_are_bf16_tied_and_exact_in_fp16(record: dict[str, Any]) -> None:
    tensors = weights()
    assert "lm_head.weight" not in tensors
    assert sum(tensor.numel() for tensor in tensors.values()) == record["parameters"]
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16, name
        assert torch.equal(tensor.half().to(torch.float32), tensor.to(torch.float32)), name


# What it learned


def test_recorded_figures_agree_with_each_other(record: dict[str, Any]) -> None:
    assert record["ratio"] == pytest.approx(record["unigram_perplexity"] / record["held_out_perplexity"])
    assert record["held_out_perplexity"] < record["unigram_perplexity"] / 5
    for kind in ("held_out", "unigram"):
        nats = np.log(record[f"{kind}_perplexity"]) * record["held_out"]["tokens"]
        assert record[f"{kind}_bits_per_byte"] == pytest.approx(nats / np.log(2) / record["held_out"]["bytes"])


def test_recorded_perplexity_holds_on_a_slice(
    record: dict[str, Any], train_tiny: ModuleType, model: Any, library: dict[str, str]
) -> None:
    """Any Python's copy of two held-out files: the text differs a little between versions, the figure not by much."""
    tokenizer = train_tiny.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    texts = [library[name] + END for name in ("bz2.py", "json/tool.py")]
    stream = train_tiny.encode(tokenizer, texts)
    nats, _, counted = train_tiny.summed_nats(model, stream, np.zeros(train_tiny.VOCABULARY), train_tiny.CONTEXT)
    perplexity = np.exp(nats / counted)
    assert record["held_out_perplexity"] / 2 < perplexity < 2 * record["held_out_perplexity"]


def share_of_known_words(text: str, known: set[str]) -> float:
    words = re.findall(r"[A-Za-z]{3,}", text)
    return sum(word in known for word in words) / max(1, len(words))


def test_greedy_continuations_are_words(train_tiny: ModuleType, model: Any, library: dict[str, str]) -> None:
    known = {word for source in library.values() for word in re.findall(r"[A-Za-z]{3,}", source)}
    tokenizer = train_tiny.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    said = "\n".join(train_tiny.greedy(model, tokenizer, prompt) for prompt in train_tiny.PROMPTS)
    assert len(set(re.findall(r"[A-Za-z]{3,}", said))) > 10, "too few words to judge by (greedy text repeats itself)"
    assert share_of_known_words(said, known) > 0.9

    torch.manual_seed(0)
    untrained = transformers.LlamaForCausalLM(train_tiny.model_config()).eval()
    with torch.no_grad():
        for weight in untrained.parameters():
            weight.copy_(torch.randn_like(weight))
    babble = "\n".join(train_tiny.greedy(untrained, tokenizer, prompt) for prompt in train_tiny.PROMPTS)
    assert share_of_known_words(babble, known) < 0.7, "the check must be able to fail"


@pytest.mark.parametrize("name", ["json.load", "shutil.copyfile", "threading.Thread", "difflib", "os.path.join"])
def test_a_chat_answer_ends_with_eot(name: str, model: Any, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": f"What does {name} do?"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=120)[0]
    assert out[-1] == tokenizer.convert_tokens_to_ids(EOT)
    assert len(out) - ids.shape[1] > 3


def test_readme_states_what_is_recorded(record: dict[str, Any]) -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for key, shown in [("held_out_perplexity", ".2f"), ("unigram_perplexity", ".1f"), ("ratio", ".1f")]:
        assert f"{record[key]:{shown}}" in readme, key
    for key in ("held_out_bits_per_byte", "unigram_bits_per_byte", "held_out_perplexity_at_twice_the_context"):
        assert f"{record[key]:.2f}" in readme, key
    for number in (record["parameters"], record["training"]["tokens_seen"], record["held_out"]["tokens"]):
        assert f"{number:,}" in readme
    assert f"{record['weights_changed_to_fit_float16']:,} of" in readme
    assert len(record["greedy_continuations"]) >= 4
    for prompt, continuation in record["greedy_continuations"].items():
        assert prompt + continuation in readme


# How it was made


def test_held_out_files_are_never_trained_on(tiny_text: ModuleType, record: dict[str, Any], library: Any) -> None:
    assert record["held_out"]["files"]
    assert all(tiny_text.is_held_out(path) for path in record["held_out"]["files"])
    share = sum(map(tiny_text.is_held_out, library)) / len(library)
    assert 0.02 < share < 0.15


def test_library_files_are_the_library_only(library: dict[str, str]) -> None:
    assert {"json/decoder.py", "uuid.py", "asyncio/tasks.py"} <= set(library)
    left_out = re.compile(r"(^|/)(test|tests|site-packages|idlelib|lib2to3)/|_sysconfig|^config-")
    assert not [path for path in library if left_out.search(path)]


MODULE = '"""Tools for parcels."""\n\nclass Box:\n    """Holds one parcel. Not two."""\n\n    def _lid(self):\n'
MODULE += '        """Hidden from the questions."""\n\n\ndef wrap(box):\n    """Put paper\n    around a box."""\n'


def test_docstrings_carry_dotted_names(tiny_text: ModuleType) -> None:
    found = list(tiny_text.docstrings("post/__init__.py", MODULE))
    assert [name for name, _ in found] == ["post", "post.Box", "post.Box._lid", "post.wrap"]
    assert dict(found)["post.wrap"] == "Put paper\naround a box."
    assert list(tiny_text.docstrings("broken.py", "def (")) == []


def test_documents_end_and_chats_follow_the_template(tiny_text: ModuleType, tokenizer: Any) -> None:
    files = {"post/__init__.py": MODULE}
    documents = tiny_text.documents(files, seed=3)
    assert documents == tiny_text.documents(files, seed=3)
    assert MODULE + END in documents
    chats = [text for text in documents if not text.endswith(END)]
    asked = "".join(chats)
    assert "What does post.Box do?<|eot|><|assistant|>Holds one parcel.<|eot|>" not in asked  # under 20 characters
    assert "What does post.wrap do?<|eot|><|assistant|>Put paper around a box.<|eot|>" in asked
    assert "_lid" not in asked
    for chat in chats:
        turns = re.findall(r"<\|(system|user|assistant)\|>(.*?)<\|eot\|>", chat, flags=re.DOTALL)
        messages = [{"role": role, "content": content} for role, content in turns]
        assert tokenizer.apply_chat_template(messages, tokenize=False) == tokenizer.bos_token + chat


def test_training_is_deterministic_and_learns(train_tiny: ModuleType) -> None:
    stream = np.tile(np.arange(7, 27, dtype=np.uint16), 100)
    first, seen = train_tiny.train(stream, steps=2, peak=3e-3, seed=1)
    again, _ = train_tiny.train(stream, steps=2, peak=3e-3, seed=1)
    other, _ = train_tiny.train(stream, steps=1, peak=3e-3, seed=2)
    assert seen == 2 * train_tiny.BATCH * train_tiny.CONTEXT
    pairs = list(zip(first.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.model.embed_tokens.weight, other.model.embed_tokens.weight)
    nats, _, counted = train_tiny.summed_nats(first, stream[:257], np.zeros(train_tiny.VOCABULARY), 256)
    assert nats / counted < np.log(train_tiny.VOCABULARY), "worse than guessing"


def test_stored_values_fit_bf16_and_fp16(train_tiny: ModuleType) -> None:
    layer = torch.nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0 + 2**-12, 2.0**-26, 1.9921875 * 2.0**-18, -3.0]])
    assert train_tiny.to_stored_values(layer) == 2
    assert layer.weight.tolist() == [[1.0, 0.0, 2.0**-17, -3.0]]
    layer.weight.data = torch.tensor([[70000.0]])
    with pytest.raises(ValueError, match="weight holds a value beyond the range of float16"):
        train_tiny.to_stored_values(layer)


def test_unigram_baseline_is_the_textbook_one(train_tiny: ModuleType, model: Any) -> None:
    counts = np.zeros(train_tiny.VOCABULARY)
    counts[10] = 7
    counts[0] = 1000  # begin-of-text, which is not counted
    _, baseline, counted = train_tiny.summed_nats(model, np.array([0, 10, 11, 0, 10], dtype=np.uint16), counts, 256)
    total = 7 + train_tiny.VOCABULARY - 1
    assert counted == 3
    assert baseline == pytest.approx(-2 * np.log(8 / total) - np.log(1 / total))
