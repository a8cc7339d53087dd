"""Which format for which linear, so that the sum of the damage is least for a number of bits: a knapsack with choices.

Every block takes one of its options; an option has a size in bits and a damage. Two answers, both exact:

- `best`: the least damage within a size. Blocks are joined one after the other, and of the partial sums those are kept
  that nothing beats in both size and damage, and that could still lead to less than the best answer known. For what is
  possible with the blocks to come there is a bound: each may take a mix of two of its options (the linear relaxation,
  whose answer is found by sorting: Kellerer, Pferschy, Pisinger, Knapsack Problems, 2004, chapter 11).
- `frontier`: the corners of that bound for all blocks. Each is an answer without mixes, so it is the least damage for
  its own size; between two neighbours a single block differs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trtkit.errors import InputError

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Option:
    """What a block may become.

    Attributes:
        size: bits of all its weights with their scales.
        damage: not negative.
    """

    size: int
    damage: float


@dataclass(frozen=True)
class Allocation:
    """A choice for every block.

    Attributes:
        size, damage: the sums.
        choices: index of the option of each block.
    """

    size: int
    damage: float
    choices: tuple[int, ...]


def best(blocks: Sequence[Sequence[Option]], limit: int) -> Allocation:
    """The least damage within `limit` bits; of several equal ones a smallest.

    Raises:
        InputError: even the smallest options are larger.
    """
    least = sum(min(option.size for option in block) for block in blocks)
    if least > limit:
        raise InputError(f"{limit:,} bits are too few: the smallest choice has {least:,}", "allow more bits")
    corners = frontier(blocks)
    known = max((each for each in corners if each.size <= limit), key=lambda each: each.size)
    # Sums of the same numbers in another order differ in the last digits.
    ceiling = known.damage + 1e-9 * corners[0].damage
    sizes, damages = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[Indices, Indices]] = []
    for place, block in enumerate(blocks):
        options = np.array([option.size for option in block]), np.array([option.damage for option in block])
        joined = (sizes[:, None] + options[0]).ravel(), (damages[:, None] + options[1]).ravel()
        kept = _possible(*joined, limit, _relaxation(blocks[place + 1 :]), ceiling)
        kept = kept[_undominated(joined[0][kept], joined[1][kept])]
        sizes, damages = joined[0][kept], joined[1][kept]
        steps.append((kept // len(block), kept % len(block)))
    where = int(np.lexsort((sizes, damages))[0])
    choices = []
    for parents, options_taken in reversed(steps):
        choices.append(int(options_taken[where]))
        where = int(parents[where])
    return _allocation(blocks, choices[::-1])


def frontier(blocks: Sequence[Sequence[Option]]) -> list[Allocation]:
    """Choices of which each has the least damage for its size, from the smallest to that of least damage."""
    current = [_hull(block)[0] for block in blocks]
    found = [_allocation(blocks, current)]
    for _, place, _, option in _steps(blocks):
        current[place] = option
        found.append(_allocation(blocks, current))
    return found


def _allocation(blocks: Sequence[Sequence[Option]], choices: Sequence[int]) -> Allocation:
    taken = [block[choice] for block, choice in zip(blocks, choices, strict=True)]
    return Allocation(sum(option.size for option in taken), sum(option.damage for option in taken), tuple(choices))


def _hull(block: Sequence[Option]) -> list[int]:
    """Options on the lower convex hull, from the smallest to that of least damage: slopes rise strictly."""
    found: list[int] = []
    for place in sorted(range(len(block)), key=lambda place: (block[place].size, block[place].damage)):
        if found and block[place].damage >= block[found[-1]].damage:
            continue  # larger, and no better
        while len(found) > 1 and _slope(block[found[-2]], block[found[-1]]) >= _slope(block[found[-1]], block[place]):
            found.pop()
        found.append(place)
    return found


def _slope(low: Option, high: Option) -> float:
    """Change of damage per bit; options on a hull differ in size."""
    return (high.damage - low.damage) / (high.size - low.size)


def _steps(blocks: Sequence[Sequence[Option]]) -> list[tuple[float, int, int, int]]:
    """Moves along the hulls of all blocks, the most worthwhile first: slope, block, from option, to option."""
    return sorted(
        (_slope(block[low], block[high]), place, low, high)
        for place, block in enumerate(blocks)
        for low, high in itertools.pairwise(_hull(block))
    )


def _relaxation(blocks: Sequence[Sequence[Option]]) -> tuple[Floats, Floats]:
    """Corners (sizes, damages) of the least damage that blocks could have for a size if options could be mixed."""
    first = [block[_hull(block)[0]] for block in blocks]
    moves = [(blocks[place][low], blocks[place][high]) for _, place, low, high in _steps(blocks)]
    sizes = [sum(option.size for option in first), *(high.size - low.size for low, high in moves)]
    damages = [sum(option.damage for option in first), *(high.damage - low.damage for low, high in moves)]
    return np.cumsum(np.array(sizes, np.float64)), np.cumsum(np.array(damages, np.float64))


def _possible(sizes: Indices, damages: Floats, limit: int, rest: tuple[Floats, Floats], ceiling: float) -> Indices:
    """Partial sums that leave enough bits for the rest and could still come to no more than `ceiling`."""
    left = limit - sizes
    lowest = damages + np.interp(left, *rest)
    found: Indices = np.flatnonzero((left >= rest[0][0]) & (lowest <= ceiling))
    return found


def _undominated(sizes: Indices, damages: Floats) -> Indices:
    """Of pairs that are beaten in neither size nor damage, and of equal ones one."""
    order = np.lexsort((damages, sizes))
    lowest = np.minimum.accumulate(damages[order])
    found: Indices = order[np.concatenate([[True], damages[order][1:] < lowest[:-1]])]
    return found
