"""Fixtures of validation's tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from standin_client import StandInClient


@pytest.fixture
def client() -> StandInClient:
    """A stand-in client of a server that does everything right."""
    return StandInClient()
