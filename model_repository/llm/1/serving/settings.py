"""The parameters of config.pbtxt that concern the serving path; the rest is for the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Settings:
    """What a repository says about its model `llm`.

    Attributes:
        engine: module in engines/.
        slots: sequences that the engine gets at once; further requests wait.
        end_ids: tokens that end an answer.
        default_max_tokens: for requests that name no `max_tokens`.
        max_token_wait_s: how long a token may wait for company.
        coalesce: tokens that are ready together go out together.
        max_queue_size: most waiting requests, 0 for no limit.
        timeout_s: how long a request may wait in the queue, 0 for ever.
        timeout_override: a request may name a shorter one.
        parameters: all of them, by name.
    """

    engine: str
    slots: int
    tokenizer_dir: Path
    end_ids: tuple[int, ...]
    add_special_tokens: bool
    default_max_tokens: int
    max_token_wait_s: float
    coalesce: bool
    max_queue_size: int
    timeout_s: float
    timeout_override: bool
    parameters: dict[str, str]

    @classmethod
    def of(cls, config: Mapping[str, Any], folder: Path) -> Settings:
        """Those of a model config in JSON.

        Args:
            folder: of the model's version, where relative paths begin.

        Raises:
            ValueError: a parameter is missing or wrong; the message names it.
        """
        given = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
        values = _Values({name: value for name, value in given.items() if value and not value.startswith("${")})
        engine = values.text("engine")
        if not engine.isidentifier():
            raise ValueError(f"config.pbtxt: parameter 'engine' is '{engine}', which is no name of an engine")
        return cls(
            engine=engine,
            slots=values.integer("slots", int(config["max_batch_size"]) or 1, least=1),
            tokenizer_dir=folder / values.text("tokenizer_dir"),
            end_ids=values.integers("end_ids"),
            add_special_tokens=values.flag("add_special_tokens", True),
            default_max_tokens=values.integer("default_max_tokens", 256, least=1),
            max_token_wait_s=values.number("max_token_wait_ms", 0.0) / 1000,
            coalesce=values.flag("coalesce", True),
            max_queue_size=values.integer("max_queue_size", 0, least=0),
            timeout_s=values.number("timeout_ms", 0.0) / 1000,
            timeout_override=values.flag("allow_timeout_override", False),
            parameters={**values.given, "version_dir": str(folder)},
        )

    def deadline(self, asked_us: int, arrived: float) -> float | None:
        """When a request has waited too long.

        Args:
            asked_us: the request's own timeout in microseconds, 0 for none.
            arrived: seconds of the monotonic clock.
        """
        limits = [self.timeout_s] if self.timeout_s else []
        if self.timeout_override and asked_us:
            limits.append(asked_us / 1e6)
        return arrived + min(limits) if limits else None


class _Values:
    def __init__(self, given: dict[str, str]) -> None:
        self.given = given

    def text(self, name: str) -> str:
        if name not in self.given:
            raise ValueError(f"config.pbtxt: parameter '{name}' is missing")
        return self.given[name]

    def number(self, name: str, default: float) -> float:
        try:
            value = float(self.given.get(name, default))
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            raise ValueError(f"config.pbtxt: parameter '{name}' is '{self.given[name]}', not a number of 0 or more")
        return value

    def integer(self, name: str, default: int, *, least: int) -> int:
        try:
            value = int(self.given.get(name, default))
        except ValueError:
            value = least - 1
        if value < least:
            raise ValueError(f"config.pbtxt: parameter '{name}' is '{self.given[name]}', not {least} or more")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        try:
            return tuple(int(part) for part in self.given.get(name, "").split(",") if part.strip())
        except ValueError:
            raise ValueError(
                f"config.pbtxt: parameter '{name}' is '{self.given[name]}', not numbers with commas between"
            ) from None

    def flag(self, name: str, default: bool) -> bool:
        value = self.given.get(name, str(default)).lower()
        if value not in ("true", "false", "1", "0"):
            raise ValueError(f"config.pbtxt: parameter '{name}' is '{value}', neither true nor false")
        return value in ("true", "1")
