"""Bits against damage: the choices that nothing beats in both, as a table and as a drawing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

NONE = "none"
"""Stands for a linear that is not quantised."""
HEADINGS = ("bits per weight", "predicted KL", "linears", "")
MOST_ROWS = 16

_WIDTH, _HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 24, 56, 56
_STYLE = """
svg { color-scheme: light dark; font: 13px system-ui, sans-serif; --back: #fff; --text: #1c2430; --faint: #5f6b7a;
  --grid: #e3e7ec; --line: #1f6feb; --mark: #c2410c; }
@media (prefers-color-scheme: dark) { svg { --back: #12161c; --text: #e6eaf0; --faint: #9aa6b4; --grid: #2a313b;
  --line: #6cb0ff; --mark: #ff9a5c; } }
.back { fill: var(--back); } text { fill: var(--text); } .faint { fill: var(--faint); }
.title { font-size: 16px; font-weight: 600; } .grid { stroke: var(--grid); } .axis { stroke: var(--faint); }
.front { fill: none; stroke: var(--line); stroke-width: 1.5; } .dot { fill: var(--line); }
.other { fill: var(--back); stroke: var(--faint); stroke-width: 1.5; }
.chosen { fill: var(--mark); stroke: var(--back); stroke-width: 2; } .name { fill: var(--mark); font-weight: 600; }
"""


@dataclass(frozen=True)
class Point:
    """A choice of formats.

    Attributes:
        bits: mean per weight of the linears, scales included.
        damage: predicted mean KL divergence from the unquantised model, in nats per token.
        formats: TRT-LLM name of a linear -> name of its format, or `none`.
        label: a name of its own, of a uniform choice that of the format.
    """

    bits: float
    damage: float
    formats: Mapping[str, str]
    label: str = ""

    @property
    def counts(self) -> str:
        """`int4_awq 20, fp8 8, none 4`"""
        counted = Counter(self.formats.values()).most_common()
        return ", ".join(f"{name} {count}" for name, count in counted)


def rows(
    front: Sequence[Point], chosen: Point, others: Sequence[Point] = (), *, most: int = MOST_ROWS
) -> list[tuple[str, str, str, str]]:
    """The front as a table under `HEADINGS`, the chosen point marked. Of a long front `most` points, evenly apart in
    bits. Uniform choices (`others`) stand where their bits put them."""
    shown = _thinned(front, chosen, most)
    marked = [(point, "<- chosen" if point is chosen else "") for point in shown]
    marked += [
        (point, f"only {point.label}") for point in others if point.formats not in [each.formats for each in shown]
    ]
    marked.sort(key=lambda each: (each[0].bits, each[0].damage))
    return [(f"{point.bits:.3f}", f"{point.damage:.3g}", point.counts, mark) for point, mark in marked]


def _thinned(front: Sequence[Point], chosen: Point, most: int) -> list[Point]:
    if len(front) <= most:
        return list(front)
    low, high = front[0].bits, front[-1].bits
    wanted = [low + (high - low) * step / (most - 2) for step in range(most - 1)]
    near = [min(front, key=lambda point: abs(point.bits - bits)) for bits in wanted]
    return [point for point in front if point is chosen or any(point is each for each in near)]


def plot(front: Sequence[Point], chosen: Point, others: Sequence[Point] = ()) -> str:
    """A self-contained SVG of the front, with the chosen point and uniform choices (`others`) named. Damage is on a
    logarithmic axis; what has none stands on the axis below."""
    every = [*front, chosen, *others]
    x = _Linear(min(point.bits for point in every), max(point.bits for point in every))
    y = _Logarithmic([point.damage for point in every])
    parts = [*_axes(x, y), *_front(front, x, y)]
    parts += [_other(point, x, y) for point in others]
    parts += _chosen(chosen, x, y)
    title = f"{len(front)} best choices of formats; chosen: {chosen.bits:.2f} bits per weight"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title)}"><title>{escape(title)}</title><style>{_STYLE}</style>'
        f'<rect class="back" width="{_WIDTH}" height="{_HEIGHT}"/>'
        f'<text class="title" x="{_LEFT}" y="28">Predicted damage by size</text>' + "".join(parts) + "</svg>\n"
    )


class _Linear:
    """Bits to pixels from the left."""

    def __init__(self, low: float, high: float) -> None:
        step = next(each for each in (0.25, 0.5, 1, 2, 4, 8) if (high - low) / each <= 14)
        self.low, self.high = math.floor(low / step) * step, math.ceil(high / step) * step
        if self.low == self.high:
            self.high += step
        count = round((self.high - self.low) / step)
        self.ticks = [(self.low + index * step, f"{self.low + index * step:g}") for index in range(count + 1)]

    def __call__(self, value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (value - self.low) / (self.high - self.low)


class _Logarithmic:
    """Damage to pixels from the top; 0 is at the bottom, a decade below the least that is more."""

    def __init__(self, values: Sequence[float]) -> None:
        positive = [value for value in values if value > 0] or [1.0]
        first, last = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
        if first == last:
            last += 1
        self.zero = min(values) <= 0
        self.low, self.high = first - self.zero, last
        step = -(-(last - first) // 6)
        self.ticks = [(10.0**power, f"1e{power}") for power in range(first, last + 1, step)]
        if self.zero:
            self.ticks.insert(0, (0.0, "0"))

    def __call__(self, value: float) -> float:
        height = _HEIGHT - _TOP - _BOTTOM
        power = self.low if value <= 0 else math.log10(value)
        return _TOP + height * (self.high - power) / (self.high - self.low)


def _axes(x: _Linear, y: _Logarithmic) -> list[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for value, label in x.ticks:
        at = f"{x(value):.1f}"
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(f'<text class="faint" x="{at}" y="{bottom + 18}" text-anchor="middle">{label}</text>')
    for value, label in y.ticks:
        top = y(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{top:.1f}" y2="{top:.1f}"/>')
        parts.append(f'<text class="faint" x="{_LEFT - 8}" y="{top + 4:.1f}" text-anchor="end">{label}</text>')
    parts.append(f'<path class="axis" fill="none" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>')
    middle = (_LEFT + right) / 2
    parts.append(
        f'<text x="{middle:.1f}" y="{_HEIGHT - 14}" text-anchor="middle">bits per weight of the linears</text>'
    )
    across = (_TOP + bottom) / 2
    parts.append(
        f'<text transform="translate(18 {across:.1f}) rotate(-90)" text-anchor="middle">'
        "predicted KL divergence, nats per token</text>"
    )
    return parts


def _front(front: Sequence[Point], x: _Linear, y: _Logarithmic) -> list[str]:
    places = [(x(point.bits), y(point.damage)) for point in front]
    line = " ".join(f"{left:.1f},{top:.1f}" for left, top in places)
    dots = [
        f'<circle class="dot" cx="{left:.1f}" cy="{top:.1f}" r="3"><title>{escape(_words(point))}</title></circle>'
        for point, (left, top) in zip(front, places, strict=True)
    ]
    return [f'<polyline class="front" points="{line}"/>', *dots]


def _other(point: Point, x: _Linear, y: _Logarithmic) -> str:
    left, top = x(point.bits), y(point.damage)
    after = left < _WIDTH - 140
    return (
        f'<circle class="other" cx="{left:.1f}" cy="{top:.1f}" r="5"><title>{escape(_words(point))}</title></circle>'
        f'<text class="faint" x="{left + (9 if after else -9):.1f}" y="{top - 8:.1f}" '
        f'text-anchor="{"start" if after else "end"}">{escape(point.label)}</text>'
    )


def _chosen(point: Point, x: _Linear, y: _Logarithmic) -> list[str]:
    """The point, and its figures in the head, where nothing can lie over them."""
    left, top, right = x(point.bits), y(point.damage), _WIDTH - _RIGHT
    return [
        f'<circle class="chosen" cx="{left:.1f}" cy="{top:.1f}" r="7"><title>{escape(_words(point))}</title></circle>',
        f'<text class="name" x="{right}" y="28" text-anchor="end">'
        f"\u25cf chosen: {point.bits:.2f} bits, KL {point.damage:.2g}</text>",
    ]


def _words(point: Point) -> str:
    return f"{point.bits:.3f} bits, KL {point.damage:.3g}: {point.counts}"
