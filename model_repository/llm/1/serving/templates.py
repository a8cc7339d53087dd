"""Chat templates: where a tokenizer's folder keeps them, and the sandbox that runs them as transformers would.

What a template may call follows transformers, `utils/chat_template_utils.py`: blocks trimmed, `break` and `continue`,
`tojson` without HTML escapes, `raise_exception`, `strftime_now`, and the tag `generation`, which marks what the
assistant writes and changes nothing in the text.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

MAX_FILE = 8 << 20
"""Bytes of a template or of the JSON around it. tokenizer_config.json of models with many added tokens has 2 MB."""


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def chat_templates(folder: Path) -> dict[str, str]:
    """The chat templates of a tokenizer's folder, by name; the first of these that holds any.

    chat_template.jinja and additional_chat_templates/*.jinja; tokenizer_config.json, one template or a list of named
    ones; chat_template.json, which older processors wrote.

    Raises:
        ValueError: a file is not what it should be.
    """
    found = {file.stem: _read(file) for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        found["default"] = _read(folder / "chat_template.jinja")
    for name in ("tokenizer_config.json", "chat_template.json"):
        if "default" in found:
            break
        found = {**_named(_read_json(folder / name).get("chat_template"), folder / name), **found}
    return found


def _named(given: Any, file: Path) -> dict[str, str]:
    if given is None:
        return {}
    if isinstance(given, str):
        return {"default": given}
    try:
        pairs = given.items() if isinstance(given, dict) else [(item["name"], item["template"]) for item in given]
        named = dict(pairs)
    except (TypeError, KeyError):
        named = {None: None}
    if not all(isinstance(key, str) and isinstance(value, str) for key, value in named.items()):
        raise ValueError(f"{file}: chat_template must be a template or a list of them with name and template")
    return named


def special_tokens(folder: Path) -> dict[str, str]:
    """The special tokens that have names, such as bos_token; tokenizer_config.json before special_tokens_map.json.

    Raises:
        ValueError: a file is not what it should be.
    """
    tokens: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, value in _read_json(folder / name).items():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str):
                tokens[key] = text
    return tokens


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(_read(file))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: {one_line(error)}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} must hold a JSON object")
    return found


def _read(file: Path) -> str:
    size = file.stat().st_size
    if size > MAX_FILE:
        raise ValueError(f"{file} has {size} bytes, at most {MAX_FILE} are read")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: byte {error.start}: {error.reason}") from None


def environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The sandbox that templates run in."""
    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    sandbox.filters["tojson"] = _tojson
    sandbox.globals["raise_exception"] = _raise_exception
    sandbox.globals["strftime_now"] = _strftime_now
    sandbox.globals["namespace"] = _Namespace
    return sandbox


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: the text inside, whose variables stay inside."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """Variables that outlive a loop. Names with an underscore in front lead out of the sandbox in some releases."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be the name of a variable
        given = dict(*args[1:], **kwargs)
        for name in given:
            _check_name(name)
        jinja2.utils.Namespace.__init__(args[0], given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace takes no name with an underscore in front: {name!r}")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)  # local time, as transformers has it
