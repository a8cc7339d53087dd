"""Stop strings, found in the text of an answer whatever way its tokens cut it.

The first stop string to be complete ends the answer; of several that end with the same character, the longest. So the
result depends on the text alone, not on the pieces in which it comes. Text that may be the beginning of a stop string
is held back until the next characters decide, and never more than that (Aho and Corasick, "Efficient string matching:
an aid to bibliographic search", 1975): each character is looked at once, however many stop strings there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache


class _Machine:
    """The automaton of a set of stop strings. State 0 is "nothing matches"; a state's depth is what it has matched."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.next: list[dict[str, int]] = [{}]
        self.depth = [0]
        self.match: list[str | None] = [None]
        for stop in stops:
            state = 0
            for character in stop:
                state = self.next[state].setdefault(character, len(self.next))
                if state == len(self.next):
                    self.next.append({})
                    self.depth.append(0)
                    self.match.append(None)
            self.match[state] = stop
        self.fail = [0] * len(self.next)
        order = [0]
        for state in order:
            for character, follower in self.next[state].items():
                order.append(follower)
                self.depth[follower] = self.depth[state] + 1
                if state:
                    self.fail[follower] = self.step(self.fail[state], character)
                    if self.match[follower] is None:  # its own match is longer than any that is inside of it
                        self.match[follower] = self.match[self.fail[follower]]
        self.starts = frozenset(self.next[0])

    def step(self, state: int, character: str) -> int:
        """The state behind one more character: the longest end of the text that begins a stop string."""
        while True:
            follower = self.next[state].get(character)
            if follower is not None:
                return follower
            if not state:
                return 0
            state = self.fail[state]


MAX_CHARACTERS = 8192
"""Of all stop strings of a request together. The automaton takes about 300 bytes for each while the answer runs."""

_CACHED_CHARACTERS = 256


@lru_cache(maxsize=256)
def _cached(stops: tuple[str, ...]) -> _Machine:
    return _Machine(stops)


def _machine(stops: tuple[str, ...]) -> _Machine:
    """The automaton of these stop strings; requests mostly come with the same few, so short ones are kept."""
    size = sum(map(len, stops))
    if size > MAX_CHARACTERS:
        raise ValueError(f"the stop strings have {size} characters, at most {MAX_CHARACTERS} are taken")
    return _cached(stops) if size <= _CACHED_CHARACTERS else _Machine(stops)


class StopStrings:
    """Watches one answer for stop strings.

    Args:
        stops: the strings; empty ones mean nothing.
        include: the stop string that ends the answer belongs to it. Then nothing needs to be held back.

    Raises:
        ValueError: the stop strings are too long.

    Attributes:
        matched: the stop string that has ended the answer, None before.
    """

    __slots__ = ("_held", "_include", "_machine", "_state", "matched")

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        wanted = tuple(stop for stop in stops if stop)
        self._machine = _machine(wanted) if wanted else None
        self._include = include
        self._state = 0
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """What can be sent after `text` has come: nothing of a stop string, nor of what may become one."""
        machine = self._machine
        if machine is None:
            return text
        if self.matched is not None:
            return ""
        state = self._state
        if not state and machine.starts.isdisjoint(text):
            return text
        following, match, step = machine.next, machine.match, machine.step
        for place, character in enumerate(text):
            found = following[state].get(character)
            state = step(state, character) if found is None else found
            if state and match[state] is not None:
                return self._end(text, place + 1, state)
        self._state = state
        if self._include:
            return text
        whole = self._held + text
        cut = len(whole) - machine.depth[state]
        self._held = whole[cut:]
        return whole[:cut]

    def _end(self, text: str, end: int, state: int) -> str:
        assert self._machine is not None  # noqa: S101 - only called with one
        self.matched = stop = self._machine.match[state] or ""
        if self._include:
            return text[:end]
        whole = self._held + text[:end]
        self._held = ""
        return whole[: len(whole) - len(stop)]

    def finish(self) -> str:
        """What was held back, when the answer has ended by itself."""
        rest, self._held, self._state = self._held, "", 0
        return rest
