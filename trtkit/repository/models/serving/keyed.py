"""Streams of many answers whose pieces come one by one, each with a key, and of which nobody says when they have ended.

That is how an ensemble calls its postprocessing. So text must not wait for an end, and what an answer leaves behind
(cut off inside a character, or cancelled) goes when it is too old or when too much is held.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

from .streams import TextStream
from .text import Tokenizer


class KeyedStreams:
    """The text of pieces of many answers.

    Args:
        tokenizer: made with byte_run=0, so that no complete character waits.
        limit: streams held at once; the oldest goes first. Each takes a few hundred bytes, and only those are held that
            end inside a character.
        max_age_s: seconds after which a stream no longer belongs to what comes under the same key.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        limit: int = 65536,
        max_age_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tokenizer = tokenizer
        self._limit, self._max_age_s, self._clock = limit, max_age_s, clock
        self._held: OrderedDict[Hashable, tuple[float, TextStream]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def text(self, key: Hashable | None, ids: Sequence[int]) -> str:
        """What these tokens add to the text of an answer that continues a prompt.

        Without a key nothing is held, and an incomplete character becomes U+FFFD.
        """
        if key not in self._held and (plain := self._tokenizer.plain(ids)) is not None:
            return plain
        if key is None:
            return self._tokenizer.text(ids, continues=True)
        born, stream = self._held.pop(key, (0.0, None))
        now = self._clock()
        if stream is None or now - born > self._max_age_s:
            stream = self._tokenizer.stream(continues=True)
        text = stream.push(ids)
        if not stream.is_idle:
            self._held[key] = (now, stream)
        self._forget(now)
        return text

    def _forget(self, now: float) -> None:
        while self._held:
            born, _ = next(iter(self._held.values()))
            if len(self._held) <= self._limit and now - born <= self._max_age_s:
                return
            self._held.popitem(last=False)
