"""What the clients over gRPC and HTTP have in common: everything but sending a request and reading its responses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from trtkit.client import api, tensors
from trtkit.client.api import Chunk, Completion, GenerateRequest

if TYPE_CHECKING:
    from typing_extensions import Self

Response = TypeVar("Response")
"""One response as the protocol has it: a protobuf message, or a JSON object."""

TEXT_OUTPUTS = ("text_output",)
TOKEN_OUTPUTS = ("output_ids", "sequence_length")


class Client(ABC, Generic[Response]):
    """The part of `LLMClient` that does not depend on the protocol."""

    url: str
    model: str

    def __init__(self, url: str, model: str) -> None:
        self.url = url
        self.model = model
        self._known: dict[str, bool] = {}

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
            outputs: those that are wanted, where the protocol can say so; none is all.
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
    def _beam(response: Response) -> tuple[Sequence[int], int]:
        """The first beam's tokens, and how many of them count."""

    async def generate(self, request: GenerateRequest, *, timeout_s: float = 120.0) -> Completion:
        request_id = api.new_request_id(request.request_id)
        inputs = tensors.ensemble_inputs(request, stream=False)
        responses = self._responses(self.model, inputs, request_id, TEXT_OUTPUTS, timeout_s, stream=False)
        pieces = [self._text(response) async for _, response in responses]
        if not pieces:  # an ensemble does this to a request that lacks a required input
            raise api.ServerError("the answer ended before it began", model=self.model)
        return Completion("".join(pieces), request_id)

    async def stream(self, request: GenerateRequest, *, timeout_s: float = 120.0) -> AsyncGenerator[Chunk, None]:
        await self._must_stream(self.model, timeout_s)
        inputs = tensors.ensemble_inputs(request, stream=True)
        request_id = api.new_request_id(request.request_id)
        responses = self._responses(self.model, inputs, request_id, TEXT_OUTPUTS, timeout_s, stream=True)
        try:
            async for received_ns, response in responses:
                yield Chunk(text=self._text(response), received_ns=received_ns)
        finally:
            await responses.aclose()

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

    async def _is_decoupled(self, model: str, timeout_s: float) -> bool:
        """Whether the model may answer a request any number of times. The server is asked once."""
        if model not in self._known:
            config = await self.model_config(model, timeout_s=timeout_s)
            self._known[model] = bool(config.get("model_transaction_policy", {}).get("decoupled", False))
        return self._known[model]

    async def _must_stream(self, model: str, timeout_s: float) -> None:
        if not await self._is_decoupled(model, timeout_s):
            raise api.not_decoupled(model)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
