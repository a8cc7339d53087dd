"""Regular expressions from untrusted files, matched in time that grows with pattern times name and not faster.

Python's own matcher backtracks, so a few characters in a config could keep it busy for years. The subset here is what
quantisation configs are written with: characters, classes, `.`, `*`, `+`, `?`, groups with alternatives, `^` and `$`.
"""

from __future__ import annotations

import re
from functools import lru_cache

MAX_LENGTH = 300
"""Longest pattern, in characters."""
MAX_ALTERNATIVES = 64
"""Most alternatives that a pattern stands for when its groups are multiplied out."""
MAX_GROUPS = 50

_END = "$"
_Step = tuple[str, str]
"""The pattern of one character (or `_END`), and how often: "", "?", "*" or "+"."""


class UnsupportedPatternError(ValueError):
    """A regular expression outside the subset; its text says what."""


def match(pattern: str, name: str) -> bool:
    """Whether the pattern matches from the start of `name` on, as Python's `re.match` has it.

    Raises:
        UnsupportedPatternError: outside the subset.
    """
    return any(_run(steps, name) for steps in compiled(pattern))


@lru_cache(maxsize=4096)
def compiled(pattern: str) -> tuple[tuple[_Step, ...], ...]:
    """The alternatives of a pattern.

    Raises:
        UnsupportedPatternError: outside the subset.
    """
    if len(pattern) > MAX_LENGTH:
        raise UnsupportedPatternError(f"longer than {MAX_LENGTH} characters")
    if pattern.count("(") > MAX_GROUPS:  # every one deeper is a call deeper
        raise UnsupportedPatternError(f"more than {MAX_GROUPS} groups")
    alternatives, end = _alternatives(pattern, 0)
    if end < len(pattern):
        raise UnsupportedPatternError("a ')' too many")
    return tuple(alternatives)


def _run(steps: tuple[_Step, ...], name: str) -> bool:
    """Follows all ways through the pattern at once: `reached` holds the steps that may come next."""
    reached = _close({0}, steps)
    for position in range(len(name) + 1):
        if len(steps) in reached:
            return True
        if position == len(name):
            return any(_only_ends(steps[step:]) for step in reached)
        after: set[int] = set()
        for step in reached:
            atom, often = steps[step]
            if atom != _END and _fits(atom, name[position]):
                after |= {step, step + 1} if often in ("*", "+") else {step + 1}
        reached = _close(after, steps)
    return False


def _close(reached: set[int], steps: tuple[_Step, ...]) -> set[int]:
    """What is reached with the steps that may be left out."""
    for step in range(len(steps)):
        if step in reached and steps[step][1] in ("*", "?"):
            reached.add(step + 1)
    return reached


def _only_ends(steps: tuple[_Step, ...]) -> bool:
    return all(atom == _END or often in ("*", "?") for atom, often in steps)


@lru_cache(maxsize=4096)
def _fits(atom: str, character: str) -> bool:
    return re.fullmatch(atom, character) is not None


def _alternatives(pattern: str, at: int) -> tuple[list[tuple[_Step, ...]], int]:
    """The alternatives up to a ')' or the end, and where they end."""
    done: list[tuple[_Step, ...]] = []
    current: list[tuple[_Step, ...]] = [()]
    start = at
    while at < len(pattern) and pattern[at] != ")":
        if pattern[at] == "|":
            done, current, at = done + current, [()], at + 1
            start = at
            continue
        if pattern[at] == "^" and at == start == 0:
            at += 1
            continue
        parts, at = _item(pattern, at)
        current = [left + right for left in current for right in parts]
        if len(done) + len(current) > MAX_ALTERNATIVES:
            raise UnsupportedPatternError(f"more than {MAX_ALTERNATIVES} alternatives")
    return done + current, at


def _item(pattern: str, at: int) -> tuple[list[tuple[_Step, ...]], int]:
    """One atom or group with how often it may come, as alternatives, and where it ends."""
    if pattern[at] == "(":
        return _group(pattern, at)
    if pattern[at] == "$":
        return [((_END, ""),)], at + 1
    end = _atom_end(pattern, at)
    atom = pattern[at:end]
    try:
        re.compile(atom)
    except re.error as error:
        raise UnsupportedPatternError(f"'{atom}': {error}") from error
    often = pattern[end : end + 1] if pattern[end : end + 1] in ("*", "+", "?") else ""
    end += len(often)
    if often and pattern[end : end + 1] == "?":  # as few as possible: whether it matches is the same
        end += 1
    if pattern[end : end + 1] in ("*", "+", "?", "{") and pattern[end : end + 1]:
        raise UnsupportedPatternError(f"'{pattern[at : end + 1]}'")
    return [((atom, often),)], end


def _group(pattern: str, at: int) -> tuple[list[tuple[_Step, ...]], int]:
    start = at + (3 if pattern.startswith("(?:", at) else 1)
    if pattern[start : start + 1] == "?":
        raise UnsupportedPatternError(f"'{pattern[at : start + 2]}'")
    inner, end = _alternatives(pattern, start)
    if pattern[end : end + 1] != ")":
        raise UnsupportedPatternError("a '(' too many")
    end += 1
    if pattern[end : end + 1] == "?":
        return [*inner, ()], end + 1
    if pattern[end : end + 1] in ("*", "+", "{") and pattern[end : end + 1]:
        raise UnsupportedPatternError("a repeated group")
    return inner, end


def _atom_end(pattern: str, at: int) -> int:
    character = pattern[at]
    if character == "\\":
        escaped = pattern[at + 1 : at + 2]
        if not escaped or (escaped.isalnum() and escaped not in "dwsDWS"):
            raise UnsupportedPatternError(f"'\\{escaped}'")
        return at + 2
    if character == "[":
        end = pattern.find("]", at + 2 + pattern.startswith("[^", at))
        inside = pattern[at + 1 : end]
        if end < 0 or "[" in inside or "\\" in inside or any(twice in inside for twice in ("--", "&&", "||", "~~")):
            raise UnsupportedPatternError(f"'{pattern[at:]}'")
        return end + 1
    if character in "*+?{^":
        raise UnsupportedPatternError(f"'{character}'")
    return at + 1
