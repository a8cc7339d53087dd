"""The `parameters` of a config.pbtxt, as Triton hands them to a python model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trtkit.errors import InputError


class Parameters:
    """Values by name. Empty ones, and `${...}` that nobody filled in, count as not given."""

    def __init__(self, given: Mapping[str, str]) -> None:
        self._given = {name: value for name, value in given.items() if value and not value.startswith("${")}

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Parameters:
        """Those of a model config in JSON."""
        return cls({name: value["string_value"] for name, value in config.get("parameters", {}).items()})

    def text(self, name: str, *, need: bool = False) -> str:
        if need and name not in self._given:
            raise InputError(f"config.pbtxt: parameter '{name}' is missing", "set it")
        return self._given.get(name, "")

    def integer(self, name: str) -> int | None:
        """A number above zero, or None."""
        values = self.integers(name)
        if values and (len(values) > 1 or values[0] < 1):
            raise self._wrong(name, "write one whole number above zero")
        return values[0] if values else None

    def integers(self, name: str) -> tuple[int, ...]:
        """Numbers separated by commas."""
        try:
            return tuple(int(part) for part in self.text(name).split(",") if part.strip())
        except ValueError:
            raise self._wrong(name, "write whole numbers") from None

    def flag(self, name: str) -> bool:
        value = self.text(name).lower() or "false"
        if value not in ("true", "false", "1", "0"):
            raise self._wrong(name, "write true or false")
        return value in ("true", "1")

    def _wrong(self, name: str, fix: str) -> InputError:
        return InputError(f"config.pbtxt: parameter '{name}' is '{self.text(name)}'", fix)
