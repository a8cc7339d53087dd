"""Formats chosen linear by linear: sizes, what may stand together, refusals, and that the choice is a good one."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest

from tests.conftest import MakeSource
from trtkit import hf
from trtkit.convert.conversion import Options, convert
from trtkit.convert.linears import linears
from trtkit.convert.quantization import FORMATS, Quantization, get
from trtkit.convert.source import Layout, plan_conversion
from trtkit.convert.support import ENGINE, REFERENCE, Target, supported
from trtkit.errors import InputError

torch = pytest.importorskip("torch")

from trtkit.convert.readback import load_transformers_model  # noqa: E402
from trtkit.evaluate.models import load_source  # noqa: E402
from trtkit.evaluate.scores import score  # noqa: E402
from trtkit.quantize.allocation import Option  # noqa: E402
from trtkit.quantize.calibration import load_tokens  # noqa: E402
from trtkit.quantize.conversion import quantizing  # noqa: E402
from trtkit.quantize.mixture import CANDIDATES, Menu, allocate, choose, linear_bits, quantization  # noqa: E402
from trtkit.quantize.pareto import NONE  # noqa: E402
from trtkit.quantize.sensitivity import blocks  # noqa: E402

TINY = Path(__file__).parents[3] / "examples" / "tiny-llama"
SHAPE = {
    "hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4,
    "num_hidden_layers": 2,
}  # fmt: skip
PLUGINS = [name for name, form in FORMATS.items() if form.linear_wise or form.import_only]


@pytest.mark.parametrize("name", [NONE, *(name for name in FORMATS if not FORMATS[name].import_only)])
def test_bits_are_those_of_the_files(make_source: MakeSource, name: str) -> None:
    source = hf.open_source(make_source(**SHAPE))
    form = None if name == NONE else get(name)
    asked = Quantization() if form is None else Quantization(form.name)
    plan = plan_conversion(source, Layout(quantization=asked))
    for linear in linears(plan.config):
        own = [tensor for tensor in plan.ranks[0] if tensor.name.startswith(f"{linear.name}.")]
        stored = 8 * sum(tensor.nbytes for tensor in own)
        if form is not None and form.weight_only:  # trtllm-build makes them: a scale per output beside the codes
            assert stored == 16 * linear.rows * linear.columns
            stored = form.bits * linear.rows * linear.columns + 16 * linear.rows
        assert linear_bits(linear, form, plan.config, None) == stored


def test_a_request_for_formats_gives_these_formats(make_source: MakeSource) -> None:
    config = plan_conversion(hf.open_source(make_source(**SHAPE)), Layout()).config
    names = [linear.name for linear in linears(config)]
    draw = random.Random(1)
    for offered in (["fp8"], [NONE], ["fp8", NONE], ["int4_awq", "fp8"], ["int4_awq", "int8_sq", "fp8", NONE]):
        formats = {name: draw.choice(offered) for name in names}
        asked = quantization(formats, 64, "fp8")
        assert asked.kv_cache == "fp8"
        found = {name: form.name if (form := asked.format_of(name)) else NONE for name in names}
        assert found == formats
        assert asked.group_size == (64 if "int4_awq" in formats.values() else None)


def test_formats_that_do_not_go_together_are_not_mixed(make_source: MakeSource, tmp_path: Path) -> None:
    """An engine holds weights with groups or weights without (support), and inputs in int8 or in fp8."""
    source = hf.open_source(make_source(**SHAPE))
    config = plan_conversion(source, Layout()).config
    tokens = np.random.default_rng(0).integers(0, 131, (4, 16))
    for runtime, apart in ((ENGINE, True), (REFERENCE, False)):
        target = Target(runtime, config["architecture"])
        folder = tmp_path / runtime
        folder.mkdir()
        names = ["int4_awq", "int8_wo", "fp8", "int8_sq", NONE]
        found = choose(source, config, tokens, tokens, names, 9.0, folder, group_size=64, target=target)
        held = [set(point.formats.values()) for point in found.front]
        together = any({"int4_awq", "int8_wo"} <= each or {"fp8", "int8_sq"} <= each for each in held)
        assert together != apart
        for point in found.front:
            assert supported(quantization(point.formats, 64), target)


def test_candidates_that_the_target_lacks_are_left_out(make_source: MakeSource, tmp_path: Path) -> None:
    source = hf.open_source(make_source(**SHAPE))
    config = plan_conversion(source, Layout()).config
    tokens = np.random.default_rng(0).integers(0, 131, (4, 16))
    ampere = Target(ENGINE, config["architecture"], sm=80)
    found = choose(source, config, tokens, tokens, ["fp8", "int8_sq", NONE], 12.0, tmp_path, target=ampere)
    assert {each for point in found.front for each in point.formats.values()} == {"int8_sq", NONE}
    assert [point.label for point in found.uniform] == ["int8_sq", NONE]
    with pytest.raises(InputError, match="fp8 does not run on SM80"):
        choose(source, config, tokens, tokens, ["fp8", NONE], 12.0, tmp_path, target=ampere)


def nothing_runs(make_source: MakeSource, names: list[str], bits: float, **options: Any) -> str:
    """The cause of a refusal that comes before anything is read."""
    source = hf.open_source(make_source(**{**SHAPE, **options.pop("shape", {})}))
    config = plan_conversion(source, Layout(**options)).config
    tokens = np.zeros((0, 0), np.int64)
    with pytest.raises(InputError) as caught:
        choose(source, config, tokens, tokens, names, bits, Path("/nowhere"), group_size=128)
    assert caught.value.fix
    return caught.value.cause


@pytest.mark.parametrize("name", PLUGINS)
def test_formats_of_whole_blocks_are_refused(make_source: MakeSource, name: str) -> None:
    assert "cannot be chosen linear by linear" in nothing_runs(make_source, ["fp8", name], 9)


def test_what_cannot_be_reached_is_told_before_any_work(make_source: MakeSource) -> None:
    assert "4 bits per weight cannot be reached: the least is 4.354" in nothing_runs(
        make_source, ["int4_awq", "fp8"], 4
    )
    assert "no format" in nothing_runs(make_source, [NONE], 4)
    assert "one pipeline stage" in nothing_runs(make_source, ["fp8"], 9, pp=2)
    groups = nothing_runs(make_source, ["int4_awq", "fp8"], 5, shape={"intermediate_size": 192})
    assert "cannot be reached" in groups
    assert "the 192 output features of transformer.layers.0.mlp.fc are no multiple of 128" in groups
    assert "mlp.fc" in nothing_runs(make_source, ["int4_awq"], 5, shape={"intermediate_size": 192})


def test_the_best_set_of_formats_wins(make_source: MakeSource) -> None:
    """Two sets that cannot be mixed: each is best somewhere."""
    config = plan_conversion(hf.open_source(make_source(**SHAPE)), Layout()).config
    own = blocks(config)
    fp8, int8 = get("fp8"), get("int8_sq")
    options = [[Option(8 * block.weights, 1.0), Option(9 * block.weights, 0.1), Option(16 * block.weights, 0.0)]
               for block in own]  # fmt: skip
    menu = Menu(own, [[fp8, int8, None]] * len(own), options)
    apart, together = [[fp8, None], [int8, None]], [[fp8, int8, None]]
    assert allocate(menu, apart, 8.0)[0].formats.keys() == {linear.name for linear in linears(config)}
    assert set(allocate(menu, apart, 8.0)[0].formats.values()) == {"fp8"}
    assert set(allocate(menu, apart, 9.0)[0].formats.values()) == {"int8_sq"}
    assert set(allocate(menu, together, 8.5)[0].formats.values()) == {"fp8", "int8_sq"}
    chosen, front = allocate(menu, apart, 8.5)
    assert set(chosen.formats.values()) <= {"fp8", NONE}
    assert chosen in front
    assert [point.damage for point in front] == sorted((point.damage for point in front), reverse=True)


def test_on_a_trained_model_it_is_better_than_chance(tmp_path: Path) -> None:
    """The KL divergence of the written checkpoint, against random assignments of the same number of bits."""
    source = hf.open_source(TINY)
    plain = load_source(TINY)
    config = plan_conversion(source, Layout()).config
    calibration = load_tokens(TINY, samples=16, length=128)
    held_out = load_tokens(TINY, samples=48, length=128, held_out=True).tokens
    work = tmp_path / "work"
    work.mkdir()
    found = choose(source, config, calibration.tokens, held_out[:16], CANDIDATES, 5.0, work, group_size=64)
    assert 4.7 < found.chosen.bits <= 5.0
    assert not list(work.iterdir())

    def measured(formats: Mapping[str, str], name: str) -> float:
        plan = plan_conversion(source, Layout(quantization=quantization(formats, 64)))
        convert(plan, source, tmp_path / name, options=Options(sync=False), write=quantizing(calibration))
        return score(load_transformers_model(tmp_path / name), held_out[16:], plain).mean_kl

    chosen = measured(found.chosen.formats, "chosen")
    assert found.chosen.damage == pytest.approx(chosen, rel=0.5)
    others = random_formats(config, 4, low=found.chosen.bits - 0.1, high=5.0)
    assert chosen <= median(measured(formats, f"random{number}") for number, formats in enumerate(others))
    assert found.quantization == quantization(found.chosen.formats, 64)
    assert found.chosen in found.front
    assert [row[0] for row in found.rows if row[3] == "<- chosen"] == [f"{found.chosen.bits:.3f}"]
    assert f"chosen: {found.chosen.bits:.2f} bits" in found.drawing
    bits = {point.label: point.bits for point in found.uniform}
    assert set(bits) == set(CANDIDATES)
    assert bits["int4_awq"] < found.chosen.bits < bits["fp8"] < bits["int8_sq"] < bits[NONE] == 16


def random_formats(config: Mapping[str, Any], count: int, low: float, high: float) -> list[dict[str, str]]:
    """Assignments that an engine can hold, with between `low` and `high` bits per weight."""
    draw, own, found = random.Random(0), blocks(config), list[dict[str, str]]()
    weights = sum(block.weights for block in own)
    while len(found) < count:
        names = [*draw.choice([["fp8"], ["int8_sq"]]), "int4_awq", "int4_awq", "int4_awq", NONE]
        taken = {block.name: draw.choice(names) for block in own}
        formats = {linear.name: taken[block.name] for block in own for linear in block.linears}
        size = sum(
            linear_bits(linear, None if name == NONE else get(name), config, 64)
            for linear in linears(config)
            if (name := formats[linear.name])
        )
        if low <= size / weights <= high:
            found.append(formats)
    return found
