"""Lint rules about the tokenizer beside a model: whether it works, and whether it fits the model behind it."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtkit import serving_contract
from trtkit.findings import Finding
from trtkit.repository.lint.repository import Model
from trtkit.repository.lint.rules import finding

_CHAT_TOKENS = {
    "<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "[INST]", "<|assistant|>", "<|start_of_role|>",
}  # fmt: skip
"""Tokens that begin a message, in the templates of the common model families."""


@dataclass(frozen=True)
class Tokenizer:
    """What a tokenizer.json says.

    Attributes:
        problem: why it cannot be loaded.
        is_exact: whether every token has a fixed text.
        highest: the highest id that it can give.
        starts: tokens that it puts in front of each text by itself.
        is_chat: whether it has tokens that only conversations use.
    """

    problem: str = ""
    is_exact: bool = True
    highest: int = -1
    starts: tuple[str, ...] = ()
    is_chat: bool = False


def lint_tokenizer(model: Model) -> Iterator[Finding]:
    """Findings about a tokenizer inside the repository (`tokenizer_dir` without a slash), in every served version."""
    name = model.parameters.get("tokenizer_dir", "")
    if model.is_ensemble or not name or "/" in name or not name.isascii():
        return
    for version in model.served_versions():
        folder = model.path / str(version) / name
        place = f"{model.name}/{version}/{name}/tokenizer.json"
        file = folder / "tokenizer.json"
        if not file.is_file():
            fix = "generate the repository again, or copy the tokenizer there"
            yield finding("TK132", place, "the file is missing", fix)
            continue
        found = _read(file.read_bytes())
        if found.problem:
            cause = f"not a tokenizer: {found.problem}"
            yield finding("TK135", place, cause, "copy the source's tokenizer.json there again")
            continue
        if (folder.parent / "serving" / "keyed.py").is_file() and not found.is_exact:
            cause = "its decoder looks at neighbouring tokens, and a streamed piece does not have them"
            yield finding("TK136", place, cause, "serve without streaming, or compare streamed with whole answers")
        yield from _ids(model, folder, place, found)
        yield from _chat(model, folder, place, found)


@functools.lru_cache(maxsize=64)  # repositories hold the same file in several models
def _read(data: bytes) -> Tokenizer:
    from tokenizers import Tokenizer as Loaded

    from trtkit.repository.models.serving.text import is_exact

    try:
        tokenizer = Loaded.from_buffer(data)
    except Exception as error:  # the library raises no more special type
        return Tokenizer(problem=" ".join(str(error).split()))
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    return Tokenizer(
        is_exact=is_exact(json.loads(tokenizer.to_str())),
        highest=max(vocabulary.values(), default=-1),
        starts=tuple(tokenizer.encode("").tokens),
        is_chat=not _CHAT_TOKENS.isdisjoint(vocabulary),
    )


def highest_ids(repository: Path) -> Iterator[tuple[str, int]]:
    """The tokenizers inside a repository, and the highest id that each can give."""
    for file in sorted(repository.glob("*/*/*/tokenizer.json")):
        if not (found := _read(file.read_bytes())).problem:
            yield file.relative_to(repository).as_posix(), found.highest


def _ids(model: Model, folder: Path, place: str, found: Tokenizer) -> Iterator[Finding]:
    limit = model.parameters.get("vocab_size", "")
    if limit.isdecimal() and found.highest >= int(limit):
        cause = f"it gives ids up to {found.highest}, and the model has {limit} of them"
        yield finding("TK211", place, cause, "use the tokenizer of the source that the model was made of")
    if "end_ids" not in model.parameters:
        return
    wanted = _json(folder / "generation_config.json").get("eos_token_id")
    wanted = wanted if isinstance(wanted, list) else [wanted]
    given = {part.strip() for part in model.parameters["end_ids"].split(",")}
    missing = [str(item) for item in wanted if type(item) is int and str(item) not in given]
    if missing:
        cause = f"end_ids lacks {', '.join(missing)} of generation_config.json, so answers run on behind it"
        fix = f"write {','.join(str(item) for item in wanted if item is not None)}"
        yield finding("TK212", model.place("end_ids"), cause, fix)


def _chat(model: Model, folder: Path, place: str, found: Tokenizer) -> Iterator[Finding]:
    """Whether chat messages have a template, and whether it writes what the tokenizer adds by itself."""
    messages = next((tensor for tensor in model.config.input if tensor.name == "messages"), None)
    template = _chat_template(folder)
    # A base model has no template, and where messages are optional nobody may want to send any.
    if messages is not None and template is None and (found.is_chat or not messages.optional):
        fix = "copy chat_template.jinja or tokenizer_config.json of the source there"
        cause = "the model takes `messages`, and the tokenizer has no chat template"
        yield finding("TK213", place.replace("tokenizer.json", "tokenizer_config.json"), cause, fix)
    adds = model.parameters.get("add_special_tokens", "").lower() in ("true", "1")
    chats_elsewhere = (model.path.parent / serving_contract.MODEL / "config.pbtxt").is_file()  # which adds none
    if template and adds and messages is None and not chats_elsewhere and _writes(template, folder, found.starts):
        cause = f"the chat template writes {found.starts[0]}, and add_special_tokens adds it once more"
        fix = "set add_special_tokens to false when prompts come from the chat template"
        yield finding("TK214", model.place("add_special_tokens"), cause, fix)


def _chat_template(folder: Path) -> str | None:
    """The text of the chat template, where transformers looks for it: a file of its own, else tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8", errors="replace")
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = _json(folder / name).get("chat_template")
        if isinstance(template, list):  # several by name
            template = next((item.get("template") for item in template if isinstance(item, dict)), None)
        if isinstance(template, str):
            return template
    return None


def _writes(template: str, folder: Path, starts: tuple[str, ...]) -> bool:
    """Whether the template begins with the token that the tokenizer puts in front: by name, or as a text."""
    if not starts:
        return False
    bos = _json(folder / "tokenizer_config.json").get("bos_token")
    bos = bos.get("content") if isinstance(bos, dict) else bos
    named = bos == starts[0] and re.search(r"\{\{-?\s*bos_token\b|\+\s*bos_token\b|\bbos_token\s*\+", template)
    return bool(named) or starts[0] in template


def _json(file: Path) -> dict[str, Any]:
    """A JSON object; empty when the file is not there or holds something else, which other rules and verbs say."""
    try:
        data = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}
