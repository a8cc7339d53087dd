"""Is a chat read as the model was taught to read one? Judged by transformers, which is where chat templates come from.

The messages are sent as such, and once more as the prompt that `apply_chat_template` makes of them: both greedy answers
must be equal, and so must the number of tokens that the server counts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from trtkit.client.api import LLMClient, ServerError
from trtkit.errors import InputError
from trtkit.findings import Finding
from trtkit.validate.contract import chat_model
from trtkit.validate.results import CheckResult, Subject, plural, result, short, skipped
from trtkit.validate.source import Source

NAME = "chat"

Message = dict[str, str]

CHATS: tuple[tuple[Message, ...], ...] = (
    ({"role": "user", "content": "Hello"},),
    ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 漢字? 🎉"}),
    (
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "  Grüße,\n\tand two lines  "},
    ),
)

SERVE_IT = "serve the source's own chat template and special tokens: generate the model repository again"


class _Rendered(NamedTuple):
    """A chat as a prompt.

    Attributes:
        prompt: None where the template refuses the chat.
        text: what makes the server's tokenizer read `tokens` tokens; None where no text does.
    """

    chat: tuple[Message, ...]
    prompt: str | None
    text: str | None = None
    tokens: int = 0


async def check(subject: Subject, clients: Sequence[LLMClient]) -> CheckResult:
    """Sends some chats as messages and as prompts, over every client, and compares the answers."""
    model = await chat_model(subject, clients[0])
    if model is None:
        return skipped(NAME, "the server has no model that takes chat messages")
    if subject.source is None:
        return skipped(NAME, "no source to take a chat template from: give --source DIR")
    source = await asyncio.to_thread(Source, subject.source, trust_remote_code=subject.trust_remote_code)
    template = subject.chat_template.read_text(encoding="utf-8") if subject.chat_template else None
    if template is None and not source.tokenizer.chat_template:
        return skipped(NAME, "the tokenizer has no chat template")
    chats = [_render(source, chat, template, subject) for chat in CHATS]
    findings: list[Finding] = []
    for client in clients:
        for chat in chats:
            findings += await _judge(subject, client, model, chat)
    count, refused = len(chats) * len(clients), sum(chat.prompt is None for chat in chats) * len(clients)
    equal = count - refused - len({finding.place for finding in findings})
    detail = f"{equal} of {plural(count - refused, 'chat')} answered as the rendered prompt is"
    if refused:
        detail += f", {refused} that the template does not take"
    return result(NAME, detail, findings, equal=equal, total=count, refused=refused)


def _render(source: Source, chat: tuple[Message, ...], template: str | None, subject: Subject) -> _Rendered:
    import jinja2

    tokenizer: Any = source.tokenizer
    options = {"chat_template": template} if template else {}
    try:
        prompt = str(tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=True, **options))
    except jinja2.TemplateError:  # a template may want other roles, or roles in turn
        return _Rendered(chat, None)
    except ValueError as error:
        cause = f"{source.folder}: transformers cannot render the chat template: {error}"
        raise InputError(cause, "check the source's tokenizer_config.json") from None
    ids = source.encode(prompt, add_special_tokens=False)
    # As a prompt, the server puts a begin-of-sequence token in front, which the template has already written.
    for text in (prompt, prompt.removeprefix(tokenizer.bos_token or "")):
        if source.encode(text, add_special_tokens=subject.add_special_tokens) == ids:
            return _Rendered(chat, prompt, text, len(ids))
    return _Rendered(chat, prompt, None, len(ids))


async def _judge(subject: Subject, client: LLMClient, model: str, chat: _Rendered) -> list[Finding]:
    place = f"{client.protocol} {short(chat.chat[-1]['content'])}"
    request = replace(subject.request(""), messages=chat.chat)
    try:
        answer = await client.generate(request, model=model, timeout_s=subject.timeout_s)
    except ServerError as error:
        if chat.prompt is None:
            return []
        return [Finding("TK751", "error", place, f"refused: {error.message}", SERVE_IT)]
    cause = ""
    if chat.prompt is None:
        cause = "answered, although the source's template does not take such a chat"
    elif answer.prompt_tokens not in (None, chat.tokens):
        cause = f"the prompt is {answer.prompt_tokens} tokens long, that of the source's template {chat.tokens}"
    elif chat.text is not None:  # else the count is all that can be compared
        other = await client.generate(subject.request(chat.text), model=model, timeout_s=subject.timeout_s)
        # Where a tokenizer's words begin with a space, a continuation has one that an answer to a chat has not.
        if answer.text not in (other.text, other.text.removeprefix(" ")):
            cause = f"the answer is {short(answer.text, 60)}, to the rendered prompt it is {short(other.text, 60)}"
    return [Finding("TK751", "error", place, cause, SERVE_IT)] if cause else []
