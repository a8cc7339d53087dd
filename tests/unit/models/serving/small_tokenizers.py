"""Tokenizers of every family with small and mean vocabularies, made here: LIBRARIES token by token, TRAINED on text."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library

BYTE_LEVEL = [
    "Ġhello",
    "Ġ",
    "Ã",
    "©",
    "ðŁĺ",
    "Ģ",
    "ð",
    "æ",
    "¼",
    "¢",
    "í",
    "ł",
    "Ġ.",
    "é<x>",
    "漢",
    "ÿ",
    "Ċ",
    "▁x",
    "Ù",
    "ħ",
]
BYTES = [f"<0x{byte:02X}>" for byte in (0x0A, 0x20, 0x41, 0xE6, 0xBC, 0xA2, 0xFF, 0xF0, 0x9F, 0x98, 0x80, 0xED, 0xA0)]
PIECES = ["▁", "▁a", "a", "b▁", "▁▁", "<0x+A>", "<0xG0>", "漢", "é", "", " ", "\u200d", "\u0301", "م", *BYTES]
WORDS = ["play", "##ing", ".", "##.", "n't", "'", "!", "do not", " ", "##", "'s", "漢"]
SUFFIXED = ["a</w>", "b", "c</w>", "</w>", "d</w>e", "x"]

_D = decoders
REPLACE = _D.Replace("▁", " ")
TABLE: dict[str, tuple[list[str], Any]] = {
    "byte level": (BYTE_LEVEL, _D.ByteLevel()),
    "byte level, stripped": (BYTE_LEVEL, _D.Sequence([_D.ByteLevel(), _D.Fuse(), _D.Strip(" ", 2, 0)])),
    "llama 2, mistral": (PIECES, _D.Sequence([REPLACE, _D.ByteFallback(), _D.Fuse(), _D.Strip(" ", 1, 0)])),
    "gemma": (PIECES, _D.Sequence([REPLACE, _D.ByteFallback(), _D.Fuse()])),
    "nested": (PIECES, _D.Sequence([REPLACE, _D.Sequence([_D.ByteFallback()])])),
    "metaspace, always": (PIECES, _D.Metaspace(prepend_scheme="always")),
    "metaspace, first": (PIECES, _D.Metaspace(prepend_scheme="first")),
    "metaspace, never": (PIECES, _D.Metaspace(prepend_scheme="never")),
    "metaspace, bytes": (PIECES, _D.Sequence([_D.Metaspace(), _D.ByteFallback(), _D.Fuse()])),
    "word piece": (WORDS, _D.WordPiece()),
    "word piece as it is": (WORDS, _D.WordPiece(cleanup=False)),
    "no decoder": (WORDS, None),
    "pieces stripped": (PIECES, _D.Sequence([_D.Strip("a", 1, 0), _D.Fuse()])),
}
"""Families whose tokens have texts of their own."""
REDECODED: dict[str, tuple[list[str], Any]] = {
    "suffixes": (SUFFIXED, _D.BPEDecoder()),
    "ctc": (["a", "b", "<pad>", "|", "c", "'s"], _D.CTC()),
    "replaced when joined": (PIECES, _D.Sequence([_D.Fuse(), _D.Replace("▁a", "Q")])),
}


def build(family: str) -> Library:
    tokens, decoder = (TABLE | REDECODED)[family]
    vocabulary = {token: place for place, token in enumerate(dict.fromkeys(["<unk>", *tokens]))}
    library = Library(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106 - a token of text
    if decoder is not None:
        library.decoder = decoder
    library.add_special_tokens(["<s>", "</s>"])
    library.add_tokens([AddedToken("<tool é>"), AddedToken("[X]", lstrip=True, rstrip=True)])
    return library


LIBRARIES = {family: build(family) for family in TABLE | REDECODED}


def trained(kind: str) -> Library:
    """A tokenizer trained on the spot, with normalizer and decoder as its family has them."""
    corpus = [
        "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
        "Grüße aus Köln; ça va, naïve façade? Ελληνικά και кириллица.",
        "漢字とかな交じり文。天地玄黃宇宙洪荒。 emoji 🙂🚀",
    ] * 4
    if kind == "byte level":
        library = Library(models.BPE())
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    elif kind == "byte fallback":
        library = Library(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))  # noqa: S106 - no password
        library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        library.decoder = TABLE["llama 2, mistral"][1]
        all_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
        letters = [*map(chr, range(0x21, 0x7F)), "▁", "é"]
        trainer = trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=["<unk>", *all_bytes],
            limit_alphabet=len(letters),
            initial_alphabet=letters,
            show_progress=False,
        )
    else:
        library = Library(models.Unigram())
        library.pre_tokenizer = pre_tokenizers.Metaspace()
        library.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=200,
            special_tokens=["<unk>"],
            unk_token="<unk>",  # noqa: S106 - a token of text
            show_progress=False,
        )
    library.train_from_iterator(corpus, trainer)
    document = json.loads(library.to_str())
    document["added_tokens"] = []  # the trainer marks byte tokens as special, which they are not in real models
    library = Library.from_str(json.dumps(document))
    library.add_special_tokens(["<s>", "</s>"])
    bos = library.token_to_id("<s>")
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return library


TRAINED = {kind: trained(kind) for kind in ("byte level", "byte fallback", "unigram")}
LOSSLESS = ["byte level", "byte fallback"]
