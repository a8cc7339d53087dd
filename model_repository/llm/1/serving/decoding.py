"""What each token of a tokenizer stands for, read from the decoder in its tokenizer.json (Hugging Face `tokenizers`).

Nearly every decoder turns tokens into text one by one, whatever is around them, except for three things: the first
token of a text may lose a space in front, bytes of a character may be spread over tokens, and a space may be stripped
from the start of the whole text. `rules` says which of them hold; where a decoder does anything else, there are none,
and text has to be decoded again as it grows (CTC, BPEDecoder, what replaces inside of the joined text).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f+][0-9A-Fa-f])>")
"""A byte in sentencepiece's byte fallback. The plus sign is what Rust's reader of hexadecimal numbers lets pass."""

_ANCHOR = "a"

_MAPS = {"Replace", "Metaspace", "WordPiece", "Strip"}
"""Stages that turn one token into one text; Metaspace and WordPiece treat the first one differently."""

_JOINS: set[tuple[str, ...]] = {
    (),
    ("Fuse",),
    ("Fuse", "Strip"),
    ("ByteLevel",),
    ("ByteLevel", "Fuse"),
    ("ByteLevel", "Strip"),
    ("ByteLevel", "Fuse", "Strip"),
    ("ByteFallback",),
    ("ByteFallback", "Fuse"),
    ("ByteFallback", "Fuse", "Strip"),
}
"""What may follow them: joining of bytes, then stripping of the joined text from its start."""


@dataclass(frozen=True)
class Rules:
    """How tokens become text.

    Attributes:
        later: text of a token behind another one.
        first: text of the token that starts a text; None when it is the same.
        bytewise: the text of a token is UTF-8 bytes in GPT-2's alphabet ("ByteLevel").
        fallback: tokens like <0x0A> are bytes ("ByteFallback").
        strip: characters stripped from the start of the text, and how many at most.
    """

    later: Callable[[str], str]
    first: Callable[[str], str] | None = None
    bytewise: bool = False
    fallback: bool = False
    strip: tuple[str, int] = ("", 0)


def rules(decoder: dict[str, Any] | None) -> Rules | None:
    """The rules of the decoder section of a tokenizer.json; None when tokens have no text of their own.

    Without a decoder `tokenizers` joins tokens with spaces.
    """
    if decoder is None:
        return Rules(later=lambda token: " " + token, first=lambda token: token)
    stages = list(_flat(decoder))
    kinds = [stage["type"] for stage in stages]
    split = next((place for place, kind in enumerate(kinds) if kind not in _MAPS), len(stages))
    joined = tuple(kinds[split:])
    # What is stripped from the end of a text is known only when the text has ended.
    if joined not in _JOINS or any(stage.get("stop") for stage in stages):
        return None
    strip = (stages[-1]["content"], int(stages[-1]["start"])) if "Strip" in joined else ("", 0)
    later, first = _maps(stages[:split])
    return Rules(later, first, bytewise="ByteLevel" in joined, fallback="ByteFallback" in joined, strip=strip)


def _flat(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if decoder["type"] == "Sequence":
        for stage in decoder["decoders"]:
            yield from _flat(stage)
    else:
        yield decoder


def _maps(stages: list[dict[str, Any]]) -> tuple[Callable[[str], str], Callable[[str], str] | None]:
    """Functions from a later and from the first token to its text, through the library's own decoders."""
    if not stages:
        return str, None
    decode = _decoder({"type": "Sequence", "decoders": stages}).decode
    cut = len(decode([_ANCHOR]))

    def first(token: str) -> str:
        text: str = decode([token])
        return text

    def later(token: str) -> str:
        text: str = decode([_ANCHOR, token])
        return text[cut:]

    placed = any(stage["type"] in ("Metaspace", "WordPiece") for stage in stages)
    return (later, first) if placed else (first, None)


def _decoder(section: dict[str, Any]) -> Any:
    """A decoder by itself: the library builds one only inside of a tokenizer."""
    from tokenizers import Tokenizer, models

    document = json.loads(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).to_str())  # noqa: S106 - no password
    document["decoder"] = section
    return Tokenizer.from_str(json.dumps(document)).decoder


def byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet of printable stand-ins for bytes, as character to byte.

    Bytes that print stand for themselves; the others follow in order from U+0100 (openai/gpt-2, encoder.py).
    """
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printing}
    others = (byte for byte in range(256) if byte not in printing)
    alphabet.update({chr(0x100 + place): byte for place, byte in enumerate(others)})
    return alphabet


_ALPHABET = byte_alphabet()


def alphabet_bytes(token: str) -> bytes:
    """The bytes of a byte-level token; a token that is not in the alphabet (an added one) is plain text."""
    try:
        return bytes([_ALPHABET[character] for character in token])
    except KeyError:
        return token.encode()
