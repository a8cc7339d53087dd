"""Tokens to text as they come: one stream per answer, over tables that all streams of a tokenizer share.

See text.py for what a stream promises. A stream remembers a few bytes and flags; nothing in it grows with the answer.
"""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Sequence

from .tables import Tables, Vocabulary

REPLACEMENT = "\ufffd"

WAITING, RELEASED, WRONG = range(3)
"""A run of byte tokens waits; is too long to wait, so that its characters go out one by one; or is no text at all."""

_BYTES = [bytes((byte,)) for byte in range(256)]


class TextStream(ABC):
    """The text of one answer."""

    __slots__ = ()

    @abstractmethod
    def push(self, ids: Sequence[int]) -> str:
        """The text that these tokens add, as far as no later token can change it."""

    @abstractmethod
    def finish(self) -> str:
        """The rest, when the answer has ended. Nothing may be pushed afterwards."""

    @property
    @abstractmethod
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing has to be remembered: a new stream in the middle of a text does as well."""


class TableStream(TextStream):
    """A stream of tokens that each have a text of their own.

    Args:
        continues: a text is in front of the answer, so that its first token is not the first of a text.
    """

    __slots__ = ("_busy", "_first", "_held", "_run", "_strip", "_tables")

    def __init__(self, tables: Tables, continues: bool) -> None:
        self._tables = tables
        self._first = tables.rules.first is not None and not continues
        self._strip = 0 if continues else tables.rules.strip[1]
        self._held = b""  # an incomplete character, or the run of byte tokens so far
        self._run = WAITING
        self._busy = self._first or self._strip > 0

    def follow(self, prompt: Sequence[int]) -> None:
        """Makes this the stream of an answer to `prompt`: what is special about the start of a text happens there.

        Nearly always the second token of a prompt tells; no other is looked at.
        """
        for number in prompt:
            if not self._first and (not self._strip or self._held):
                break
            self.push((number,))
        if self._held:  # what the prompt leaves incomplete belongs to its own text
            self._held, self._strip = b"", 0
        self._run = WAITING
        self._out("")

    @property
    def is_idle(self) -> bool:
        return not self._busy

    def push(self, ids: Sequence[int]) -> str:
        if not self._busy and (plain := self._tables.plain_text(ids)) is not None:
            return plain
        part, known = self._tables.part, self._tables.part
        if self._first:
            known = self._tables.first_part
        texts = []
        for number in ids:
            piece = known(number)
            if piece is None:
                continue
            if self._first:
                self._first, known = False, part
            if isinstance(piece, str):
                texts.append(self._end_run() + piece if self._held or self._run else piece)
            elif isinstance(piece, bytes):
                texts.append(self._characters(piece))
            else:
                texts.append(self._byte(piece))
        return self._out("".join(texts))

    def finish(self) -> str:
        if not self._tables.rules.bytewise:
            return self._out(self._end_run())
        rest, self._held = self._held, b""
        return self._out(rest.decode("utf-8", "replace"))

    def _out(self, text: str) -> str:
        """The text without what is stripped from the start of the whole."""
        if self._strip and text:
            blank = self._tables.rules.strip[0]
            while self._strip and text.startswith(blank):
                text = text[1:]
                self._strip -= 1
            if text:
                self._strip = 0
        self._busy = self._first or bool(self._run) or bool(self._held) or self._strip > 0
        return text

    def _characters(self, piece: bytes) -> str:
        data = self._held + piece
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._held = data[used:]
        return text

    def _byte(self, byte: int) -> str:
        self._held += _BYTES[byte]
        if self._run == WAITING:
            if len(self._held) <= self._tables.byte_run:
                return ""
            self._run = RELEASED if not self._tables.byte_run or _begins_text(self._held) else WRONG
        if self._run == WRONG:
            wrong, self._held = len(self._held), b""
            return REPLACEMENT * wrong
        text, used = _each_wrong_byte(self._held, False)
        self._held = self._held[used:]
        if not self._held and not self._tables.byte_run:
            self._run = WAITING  # the next byte finds the same: nothing to remember
        return text

    def _end_run(self) -> str:
        run, held = self._run, self._held
        self._run, self._held = WAITING, b""
        if run == RELEASED:
            return _each_wrong_byte(held, True)[0]
        try:
            return held.decode()
        except UnicodeDecodeError:
            return REPLACEMENT * len(held)


def _begins_text(data: bytes) -> bool:
    """Whether `data` is UTF-8, but for a character at the end that may yet become complete."""
    try:
        codecs.utf_8_decode(data, "strict", False)
    except UnicodeDecodeError:
        return False
    return True


def _each_wrong_byte(data: bytes, final: bool) -> tuple[str, int]:
    """Text of `data`, with one U+FFFD for each byte that is wrong, and how many bytes it took."""
    texts, done = [], 0
    while True:
        try:
            text, used = codecs.utf_8_decode(data[done:], "strict", final)
        except UnicodeDecodeError as error:
            texts += [data[done : done + error.start].decode(), REPLACEMENT * (error.end - error.start)]
            done += error.end
        else:
            return "".join([*texts, text]), done + used


class RedecodedStream(TextStream):
    """A stream for any decoder: the last tokens are decoded again with each new one.

    The decoder may change the end of a text when another token follows, so text goes out when the texts with and
    without that token agree on it, one token late.

    Args:
        prompt: tokens before the answer.
        eager: text goes out at once, but for U+FFFD at its end; what a later token changes in it stays wrong.
    """

    __slots__ = ("_eager", "_left", "_text", "_vocabulary", "_window")

    WINDOW = 16
    """Tokens that are decoded again before the older half is forgotten."""

    def __init__(self, vocabulary: Vocabulary, prompt: Sequence[int] = (), *, eager: bool = False) -> None:
        self._vocabulary, self._eager = vocabulary, eager
        heard = (number for number in prompt[-self.WINDOW :] if not vocabulary.is_silent(vocabulary.token(number)))
        self._window = list(heard)
        self._text = self._decode(self._window)
        self._left = 0  # characters at the end of the window's text that are not out yet

    @property
    def is_idle(self) -> bool:
        return not self._window

    def push(self, ids: Sequence[int]) -> str:
        return "".join([self._push(number) for number in ids])

    def finish(self) -> str:
        rest = self._text[len(self._text) - self._left :]
        self._left = 0
        return rest

    def _push(self, number: int) -> str:
        if self._vocabulary.is_silent(self._vocabulary.token(number)):
            return ""
        before, start = self._text, len(self._text) - self._left
        self._window.append(number)
        self._text = after = self._decode(self._window)
        if self._eager:
            end = max(start, len(after.rstrip(REPLACEMENT)))
        else:  # a token without text says nothing about what is in front of it
            end = max(start, _agreed(before, after)) if after != before else start
        self._left = len(after) - end
        if len(self._window) > self.WINDOW:
            self._forget()
        return after[start:end]

    def _forget(self) -> None:
        """Drops the older half, if what is not out yet reads the same without it."""
        window = self._window[self.WINDOW // 2 :]
        text = self._decode(window)
        same = len(text) > self._left and self._text.endswith(text[-self._left - 1 :])
        if same or len(self._window) > 4 * self.WINDOW:
            self._left = min(self._left, len(text))
            self._window, self._text = window, text

    def _decode(self, ids: list[int]) -> str:
        if not ids:  # some decoders of the library crash without tokens
            return ""
        vocabulary = self._vocabulary
        text: str = vocabulary.library.decode(ids, skip_special_tokens=vocabulary.skip_special_tokens)
        return text


def _agreed(one: str, other: str) -> int:
    """Length of the longest common beginning, without a U+FFFD at its end that the next token may complete."""
    if other.startswith(one):
        size = len(one)
    else:
        pairs = enumerate(zip(one, other, strict=False))
        size = next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
    return len(one[:size].rstrip(REPLACEMENT))
