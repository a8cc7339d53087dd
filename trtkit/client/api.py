"""What a client of a served model looks like: requests, answers, errors and `connect`. The same over gRPC and HTTP."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol
from urllib.parse import urlsplit

from trtkit import serving_contract
from trtkit.errors import InputError, LacksError, TrtkitError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from trtkit.client.tensors import Tensor

ProtocolName = Literal["grpc", "http"]

ENSEMBLE = "ensemble"
"""The model that takes and returns text, made of steps."""
LLM = serving_contract.MODEL
"""The model that takes text or chat messages and returns text, all in one (`trtkit.serving_contract`)."""
ENGINE = "tensorrt_llm"
"""The model that takes and returns tokens."""


@dataclass(frozen=True)
class GenerateRequest:
    """One prompt, or a chat, and how to continue it. None leaves a choice to the server.

    Values are sent as they are: judging them is the server's work, and `trtkit validate` checks that it does.
    """

    prompt: str = ""
    max_tokens: int = 64
    temperature: float | None = None
    top_k: int | None = None
    """1 is greedy."""
    top_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    min_tokens: int | None = None
    seed: int | None = None
    stop_words: Sequence[str] = ()
    bad_words: Sequence[str] = ()
    end_id: int | None = None
    """Token that ends the answer, instead of the model's own; -1 is no token, so that it never ends early."""
    messages: Sequence[Mapping[str, Any]] = ()
    """Chat messages, such as `{"role": "user", "content": "Hello"}`, in place of the prompt. The model `llm` takes
    them."""
    request_id: str = ""
    """Empty lets the client make a unique one. Detokenisation on the server keeps state per id, so never use one twice
    at the same time."""


@dataclass(frozen=True)
class Ending:
    """What a served model says about a whole answer. None where it does not say.

    Attributes:
        finish_reason: `stop` or `length`.
        prompt_tokens: tokens of the prompt, special ones included.
        completion_tokens: tokens of the answer, without the one that ended it.
    """

    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


@dataclass(frozen=True)
class Chunk:
    """One piece of a streamed answer: text that follows the piece before it."""

    text: str
    """May be empty: the server holds back a character whose bytes are not all there yet."""
    received_ns: int
    """`time.perf_counter_ns()` when the piece arrived."""
    ending: Ending | None = None
    """With the last piece, if the model says something about the whole answer."""


@dataclass(frozen=True)
class Completion:
    """A whole answer, without the prompt. None where the model does not say; see `Ending`."""

    text: str
    request_id: str
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class ServerError(TrtkitError):
    """The server answered a request with an error.

    Attributes:
        status: HTTP status (`400`) or gRPC status name (`INVALID_ARGUMENT`). An error in an open stream has none: over
            gRPC it is empty then, over HTTP `200`, that of the answer whose event it is. Where the message says that a
            queue is full or a deadline over, it is `UNAVAILABLE` or `503`, whatever the server made of it.
        message: the server's own words.
    """

    def __init__(self, message: str, *, status: str = "", model: str = "") -> None:
        about = f" for model '{model}'" if model else ""
        code = f" ({status})" if status else ""
        super().__init__(f"the server's answer{about}{code}: {message}", "look at the request and at the server's log")
        self.status = status
        self.message = message


class RequestTimeoutError(TrtkitError):
    """No complete answer within the time limit of the request; the client cancelled it."""

    def __init__(self, url: str, model: str, timeout_s: float) -> None:
        super().__init__(
            f"{url}: no complete answer from model '{model}' within {timeout_s:g} s",
            "raise the timeout, or ask for fewer tokens; `trtkit deploy status` tells whether the server is alive",
        )


