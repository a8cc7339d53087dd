"""What the serving model and an engine say to each other. An engine is a module in engines/ with a class `Engine`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

Code = Literal["INVALID_ARG", "UNAVAILABLE", "UNSUPPORTED", "CANCELLED", "INTERNAL"]
"""Why a request failed, in Triton's words."""


class RequestError(Exception):
    """A request that cannot be served, with what its sender should read."""

    def __init__(self, message: str, code: Code = "INVALID_ARG") -> None:
        super().__init__(message)
        self.code: Code = code


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. None, as a request that says nothing: the engine's own default.

    Attributes:
        temperature: divides the logits; 0 means greedy.
        top_k: how many of the likeliest tokens take part, 0 for no limit.
        top_p: probability mass that takes part.
        repetition_penalty, presence_penalty, frequency_penalty: as in TensorRT-LLM's SamplingConfig.
        min_tokens: no end before so many output tokens.
        seed: makes the request reproducible.
        lora_task_id: the adapter (TensorRT-LLM).
        guide_type, guide: what the text must follow, such as `json_schema` and the schema.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    min_tokens: int | None = None
    seed: int | None = None
    lora_task_id: int | None = None
    guide_type: str | None = None
    guide: str | None = None

    def reseeded(self, number: int) -> Sampling:
        """The settings of the request's further sequences: another seed, if one was given."""
        return self if self.seed is None else replace(self, seed=(self.seed + number) % 2**64)

    def check_guide(self, kinds: Collection[str], *, enabled: bool = True) -> None:
        """Raises RequestError for a guide of another kind than these, without its text, or where there are none."""
        if self.guide_type is not None and self.guide_type not in kinds:
            raise RequestError(f"guided_decoding_guide_type: '{self.guide_type}' is none of {', '.join(kinds)}")
        if (self.guide is None) != (self.guide_type in (None, "json")):
            raise RequestError("guided_decoding_guide: send it with a guided_decoding_guide_type that needs it")
        if self.guide_type is not None and not enabled:
            raise RequestError("the engine runs without guided_decoding_backend", "UNSUPPORTED")

    def check_adapter(self, count: int) -> None:
        """Raises RequestError for an adapter beyond those that the engine was started with, counted from 1."""
        if self.lora_task_id is not None and not 1 <= self.lora_task_id <= count:
            raise RequestError(f"lora_task_id: {self.lora_task_id}; there are {count} adapters, from 1")


@dataclass(frozen=True)
class Job:
    """One sequence to generate.

    Attributes:
        key: names the sequence, unique while the model is loaded.
        prompt: token ids, at least one.
        max_tokens: most output tokens, at least one.
        end_ids: each ends the sequence and is not part of it.
        bad_words: token sequences that may not appear.
        log_probs: report the logarithm of each token's probability.
        streams: somebody reads along, so tokens should come as they are made.
    """

    key: int
    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = Sampling()
    end_ids: tuple[int, ...] = ()
    bad_words: Sequence[Sequence[int]] = ()
    log_probs: bool = False
    streams: bool = True


class Step(NamedTuple):
    """What is new about one sequence. After a `finish` or an `error` nothing more comes under its key.

    Attributes:
        tokens: new tokens, without the end id; none is fine.
        finish: `stop` after an end id, `length` when no more tokens are allowed, else empty.
        error: why the sequence cannot go on, else empty.
        log_probs: as many as tokens, if the job asked for them.
    """

    key: int
    tokens: Sequence[int] = ()
    finish: str = ""
    error: str = ""
    code: Code = "INTERNAL"
    log_probs: Sequence[float] = ()


class Engine(Protocol):
    """Generates many sequences at once.

    `step` is called by one thread, again and again. `submit` and `cancel` may be called by any thread meanwhile, return
    at once and make a waiting `step` return.

    Attributes:
        vocab_size: token ids are below it; None if the engine does not say.
        max_seq_len: most tokens of prompt and output together; None if the engine does not say.
    """

    vocab_size: int | None
    max_seq_len: int | None

    def __init__(self, parameters: dict[str, str], *, slots: int) -> None:
        """Args: the model's parameters in config.pbtxt, and how many sequences run at once."""

    def check(self, job: Job) -> None:
        """Raises RequestError for what this engine cannot do. Called before `submit`."""

    def submit(self, job: Job) -> None: ...

    def cancel(self, key: int) -> None:
        """The sequence is not wanted any more; nothing is to come of it. A key that is over means nothing."""

    def step(self, timeout_s: float) -> list[Step]:
        """What happened since the last call; waits at most so long for something to happen."""

    def close(self) -> None:
        """Ends what runs and frees the engine."""
