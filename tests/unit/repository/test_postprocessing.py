"""Pieces of a stream add up to the text of the whole answer, for both families of tokenizers and any way of cutting."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from trtkit.repository.models.postprocessing import detokenizer as code
from trtkit.repository.models.postprocessing.detokenizer import Tails, TokenBytes, byte_alphabet

MODEL = Path(code.__file__).parent
TEXT = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n▁é漢🙂🏳️‍🌈ab")), max_size=60)
RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def cut(ids: list[int], random_: random.Random) -> list[list[int]]:
    """`ids` in pieces of 0 to 4 tokens."""
    pieces, at = [], 0
    while at < len(ids):
        size = random_.randint(0, 4)
        pieces.append(ids[at : at + size])
        at += size
    return pieces


def whole_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """What the tokenizer makes of the whole answer; sentencepiece without the stripping of the space in front."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    first = next((token for i in ids if (token := tokenizer.id_to_token(i)) not in ("<s>", "</s>", "<unk>")), "")
    return " " + text if first.startswith("▁") and not isinstance(tokenizer.decoder, decoders.ByteLevel) else text


def test_the_byte_alphabet_is_gpt2s() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = byte_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert set(alphabet) == set(ByteLevel.alphabet())
    assert (alphabet["Ġ"], alphabet["Ċ"], alphabet["a"], alphabet["Ã"]) == (0x20, 0x0A, 0x61, 0xC3)


@RELAXED
@given(text=TEXT, seed=st.integers(0, 2**32))
def test_any_split_adds_up_to_the_tokenizers_text(tokenizer: Tokenizer, text: str, seed: int) -> None:
    ids = tokenizer.encode(text).ids
    tokens, tails = TokenBytes(tokenizer), Tails()
    assert tokens.exact
    pieces = [tails.decode("stream", tokens.join(piece)) for piece in cut(ids, random.Random(seed))]
    assert "".join(pieces) == tails.decode("whole", tokens.join(ids)) == whole_text(tokenizer, ids)
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)
    assert len(tails) == 0


@RELAXED
@given(texts=st.lists(TEXT, min_size=2, max_size=5), seed=st.integers(0, 2**32))
def test_interleaved_streams_do_not_mix(tokenizer: Tokenizer, texts: list[str], seed: int) -> None:
    order = random.Random(seed)
    tokens, tails = TokenBytes(tokenizer), Tails()
    answers = [tokenizer.encode(text).ids for text in texts]
    waiting = {number: cut(ids, order) for number, ids in enumerate(answers)}
    said = ["" for _ in texts]
    while any(waiting.values()):
        number = order.choice([key for key, pieces in waiting.items() if pieces])
        said[number] += tails.decode(number, tokens.join(waiting[number].pop(0)))
    assert said == [whole_text(tokenizer, ids) for ids in answers]


@RELAXED
@given(ids=st.lists(st.integers(-1, 460), max_size=40), seed=st.integers(0, 2**32))
def test_random_tokens_read_the_same_in_any_split(byte_tokenizer: Tokenizer, ids: list[int], seed: int) -> None:
    """Tokens that form no UTF-8, as a bad model writes them. A cut end is U+FFFD for the tokenizer, nothing for us."""
    tokens, tails = TokenBytes(byte_tokenizer), Tails()
    streamed = "".join(tails.decode("stream", tokens.join(piece)) for piece in cut(ids, random.Random(seed)))
    whole = tails.decode("whole", tokens.join(ids))
    assert streamed == whole
    expected = byte_tokenizer.decode([i for i in ids if i >= 0], skip_special_tokens=True)
    assert whole in (expected, expected.removesuffix("\ufffd"))


@pytest.mark.parametrize(
    ("pieces", "texts"),
    [
        ([b"\xe6", b"\xbc", b"\xa2!"], ["", "", "漢!"]),
        ([b"a\xf0\x9f", b"\x99\x82"], ["a", "🙂"]),
        ([b"\xe6\xbc", b"A"], ["", "\ufffdA"]),
        ([b"\xbc\xa2"], ["\ufffd\ufffd"]),
        ([b"\xff", b"b"], ["\ufffd", "b"]),
        ([b"", b"x"], ["", "x"]),
    ],
)
def test_only_an_incomplete_character_is_held_back(pieces: list[bytes], texts: list[str]) -> None:
    tails = Tails()
    assert [tails.decode("s", piece) for piece in pieces] == texts


def test_without_a_key_nothing_is_held() -> None:
    tails = Tails()
    assert [tails.decode(None, piece) for piece in (b"a\xe6\xbc", b"\xa2")] == ["a\ufffd", "\ufffd"]
    assert len(tails) == 0


def test_old_and_surplus_tails_go() -> None:
    now = 0.0
    tails = Tails(limit=3, max_age_s=10.0, clock=lambda: now)
    for key in range(5):
        assert tails.decode(key, b"\xe6") == ""
    assert len(tails) == 3
    assert tails.decode(4, b"\xbc\xa2") == "漢"
    assert tails.decode(0, b"a") == "a"  # surplus, gone
    now = 11.0
    assert tails.decode(3, b"a") == "a"  # too old to belong to this answer
    assert tails.decode("new", b"\xe6") == ""
    assert len(tails) == 1


