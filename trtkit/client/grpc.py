"""The client over gRPC: Triton's GRPCInferenceService through tritonclient's generated messages.

Decoupled models answer only on the bidirectional stream (`ModelStreamInfer`), the others also on the cheaper unary
call. Each request has a stream of its own, half-closed after the request: its end is the end of the answer, and
cancelling it cancels that request alone. All streams share one connection, as HTTP/2 streams do. (One stream for all
requests saves about 0.2 ms of CPU per request, measured with grpcio 1.85, and cannot cancel one of them.)
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from trtkit.client import api, tensors
from trtkit.client.api import Ending, ProtocolName
from trtkit.client.base import ENDING_OUTPUTS, Client
from trtkit.errors import TrtkitError

if TYPE_CHECKING:
    import grpc
    import numpy as np
    import numpy.typing as npt

T = TypeVar("T")

_END_S = 2.0

_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_http_proxy", 0),  # like aiohttp: the url is where to go, whatever the environment says
    ("grpc.use_local_subchannel_pool", 1),  # else a new client inherits the back-off of an earlier failure
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


class GrpcClient(Client[Any]):
    """`LLMClient` over gRPC. Made by `connect`."""

    protocol: ProtocolName = "grpc"

    def __init__(self, address: str, *, model: str = api.ENSEMBLE, tls: bool = False) -> None:
        super().__init__(f"grpc{'s' if tls else ''}://{address}", model)
        self._address = address
        self._tls = tls
        self._channel: grpc.aio.Channel | None = None
        self._stub: Any = None

    async def infer(
        self, model: str, inputs: Sequence[tensors.Tensor], *, request_id: str = "", timeout_s: float = 120.0
    ) -> list[dict[str, npt.NDArray[np.generic]]]:
        stream = await self._is_decoupled(model, timeout_s)
        responses = self._responses(model, inputs, api.new_request_id(request_id), (), timeout_s, stream=stream)
        return [_outputs(response) async for _, response in responses]

    async def is_live(self, *, timeout_s: float = 10.0) -> bool:
        from tritonclient.grpc import service_pb2

        try:
            return bool((await self._call("ServerLive", service_pb2.ServerLiveRequest(), timeout_s)).live)
        except TrtkitError:
            return False

    async def is_ready(self, model: str | None = None, *, timeout_s: float = 10.0) -> bool:
        from tritonclient.grpc import service_pb2

        try:
            if model is None:
                return bool((await self._call("ServerReady", service_pb2.ServerReadyRequest(), timeout_s)).ready)
            message = service_pb2.ModelReadyRequest(name=model)
            return bool((await self._call("ModelReady", message, timeout_s, model)).ready)
        except TrtkitError:
            return False

    async def models(self, *, timeout_s: float = 10.0) -> dict[str, str]:
        from tritonclient.grpc import service_pb2

        index = await self._call("RepositoryIndex", service_pb2.RepositoryIndexRequest(), timeout_s)
        return {model.name: model.state for model in index.models}

    async def metadata(self, model: str | None = None, *, timeout_s: float = 10.0) -> dict[str, Any]:
        from tritonclient.grpc import service_pb2

        name = model or self.model
        return _to_dict(await self._call("ModelMetadata", service_pb2.ModelMetadataRequest(name=name), timeout_s, name))

    async def model_config(self, model: str | None = None, *, timeout_s: float = 10.0) -> dict[str, Any]:
        from tritonclient.grpc import service_pb2

        name = model or self.model
        answer = await self._call("ModelConfig", service_pb2.ModelConfigRequest(name=name), timeout_s, name)
        return _to_dict(answer.config)

    async def statistics(self, model: str | None = None, *, timeout_s: float = 10.0) -> dict[str, Any]:
        from tritonclient.grpc import service_pb2

        name = model or self.model
        answer = await self._call("ModelStatistics", service_pb2.ModelStatisticsRequest(name=name), timeout_s, name)
        return _to_dict(answer.model_stats[0])

    async def close(self) -> None:
        channel, self._channel, self._stub = self._channel, None, None
        if channel is not None:
            await channel.close()

    def _connected(self) -> Any:
        """The stub; made on first use, since a channel belongs to the running event loop."""
        if self._stub is None:
            import grpc
            from tritonclient.grpc import service_pb2_grpc

            if self._tls:
                self._channel = grpc.aio.secure_channel(self._address, grpc.ssl_channel_credentials(), options=_OPTIONS)
            else:
                self._channel = grpc.aio.insecure_channel(self._address, options=_OPTIONS)
            self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        return self._stub

    async def _responses(
        self,
        model: str,
        inputs: Sequence[tensors.Tensor],
        request_id: str,
        outputs: Sequence[str],
        timeout_s: float,
        *,
        stream: bool,
    ) -> AsyncGenerator[tuple[int, Any], None]:
        """Over the call that the model understands, whatever the request asks for."""
        if outputs or not stream:
            known = await self._about(model, timeout_s)
            outputs = [name for name in outputs if name not in ENDING_OUTPUTS or name in known.outputs]
            stream = stream or known.decoupled
        message = _request(model, inputs, request_id, outputs)
        if not stream:
            answer = await self._call("ModelInfer", message, timeout_s, model)
            yield time.perf_counter_ns(), answer
            return
        call = self._connected().ModelStreamInfer(iter([message]), timeout=timeout_s)
        try:
            while answer := await self._guarded(call.read, model, timeout_s):
                received_ns = time.perf_counter_ns()
                if answer.error_message:
                    await _end(call)
                    # No code comes with it. A client can ask for one with the header triton_grpc_error, but Triton 2.51
                    # may then die: it takes the end of such a stream for a cancellation.
                    status = "UNAVAILABLE" if api.is_for_later(answer.error_message) else ""
                    raise api.ServerError(answer.error_message, status=status, model=model)
                yield received_ns, answer.infer_response
        finally:
            call.cancel()  # nothing happens when the call is done

    @staticmethod
    def _text(response: Any) -> str:
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=False):
            if output.name == "text_output":
                return next(iter(tensors.split_strings(raw)), "")
        return ""

    @staticmethod
    def _ending(response: Any) -> Ending | None:
        if len(response.outputs) < 2:
            return None  # most pieces of a stream
        outputs = _outputs(response)
        found: dict[str, Any] = {name: outputs[name] for name in ENDING_OUTPUTS if name in outputs}
        return Ending(**{name: array.item(0) for name, array in found.items() if array.size}) if found else None

    @staticmethod
    def _beam(response: Any) -> tuple[Sequence[int], int]:
        outputs = _outputs(response)
        if "output_ids" not in outputs:
            return [], 0
        beam = outputs["output_ids"].reshape(-1, outputs["output_ids"].shape[-1])[0].tolist()
        length = int(outputs["sequence_length"].reshape(-1)[0]) if "sequence_length" in outputs else len(beam)
        return beam, length

    async def _call(self, name: str, message: Any, timeout_s: float, model: str = "") -> Any:
        """One unary call."""
        method = getattr(self._connected(), name)

        async def call() -> Any:
            return await method(message, timeout=timeout_s)

        return await self._guarded(call, model, timeout_s)

    async def _guarded(self, read: Callable[[], Awaitable[T]], model: str, timeout_s: float) -> T | None:
        """The result of `read`, None at the end of a stream; gRPC's errors become this package's."""
        import grpc

        try:
            result = await read()
        except grpc.aio.AioRpcError as error:
            code, details = error.code(), error.details() or "no details"
            if code is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise api.RequestTimeoutError(self.url, model, timeout_s) from None
            if code is grpc.StatusCode.UNAVAILABLE and self._is_disconnected():
                raise api.unreachable(self.url, details) from None
            raise api.ServerError(details, status=code.name, model=model) from None
        except grpc.aio.UsageError as error:  # the channel was closed under a running request
            raise api.unreachable(self.url, str(error)) from None
        return None if result is grpc.aio.EOF else result

    def _is_disconnected(self) -> bool:
        """Whether UNAVAILABLE comes from the connection; a server says it too, when a queue is full."""
        import grpc

        return self._channel is None or self._channel.get_state() is not grpc.ChannelConnectivity.READY


async def _end(call: Any) -> None:
    """Waits briefly for the server to end a stream by itself. Cancelled right after an error, Triton 2.51 may keep an
    ensemble request for ever, which then holds up its shutdown."""
    import grpc

    async def drain() -> None:
        while await call.read() is not grpc.aio.EOF:
            pass

    with contextlib.suppress(asyncio.TimeoutError, grpc.aio.AioRpcError):
        await asyncio.wait_for(drain(), _END_S)


def _request(model: str, inputs: Sequence[tensors.Tensor], request_id: str, outputs: Sequence[str] = ()) -> Any:
    """A request message. Without `outputs` the server sends them all, logits included."""
    from tritonclient.grpc import service_pb2

    message = service_pb2.ModelInferRequest(model_name=model, id=request_id)
    for name in outputs:
        message.outputs.add(name=name)
    for tensor in inputs:
        message.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        message.raw_input_contents.append(tensor.to_bytes())
    return message


def _outputs(response: Any) -> dict[str, npt.NDArray[np.generic]]:
    pairs = zip(response.outputs, response.raw_output_contents, strict=False)
    return {output.name: tensors.from_bytes(output.datatype, output.shape, raw) for output, raw in pairs}


def _to_dict(message: Any) -> dict[str, Any]:
    """A protobuf message as the JSON that Triton's HTTP side gives, without fields at their default.

    protobuf's own `MessageToDict` turns 64-bit integers into strings, which shapes and counters must not be.
    """
    found: dict[str, Any] = {}
    for field, value in message.ListFields():

        def plain(item: Any, field: Any = field) -> Any:
            if hasattr(item, "ListFields"):
                return _to_dict(item)
            return field.enum_type.values_by_number[item].name if field.enum_type else item

        if hasattr(value, "items"):
            found[field.name] = {key: plain(item) for key, item in value.items()}
        elif hasattr(value, "append"):
            found[field.name] = [plain(item) for item in value]
        else:
            found[field.name] = plain(value)
    return found
