"""What the clients over gRPC and HTTP have in common: everything but sending a request and reading its responses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from trtkit.client import api, tensors
from trtkit.client.api import Chunk, Completion, Ending, GenerateRequest

if TYPE_CHECKING:
    from typing_extensions import Self

Response = TypeVar("Response")
"""One response as the protocol has it: a protobuf message, or a JSON object."""

ENDING_OUTPUTS = ("finish_reason", "prompt_tokens", "completion_tokens")
"""What an ensemble does not have. They are the fields of `Ending`."""
TEXT_OUTPUTS = ("text_output", *ENDING_OUTPUTS)
TOKEN_OUTPUTS = ("output_ids", "sequence_length")


class Known(NamedTuple):
    """What the client remembers of a model's config."""

    decoupled: bool
    outputs: frozenset[str]


class Client(ABC, Generic[Response]):
    """The part of `LLMClient` that does not depend on the protocol."""

    url: str
    model: str

    def __init__(self, url: str, model: str) -> None:
        self.url = url
        self.model = model
        self._known: dict[str, Known] = {}

    @abstractmethod
    def _responses(
        self,
        model: str,
        inputs: Sequence[tensors.Tensor],
        request_id: str,
        outputs: Sequence[str],
        timeout_s: float,
        *,
        stream: bool,
    ) -> AsyncGenerator[tuple[int, Response], None]:
        """Sends one request: each response with `time.perf_counter_ns()` of its arrival.

        Closing it early cancels the request on the server.

        Args:
            outputs: those that are wanted, where the protocol can say so; none is all. `ENDING_OUTPUTS` only where the
                model has them.
            stream: the request may have several responses.
        """

    @abstractmethod
    async def model_config(self, model: str | None = None, *, timeout_s: float = 10.0) -> dict[str, Any]: ...

    @abstractmethod
    async def close(self) -> None: ...

    @staticmethod
    @abstractmethod
    def _text(response: Response) -> str:
        """The first beam's text; empty for a response without outputs, such as a bare final flag."""

    @staticmethod
    @abstractmethod
    def _ending(response: Response) -> Ending | None:
        """What the response says about the first beam's whole answer; None for one that says nothing of it."""

    @staticmethod
    @abstractmethod
    def _beam(response: Response) -> tuple[Sequence[int], int]:
        """The first beam's tokens, and how many of them count."""

    async def generate(
        self, request: GenerateRequest, *, model: str | None = None, timeout_s: float = 120.0
    ) -> Completion:
        name, request_id = model or self.model, api.new_request_id(request.request_id)
        inputs = tensors.text_inputs(request, stream=False)
        responses = self._responses(name, inputs, request_id, TEXT_OUTPUTS, timeout_s, stream=False)
        pieces, ending = [], Ending()
        async for _, response in responses:
            pieces.append(self._text(response))
            ending = self._ending(response) or ending
        if not pieces:
            raise _no_answer(name)
        return Completion(
            "".join(pieces), request_id, ending.finish_reason, ending.prompt_tokens, ending.completion_tokens
        )

    async def stream(
        self, request: GenerateRequest, *, model: str | None = None, timeout_s: float = 120.0
    ) -> AsyncGenerator[Chunk, None]:
        name = model or self.model
        await self._must_stream(name, timeout_s)
        inputs = tensors.text_inputs(request, stream=True)
        request_id = api.new_request_id(request.request_id)
        responses = self._responses(name, inputs, request_id, TEXT_OUTPUTS, timeout_s, stream=True)
        count = 0
        try:
            async for received_ns, response in responses:
                count += 1
                yield Chunk(self._text(response), received_ns, self._ending(response))
        finally:
            await responses.aclose()
        if not count:
            raise _no_answer(name)

    async def generate_tokens(
        self,
        input_ids: Sequence[int],
        max_tokens: int,
        *,
        end_id: int | None = None,
        top_k: int | None = 1,
        model: str = api.ENGINE,
        timeout_s: float = 120.0,
    ) -> list[int]:
        inputs = tensors.engine_inputs(input_ids, max_tokens, end_id=end_id, top_k=top_k, stream=False)
        responses = self._responses(model, inputs, api.new_request_id(), TOKEN_OUTPUTS, timeout_s, stream=False)
        found: list[int] = []
        async for _, response in responses:
            found += tensors.new_tokens(*self._beam(response), input_ids, max_tokens)
        return found

    async def stream_tokens(
        self,
        input_ids: Sequence[int],
        max_tokens: int,
        *,
        end_id: int | None = None,
        top_k: int | None = 1,
        model: str = api.ENGINE,
        timeout_s: float = 120.0,
    ) -> AsyncGenerator[list[int], None]:
        await self._must_stream(model, timeout_s)
        inputs = tensors.engine_inputs(input_ids, max_tokens, end_id=end_id, top_k=top_k, stream=True)
        responses = self._responses(model, inputs, api.new_request_id(), TOKEN_OUTPUTS, timeout_s, stream=True)
        try:
            async for _, response in responses:
                yield tensors.new_tokens(*self._beam(response), input_ids, max_tokens)
        finally:
            await responses.aclose()

    async def _about(self, model: str, timeout_s: float) -> Known:
        """What requests to a model depend on. The server is asked once."""
        if model not in self._known:
            config = await self.model_config(model, timeout_s=timeout_s)
            decoupled = bool(config.get("model_transaction_policy", {}).get("decoupled", False))
            self._known[model] = Known(decoupled, frozenset(tensor["name"] for tensor in config.get("output", [])))
        return self._known[model]

    async def _is_decoupled(self, model: str, timeout_s: float) -> bool:
        """Whether the model may answer a request any number of times."""
        return (await self._about(model, timeout_s)).decoupled

    async def _must_stream(self, model: str, timeout_s: float) -> None:
        if not await self._is_decoupled(model, timeout_s):
            raise api.not_decoupled(model)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _no_answer(model: str) -> api.ServerError:
    """An ensemble does this to a request that lacks a required input."""
    return api.ServerError("the answer ended before it began", model=model)
