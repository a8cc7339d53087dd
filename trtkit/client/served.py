"""Which of a server's models takes text and which takes tokens: by the topology that a build config says, or else by
what the server has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from trtkit.client.api import ENGINE, ENSEMBLE, LLM, ProtocolName, connect
from trtkit.errors import InputError


class Served(NamedTuple):
    """Names of models.

    Attributes:
        text: takes and returns text.
        engine: takes and returns tokens; None where `text` drives the engine in its own process.
    """

    text: str
    engine: str | None


BY_TOPOLOGY = {"ensemble": Served(ENSEMBLE, ENGINE), "fused": Served(LLM, None)}


def choose(states: Mapping[str, str], place: str, model: str | None = None) -> Served:
    """The models to ask, among those of a server.

    Args:
        states: by model, as `LLMClient.models` tells them. What is not ready is taken only if nothing else is there.
        place: names the server in errors.
        model: takes text, instead of what would be chosen.

    Raises:
        InputError: the server has none of the models that trtkit's repositories have.
    """
    ready = [name for name, state in states.items() if state == "READY"]
    text = model or next((name for names in (ready, states) for name in (ENSEMBLE, LLM) if name in names), None)
    if text is not None:
        return Served(text, None if text == LLM and ENGINE not in states else ENGINE)
    has = ", ".join(sorted(states)) or "none"
    raise InputError(f"{place}: the server has no model '{ENSEMBLE}' or '{LLM}'; it has: {has}", "give --model NAME")


async def find(
    url: str,
    topology: str | None = None,
    *,
    model: str | None = None,
    protocol: ProtocolName | None = None,
    timeout_s: float = 10.0,
) -> Served:
    """The models to ask at `url`. The server is asked only where there is no topology.

    Args:
        topology: of the build config.
        model: takes text, instead of what would be chosen.

    Raises:
        InputError: a bad url, or the server has no such model.
        LacksError: nobody listens at the url.
    """
    if topology in BY_TOPOLOGY:
        usual = BY_TOPOLOGY[topology]
        return usual._replace(text=model or usual.text)
    async with connect(url, protocol=protocol) as client:
        return choose(await client.models(timeout_s=timeout_s), client.url, model)