class LLMClient(Protocol):
    """One async client for a served model; `connect` makes it.

    Every method raises `ServerError` when the server answers with an error, `RequestTimeoutError` when it does not
    answer in time, and `LacksError` when nobody listens at the url.
    """

    @property
    def url(self) -> str: ...
    @property
    def protocol(self) -> ProtocolName: ...
    @property
    def model(self) -> str:
        """The model that `generate` and `stream` talk to."""

    async def generate(
        self, request: GenerateRequest, *, model: str | None = None, timeout_s: float = 120.0
    ) -> Completion:
        """The whole answer at once (`stream` off).

        Args:
            model: None is the client's.
        """

    def stream(
        self, request: GenerateRequest, *, model: str | None = None, timeout_s: float = 120.0
    ) -> AsyncGenerator[Chunk, None]:
        """The answer piece by piece.

        Closing the iterator early (`aclose`, or `contextlib.aclosing`) cancels the request on the server. A model that
        polls for it, as `llm` does, stops at once. An ensemble does not hand it to a step that is running: the engine
        makes its tokens to the end, and Triton 2.51 then counts the request as in flight for ever and waits for it when
        it is stopped.

        Raises:
            InputError: the model is not decoupled, so it cannot stream.
        """

    async def generate_tokens(
        self,
        input_ids: Sequence[int],
        max_tokens: int,
        *,
        end_id: int | None = None,
        top_k: int | None = 1,
        model: str = ENGINE,
        timeout_s: float = 120.0,
    ) -> list[int]:
        """The new tokens (without the prompt) that the engine model makes of `input_ids`, past tokenisation.

        Args:
            end_id: token that ends the answer; None lets the model choose, -1 is no token, so that it never ends early.
            top_k: 1 is greedy.
        """

    def stream_tokens(
        self,
        input_ids: Sequence[int],
        max_tokens: int,
        *,
        end_id: int | None = None,
        top_k: int | None = 1,
        model: str = ENGINE,
        timeout_s: float = 120.0,
    ) -> AsyncGenerator[list[int], None]:
        """Like `generate_tokens`, as they come. Closing the iterator early cancels the request on the server."""

    async def infer(
        self, model: str, inputs: Sequence[Tensor], *, request_id: str = "", timeout_s: float = 120.0
    ) -> list[dict[str, npt.NDArray[np.generic]]]:
        """Sends tensors to any model: one dict of outputs (name to array, batch dimension included) per response."""

    async def is_live(self, *, timeout_s: float = 10.0) -> bool: ...

    async def is_ready(self, model: str | None = None, *, timeout_s: float = 10.0) -> bool:
        """Whether the server, or one model, takes requests. False also when nobody listens at the url."""

    async def models(self, *, timeout_s: float = 10.0) -> dict[str, str]:
        """The models in the server's repository: name to state, such as `READY`."""

    async def metadata(self, model: str | None = None, *, timeout_s: float = 10.0) -> dict[str, Any]:
        """Metadata of a model, by default the client's: `inputs` and `outputs` with `name`, `datatype`, `shape`."""

    async def model_config(self, model: str | None = None, *, timeout_s: float = 10.0) -> dict[str, Any]:
        """The model config in use, as Triton's protobuf in JSON form (snake_case keys)."""

    async def statistics(self, model: str | None = None, *, timeout_s: float = 10.0) -> dict[str, Any]:
        """Inference statistics of a model: the dict that Triton's statistics extension describes."""

    async def close(self) -> None:
        """Closes the connections. An idle one would hold up the shutdown of the server."""

    async def __aenter__(self) -> LLMClient: ...
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def connect(url: str, *, model: str = ENSEMBLE, protocol: ProtocolName | None = None) -> LLMClient:
    """A client for `model` at `url`; opens no connection yet. Use it as `async with connect(url) as client:`.

    `trtkit.client.served.find` tells which model a server has.

    Args:
        url: `grpc://HOST:PORT`, `http://HOST:PORT` (`grpcs` and `https` with TLS), or `HOST:PORT` with `protocol`.

    Raises:
        InputError: the url has no usable form, or contradicts `protocol`.
    """
    scheme, address = split_url(url, protocol)
    if scheme in ("grpc", "grpcs"):
        from trtkit.client.grpc import GrpcClient

        return GrpcClient(address, model=model, tls=scheme == "grpcs")
    from trtkit.client.http import HttpClient

    return HttpClient(f"{scheme}://{address}", model=model)


def split_url(url: str, protocol: ProtocolName | None = None) -> tuple[str, str]:
    """`(scheme, HOST:PORT[/PATH])` of a url; the scheme is `grpc`, `grpcs`, `http` or `https`."""
    fix = "give grpc://HOST:PORT or http://HOST:PORT"
    if "@" in url:
        raise InputError(
            "the url holds a user name or a password, which Triton does not know", fix
        )  # not repeated here
    scheme, separator, rest = url.strip().partition("://")
    if not separator:
        if protocol is None:
            raise InputError(f"'{url}' does not say which protocol to speak", fix)
        scheme, rest = protocol, scheme
    scheme = scheme.lower()
    if scheme not in ("grpc", "grpcs", "http", "https"):
        raise InputError(f"'{url}': unknown protocol '{scheme}'", fix)
    if protocol is not None and not scheme.startswith(protocol):
        raise InputError(f"'{url}' contradicts protocol '{protocol}'", f"leave one of them out, or {fix}")
    rest = rest.rstrip("/")
    try:
        parts = urlsplit(f"//{rest}")
        port = parts.port
    except ValueError as error:
        raise InputError(f"'{url}' is not a url: {error}", fix) from None
    lacks_port = port is None and scheme.startswith("grpc")  # HTTP has default ports
    if not parts.hostname or lacks_port or parts.query or parts.fragment:
        raise InputError(f"'{url}' is not a url with a host and a port", fix)
    if parts.path and scheme.startswith("grpc"):
        raise InputError(f"'{url}': gRPC has no path", fix)
    return scheme, rest


def unreachable(url: str, reason: str) -> LacksError:
    """The error for a url where nobody listens."""
    fix = "start the server, or see with `trtkit deploy status` where it listens"
    return LacksError(f"cannot reach {url}: {reason}", fix)


def is_for_later(message: str) -> bool:
    """Whether the server's words are those for a request that may succeed when it is sent again."""
    return any(words in message for words in _FOR_LATER)


_FOR_LATER = (
    "the queue is full", "the deadline is exceeded", "the model is being unloaded",
    "Exceeds maximum queue size", "Request timeout expired",
)  # fmt: skip
"""Words of the model `llm` (trtkit/repository/models/serving/llm.py), and of Triton's batcher (core,
dynamic_batch_scheduler.cc and scheduler_utils.cc)."""


def not_decoupled(model: str) -> InputError:
    """The error for streaming from a model that answers once."""
    return InputError(
        f"model '{model}' answers once per request (it is not decoupled), so it cannot stream",
        "set serving.streaming: true and generate the model repository again, or send the request without streaming",
    )


def new_request_id(request_id: str = "") -> str:
    """The given id, or a unique one."""
    return request_id or uuid.uuid4().hex
