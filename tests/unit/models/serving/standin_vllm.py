"""A stand-in of vLLM for machines without it: names and types as vllm-project/vllm declares them in
vllm/sampling_params.py, vllm/outputs.py and vllm/v1/engine/async_llm.py, around a made-up model.

As upstream: with DELTA an output holds new tokens only, the token that ends a sequence is among them, and a `generate`
that is cancelled aborts its request.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import ModuleType, SimpleNamespace
from typing import Any

from standin_model import (
    LONGEST,
    VOCABULARY,
    Run,
    World,
    declare,
    flag,
    lists,
    log_prob,
    namespace,
    number,
    one,
    text,
    whole,
    wholes,
)  # fmt: skip


def modules(slots: int = 4, *, old: bool = False) -> dict[str, Any]:
    """The modules by name; `vllm.made` is the one engine.

    Args:
        old: structured outputs are called guided decoding, as before 0.11.
    """
    top: Any = ModuleType("vllm")
    sampling: Any = ModuleType("vllm.sampling_params")
    lora: Any = ModuleType("vllm.lora")
    request: Any = ModuleType("vllm.lora.request")
    request.LoRARequest = declare("LoRARequest", 3, lora_name=(text, ""), lora_int_id=(whole, 0), lora_path=(text, ""))
    sampling.RequestOutputKind = namespace("RequestOutputKind", CUMULATIVE=0, DELTA=1, FINAL_ONLY=2)
    guide = declare(
        "StructuredOutputsParams",
        json=(text, None),
        regex=(text, None),
        grammar=(text, None),
        json_object=(flag, None),
    )
    setattr(sampling, "GuidedDecodingParams" if old else "StructuredOutputsParams", guide)
    params = declare(
        "SamplingParams",
        presence_penalty=(lambda value: number(value) and -2 <= value <= 2, 0.0),
        frequency_penalty=(lambda value: number(value) and -2 <= value <= 2, 0.0),
        repetition_penalty=(number, 1.0),
        temperature=(number, 1.0),
        top_p=(lambda value: number(value) and 0 < value <= 1, 1.0),
        top_k=(whole, 0),
        seed=(whole, None),
        stop_token_ids=(wholes, None),
        ignore_eos=(flag, False),
        max_tokens=(whole, 16),
        min_tokens=(whole, 0),
        logprobs=(whole, None),
        detokenize=(flag, True),
        output_kind=(whole, 0),
        _bad_words_token_ids=(lists, None),
        **{"guided_decoding" if old else "structured_outputs": (one(guide), None)},
    )

    class SamplingParams(params):  # type: ignore[misc, valid-type]
        def __init__(self, **kwargs: Any) -> None:
            assert "_bad_words_token_ids" not in kwargs
            try:
                super().__init__(**kwargs)
            except TypeError as error:
                raise ValueError(str(error)) from None  # VLLMValidationError is one

    top.SamplingParams = sampling.SamplingParams = SamplingParams
    top.TokensPrompt = lambda *, prompt_token_ids: {"prompt_token_ids": prompt_token_ids}
    top.AsyncEngineArgs = declare(
        "AsyncEngineArgs", model=(text, ""), max_num_seqs=(whole, None), max_model_len=(whole, None),
        enable_lora=(flag, False),
    )  # fmt: skip
    top.made = None

    class AsyncLLMEngine(_Engine):
        @classmethod
        def from_engine_args(cls, engine_args: Any) -> AsyncLLMEngine:
            assert isinstance(engine_args, top.AsyncEngineArgs)
            asyncio.get_running_loop()
            top.made = cls(engine_args, SamplingParams, request.LoRARequest, sampling.RequestOutputKind, slots)
            made: AsyncLLMEngine = top.made
            return made

    top.AsyncLLMEngine = AsyncLLMEngine
    top.sampling_params, top.lora, lora.request = sampling, lora, request
    return {"vllm": top, "vllm.sampling_params": sampling, "vllm.lora": lora, "vllm.lora.request": request}


class _Engine:
    def __init__(self, arguments: Any, params: Any, lora: Any, kinds: Any, slots: int) -> None:
        self.arguments, self._params, self._lora, self._kinds = arguments, params, lora, kinds
        self.world = World(slots)
        self.requests: list[Any] = []
        self.model_config = SimpleNamespace(max_model_len=LONGEST, get_vocab_size=lambda: VOCABULARY)
        self._ids: set[str] = set()

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, *, lora_request: Any = None
    ) -> AsyncIterator[Any]:
        assert set(prompt) == {"prompt_token_ids"}
        assert wholes(prompt["prompt_token_ids"])
        assert isinstance(sampling_params, self._params)
        assert isinstance(request_id, str)
        assert request_id not in self._ids
        assert lora_request is None or isinstance(lora_request, self._lora)
        self._ids.add(request_id)
        self.requests.append(SimpleNamespace(params=sampling_params, lora=lora_request))
        if len(prompt["prompt_token_ids"]) >= LONGEST:
            raise ValueError(f"The prompt is longer than the maximum model length of {LONGEST}")
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int | None, str, str]]()

        def tell(token: int | None, finish: str, error: str) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(queue.put_nowait, (token, finish, error))

        sequence = Run(
            prompt["prompt_token_ids"],
            sampling_params.max_tokens,
            tell,
            stop_ids=sampling_params.stop_token_ids or [],
            bad_ids=[word[0] for word in sampling_params._bad_words_token_ids or [] if len(word) == 1],
        )
        self.world.add(sequence)
        try:
            finish, unsent = "", []
            while not finish:
                token, finish, error = await queue.get()
                if error:
                    raise RuntimeError(error)
                unsent += [] if token is None else [token]
                if finish or sampling_params.output_kind == self._kinds.DELTA:
                    yield _output(unsent, finish, sampling_params)
                    unsent = []
        except (asyncio.CancelledError, GeneratorExit):
            self.world.stop(sequence)
            raise

    def shutdown(self) -> None:
        self.world.close()


def _output(tokens: list[int], finish: str, params: Any) -> Any:
    log_probs = [{token: SimpleNamespace(logprob=log_prob(token))} for token in tokens]
    output = SimpleNamespace(
        token_ids=tuple(tokens),
        logprobs=None if params.logprobs is None else log_probs,
        finish_reason={"": None, "cancelled": "abort"}.get(finish, finish),
    )
    return SimpleNamespace(outputs=[output], finished=bool(finish))
