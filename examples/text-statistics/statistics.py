"""A function that Triton serves by its annotations: see build_configs/text-statistics.yaml."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from numpy.typing import NDArray


def infer(
    text: str,
    word: str = "",
) -> tuple[
    Annotated[NDArray[np.int64], "counts", 3],
    Annotated[NDArray[np.float32], "frequency", 1],
]:
    """Characters, words and lines of each text, and how much of its words is `word`.

    The arguments hold one text per request, because requests that come together are answered together.
    """
    texts = np.atleast_1d(text)
    wanted = np.broadcast_to(np.atleast_1d(word), texts.shape)
    counts, frequency = [], []
    for one, sought in zip(texts, wanted, strict=True):
        words = one.split()
        counts.append([len(one), len(words), one.count("\n") + 1])
        frequency.append([words.count(sought) / len(words) if words else 0.0])
    return np.array(counts), np.array(frequency, dtype=np.float32)
