"""A served model as a side of an evaluation: what its tensors tell about its predictions (`trtkit.contract`).

An engine that was built with `--gather_context_logits` returns the logits of every prompt token (`context_logits`), and
so everything can be measured. Other engines and the `reference` runtime return the tokens that they choose and those
tokens' log-probabilities (`output_log_probs`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from trtkit.client import LLMClient, ServerError, connect
from trtkit.client.api import ENGINE, LLM
from trtkit.client.tensors import engine_inputs, scalar
from trtkit.errors import InputError, LacksError

T = TypeVar("T")

_AT_ONCE = 8
"""Requests in flight: enough to keep a server busy, few enough for its queue."""


@dataclass(frozen=True)
class NextToken:
    """The token that a model chooses, and the natural logarithm of its probability if the server tells it."""

    token: int
    log_prob: float | None = None


class ServedModel:
    """The engine model of a server. Use it as a context manager: it keeps a connection, and an event loop of its own.

    Attributes:
        missing: why the server gives no logits; empty where it does.
        has_log_probs: whether the model can tell log-probabilities.
    """

    def __init__(self, client: LLMClient, model: str, *, timeout_s: float = 120.0) -> None:
        self._client, self._model, self._timeout_s = client, model, timeout_s
        self._loop = asyncio.new_event_loop()
        self._names: set[str] = set()
        self.missing = ""
        self.has_log_probs = False

    def __enter__(self) -> ServedModel:
        try:
            self._run(self._open())
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def probe(self, ids: Sequence[int]) -> None:
        """Asks for logits once, and sets `missing`.

        Raises:
            RequestTimeoutError, LacksError: the server does not answer.
        """
        if not {"return_context_logits", "context_logits"} <= self._names:
            self.missing = f"model '{self._model}' has no output 'context_logits'"
            return
        try:
            self._run(self._context_logits(ids))
        except (ServerError, LacksError) as error:
            if isinstance(error, LacksError) and error.fix != _BUILD_FIX:
                raise
            self.missing = error.message if isinstance(error, ServerError) else error.cause

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Next-token logits (batch, length, vocabulary), float32, on the device of `ids` (batch, length)."""
        rows = [self._run(self._context_logits(row)) for row in ids.tolist()]
        return torch.from_numpy(np.stack(rows)).to(ids.device)

    def next_tokens(self, prefixes: Sequence[Sequence[int]]) -> list[NextToken]:
        """The greedy token after each prefix, `_AT_ONCE` requests at a time."""
        return self._run(self._next_tokens(prefixes))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(work)

    def _close(self) -> None:
        if not self._loop.is_closed():
            self._run(self._client.close())
            self._loop.close()

    async def _open(self) -> None:
        if not await self._client.is_live():
            raise LacksError(f"no server answers at {self._client.url}", "start it, or correct the url")
        try:
            described = await self._client.metadata(self._model)
        except ServerError:
            if self._model == ENGINE and LLM in (models := await self._client.models()) and ENGINE not in models:
                raise _takes_text(self._client.url, LLM, f"and there is no model '{ENGINE}'") from None
            raise
        self._names = {tensor["name"] for side in ("inputs", "outputs") for tensor in described.get(side, [])}
        if "messages" in self._names and "input_ids" not in self._names:
            raise _takes_text(self._client.url, self._model, "and no tokens")
        self.has_log_probs = {"return_log_probs", "output_log_probs"} <= self._names

    async def _next_tokens(self, prefixes: Sequence[Sequence[int]]) -> list[NextToken]:
        places = asyncio.Semaphore(_AT_ONCE)

        async def ask(prefix: Sequence[int]) -> NextToken:
            async with places:
                return await self._next_token(prefix)

        return await asyncio.gather(*map(ask, prefixes))

    async def _next_token(self, prefix: Sequence[int]) -> NextToken:
        outputs = await self._infer(prefix, "return_log_probs" if self.has_log_probs else "")
        tokens = outputs["output_ids"].reshape(-1)
        # An engine that always echoes the prompt has the new token behind it.
        token = int(tokens[-1] if len(tokens) > 1 else tokens[0])
        log_probs = outputs.get("output_log_probs", np.empty(0)).reshape(-1)
        # A sampler that normalises over its one candidate says 0 for every token, which tells nothing.
        told = self.has_log_probs and len(log_probs) > 0 and float(log_probs[-1]) != 0.0
        return NextToken(token, float(log_probs[-1]) if told else None)

    async def _context_logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """float32 (length, vocabulary)."""
        outputs = await self._infer(ids, "return_context_logits")
        found = outputs.get("context_logits", np.empty(0))
        # Over HTTP a decoupled model's arrays are flat.
        if found.size < 2 * len(ids) or found.size % len(ids):
            shape = list(found.shape)
            raise LacksError(f"model '{self._model}' returns context_logits of shape {shape}", _BUILD_FIX)
        logits: npt.NDArray[np.float32] = found.reshape(len(ids), -1).astype(np.float32)
        return logits

    async def _infer(self, ids: Sequence[int], wanted: str) -> dict[str, Any]:
        """The outputs for a prompt and one greedy token."""
        inputs = engine_inputs(ids, 1, end_id=-1, top_k=1, stream=False)
        if wanted:
            inputs.append(scalar(wanted, "BOOL", True))
        answers = await self._client.infer(self._model, inputs, timeout_s=self._timeout_s)
        for answer in answers:  # a decoupled model may add an empty one
            if "output_ids" in answer and answer["output_ids"].size:
                return dict(answer)
        raise ServerError("no token in the answer", model=self._model)


_BUILD_FIX = "build the engine with --gather_context_logits, or compare checkpoints"


def _takes_text(url: str, model: str, lacks: str) -> InputError:
    return InputError(
        f"{url}: the server's model '{model}' takes text {lacks}: next tokens and logits, which are compared, are the "
        "business of an engine model",
        "serve with topology: ensemble, or evaluate the checkpoint that is served",
    )


def open_served(url: str, model: str, *, timeout_s: float = 120.0) -> ServedModel:
    """The engine model `model` at `url` (`grpc://HOST:PORT` or `http://HOST:PORT`); connects when it is entered.

    Raises:
        InputError: the url has no usable form. When it is entered: the server has no engine model, only text models.
    """
    return ServedModel(connect(url, model=model), model, timeout_s=timeout_s)
