"""The client over HTTP: Triton's generate extension (JSON, and server-sent events for streams), with aiohttp.

`generate` takes a flat JSON object, one key per input; lists keep their length as the last dimension and one value
stands bare. It answers 200 with an error in the body when a decoupled model sends other than one response, and an error
after the first event of a stream is an event like any other: so every body is looked at, whatever the status.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from trtkit.client import api, tensors
from trtkit.client.api import Ending, ProtocolName
from trtkit.client.base import ENDING_OUTPUTS, Client
from trtkit.client.sse import EventParser
from trtkit.errors import InputError, TrtkitError

if TYPE_CHECKING:
    import aiohttp
    import numpy as np
    import numpy.typing as npt


class HttpClient(Client[dict[str, Any]]):
    """`LLMClient` over HTTP. Made by `connect`."""

    protocol: ProtocolName = "http"

    def __init__(self, url: str, *, model: str = api.ENSEMBLE) -> None:
        super().__init__(url, model)
        self._session: aiohttp.ClientSession | None = None

    async def infer(
        self, model: str, inputs: Sequence[tensors.Tensor], *, request_id: str = "", timeout_s: float = 120.0
    ) -> list[dict[str, npt.NDArray[np.generic]]]:
        """Over HTTP only `infer` of models that are not decoupled tells shapes; the arrays of the others are flat."""
        if await self._is_decoupled(model, timeout_s):
            described = (await self.metadata(model, timeout_s=timeout_s))["outputs"]
            types = {output["name"]: output["datatype"] for output in described}
            responses = self._responses(model, inputs, api.new_request_id(request_id), (), timeout_s, stream=True)
            return [
                {name: tensors.to_array(types[name], value) for name, value in answer.items() if name in types}
                async for _, answer in responses
            ]
        body = {"id": api.new_request_id(request_id), "inputs": [_described(tensor) for tensor in inputs]}
        answer = await self._post(_path(model, "infer"), body, timeout_s, model)
        return [
            {
                output["name"]: tensors.to_array(output["datatype"], output["data"], output["shape"])
                for output in answer.get("outputs", [])
            }
        ]

    async def is_live(self, *, timeout_s: float = 10.0) -> bool:
        return await self._answers("v2/health/live", timeout_s)

    async def is_ready(self, model: str | None = None, *, timeout_s: float = 10.0) -> bool:
        return await self._answers("v2/health/ready" if model is None else _path(model, "ready"), timeout_s)

    async def models(self, *, timeout_s: float = 10.0) -> dict[str, str]:
        index = await self._post("v2/repository/index", {}, timeout_s)
        return {model["name"]: model.get("state", "") for model in index}

    async def metadata(self, model: str | None = None, *, timeout_s: float = 10.0) -> dict[str, Any]:
        name = model or self.model
        found: dict[str, Any] = await self._get(_path(name), timeout_s, name)
        return found

    async def model_config(self, model: str | None = None, *, timeout_s: float = 10.0) -> dict[str, Any]:
        name = model or self.model
        found: dict[str, Any] = await self._get(_path(name, "config"), timeout_s, name)
        return found

    async def statistics(self, model: str | None = None, *, timeout_s: float = 10.0) -> dict[str, Any]:
        name = model or self.model
        answer = await self._get(_path(name, "stats"), timeout_s, name)
        statistics: dict[str, Any] = answer["model_stats"][0]
        return statistics

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _connected(self) -> aiohttp.ClientSession:
        """The session; made on first use, since it belongs to the running event loop."""
        if self._session is None:
            import aiohttp

            connector = aiohttp.TCPConnector(limit=0)  # the default of 100 would queue requests inside the client
            self._session = aiohttp.ClientSession(connector=connector, raise_for_status=False)
        return self._session

    async def _responses(
        self,
        model: str,
        inputs: Sequence[tensors.Tensor],
        request_id: str,
        outputs: Sequence[str],
        timeout_s: float,
        *,
        stream: bool,
    ) -> AsyncGenerator[tuple[int, dict[str, Any]], None]:
        """Over the generate extension, which has no way to name the wanted outputs and sends all."""
        body = _flat(inputs, request_id)
        if not stream:
            answer = await self._post(_path(model, "generate"), body, timeout_s, model)
            yield time.perf_counter_ns(), answer
            return
        # Closing this early closes the socket, which cancels the request on the server.
        async with self._response("POST", _path(model, "generate_stream"), body, timeout_s, model) as response:
            if response.status != 200:
                whole = await response.read()
                events = EventParser().feed(whole)  # what a model gives is one, even an error before the first piece
                _checked(response.status, events[0] if events else whole, model)
            parser = EventParser()
            async for piece in response.content.iter_any():
                received_ns = time.perf_counter_ns()
                for event in parser.feed(piece):
                    yield received_ns, _checked(response.status, event, model)

    @staticmethod
    def _text(response: dict[str, Any]) -> str:
        value = _first(response.get("text_output"))
        return "" if value is None else str(value)

    @staticmethod
    def _ending(response: dict[str, Any]) -> Ending | None:
        found = {name: _first(response[name]) for name in ENDING_OUTPUTS if name in response}
        return Ending(**found) if found else None

    @staticmethod
    def _beam(response: dict[str, Any]) -> tuple[Sequence[int], int]:
        """JSON carries no shape, but the first beam comes first and its length is told."""
        found = response.get("output_ids", [])
        beam = found if isinstance(found, list) else [found]
        length = response.get("sequence_length", len(beam))
        return beam, length[0] if isinstance(length, list) else length

    async def _answers(self, path: str, timeout_s: float) -> bool:
        try:
            async with self._response("GET", path, None, timeout_s, "") as response:
                return response.status == 200
        except TrtkitError:
            return False

    async def _get(self, path: str, timeout_s: float, model: str = "") -> Any:
        async with self._response("GET", path, None, timeout_s, model) as response:
            return _checked(response.status, await response.read(), model)

    async def _post(self, path: str, body: dict[str, Any], timeout_s: float, model: str = "") -> Any:
        async with self._response("POST", path, body, timeout_s, model) as response:
            return _checked(response.status, await response.read(), model)

    @asynccontextmanager
    async def _response(
        self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float, model: str
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A response; its connection is kept only when it was read to its end. aiohttp's errors become trtkit's."""
        import aiohttp

        url = f"{self.url}/{path}"
        limit = aiohttp.ClientTimeout(total=timeout_s)
        data = None if body is None else _dumps(body)
        try:
            # Leaving the block releases the connection if the body is finished, and closes it if not.
            async with self._connected().request(method, url, data=data, timeout=limit) as response:
                yield response
        except asyncio.TimeoutError:
            raise api.RequestTimeoutError(self.url, model, timeout_s) from None
        except aiohttp.ClientPayloadError as error:
            raise api.ServerError(f"the connection broke inside the answer: {error}", model=model) from None
        except (aiohttp.ClientConnectionError, ConnectionError) as error:
            raise api.unreachable(self.url, str(error) or type(error).__name__) from None
        except aiohttp.ClientError as error:  # not HTTP, or an unusable url
            raise api.ServerError(str(error) or type(error).__name__, model=model) from None


