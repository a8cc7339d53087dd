"""Tokens to text, piece by piece, so that the pieces of a stream add up to the text of the whole answer.

Every token stands for fixed bytes, whatever is around it; only a character can be spread over tokens. So a token is
turned into its bytes without looking at its neighbours, and the one thing kept between two pieces of a stream is the
incomplete UTF-8 character at the end, at most 3 bytes. No text is decoded twice and no space is lost.

Which bytes a token stands for follows the decoder in tokenizer.json (Hugging Face `tokenizers`):
- ByteLevel (GPT-2, Llama 3, Qwen): each character of the token is one byte, in GPT-2's alphabet.
- Replace, ByteFallback, Fuse, Strip, Metaspace (sentencepiece: Llama 2, Mistral, Gemma): "▁" is a space and `<0x0A>` is
  the byte 10. Strip and Metaspace drop the space in front of a text; an answer continues a prompt, so here it stays.
- anything else (WordPiece and other encoders' decoders): the tokenizer decodes each piece by itself.
"""

from __future__ import annotations

import codecs
import json
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any

_SENTENCEPIECE = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet of printable stand-ins for bytes, as character to byte.

    Bytes that print stand for themselves; the others follow in order from U+0100 (openai/gpt-2, encoder.py).
    """
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printing}
    others = (byte for byte in range(256) if byte not in printing)
    alphabet.update({chr(0x100 + place): byte for place, byte in enumerate(others)})
    return alphabet


class TokenBytes:
    """What each token id of a tokenizer stands for, as bytes.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        skip_special_tokens: special tokens stand for nothing.
    """

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        added = tokenizer.get_added_tokens_decoder()
        self._special = {number for number, token in added.items() if token.special} if skip_special_tokens else set()
        self._convert = _converter(json.loads(tokenizer.to_str()).get("decoder"))
        self._known: dict[int, bytes] = {}

    @property
    def exact(self) -> bool:
        """Whether tokens have fixed bytes. If not, pieces are decoded by themselves and may lose spaces in between."""
        return self._convert is not None

    def join(self, ids: Iterable[int]) -> bytes:
        """The bytes of a run of tokens. Ids that the tokenizer does not know (padding of the vocabulary) give none."""
        if self._convert is None:
            text: str = self._tokenizer.decode([i for i in ids if i >= 0], skip_special_tokens=self._skip)
            return text.encode()
        known, one = self._known, self._bytes_of
        return b"".join([known[i] if i in known else one(i) for i in ids])

    def _bytes_of(self, number: int) -> bytes:
        token = None if number < 0 or number in self._special else self._tokenizer.id_to_token(number)
        found = b"" if token is None or self._convert is None else self._convert(token)
        self._known[number] = found
        return found


def _converter(decoder: dict[str, Any] | None) -> Callable[[str], bytes] | None:
    """The function from token to bytes for the decoder section of a tokenizer.json; None when there is none."""
    if decoder is None:
        return None
    stages = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = {stage["type"] for stage in stages}
    if kinds == {"ByteLevel"}:
        return _byte_level
    plain = all("String" in stage["pattern"] for stage in stages if stage["type"] == "Replace")
    if kinds <= _SENTENCEPIECE and plain:
        return _sentencepiece(stages)
    return None


def _byte_level(token: str, alphabet: dict[str, int] = byte_alphabet()) -> bytes:  # noqa: B008 - a constant
    try:
        return bytes([alphabet[character] for character in token])
    except KeyError:  # an added token, whose text is not in the alphabet
        return token.encode()


def _sentencepiece(stages: list[dict[str, Any]]) -> Callable[[str], bytes]:
    swaps = [(s["pattern"]["String"], s["content"]) for s in stages if s["type"] == "Replace"]
    swaps += [(s["replacement"], " ") for s in stages if s["type"] == "Metaspace"]
    bytewise = any(s["type"] == "ByteFallback" for s in stages)

    def convert(token: str) -> bytes:
        match = _BYTE_TOKEN.fullmatch(token) if bytewise else None
        if match:
            return bytes([int(match.group(1), 16)])
        for old, new in swaps:
            token = token.replace(old, new)
        return token.encode()

    return convert


class Tails:
    """The incomplete UTF-8 character at the end of each stream, until the next piece of that stream completes it.

    Nobody tells this model that a stream has ended, so what an answer leaves behind (cut off inside a character, or
    cancelled) goes when it is too old or when too many are held.

    Args:
        limit: streams held at once; the oldest goes first. Each takes a few hundred bytes.
        max_age_s: seconds after which a tail no longer belongs to what comes under the same key.
    """

    def __init__(
        self, limit: int = 65536, max_age_s: float = 60.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit, self._max_age_s, self._clock = limit, max_age_s, clock
        self._held: OrderedDict[Hashable, tuple[float, bytes]] = OrderedDict()
        self._make_decoder = codecs.getincrementaldecoder("utf-8")

    def __len__(self) -> int:
        return len(self._held)

    def decode(self, key: Hashable | None, piece: bytes) -> str:
        """The text of `piece` with the tail of its stream in front and without the tail that it leaves.

        Bytes that are no UTF-8 become U+FFFD, as many as a decoder of the whole answer makes of them. Without a key
        nothing is held, and an incomplete character becomes U+FFFD too.
        """
        if key is None:
            return piece.decode("utf-8", "replace")
        if key not in self._held and (not piece or piece[-1] < 0x80):
            return piece.decode("utf-8", "replace")  # the usual case: nothing held, nothing to hold
        born, tail = self._held.pop(key, (0.0, b""))
        now = self._clock()
        if now - born > self._max_age_s:
            tail = b""
        decoder = self._make_decoder("replace")
        text = decoder.decode(tail + piece)
        tail = decoder.getstate()[0]
        if tail:
            self._held[key] = (now, tail)
        self._forget(now)
        return text

    def _forget(self, now: float) -> None:
        while self._held:
            born, _ = next(iter(self._held.values()))
            if len(self._held) <= self._limit and now - born <= self._max_age_s:
                return
            self._held.popitem(last=False)


class Detokenizer:
    """Text of the pieces of many streams at once."""

    def __init__(self, tokenizer_file: Path, *, skip_special_tokens: bool = True, tails: Tails | None = None) -> None:
        from tokenizers import Tokenizer

        self.tokens = TokenBytes(Tokenizer.from_file(str(tokenizer_file)), skip_special_tokens=skip_special_tokens)
        self.tails = tails or Tails()

    def text(self, key: Hashable | None, ids: Iterable[int]) -> str:
        """Text that the tokens `ids` add to the stream `key` (None: a stream that cannot be told from others)."""
        return self.tails.decode(key, self.tokens.join(ids))
