"""The choice of formats, against all choices there are."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtkit.errors import InputError
from trtkit.quantize.allocation import Allocation, Option, best, frontier

Blocks = list[list[Option]]
# Small integers make ties and dominated options common; floats make sums that depend on their order.
damage = st.one_of(st.integers(0, 6).map(float), st.floats(0, 1, allow_subnormal=False))
blocks = st.lists(st.lists(st.builds(Option, st.integers(1, 9), damage), min_size=1, max_size=4), max_size=5)


def every(given_blocks: Blocks) -> list[tuple[int, float]]:
    """Size and damage of all choices."""
    return [
        (sum(option.size for option in taken), sum(option.damage for option in taken))
        for taken in itertools.product(*given_blocks)
    ]


def adds_up(found: Allocation, given_blocks: Blocks) -> bool:
    taken = [block[choice] for block, choice in zip(given_blocks, found.choices, strict=True)]
    return (found.size, found.damage) == (sum(each.size for each in taken), sum(each.damage for each in taken))


@given(blocks, st.integers(0, 50))
def test_the_best_choice_is_the_best_of_all(given_blocks: Blocks, limit: int) -> None:
    fitting = [each for each in every(given_blocks) if each[0] <= limit]
    if not fitting:
        with pytest.raises(InputError, match="too few"):
            best(given_blocks, limit)
        return
    found = best(given_blocks, limit)
    assert adds_up(found, given_blocks)
    assert found.size <= limit
    least = min(total for _, total in fitting)
    assert found.damage == pytest.approx(least, rel=1e-9, abs=1e-300)


@given(st.lists(st.lists(st.builds(Option, st.integers(1, 9), st.integers(0, 6).map(float)), min_size=1), max_size=4))
def test_of_equally_good_choices_it_is_the_smallest(given_blocks: Blocks) -> None:
    found = best(given_blocks, 1000)
    least = min(total for _, total in every(given_blocks))
    assert (found.damage, found.size) == (least, min(size for size, total in every(given_blocks) if total == least))


@given(blocks)
def test_every_corner_of_the_frontier_is_best_for_its_size(given_blocks: Blocks) -> None:
    corners = frontier(given_blocks)
    everything = every(given_blocks)
    for corner in corners:
        assert adds_up(corner, given_blocks)
        least = min(total for size, total in everything if size <= corner.size)
        assert corner.damage == pytest.approx(least, rel=1e-9, abs=1e-300)
    assert corners[0].size == min(size for size, _ in everything)
    assert corners[-1].damage == pytest.approx(min(total for _, total in everything), rel=1e-9, abs=1e-300)


@given(blocks)
def test_along_the_frontier_one_block_changes_at_a_time(given_blocks: Blocks) -> None:
    corners = frontier(given_blocks)
    for before, after in itertools.pairwise(corners):
        assert before.size < after.size
        assert sum(a != b for a, b in zip(before.choices, after.choices, strict=True)) == 1


@given(blocks, st.integers(1, 60))
def test_more_bits_never_hurt(given_blocks: Blocks, limit: int) -> None:
    least = sum(min(option.size for option in block) for block in given_blocks)
    some, more = best(given_blocks, least + limit), best(given_blocks, least + limit + 1)
    assert more.damage <= some.damage * (1 + 1e-9)


def test_a_model_of_many_layers() -> None:
    """Sizes as they are in an 8-billion-parameter model: four kinds of linears in 80 layers, six options of each."""
    import random

    random.seed(5)
    sizes = [6144 * 4096, 4096 * 4096, 2 * 14336 * 4096, 14336 * 4096]
    made = [
        [Option(int(size * bits), random.expovariate(1) * 4.0**-bits * 1e3) for bits in (4.19, 4.26, 5, 8, 8.02, 16)]
        for _ in range(80)
        for size in sizes
    ]
    limit = int(5 * 80 * sum(sizes))
    found = best(made, limit)
    corners = frontier(made)
    below = max((each for each in corners if each.size <= limit), key=lambda each: each.size)
    above = min((each for each in corners if each.size > limit), key=lambda each: each.size)
    share = (limit - below.size) / (above.size - below.size)
    bound = below.damage + share * (above.damage - below.damage)  # of mixes, which are no answers
    assert found.size <= limit
    assert bound * (1 - 1e-9) <= found.damage <= below.damage


def test_no_blocks() -> None:
    assert best([], 0) == Allocation(0, 0, ())
    assert frontier([]) == [Allocation(0, 0, ())]
