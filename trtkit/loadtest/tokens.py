"""Counting tokens with a model's own tokenizer, from a local folder and without a network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trtkit.errors import InputError


def token_counter(folder: str | Path) -> Callable[[str], int]:
    """A function that counts the tokens of a text, without special tokens.

    Args:
        folder: where `tokenizer.json` lies, or that file.

    Raises:
        InputError: there is no such file, or it is not a tokenizer.
    """
    from tokenizers import Tokenizer

    path, fix = Path(folder), "give the folder that holds the model's tokenizer.json"
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"{path}: no such file", fix)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{path}: not a tokenizer: {error}", fix) from None
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)
