"""TensorRT-LLM's LLM API (`tensorrt_llm.LLM`, version 1.0 or newer), in this process.

It gets and gives token ids; its own tokenizer is not loaded, unless guided decoding needs it. Not run: there was no GPU
to run it on. Names and meanings are those of tensorrt_llm/llmapi/llm.py, sampling_params.py and executor/result.py:
`token_ids` and `logprobs` of a stream hold all so far; neither an end id nor a stop token is among them. The workers of
several GPUs are started by `LLM` itself; several nodes are not supported.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from ..engine import Code, Job, RequestError, Step
from ..tasks import Tasks

_GUIDES = ("json", "json_schema", "regex", "ebnf_grammar")
_FINISH = {"stop": "stop", "length": "length"}
_ERRORS: dict[str, tuple[str, Code]] = {
    "cancelled": ("the engine cancelled the request", "CANCELLED"),
    "timeout": ("the engine's time for the request is over", "UNAVAILABLE"),
}


class Engine:
    """Sequences of one `LLM`.

    Args:
        parameters: `model`; optionally `engine_args`, further keyword arguments of `LLM` as a JSON object, and
            `lora_adapters`, a JSON object from name to folder, of which `lora_task_id` 1 is the first.
        slots: sequences that run at once, where `engine_args` has no `max_batch_size`.
    """

    def __init__(self, parameters: dict[str, str], *, slots: int) -> None:
        from tensorrt_llm import LLM

        arguments: dict[str, Any] = {
            "max_batch_size": slots,
            "model": parameters.get("model"),
            **json.loads(parameters.get("engine_args") or "{}"),
        }
        if not arguments["model"]:
            raise ValueError("config.pbtxt: parameter 'model' is missing")
        self._guides = bool(arguments.get("guided_decoding_backend"))
        arguments.setdefault("skip_tokenizer_init", not self._guides)
        adapters: dict[str, str] = json.loads(parameters.get("lora_adapters") or "{}")
        self._adapters = list(adapters.items())
        longest = arguments.get("max_seq_len") or parameters.get("max_seq_len")
        self.vocab_size: int | None = None
        self.max_seq_len: int | None = int(longest) if longest else None
        self._llm: Any = LLM(**arguments)
        self._tasks = Tasks("llmapi", self._follow)

    def check(self, job: Job) -> None:
        asked = job.sampling
        if any(len(word) > 1 for word in job.bad_words):
            raise RequestError("bad_words: the LLM API forbids words of one token only", "UNSUPPORTED")
        asked.check_guide(_GUIDES, enabled=self._guides)
        asked.check_adapter(len(self._adapters))

    def submit(self, job: Job) -> None:
        self._tasks.start(job)

    def cancel(self, key: int) -> None:
        self._tasks.cancel(key)

    def step(self, timeout_s: float) -> list[Step]:
        return self._tasks.take(timeout_s)

    def close(self) -> None:
        try:
            self._tasks.close()
        finally:
            self._llm.shutdown()

    async def _follow(self, job: Job) -> AsyncIterator[Step]:
        lora = {}
        if job.sampling.lora_task_id is not None:
            from tensorrt_llm.executor import LoRARequest

            name, folder = self._adapters[job.sampling.lora_task_id - 1]
            lora = {"lora_request": LoRARequest(name, job.sampling.lora_task_id, folder)}
        result = self._llm.generate_async(
            {"prompt_token_ids": list(job.prompt)}, sampling_params=_params(job), streaming=job.streams, **lora
        )
        count = 0
        try:
            async for answer in result:
                output = answer.outputs[0]
                tokens = list(output.token_ids[count:])
                log_probs = _log_probs(tokens, output.logprobs[count:]) if job.log_probs else ()
                count += len(tokens)
                reason = output.finish_reason
                if reason in _ERRORS:
                    raise RequestError(*_ERRORS[reason])
                yield Step(job.key, tokens, _FINISH.get(reason, ""), log_probs=log_probs)
        finally:
            if not result.finished:
                result.abort()


def _params(job: Job) -> Any:
    from tensorrt_llm import SamplingParams

    asked = job.sampling
    greedy = asked.temperature == 0
    settings: dict[str, Any] = {
        "max_tokens": job.max_tokens,
        "end_id": job.end_ids[0] if job.end_ids else -1,
        "stop_token_ids": list(job.end_ids[1:]) or None,
        "bad_token_ids": [word[0] for word in job.bad_words] or None,
        "detokenize": False,
        "top_k": 1 if greedy else asked.top_k,
        "top_p": None if greedy else asked.top_p or None,
        "temperature": None if greedy else asked.temperature,
        "seed": asked.seed,
        "min_tokens": asked.min_tokens,
        "repetition_penalty": asked.repetition_penalty,
        "presence_penalty": asked.presence_penalty,
        "frequency_penalty": asked.frequency_penalty,
        "logprobs": 1 if job.log_probs else None,
    }
    if asked.guide_type is not None:
        settings["guided_decoding"] = _guide(asked.guide_type, asked.guide)
    return SamplingParams(**{name: value for name, value in settings.items() if value is not None})


def _guide(kind: str, guide: str | None) -> Any:
    from tensorrt_llm.llmapi import GuidedDecodingParams

    if kind == "json":
        return GuidedDecodingParams(json_object=True)
    name = {"json_schema": "json", "regex": "regex", "ebnf_grammar": "grammar"}[kind]
    return GuidedDecodingParams(**{name: guide})


def _log_probs(tokens: Sequence[int], found: Sequence[Any]) -> list[float]:
    """Of each token: the TensorRT backend gives numbers, the PyTorch one what it knows of the likeliest tokens too."""
    return [
        float(one[token].logprob if isinstance(one, dict) else one) for token, one in zip(tokens, found, strict=False)
    ]
