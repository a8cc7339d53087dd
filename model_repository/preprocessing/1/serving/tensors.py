"""Token ids as the tensors of the engine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]


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
