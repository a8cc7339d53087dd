"""Postprocessing: the tokens of the engine to text.

In: TOKENS_BATCH [batch, beam, n] INT32, SEQUENCE_LENGTH [batch, beam] INT32 (tokens that count in each row), optionally
BATCH_INDEX and SEQUENCE_INDEX [batch, 1] INT32. Out: OUTPUT [batch, beam], UTF-8.

A character spread over several pieces of a stream is held back until it is complete. Pieces of one stream find each
other by the id of their request (and by BATCH_INDEX, SEQUENCE_INDEX and row within it), so streaming clients should
send ids of their own; without an id, a character that a piece cuts becomes U+FFFD. A character that the end of the
answer cuts is left out when the request has an id. An id used again within a minute may find that rest, as U+FFFD.
Run one instance only: the server hands pieces of one stream to several instances in any order.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils
from serving.kept import KeptTensors  # type: ignore[import-not-found]  # beside this file in the repository
from serving.keyed import KeyedStreams  # type: ignore[import-not-found]
from serving.metrics import Metrics  # type: ignore[import-not-found]
from serving.text import Tokenizer  # type: ignore[import-not-found]

TOKENS = "trtkit_postprocessing_tokens_total"
HELD = "trtkit_postprocessing_held_streams"


class TritonPythonModel:
    """The interface that Triton's python backend expects."""

    def initialize(self, args: dict[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        folder = Path(__file__).parent / parameters["tokenizer_dir"]["string_value"]
        skip = parameters["skip_special_tokens"]["string_value"].lower() in ("true", "1")
        # Nobody says here that an answer has ended, so no complete character may wait for what follows it.
        tokenizer = Tokenizer(folder, skip_special_tokens=skip, byte_run=0)
        if not tokenizer.exact:
            pb_utils.Logger.log_warn(
                f"{folder}: this decoder looks at neighbouring tokens; streamed pieces of requests without an id of "
                "their own may lose spaces between them"
            )
        self.streams, self.kept = KeyedStreams(tokenizer), KeptTensors()
        labels = {"model": args["model_name"], "version": args["model_version"]}
        self.metrics = Metrics(
            labels,
            counters={TOKENS: "Tokens turned into text"},
            gauges={HELD: "Streams whose last piece ended inside a character"},
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        responses = [self._respond(request) for request in requests]
        self.metrics.values[HELD] = len(self.streams)
        self.metrics.report(time.monotonic())
        return responses

    def _respond(self, request: Any) -> Any:
        given = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        tokens, lengths = given["TOKENS_BATCH"], given["SEQUENCE_LENGTH"]
        if tokens.ndim != 3 or lengths.shape != tokens.shape[:2]:
            problem = f"SEQUENCE_LENGTH {list(lengths.shape)} does not fit TOKENS_BATCH {list(tokens.shape)}"
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(problem, pb_utils.TritonError.INVALID_ARG))
        name = request.request_id()
        part = tuple(int(given[index].flat[0]) for index in ("BATCH_INDEX", "SEQUENCE_INDEX") if index in given)
        texts = []
        for row, (beams, counts) in enumerate(zip(tokens.tolist(), lengths.tolist(), strict=True)):
            for beam, (ids, count) in enumerate(zip(beams, counts, strict=True)):
                key = (name, part, row, beam) if name else None
                texts.append(self.streams.text(key, ids[: max(count, 0)]))
                self.metrics.values[TOKENS] += max(count, 0)
        return pb_utils.InferenceResponse([self.kept.texts("OUTPUT", texts, lengths.shape)])
