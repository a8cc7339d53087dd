"""Chat messages to a prompt, by the model's own template.

A chat template is a Jinja program that comes with the model. It runs in a sandbox (see templates.py) that reaches no
file, no import and no attribute with an underscore in front, and counted loops, text and time are bounded. (Memory is
not, nor is a loop over messages that writes nothing: a template may still double a string until there is none left.
Serve models whose template you would run.)

The prompt holds every special token that the model wants. Encode it without adding any.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.nodes
import jinja2.sandbox

from .templates import chat_templates, environment, one_line, special_tokens

Message = dict[str, Any]

MAX_BYTES = 4 << 20
MAX_MESSAGES = 4096
MAX_TEXT = 16 << 20
"""Characters of a rendered prompt."""
MAX_STEPS = 1_000_000
"""Numbers that all calls of range() in one rendering may count together."""
MAX_SECONDS = 5.0

TEXT, PARTS, BOTH = "text", "parts", "both"
"""What a template takes as the content of a message. Lines join parts for one that takes text, as vLLM does."""


class ChatError(ValueError):
    """What is wrong with messages or a template, in one line for the sender of the request."""


def read_messages(raw: bytes | str) -> list[Message]:
    """Chat messages from their JSON: a list of {"role": ..., "content": ...}, or an object with such "messages".

    Content is a string or a list of {"type": "text", "text": ...}; an assistant's message with "tool_calls" may have
    none. Keys of null are left out; other keys are kept for the template ("name", "tool_calls", "tool_call_id").

    Raises:
        ChatError: what is wrong, and in which message.
    """
    if len(raw) > MAX_BYTES:
        raise ChatError(f"the chat messages have {len(raw)} bytes, at most {MAX_BYTES} are taken")
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, or no UTF-8
        raise ChatError(f"the chat messages are no JSON: {one_line(error)}") from None
    if isinstance(found, dict) and "messages" in found:
        found = found["messages"]
    if not isinstance(found, list) or not found:
        raise ChatError('the chat messages must be a list of {"role": ..., "content": ...} with at least one item')
    if len(found) > MAX_MESSAGES:
        raise ChatError(f"there are {len(found)} chat messages, at most {MAX_MESSAGES} are taken")
    return [_message(item, f"chat message {place}") for place, item in enumerate(found, start=1)]


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, dict):
        raise ChatError(f'{where} must be an object with "role" and "content", not {_kind(item)}')
    message = {key: value for key, value in item.items() if value is not None}
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise ChatError(f'{where} needs a "role" such as "user", not {_kind(role)}')
    if content is None and not message.get("tool_calls"):
        raise ChatError(f'{where} has no "content"')
    if isinstance(content, list):
        for place, part in enumerate(content, start=1):
            _check_part(part, f"part {place} of {where}")
    elif content is not None and not isinstance(content, str):
        raise ChatError(f'{where}: "content" must be a string or a list of text parts, not {_kind(content)}')
    return message


def _check_part(part: Any, where: str) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        raise ChatError(
            f'{where} must be {{"type": "text", "text": ...}}; only text is taken, not {kind or _kind(part)}'
        )
    if not isinstance(part.get("text"), str):
        raise ChatError(f'{where}: "text" must be a string, not {_kind(part.get("text"))}')


class ChatTemplate:
    """The chat template of a model.

    Args:
        templates: source by name; "default" is used, or "tool_use" when there are tools and it exists.
        special_tokens: names and texts that templates may use, such as bos_token.

    Raises:
        ChatError: a template is no Jinja.
    """

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str] | None = None) -> None:
        self._tokens = dict(special_tokens or {})
        self._templates: dict[str, jinja2.Template] = {}
        self._styles: dict[str, str] = {}
        sandbox = environment()
        for name, source in templates.items():
            try:
                self._templates[name] = sandbox.from_string(source)
                self._styles[name] = _style(sandbox.parse(source))
            except (jinja2.TemplateError, RecursionError) as error:
                raise ChatError(f"chat template {name!r}: {one_line(error)}") from None

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """The template of a tokenizer's folder; None when the model has none.

        Raises:
            ValueError: a file of the tokenizer is not what it should be, or a template is no Jinja.
        """
        templates = chat_templates(folder)
        return cls(templates, special_tokens(folder)) if templates else None

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        name: str | None = None,
        **more: Any,
    ) -> str:
        """The prompt for these messages (see `read_messages`).

        Args:
            tools, documents: plain JSON, as the template wants it.
            add_generation_prompt: end with what the assistant's answer follows.
            name: which of several templates.
            more: further variables of the template ("enable_thinking"); plain JSON.

        Raises:
            ChatError: the template refuses the messages, fails, or exceeds a limit.
        """
        if name is not None and not isinstance(name, str):
            raise ChatError(f"the name of a chat template must be text, not {_kind(name)}")
        chosen = name or ("tool_use" if tools is not None and "tool_use" in self._templates else "default")
        template = self._templates.get(chosen)
        if template is None:
            raise ChatError(f"the model has no chat template {chosen!r}, only {', '.join(sorted(self._templates))}")
        variables = {
            **self._tokens,
            **more,
            "messages": [_fitted(message, self._styles[chosen]) for message in messages],
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
            "range": _bounded_range(),
        }
        try:
            return _bounded(template, variables)
        except ChatError:
            raise
        except jinja2.TemplateError as error:
            raise ChatError(f"the chat template refuses the messages: {one_line(error)}") from None
        except Exception as error:  # a template fails like any program: on a missing key, a sum of text and number
            raise ChatError(
                f"the chat template fails on the messages: {type(error).__name__}: {one_line(error)}"
            ) from None


def _bounded(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    pieces, size, end = [], 0, time.monotonic() + MAX_SECONDS
    for piece in template.generate(variables):
        size += len(piece)
        if size > MAX_TEXT:
            raise ChatError(f"the chat template writes more than {MAX_TEXT} characters")
        if time.monotonic() > end:
            raise ChatError(f"the chat template takes more than {MAX_SECONDS:g} s")
        pieces.append(piece)
    text = "".join(pieces)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can write one half of a pair of UTF-16, which is no character
        raise ChatError(f"the chat messages hold half a character, U+{ord(text[error.start]):04X}") from None
    return text


def _bounded_range() -> Callable[..., range]:
    """range() for one rendering. Jinja's own limit is per call, so loops inside of loops would count for hours."""
    left = MAX_STEPS

    def bounded_range(*args: int) -> range:
        nonlocal left
        numbers = jinja2.sandbox.safe_range(*args)
        left -= len(numbers)
        if left < 0:
            raise ChatError(f"the chat template counts through more than {MAX_STEPS} numbers")
        return numbers

    return bounded_range


def _fitted(message: Message, style: str) -> Message:
    """A message with its content in the form that a template reads."""
    content = message.get("content")
    if style == TEXT and isinstance(content, list):
        return {**message, "content": "\n".join(part["text"] for part in content)}
    if style == PARTS and isinstance(content, str):
        return {**message, "content": [{"type": "text", "text": content}]}
    return message


def _style(tree: jinja2.nodes.Template) -> str:
    """Which content a template reads: a text, a list of parts if it loops over it, or both if it also asks which."""
    if not any(_is_content(loop.iter) for loop in tree.find_all(jinja2.nodes.For)):
        return TEXT
    return BOTH if any(test.name == "string" for test in tree.find_all(jinja2.nodes.Test)) else PARTS


def _is_content(node: jinja2.nodes.Node) -> bool:
    if isinstance(node, jinja2.nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, jinja2.nodes.Getitem) and isinstance(node.arg, jinja2.nodes.Const):
        return bool(node.arg.value == "content")
    return isinstance(node, jinja2.nodes.Name) and node.name == "content"


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
