"""`--auto`: the formats of all linears, chosen for a number of bits per weight."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtkit.convert.cast import Array
from trtkit.convert.divisibility import check_divisible, sides
from trtkit.convert.linears import Linear, fields
from trtkit.convert.plan import CHECKPOINT_DTYPES
from trtkit.convert.quantization import Format, KVCache, Quantization, get
from trtkit.convert.support import ENGINE, REFERENCE, Target, check_support, supported
from trtkit.errors import InputError
from trtkit.hf import Source
from trtkit.quantize.allocation import Allocation, Option, best, frontier
from trtkit.quantize.pareto import NONE, Point, plot, rows
from trtkit.quantize.sensitivity import Block, Damages, blocks, damages
from trtkit.safetensors_io import DTYPES

CANDIDATES = ("int4_awq", "fp8", "int8_sq", NONE)


@dataclass(frozen=True)
class Choice:
    """What was chosen, and from what.

    Attributes:
        quantization: for `trtkit.convert.source.Layout`.
        chosen: the least predicted damage for the bits.
        front: choices that nothing beats in both bits and damage, from the fewest bits on; `chosen` is one of them.
        uniform: what each candidate would do in all linears that it fits.
        damages: what each candidate would do to each block of linears.
    """

    quantization: Quantization
    chosen: Point
    front: list[Point]
    uniform: list[Point]
    damages: Damages

    @property
    def rows(self) -> list[tuple[str, str, str, str]]:
        """A table under `trtkit.quantize.pareto.HEADINGS`."""
        return rows(self.front, self.chosen, self.uniform)

    @property
    def drawing(self) -> str:
        """A self-contained SVG."""
        return plot(self.front, self.chosen, self.uniform)


Forms = list[list[Format | None]]
"""What each block may become; None leaves it alone."""


@dataclass(frozen=True)
class Menu:
    """What there is to choose from.

    Attributes:
        options: of each block, in the order of `forms`.
    """

    blocks: Sequence[Block]
    forms: Forms
    options: list[list[Option]]

    @property
    def weights(self) -> int:
        return sum(block.weights for block in self.blocks)

    def point(self, taken: Sequence[int], label: str = "") -> Point:
        """The choice of one option per block."""
        chosen = [options[index] for options, index in zip(self.options, taken, strict=True)]
        formats = {
            linear.name: form.name if (form := forms[index]) else NONE
            for block, forms, index in zip(self.blocks, self.forms, taken, strict=True)
            for linear in block.linears
        }
        bits = sum(option.size for option in chosen) / self.weights
        return Point(bits, sum(option.damage for option in chosen), formats, label)


def choose(
    source: Source,
    config: Mapping[str, Any],
    calibration: Array,
    held_out: Array,
    candidates: Sequence[str],
    target_bits: float,
    folder: Path,
    *,
    group_size: int | None = None,
    kv_cache: KVCache | None = None,
    target: Target | None = None,
    device: str = "cpu",
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> Choice:
    """Tries every candidate in every linear and chooses.

    Args:
        config: config.json of the checkpoint in the wanted layout; its quantisation is not looked at.
        calibration, held_out: token ids, int64 (samples, length) each; a few thousand held-out tokens are enough.
        candidates: names of formats, and `none`. What the target does not run is left out.
        target_bits: the most bits per weight, as the mean over all linears of the layers, scales included. Embeddings
            and the output projection keep their dtype and are not counted.
        folder: for what lies on disk while this runs.
        target: where the checkpoint shall run; an engine by default.
        on_layer: called with layers (done, total) of all passes.

    Raises:
        InputError: nothing that fits and runs is so small, or the model or layout has no mixed precision.
    """
    target = target or Target(ENGINE, config["architecture"])
    if config["mapping"]["pp_size"] > 1:
        raise InputError(
            "formats chosen layer by layer need one pipeline stage: each stage counts its layers from 0",
            "use --pp 1 with --tp",
        )
    runnable = _runnable(candidates, kv_cache, target)
    own = blocks(config)
    forms, problems = _fitting(own, runnable, config, group_size, target.runtime)
    mixable = list(_mixable(runnable, target))
    sizes = [
        [sum(linear_bits(linear, form, config, group_size) for linear in block.linears) for form in each]
        for block, each in zip(own, forms, strict=True)
    ]
    _check_reachable(
        Menu(own, forms, [[Option(size, 0.0) for size in each] for each in sizes]), mixable, target_bits, problems
    )
    found = damages(
        source, config, calibration, held_out,
        {block.name: [form for form in each if form] for block, each in zip(own, forms, strict=True)},
        folder, group_size=group_size, device=device, on_layer=on_layer,
    )  # fmt: skip
    options = [
        [Option(size, found[block.name][form.name].kl if form else 0.0) for size, form in zip(*each, strict=True)]
        for block, *each in zip(own, sizes, forms, strict=True)
    ]
    menu = Menu(own, forms, options)
    chosen, front = allocate(menu, mixable, target_bits)
    uniform = [
        menu.point([each.index(form) for each in forms], form.name if form else NONE)
        for form in runnable
        if all(form in each for each in forms)
    ]
    return Choice(quantization(chosen.formats, group_size, kv_cache), chosen, front, uniform, found)


def linear_bits(linear: Linear, form: Format | None, config: Mapping[str, Any], group_size: int | None) -> int:
    """Bits that a linear's weight, scales and factors take: in the checkpoint, or, of formats that trtllm-build
    quantises, in the engine."""
    wide = DTYPES[CHECKPOINT_DTYPES[config["dtype"]]].itemsize * 8
    if form is None:
        return linear.rows * linear.columns * wide
    if form.weight_only:
        return linear.rows * linear.columns * form.bits + linear.rows * wide
    lengths = {"one": 1, "in": linear.columns, "out": linear.rows}
    total = 0
    for each in fields(form, Quantization(form.name, group_size if form.group_sizes else None), linear.kind):
        count = wide if each.dtype == "model" else DTYPES[each.dtype].itemsize * 8
        for axis in each.axes:
            count *= max(1, lengths[axis.along] // axis.step)
        total += count
    return total


def quantization(formats: Mapping[str, str], group_size: int | None, kv_cache: KVCache | None = None) -> Quantization:
    """The request that gives every linear its format (`none` to leave it alone), by TRT-LLM name."""
    used = Counter(name for name in formats.values() if name != NONE)
    if not used:
        return Quantization(kv_cache=kv_cache)
    main = used.most_common(1)[0][0]
    return Quantization(
        main,
        group_size=group_size if any(get(name).group_sizes for name in used) else None,
        kv_cache=kv_cache,
        exclude=tuple(linear for linear, name in formats.items() if name == NONE),
        overrides={linear: name for linear, name in formats.items() if name not in (NONE, main)},
    )


def allocate(menu: Menu, mixable: Sequence[Sequence[Format | None]], target_bits: float) -> tuple[Point, list[Point]]:
    """The best choice for the bits, and the front, over all sets of formats that one checkpoint may hold."""
    limit = int(target_bits * menu.weights + 1e-6)
    choices: list[Point] = []
    front: list[Point] = []
    for allowed in mixable:
        offered = _offered(menu, allowed)
        if not all(offered):
            continue
        options = [[each[index] for index in places] for each, places in zip(menu.options, offered, strict=True)]

        def point(found: Allocation, offered: list[list[int]] = offered) -> Point:
            return menu.point([places[index] for places, index in zip(offered, found.choices, strict=True)])

        front += map(point, frontier(options))
        if sum(min(option.size for option in each) for each in options) <= limit:
            choices.append(point(best(options, limit)))
    chosen = min(choices, key=lambda each: (each.damage, each.bits))
    return chosen, _unbeaten([chosen, *front])


def _offered(menu: Menu, allowed: Sequence[Format | None]) -> list[list[int]]:
    return [[index for index, form in enumerate(each) if form in allowed] for each in menu.forms]


def _unbeaten(points: Sequence[Point]) -> list[Point]:
    found: list[Point] = []
    for point in sorted(points, key=lambda each: (each.bits, each.damage)):
        if not found or point.damage < found[-1].damage:
            found.append(point)
    return found


def _runnable(candidates: Sequence[str], kv_cache: KVCache | None, target: Target) -> list[Format | None]:
    """The candidates that the target runs.

    Raises:
        InputError: a name is none of a format that can be mixed, or the target runs none.
    """
    forms = [None if name == NONE else get(name) for name in dict.fromkeys(candidates)]
    for form in forms:
        if form and (form.linear_wise or form.import_only):
            known = ", ".join(CANDIDATES)
            raise InputError(f"{form.name} cannot be chosen linear by linear", f"use some of {known}")
    running = [form for form in forms if form is None or supported(Quantization(form.name, kv_cache=kv_cache), target)]
    named = [form for form in forms if form]
    if not named:
        raise InputError("no format to choose from", f"use some of {', '.join(CANDIDATES)}")
    if not any(running):
        check_support(Quantization(named[0].name, kv_cache=kv_cache), target)
    return running


def _fitting(
    own: Sequence[Block], forms: Sequence[Format | None], config: Mapping[str, Any], group_size: int | None,
    runtime: str,
) -> tuple[list[list[Format | None]], list[str]]:  # fmt: skip
    """The forms that fit each block, and why others do not."""
    shapes = {each.name: each for each in sides(config)}
    tp = config["mapping"]["tp_size"]
    problems: dict[str, None] = {}
    fitting: list[list[Format | None]] = []
    for block in own:
        fitting.append([])
        for form in forms:
            try:
                if form:
                    alone = Quantization(form.name, group_size if form.group_sizes else None)
                    check_divisible(alone, [shapes[linear.name] for linear in block.linears], tp, runtime=runtime)
                fitting[-1].append(form)
            except InputError as error:
                problems[error.cause] = None
        if not fitting[-1]:
            raise InputError(next(reversed(problems)), f"add {NONE} to the candidates, or another group size or TP")
    return fitting, list(problems)


def _check_reachable(
    menu: Menu, mixable: Sequence[Sequence[Format | None]], target_bits: float, problems: Sequence[str]
) -> None:
    """Before hours are spent."""
    smallest = None
    for offered in filter(all, (_offered(menu, allowed) for allowed in mixable)):
        taken = [
            min(places, key=lambda index: each[index].size) for each, places in zip(menu.options, offered, strict=True)
        ]
        point = menu.point(taken)
        if smallest is None or point.bits < smallest.bits:
            smallest = point
    if smallest is None:
        raise InputError("no format fits all linears", f"add {NONE} to the candidates")
    if smallest.bits > target_bits:
        why = f"; {problems[0]}" if problems else ""
        raise InputError(
            f"{target_bits:g} bits per weight cannot be reached: the least is {smallest.bits:.3f} "
            f"({smallest.counts}){why}",
            f"allow {smallest.bits + 0.005:.2f} bits, or add smaller candidates",
        )


def _mixable(forms: Sequence[Format | None], target: Target) -> Iterator[list[Format | None]]:
    """The largest sets of forms that one checkpoint for the target may hold."""
    named = [form for form in forms if form]
    alone = [form for form in forms if form is None]
    found: list[set[Format]] = []
    for count in range(len(named), 0, -1):
        for some in itertools.combinations(named, count):
            pairs = itertools.combinations(some, 2)
            if all(_mix(*pair, target) for pair in pairs) and not any(set(some) <= known for known in found):
                found.append(set(some))
                yield [*some, *alone]


def _mix(one: Format, other: Format, target: Target) -> bool:
    kinds = {form.inputs.split()[0] for form in (one, other)}
    if target.runtime != REFERENCE and kinds == {"int8", "fp8"}:
        # TensorRT's own trtexec refuses --int8 with --fp8; no engine with both is known.
        return False
    return supported(Quantization(one.name, overrides={"transformer.layers.0.mlp.fc": other.name}), target)
