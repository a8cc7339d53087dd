"""A client with known delays, in virtual time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from standin_known_delay import KnownDelayClient, World


@pytest.fixture
def world() -> Any:
    world = World()
    yield world
    world.loop.close()


@pytest.fixture
def known_delay(world: World) -> Callable[..., KnownDelayClient]:
    return lambda **options: KnownDelayClient(world, **options)
