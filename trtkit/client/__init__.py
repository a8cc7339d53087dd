"""One async LLM client for a served model, over gRPC or HTTP."""

from __future__ import annotations

from trtkit.client.api import (
    Chunk,
    Completion,
    Ending,
    GenerateRequest,
    LLMClient,
    RequestTimeoutError,
    ServerError,
    connect,
)

__all__ = [
    "Chunk",
    "Completion",
    "Ending",
    "GenerateRequest",
    "LLMClient",
    "RequestTimeoutError",
    "ServerError",
    "connect",
]
