"""The event parser: whatever the line ends and wherever the bytes are cut, the same events come out."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trtkit.client.sse import EventParser

TABLE = [
    (b"data: one\n\ndata: two\n\n", ["one", "two"]),
    (b"data:one\n\n", ["one"]),
    (b"data:  two spaces\n\n", [" two spaces"]),
    (b"data\n\n", [""]),
    (b"data: a\ndata: b\n\n", ["a\nb"]),
    (b"data: a\r\n\r\ndata: b\r\n\r\n", ["a", "b"]),
    (b"data: a\r\rdata: b\r\r", ["a", "b"]),
    (b"data: a\r\ndata: b\r\n\r\n", ["a\nb"]),
    (b"data: a\n\r\ndata: b\r\n\n", ["a", "b"]),
    (b": keep-alive\n\ndata: a\n: comment\n\n", ["a"]),
    (b"event: x\nid: 1\nretry: 5\ndata: a\nunknown: y\n\n", ["a"]),
    (b"event: x\n\n", []),
    (b"\n\n\ndata: a\n\n\n\n", ["a"]),
    (b"\xef\xbb\xbfdata: a\n\n", ["a"]),
    (b"data: a", []),
    (b"data: a\n", []),
    ("data: \u2028 \u0085 \x0b\n\n".encode(), ["\u2028 \u0085 \x0b"]),
    ("data: äß€🎉\n\n".encode(), ["äß€🎉"]),
    (b'data: {"a": "b: c"}\n\n', ['{"a": "b: c"}']),
]


@pytest.mark.parametrize(("raw", "events"), TABLE)
def test_events_of_a_stream(raw: bytes, events: list[str]) -> None:
    assert EventParser().feed(raw) == events


@pytest.mark.parametrize(("raw", "events"), TABLE)
def test_events_of_a_stream_byte_by_byte(raw: bytes, events: list[str]) -> None:
    parser = EventParser()
    assert [event for byte in raw for event in parser.feed(bytes([byte]))] == events


lines = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=20)
events = st.lists(st.lists(lines, min_size=1, max_size=3), max_size=5)


@given(events, st.sampled_from(["\n", "\r\n", "\r"]), st.lists(st.floats(0, 1), max_size=30), st.booleans())
@example([["a", "b"]], "\r\n", [8 / 20], False)
def test_cuts_and_line_ends_change_nothing(
    contents: list[list[str]], end: str, cuts: list[float], comments: bool
) -> None:
    raw = "".join(
        (f": x{end}" if comments else "") + "".join(f"data: {line}{end}" for line in event) + end for event in contents
    ).encode()
    places = sorted({round(cut * len(raw)) for cut in cuts} | {0, len(raw)})
    parser = EventParser()
    found = [event for begin, stop in pairwise(places) for event in parser.feed(raw[begin:stop])]
    assert found == ["\n".join(event) for event in contents]


@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.none(), max_size=3), max_size=4))
def test_json_comes_through(objects: list[dict[str, object]]) -> None:
    raw = b"".join(b"data: " + json.dumps(item).encode() + b"\n\n" for item in objects)
    assert [json.loads(event) for event in EventParser().feed(raw)] == objects


@given(st.binary(max_size=200))
def test_garbage_raises_nothing(raw: bytes) -> None:
    EventParser().feed(raw)
