"""A stand-in of TensorRT-LLM's LLM API for machines without it: names and types as NVIDIA/TensorRT-LLM declares them in
tensorrt_llm/llmapi/llm.py, sampling_params.py and executor/result.py (1.x), around a made-up model.

As upstream: token_ids and logprobs hold all so far, and a stop token is taken off when the sequence is done.
"""

from __future__ import annotations

import asyncio
from types import ModuleType, SimpleNamespace
from typing import Any

from standin_model import Run, World, declare, flag, log_prob, number, one, text, whole, wholes


def modules(slots: int = 4) -> dict[str, Any]:
    """The modules by name; `tensorrt_llm.made` is the one LLM."""
    top: Any = ModuleType("tensorrt_llm")
    llmapi: Any = ModuleType("tensorrt_llm.llmapi")
    executor: Any = ModuleType("tensorrt_llm.executor")
    llmapi.GuidedDecodingParams = declare(
        "GuidedDecodingParams", json=(text, None), regex=(text, None), grammar=(text, None), json_object=(flag, False)
    )
    executor.LoRARequest = declare("LoRARequest", 3, lora_name=(text, ""), lora_int_id=(whole, 0), lora_path=(text, ""))
    top.SamplingParams = declare(
        "SamplingParams",
        end_id=(whole, None),
        pad_id=(whole, None),
        max_tokens=(whole, 32),
        bad_token_ids=(wholes, None),
        stop_token_ids=(wholes, None),
        top_k=(whole, None),
        top_p=(number, None),
        seed=(whole, None),
        temperature=(number, None),
        min_tokens=(whole, None),
        repetition_penalty=(number, None),
        presence_penalty=(number, None),
        frequency_penalty=(number, None),
        logprobs=(whole, None),
        guided_decoding=(one(llmapi.GuidedDecodingParams), None),
        detokenize=(flag, True),
    )
    top.made = None

    class LLM:
        def __init__(self, model: str, skip_tokenizer_init: bool = False, **kwargs: Any) -> None:
            known = {"max_batch_size", "max_seq_len", "guided_decoding_backend", "tensor_parallel_size"}
            assert set(kwargs) <= known, kwargs
            self.model, self.skip_tokenizer_init, self.kwargs = model, skip_tokenizer_init, kwargs
            self.world = World(slots)
            self.requests: list[Any] = []
            top.made = self

        def generate_async(
            self, inputs: Any, sampling_params: Any = None, lora_request: Any = None, streaming: bool = False
        ) -> _Result:
            asyncio.get_running_loop()  # else the result could not be awaited
            assert set(inputs) == {"prompt_token_ids"}
            assert wholes(inputs["prompt_token_ids"])
            assert isinstance(sampling_params, top.SamplingParams)
            assert isinstance(streaming, bool)
            if sampling_params.end_id is None and self.skip_tokenizer_init:
                raise ValueError("tokenizer is required to reset end_id if it is None")
            assert lora_request is None or isinstance(lora_request, executor.LoRARequest)
            self.requests.append(SimpleNamespace(params=sampling_params, lora=lora_request))
            return _Result(self.world, inputs["prompt_token_ids"], sampling_params, streaming)

        def shutdown(self) -> None:
            self.world.close()

    top.LLM = LLM
    top.llmapi, top.executor = llmapi, executor
    return {"tensorrt_llm": top, "tensorrt_llm.llmapi": llmapi, "tensorrt_llm.executor": executor}


class _Result:
    """What `generate_async` returns: its own answer, again and again."""

    def __init__(self, world: World, prompt: list[int], params: Any, streaming: bool) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[list[int], str, str]] = asyncio.Queue()
        self._streaming, self._params, self._unsent = streaming, params, []  # type: ignore[var-annotated]
        self._world = world
        self.finished = False
        self.outputs = [SimpleNamespace(token_ids=[], logprobs=[], finish_reason=None)]
        self._sequence = Run(
            prompt,
            params.max_tokens,
            self._tell,
            end_ids=[params.end_id],
            stop_ids=params.stop_token_ids or [],
            bad_ids=params.bad_token_ids or [],
        )
        world.add(self._sequence)

    def abort(self) -> None:
        self._world.stop(self._sequence)

    def __aiter__(self) -> _Result:
        return self

    async def __anext__(self) -> _Result:
        if self.finished:
            raise StopAsyncIteration
        tokens, finish, error = await self._queue.get()
        self.finished = bool(finish or error)
        if error:
            raise RuntimeError(error)
        output = self.outputs[0]
        output.token_ids += tokens
        if self._params.logprobs:
            output.logprobs += [{token: SimpleNamespace(logprob=log_prob(token), rank=1)} for token in tokens]
        if finish:
            output.finish_reason = {"end": "stop"}.get(finish, finish)
            if finish == "stop":
                output.token_ids = output.token_ids[:-1]
        return self

    def _tell(self, token: int | None, finish: str, error: str) -> None:
        self._unsent += [] if token is None else [token]
        if self._streaming or finish or error:
            tokens, self._unsent = self._unsent, []
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (tokens, finish, error))
