"""The tokens of one tokenizer, looked up once and then shared by all of its streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .decoding import BYTE_TOKEN, Rules, alphabet_bytes

Part = bytes | int | str | None
"""What a token is: bytes of a text, one byte of a run of byte tokens, a text, or nothing."""


class Vocabulary:
    """The tokens of one tokenizer.

    Args:
        library: a `tokenizers.Tokenizer`.
        skip_special_tokens: special tokens have no text.
    """

    def __init__(self, library: Any, *, skip_special_tokens: bool) -> None:
        self.library, self.skip_special_tokens = library, skip_special_tokens
        special = {token.content for token in library.get_added_tokens_decoder().values() if token.special}
        self._skipped: set[str] = special if skip_special_tokens else set()

    def token(self, number: int) -> str | None:
        """The token of an id as the vocabulary spells it; None for an id outside of it."""
        if not 0 <= number < 1 << 32:
            return None
        token: str | None = self.library.id_to_token(int(number))
        return token

    def is_silent(self, token: str | None) -> bool:
        """Whether the decoder never sees a token: unknown, or special and skipped."""
        return token is None or token in self._skipped


class Tables(Vocabulary):
    """What the tokens of one tokenizer stand for.

    Args:
        rules: of its decoder.
        byte_run: bytes of a run of byte tokens that wait for its end.

    """

    def __init__(self, library: Any, rules: Rules, *, skip_special_tokens: bool, byte_run: int) -> None:
        super().__init__(library, skip_special_tokens=skip_special_tokens)
        self.rules, self.byte_run = rules, byte_run
        self._plain: dict[int, str] = {}  # text of tokens that need no care while nothing is held
        self._parts: dict[int, Part] = {}

    def plain_text(self, ids: Sequence[int]) -> str | None:
        """What tokens add to a text of which nothing is held; None if one is not text by itself, or has not come up."""
        known = self._plain
        try:
            return known[ids[0]] if len(ids) == 1 else "".join([known[number] for number in ids])
        except KeyError:
            return None

    def part(self, number: int) -> Part:
        """What a token behind another one is."""
        try:
            return self._parts[number]
        except KeyError:
            pass
        token = self.token(number)
        if token is None:  # not remembered: the engine may send any number
            return None
        part = None if self.is_silent(token) else self._part(self.rules.later(token))
        self._parts[number] = part
        if part is None or isinstance(part, str):
            self._plain[number] = part or ""
        elif isinstance(part, bytes) and _is_text(part):
            self._plain[number] = part.decode()
        return part

    def first_part(self, number: int) -> Part:
        """What a token at the start of a text is."""
        token = self.token(number)
        if token is None or self.is_silent(token):
            return None
        return self._part((self.rules.first or self.rules.later)(token))

    def _part(self, text: str) -> Part:
        if self.rules.bytewise:
            return alphabet_bytes(text)
        byte = BYTE_TOKEN.fullmatch(text) if self.rules.fallback else None
        return int(byte.group(1), 16) if byte else text


def _is_text(part: bytes) -> bool:
    try:
        part.decode()
    except UnicodeDecodeError:
        return False
    return True