def test_special_tokens_are_skipped_or_shown(byte_tokenizer: Tokenizer) -> None:
    ids = [0, *byte_tokenizer.encode("a<tool é> b", add_special_tokens=False).ids, 2, 10_000, -1]
    assert TokenBytes(byte_tokenizer).join(ids) == "a<tool é> b".encode()
    assert TokenBytes(byte_tokenizer, skip_special_tokens=False).join(ids) == "<s>a<tool é> b<|eot|>".encode()


@pytest.mark.parametrize(
    ("decoder", "token", "expected"),
    [
        (decoders.Metaspace(), "▁a", b" a"),
        (decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]), "<0x0A>", b"\n"),
        (decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()]), "<0x0A>", b"<0x0A>"),
        (decoders.Sequence([decoders.ByteLevel()]), "Ġa", b" a"),
        (decoders.WordPiece(), "##a", None),
        (decoders.BPEDecoder(), "a</w>", None),
        (None, "a", None),
    ],
)
def test_decoders(decoder: Any, token: str, expected: bytes | None) -> None:
    tokenizer = Tokenizer(models.WordLevel({token: 0, "b": 1}, unk_token="b"))  # noqa: S106 - a token of text
    if decoder is not None:
        tokenizer.decoder = decoder
    tokens = TokenBytes(tokenizer)
    assert tokens.exact == (expected is not None)
    assert tokens.join([0]) == (expected if expected is not None else tokenizer.decode([0]).encode())


def load(triton: Any, tmp_path: Path, tokenizer: Tokenizer) -> Any:
    folder = tmp_path / "1"
    (folder / "tokenizer").mkdir(parents=True)
    for name in ("model.py", "detokenizer.py"):
        shutil.copy(MODEL / name, folder)
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    return triton.load(folder, {"tokenizer_dir": "tokenizer", "skip_special_tokens": "true"})


def piece(triton: Any, name: str, *beams: list[int], length: int | None = None, **more: Any) -> Any:
    longest = max(map(len, beams))
    rows = [[*ids, *[5] * (longest - len(ids))] for ids in beams]
    lengths = [len(ids) if length is None else length for ids in beams]
    tokens = np.array([rows], dtype=np.int32).reshape(1, len(beams), longest)
    return triton.Request(name, TOKENS_BATCH=tokens, SEQUENCE_LENGTH=triton.ints(lengths), **more)


def texts(response: Any) -> list[list[str]]:
    assert response.error is None
    return [[text.decode() for text in row] for row in response.tensors["OUTPUT"]]


def test_the_model_keeps_requests_beams_and_sequences_apart(
    triton: Any, tmp_path: Path, byte_tokenizer: Tokenizer
) -> None:
    model = load(triton, tmp_path, byte_tokenizer)
    ids = byte_tokenizer.encode("🚀", add_special_tokens=False).ids
    other = byte_tokenizer.encode("ж", add_special_tokens=False).ids
    assert len(ids) > 1
    assert len(other) > 1
    index = {"BATCH_INDEX": triton.ints([1]), "SEQUENCE_INDEX": triton.ints([0])}
    first = [
        piece(triton, "a", ids[:1], other[:1]),
        piece(triton, "b", ids[:1]),
        piece(triton, "b", other[:1], **index),
        piece(triton, "", ids[:1]),
    ]
    assert [texts(r) for r in model.execute(first)] == [[["", ""]], [[""]], [[""]], [["\ufffd"]]]
    rest = [
        piece(triton, "b", other[1:], **index),
        piece(triton, "b", ids[1:]),
        piece(triton, "a", ids[1:], other[1:]),
    ]
    assert [texts(r) for r in model.execute(rest)] == [[["ж"]], [["🚀"]], [["🚀", "ж"]]]


def test_the_model_counts_only_sequence_length(triton: Any, tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    model = load(triton, tmp_path, byte_tokenizer)
    ids = byte_tokenizer.encode("dog sleeps", add_special_tokens=False).ids
    whole, none = model.execute([piece(triton, "x", [*ids, 7, 7], length=len(ids)), piece(triton, "y", [], length=0)])
    assert texts(whole) == [["dog sleeps"]]
    assert texts(none) == [[""]]


def test_shapes_that_do_not_fit_are_an_error_of_that_request_alone(
    triton: Any, tmp_path: Path, byte_tokenizer: Tokenizer
) -> None:
    model = load(triton, tmp_path, byte_tokenizer)
    wrong = triton.Request("w", TOKENS_BATCH=np.zeros((1, 2, 3), np.int32), SEQUENCE_LENGTH=triton.ints([3]))
    bad, good = model.execute([wrong, piece(triton, "x", byte_tokenizer.encode("ok").ids)])
    assert bad.error.code == triton.TritonError.INVALID_ARG
    assert "does not fit" in str(bad.error)
    assert texts(good) == [["ok"]]


def test_an_inexact_decoder_is_said_in_the_log(triton: Any, tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))  # noqa: S106 - a token of text
    tokenizer.decoder = decoders.WordPiece()
    load(triton, tmp_path, tokenizer)
    assert len(triton.warnings) == 1
    assert "may lose spaces" in triton.warnings[0]
