"""Triton tensors to generations, and generations back to tensors. Plain numpy: Triton is not needed to test it.

Names, dtypes and shapes are those of NVIDIA's `tensorrt_llm` model (tensorrtllm_backend v0.20,
`all_models/inflight_batcher_llm/tensorrt_llm/config.pbtxt`). Tensors of one value arrive as `[batch, 1]` or, where the
config reshapes them, as `[batch]`; both are read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from trtkit import contract
from trtkit.errors import InputError
from trtkit.repository.models.reference.generation import Generation, SamplingParams, Word

Array = npt.NDArray[Any]

LEAST_DIVISOR = 1e-6
"""Logits are divided by temperature and repetition penalty; by less than this they would leave the range of float32."""

_KNOWN_IDS = "send ids that the model's own tokenizer makes"

INPUTS = tuple(tensor.name for tensor in contract.llm_inputs(reference=True))


@dataclass(frozen=True)
class Limits:
    """What a model can do.

    Attributes:
        vocab_size: token ids are below.
        max_seq_len: most tokens of prompt and output together.
        end_ids: end ids of requests that name none.
        exclude_input_in_output: default of the input of that name.
        decoupled: whether a request may have several responses.
    """

    vocab_size: int
    max_seq_len: int
    end_ids: tuple[int, ...] = ()
    exclude_input_in_output: bool = False
    decoupled: bool = False


@dataclass(frozen=True)
class Ask:
    """A request, read and checked: one generation per row of its batch."""

    generations: list[Generation]
    streaming: bool
    exclude_input: bool
    pad_id: int


def wants_stop(inputs: Mapping[str, Array]) -> bool:
    """Whether the request only cancels the running one of the same id; its other tensors mean nothing."""
    return "stop" in inputs and bool(inputs["stop"].any())


def read_request(inputs: Mapping[str, Array], limits: Limits) -> Ask:
    """Checks the tensors of one request and makes generations of them.

    Raises:
        InputError: a tensor is wrong; the cause begins with its name.
    """
    ids = _tensor(inputs, "input_ids")
    if ids.ndim != 2 or not ids.size:
        raise InputError(f"input_ids: shape {list(ids.shape)} holds no prompt", "send [batch, tokens]")
    rows = _Rows(inputs, len(ids))
    lengths = rows.integers("input_lengths", ids.shape[1], least=1, most=ids.shape[1])
    outputs = rows.integers("request_output_len", None, least=1)
    for name in ("beam_width", "num_return_sequences"):
        rows.integers(name, 1, least=1, most=1)
    params = _sampling(rows)
    named = rows.integers("end_id", None, most=limits.vocab_size - 1, need=False)
    stop_words = _words(inputs, "stop_words_list", len(ids), limits)
    bad_words = _words(inputs, "bad_words_list", len(ids), limits)
    streaming, log_probs = rows.flag("streaming", False), rows.flag("return_log_probs", False)
    if streaming and not limits.decoupled:
        raise InputError("streaming: the model is not decoupled", "set decoupled: true in its config.pbtxt")
    generations = []
    for row, length in enumerate(lengths):
        prompt = _prompt(ids[row, :length], limits)
        if length + outputs[row] > limits.max_seq_len:
            raise InputError(
                f"request_output_len: {outputs[row]} tokens after a prompt of {length} are more than max_seq_len "
                f"{limits.max_seq_len}",
                f"ask for {max(limits.max_seq_len - length, 0)} or fewer",
            )
        generations.append(
            Generation(
                prompt,
                outputs[row],
                params=params[row],
                end_ids=_end_ids(named[row], limits),
                stop_words=stop_words[row],
                bad_words=bad_words[row],
                wants_log_probs=log_probs,
            )
        )
    exclude = rows.flag("exclude_input_in_output", limits.exclude_input_in_output)
    return Ask(generations, streaming, exclude, max(rows.integers("pad_id", 0)[0], 0))


def token_tensors(generation: Generation, index: int, token: int | None) -> dict[str, Array]:
    """One piece of a stream: a token, or none at the end (`output_ids` `[1, 1, 0]`)."""
    if token is None:
        return tensors([[]], [0], [sum(generation.log_probs)], [[]], index)
    newest = generation.log_probs[-1] if generation.log_probs else 0.0
    return tensors([[token]], [1], [sum(generation.log_probs)], [[newest]], index)


def answer_tensors(
    generations: Sequence[Generation], index: int, *, exclude_input: bool, pad_id: int
) -> dict[str, Array]:
    """Whole answers, one row each, padded on the right."""
    tokens = [g.output if exclude_input else g.tokens for g in generations]
    sums = [sum(g.log_probs) for g in generations]
    log_probs = [g.log_probs or [0.0] * g.generated for g in generations]
    width = max(map(len, tokens))
    steps = max(map(len, log_probs))
    return tensors(
        [row + [pad_id] * (width - len(row)) for row in tokens],
        [len(row) for row in tokens],
        sums,
        [row + [0.0] * (steps - len(row)) for row in log_probs],
        index,
    )


def tensors(
    tokens: Sequence[Sequence[int]],
    lengths: Sequence[int],
    sums: Sequence[float],
    log_probs: Sequence[Sequence[float]],
    index: int,
) -> dict[str, Array]:
    """The outputs of one response for `n` rows of the request: `[n, beam, ...]` with beam 1.

    Args:
        index: row of the request that the first row belongs to.
    """
    rows = len(lengths)
    return {
        "output_ids": np.array(tokens, dtype=np.int32).reshape(rows, 1, len(tokens[0])),
        "sequence_length": np.array(lengths, dtype=np.int32).reshape(rows, 1),
        "cum_log_probs": np.array(sums, dtype=np.float32).reshape(rows, 1),
        "output_log_probs": np.array(log_probs, dtype=np.float32).reshape(rows, 1, len(log_probs[0])),
        "batch_index": np.arange(index, index + rows, dtype=np.int32).reshape(rows, 1),
        "sequence_index": np.zeros((rows, 1), dtype=np.int32),
    }


class _Rows:
    """Inputs with one value per row of the batch."""

    def __init__(self, inputs: Mapping[str, Array], rows: int) -> None:
        self._inputs = inputs
        self._rows = rows

    def values(self, name: str) -> list[Any] | None:
        if name not in self._inputs:
            return None
        values: list[Any] = self._inputs[name].reshape(-1).tolist()
        if len(values) != self._rows:
            raise InputError(f"{name}: {len(values)} values for {self._rows} prompts", "send one value per prompt")
        return values

    def integers(
        self, name: str, default: int | None, *, least: int | None = None, most: int | None = None, need: bool = True
    ) -> list[Any]:
        values = self.values(name)
        if values is None:
            if default is None and need:
                raise InputError(f"{name}: the tensor is missing", "send it")
            return [default] * self._rows
        for value in values:
            if (least is not None and value < least) or (most is not None and value > most):
                raise InputError(f"{name}: {value} is not {_span(least, most)}", _within(least, most))
        return values

    def numbers(self, name: str, default: float, *, least: float = -math.inf, most: float = math.inf) -> list[float]:
        values = self.values(name)
        if values is None:
            return [default] * self._rows
        for value in values:
            if not math.isfinite(value):
                raise InputError(f"{name}: {value} is not finite", _within(least, most))
            if not least <= value <= most:
                raise InputError(f"{name}: {value} is not {_span(least, most)}", _within(least, most))
        return values

    def flag(self, name: str, default: bool) -> bool:
        """A switch of the whole request: rows that disagree are an error."""
        values = self.values(name) or [default]
        if len(set(values)) > 1:
            raise InputError(f"{name}: the prompts of one request disagree", "send them as separate requests")
        return bool(values[0])


def _span(least: float | None, most: float | None) -> str:
    low = None if least is None or least == -math.inf else f"at least {least:g}"
    high = None if most is None or most == math.inf else f"at most {most:g}"
    if least is not None and least == most:
        return f"{least:g}, the only value supported"
    return " and ".join(part for part in (low, high) if part) or "a finite number"


def _within(least: float | None, most: float | None) -> str:
    """The fix for a value outside of a span."""
    return f"send {_span(least, most).partition(',')[0]}, or leave the tensor out if it is optional"


def _tensor(inputs: Mapping[str, Array], name: str) -> Array:
    if name not in inputs:
        raise InputError(f"{name}: the tensor is missing", "send it")
    return inputs[name]


def _prompt(ids: Array, limits: Limits) -> list[int]:
    if ids.min() < 0 or ids.max() >= limits.vocab_size:
        bad = int(ids[(ids < 0) | (ids >= limits.vocab_size)][0])
        raise InputError(f"input_ids: {bad} is not in the vocabulary of {limits.vocab_size}", _KNOWN_IDS)
    tokens: list[int] = ids.tolist()
    return tokens


def _end_ids(end_id: int | None, limits: Limits) -> tuple[int, ...]:
    """A request that names no end id gets all of the model's. One that does gets that one alone, as with the engine,
    which knows a single one: preprocessing sends a model's others as stop words. A negative one ends nothing."""
    if end_id is None:
        return limits.end_ids
    return (end_id,) if end_id >= 0 else ()


