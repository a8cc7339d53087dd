"""The key/value cache of a running batch: one buffer per layer, left-padded rows that end at the same column.

Ending together means that a decoding step writes one column for all rows and that a plain two-dimensional attention
mask describes the batch, which every transformers model understands (sliding windows and ALiBi included).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

if TYPE_CHECKING:
    from collections.abc import Sequence

_SMALLEST = 256
"""Columns of a new buffer: small enough for a tiny model, large enough that few requests make it grow."""


class _FlatCache(DynamicCache):  # type: ignore[misc]
    """What both caches share: a cache that answers for its own length and keeps nothing in the parent's layers.

    The parent class is there because models and mask builders test for it. Its attributes changed between
    transformers 4.57 and 5; only methods with the same meaning in all of them are overridden.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        """Columns before the tokens of this forward pass; the same during the whole pass."""
        return self.seen

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        """Length of the keys and the column at which they start. Up to transformers 4.57 the first argument was the
        tensor of cache positions."""
        queries = query_length if isinstance(query_length, int) else int(query_length.shape[0])
        return self.seen + queries, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.seen


class PrefillCache(_FlatCache):
    """Keeps the keys and values of one prefill, per layer `[rows, heads, columns, head size]`."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if layer_idx != len(self.keys):
            raise NotImplementedError(f"layer {layer_idx} asked for its cache after {len(self.keys)} layers")
        self.keys.append(key_states)
        self.values.append(value_states)
        return key_states, value_states


class BatchCache(_FlatCache):
    """Keys and values of the running rows, in columns `start` to `end` of growing buffers.

    Rows 0 to `rows` run; row i holds its tokens in the last `lengths[i]` columns. Joining writes to the left of `end`,
    a step writes at `end`, leaving moves the last row into the gap and drops the padding that all rows share by moving
    `start`: no copy. Only when `end` reaches the capacity is the window moved back to the front.

    Args:
        slots: most rows.
    """

    def __init__(self, slots: int) -> None:
        super().__init__()
        self.slots = slots
        self.capacity = 0
        self.start = 0
        self.end = 0
        self.lengths: list[int] = []
        self.mask = torch.zeros(slots, 0, dtype=torch.long)
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []

    @property
    def rows(self) -> int:
        return len(self.lengths)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, end = key_states.shape[0], self.end + 1
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        keys[:rows, :, self.end : end] = key_states
        values[:rows, :, self.end : end] = value_states
        return keys[:rows, :, self.start : end], values[:rows, :, self.start : end]

    def open_column(self) -> torch.Tensor:
        """Makes room for one more token per row; returns the attention mask `[rows, columns]` that includes it."""
        if self.end == self.capacity:
            self._move(0, self.end - self.start + 1)
        self.seen = self.end - self.start
        self.mask[: self.rows, self.end] = 1
        return self.mask[: self.rows, self.start : self.end + 1]

    def close_column(self) -> None:
        """The column of `open_column` now holds a token of every row."""
        self.end += 1
        self.lengths = [length + 1 for length in self.lengths]

    def reserve(self, prefill: PrefillCache, columns: int) -> None:
        """Makes room for rows of so many tokens. Out of memory shows here, before anything changed."""
        if not self._keys:
            self._keys = [self._buffer(states, 0) for states in prefill.keys]
            self._values = [self._buffer(states, 0) for states in prefill.values]
        if not self.rows:
            self.start = self.end = min(columns, self.capacity)
        if self.end < columns:
            self._move(columns - (self.end - self.start), columns)

    def join(self, prefill: PrefillCache, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Appends rows of a left-padded prefill for which room was reserved.

        Args:
            prefill: keys and values per layer.
            rows: which rows of the prefill.
            lengths: tokens of each row of the prefill, in its last columns.
        """
        for row in rows:
            length = lengths[row]
            target, first = self.rows, self.end - length
            self.mask[target] = 0
            self.mask[target, first : self.end] = 1
            for buffers, new in ((self._keys, prefill.keys), (self._values, prefill.values)):
                for buffer, states in zip(buffers, new, strict=True):
                    # What an earlier request left here has no weight, but no weight times infinity is not zero.
                    buffer[target, :, :first] = 0
                    buffer[target, :, first : self.end] = states[row, :, states.shape[2] - length :]
            self.lengths.append(length)
        self.start = self.end - max(self.lengths)

    def leave(self, row: int) -> None:
        """Frees a row; the last row takes its place."""
        last = self.rows - 1
        if row != last:
            for buffer in (*self._keys, *self._values):
                buffer[row, :, : self.end] = buffer[last, :, : self.end]
            self.mask[row] = self.mask[last]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        self.start = self.end - max(self.lengths, default=0)

    def clear(self) -> None:
        """Forgets all rows and gives the memory back."""
        self.lengths = []
        self._keys, self._values = [], []
        self.capacity = self.start = self.end = 0

    def _move(self, start: int, columns: int) -> None:
        """Puts the window at `start`, with room for at least as many columns again, so that moving stays rare."""
        width = self.end - self.start
        capacity = max(self.capacity, _SMALLEST)
        while capacity < 2 * max(columns, start + width):
            capacity *= 2

        def moved(old: torch.Tensor) -> torch.Tensor:
            new = self._buffer(old, capacity)
            new[: self.rows, :, start : start + width] = old[: self.rows, :, self.start : self.end]
            return new

        keys, values = [moved(old) for old in self._keys], [moved(old) for old in self._values]
        mask = torch.zeros(self.slots, capacity, dtype=torch.long)
        mask[: self.rows, start : start + width] = self.mask[: self.rows, self.start : self.end]
        self._keys, self._values, self.mask = keys, values, mask
        self.capacity, self.start, self.end = capacity, start, start + width

    def _buffer(self, like: torch.Tensor, columns: int) -> torch.Tensor:
        return like.new_zeros(self.slots, like.shape[1], columns, like.shape[3])
