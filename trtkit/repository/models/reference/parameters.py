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

    def longest_sequence(self, checkpoint: Mapping[str, Any]) -> int:
        """Most tokens of prompt and output: `max_seq_len`, or what the model was made for.

        Args:
            checkpoint: config.json of the checkpoint.

        Raises:
            InputError: `max_seq_len` is more than a model with a table of learned positions can do.
        """
        positions: int = checkpoint["max_position_embeddings"]
        wanted = self.integer("max_seq_len") or positions
        if wanted > positions and checkpoint.get("position_embedding_type", "learned_absolute") == "learned_absolute":
            fix = f"write {positions} or less, or leave it out"
            raise InputError(
                f"config.pbtxt: parameter 'max_seq_len' is {wanted}, the model has learned {positions} positions", fix
            )
        return wanted

    def _wrong(self, name: str, fix: str) -> InputError:
        return InputError(f"config.pbtxt: parameter '{name}' is '{self.text(name)}'", fix)
