"""Calibration text: every source, windows without padding, draws that can be repeated."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from trtkit.errors import InputError, LacksError
from trtkit.quantize import builtin_text, documents
from trtkit.quantize.builtin_text import library_documents, own_documents
from trtkit.quantize.calibration import cut_windows, draw_order, load_tokens

BOS, EOS, PAD = 0, 1, 2
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source without weights: a byte-level tokenizer that begins every text with BOS, and a config.json."""
    folder = tmp_path_factory.mktemp("source")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(own_documents(held_out=True), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "model_max_length": 64}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"vocab_size": 400, "max_position_embeddings": 2048}))
    return folder


@pytest.fixture
def changed(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """`changed("config.json", key=value)`: a copy of the source with other settings; None removes a key."""

    def change(file: str, **changes: Any) -> Path:
        copy = tmp_path / "changed"
        copy.mkdir()
        for item in folder.iterdir():
            (copy / item.name).write_bytes(item.read_bytes())
        values = {**json.loads((copy / file).read_text()), **changes}
        (copy / file).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
        return copy

    return change


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def encode(folder: Path, text: str) -> list[int]:
    return list(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids)


# --- windows ----------------------------------------------------------------------------------------------------------

TOKENS = st.lists(st.lists(st.integers(0, 2**40), max_size=30), max_size=8)


@given(TOKENS, st.integers(2, 12), st.lists(st.integers(0, 9), max_size=1))
def test_every_token_is_in_one_window_and_nothing_else_is(
    lists: list[list[int]], length: int, prefix: list[int]
) -> None:
    windows = cut_windows(lists, length, prefix=prefix)
    stream = [token for tokens in lists for token in tokens]
    room = length - len(prefix)
    assert windows.dtype == np.int64 and windows.shape == (len(stream) // room, length)
    assert windows[:, : len(prefix)].tolist() == [prefix] * len(windows)
    assert windows[:, len(prefix) :].reshape(-1).tolist() == stream[: len(windows) * room]
    assert len(stream) - len(windows) * room < room


@given(st.integers(0, 300), st.integers(-(2**70), 2**70))
def test_the_order_of_a_draw_holds_every_window_once(count: int, seed: int) -> None:
    order = draw_order(count, seed)
    assert sorted(order) == list(range(count)) and order == draw_order(count, seed)


def test_the_order_of_a_draw_is_the_same_everywhere() -> None:
    wanted = sorted(range(8), key=lambda index: hashlib.sha256(b"7:" + str(index).encode()).hexdigest())
    assert draw_order(8, 7) == wanted


def test_a_window_needs_room_behind_the_prefix() -> None:
    with pytest.raises(InputError, match="no room for text"):
        cut_windows([[1, 2, 3]], 2, prefix=[8, 9])


# --- files ------------------------------------------------------------------------------------------------------------


def test_documents_are_joined_by_the_end_of_text_and_windows_begin_as_requests_do(folder: Path, tmp_path: Path) -> None:
    texts = ["One sentence.", "Und noch ein Satz, länger als der erste.", "第三句。"]
    file = write_jsonl(tmp_path / "text.jsonl", [{"text": text, "other": 1} for text in texts])
    stream = [token for text in texts for token in [*encode(folder, text), EOS]]
    count = len(stream) // 7
    found = load_tokens(folder, file, samples=count, length=8, seed=3)
    assert found.tokens[:, 0].tolist() == [BOS] * count
    windows = np.array(stream[: count * 7]).reshape(count, 7)
    assert found.tokens[:, 1:].tolist() == windows[draw_order(count, 3)].tolist()
    assert PAD not in found.tokens
    assert found.origin == f"file:{file}"
    wanted = {"tokens": count * 8, "documents": 3, "text_tokens": len(stream), "windows": count, "prefix": 1}
    assert found.counts == wanted and (found.samples, found.length) == (count, 8)


def test_a_row_without_a_value_is_no_document(folder: Path, tmp_path: Path) -> None:
    rows = [{"text": None}, {"text": "words and words"}, {"text": None, "messages": None}]
    ids = [*encode(folder, "words and words"), EOS]
    found = load_tokens(folder, write_jsonl(tmp_path / "a.jsonl", rows), samples=1, length=len(ids) + 1)
    assert found.tokens[0].tolist() == [BOS, *ids] and found.counts["documents"] == 1


def test_a_tokenizer_that_begins_with_nothing_has_no_prefix(changed: Callable[..., Path], tmp_path: Path) -> None:
    folder = changed("tokenizer.json", post_processor=None)
    (tmp_path / "a.txt").write_text("some words " * 20)
    found = load_tokens(folder, tmp_path / "a.txt", samples=2, length=8)
    assert found.counts["prefix"] == 0 and BOS not in found.tokens


def test_messages_go_through_the_chat_template(folder: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    file = write_jsonl(tmp_path / "chat.jsonl", [{"messages": messages}])
    ids = encode(folder, "[user] Why?\n[assistant] Because.\n")
    found = load_tokens(folder, file, samples=1, length=len(ids) + 2)
    assert found.tokens[0].tolist() == [BOS, *ids, EOS]


def test_without_a_chat_template_messages_are_refused(changed: Callable[..., Path], tmp_path: Path) -> None:
    folder = changed("tokenizer_config.json", chat_template=None)
    file = write_jsonl(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": "Why?"}]}])
    with pytest.raises(InputError, match=r"chat\.jsonl:1: .*no chat template"):
        load_tokens(folder, file, samples=1, length=4)


def test_a_large_text_file_is_one_document(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"line {number}: überall Zeilen\n" for number in range(400)) + "the end"
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr(documents, "_BLOCK", 1000)
    pieces = list(documents._read_txt(tmp_path / "long.txt"))
    assert len(pieces) > 10 and "".join(piece.text for piece in pieces) == text
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    ids = [*encode(folder, text), EOS]
    found = load_tokens(folder, tmp_path / "long.txt", samples=len(ids) // 15, length=16)
    assert found.counts["documents"] == 1
    assert sorted(found.tokens.tolist()) == sorted(cut_windows([ids], 16, prefix=[BOS]).tolist())


def test_draws_differ_by_seed_and_repeat(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" ".join(map(str, range(4000))))
    draws = [load_tokens(folder, tmp_path / "a.txt", samples=4, length=16, seed=seed) for seed in (0, 0, 1)]
    assert draws[0].digest == draws[1].digest != draws[2].digest
    assert draws[0].tokens.tolist() == draws[1].tokens.tolist() != draws[2].tokens.tolist()
    digest = hashlib.sha256(b'{"length": 16, "samples": 4, "seed": 1}')
    digest.update(draws[2].tokens.tobytes())
    assert draws[2].digest == digest.hexdigest()


def test_what_is_read_of_a_file_is_bounded(folder: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "many.jsonl", [{"text": f"document {number}"} for number in range(2000)])
    with file.open("a") as opened:
        opened.write("this is no JSON")  # and is never read
    found = load_tokens(folder, file, samples=4, length=17)
    assert 4 * 64 <= found.counts["text_tokens"] < 4 * 64 + 50


def test_too_short_a_text_says_how_short(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("only a few words")
    count = len(encode(folder, "only a few words")) + 1
    with pytest.raises(InputError, match=rf"short\.txt has {count} tokens; 128 samples of 512 need 65,408") as error:
        load_tokens(folder, tmp_path / "short.txt")
    assert "fewer or shorter samples" in error.value.fix


BAD_TEXTS = {
    "no-json.jsonl": (b"{oops}\n", r"no-json\.jsonl:1: not valid JSON"),
    "list.jsonl": (b'{"text": "a"}\n\n[1]\n', r"list\.jsonl:3: not a JSON object"),
    "keys.jsonl": (b'{"body": "a", "id": 3}\n', r"keys\.jsonl:1: neither 'text' .* it has body, id"),
    "number.jsonl": (b'{"text": 3}\n', r"number\.jsonl:1: neither 'text'"),
    "roles.jsonl": (b'{"messages": [{"role": "user"}]}\n', r"roles\.jsonl:1: neither"),
    "latin.txt": ("Stra\xdfe".encode("latin-1"), r"latin\.txt is not UTF-8"),
    "pickle.npy": (None, r"pickle\.npy: not a readable \.npy file"),
    "words.npy": (b"words", r"words\.npy: not a readable \.npy file"),
    "text.docx": (b"words", r"text\.docx is a file of unknown kind \('\.docx'\)"),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_a_bad_file_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    data, cause = BAD_TEXTS[name]
    if data is None:
        np.save(tmp_path / name, np.array([{}], dtype=object), allow_pickle=True)
    else:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=cause) as error:
        load_tokens(folder, tmp_path / name, samples=1, length=4)
    assert error.value.fix


@pytest.mark.parametrize("name", ["absent", "absent.txt", "a b/c"])
def test_a_text_that_is_nowhere(folder: Path, name: str) -> None:
    with pytest.raises(InputError) as error:
        load_tokens(folder, name, samples=1, length=4)
    assert name in error.value.cause and error.value.fix


def test_a_folder_is_no_text(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        load_tokens(folder, tmp_path, samples=1, length=4)


# --- parquet and ready token ids --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.parquet", "a [1]*.parquet"])
def test_parquet(folder: Path, tmp_path: Path, name: str) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    messages = [None] * 299 + [[{"role": "user", "content": "Why?"}]]
    texts = [f"row {number}" for number in range(299)] + [None]
    table = pyarrow.table({"text": texts, "messages": messages, "score": range(300)})
    parquet.write_table(table, tmp_path / name)
    lists = [*(encode(folder, text) for text in texts if text), encode(folder, "[user] Why?\n")]
    stream = [token for ids in lists for token in [*ids, EOS]]
    found = load_tokens(folder, tmp_path / name, samples=len(stream) // 9, length=10)
    assert sorted(found.tokens.tolist()) == sorted(cut_windows([stream], 10, prefix=[BOS]).tolist())
    assert found.counts["documents"] == 300


def test_parquet_that_is_none_or_has_no_text(folder: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    (tmp_path / "bad.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(InputError, match=r"bad\.parquet: not a readable parquet file"):
        load_tokens(folder, tmp_path / "bad.parquet", samples=1, length=4)
    parquet.write_table(pyarrow.table({"article": ["a"], "id": [1]}), tmp_path / "other.parquet")
    with pytest.raises(InputError, match=r"other\.parquet: neither 'text' .* it has article, id"):
        load_tokens(folder, tmp_path / "other.parquet", samples=1, length=4)


@pytest.mark.parametrize(("text", "package"), [("rows.parquet", "pyarrow"), ("owner/name", "datasets")])
def test_a_missing_extra_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, package: str
) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # what Python takes for a package that is not there
    with pytest.raises(LacksError, match=rf"'{package}' is not installed") as error:
        load_tokens(folder, text, samples=1, length=4)
    assert error.value.fix == "pip install 'trtkit[calibration]'"


def test_ready_token_ids_are_taken_as_they_are(folder: Path, tmp_path: Path) -> None:
    ids = np.random.default_rng(5).integers(0, 400, (6, 20)).astype(np.int32)
    np.save(tmp_path / "ids.npy", ids)
    whole = load_tokens(folder, tmp_path / "ids.npy")
    assert whole.tokens.dtype == np.int64 and whole.tokens.tolist() == ids[draw_order(6, 0)].tolist()
    part = load_tokens(folder, tmp_path / "ids.npy", samples=2, length=5, seed=4)
    assert part.tokens.tolist() == ids[draw_order(6, 4)[:2], :5].tolist()
    assert part.counts == {"tokens": 10, "windows": 6, "prefix": 0}


def test_ready_token_ids_need_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 10}')
    np.save(tmp_path / "ids.npy", np.full((2, 4), 9))
    assert load_tokens(tmp_path, tmp_path / "ids.npy").tokens.tolist() == [[9] * 4] * 2


BAD_IDS = {
    "not integers": (np.zeros((2, 4)), "float64 of shape .* is not token ids"),
    "one dimension": (np.zeros(8, np.int64), r"shape \[8\] is not token ids"),
    "empty": (np.zeros((0, 4), np.int64), "is not token ids"),
    "above the vocabulary": (np.array([[3, 399, 400]]), "token id 400 is outside of the vocabulary"),
    "negative": (np.array([[3, -1, 4]]), "token id -1 is outside"),
    "beyond int64": (np.array([[2**63]] * 2, np.uint64).reshape(1, 2), "is no token id"),
    "too long": (np.zeros((1, 2049), np.int64), "longer than the 2048 positions"),
}


@pytest.mark.parametrize("name", BAD_IDS)
def test_ready_ids_that_are_none(folder: Path, tmp_path: Path, name: str) -> None:
    ids, cause = BAD_IDS[name]
    np.save(tmp_path / "ids.npy", ids)
    with pytest.raises(InputError, match=cause):
        load_tokens(folder, tmp_path / "ids.npy")


def test_more_ready_ids_than_there_are(folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.zeros((3, 4), np.int64))
    with pytest.raises(InputError, match="holds 3 x 4 tokens; 5 samples of 2 are asked for"):
        load_tokens(folder, tmp_path / "ids.npy", samples=5, length=2)
    np.savez(tmp_path / "ids.npz", np.zeros((3, 4)))
    (tmp_path / "ids.npz").rename(tmp_path / "zip.npy")
    with pytest.raises(InputError, match="an archive of arrays is not token ids"):
        load_tokens(folder, tmp_path / "zip.npy")


# --- what the source says ---------------------------------------------------------------------------------------------


def test_windows_longer_than_the_model(folder: Path, changed: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="samples of 2049 tokens are longer than the 2048 positions"):
        load_tokens(folder, None, samples=1, length=2049)
    (tmp_path / "a.txt").write_text("words " * 3000)
    short = changed("config.json", max_position_embeddings=40)
    assert load_tokens(short, tmp_path / "a.txt", samples=2).length == 40


def test_a_tokenizer_of_another_model(changed: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="outside of the vocabulary"):
        load_tokens(changed("config.json", vocab_size=50), None, samples=1, length=16)


@pytest.mark.parametrize("options", [{"samples": 0}, {"length": 1}])
def test_nothing_to_calibrate_with(folder: Path, options: dict[str, int]) -> None:
    with pytest.raises(InputError, match=r"^(samples|length) is [01]$") as error:
        load_tokens(folder, None, **options)
    assert "at least 1 sample of 2 tokens" in error.value.fix


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 10}')
    with pytest.raises(InputError, match="cannot load the tokenizer"):
        load_tokens(tmp_path, None, samples=1, length=4)


# --- the built-in text ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held_out", [False, True])
def test_the_built_in_text_by_default(folder: Path, held_out: bool) -> None:
    found = load_tokens(folder, None, held_out=held_out, length=64)
    assert found.tokens.shape == (128, 64) and PAD not in found.tokens
    assert found.origin.startswith("built-in held-out text" if held_out else "built-in calibration text")
    again = load_tokens(folder, None, held_out=held_out, length=64)
    assert again.digest == found.digest
    assert load_tokens(folder, None, held_out=held_out, length=64, seed=1).digest != found.digest


@pytest.mark.parametrize("tokens", [2_000, 20_000, 60_000])
def test_ours_and_the_library_alternate(tokens: int) -> None:
    """Whatever is read first, it is some of both."""
    ours = set(own_documents(held_out=False))
    kinds, size = [], 0
    for text in builtin_text.builtin_documents(tokens=tokens, seed=2, held_out=False):
        kinds.append(text in ours)
        size += len(text)
        if size > 3 * tokens:  # at most three characters per token
            break
    share = sum(kinds) / len(kinds)
    assert 0.1 < share < 0.9
    changes = sum(one != other for one, other in pairwise(kinds))
    assert changes >= min(sum(kinds), len(kinds) - sum(kinds))


def test_our_text_is_of_many_kinds_and_languages() -> None:
    for held_out, least in ((False, 60), (True, 25)):
        texts = own_documents(held_out=held_out)
        assert len(texts) >= least and max(map(len, texts)) < 2500
        joined = "\n".join(texts)
        for sign in ("def ", "SELECT ", "fn ", "{", "</", "Problem.", "Q: ", *"的の다कاłяüéñè"):
            assert sign in joined, sign


def test_held_out_text_is_never_calibration_text() -> None:
    ours, held_out = own_documents(held_out=False), own_documents(held_out=True)
    lines = {line.strip() for text in ours for line in text.splitlines() if len(line.strip()) > 24}
    assert not [line for text in held_out for line in text.splitlines() if line.strip() in lines]
    library = {kind: {name for name, _ in builtin_text._library_pages(held_out=kind)} for kind in (False, True)}
    assert library[True] and not library[True] & library[False]
    assert 0.02 < len(library[True]) / len(library[False]) < 0.2


def test_the_tiny_model_has_not_learnt_the_held_out_text() -> None:
    file = Path(__file__).parents[3] / "examples" / "tiny_text.py"
    spec = importlib.util.spec_from_file_location("tiny_text_for_calibration", file)
    assert spec is not None and spec.loader is not None
    tiny_text = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny_text)
    for name in tiny_text.library_files():
        assert builtin_text.is_held_out(name) == tiny_text.is_held_out(name)


def test_pieces_of_the_library_are_short_and_of_many_files() -> None:
    pieces = [piece for piece, _ in zip(library_documents(seed=0, held_out=False), range(200), strict=False)]
    assert len(set(pieces)) == 200
    assert max(map(len, pieces)) < builtin_text.PIECE + 500
