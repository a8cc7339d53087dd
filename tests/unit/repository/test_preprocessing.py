"""Prompts and word lists become the tensors of the engine; a wrong request leaves the others alone."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from trtkit.repository.models.preprocessing import __file__ as package
from trtkit.repository.models.serving.tensors import pad, word_lists

MODEL = Path(package).parent
WORDS = st.lists(st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=4), max_size=4), min_size=1, max_size=4)


@pytest.fixture
def load(triton: Any, tmp_path: Path, byte_tokenizer: Tokenizer) -> Any:
    """`load(**parameters)`: the model as the server would load it."""

    def make(tokenizer: Tokenizer = byte_tokenizer, **changes: str) -> Any:
        folder = tmp_path / "1"
        (folder / "tokenizer").mkdir(parents=True)
        shutil.copy(MODEL / "model.py", folder)
        shutil.copytree(MODEL.parent / "serving", folder / "serving")
        tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
        parameters = {"tokenizer_dir": "tokenizer", "add_special_tokens": "true", "end_ids": "1,2", "pad_id": "7"}
        parameters["several_prompts"] = "true"
        return triton.load(folder, {**parameters, **changes})

    return make


def ask(triton: Any, *prompts: str | bytes, max_tokens: int = 5, **more: Any) -> Any:
    rows = triton.strings(*[[prompt] for prompt in prompts])
    return triton.Request(QUERY=rows, REQUEST_OUTPUT_LEN=triton.ints(*[[max_tokens]] * len(prompts)), **more)


def read_words(table: Any) -> list[list[int]]:
    """A [2, n] word list as the engine reads it."""
    ends = [end for end in table[1].tolist() if end != -1]
    return [table[0, start:end].tolist() for start, end in pairwise([0, *ends])]


@given(rows=WORDS)
def test_word_lists_read_back(rows: list[list[list[int]]]) -> None:
    table = word_lists(rows)
    assert table.dtype == np.int32
    assert table.shape == (len(rows), 2, max(sum(map(len, words)) for words in rows))
    assert [read_words(row) for row in table] == rows


def test_word_lists_have_the_engines_layout() -> None:
    assert word_lists([[[338], [9351, 4]], [[5]]]).tolist() == [
        [[338, 9351, 4], [1, 3, -1]],
        [[5, 0, 0], [1, -1, -1]],
    ]
    assert word_lists([[], []]).shape == (2, 2, 0)


def test_pad() -> None:
    assert pad([[1, 2, 3], [4]], [9, 8]).tolist() == [[1, 2, 3], [4, 8, 8]]


def test_prompts_of_many_requests_in_one_call(load: Any, triton: Any, byte_tokenizer: Tokenizer) -> None:
    model = load()
    two, one = model.execute([ask(triton, "The quick brown fox", "dog"), ask(triton, "漢字 🙂", max_tokens=9)])
    expected = [byte_tokenizer.encode(text).ids for text in ("The quick brown fox", "dog", "漢字 🙂")]
    assert expected[0][0] == 0  # <s>
    ids, lengths = two.tensors["INPUT_ID"], two.tensors["REQUEST_INPUT_LEN"]
    assert lengths.tolist() == [[len(expected[0])], [len(expected[1])]]
    assert ids[0].tolist() == expected[0]
    assert ids[1].tolist() == [*expected[1], *[7] * (len(expected[0]) - len(expected[1]))]
    assert two.tensors["REQUEST_OUTPUT_LEN"].tolist() == [[5], [5]]
    assert two.tensors["OUT_PAD_ID"].tolist() == [[7], [7]]
    assert one.tensors["INPUT_ID"].tolist() == [expected[2]]
    assert one.tensors["REQUEST_OUTPUT_LEN"].tolist() == [[9]]
    for response in (one, two):
        assert all(array.dtype == np.int32 for array in response.tensors.values())


def test_special_tokens_can_be_left_to_the_prompt(load: Any, triton: Any, byte_tokenizer: Tokenizer) -> None:
    (response,) = load(add_special_tokens="false").execute([ask(triton, "<s>dog")])
    assert response.tensors["INPUT_ID"].tolist() == [byte_tokenizer.encode("<s>dog", add_special_tokens=False).ids]


def test_the_other_end_ids_become_stop_words(load: Any, triton: Any, byte_tokenizer: Tokenizer) -> None:
    stop = byte_tokenizer.encode("fox", add_special_tokens=False).ids
    model = load()
    plain, with_word, own_end = model.execute(
        [
            ask(triton, "dog"),
            ask(triton, "dog", STOP_WORDS_DICT=triton.strings(["fox"])),
            ask(triton, "dog", END_ID=triton.ints([-1]), PAD_ID=triton.ints([3])),
        ]
    )
    assert plain.tensors["OUT_END_ID"].tolist() == [[1]]
    assert read_words(plain.tensors["STOP_WORDS_IDS"][0]) == [[2]]
    assert plain.tensors["BAD_WORDS_IDS"].shape == (1, 2, 0)
    words = read_words(with_word.tensors["STOP_WORDS_IDS"][0])
    assert stop in words
    assert [2] in words
    assert own_end.tensors["OUT_END_ID"].tolist() == [[-1]]
    assert own_end.tensors["OUT_PAD_ID"].tolist() == [[3]]
    assert own_end.tensors["STOP_WORDS_IDS"].shape == (1, 2, 0)


def test_a_model_without_end_id_runs_to_max_tokens(load: Any, triton: Any) -> None:
    (response,) = load(end_ids="").execute([ask(triton, "dog")])
    assert response.tensors["OUT_END_ID"].tolist() == [[-1]]
    assert response.tensors["STOP_WORDS_IDS"].shape == (1, 2, 0)


def test_empty_words_are_no_words(load: Any, triton: Any) -> None:
    request = ask(triton, "dog", STOP_WORDS_DICT=triton.strings([""]), BAD_WORDS_DICT=triton.strings([""]))
    (response,) = load(end_ids="1").execute([request])
    assert response.tensors["STOP_WORDS_IDS"].shape == (1, 2, 0)
    assert response.tensors["BAD_WORDS_IDS"].shape == (1, 2, 0)


def test_words_per_row(load: Any, triton: Any, byte_tokenizer: Tokenizer) -> None:
    words = triton.strings(["fox", "dog"], ["lazy", ""])
    (response,) = load(end_ids="1").execute([ask(triton, "a", "b", BAD_WORDS_DICT=words)])
    first, second = (read_words(row) for row in response.tensors["BAD_WORDS_IDS"])
    for word, found in (("fox", first), ("dog", first), ("lazy", second)):
        assert byte_tokenizer.encode(word, add_special_tokens=False).ids in found


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompts": [""]}, "the prompt is empty"),
        ({"prompts": ["ok", ""]}, "the prompt is empty"),
        ({"prompts": [b"\xff\xfe"]}, "the prompt is not UTF-8: byte 0"),
        ({"prompts": ["ok"], "max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"prompts": ["ok"], "max_tokens": -3}, "max_tokens must be at least 1, got -3"),
        ({"prompts": ["ok"], "STOP_WORDS_DICT": [[b"\xff"]]}, "a stop word is not UTF-8"),
        ({"prompts": ["ok"], "BAD_WORDS_DICT": [[b"\xff"]]}, "a bad word is not UTF-8"),
        ({"prompts": ["ok"], "STOP_WORDS_DICT": [["a"], ["b"]]}, "STOP_WORDS_DICT has 2 rows for 1 prompts"),
    ],
)
def test_a_wrong_request_leaves_the_others_alone(load: Any, triton: Any, wrong: dict[str, Any], message: str) -> None:
    prompts = wrong.pop("prompts")
    tensors = {key: triton.strings(*value) for key, value in wrong.items() if key != "max_tokens"}
    request = ask(triton, *prompts, max_tokens=wrong.get("max_tokens", 5), **tensors)
    model = load()
    before, bad, after = model.execute([ask(triton, "fox"), request, ask(triton, "dog")])
    assert bad.error.code == triton.TritonError.INVALID_ARG
    assert str(bad.error).startswith(message)
    alone = [model.execute([ask(triton, text)])[0] for text in ("fox", "dog")]
    for response, expected in zip((before, after), alone, strict=True):
        assert response.error is None
        assert response.tensors["INPUT_ID"].tolist() == expected.tensors["INPUT_ID"].tolist()


def test_a_prompt_without_tokens_is_an_error(load: Any, triton: Any) -> None:
    tokenizer = Tokenizer.from_str(
        '{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'
    )
    bad, good = load(tokenizer).execute([ask(triton, "zz"), ask(triton, "a")])
    assert str(bad.error) == "the prompt has no tokens"
    assert good.tensors["INPUT_ID"].tolist() == [[0]]
