"""What a request asks for: its tensors, read and checked.

Names and meanings are those of NVIDIA's ensemble where it has them (tensorrtllm_backend v0.20,
`all_models/inflight_batcher_llm/ensemble`): text_input, max_tokens, stream, stop_words and the sampling settings.
Beside these, `messages` takes the place of text_input and holds chat messages as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .engine import RequestError, Sampling

Array = npt.NDArray[Any]
MAX_SEQUENCES = 16
LEAST_TEMPERATURE = 1e-6
"""Logits are divided by it; by less they would leave the range of float32."""
_MOST_WORDS, _MOST_CHARACTERS = 256, 4096


@dataclass
class Ask:
    """One request.

    Attributes:
        text, messages: exactly one is given; messages is JSON.
        template_arguments: what the chat template gets beside the messages, such as `tools`.
        max_tokens: None takes the model's default.
        stop_words: texts that end an answer and are left out of it.
        bad_words: texts that may not appear.
        end_ids: instead of the model's own; empty for none at all.
        sequences: answers to make.
        streams: answer piece by piece.
        cumulative: each piece is the whole text so far.
        echo: an answer that is not streamed begins with the prompt.
    """

    text: str | None
    messages: bytes | None = None
    template_arguments: dict[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop_words: tuple[str, ...] = ()
    bad_words: tuple[str, ...] = ()
    end_ids: tuple[int, ...] | None = None
    sequences: int = 1
    streams: bool = False
    cumulative: bool = False
    include_stop: bool = False
    echo: bool = False
    log_probs: bool = False


def read(tensors: Mapping[str, Array]) -> Ask:
    """The request that these inputs describe, each `[1, n]` or `[n]`.

    Raises:
        RequestError: an input is wrong; the message begins with its name.
    """
    given = _Inputs(tensors)
    text, messages = given.text("text_input"), given.raw("messages")
    if (text is None) == (messages is None):
        raise RequestError("text_input: send either text_input or messages")
    if messages is None and "chat_template_kwargs" in tensors:
        raise RequestError("chat_template_kwargs: only with messages")
    ask = Ask(text, messages)
    if len(tensors) > 1:
        _settings(ask, given)
    return ask


def _settings(ask: Ask, given: _Inputs) -> None:
    ask.template_arguments = given.json_object("chat_template_kwargs")
    ask.max_tokens = given.integer("max_tokens", least=1)
    ask.sampling = Sampling(
        temperature=given.temperature(),
        top_k=given.integer("top_k", least=0),
        top_p=given.number("top_p", least=0, most=1),
        repetition_penalty=given.number("repetition_penalty", least=1e-6),
        presence_penalty=given.number("presence_penalty"),
        frequency_penalty=given.number("frequency_penalty"),
        min_tokens=given.integer("min_tokens", least=0),
        seed=given.integer("seed", least=0),
        lora_task_id=given.integer("lora_task_id", least=0),
        guide_type=given.text("guided_decoding_guide_type"),
        guide=given.text("guided_decoding_guide"),
    )
    ask.stop_words, ask.bad_words = given.words("stop_words"), given.words("bad_words")
    end_id = given.integer("end_id", least=-1)
    ask.end_ids = None if end_id is None else () if end_id < 0 else (end_id,)
    sequences = given.integer("num_return_sequences", least=1, most=MAX_SEQUENCES)
    ask.sequences = 1 if sequences is None else sequences
    ask.streams = given.flag("stream", False)
    ask.cumulative = given.flag("cumulative", False)
    ask.include_stop = given.flag("include_stop_words", False)
    ask.echo = not given.flag("exclude_input_in_output", True)
    ask.log_probs = given.flag("return_log_probs", False)


class _Inputs:
    """Inputs by name, as Python values."""

    def __init__(self, tensors: Mapping[str, Array]) -> None:
        self._tensors = tensors

    def _one(self, name: str) -> Any:
        array = self._tensors.get(name)
        if array is None:
            return None
        if array.size != 1:
            raise RequestError(f"{name}: shape {list(array.shape)}; a request holds one value (and one prompt)")
        return array.item()

    def raw(self, name: str) -> bytes | None:
        value = self._one(name)
        return value.encode() if isinstance(value, str) else value

    def text(self, name: str) -> str | None:
        value = self.raw(name)
        return None if value is None else _decoded(value, name)

    def integer(self, name: str, *, least: int | None = None, most: int | None = None) -> int | None:
        value = self._one(name)
        if value is None:
            return None
        _check_range(name, value, least, most)
        return int(value)

    def number(self, name: str, *, least: float | None = None, most: float | None = None) -> float | None:
        value = self._one(name)
        if value is None:
            return None
        if not np.isfinite(value):
            raise RequestError(f"{name}: {value} is no finite number")
        _check_range(name, value, least, most)
        return float(value)

    def temperature(self) -> float | None:
        value = self.number("temperature", least=0)
        if value and value < LEAST_TEMPERATURE:
            raise RequestError(f"temperature: {value} must be 0 (greedy) or {LEAST_TEMPERATURE} or more")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self._one(name)
        return default if value is None else bool(value)

    def words(self, name: str) -> tuple[str, ...]:
        """Texts; empty ones mean none, since NVIDIA's documented requests send "" for "no stop words"."""
        array = self._tensors.get(name)
        if array is None:
            return ()
        words = tuple(_decoded(word, name) for word in array.reshape(-1).tolist() if word)
        if len(words) > _MOST_WORDS or any(len(word) > _MOST_CHARACTERS for word in words):
            raise RequestError(
                f"{name}: more than {_MOST_WORDS} words, or one of more than {_MOST_CHARACTERS} characters"
            )
        return words

    def json_object(self, name: str) -> dict[str, Any]:
        raw = self.raw(name)
        if raw is None:
            return {}
        try:
            value = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{name}: no JSON: {error}") from None
        if not isinstance(value, dict):
            raise RequestError(f"{name}: must be a JSON object")
        return value


def _check_range(name: str, value: float, least: float | None, most: float | None) -> None:
    if (least is not None and value < least) or (most is not None and value > most):
        span = f"{least} or more" if most is None else f"{most} or less" if least is None else f"{least} to {most}"
        raise RequestError(f"{name}: {value} must be {span}")


def _decoded(raw: bytes | str, name: str) -> str:
    if isinstance(raw, str):
        return raw
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"{name}: not UTF-8: byte {error.start}: {error.reason}") from None
