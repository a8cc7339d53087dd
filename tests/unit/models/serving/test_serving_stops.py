"""Stop strings end an answer where a plain reading of its text says, whatever the pieces, and nothing of them leaks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtkit.repository.models.serving.stops import StopStrings

LETTERS = "ab é🙂\n"
STOPS = st.lists(st.text(LETTERS, max_size=5), max_size=4)
PIECES = st.lists(st.text(LETTERS + "c", max_size=6), max_size=8)


def plainly(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The answer and its stop string: the text is read from its start, until some stop string is complete."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


@given(stops=STOPS, pieces=PIECES, include=st.booleans())
def test_any_pieces_end_where_the_text_says(stops: list[str], pieces: list[str], include: bool) -> None:
    watch = StopStrings(stops, include=include)
    sent = "".join([watch.push(piece) for piece in pieces])
    sent += watch.finish()
    assert (sent, watch.matched) == plainly("".join(pieces), stops, include)


@given(stops=STOPS, pieces=PIECES)
def test_exactly_what_may_become_a_stop_string_is_held(stops: list[str], pieces: list[str]) -> None:
    watch, come, sent = StopStrings(stops), "", ""
    for piece in pieces:
        come, sent = come + piece, sent + watch.push(piece)
        if watch.matched is not None:
            break
        beginnings = [stop[:size] for stop in stops for size in range(len(stop))]
        assert len(come) - len(sent) == max((len(b) for b in beginnings if come.endswith(b)), default=0)


@pytest.mark.parametrize(
    ("stops", "pieces", "sent", "matched"),
    [
        ([], ["a", "b"], ["a", "b", ""], None),
        ([""], ["a"], ["a", ""], None),
        (["STOP"], ["xS", "TO", "P y", "z"], ["x", "", "", "", ""], "STOP"),
        (["STOP"], ["xS", "TO", "R"], ["x", "", "STOR", ""], None),
        (["STOP"], ["xSTO"], ["x", "STO"], None),
        (["aab"], ["aa", "a", "b"], ["", "a", "", ""], "aab"),
        (["abcd", "bc"], ["ab", "c", "d"], ["", "a", "", ""], "bc"),  # complete first
        (["c", "abc"], ["ab", "c"], ["", "", ""], "abc"),  # complete together: the longest
        (["a", "ab"], ["ab"], ["", ""], "a"),
        (["</s>", "<|end|>"], ["x<", "|en", "d|>"], ["x", "", "", ""], "<|end|>"),
        (["。"], ["漢字", "。次"], ["漢字", "", ""], "。"),
        (["👍🏽"], ["👍", "🏾 👍", "🏽"], ["", "👍🏾 ", "", ""], "👍🏽"),
        (["\n\n"], ["a\n", "b\n", "\nc"], ["a", "\nb", "", ""], "\n\n"),
    ],
)
def test_cases(stops: list[str], pieces: list[str], sent: list[str], matched: str | None) -> None:
    watch = StopStrings(stops)
    assert [*(watch.push(piece) for piece in pieces), watch.finish()] == sent
    assert watch.matched == matched


def test_a_stop_string_that_belongs_to_the_answer_holds_nothing_back() -> None:
    watch = StopStrings(["STOP"], include=True)
    assert [watch.push(piece) for piece in ("xS", "TO", "P y", "z")] == ["xS", "TO", "P", ""]
    assert watch.matched == "STOP"


def test_streams_with_the_same_stop_strings_do_not_mix() -> None:
    one, other = StopStrings(["ab"]), StopStrings(["ab"])
    assert [one.push("a"), other.push("b"), one.push("b"), other.push("a")] == ["", "b", "", ""]
    assert (one.matched, other.matched) == ("ab", None)


def test_each_character_is_looked_at_once() -> None:
    """A stop string of repetitions, nearly there all the time: searching what is held again and again would not end."""
    stop = "a" * 8_000 + "b"
    watch = StopStrings([stop])
    sent = [watch.push("a") for _ in range(50_000)]
    assert len("".join(sent)) == 42_000
    assert watch.push("b") == ""
    assert watch.matched == stop


def test_too_much_to_watch_for_is_refused() -> None:
    with pytest.raises(ValueError, match="9000 characters, at most 8192"):
        StopStrings(["x" * 4500, "y" * 4500])
