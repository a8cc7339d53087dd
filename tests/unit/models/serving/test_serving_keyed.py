"""Pieces of many answers find each other by key, and what nobody ends is let go."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import LIBRARIES, TRAINED

from trtkit.repository.models.serving.keyed import KeyedStreams
from trtkit.repository.models.serving.text import Tokenizer


@pytest.mark.parametrize("kind", TRAINED)
@settings(deadline=None)
@given(texts=st.lists(st.text(max_size=20), min_size=1, max_size=4), seed=st.integers(0, 2**32))
def test_pieces_of_many_answers_find_each_other_by_key(kind: str, texts: list[str], seed: int) -> None:
    library, order = TRAINED[kind], random.Random(seed)
    streams = KeyedStreams(Tokenizer(library, byte_run=0))
    waiting = {key: library.encode(text, add_special_tokens=False).ids for key, text in enumerate(texts)}
    whole = [Tokenizer(library).text(ids, continues=True) for ids in waiting.values()]
    said = ["" for _ in texts]
    while any(waiting.values()):
        key = order.choice([key for key, ids in waiting.items() if ids])
        size = order.randint(1, 3)
        said[key] += streams.text(key, waiting[key][:size])
        waiting[key] = waiting[key][size:]
    assert said == whole
    assert len(streams) == 0


def test_without_a_key_nothing_is_held() -> None:
    library = LIBRARIES["gemma"]
    start, rest = library.token_to_id("<0xE6>"), [library.token_to_id(token) for token in ("<0xBC>", "<0xA2>")]
    streams = KeyedStreams(Tokenizer(library, byte_run=0))
    assert [streams.text(None, ids) for ids in ([start], rest)] == ["\ufffd", "\ufffd\ufffd"]
    assert len(streams) == 0


def test_a_character_that_is_never_completed_shows_with_the_next_token() -> None:
    """Also where that token has come up before, so that its text is known without a stream."""
    library = LIBRARIES["byte level"]
    first, letter = library.token_to_id("æ"), library.token_to_id("Ġ.")
    streams = KeyedStreams(Tokenizer(library, byte_run=0))
    assert [streams.text("a", [token]) for token in (letter, first, letter, letter)] == [" .", "", "\ufffd .", " ."]
    assert streams.text("a", [first]) == ""
    assert [streams.text(key, [letter]) for key in ("b", None, "a")] == [" .", " .", "\ufffd ."]


def test_old_and_surplus_streams_go() -> None:
    library = LIBRARIES["byte level"]
    first, *rest = (library.token_to_id(token) for token in ("æ", "¼", "¢"))
    letter = library.token_to_id("Ġ.")
    now = 0.0
    streams = KeyedStreams(Tokenizer(library, byte_run=0), limit=3, max_age_s=10.0, clock=lambda: now)
    assert [streams.text(key, [first]) for key in range(5)] == [""] * 5
    assert len(streams) == 3
    assert streams.text(4, rest) == "漢"
    assert streams.text(0, [letter]) == " ."  # surplus, gone
    now = 11.0
    assert streams.text(3, [letter]) == " ."  # too old to belong to this answer
    assert streams.text("new", [first]) == ""
    assert len(streams) == 1


@pytest.mark.parametrize(
    ("family", "tokens", "texts"),
    [
        ("suffixes", ["a</w>", "b", "c</w>"], ["a", " b", "c"]),
        ("ctc", ["a", "a", "b", "|"], ["a", "", "b", " "]),
    ],
)
def test_an_answer_without_an_end_loses_nothing(family: str, tokens: list[str], texts: list[str]) -> None:
    library = LIBRARIES[family]
    streams = KeyedStreams(Tokenizer(library, byte_run=0))
    assert [streams.text("key", [library.token_to_id(token)]) for token in tokens] == texts
