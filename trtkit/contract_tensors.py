"""What the tensor tables of `trtkit.contract` are written with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tensor:
    """One input or output of a model.

    Attributes:
        dtype: without the `TYPE_` prefix, such as `INT32`.
        dims: shape without the batch dimension; -1 is any size.
        optional: a request may leave it out (inputs only).
        scalar: the model sees shape [batch] where clients send [batch, 1] (a reshape to []).
        ragged: requests with different sizes may share a batch.
        reference: the `reference` runtime has this tensor too.
        since: the first TensorRT-LLM version that has it; empty is older than all known releases.
        until: the first one that has it no more.
    """

    name: str
    dtype: str
    dims: tuple[int, ...] = (1,)
    optional: bool = False
    scalar: bool = False
    ragged: bool = False
    reference: bool = False
    since: str = ""
    until: str = ""

    def known_to(self, version: str | None) -> bool:
        """Whether a TensorRT-LLM version such as `0.17.0.post1` has the tensor; None is the newest."""
        return in_range(version, self.since, self.until)

    @property
    def wire_dtype(self) -> str:
        """The dtype as requests name it: the KServe protocol says BYTES where config.pbtxt says STRING."""
        return "BYTES" if self.dtype == "STRING" else self.dtype


def in_range(version: str | None, since: str, until: str) -> bool:
    """Whether `since` <= `version` < `until`, by numbers; empty bounds are open, and None is newer than all."""
    if version is None:
        return not until
    return (not since or numbers(version) >= numbers(since)) and (not until or numbers(version) < numbers(until))


def numbers(version: str) -> tuple[int, ...]:
    """Major and minor number, and what distinguishes patches: `0.17.0.post1` -> (0, 17, 0)."""
    parts = []
    for part in version.split(".")[:3]:
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        parts.append(int(digits or 0))
    return tuple(parts + [0] * (3 - len(parts)))


@dataclass(frozen=True)
class Step:
    """One step of the ensemble: which ensemble tensor feeds which input, and what each output is called there."""

    model: str
    inputs: dict[str, str]
    outputs: dict[str, str]


def need(name: str, dtype: str, *dims: int, reference: bool = False, since: str = "") -> Tensor:
    return Tensor(name, dtype, dims or (1,), reference=reference, since=since)


def may(name: str, dtype: str, *dims: int, since: str = "", until: str = "") -> Tensor:
    return Tensor(name, dtype, dims or (1,), optional=True, since=since, until=until)


def scalar_(name: str, dtype: str, *, reference: bool = False, since: str = "", until: str = "") -> Tensor:
    return Tensor(name, dtype, optional=True, scalar=True, reference=reference, since=since, until=until)


def ragged_(name: str, dtype: str, *dims: int, reference: bool = False, since: str = "") -> Tensor:
    return Tensor(name, dtype, dims or (1,), optional=True, ragged=True, reference=reference, since=since)
