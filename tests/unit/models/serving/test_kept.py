"""Output tensors that are kept: the same content is the same tensor, within bounds."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import fake_triton
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

NAME = "trtkit.repository.models.serving.kept"


@pytest.fixture
def code(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake_triton.module(None))
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)


def test_the_same_content_is_the_same_tensor(code: Any) -> None:
    kept = code.KeptTensors()
    one = kept.texts("OUTPUT", ["a", "é"], (1, 2))
    assert one is kept.texts("OUTPUT", ["a", "é"], (1, 2))
    assert one.name() == "OUTPUT" and one.as_numpy().tolist() == [[b"a", "é".encode()]]
    others = [
        kept.texts("OUTPUT", ["a", "é"], (2, 1)),
        kept.texts("OUTPUT", ["é", "a"], (1, 2)),
        kept.texts("OUTPUT", ["aé", ""], (1, 2)),
        kept.texts("REASON", ["a", "é"], (1, 2)),
    ]
    assert len({id(tensor) for tensor in [one, *others]}) == 5
    assert [tensor.as_numpy().shape for tensor in others] == [(2, 1), (1, 2), (1, 2), (1, 2)]


def test_an_array_is_not_the_callers_afterwards(code: Any) -> None:
    kept, given = code.KeptTensors(), np.array([[7]], np.int32)
    one = kept.array("END", given)
    given[0, 0] = 8
    assert one.as_numpy().tolist() == [[7]]
    assert kept.array("END", given).as_numpy().tolist() == [[8]]
    assert kept.array("END", np.array([[7]], np.int32)) is one
    assert kept.array("END", np.array([7], np.int32)).as_numpy().shape == (1,)


def test_what_is_kept_is_bounded(code: Any) -> None:
    kept = code.KeptTensors(limit=10)
    for number in range(100):
        assert kept.texts("OUTPUT", [str(number)], (1, 1)).as_numpy()[0, 0] == str(number).encode()
        assert len(kept) <= 10
    kept.clear()
    for size in (code.LONGEST, code.LONGEST + 1):
        kept.texts("OUTPUT", ["x" * size], (1, 1))
        kept.array("IDS", np.zeros((1, size), np.int8))
    assert len(kept) == 2, "what is long goes out once"
    kept.clear()
    assert len(kept) == 0


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.text(max_size=3), min_size=1, max_size=3), max_size=30), st.integers(1, 5))
def test_every_tensor_holds_what_was_asked_for(code: Any, asked: list[list[str]], limit: int) -> None:
    kept = code.KeptTensors(limit)
    for texts in asked:
        tensor = kept.texts("OUTPUT", texts, (1, len(texts)))
        assert [item.decode() for item in tensor.as_numpy()[0]] == texts
