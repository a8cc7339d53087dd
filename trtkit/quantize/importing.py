"""Conversion of a source that somebody else quantised: AutoAWQ, GPTQ, compressed-tensors, ModelOpt.

Every module is checked by its tensors' headers, and what the checkpoint becomes is decided, before a weight is read.
Then the layers' tensors are made one layer at a time, and the ranks are written of them as of any others. A source
whose numbers no checkpoint could stand for is refused, with what can be done instead. What is not refused and not exact
is counted: scales that the model's dtype rounds, since the kernels have them in that dtype. What becomes of which
format: `trtkit.quantize.import_formats`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trtkit import architectures
from trtkit.convert.conversion import WORK, Options, WriteRanks, write_here
from trtkit.convert.linears import layer_tensors
from trtkit.convert.plan import CHECKPOINT_DTYPES, Plan
from trtkit.convert.progress import Progress
from trtkit.convert.quantization import Quantization
from trtkit.convert.ranks import SM, weights_by_rank
from trtkit.convert.source import (
    Layout,
    Packed,
    asked_quantization,
    checkpoint_config,
    plan_conversion,
    source_tensors,
)
from trtkit.convert.whole import gather, whole_tensors
from trtkit.errors import InputError
from trtkit.hf import Source
from trtkit.quantize import imports
from trtkit.quantize.import_formats import (
    cache_notes,
    check_shared,
    decide,
    dtype_notes,
    mlp_notes,
    target_generation,
)
from trtkit.quantize.import_linears import Account, Maker, Member, parts_of
from trtkit.quantize.import_modules import Survey, survey
from trtkit.quantize.imports import Scheme
from trtkit.quantize.layer_files import layer_entries, layer_file, read_notes, write_layer
from trtkit.safetensors_io import DTYPES, Reader


@dataclass(frozen=True)
class Import:
    """How a source that somebody else quantised becomes a checkpoint. Nothing of it has been done.

    Attributes:
        plan: of the conversion.
        quantization: of the checkpoint.
        scheme: what the source says of itself.
        members: the quantised linears.
        attentions: layer -> the source's attention module, which may have scales of keys and values.
        sm: the GPU generation that the weights are laid out for; None where they fit all.
        notes: what users should know, a line each.
    """

    plan: Plan
    quantization: Quantization
    scheme: Scheme
    members: Sequence[Member]
    attentions: Mapping[int, str]
    sm: int | None
    notes: Sequence[str]


def import_plan(source: Source, layout: Layout, *, gpu: str | None = None, requantize: bool = False) -> Import:
    """Decides what a quantised source becomes, after checking all of its modules.

    Args:
        layout: without quantisation, which is the source's.
        gpu: where the checkpoint shall run, such as `H100` or `sm90`; needed for int4 with zero points.
        requantize: query, key and value of `fp8` that have different scales may be rounded to the largest.

    Raises:
        InputError: the source is damaged, or what it holds no checkpoint can hold exactly; names the module.
    """
    if asked_quantization(layout) != Quantization():
        raise InputError(
            f"{source.path}: its weights are quantised already, and cannot be quantised once more",
            "leave out the options of quantisation, or convert the original model with them",
        )
    scheme = imports.detect(source.config, source.path)
    if scheme is None:
        raise InputError(f"{source.path}: its weights are not quantised", "convert it as it is")
    plain = checkpoint_config(source, layout)
    with Reader() as reader:
        found = survey(source, scheme, plain, reader)
        quantization = decide(source, found, scheme, plain, layout)
        check_shared(source, found, scheme, reader, requantize=requantize)
        notes = [
            *cache_notes(source, found, scheme, reader),
            *mlp_notes(source, found, reader),
            *dtype_notes(source, found, plain["dtype"]),
        ]
    sm = target_generation(source, quantization, plain, layout, gpu)
    packed = Packed(found.weights, found.tensors)
    plan = plan_conversion(source, replace(layout, quantization=quantization), packed=packed)
    if sm is not None:
        producer = {**plan.config["producer"], SM: sm}
        plan = replace(plan, config={**plan.config, "producer": producer})
    members = _members(found, quantization, plan.config)
    return Import(plan, quantization, scheme, members, found.attentions, sm, notes)


def identity(found: Import) -> Mapping[str, Any]:
    """What beside source and plan determines the tensors, for `Options.quantization`."""
    return {"imported": found.scheme.method}


def importing(
    found: Import,
    *,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
    on_account: Callable[[Account], None] = lambda account: None,
) -> WriteRanks:
    """For `trtkit.convert.conversion.convert`: makes the tensors layer by layer, then writes the ranks.

    Args:
        on_layer: called with decoder layers (done, total).
        on_account: called once, with what is not exact.
    """

    def write(
        plan: Plan, source: Source, folder: Path, options: Options, progress: Progress, advance: Callable[[int], None]
    ) -> None:
        work = folder / WORK
        on_account(make_layers(found, source, work, on_layer=on_layer))
        write_here(plan, source, folder, options, progress, advance, made=layer_entries(work))

    return write


def make_layers(
    found: Import, source: Source, work: Path, *, on_layer: Callable[[int, int], None] = lambda done, total: None
) -> Account:
    """Makes the files of all layers that have none in `work`; what is not exact."""
    layers = found.plan.config["num_hidden_layers"]
    work.mkdir(exist_ok=True)
    account = Account()
    with _Layers(found, source) as maker:
        for layer in range(layers):
            on_layer(layer, layers)
            if not layer_file(work, layer).is_file():
                tensors, own = maker.make(layer)
                write_layer(work, layer, tensors, asdict(own))
            account.add(Account(**read_notes(work, layer)))
    on_layer(layers, layers)
    return account


class _Layers:
    """Makes the tensors of one layer after the other."""

    def __init__(self, found: Import, source: Source) -> None:
        self.found, self.source = found, source
        self.config = found.plan.config
        self.dtype = DTYPES[CHECKPOINT_DTYPES[self.config["dtype"]]]
        self.reader = Reader()
        self.whole, _ = whole_tensors(self.config)
        self.plain = source_tensors(source)

    def __enter__(self) -> _Layers:
        return self

    def __exit__(self, *details: Any) -> None:
        self.reader.__exit__(*details)

    def make(self, layer: int) -> tuple[dict[str, Any], Account]:
        """The tensors of a layer that the plan reads beside the source's, and what of them is not exact."""
        scheme, tensors = self.found.scheme, self.source.tensors

        def read(module: str) -> Any:
            return imports.read(module, scheme, tensors, self.reader)

        def second(module: str) -> float | None:
            return imports.read_second_scale(module, scheme, tensors, self.reader)

        maker = Maker(self.found.quantization, self.dtype, read, second, self.found.sm)
        made: dict[str, Any] = {}
        for member in self.found.members:
            if member.linear.layer == layer:
                made |= maker.tensors(member)
        made |= self._norms(layer)
        if self.found.quantization.kv_cache:
            made |= self._cache_scale(layer, maker.account)
        return made, maker.account

    def _norms(self, layer: int) -> dict[str, Any]:
        """The norms that int8_sq_plugin keeps beside its linears, as they are."""
        made: dict[str, Any] = {}
        for weight in architectures.get(self.config["architecture"]).weights:
            if weight.stage != "layers" or not weight.when(self.config):
                continue
            for name, _, shape in layer_tensors(self.config, self.found.quantization, weight, layer).whole:
                full = f"transformer.layers.{layer}.{name}"
                if name.endswith(".scale_to_int"):
                    made[full] = np.ones(shape, np.float32)
                elif full in self.whole:
                    made[full] = gather(self.whole[full], lambda name: self.reader.tensor(self.plain[name]))
        return made

    def _cache_scale(self, layer: int, account: Account) -> dict[str, Any]:
        attention = self.found.attentions[layer]
        scales = imports.read_kv_scales(attention, self.found.scheme, self.source.tensors, self.reader) or (1.0, 1.0)
        account.caches += scales[0] != scales[1]
        name = f"transformer.layers.{layer}.attention.kv_cache_scaling_factor"
        return {name: np.array([max(scales)], np.float32)}


def _members(found: Survey, quantization: Quantization, config: Mapping[str, Any]) -> list[Member]:
    by_rank = weights_by_rank(config) if "int4_gptq" in quantization.formats else {}
    members = []
    for each in found.quantised:
        form = quantization.format_of(each.linear.name)
        assert form is not None  # noqa: S101 - only linears that are not quantised are excluded
        ranks = by_rank[f"{each.linear.name}.weight"] if form.name == "int4_gptq" else ()
        members.append(Member(each.linear, form, each.experts, [parts_of(rank, found.names) for rank in ranks]))
    return members
