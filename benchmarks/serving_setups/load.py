"""Closed-loop load over gRPC, with as little work in the client as Python allows.

    python load.py HOST:PORT MODEL CONCURRENCY SECONDS MODE < requests.json     one JSON line of figures

Each user keeps one stream (or one unary call) of its own and sends the next request when the last has ended. Runs as a
process of its own, so that its CPU time is told apart from the server's.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as pb

STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
UNARY = "/inference.GRPCInferenceService/ModelInfer"
CHANNELS = 4


def request_bytes(model: str, inputs: dict[str, Any], outputs: list[str], request_id: str) -> bytes:
    """A ModelInferRequest. Inputs are `[dtype, shape, values]`."""
    message = pb.ModelInferRequest(model_name=model, id=request_id)
    for name, (dtype, shape, values) in inputs.items():
        message.inputs.add(name=name, datatype=dtype, shape=shape)
        message.raw_input_contents.append(_raw(dtype, values))
    for name in outputs:
        message.outputs.add(name=name)
    message.parameters["triton_enable_empty_final_response"].bool_param = True
    return message.SerializeToString()


def _raw(dtype: str, values: Any) -> bytes:
    if dtype == "BYTES":
        texts = [text.encode() for text in values]
        return b"".join(len(text).to_bytes(4, "little") + text for text in texts)
    kinds = {"INT32": np.int32, "BOOL": np.bool_, "FP32": np.float32, "INT64": np.int64}
    return np.array(values, dtype=kinds[dtype]).tobytes()


class Figures:
    """What the users saw, while `open`."""

    def __init__(self) -> None:
        self.first: list[float] = []
        self.gaps: list[float] = []
        self.whole: list[float] = []
        self.tokens = self.responses = self.requests = 0
        self.all_requests = 0
        self.problems: list[str] = []
        self.closes = 0.0


async def stream_user(
    channel: Any, requests: list[bytes], tokens: int, figures: Figures, start: int, step: int
) -> None:
    call = channel.stream_stream(
        STREAM, request_serializer=None, response_deserializer=pb.ModelStreamInferResponse.FromString
    )()
    number = start
    while time.monotonic() < figures.closes:
        sent = last = time.monotonic()
        await call.write(requests[number % len(requests)])
        number += step
        seen = 0
        while True:
            answer = await call.read()
            now = time.monotonic()
            if answer.error_message:
                figures.problems.append(answer.error_message)
                break
            response = answer.infer_response
            if response.outputs:
                (figures.gaps if seen else figures.first).append(now - last)
                seen += 1
                last = now
            if response.parameters["triton_final_response"].bool_param:
                break
        figures.all_requests += 1
        if now < figures.closes:
            figures.whole.append(now - sent)
            figures.requests += 1
            figures.tokens += tokens
            figures.responses += seen
    await call.done_writing()
    call.cancel()


async def unary_user(channel: Any, requests: list[bytes], tokens: int, figures: Figures, start: int, step: int) -> None:
    call = channel.unary_unary(UNARY, request_serializer=None, response_deserializer=pb.ModelInferResponse.FromString)
    number = start
    while time.monotonic() < figures.closes:
        sent = time.monotonic()
        try:
            await call(requests[number % len(requests)])
        except grpc.aio.AioRpcError as error:
            figures.problems.append(error.details() or str(error.code()))
            continue
        number += step
        now = time.monotonic()
        figures.all_requests += 1
        if now < figures.closes:
            figures.whole.append(now - sent)
            figures.requests += 1
            figures.tokens += tokens
            figures.responses += 1


async def main() -> None:
    url, model, concurrency, seconds, mode = sys.argv[1:6]
    job = json.load(sys.stdin)
    requests = [
        request_bytes(model, inputs, job["outputs"], f"r{number}") for number, inputs in enumerate(job["requests"])
    ]
    options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(url, options=options) for _ in range(CHANNELS)]
    user = stream_user if mode == "stream" else unary_user
    users = int(concurrency)
    figures = Figures()
    before = resource.getrusage(resource.RUSAGE_SELF)
    started = time.monotonic()
    figures.closes = started + float(seconds)
    await asyncio.gather(
        *(user(channels[number % CHANNELS], requests, job["tokens"], figures, number, users) for number in range(users))
    )
    wall = float(seconds)
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    for channel in channels:
        await channel.close()

    def quantile(values: list[float], share: float) -> float:
        return float(np.quantile(values, share)) * 1000 if values else float("nan")

    print(
        json.dumps(
            {
                "requests": figures.requests,
                "all_requests": figures.all_requests,
                "tokens": figures.tokens,
                "responses": figures.responses,
                "wall_s": wall,
                "client_cpu_s": cpu,
                "problems": figures.problems[:3],
                "ttft_p50_ms": quantile(figures.first or figures.whole, 0.5),
                "ttft_p99_ms": quantile(figures.first or figures.whole, 0.99),
                "itl_p50_ms": quantile(figures.gaps, 0.5),
                "itl_p99_ms": quantile(figures.gaps, 0.99),
                "whole_p50_ms": quantile(figures.whole, 0.5),
                "whole_p99_ms": quantile(figures.whole, 0.99),
            }
        )
    )


if __name__ == "__main__":
    asyncio.run(main())
