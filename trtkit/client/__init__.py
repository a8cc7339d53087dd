"""One async LLM client for a served model, over gRPC or HTTP."""

from __future__ import annotations

from trtkit.client.api import (
    Chunk,
    Completion,
    GenerateRequest,
    LLMClient,
    RequestTimeoutError,
    ServerError,
    connect,
)

__all__ = ["Chunk", "Completion", "GenerateRequest", "LLMClient", "RequestTimeoutError", "ServerError", "connect"]
