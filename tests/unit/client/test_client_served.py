"""Which models of a server are asked."""

from __future__ import annotations

from typing import Any

import pytest

from trtkit.client import served
from trtkit.client.served import Served, choose, find
from trtkit.config_serving import TOPOLOGIES
from trtkit.errors import InputError

ENSEMBLE = Served("ensemble", "tensorrt_llm")
READY = "READY"


@pytest.mark.parametrize(
    ("states", "model", "expected"),
    [
        (dict.fromkeys(["ensemble", "llm", "tensorrt_llm", "preprocessing"], READY), None, ENSEMBLE),
        ({"llm": READY}, None, Served("llm", None)),
        ({"llm": READY, "tensorrt_llm": READY}, None, Served("llm", "tensorrt_llm")),
        ({"llm": READY, "ensemble": "UNAVAILABLE"}, None, Served("llm", None)),
        ({"other": READY, "ensemble": "UNAVAILABLE"}, None, ENSEMBLE),
        ({"llm": READY, "mine": READY}, "mine", Served("mine", "tensorrt_llm")),
        (dict.fromkeys(["ensemble", "llm", "tensorrt_llm"], READY), "llm", Served("llm", "tensorrt_llm")),
    ],
)
def test_what_a_server_has(states: dict[str, str], model: str | None, expected: Served) -> None:
    assert choose(states, "grpc://x:1", model) == expected


@pytest.mark.parametrize(("states", "has"), [({}, "none"), ({"b": READY, "a": READY}, "a, b")])
def test_a_server_without_such_a_model(states: dict[str, str], has: str) -> None:
    with pytest.raises(InputError, match=f"grpc://x:1: .* it has: {has}") as error:
        choose(states, "grpc://x:1")
    assert "--model" in error.value.fix


async def test_a_topology_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*args: Any, **options: Any) -> Any:
        raise AssertionError("nobody is to be asked")

    monkeypatch.setattr(served, "connect", connect)
    assert await find("grpc://x:1", "ensemble") == ENSEMBLE
    assert await find("grpc://x:1", "fused") == Served("llm", None)
    assert await find("grpc://x:1", "fused", model="other") == Served("other", None)
    topologies = {one for valid in TOPOLOGIES.values() for one in valid if one}
    assert topologies == set(served.BY_TOPOLOGY)
