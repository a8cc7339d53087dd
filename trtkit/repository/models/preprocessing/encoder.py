"""Text to the tensors of the engine, for many prompts at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]

_ANCHOR = "a"
"""Text in front of a word, to see how the tokenizer writes the word in the middle of a text."""


class Encoder:
    """Prompts and word lists to token ids.

    Args:
        tokenizer_file: tokenizer.json.
        add_special_tokens: let the tokenizer add its begin-of-sequence token to prompts (never to words).
    """

    def __init__(self, tokenizer_file: Path, *, add_special_tokens: bool = True) -> None:
        from tokenizers import Tokenizer

        self._tokenizer: Any = Tokenizer.from_file(str(tokenizer_file))
        # What the folder says about padding and truncation is for training; here it would change prompts silently.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._add_special_tokens = add_special_tokens
        self._anchor = self._encode([_ANCHOR])[0]
        self._words: dict[str, list[list[int]]] = {}

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt. One call for many prompts lets the tokenizer use every core."""
        return self._encode(texts, self._add_special_tokens)

    def word(self, text: str) -> list[list[int]]:
        """The token sequences under which a stop or bad word appears: at the start of a text and inside of one.

        They are often the same. A sentencepiece tokenizer puts a space in front of a lone text, so that a lone line
        break is two tokens and would never match the one token that a model writes.
        """
        found = self._words.get(text)
        if found is None:
            alone, inside = self._encode([text, _ANCHOR + text])
            found = [alone] if alone else []
            cut = len(self._anchor)
            if inside[:cut] == self._anchor and len(inside) > cut and inside[cut:] != alone:
                found.append(inside[cut:])
            if len(self._words) >= 4096:  # words come from clients, so what is remembered is bounded
                self._words.clear()
            self._words[text] = found
        return found

    def _encode(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]


def word_lists(rows: Sequence[Sequence[Sequence[int]]]) -> Int32:
    """Word lists of a batch in the engine's layout.

    Args:
        rows: per batch row, the token sequences of its words.

    Returns:
        [batch, 2, N] int32. [row, 0] holds the ids of all words one after another, padded with 0; [row, 1] the offset
        behind each word, padded with -1. N is the longest row's number of ids, 0 without words (layout:
        NVIDIA/TensorRT-LLM, `to_word_list_format` in tensorrt_llm/runtime/generation.py).
    """
    size = max((sum(map(len, words)) for words in rows), default=0)
    table = np.zeros((len(rows), 2, size), dtype=np.int32)
    table[:, 1, :] = -1
    for row, words in enumerate(rows):
        ids = [number for word in words for number in word]
        table[row, 0, : len(ids)] = ids
        table[row, 1, : len(words)] = np.cumsum([len(word) for word in words])
    return table


def pad(rows: Sequence[Sequence[int]], padding: Sequence[int]) -> Int32:
    """[batch, longest] int32 of rows of unequal length, each padded on the right with its own padding id."""
    longest = max(map(len, rows))
    table = np.empty((len(rows), longest), dtype=np.int32)
    for row, (ids, fill) in enumerate(zip(rows, padding, strict=True)):
        table[row, : len(ids)] = ids
        table[row, len(ids) :] = fill
    return table
