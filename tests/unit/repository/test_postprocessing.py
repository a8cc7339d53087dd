"""The postprocessing model keeps answers apart and counts only what it is told to count."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models

from trtkit.repository.models.postprocessing import __file__ as package

MODEL = Path(package).parent


def load(triton: Any, tmp_path: Path, tokenizer: Tokenizer) -> Any:
    folder = tmp_path / "1"
    (folder / "tokenizer").mkdir(parents=True)
    shutil.copy(MODEL / "model.py", folder)
    shutil.copytree(MODEL.parent / "serving", folder / "serving")
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    return triton.load(folder, {"tokenizer_dir": "tokenizer", "skip_special_tokens": "true"})


def piece(triton: Any, name: str, *beams: list[int], length: int | None = None, **more: Any) -> Any:
    longest = max(map(len, beams))
    rows = [[*ids, *[5] * (longest - len(ids))] for ids in beams]
    lengths = [len(ids) if length is None else length for ids in beams]
    tokens = np.array([rows], dtype=np.int32).reshape(1, len(beams), longest)
    return triton.Request(name, TOKENS_BATCH=tokens, SEQUENCE_LENGTH=triton.ints(lengths), **more)


def texts(response: Any) -> list[list[str]]:
    assert response.error is None
    return [[text.decode() for text in row] for row in response.tensors["OUTPUT"]]


def test_the_model_keeps_requests_beams_and_sequences_apart(
    triton: Any, tmp_path: Path, byte_tokenizer: Tokenizer
) -> None:
    model = load(triton, tmp_path, byte_tokenizer)
    ids = byte_tokenizer.encode("🚀", add_special_tokens=False).ids
    other = byte_tokenizer.encode("ж", add_special_tokens=False).ids
    assert len(ids) > 1
    assert len(other) > 1
    index = {"BATCH_INDEX": triton.ints([1]), "SEQUENCE_INDEX": triton.ints([0])}
    first = [
        piece(triton, "a", ids[:1], other[:1]),
        piece(triton, "b", ids[:1]),
        piece(triton, "b", other[:1], **index),
        piece(triton, "", ids[:1]),
    ]
    assert [texts(r) for r in model.execute(first)] == [[["", ""]], [[""]], [[""]], [["\ufffd"]]]
    rest = [
        piece(triton, "b", other[1:], **index),
        piece(triton, "b", ids[1:]),
        piece(triton, "a", ids[1:], other[1:]),
    ]
    assert [texts(r) for r in model.execute(rest)] == [[["ж"]], [["🚀"]], [["🚀", "ж"]]]


def test_the_model_counts_only_sequence_length(triton: Any, tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    model = load(triton, tmp_path, byte_tokenizer)
    ids = byte_tokenizer.encode("dog sleeps", add_special_tokens=False).ids
    whole, none = model.execute([piece(triton, "x", [*ids, 7, 7], length=len(ids)), piece(triton, "y", [], length=0)])
    assert texts(whole) == [["dog sleeps"]]
    assert texts(none) == [[""]]


def test_shapes_that_do_not_fit_are_an_error_of_that_request_alone(
    triton: Any, tmp_path: Path, byte_tokenizer: Tokenizer
) -> None:
    model = load(triton, tmp_path, byte_tokenizer)
    wrong = triton.Request("w", TOKENS_BATCH=np.zeros((1, 2, 3), np.int32), SEQUENCE_LENGTH=triton.ints([3]))
    bad, good = model.execute([wrong, piece(triton, "x", byte_tokenizer.encode("ok").ids)])
    assert bad.error.code == triton.TritonError.INVALID_ARG
    assert "does not fit" in str(bad.error)
    assert texts(good) == [["ok"]]


def test_an_inexact_decoder_is_said_in_the_log(triton: Any, tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.decoder = decoders.BPEDecoder()
    load(triton, tmp_path, tokenizer)
    assert len(triton.warnings) == 1
    assert "may lose spaces" in triton.warnings[0]
