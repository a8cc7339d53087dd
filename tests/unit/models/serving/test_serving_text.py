"""Streams of tokens read as the Hugging Face tokenizer reads the whole answer, for every family and any way of cutting.

The expected text always comes from `tokenizers` itself. Vocabularies are small and mean: halves of characters, byte
tokens that fit together by chance, spaces in the middle of tokens, added tokens that no decoder spells.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import LIBRARIES, LOSSLESS, TABLE, TRAINED
from tokenizers import Tokenizer as Library
from tokenizers import pre_tokenizers

from trtkit.repository.models.serving.decoding import alphabet_bytes, byte_alphabet
from trtkit.repository.models.serving.streams import RedecodedStream
from trtkit.repository.models.serving.tables import Vocabulary
from trtkit.repository.models.serving.text import BYTE_RUN, TextStream, Tokenizer, is_exact

READERS = {
    (family, skip): Tokenizer(LIBRARIES[family], skip_special_tokens=skip)
    for family in LIBRARIES
    for skip in (False, True)
}


def expected(library: Library, ids: Sequence[int], skip: bool = True) -> str:
    """The library's text. Ids that it does not know are nothing to it; negative and huge ones it does not even take."""
    known = [number for number in ids if 0 <= number < library.get_vocab_size()]
    if skip:
        known = [number for number in known if library.id_to_token(number) not in ("<s>", "</s>")]
    # BPEDecoder of the library crashes without tokens.
    return str(library.decode(known, skip_special_tokens=skip)) if known else ""


def streamed(stream: TextStream, ids: Sequence[int], cuts: random.Random) -> str:
    """The text of `ids` pushed in pieces of 0 to 3."""
    texts, at = [], 0
    while at < len(ids):
        size = cuts.randint(0, 3)
        texts.append(stream.push(ids[at : at + size]))
        at += size
    return "".join([*texts, stream.finish()])


IDS = st.lists(st.one_of(st.integers(-1, 40), st.just(10**12)), max_size=24)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("family", LIBRARIES)
@settings(deadline=None, max_examples=50)
@given(ids=IDS, seed=st.integers(0, 2**32))
def test_any_tokens_in_any_split_read_as_the_library_reads_them(
    family: str, skip: bool, ids: list[int], seed: int
) -> None:
    reader = READERS[family, skip]
    whole = expected(LIBRARIES[family], ids, skip)
    assert reader.text(ids) == whole
    assert streamed(reader.stream(), ids, random.Random(seed)) == whole


@pytest.mark.parametrize("family", LIBRARIES)
@settings(deadline=None, max_examples=50)
@given(prompt=IDS, answer=IDS, seed=st.integers(0, 2**32))
def test_an_answer_adds_to_its_prompt_what_the_library_says(
    family: str, prompt: list[int], answer: list[int], seed: int
) -> None:
    library, reader = LIBRARIES[family], READERS[family, True]
    before, whole = expected(library, prompt), expected(library, [*prompt, *answer])
    if not reader.exact or not whole.startswith(before) or "\ufffd" in whole:
        return  # the answer completes or spoils a character of the prompt, which no text behind the prompt can say
    assert before + streamed(reader.stream(prompt), answer, random.Random(seed)) == whole
    assert before + reader.text(answer, prompt) == whole


HARD = [
    "👨‍👩‍👧‍👦 and 🏴󠁧󠁢󠁥󠁮󠁧󠁿 🇨🇭 👍🏽",
    "漢字とかな。  two  spaces\n\n\ttab \r\n end ",
    "e\u0301 a\u0308\u0323 क्षि ราชบุรี မြန်မာ",
    "مرحبا بالعالم שלום עולם \u200f\u202eabc",
    "\x00\x7f\ufeff\ufffd \U0010ffff",
    " leading, trailing ",
]


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("text", HARD)
def test_no_character_is_garbled_token_by_token(kind: str, text: str) -> None:
    library = TRAINED[kind]
    ids = library.encode(text, add_special_tokens=False).ids
    stream = Tokenizer(library).stream()
    pieces = [*(stream.push([number]) for number in ids), stream.finish()]
    assert "".join(pieces) == library.decode(ids)
    if kind in LOSSLESS:
        assert "".join(pieces) == text
        assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")


@pytest.mark.parametrize("kind", LOSSLESS)
@settings(deadline=None)
@given(text=st.text(max_size=40), cut=st.integers(0, 200), seed=st.integers(0, 2**32))
def test_an_answer_cut_anywhere_reads_as_the_library_reads_it(kind: str, text: str, cut: int, seed: int) -> None:
    library = TRAINED[kind]
    ids = library.encode(text, add_special_tokens=False).ids[:cut]
    reader = Tokenizer(library, byte_run=1000)
    assert streamed(reader.stream(), ids, random.Random(seed)) == reader.text(ids) == library.decode(ids)


@pytest.mark.parametrize(
    ("family", "tokens", "texts"),
    [
        # the rest of a character comes, does not come, or was never begun
        ("byte level", ["æ", "¼", "¢", "Ġ."], ["", "", "漢", " .", ""]),
        ("byte level", ["ðŁĺ", "Ġ."], ["", "\ufffd .", ""]),
        ("byte level", ["¼", "ÿ", "ðŁĺ"], ["\ufffd", "\ufffd", "", "\ufffd"]),
        ("llama 2, mistral", ["▁", "▁a", "▁a"], ["", " a", " a", ""]),
        ("llama 2, mistral", ["▁a", "<0xE6>", "<0xBC>", "a"], ["a", "", "", "\ufffd\ufffda", ""]),
        ("llama 2, mistral", ["<0x41>", "<0xE6>"], ["", "", "\ufffd\ufffd"]),
        ("llama 2, mistral", ["<0x0A>", "<s>", "<0x0A>", "a"], ["", "", "", "\n\na", ""]),
        ("metaspace, always", ["<s>", "▁a", "▁a"], ["", "a", " a", ""]),
        ("metaspace, never", ["▁a", "▁a"], [" a", " a", ""]),
        ("word piece", ["play", "##ing", "!", "n't"], ["play", "ing", "!", "n't", ""]),
        ("suffixes", ["a</w>", "b", "c</w>"], ["", "a", " b", "c"]),
    ],
)
def test_what_goes_out_when(family: str, tokens: list[str], texts: list[str]) -> None:
    stream = READERS[family, True].stream()
    ids = [LIBRARIES[family].token_to_id(token) for token in tokens]
    assert [*(stream.push([number]) for number in ids), stream.finish()] == texts


def test_the_space_in_front_depends_on_the_prompt() -> None:
    reader, library = READERS["llama 2, mistral", True], LIBRARIES["llama 2, mistral"]
    space, bos, word = (library.token_to_id(token) for token in ("▁a", "<s>", "é"))
    assert reader.text([space]) == "a"  # a text of its own, as in a chat
    assert reader.text([space], prompt=[bos]) == "a"  # a prompt without text
    assert reader.text([space], prompt=[bos, word]) == " a"
    assert reader.text([space], continues=True) == " a"


def test_without_waiting_for_runs_only_wrong_bytes_are_replaced() -> None:
    library = LIBRARIES["gemma"]
    ids = [library.token_to_id(token) for token in ("<0xE6>", "<0xBC>", "<0xA2>", "<0x0A>", "<0xE6>", "<0xBC>", "é")]
    at_once = Tokenizer(library, byte_run=0).stream()
    assert [at_once.push([number]) for number in ids] == ["", "", "漢", "\n", "", "", "\ufffd\ufffdé"]
    assert library.decode(ids) == "\ufffd" * 6 + "é" == READERS["gemma", True].text(ids)


@pytest.mark.parametrize(("byte_run", "text"), [(BYTE_RUN, "\ufffd\ufffd\ufffdé\né"), (0, "\ufffd\n\né\né")])
def test_a_wrong_byte_spoils_what_waits_and_what_follows(byte_run: int, text: str) -> None:
    library = LIBRARIES["gemma"]
    ids = [library.token_to_id(token) for token in ("<0xE6>", "<0x0A>", "<0x0A>", "é", "<0x0A>", "é")]
    stream = Tokenizer(library, byte_run=byte_run).stream()
    pieces = [*(stream.push([number]) for number in ids), stream.finish()]
    assert "".join(pieces) == text


def test_a_run_waits_no_longer_than_it_may() -> None:
    library, reader = LIBRARIES["gemma"], READERS["gemma", True]
    character = [library.token_to_id(token) for token in ("<0xE6>", "<0xBC>", "<0xA2>")]
    stream = reader.stream()
    lengths = [len(stream.push([number])) for number in character * 20]
    first_out = next(place for place, length in enumerate(lengths) if length)
    assert first_out == BYTE_RUN
    assert sum(lengths) == 20
    wrong = [*character[1:], *character * 20]
    assert reader.text(wrong) == library.decode(wrong) == "\ufffd" * 62  # known to be wrong when it waits no longer
    broken = [*character * 20, library.token_to_id("<0xFF>")]
    assert reader.text(broken) == "漢" * 20 + "\ufffd"  # where the library throws twenty characters away


@pytest.mark.parametrize("family", LIBRARIES)
def test_a_stream_stays_small(family: str) -> None:
    stream = READERS[family, True].stream()
    order = random.Random(0)
    for _ in range(3000):
        stream.push([order.randrange(LIBRARIES[family].get_vocab_size())])
    names = type(stream).__slots__
    held = [getattr(stream, name) for name in names if name not in ("_plain", "_tables", "_vocabulary")]
    # The window's ids apart, everything is a flag, a few bytes, or the text of a few tokens.
    assert sys.getsizeof(stream) + sum(map(sys.getsizeof, held)) < 1024 + 8 * 4 * RedecodedStream.WINDOW


def test_arrays_of_an_engine_will_do() -> None:
    library = TRAINED["byte level"]
    ids = library.encode(HARD[0], add_special_tokens=False).ids
    stream = Tokenizer(library).stream()
    array = np.array(ids, dtype=np.int32)
    assert "".join([*(stream.push(array[at : at + 1]) for at in range(len(ids))), stream.finish()]) == HARD[0]


def test_prompts_are_encoded_together_without_padding_or_truncation() -> None:
    library = Library.from_str(TRAINED["byte level"].to_str())
    texts = ["The quick fox", "", "a" * 100]
    plain = [library.encode(text, add_special_tokens=False).ids for text in texts]
    library.enable_padding(length=64)
    library.enable_truncation(8)
    bos = library.token_to_id("<s>")
    reader = Tokenizer(library)
    assert reader.encode(texts) == [[bos, *ids] for ids in plain]
    assert reader.encode(texts, add_special_tokens=False) == plain
    assert Tokenizer(library, add_special_tokens=False).encode(texts) == plain


def test_words_as_they_start_a_text_and_inside_of_one() -> None:
    library = TRAINED["byte fallback"]
    reader = Tokenizer(library)
    newline, space = library.token_to_id("<0x0A>"), library.token_to_id("▁")
    assert reader.word("\n") == [[space, newline], [newline]]
    assert Tokenizer(TRAINED["byte level"]).word("dog") == [
        TRAINED["byte level"].encode("dog", add_special_tokens=False).ids
    ]
    assert reader.word("") == []


@pytest.mark.parametrize("family", LIBRARIES)
def test_it_says_where_tokens_have_no_text_of_their_own(family: str) -> None:
    document = json.loads(LIBRARIES[family].to_str())
    assert READERS[family, True].exact == is_exact(document) == (family in TABLE)


@pytest.mark.parametrize(
    ("name", "exact"),
    [
        ("LlamaTokenizer", True),
        ("GemmaTokenizer", True),
        ("Qwen2Tokenizer", True),
        ("CohereTokenizer", True),
        ("T5Tokenizer", True),
        ("XLMRobertaTokenizer", True),
        ("SeamlessM4TTokenizer", True),
        ("BertTokenizer", True),
        ("OpenAIGPTTokenizer", False),
    ],
)
def test_decoders_that_transformers_builds(name: str, exact: bool) -> None:
    import transformers

    library = getattr(transformers, name)().backend_tokenizer
    assert is_exact(json.loads(library.to_str())) == exact


def test_the_byte_alphabet_is_the_librarys() -> None:
    assert set(byte_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_alphabet().values()) == list(range(256))
    assert (alphabet_bytes("Ġé"), alphabet_bytes("Ġ漢")) == (b" \xe9", "Ġ漢".encode())


def test_a_folder(tmp_path: Path) -> None:
    TRAINED["byte level"].save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path).text(Tokenizer(tmp_path).encode(["The 漢 dog"])[0]) == "The 漢 dog"


def test_a_folder_of_an_older_tokenizer_is_converted(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing"]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    reader = Tokenizer(tmp_path)
    assert reader.text(reader.encode(["playing"])[0]) == "playing"


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_folder_without_a_tokenizer_is_one_line(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json") as caught:
        Tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_remembered_of_clients_words_is_bounded() -> None:
    reader = Tokenizer(TRAINED["byte level"])
    for number in range(5000):
        reader.word(f"w{number}")
    assert len(reader._words) <= 4096


def test_the_vocabulary_can_be_asked() -> None:
    library = LIBRARIES["gemma"]
    vocabulary = Vocabulary(library, skip_special_tokens=True)
    assert vocabulary.token(library.token_to_id("</s>")) == "</s>"
    assert [vocabulary.token(number) for number in (-1, 10_000, 1 << 40)] == [None, None, None]
