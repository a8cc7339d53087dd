"""Prompts to tokens, and tokens to text piece by piece, so that the pieces of a stream add up to the text of the whole.

Whatever way an answer is cut into pieces, their texts and `finish()` add up to `text()` of all tokens, and that is what
the Hugging Face tokenizer decodes, byte for byte. So a piece holds only what no later token can change:
- bytes of a character that is not complete wait for the rest of it;
- the decoder for sentencepiece's byte tokens (<0xE6>) judges a run of them as a whole: one wrong byte turns every byte
  of the run into U+FFFD, complete characters too. So a run waits for its end, but at most `byte_run` bytes; after that
  each character goes out when it is complete, and only wrong bytes become U+FFFD. (So a run that turns out wrong behind
  that many good bytes is the one case where the text differs, by the characters that the tokenizer throws away.)

By itself an answer is a text of its own, as in a chat: " Hello" written by a sentencepiece model loses the space that
its tokenizer puts in front of every text. An answer that continues a prompt keeps it: name the prompt's tokens, and the
answer's text is what it adds to the prompt's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .decoding import rules
from .streams import RedecodedStream, TableStream, TextStream
from .tables import Tables, Vocabulary

__all__ = ["TextStream", "Tokenizer", "is_exact"]

BYTE_RUN = 32
"""Bytes of a run that wait for its end. The longest emoji in use, a flag of a region, takes 28."""

_ANCHOR = "a"
"""Text in front of a word, to see how the tokenizer writes the word in the middle of a text."""


class Tokenizer:
    """The tokenizer of a model folder, for many streams at once.

    Args:
        source: a folder with tokenizer.json (without one, transformers converts what there is; code of the folder never
            runs), or a `tokenizers.Tokenizer`.
        add_special_tokens: let the tokenizer add its begin-of-sequence token to prompts (never to words).
        skip_special_tokens: special tokens have no text.
        byte_run: bytes of byte tokens that wait for the end of their run, see above. 0: nothing waits but a character
            that is not complete, for a server that is never told when an answer has ended.

    Raises:
        ValueError: the folder holds no tokenizer that can be read.
    """

    def __init__(
        self,
        source: Path | Any,
        *,
        add_special_tokens: bool = True,
        skip_special_tokens: bool = True,
        byte_run: int = BYTE_RUN,
    ) -> None:
        library = _open(source) if isinstance(source, Path) else source
        # What the folder says about padding and truncation is for training; here it would change prompts silently.
        library.no_padding()
        library.no_truncation()
        self._library = library
        self._add_special_tokens = add_special_tokens
        self._words: dict[str, list[list[int]]] = {}
        self._eager = not byte_run
        found = rules(json.loads(library.to_str()).get("decoder"))
        self._vocabulary = Vocabulary(library, skip_special_tokens=skip_special_tokens)
        self._tables: Tables | None = None
        if found is not None:
            self._tables = Tables(library, found, skip_special_tokens=skip_special_tokens, byte_run=byte_run)

    @property
    def exact(self) -> bool:
        """Whether every token has a text of its own. If not, text is decoded again as it grows, slower and late."""
        return self._tables is not None

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool | None = None) -> list[list[int]]:
        """Token ids of each text. One call for many texts lets the library use every core."""
        special = self._add_special_tokens if add_special_tokens is None else add_special_tokens
        # The fast one counts no offsets; tokenizers has it from 0.20 on.
        encode = getattr(self._library, "encode_batch_fast", self._library.encode_batch)
        encodings = encode(list(texts), add_special_tokens=special)
        return [encoding.ids for encoding in encodings]

    def word(self, text: str) -> list[list[int]]:
        """The token sequences under which a stop or bad word appears: at the start of a text and inside of one.

        They are often the same. A sentencepiece tokenizer puts a space in front of a lone text, so that a lone line
        break is two tokens and would never match the one token that a model writes.
        """
        found = self._words.get(text)
        if found is None:
            anchor, alone, inside = self.encode([_ANCHOR, text, _ANCHOR + text], add_special_tokens=False)
            found = [alone] if alone else []
            cut = len(anchor)
            if inside[:cut] == anchor and len(inside) > cut and inside[cut:] != alone:
                found.append(inside[cut:])
            if len(self._words) >= 4096:  # words come from clients, so what is remembered is bounded
                self._words.clear()
            self._words[text] = found
        return found

    def stream(self, prompt: Sequence[int] = (), *, continues: bool = False) -> TextStream:
        """A stream for one answer.

        Args:
            prompt: tokens before the answer, if its text continues theirs.
            continues: there is such a prompt, but its tokens are not known here.
        """
        if self._tables is None:
            return RedecodedStream(self._vocabulary, prompt, eager=self._eager)
        stream = TableStream(self._tables, continues)
        if prompt and not continues:
            stream.follow(prompt)
        return stream

    def plain(self, ids: Sequence[int]) -> str | None:
        """What tokens add to a text of which nothing is held, where that is known at once; else None: ask a stream."""
        return None if self._tables is None else self._tables.plain_text(ids)

    def text(self, ids: Sequence[int], prompt: Sequence[int] = (), *, continues: bool = False) -> str:
        """The text of a whole answer; arguments as in `stream`."""
        stream = self.stream(prompt, continues=continues)
        return stream.push(ids) + stream.finish()


def is_exact(tokenizer_json: Mapping[str, Any]) -> bool:
    """Whether each token of this tokenizer.json has a text of its own (see `Tokenizer.exact`)."""
    return rules(tokenizer_json.get("decoder")) is not None


def _open(folder: Path) -> Any:
    """The `tokenizers.Tokenizer` of a model folder."""
    from tokenizers import Tokenizer as Library

    file = folder / "tokenizer.json"
    try:
        if file.is_file():
            return Library.from_file(str(file))
        from transformers import AutoTokenizer

        converted = AutoTokenizer.from_pretrained(str(folder), use_fast=True, trust_remote_code=False)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file}: no tokenizer can be read: {' '.join(str(error).split())[:300]}") from error
    library = getattr(converted, "backend_tokenizer", None)
    if library is None:
        raise ValueError(f"{file} is missing and {type(converted).__name__} has no fast form; convert the tokenizer")
    return library
