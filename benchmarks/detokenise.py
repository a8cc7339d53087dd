"""CPU time of turning tokens into text one by one, against DecodeStream of `tokenizers` and decoding again and again.

    python benchmarks/detokenise.py

64 streams of a bit more than 300 tokens take turns, one token at a time, as a server sees them in the middle of a
batch. Per family the ways take turns too; figures are medians over rounds of CPU nanoseconds per token, in one thread,
loop included. "stop strings" is ours with three stop strings behind it. "decode again" is what transformers'
TextIteratorStreamer does: all tokens of the current line are decoded with each new one, and text goes out up to the
last space.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.decoders import DecodeStream

from trtkit.repository.models.serving.stops import StopStrings
from trtkit.repository.models.serving.text import Tokenizer as Ours

STREAMS, TOKENS, ROUNDS = 64, 300, 9
STOPS = ["\n\nUser:", "</answer>", "#!#"]
OTHERS = """
Ärger über große Füße in Köln; ça va, où est le façade naïve? Ελληνικά και кириллица, мир и дружба.
漢字とかな交じり文。天地玄黃宇宙洪荒。日月盈昃辰宿列張。寒來暑往秋收冬藏。 Emoji 🙂🚀 👨‍👩‍👧 and 👍🏽.
"""


def corpus() -> str:
    """Prose and code of this repository, and a line in five of something that is not ASCII."""
    root = Path(__file__).parents[1]
    texts = [(root / "README.md").read_text(encoding="utf-8")]
    texts += [file.read_text(encoding="utf-8") for file in sorted((root / "trtkit").glob("*.py"))]
    lines = "\n".join(texts).splitlines()
    others = OTHERS.strip().splitlines()
    return "\n".join(
        line if place % 5 else others[place // 5 % len(others)] for place, line in enumerate(lines) if line.strip()
    )


def train(family: str, text: str) -> Tokenizer:
    """A tokenizer of the family with a few thousand tokens."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    special: list[str] = ["<unk>"]
    more: dict[str, Any] = {}
    if family.startswith("byte level"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        more = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    elif family.startswith("byte fallback"):
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))  # noqa: S106 - no password
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        letters = [*map(chr, range(0x21, 0x7F)), "▁"]
        more = {"limit_alphabet": len(letters), "initial_alphabet": letters}
        special += bytes_
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))  # noqa: S106 - no password
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer: Any = trainers.WordPieceTrainer(vocab_size=4000, special_tokens=special, show_progress=False)
        tokenizer.train_from_iterator([text], trainer)
        return tokenizer
    trainer = trainers.BpeTrainer(vocab_size=4000, special_tokens=special, show_progress=False, **more)
    tokenizer.train_from_iterator(text.splitlines(), trainer)
    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = []  # the trainer marks byte tokens as special, which they are not in real models
    return Tokenizer.from_str(json.dumps(document))


def ours(tokenizer: Tokenizer, stops: list[str]) -> Callable[[list[list[int]]], list[str]]:
    reader = Ours(tokenizer)

    def run(answers: list[list[int]]) -> list[str]:
        streams = [(reader.stream(), StopStrings(stops), []) for _ in answers]
        for place in range(max(map(len, answers))):
            for ids, (stream, watch, texts) in zip(answers, streams, strict=True):
                text = stream.push(ids[place : place + 1])
                texts.append(watch.push(text) if stops else text)
        return ["".join([*texts, watch.push(stream.finish()), watch.finish()]) for stream, watch, texts in streams]

    return run


def decode_stream(tokenizer: Tokenizer) -> Callable[[list[list[int]]], list[str]]:
    def run(answers: list[list[int]]) -> list[str]:
        streams: list[tuple[Any, list[str]]] = [(DecodeStream(skip_special_tokens=True), []) for _ in answers]
        for place in range(max(map(len, answers))):
            for ids, (stream, texts) in zip(answers, streams, strict=True):
                text = stream.step(tokenizer, ids[place]) if place < len(ids) else None
                if text is not None:
                    texts.append(text)
        return ["".join(texts) for _, texts in streams]

    return run


def again(tokenizer: Tokenizer) -> Callable[[list[list[int]]], list[str]]:
    def run(answers: list[list[int]]) -> list[str]:
        lines: list[list[int]] = [[] for _ in answers]
        printed = [0] * len(answers)
        texts: list[list[str]] = [[] for _ in answers]
        for place in range(max(map(len, answers))):
            for stream, ids in enumerate(answers):
                if place >= len(ids):
                    continue
                lines[stream].append(ids[place])
                text = tokenizer.decode(lines[stream])
                end = len(text) if text.endswith("\n") else text.rfind(" ") + 1
                texts[stream].append(text[printed[stream] : end])
                printed[stream] = max(end, printed[stream])
                if text.endswith("\n"):
                    lines[stream], printed[stream] = [], 0
        for stream, line in enumerate(lines):
            texts[stream].append(tokenizer.decode(line)[printed[stream] :])
        return ["".join(parts) for parts in texts]

    return run


def encode(tokenizer: Tokenizer, lines: list[str], start: int) -> list[int]:
    """Whole lines from `start` on, until they have enough tokens: an answer is not cut inside of a character."""
    ids: list[int] = []
    for line in lines[start:] + lines:
        if len(ids) >= TOKENS:
            break
        ids += tokenizer.encode(line + "\n", add_special_tokens=False).ids
    return ids


def measure(family: str, text: str) -> None:
    tokenizer = train(family, text)
    lines = text.splitlines()
    starts = range(0, len(lines), len(lines) // STREAMS)
    answers = [encode(tokenizer, lines, start) for start in starts][:STREAMS]
    count = sum(map(len, answers))
    ways = {
        "ours": ours(tokenizer, []),
        "ours, stop strings": ours(tokenizer, STOPS),
        "DecodeStream": decode_stream(tokenizer),
        "decode again": again(tokenizer),
    }
    whole = [tokenizer.decode(answer) for answer in answers]
    wrong = {name: sum(a != b for a, b in zip(way(answers), whole, strict=True)) for name, way in ways.items()}
    assert wrong["ours"] == 0
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            start = time.thread_time_ns()
            way(answers)
            spent[name].append((time.thread_time_ns() - start) / count)
    base = statistics.median(spent["ours"])
    byte_tokens = sum("\ufffd" in tokenizer.decode([i]) for answer in answers for i in answer)
    print(f"{family}: {byte_tokens / count:.0%} of the tokens are parts of characters")
    for name, values in spent.items():
        median = statistics.median(values)
        ratio = f"{median / base:6.1f} x ours" if name != "ours" else ""
        differ = f"{wrong[name]} of {STREAMS} texts are not those of decode()" if wrong[name] else ""
        print(f"  {name:20} {median:8.0f} ns/token (min {min(values):.0f}, max {max(values):.0f}) {ratio}  {differ}")


def main() -> None:
    text = corpus()
    plain = text.encode("ascii", "ignore").decode()
    measure("byte level", text)
    measure("byte level, ASCII", plain)
    measure("byte fallback", text)
    measure("byte fallback, ASCII", plain)
    measure("word piece", plain)


if __name__ == "__main__":
    main()
