"""What a plan is made of: which elements of a source tensor lie where in a checkpoint tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from trtkit.safetensors_io import DTYPES

Box = tuple[tuple[int, int], ...]
"""Start and stop per axis."""


@dataclass(frozen=True)
class Piece:
    """A box of a source tensor that lies as one contiguous run, in C order, in a checkpoint tensor.

    Attributes:
        source: name of the source tensor.
        view: shape that the box refers to. It has as many elements as the source tensor, but maybe more axes.
        box: what is taken of it, in elements.
        element: flat index in the checkpoint tensor where it starts.
        transposed: the two axes of the box are swapped in the checkpoint tensor.
        plus: added to every value.
        counted: no lower rank and no earlier tensor holds the same elements, so that an account of what happened to the
            source's values is made exactly once, however the ranks are shared out.
    """

    source: str
    view: tuple[int, ...]
    box: Box
    element: int
    transposed: bool = False
    plus: float = 0.0
    counted: bool = True

    @property
    def count(self) -> int:
        return math.prod(stop - start for start, stop in self.box)


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of one rank's file. Elements that no piece covers are zero (vocabulary padding).

    Attributes:
        dtype: safetensors' spelling.
        unit: place in the order of execution: 0 before the layers, then one per layer, then one for what follows them.
        packed: its elements are bits in the guise of numbers, so that none of them is a NaN.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    unit: int
    locate: Callable[[], tuple[Piece, ...]] = field(repr=False, compare=False)
    packed: bool = False

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """What it is made of. Computed anew each time: all pieces of a large model would fill the memory."""
        return self.locate()

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize
