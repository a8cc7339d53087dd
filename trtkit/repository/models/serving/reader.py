"""Requests to replies that an engine can start on: read, written by the chat template, tokenised together, checked."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from .answers import Answer, Reply
from .asks import Ask, read
from .chat import ChatTemplate, read_messages
from .engine import Engine, Job, RequestError
from .kept import KeptTensors
from .settings import Settings
from .stops import StopStrings
from .text import Tokenizer

Refuse = Callable[[Reply, Exception], None]


class Reader:
    """Reads requests for one engine.

    Args:
        decoupled: whether a request may have several responses.
    """

    def __init__(self, settings: Settings, engine: Engine, kept: KeptTensors, *, decoupled: bool) -> None:
        self._settings, self._engine, self._kept, self._decoupled = settings, engine, kept, decoupled
        self._tokenizer = Tokenizer(settings.tokenizer_dir, add_special_tokens=settings.add_special_tokens)
        self._template = ChatTemplate.load(settings.tokenizer_dir)
        self._keys = itertools.count(1)

    def read(self, requests: Sequence[Any], arrived: float, refuse: Refuse) -> list[Reply]:
        """Replies with their jobs, for the requests that are right.

        Args:
            arrived: now, in seconds of the monotonic clock.
            refuse: is told what is wrong with each of the others.
        """
        asked: dict[bool, list[tuple[Reply, str]]] = {}
        for request in requests:
            reply = Reply(request, arrived, self._kept)
            try:
                reply.ask = read({tensor.name(): tensor.as_numpy() for tensor in request.inputs()})
                reply.deadline = self._settings.deadline(request.timeout(), arrived)
                text, special = self._prompt(reply.ask)
                asked.setdefault(special, []).append((reply, text))
            except Exception as error:
                refuse(reply, error)
        ready: list[Reply] = []
        for special, group in asked.items():
            try:
                prompts = self._tokenizer.encode([text for _, text in group], add_special_tokens=special)
            except Exception as error:
                for reply, _ in group:
                    refuse(reply, error)
                continue
            for (reply, text), prompt in zip(group, prompts, strict=True):
                try:
                    self._add_jobs(reply, text, prompt)
                    ready.append(reply)
                except Exception as error:
                    refuse(reply, error)
        return ready

    def _prompt(self, ask: Ask) -> tuple[str, bool]:
        """The text to encode, and whether the tokenizer adds its begin-of-sequence token."""
        if ask.streams and not self._decoupled:
            raise RequestError("stream: this model sends whole answers only (serving.streaming is off)")
        if ask.text is not None:
            if not ask.text:  # a begin-of-sequence token alone would be answered with anything
                raise RequestError("text_input: the prompt is empty")
            return ask.text, self._settings.add_special_tokens
        if self._template is None:
            raise RequestError("messages: the model has no chat template; send text_input", "UNSUPPORTED")
        if taken := {"messages", "self"} & ask.template_arguments.keys():
            raise RequestError(f"chat_template_kwargs: '{taken.pop()}' cannot be given there")
        return self._template.render(read_messages(ask.messages or b""), **ask.template_arguments), False

    def _add_jobs(self, reply: Reply, text: str, prompt: list[int]) -> None:
        ask, settings = reply.ask, self._settings
        most = self._most_tokens(ask, prompt)
        reply.prompt_tokens = len(prompt)
        reply.text_in_front = text if ask.echo else ""
        bad_words = [ids for word in ask.bad_words for ids in self._tokenizer.word(word)]
        for number in range(ask.sequences):
            stream = self._tokenizer.stream(prompt if ask.text is not None else ())
            answer = Answer(next(self._keys), stream, _stops(ask), watches=bool(ask.stop_words))
            job = Job(
                answer.key,
                prompt,
                most,
                ask.sampling if number == 0 else ask.sampling.reseeded(number),
                settings.end_ids if ask.end_ids is None else ask.end_ids,
                bad_words,
                ask.log_probs,
                # Stop words are found here, in the text, as it comes: they end the engine's work too.
                ask.streams or (self._decoupled and bool(ask.stop_words)),
            )
            self._engine.check(job)
            reply.answers.append(answer)
            reply.jobs.append(job)

    def _most_tokens(self, ask: Ask, prompt: list[int]) -> int:
        """How many tokens the answer may have."""
        if not prompt:
            raise RequestError("text_input: the prompt has no tokens")
        longest = self._engine.max_seq_len
        wanted = ask.max_tokens or self._settings.default_max_tokens
        if longest is None:
            return wanted
        room = longest - len(prompt)
        if room < (ask.max_tokens or 1):
            raise RequestError(
                f"max_tokens: {ask.max_tokens or 1} tokens after a prompt of {len(prompt)} are more than "
                f"max_seq_len {longest}"
            )
        return min(wanted, room)


def _stops(ask: Ask) -> StopStrings:
    try:
        return StopStrings(ask.stop_words, include=ask.include_stop)
    except ValueError as error:
        raise RequestError(f"stop_words: {error}") from None
