"""Whether a quantised format fits a model's linears and their parallel layout, told before any work.

Rules: TensorRT-LLM, tensorrt_llm/quantization/layers.py. WeightOnlyGroupwiseQuantLinear and WeightOnlyQuantLinear round
both sides of a linear, split or not, up to a multiple of TP times 64 (128 for W4A8; the group size where larger), and
loading then refuses the smaller tensors of the checkpoint. Experts and the PyTorch backend
(tensorrt_llm/_torch/modules/linear.py) round nothing up, but their kernels take the same multiples on each rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from trtkit.convert.linears import linears
from trtkit.convert.quantization import FORMATS, Format, Quantization
from trtkit.errors import InputError
from trtkit.untrusted import printable


@dataclass(frozen=True)
class Sides:
    """The sizes of a linear of the whole model.

    Attributes:
        name: TRT-LLM module name, such as `transformer.layers.3.mlp.proj`.
        rows, columns: output and input features.
        split: what TP splits, the rows (column-parallel) or the columns (row-parallel).
        kv_rows: rows of keys, and as many of values, among `rows` ...
        head: ... and of one head: with more ranks than key/value heads, heads are repeated.
        experts: it is one of experts, which expert-parallel groups share.
    """

    name: str
    rows: int
    columns: int
    split: Literal["rows", "columns"]
    kv_rows: int = 0
    head: int = 0
    experts: bool = False

    def rows_of(self, tp: int) -> int:
        """Output features of all ranks together."""
        return self.rows + 2 * max(0, tp * self.head - self.kv_rows)


def sides(config: Mapping[str, Any]) -> list[Sides]:
    """Of every linear of the model of a checkpoint's config.json."""
    head = config["head_size"]
    found = []
    for linear in linears(config):
        keys = any(part.split == "kv_heads" for part in linear.weight.parts)
        found.append(
            Sides(
                linear.name,
                linear.rows,
                linear.columns,
                "columns" if linear.row_parallel else "rows",
                config["num_key_value_heads"] * head if keys else 0,
                head if keys else 0,
                linear.experts > 0,
            )
        )
    return found


def check_divisible(
    q: Quantization, shapes: Iterable[Sides], tp: int, *, ep: int = 1, runtime: str = "tensorrtllm"
) -> None:
    """Whether every linear can be quantised so and split among `tp` ranks in `ep` expert-parallel groups.

    Raises:
        InputError: one cannot; the cause names it and its numbers, the fix what would fit.
    """
    shapes = list(shapes)
    if problem := next(_problems(q, shapes, tp, ep, runtime), None):
        raise InputError(problem, _fix(q, shapes, tp, ep, runtime))


def check_stages(q: Quantization, pp: int) -> None:
    """Whether the names of modules mean the same on every pipeline stage, each of which numbers its layers from 0.

    Raises:
        InputError: a pattern or a format is for one layer and there are several stages.
    """
    for name in (*q.exclude, *q.overrides):
        if pp > 1 and any(part.isdigit() for part in name.split(".")):
            raise InputError(
                f"'{printable(name)}' names a layer, but each of the {pp} pipeline stages counts its own from 0",
                "use --pp 1, or patterns that hold for all layers",
            )


def fits(q: Quantization, shapes: Iterable[Sides], tp: int, *, ep: int = 1, runtime: str = "tensorrtllm") -> bool:
    return next(_problems(q, shapes, tp, ep, runtime), None) is None


def _problems(q: Quantization, shapes: Iterable[Sides], tp: int, ep: int, runtime: str) -> Iterator[str]:
    concerned = [(form, shape) for shape in shapes if (form := q.format_of(shape.name)) and form.multiple > 1]
    groups = [q.group_size or 1 if form.group_sizes else 1 for form, _ in concerned]
    ranks = [tp // ep if shape.experts else tp for _, shape in concerned]
    # Groups first: they are what users choose.
    for (form, shape), group, count in zip(concerned, groups, ranks, strict=True):
        yield from _group_problem(form, shape, group, count)
    for (form, shape), group, count in zip(concerned, groups, ranks, strict=True):
        yield from _multiple_problem(form, shape, group, count, runtime != "llmapi" and not shape.experts)


def _group_problem(form: Format, shape: Sides, group: int, tp: int) -> Iterator[str]:
    if shape.columns % group:
        yield f"{form.name}: groups of {group} do not divide the {shape.columns} input features of {shape.name}"
    elif shape.split == "columns" and shape.columns % (group * tp):
        yield (
            f"{form.name}: TP {tp} splits a group of {shape.name}: its {shape.columns} input features "
            f"are {shape.columns / tp:g} per rank, no multiple of group size {group}"
        )


def _multiple_problem(form: Format, shape: Sides, group: int, tp: int, padded: bool) -> Iterator[str]:
    for side, extent in (("rows", shape.rows_of(tp)), ("columns", shape.columns)):
        # Groups run along the columns: on rows their size counts only where TensorRT-LLM rounds both up alike.
        unit = max(form.multiple, group) if padded or side == "columns" else form.multiple
        split = padded or side == shape.split
        if extent % (unit * tp if split else unit):
            features = "output" if side == "rows" else "input"
            need = f"{unit * tp} ({unit} x TP {tp})" if split and tp > 1 else str(unit)
            yield f"{form.name}: the {extent} {features} features of {shape.name} are no multiple of {need}"


def _fix(q: Quantization, shapes: list[Sides], tp: int, ep: int, runtime: str) -> str:
    """What fits: another group size, another TP size, both, and always a format that needs no multiples."""

    def fit(group: int | None, size: int) -> bool:
        return fits(replace(q, group_size=group), shapes, size, ep=ep, runtime=runtime)

    sizes = [size for size in range(1, tp) if tp % size == 0 and size % ep == 0]
    grouped = [FORMATS[name].group_sizes for name in q.formats if FORMATS[name].group_sizes]
    groups = [group for group in (grouped[0] if grouped else ()) if all(group in each for each in grouped)]
    others = [group for group in groups if group != q.group_size]
    found = [f"group size {group}" for group in others if fit(group, tp)]
    if fitting := [str(size) for size in sizes if fit(q.group_size, size)]:
        found.append(f"TP {' or '.join(fitting)}")
    if not found:
        both = [(group, size) for group in others for size in sizes if fit(group, size)]
        found = [f"group size {group} with TP {size}" for group, size in both[-1:]]
    free = ", ".join(name for name, form in FORMATS.items() if form.multiple == 1)
    return f"use {'; or '.join([*found, f'a format without such multiples ({free})'])}"
