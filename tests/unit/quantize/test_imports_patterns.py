"""Patterns of module names: what Python's own matcher says, without its worst case."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtkit.quantize.imports.patterns import UnsupportedPatternError, match

REAL = [
    ".*lm_head",
    r".*mlp\.gate$",
    "visual.*",
    r"model\.layers\.[0-9]+\.mlp\.gate",
    r"^model\.layers\.(0|1|27)\..*",
    r".*(q|k|v)_proj$",
    r".*self_attn\.(q_a|kv_b)?_?proj",
    r"(?:model\.)?layers\.\d+\.\w+",
    r".*block_sparse_moe.gate",
    ".*?down_proj$",
    "lm_head|model.embed_tokens",
    r".*[^0-9]\.mlp$",
]

NAMES = [
    "lm_head", "model.layers.0.mlp.gate", "model.layers.0.mlp.gate_proj", "model.layers.27.self_attn.q_proj",
    "model.layers.3.self_attn.kv_b_proj", "model.layers.3.self_attn.proj", "visual.blocks.0.mlp", "model.embed_tokens",
    "layers.12.block_sparse_moe.gate", "model.layers.1.mlp.down_proj", "x.mlp", "1.mlp", "", "model",
]  # fmt: skip


@pytest.mark.parametrize("pattern", REAL)
def test_patterns_of_real_checkpoints(pattern: str) -> None:
    expected = {name: re.match(pattern, name) is not None for name in NAMES}
    assert {name: match(pattern, name) for name in NAMES} == expected
    assert True in expected.values()
    assert False in expected.values()


atoms = st.sampled_from(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\d", r"\w", "-"])
items = st.builds(str.__add__, atoms, st.sampled_from(["", "", "*", "+", "?", "*?", "+?"])) | st.just("$")
sequences = st.lists(items, max_size=5).map("".join)
groups = st.builds(
    lambda parts, opened, closed: opened + "|".join(parts) + closed,
    st.lists(sequences, min_size=1, max_size=3), st.sampled_from(["(", "(?:"]), st.sampled_from([")", ")?"]),
)  # fmt: skip
patterns = st.builds(
    lambda start, parts: start + "".join(parts), st.sampled_from(["", "^"]), st.lists(sequences | groups, max_size=3)
)


@given(patterns, st.text("ab.1-", max_size=8))
def test_says_what_re_says(pattern: str, name: str) -> None:
    assert match(pattern, name) == (re.match(pattern, name) is not None)


def test_a_pattern_that_would_keep_re_busy_for_ever_is_quick() -> None:
    assert not match(".*" * 100 + "b", "a" * 500)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a*)*b", "(a|b)+", "a{3}", "a{1,900000}", r"(a)\1", "(?=a)", "(?!a)", "(?P<x>a)", "(?i)a", r"\bx", r"\Z",
        "a**", "a++", "*a", "(a", "a)", "[a", "[[:alpha:]]", r"[\d]", "x" * 301, "(" * 60 + ")" * 60, "(a|b)" * 10,
        "a^b", "\\", "[b-a]",
    ],
)  # fmt: skip
def test_others_are_refused(pattern: str) -> None:
    with pytest.raises(UnsupportedPatternError) as refused:
        match(pattern, "a")
    assert str(refused.value)
