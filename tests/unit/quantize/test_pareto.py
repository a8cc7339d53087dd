"""The front of choices as a table and as a drawing."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from trtkit.quantize.pareto import HEADINGS, Point, plot, rows

SPACE = "{http://www.w3.org/2000/svg}"


def front(count: int) -> list[Point]:
    """From 4 bits to 16, where nothing is lost any more."""
    shares = [index / (count - 1) for index in range(count)]
    return [
        Point(4 + 12 * share, 0.02 * (1 - share) ** 3, {f"l{index}": "fp8" if share < 1 else "none"})
        for index, share in enumerate(shares)
    ]


def parsed(svg: str) -> ET.Element:
    return ET.fromstring(svg)  # noqa: S314 - our own


def drawn(svg: str, tag: str, kind: str) -> list[ET.Element]:
    return [each for each in parsed(svg).iter(f"{SPACE}{tag}") if each.get("class") == kind]


def test_every_point_is_drawn_within_the_picture_and_in_order() -> None:
    points = front(30)
    svg = plot(points, points[4])
    dots = drawn(svg, "circle", "dot")
    places = [(float(dot.attrib["cx"]), float(dot.attrib["cy"])) for dot in dots]
    assert len(places) == 30
    assert places == sorted(places)  # to the right means down: less damage is lower
    assert all(0 < left < 720 and 0 < top < 420 for left, top in places)
    (chosen,) = drawn(svg, "circle", "chosen")
    assert (float(chosen.attrib["cx"]), float(chosen.attrib["cy"])) == places[4]


def test_what_it_says() -> None:
    points = front(5)
    svg = plot(points, points[1], [Point(8, 0.1, {"l0": "fp8"}, "fp8 <&>")])
    words = [each.text for each in parsed(svg).iter(f"{SPACE}text")]
    assert "bits per weight of the linears" in words
    assert "predicted KL divergence, nats per token" in words
    assert "fp8 <&>" in words
    assert any(text and "chosen: 7.00 bits, KL 0.0084" in text for text in words)
    assert {"4", "16", "0", "1e-1", "1e-4"} <= set(words)
    assert "prefers-color-scheme: dark" in svg
    assert "href" not in svg and "<script" not in svg  # self-contained


@pytest.mark.parametrize(
    "points",
    [
        [Point(16, 0.0, {"a": "none"})],
        [Point(4.25, 1e-3, {"a": "int4_awq"})],
        [Point(4.25, 1.0, {"a": "int4_awq"}), Point(4.26, 1e-12, {"a": "fp8"})],
        [Point(4.25, 3e4, {"a": "int4_awq"}), Point(32.0, 0.0, {"a": "none"})],
    ],
)
def test_odd_fronts_are_drawn_too(points: list[Point]) -> None:
    svg = plot(points, points[0])
    assert "nan" not in svg and "inf" not in svg.replace("info", "")
    (chosen,) = drawn(svg, "circle", "chosen")
    assert 0 < float(chosen.attrib["cx"]) < 720 and 0 < float(chosen.attrib["cy"]) < 420
    assert len(drawn(svg, "text", "faint")) < 40


def test_a_long_front_is_thinned_but_keeps_its_ends_and_the_chosen() -> None:
    points = front(300)
    table = rows(points, points[17])
    assert len(table) <= 17
    assert all(len(row) == len(HEADINGS) for row in table)
    bits = [float(row[0]) for row in table]
    assert bits == sorted(bits)
    assert (bits[0], bits[-1]) == (4, 16)
    assert [row[0] for row in table if row[3]] == [f"{points[17].bits:.3f}"]


def test_uniform_choices_stand_beside_the_front_once() -> None:
    points = front(5)
    same = Point(points[0].bits, points[0].damage, points[0].formats, "int4_awq")
    other = Point(8.0, 0.5, {"l0": "fp8", "l1": "fp8", "l2": "none"}, "fp8")
    table = rows(points, points[1], [same, other])
    assert len(table) == 6
    assert ("8.000", "0.5", "fp8 2, none 1", "only fp8") in table
