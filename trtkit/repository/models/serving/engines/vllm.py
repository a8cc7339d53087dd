"""vLLM's asynchronous engine, in this process.

It gets and gives token ids. Not run: there was no GPU to run it on. Names and meanings are those of vLLM's
vllm/sampling_params.py, outputs.py and v1/engine/async_llm.py (2025 and 2026): with RequestOutputKind.DELTA an output
holds new tokens only, a stop token among them; a `generate` that is cancelled aborts its request.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from ..engine import Job, RequestError, Step
from ..tasks import Tasks

_GUIDES = {"json": "json_object", "json_schema": "json", "regex": "regex", "ebnf_grammar": "grammar"}


class Engine:
    """Sequences of one engine.

    Args:
        parameters: `model`; optionally `engine_args`, further arguments of `AsyncEngineArgs` as a JSON object, and
            `lora_adapters`, a JSON object from name to folder, of which `lora_task_id` 1 is the first.
        slots: sequences that run at once, where `engine_args` has no `max_num_seqs`.
    """

    def __init__(self, parameters: dict[str, str], *, slots: int) -> None:
        import vllm

        arguments: dict[str, Any] = {
            "max_num_seqs": slots,
            "model": parameters.get("model"),
            **json.loads(parameters.get("engine_args") or "{}"),
        }
        if not arguments["model"]:
            raise ValueError("config.pbtxt: parameter 'model' is missing")
        adapters: dict[str, str] = json.loads(parameters.get("lora_adapters") or "{}")
        self._adapters = list(adapters.items())
        self._tasks = Tasks("vllm", self._follow)

        async def start() -> Any:  # in the loop, which the engine makes its own
            return vllm.AsyncLLMEngine.from_engine_args(vllm.AsyncEngineArgs(**arguments))

        try:
            self._engine: Any = self._tasks.call(start)
        except BaseException:
            self._tasks.close()
            raise
        model = getattr(self._engine, "model_config", None)  # not in all versions
        self.vocab_size: int | None = None if model is None else model.get_vocab_size()
        self.max_seq_len: int | None = None if model is None else model.max_model_len

    def check(self, job: Job) -> None:
        asked = job.sampling
        asked.check_guide(_GUIDES)
        asked.check_adapter(len(self._adapters))
        try:
            _params(job)
        except ValueError as error:  # vLLM has ranges of its own
            raise RequestError(str(error)) from None

    def submit(self, job: Job) -> None:
        self._tasks.start(job)

    def cancel(self, key: int) -> None:
        self._tasks.cancel(key)

    def step(self, timeout_s: float) -> list[Step]:
        return self._tasks.take(timeout_s)

    def close(self) -> None:
        async def stop() -> None:
            shutdown = getattr(self._engine, "shutdown", None) or self._engine.shutdown_background_loop
            shutdown()

        try:
            self._tasks.call(stop)
        finally:
            self._tasks.close()

    async def _follow(self, job: Job) -> AsyncIterator[Step]:
        import vllm

        lora = {}
        if job.sampling.lora_task_id is not None:
            from vllm.lora.request import LoRARequest

            name, folder = self._adapters[job.sampling.lora_task_id - 1]
            lora = {"lora_request": LoRARequest(name, job.sampling.lora_task_id, folder)}
        answers = self._engine.generate(
            prompt=vllm.TokensPrompt(prompt_token_ids=list(job.prompt)),
            sampling_params=_params(job),
            request_id=str(job.key),
            **lora,
        )
        async for answer in answers:
            if answer.outputs:
                yield _read(job, answer.outputs[0])


def _read(job: Job, output: Any) -> Step:
    """What an output tells; the token that ended the sequence is taken off."""
    tokens = list(output.token_ids)
    if output.finish_reason == "stop" and tokens and tokens[-1] in job.end_ids:
        tokens.pop()
    log_probs = []
    if job.log_probs and tokens:
        log_probs = [float(one[token].logprob) for token, one in zip(tokens, output.logprobs, strict=False)]
    if output.finish_reason not in (None, "stop", "length"):
        return Step(job.key, error=f"the engine ended the request: {output.finish_reason}")
    return Step(job.key, tokens, output.finish_reason or "", log_probs=log_probs)


def _params(job: Job) -> Any:
    from vllm import SamplingParams, sampling_params

    asked, kinds = job.sampling, sampling_params.RequestOutputKind
    settings: dict[str, Any] = {
        "max_tokens": job.max_tokens,
        "stop_token_ids": list(job.end_ids),
        "ignore_eos": True,  # the end ids are those of the job, and no others
        "detokenize": False,
        "output_kind": kinds.DELTA if job.streams else kinds.FINAL_ONLY,
        # Without any of the three vLLM would sample; here that is greedy, as with every other engine.
        "temperature": 0.0 if asked.temperature is asked.top_k is asked.top_p is None else asked.temperature,
        "top_k": asked.top_k,
        "top_p": asked.top_p or None,  # 0 is out of range, and means no limit
        "repetition_penalty": asked.repetition_penalty,
        "presence_penalty": asked.presence_penalty,
        "frequency_penalty": asked.frequency_penalty,
        "min_tokens": asked.min_tokens,
        "seed": asked.seed,
        "logprobs": 0 if job.log_probs else None,  # none beside the token's own
    }
    if asked.guide_type is not None:
        guide = {_GUIDES[asked.guide_type]: True if asked.guide is None else asked.guide}
        if hasattr(sampling_params, "StructuredOutputsParams"):  # since 0.11
            settings["structured_outputs"] = sampling_params.StructuredOutputsParams(**guide)
        else:
            settings["guided_decoding"] = sampling_params.GuidedDecodingParams(**guide)
    params = SamplingParams(**{name: value for name, value in settings.items() if value is not None})
    if job.bad_words:
        # What vLLM itself makes of `bad_words`, which are texts; it leaves the field alone when there are none.
        params._bad_words_token_ids = [list(word) for word in job.bad_words]
    return params
