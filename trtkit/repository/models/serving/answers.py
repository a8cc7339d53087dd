"""The text of one sequence as it grows, and the responses that carry it to whoever asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from .asks import Ask
from .engine import Code, Step
from .kept import KeptTensors
from .stops import StopStrings
from .streams import TextStream

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL

Piece = tuple[Any, int]
"""A response and its flags."""


class Answer:
    """One sequence: tokens in, text out, with nothing of a stop word in it.

    Args:
        watches: there are stop words.

    Attributes:
        parts: text that may go out and has not yet; or, for cumulative streams, all that may.
        fresh: `parts` has grown since it was sent.
        tokens: how many tokens the text is made of.
        finish: `stop` or `length` once it is over.
        ended: the response with its finish is out.
    """

    __slots__ = (
        "_stops", "_stream", "_watches", "ended", "finish", "fresh", "key", "log_probs", "log_probs_sent", "parts",
        "tokens",
    )  # fmt: skip

    def __init__(self, key: int, stream: TextStream, stops: StopStrings, *, watches: bool) -> None:
        self.key = key
        self._stream, self._stops, self._watches = stream, stops, watches
        self.parts: list[str] = []
        self.fresh = False
        self.tokens = 0
        self.finish = ""
        self.ended = False
        self.log_probs: list[float] = []
        self.log_probs_sent = 0

    def take(self, step: Step) -> None:
        """Receives what the engine has made. After a stop word there is a `finish` although the engine goes on."""
        if not self._watches:
            self._take(step.tokens, step.log_probs)
        else:  # one by one, so that tokens behind a stop word do not count, whatever came with them
            for place in range(len(step.tokens)):
                self._take(step.tokens[place : place + 1], step.log_probs[place : place + 1])
                if self._stops.matched is not None:
                    break
        if step.finish and self._stops.matched is None:
            self._add(self._stops.push(self._stream.finish()))
            if self._stops.matched is None:
                self._add(self._stops.finish())
        if self._stops.matched is not None:
            self.finish = "stop"
        elif step.finish:
            self.finish = step.finish

    def _take(self, tokens: Sequence[int], log_probs: Sequence[float]) -> None:
        if tokens:
            self.tokens += len(tokens)
            self._add(self._stops.push(self._stream.push(tokens)))
            self.log_probs += log_probs

    def _add(self, text: str) -> None:
        if text:
            self.parts.append(text)
            self.fresh = True


class Reply:
    """The answers to one request, and the way back to its client.

    At any time one thread has it. Nothing is asked of the server after the final response: Triton 2.51 dies when
    a model asks whether a request that is over was cancelled.

    Attributes:
        ask: what is asked for, once it has been read.
        arrived: when the request came, in seconds of the monotonic clock.
        deadline: when it has waited too long in the queue; None for never.
        started: when its first text went out.
        held_since: since when text waits for company.
    """

    __slots__ = (
        "_kept", "_names", "_sender", "answers", "arrived", "ask", "deadline", "held_since", "jobs", "over",
        "prompt_tokens", "started", "text_in_front",
    )  # fmt: skip

    def __init__(self, request: Any, arrived: float, kept: KeptTensors) -> None:
        self._kept = kept
        self._sender = request.get_response_sender()
        self._names = frozenset(request.requested_output_names())
        self.ask = Ask(None)
        self.arrived = arrived
        self.deadline: float | None = None
        self.started: float | None = None
        self.held_since: float | None = None
        self.answers: list[Answer] = []
        self.jobs: list[Any] = []
        self.prompt_tokens = 0
        self.text_in_front = ""
        self.over = False

    def is_cancelled(self) -> bool:
        """Whether nobody waits any more. A message to the server and back, about 80 us of CPU."""
        return not self.over and bool(self._sender.is_cancelled())

    def fail(self, message: str, code: Code) -> None:
        """Ends the request with an error; whatever was sent before stands."""
        for response, flags in self.failure(message, code):
            self.send(response, flags)

    def failure(self, message: str, code: Code) -> list[Piece]:
        """The error that ends the request; none if it is over."""
        if self.over:
            return []
        self.over = True
        error = pb_utils.TritonError(message, getattr(pb_utils.TritonError, code))
        return [(pb_utils.InferenceResponse(error=error), FINAL)]

    def send(self, response: Any, flags: int) -> None:
        """Sends one response. Any thread may, while no other does."""
        self._sender.send(response, flags=flags)

    def done(self) -> bool:
        """Whether every sequence has its end."""
        return all(answer.finish for answer in self.answers)

    def pieces(self) -> list[Piece]:
        """What can be sent: text that has come, or, when not streaming, the whole once it is complete."""
        self.held_since = None
        done = self.done()
        if not self.ask.streams:
            return [self._piece(self.answers, last=True)] if done else []
        ready = [answer for answer in self.answers if answer.fresh or (answer.finish and not answer.ended)]
        return [self._piece([answer], last=done and place == len(ready)) for place, answer in enumerate(ready, 1)]

    def _piece(self, answers: Sequence[Answer], *, last: bool) -> Piece:
        names, ask = self._names, self.ask
        tensors = []
        texts = [self._text(answer) for answer in answers]
        if "text_output" in names:
            tensors.append(self._kept.texts("text_output", texts, (1, len(texts))))
        if ask.log_probs:
            tensors += self._log_probs(answers)
        if ask.sequences > 1 and "sequence_index" in names and ask.streams:
            tensors.append(_numbers("sequence_index", [self.answers.index(answers[0])]))
        if answers[0].finish:
            tensors += self._end(answers)
        if last:
            self.over = True
        return pb_utils.InferenceResponse(tensors), FINAL if last else 0

    def _text(self, answer: Answer) -> str:
        """What goes out of an answer now."""
        text = "".join(answer.parts)
        answer.fresh = False
        answer.ended = bool(answer.finish)
        if not self.ask.streams:
            return self.text_in_front + text
        if not self.ask.cumulative:
            answer.parts.clear()
        return text

    def _log_probs(self, answers: Sequence[Answer]) -> list[Any]:
        tensors = []
        if "cum_log_probs" in self._names:
            sums = np.array([[sum(answer.log_probs) for answer in answers]], dtype=np.float32)
            tensors.append(pb_utils.Tensor("cum_log_probs", sums))
        if "output_log_probs" in self._names:
            new = [answer.log_probs[answer.log_probs_sent :] for answer in answers]
            rows = np.zeros((1, len(new), max(map(len, new))), dtype=np.float32)
            for place, row in enumerate(new):
                rows[0, place, : len(row)] = row
            tensors.append(pb_utils.Tensor("output_log_probs", rows))
            for answer in answers:
                answer.log_probs_sent = len(answer.log_probs)
        return tensors

    def _end(self, answers: Sequence[Answer]) -> list[Any]:
        tensors = []
        if "finish_reason" in self._names:
            tensors.append(self._kept.texts("finish_reason", [answer.finish for answer in answers], (1, len(answers))))
        if "prompt_tokens" in self._names:
            tensors.append(_numbers("prompt_tokens", [self.prompt_tokens]))
        if "completion_tokens" in self._names:
            tensors.append(_numbers("completion_tokens", [answer.tokens for answer in answers]))
        return tensors


def _numbers(name: str, values: Sequence[int]) -> Any:
    return pb_utils.Tensor(name, np.array([values], dtype=np.int32))
