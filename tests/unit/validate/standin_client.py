"""A stand-in for the client of a served model: an ensemble over an engine that counts, with faults to switch on.

The engine's answer to a prompt is the tokens after the prompt's last; the text of a token is its number and a space.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from trtkit.client.api import Chunk, Completion, Ending, GenerateRequest, ServerError
from trtkit.validate import contract

DTYPES = {"STRING": "TYPE_STRING"}


def config_of(name: str, expected: Any, *, decoupled: bool) -> dict[str, Any]:
    """A model config, as Triton's JSON, that keeps the contract to the letter."""

    def tensors(kind: str) -> list[dict[str, Any]]:
        return [
            {"name": t.name, "data_type": f"TYPE_{t.dtype}", "dims": list(t.dims)}
            | ({"optional": t.optional} if kind == "input" else {})
            for t in (expected.inputs if kind == "input" else expected.outputs)
        ]

    return {
        "name": name,
        "max_batch_size": 4,
        "input": tensors("input"),
        "output": tensors("output"),
        "model_transaction_policy": {"decoupled": decoupled},
    }


def fused_configs() -> dict[str, dict[str, Any]]:
    """Those of a server that has the model `llm` only."""
    return copy.deepcopy({"llm": config_of("llm", contract.LLM, decoupled=True)})


def good_configs() -> dict[str, dict[str, Any]]:
    found = {name: config_of(name, expected, decoupled=False) for name, expected in contract.STEPS.items()}
    found["tensorrt_llm"] = config_of("tensorrt_llm", contract.ENGINE, decoupled=True)
    found["ensemble"] = config_of("ensemble", contract.TEXT, decoupled=True)
    steps = [{"model_name": name} for name in ("preprocessing", "tensorrt_llm", "postprocessing")]
    found["ensemble"]["ensemble_scheduling"] = {"step": steps}
    return copy.deepcopy(found)


class StandInClient:
    """An `LLMClient` without a server. Every attribute may be changed to make it misbehave."""

    def __init__(self, protocol: str = "grpc") -> None:
        self.url, self.protocol, self.model = f"{protocol}://stand-in:1", protocol, "ensemble"
        self.configs = good_configs()
        self.live = self.ready = True
        self.unready: set[str] = set()
        self.split: Callable[[str], list[str]] = lambda text: [part + " " for part in text.split()]
        self.refuse = True
        self.broken_by: str | None = None
        self.broken = False
        self.places = 4
        self.busy = 0
        self.freed = asyncio.Event()
        self.honours_cancel = True
        self.token_s = 0.003
        self.going_on: list[asyncio.Task[None]] = []
        self.tokens: Callable[[Sequence[int], int], list[int]] = lambda ids, n: list(
            range(ids[-1] + 1, ids[-1] + 1 + n)
        )
        self.requests: list[GenerateRequest] = []
        self.counts = True
        """The model `llm` tells how many tokens there are."""
        self.render: Callable[[Sequence[Any]], str] = lambda messages: messages[-1]["role"] and messages[-1]["content"]

    # --- text -----------------------------------------------------------------------------------------------------

    def text(self, request: GenerateRequest) -> str:
        if self.broken:
            raise ServerError("the model is gone", status="503")
        if request.prompt == self.broken_by:
            self.broken = True
        prompt = self.prompt(request)
        bad = (
            not prompt
            or (request.prompt and request.messages)
            or (request.temperature or 0) < 0
            or (-1 if request.end_id is None else request.end_id) < -1
            or request.max_tokens < 1
            or (request.top_p is not None and request.top_p > 1)
            or len(prompt) > 200
        )
        if bad and self.refuse:
            raise ServerError("this makes no sense", status="400")
        return "".join(f"{token} " for token in self.tokens([len(prompt)], max(request.max_tokens, 0)))

    def prompt(self, request: GenerateRequest) -> str:
        try:
            return request.prompt or (self.render(request.messages) if request.messages else "")
        except KeyError:
            return ""

    def ending(self, request: GenerateRequest, text: str, model: str | None) -> Ending | None:
        if (model or self.model) != "llm" or not self.counts:
            return None
        return Ending("length", len(self.prompt(request)), len(text.split()))

    async def generate(
        self, request: GenerateRequest, *, model: str | None = None, timeout_s: float = 120.0
    ) -> Completion:
        self.requests.append(request)
        text = self.text(request)
        ending = self.ending(request, text, model) or Ending()
        return Completion(text, "id", ending.finish_reason, ending.prompt_tokens, ending.completion_tokens)

    async def stream(
        self, request: GenerateRequest, *, model: str | None = None, timeout_s: float = 120.0
    ) -> AsyncGenerator[Chunk, None]:
        text = self.text(request)
        pieces = self.split(text)
        if request.end_id is None:
            for place, piece in enumerate(pieces, 1):
                yield Chunk(piece, 0, self.ending(request, text, model) if place == len(pieces) else None)
            return
        made = 0
        async with aclosing(self.stream_tokens([len(request.prompt)], request.max_tokens)) as tokens:
            async for _ in tokens:
                made += 1
                last = made == len(pieces)
                yield Chunk(pieces[made - 1], 0, self.ending(request, text, model) if last else None)

    async def infer(self, model: str, inputs: Sequence[Any], *, request_id: str = "", timeout_s: float = 120.0) -> Any:
        names = {tensor.name: tensor.datatype for tensor in inputs}
        good = model in self.configs and names == {"text_input": "BYTES", "max_tokens": "INT32"}
        if model == "llm":
            good = {"text_input": "BYTES"}.items() <= names.items() and len(names) < 3
        if self.refuse and not good:
            raise ServerError("unexpected inputs", status="400")
        return [{}]

    # --- tokens ---------------------------------------------------------------------------------------------------

    async def generate_tokens(self, input_ids: Sequence[int], max_tokens: int, **options: Any) -> list[int]:
        return self.tokens(input_ids, max_tokens)

    async def stream_tokens(
        self, input_ids: Sequence[int], max_tokens: int, **options: Any
    ) -> AsyncGenerator[list[int], None]:
        while self.busy >= self.places:
            self.freed.clear()
            await self.freed.wait()
        self.busy += 1
        sent = 0
        try:
            for token in self.tokens(input_ids, max_tokens):
                await asyncio.sleep(self.token_s)
                sent += 1
                yield [token]
        finally:
            left = 0 if self.honours_cancel else len(self.tokens(input_ids, max_tokens)) - sent
            self.going_on.append(asyncio.create_task(self._free(left)))

    async def _free(self, left: int) -> None:
        """Makes the rest of a cancelled answer, then gives its place back."""
        for _ in range(left):
            await asyncio.sleep(self.token_s)
        self.busy -= 1
        self.freed.set()

    # --- about the server -----------------------------------------------------------------------------------------

    async def is_live(self, **options: Any) -> bool:
        return self.live

    async def is_ready(self, model: str | None = None, **options: Any) -> bool:
        return self.ready if model is None else model in self.configs and model not in self.unready

    async def models(self, **options: Any) -> dict[str, str]:
        return {name: "UNAVAILABLE" if name in self.unready else "READY" for name in self.configs}

    async def model_config(self, model: str | None = None, **options: Any) -> dict[str, Any]:
        return self.configs[model or self.model]

    async def close(self) -> None:
        pass

    async def __aenter__(self) -> StandInClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        pass
