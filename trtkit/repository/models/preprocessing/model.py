"""Preprocessing: prompts and word lists to the tensors of the engine.

In, each [batch, ...]: QUERY STRING [1], REQUEST_OUTPUT_LEN INT32 [1]; optional STOP_WORDS_DICT and BAD_WORDS_DICT
STRING [n], END_ID and PAD_ID INT32 [1]. Out: INPUT_ID INT32 [longest], padded on the right; REQUEST_INPUT_LEN [1] the
true lengths; STOP_WORDS_IDS and BAD_WORDS_IDS [2, n] (see serving/tensors.py); REQUEST_OUTPUT_LEN, OUT_END_ID and
OUT_PAD_ID [1].

The engine knows one end id. A model with several gets the others as stop words of one token each, unless the request
names its own END_ID: then that one alone ends the answer (-1 for none).
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from serving.kept import KeptTensors  # type: ignore[import-not-found]  # beside this file in the repository
from serving.metrics import Metrics  # type: ignore[import-not-found]
from serving.tensors import pad, word_lists  # type: ignore[import-not-found]
from serving.text import Tokenizer  # type: ignore[import-not-found]

PROMPT_TOKENS = "trtkit_preprocessing_prompt_tokens_total"
REFUSED = "trtkit_preprocessing_refused_requests_total"
Inputs = dict[str, Any]
"""The arrays of a request by name."""
COUNTERS = {PROMPT_TOKENS: "Tokens of prompts", REFUSED: "Requests refused because they were wrong"}


class BadRequestError(Exception):
    """What a request gets wrong, in words for its sender."""


@dataclass
class Ask:
    """One request, read and checked; every list has one item per batch row."""

    prompts: list[str]
    max_tokens: Any
    stop: list[list[list[int]]]
    bad: list[list[list[int]]]
    end_ids: Any
    pad_ids: Any


class TritonPythonModel:
    """The interface that Triton's python backend expects."""

    def initialize(self, args: dict[str, str]) -> None:
        given = json.loads(args["model_config"])["parameters"]
        parameters = {key: value["string_value"] for key, value in given.items()}
        folder = Path(__file__).parent / parameters["tokenizer_dir"]
        self.tokenizer = Tokenizer(folder, add_special_tokens=parameters["add_special_tokens"].lower() in ("true", "1"))
        end_ids = [int(part) for part in parameters["end_ids"].split(",") if part]
        self.end_id = end_ids[0] if end_ids else -1
        self.other_end_ids = end_ids[1:]
        self.pad_id = int(parameters["pad_id"])
        self.several_prompts = parameters["several_prompts"].lower() in ("true", "1")
        labels = {"model": args["model_name"], "version": args["model_version"]}
        self.metrics = Metrics(labels, counters=COUNTERS)
        self.kept = KeptTensors()

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response per request; a wrong request gets an error and leaves the others alone."""
        read = [self._try_read(request) for request in requests]
        asks = [item for item in read if isinstance(item, Ask)]
        # All prompts of all requests in one call: the tokenizer spreads them over the cores.
        encoded = self.tokenizer.encode([prompt for ask in asks for prompt in ask.prompts])
        self.metrics.values[PROMPT_TOKENS] += sum(map(len, encoded))
        ids = iter(encoded)
        responses = []
        for item in read:
            try:
                if isinstance(item, BadRequestError):
                    raise item
                responses.append(self._response(item, [next(ids) for _ in item.prompts]))
            except BadRequestError as error:
                self.metrics.values[REFUSED] += 1
                failure = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
                responses.append(pb_utils.InferenceResponse(error=failure))
        self.metrics.report(time.monotonic())
        return responses

    def _try_read(self, request: Any) -> Ask | BadRequestError:
        try:
            return self._read(request)
        except BadRequestError as error:
            return error

    def _read(self, request: Any) -> Ask:
        given = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        prompts = [_text(row[0], "the prompt") for row in _rows(given, "QUERY")]
        size = len(prompts)
        if size > 1 and not self.several_prompts:
            raise BadRequestError(
                f"the request has {size} prompts, and nothing tells their answers apart: send one in each request, or "
                "add batch_index to serving.ensemble_outputs"
            )
        if not all(prompts):
            raise BadRequestError("the prompt is empty")
        max_tokens = _numbers(given, "REQUEST_OUTPUT_LEN", size, 0)
        if max_tokens.min() < 1:
            raise BadRequestError(f"max_tokens must be at least 1, got {max_tokens.min()}")
        others = [] if "END_ID" in given else [[number] for number in self.other_end_ids]
        return Ask(
            prompts,
            max_tokens,
            stop=[[*words, *others] for words in self._words(given, "STOP_WORDS_DICT", size)],
            bad=self._words(given, "BAD_WORDS_DICT", size),
            end_ids=_numbers(given, "END_ID", size, self.end_id),
            pad_ids=_numbers(given, "PAD_ID", size, self.pad_id),
        )

    def _words(self, given: Inputs, name: str, size: int) -> list[list[list[int]]]:
        """Token sequences per row. Empty words mean none: NVIDIA's documented requests send "" for "no stop words"."""
        rows = _rows(given, name) or [[]] * size
        if len(rows) != size:
            raise BadRequestError(f"{name} has {len(rows)} rows for {size} prompts")
        what = "a stop word" if name == "STOP_WORDS_DICT" else "a bad word"
        texts = [[_text(word, what) for word in row] for row in rows]
        return [[ids for text in row if text for ids in self.tokenizer.word(text)] for row in texts]

    def _response(self, ask: Ask, ids: list[list[int]]) -> Any:
        if not all(ids):
            raise BadRequestError("the prompt has no tokens")
        tensors = {
            "REQUEST_INPUT_LEN": np.array([[len(row)] for row in ids], dtype=np.int32),
            "BAD_WORDS_IDS": word_lists(ask.bad),
            "STOP_WORDS_IDS": word_lists(ask.stop),
            "REQUEST_OUTPUT_LEN": ask.max_tokens,
            "OUT_END_ID": ask.end_ids,
            "OUT_PAD_ID": ask.pad_ids,
        }
        prompts = pb_utils.Tensor("INPUT_ID", pad(ids, ask.pad_ids[:, 0].tolist()))
        return pb_utils.InferenceResponse([prompts, *(self.kept.array(*item) for item in tensors.items())])


def _rows(given: Inputs, name: str) -> list[list[bytes]]:
    """A string tensor as a list of its batch rows; none when the request leaves it out."""
    return [row.reshape(-1).tolist() for row in given.get(name, ())]


def _numbers(given: Inputs, name: str, size: int, default: int) -> Any:
    """[size, 1] int32 of a tensor with one number per row."""
    array = given.get(name)
    if array is None:
        return np.full((size, 1), default, dtype=np.int32)
    if array.size != size:
        raise BadRequestError(f"{name} has {array.size} numbers for {size} prompts")
    return array.reshape(size, 1)


def _text(raw: bytes, what: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise BadRequestError(f"{what} is not UTF-8: byte {error.start}: {error.reason}") from None