def _path(model: str, verb: str = "") -> str:
    return f"v2/models/{quote(model, safe='')}" + (f"/{verb}" if verb else "")


def _first(value: Any) -> Any:
    """The first of several values, or the one that stands bare."""
    return (value[0] if value else None) if isinstance(value, list) else value


def _flat(inputs: Sequence[tensors.Tensor], request_id: str) -> dict[str, Any]:
    """The body of generate: a bare value for shape [1, 1], a list for more, nothing of the batch dimension."""
    body: dict[str, Any] = {"id": request_id}
    for tensor in inputs:
        _check_range(tensor)
        body[tensor.name] = tensor.data[0] if tensor.shape in ((1, 1), (1,)) else list(tensor.data)
    return body


def _check_range(tensor: tensors.Tensor) -> None:
    """Refuses numbers that do not fit: the server would cut them to the dtype's bits, silently."""
    if tensor.datatype != "BYTES":
        tensor.to_bytes()


def _described(tensor: tensors.Tensor) -> dict[str, Any]:
    _check_range(tensor)
    return {
        "name": tensor.name,
        "datatype": tensor.datatype,
        "shape": list(tensor.shape),
        "data": list(tensor.data),
    }


def _dumps(body: dict[str, Any]) -> bytes:
    try:
        return json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the request is not text: {error}", "send valid Unicode") from None


def _checked(status: int, body: bytes | str, model: str) -> Any:
    """The JSON of a body.

    Raises:
        ServerError: a status other than 200, an `error` in the body, or a body that is not JSON.
    """
    if not body and status == 200:
        return {}
    try:
        answer = json.loads(body)
    except ValueError:
        shown = body if isinstance(body, str) else body.decode(errors="replace")
        message = shown[:500].strip() or "no message"
        message = f"not JSON: {message}" if status == 200 else message
        raise api.ServerError(message, status=str(status), model=model) from None
    if status == 200 and not (isinstance(answer, dict) and "error" in answer):
        return answer
    message = str(answer.get("error", answer)) if isinstance(answer, dict) else str(answer)
    if api.is_for_later(message):
        status = 503  # the generate extension says 400 to every error of a model
    raise api.ServerError(message, status=str(status), model=model)
