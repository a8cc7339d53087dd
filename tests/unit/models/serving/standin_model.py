"""What the stand-ins of engine libraries have in common: a model that is no model, and classes as strict as bindings.

`token` makes a sequence's next token of its prompt and place alone, so a test knows what must come out, whoever else
runs. `World` is the thread of an engine: a token per round for up to `slots` sequences.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

VOCABULARY = 97
LONGEST = 1_000_000


def token(prompt: Sequence[int], place: int) -> int:
    return (sum(number * (index + 3) for index, number in enumerate(prompt)) + 31 * place + 5 * place**2) % VOCABULARY


def log_prob(number: int) -> float:
    return -0.25 - number / 8


@dataclass(eq=False)
class Run:
    """A sequence of the world.

    Attributes:
        end_ids: end it and are kept back; `stop_ids` end it and are told.
        tell: gets token (or None), finish (`end`, `stop`, `length`, `cancelled` or empty) and error.
    """

    prompt: Sequence[int]
    max_tokens: int
    tell: Callable[[int | None, str, str], None]
    end_ids: Collection[int] = ()
    stop_ids: Collection[int] = ()
    bad_ids: Collection[int] = ()
    made: int = 0
    over: bool = False

    def advance(self) -> None:
        number = token(self.prompt, self.made)
        if len(set(self.bad_ids)) >= VOCABULARY:
            self.end(None, "", "every token is forbidden")
            return
        while number in self.bad_ids:
            number = (number + 1) % VOCABULARY
        self.made += 1
        if number in self.end_ids:
            self.end(None, "end")
        elif number in self.stop_ids:
            self.end(number, "stop")
        elif self.made == self.max_tokens:
            self.end(number, "length")
        else:
            self.tell(number, "", "")

    def end(self, number: int | None, finish: str, error: str = "") -> None:
        self.over = True
        self.tell(number, finish, error)


class World:
    """Runs sequences until it is closed."""

    def __init__(self, slots: int = 4) -> None:
        self.running: list[Run] = []
        self.waiting: deque[Run] = deque()
        self.rounds = 0
        self._slots = slots
        self._lock = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="stand-in", daemon=True)
        self._thread.start()

    @property
    def idle(self) -> bool:
        return not (self.running or self.waiting)

    def add(self, sequence: Run) -> None:
        with self._lock:
            assert not self._closed, "it is closed"
            self.waiting.append(sequence)
            self._lock.notify()

    def stop(self, sequence: Run) -> None:
        """Ends a sequence, if it is not over."""
        with self._lock:
            for group in (self.running, self.waiting):
                if sequence in group:
                    group.remove(sequence)
                    sequence.end(None, "cancelled")

    def close(self) -> None:
        with self._lock:
            assert not self._closed, "it is closed twice"
            self._closed = True
            self._lock.notify()
        self._thread.join(20)

    def _run(self) -> None:
        while True:
            with self._lock:
                while not (self.running or self.waiting or self._closed):
                    self._lock.wait()
                if self._closed:
                    return
                while self.waiting and len(self.running) < self._slots:
                    self.running.append(self.waiting.popleft())
                for sequence in self.running:
                    sequence.advance()
                self.running = [sequence for sequence in self.running if not sequence.over]
                self.rounds += 1
            time.sleep(0.0003)  # others may speak


# Kinds of values, as bindings tell them apart.


def whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def number(value: Any) -> bool:
    return isinstance(value, float) or whole(value)


def flag(value: Any) -> bool:
    return isinstance(value, bool)


def text(value: Any) -> bool:
    return isinstance(value, str)


def wholes(value: Any) -> bool:
    return isinstance(value, list) and all(map(whole, value))


def lists(value: Any) -> bool:
    return isinstance(value, list) and all(map(wholes, value))


def one(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds)


NEEDED = object()


def declare(name: str, positional: int = 0, **fields: tuple[Callable[[Any], bool], Any]) -> Any:
    """A class with these fields: name -> kind of value, and default (NEEDED for none). None is a value of those whose
    default is None.

    Args:
        positional: how many may be given by place.
    """

    class Declared:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            assert len(args) <= positional, f"{name}: too many positional arguments"
            given = dict(zip(fields, args, strict=False))
            assert not set(given) & set(kwargs), f"{name}: given twice"
            unknown = set(kwargs) - set(fields)
            if unknown:
                raise TypeError(f"{name}: unknown arguments {unknown}")
            for key, (_, default) in fields.items():
                value = {**given, **kwargs}.get(key, default)
                assert value is not NEEDED, f"{name}: {key} is missing"
                setattr(self, key, value)

        def __setattr__(self, key: str, value: Any) -> None:
            if key not in fields:
                raise AttributeError(f"{name} has no {key}")
            kind, default = fields[key]
            if not (value is default or kind(value) or (value is None and default is None)):
                raise TypeError(f"{name}.{key}: {value!r}")
            self.__dict__["_" + key] = value

    for key in fields:
        setattr(Declared, key, property(lambda self, key=key: self.__dict__["_" + key]))
    Declared.__name__ = Declared.__qualname__ = name
    return Declared


def namespace(name: str, **members: Any) -> Any:
    """An enumeration or module that has these members and no others."""
    return type(name, (), members)
