"""Text as windows of tokens: what calibration runs through a model, and what held-out perplexity is measured on.

Documents are joined with the tokenizer's end-of-text token and cut into windows of exactly the asked length. Nothing is
padded, so no padding enters a statistic, and no token of the text is in two windows. A tokenizer that puts tokens in
front of every text (a beginning-of-sequence token, mostly) has them at the start of every window, as every request in
service has: activations there are unlike those anywhere else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trtkit.errors import InputError
from trtkit.hf import eos_token_ids
from trtkit.quantize.documents import Document, open_documents
from trtkit.untrusted import open_plain, printable, read_json

Tokens = npt.NDArray[np.int64]

SAMPLES = 128
LENGTH = 512

_POOL = 4.0
"""Of a file or dataset so many times the needed tokens are read, where there are as many; windows are drawn of them."""
_BUILTIN_POOL = 1.0
"""Of the built-in text just what is needed, so that ours is in it: with every seed it comes in another order, between
other pieces of the library, so the draws differ anyway."""

_POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
_SHORT_FIX = "give more text, or fewer or shorter samples"


@dataclass(frozen=True)
class Calibration:
    """Token windows and where they are from.

    Attributes:
        tokens: int64 (samples, length): token ids, all below the vocabulary size.
        origin: the text, for reports.
        digest: sha256, hexadecimal, of the tokens and of samples, length and seed.
        counts: `tokens` (samples x length), `documents` and `text_tokens` that were read, `windows` that they made and
            the samples were drawn from, `prefix` tokens in front of every window.
    """

    tokens: Tokens
    origin: str
    digest: str
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def length(self) -> int:
        return int(self.tokens.shape[1])


def load_tokens(
    tokenizer_folder: str | Path,
    text: str | Path | None = None,
    *,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    held_out: bool = False,
) -> Calibration:
    """Windows of tokens of a text, drawn by `seed`.

    Args:
        tokenizer_folder: a source: its tokenizer, and its config.json for the vocabulary size and the longest window.
            Ready token ids need only config.json.
        text: None is the built-in text (`trtkit.quantize.builtin_text`). A file: `.txt` is one document, `.jsonl` has
            one object per line with `text`, or `messages` for the chat template, `.parquet` has such columns, `.npy`
            holds ready token ids, integers (samples, length). Else `owner/name[/subset][@revision][:split]`, a dataset
            of the hub with such columns, of which the beginning is read. Parquet and the hub need the extra
            `calibration`.
        samples, length: windows, and tokens in each; by default 128 x 512 (fewer where the model has fewer positions),
            of a `.npy` all that it has.
        seed: draws the windows, and of the built-in text what goes into them.
        held_out: the built-in text for measuring instead of the one for calibration. Other texts are taken as they are.

    Raises:
        InputError: the text is missing, damaged or too short (says how many tokens there are and are needed), a token
            id is outside the vocabulary, or a window is longer than the model's positions.
        LacksError: an extra is missing, or the hub cannot be reached.
    """
    folder = Path(tokenizer_folder)
    for name, value in (("samples", samples), ("length", length)):
        if value is not None and value < (2 if name == "length" else 1):
            raise InputError(f"{name} is {value}", "calibrate with at least 1 sample of 2 tokens")
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    if text is not None and Path(text).suffix == ".npy":
        drawn, origin, counts = _ready(Path(text).expanduser(), samples, length, seed)
    else:
        samples, length = samples or SAMPLES, length or min(LENGTH, _positions(config) or LENGTH)
        _check_length(length, config, folder)
        tokenizer = _Tokenizer(folder)
        drawn, origin, counts = _drawn(tokenizer, text, samples, length, seed, held_out)
        config = {"vocab_size": len(tokenizer), **config}
    _check_length(drawn.shape[1], config, folder)
    _check_vocabulary(drawn, config, folder)
    return Calibration(drawn, origin, _digest(drawn, seed), {"tokens": drawn.size, **counts})


def cut_windows(documents: Iterable[Sequence[int]], length: int, *, prefix: Sequence[int] = ()) -> Tokens:
    """Token lists, one after the other, as int64 (windows, length). Each window is `prefix` and the next tokens; what
    is left over at the end, too little for a window, is not used.

    Raises:
        InputError: a window has no room for text behind the prefix.
    """
    room = length - len(prefix)
    if room < 1:
        cause = f"a window of {length} tokens has no room for text behind {len(prefix)} that the tokenizer puts first"
        raise InputError(cause, "ask for longer samples")
    parts = [np.asarray(document, dtype=np.int64) for document in documents]
    stream = np.concatenate(parts) if parts else np.empty(0, np.int64)
    count = len(stream) // room
    body = stream[: count * room].reshape(count, room)
    return np.concatenate([np.tile(np.asarray(prefix, dtype=np.int64), (count, 1)), body], axis=1)


def draw_order(count: int, seed: int) -> list[int]:
    """0 to `count` - 1 in an order that depends on the seed alone, not on the version of a random generator."""
    return sorted(range(count), key=lambda index: hashlib.sha256(f"{seed}:{index}".encode()).digest())


def _drawn(
    tokenizer: _Tokenizer, text: str | Path | None, samples: int, length: int, seed: int, held_out: bool
) -> tuple[Tokens, str, dict[str, int]]:
    """The windows, their origin and the counts of what was read."""
    prefix = tokenizer.prefix
    needed = samples * max(length - len(prefix), 1)
    wanted = int(needed * (_BUILTIN_POOL if text is None else _POOL))
    documents = open_documents(text, tokens=wanted, seed=seed, held_out=held_out)
    lists: list[Sequence[int]] = []
    read, ended = 0, 0
    for document in documents.items:
        ids = tokenizer.encode(document)
        if document.ends:
            ids = [*ids, *tokenizer.end]
            ended += 1
        lists.append(ids)
        read += len(ids)
        if read >= wanted:
            break
    windows = cut_windows(lists, length, prefix=prefix)
    if len(windows) < samples:
        place = "the built-in text" if text is None else printable(text)
        cause = f"{place} has {read:,} tokens; {samples} samples of {length} need {needed:,}"
        raise InputError(cause, _SHORT_FIX)
    counts = {"documents": max(ended, 1), "text_tokens": read, "windows": len(windows), "prefix": len(prefix)}
    return windows[draw_order(len(windows), seed)[:samples]], documents.origin, counts


def _ready(file: Path, samples: int | None, length: int | None, seed: int) -> tuple[Tokens, str, dict[str, int]]:
    """Token ids of a .npy file: the drawn rows, and the first `length` of each."""
    with open_plain(file) as opened:
        try:
            ids: Any = np.load(opened, allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            reason = printable(error, 200)
            raise InputError(f"{file}: not a readable .npy file ({reason})", "write it with numpy.save") from error
    whole = isinstance(ids, np.ndarray) and ids.ndim == 2 and np.issubdtype(ids.dtype, np.integer) and ids.size
    if not whole:  # an archive of arrays has neither dtype nor shape
        found = f"{ids.dtype} of shape {list(ids.shape)}" if isinstance(ids, np.ndarray) else "an archive of arrays"
        raise InputError(f"{file}: {found} is not token ids", "save integers of shape (samples, length)")
    rows, columns = ids.shape
    if rows < (samples or 1) or columns < (length or 2):
        cause = f"{file} holds {rows} x {columns} tokens; {samples or rows} samples of {length or 2} are asked for"
        raise InputError(cause, _SHORT_FIX)
    if ids.dtype == np.uint64 and ids.max() > np.iinfo(np.int64).max:
        raise InputError(f"{file}: {ids.max()} is no token id", "save the ids that the tokenizer makes")
    drawn = ids[draw_order(rows, seed)[: samples or rows], : length or columns].astype(np.int64)
    return drawn, f"file:{file.absolute()}", {"windows": rows, "prefix": 0}


def _check_length(length: int, config: dict[str, Any], folder: Path) -> None:
    limit = _positions(config)
    if limit is not None and length > limit:
        raise InputError(
            f"samples of {length} tokens are longer than the {limit} positions of {folder}", f"ask for {limit} or fewer"
        )


def _positions(config: dict[str, Any]) -> int | None:
    return next((value for key in _POSITIONS if type(value := config.get(key)) is int and value > 0), None)


def _check_vocabulary(tokens: Tokens, config: dict[str, Any], folder: Path) -> None:
    size = config.get("vocab_size")
    if type(size) is not int or size < 1:
        raise InputError(f"{folder}: config.json has no vocab_size to check token ids with", "give a source's folder")
    lowest, highest = int(tokens.min()), int(tokens.max())
    if lowest < 0 or highest >= size:
        wrong = lowest if lowest < 0 else highest
        raise InputError(
            f"token id {wrong} is outside of the vocabulary of {folder} ({size:,} tokens)",
            "use the tokenizer that belongs to the model",
        )


def _digest(tokens: Tokens, seed: int) -> str:
    settings = {"samples": tokens.shape[0], "length": tokens.shape[1], "seed": seed}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(np.ascontiguousarray(tokens, dtype="<i8").tobytes())
    return digest.hexdigest()


class _Tokenizer:
    """A source's tokenizer, without any code of the source.

    Attributes:
        prefix: what it puts in front of every text.
        end: the end-of-text token; nothing where the model has none.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.folder = folder
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = printable((str(error).strip() or type(error).__name__).splitlines()[0], 200)
            cause = f"{folder}: transformers cannot load the tokenizer: {reason}"
            raise InputError(cause, "check the folder") from error
        bare, whole = self._encode("a"), self._encode("a", special=True)
        starts = [at for at in range(len(whole)) if whole[at : at + len(bare)] == bare]
        self.prefix = whole[: starts[0]] if starts else []
        end = self._tokenizer.eos_token_id
        ends = [end] if end is not None else eos_token_ids(folder)
        self.end = [int(ends[0])] if ends else []

    def __len__(self) -> int:
        return len(self._tokenizer)

    def encode(self, document: Document) -> list[int]:
        """Tokens of a document alone: nothing is put around it."""
        if not document.messages:
            return self._encode(document.text)
        try:
            text = self._tokenizer.apply_chat_template(list(document.messages), tokenize=False)
        except Exception as error:  # a template is a program, and may complain in any way
            missing = getattr(self._tokenizer, "chat_template", None) is None
            reason = "the tokenizer has no chat template" if missing else printable(" ".join(str(error).split()), 200)
            cause = f"{document.place}: 'messages' cannot become text: {reason}"
            raise InputError(cause, "give the text itself, as 'text'") from error
        return self._encode(str(text))

    def _encode(self, text: str, *, special: bool = False) -> list[int]:
        # Not verbose: it would warn of texts longer than the model's context, which are cut here anyway.
        ids = self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return [int(token) for token in ids]