def _sampling(rows: _Rows) -> list[SamplingParams]:
    columns = (
        rows.numbers("temperature", 1.0, least=0),
        rows.integers("runtime_top_k", 0, least=0),
        rows.numbers("runtime_top_p", 0.0, least=0, most=1),
        rows.numbers("repetition_penalty", 1.0, least=0),
        rows.numbers("presence_penalty", 0.0),
        rows.numbers("frequency_penalty", 0.0),
        rows.integers("min_tokens", 0, least=0),
        rows.integers("seed", None, need=False),
    )
    if 0 in columns[3]:
        raise InputError("repetition_penalty: 0 is not above 0", "send 1 for no penalty")
    _not_tiny("temperature", columns[0], "send 0 for greedy")
    _not_tiny("repetition_penalty", columns[3], "send 1 for no penalty")
    return [SamplingParams(*values) for values in zip(*columns, strict=True)]


def _not_tiny(name: str, values: Sequence[float], fix: str) -> None:
    for value in values:
        if 0 < value < np.float32(LEAST_DIVISOR):
            raise InputError(f"{name}: {value:g} is too small", f"{fix}, or at least {LEAST_DIVISOR:g}")


def _words(inputs: Mapping[str, Array], name: str, rows: int, limits: Limits) -> list[list[Word]]:
    """Word lists `[batch, 2, n]`: token ids of all words, and where each word ends, padded with -1."""
    if name not in inputs:
        return [[] for _ in range(rows)]
    array = inputs[name]
    if array.ndim != 3 or array.shape[:2] != (rows, 2):
        raise InputError(f"{name}: shape {list(array.shape)} is not [{rows}, 2, n]", "send ids and end offsets")
    return [_split(name, ids.tolist(), ends.tolist(), limits) for ids, ends in array]


def _split(name: str, ids: list[int], ends: list[int], limits: Limits) -> list[Word]:
    """The words of one row."""
    count = ends.index(-1) if -1 in ends else len(ends)
    bounds = [0, *ends[:count]]
    if any(end != -1 for end in ends[count:]) or any(end <= start for start, end in pairwise(bounds)):
        raise InputError(f"{name}: the offsets {ends} do not rise, or go on after -1", "send word ends, then -1")
    if bounds[-1] > len(ids):
        raise InputError(f"{name}: offset {bounds[-1]} is beyond the {len(ids)} ids", "send word ends, then -1")
    for token in ids[: bounds[-1]]:
        if not 0 <= token < limits.vocab_size:
            raise InputError(f"{name}: {token} is not in the vocabulary of {limits.vocab_size}", _KNOWN_IDS)
    return [tuple(ids[start:end]) for start, end in pairwise(bounds)]
