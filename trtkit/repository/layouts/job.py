"""What a layout is given, and what it gives: files as data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from trtkit import releases
from trtkit.config import BuildConfig
from trtkit.errors import InputError
from trtkit.hf import eos_token_ids

Content = bytes | str | Path
"""A file's content; a path stands for a file of this machine that is copied when the repository is written."""

Files = dict[str, Content]
"""Content by path inside the repository, with `/` between folders."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Job:
    """One repository to render.

    Attributes:
        tokenizer_dir: folder with tokenizer.json on this machine.
        model_path: where the server will find the checkpoint or engine, or a hub id (llmapi, vllm).
        logits_dtype: dtype of the engine's logits.
        repository_path: where the server will find the repository; None when nobody said so.
        is_hub_id: `model_path` is no path but a model of the hub, which the server downloads.
    """

    config: BuildConfig
    tokenizer_dir: Path
    model_path: str
    logits_dtype: str = "FP32"
    repository_path: str | None = None
    is_hub_id: bool = False

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        return tuple(eos_token_ids(self.tokenizer_dir))

    @cached_property
    def tensorrt_llm(self) -> str:
        """The TensorRT-LLM version in the release's container."""
        return releases.get(self.config.deploy.release).tensorrt_llm


def tokenizer_json(folder: Path) -> bytes:
    """The tokenizer, or an InputError that says how to make one."""
    try:
        return (folder / "tokenizer.json").read_bytes()
    except OSError as error:
        raise InputError(
            f"{folder} has no readable tokenizer.json: {error.strerror}",
            'write one: python -c "from transformers import AutoTokenizer as A; '
            f"A.from_pretrained('{folder}').save_pretrained('{folder}')\"",
        ) from error


def pad_id(folder: Path, end_ids: tuple[int, ...]) -> int:
    """The padding id that the source names, else the first end id, else 0. Only lengths give padding a meaning."""
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        try:
            value = json.loads(file.read_text(encoding="utf-8")).get("pad_token_id") if file.is_file() else None
        except (ValueError, AttributeError) as error:
            raise InputError(f"{file} is not a JSON object: {error}", "copy it from the source again") from error
        if isinstance(value, int) and value >= 0:
            return value
    return end_ids[0] if end_ids else 0


def flag(value: bool) -> str:
    """A boolean as backend parameters spell it."""
    return "true" if value else "false"


def json_text(value: object) -> str:
    """JSON as it is written into a repository: equal values give equal text."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
