"""Lint rules about ensembles: whether the steps fit each other, the ensemble's own tensors and the decoupled ones.

The rules are those of triton-inference-server/core: src/model_config_utils.cc (ValidateEnsembleSchedulingConfig) and
src/ensemble_scheduler/ensemble_utils.cc (ValidateEnsembleConfig).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from trtkit.findings import Finding
from trtkit.repository.lint.repository import Model, enum_name
from trtkit.repository.lint.rules import finding


@dataclass
class _Use:
    """One end of an ensemble tensor: the tensor of a step, or of the ensemble itself (step None)."""

    step: int | None
    owner: Model
    tensor: Any

    @property
    def name(self) -> str:
        return f"'{self.tensor.name}' of '{self.owner.name}'"


@dataclass
class _Graph:
    """The ensemble as tensors with their ends, in the order in which the server meets them. Tensors with an end at a
    model that cannot be read are in `unknown`."""

    model: Model
    producers: dict[str, list[_Use]] = field(default_factory=dict)
    consumers: dict[str, list[_Use]] = field(default_factory=dict)
    ends: dict[str, list[_Use]] = field(default_factory=dict)
    unknown: set[str] = field(default_factory=set)

    def add(self, name: str, use: _Use, *, produces: bool) -> None:
        (self.producers if produces else self.consumers).setdefault(name, []).append(use)
        self.ends.setdefault(name, []).append(use)


def lint_ensemble(model: Model, models: dict[str, Model]) -> list[Finding]:
    """Findings about an ensemble, given all models of its repository by name."""
    graph = _Graph(model)
    findings = [*_settings(model), *_steps(graph, models)]
    if not model.config.ensemble_scheduling.step:
        fix = "add ensemble_scheduling with at least one step"
        return [*findings, finding("TK157", model.at("ensemble_scheduling", "platform"), "no step", fix)]
    findings += [*_tensors_meet(graph), *_ends_agree(graph)]
    order = _order(graph)
    if order is None:
        fix = "break the circle: a step can only use what earlier ones produce"
        findings.append(finding("TK151", model.at("ensemble_scheduling"), "some steps wait for each other", fix))
    elif circle := _circle(model, models):
        fix = "break the circle: an ensemble cannot contain itself"
        findings.append(finding("TK151", model.at("ensemble_scheduling"), " contains ".join(circle), fix))
    else:
        findings += _decoupling(graph, models, order)
    return findings


def _settings(model: Model) -> Iterator[Finding]:
    config = model.config
    given = [
        name
        for name in ("instance_group", "dynamic_batching", "sequence_batching", "optimization", "model_warmup")
        if _is_set(config, name)
    ]
    given += ["backend"] if config.backend else []
    for name in given:
        yield finding("TK152", model.at(name), f"{name} is not for ensembles", f"remove {name}; set it on the steps")


def _is_set(config: Any, name: str) -> bool:
    value = getattr(config, name)
    return len(value) > 0 if name in ("instance_group", "model_warmup") else bool(config.HasField(name))


def _steps(graph: _Graph, models: dict[str, Model]) -> Iterator[Finding]:
    """Checks each step against its model, and fills the graph."""
    model = graph.model
    for tensor in model.config.input:
        graph.add(tensor.name, _Use(None, model, tensor), produces=True)
    for tensor in model.config.output:
        graph.add(tensor.name, _Use(None, model, tensor), produces=False)
    for number, step in enumerate(model.config.ensemble_scheduling.step):
        target = models.get(step.model_name)
        for part in ("model_name", "input_map", "output_map"):
            if not getattr(step, part):
                place = model.at(f"ensemble_scheduling.step[{number}]")
                yield finding("TK157", place, f"step {number + 1} has no {part}", f"add {part}")
        if target is None and step.model_name:
            fix = f"add the model, or name one of {', '.join(name for name in models if name != model.name)}"
            yield finding(
                "TK141", model.place(step.model_name), f"model '{step.model_name}' is not in the repository", fix
            )
        elif target is not None and target.config is not None:
            yield from _step_model(model, number, target)
        if target is None or target.config is None:
            graph.unknown.update(step.input_map.values(), step.output_map.values())
            continue
        yield from _connect(graph, number, step.input_map, target, is_input=True)
        yield from _connect(graph, number, step.output_map, target, is_input=False)


def _step_model(model: Model, number: int, target: Model) -> Iterator[Finding]:
    step = model.config.ensemble_scheduling.step[number]
    here = f"ensemble_scheduling.step[{number}]"
    size, limit = model.config.max_batch_size, target.config.max_batch_size
    if size > limit > 0:
        cause = f"max_batch_size {size}, but step '{target.name}' takes {limit}"
        fix = f"set it to {limit} or less, or raise that of '{target.name}'"
        yield finding("TK150", model.at("max_batch_size"), cause, fix)
    if step.model_version != -1 and step.model_version not in target.served_versions():
        cause = f"version {step.model_version} of '{target.name}' is not served"
        place = model.at(f"{here}.model_version", here)
        yield finding("TK155", place, cause, "use model_version: -1 for the newest")
    for tensor in target.config.input:
        if not tensor.optional and tensor.name not in step.input_map:
            cause = f"input '{tensor.name}' of step '{target.name}' is required"
            yield finding("TK143", model.at(f"{here}.model_name"), cause, "map a tensor to it in input_map")


def _connect(graph: _Graph, number: int, mapping: Any, target: Model, *, is_input: bool) -> Iterator[Finding]:
    tensors = target.config.input if is_input else target.config.output
    kind = "input" if is_input else "output"
    for name, value in mapping.items():
        # Every tensor of that name: the server takes an output that its model declares twice for two producers.
        found = [tensor for tensor in tensors if tensor.name == name]
        for tensor in found:
            graph.add(value, _Use(number, target, tensor), produces=not is_input)
        if found:
            continue
        graph.unknown.add(value)
        cause = f"step '{target.name}' has no {kind} '{name}'"
        yield finding(
            "TK142",
            graph.model.place(name),
            cause,
            f"use one of {', '.join(sorted(tensor.name for tensor in tensors))}",
        )


def _tensors_meet(graph: _Graph) -> Iterator[Finding]:
    """Every tensor has exactly one producer and at least one consumer."""
    model = graph.model
    for name, ends in graph.consumers.items():
        if name in graph.producers or name in graph.unknown:
            continue
        if ends[0].step is None:
            yield finding(
                "TK144", model.place(name), f"no step produces output '{name}'", "add it to a step's output_map"
            )
        if any(end.step is not None for end in ends):
            cause = f"'{name}' feeds {ends[-1].name}, but nothing produces it"
            yield finding(
                "TK146", model.place(name), cause, "produce it in a step, or make it an input of the ensemble"
            )
    for name, ends in graph.producers.items():
        steps = [end.name for end in ends if end.step is not None]
        if len(steps) > 1:
            cause = f"'{name}' comes from {' and '.join(steps)}"
            yield finding("TK156", model.place(name), cause, "give one of them another name")
        elif steps and len(ends) > 1:  # loaded, but a request with the input gets an error beside its answer
            cause = f"'{name}' is an input of the ensemble and comes from {steps[0]}, too"
            yield finding("TK156", model.place(name), cause, "give one of them another name")
        if name in graph.consumers or name in graph.unknown:
            continue
        if ends[0].step is None:
            yield finding(
                "TK145", model.place(name), f"no step uses input '{name}'", "remove it, or map it to a step's input"
            )
        else:
            cause = f"nothing uses '{name}' from {ends[0].name}"
            yield finding("TK147", model.place(name), cause, "remove it from output_map, or use it")


def _ends_agree(graph: _Graph) -> Iterator[Finding]:
    """All ends of a tensor agree with the one that the server meets first, and with the one that produces it."""
    from tritonclient.grpc import model_config_pb2 as pb

    for name, ends in graph.ends.items():
        sources = [ends[0], *graph.producers.get(name, [])[:1]]
        for end in ends[1:]:
            for source in sources:
                if source.tensor.data_type != end.tensor.data_type:
                    types = [enum_name(pb.DataType, use.tensor.data_type) for use in (source, end)]
                    cause = f"'{name}' is {types[0]} as {source.name}, and {types[1]} as {end.name}"
                    yield finding("TK148", graph.model.place(name), cause, "make the two types equal")
                    break
                if not _shapes_fit(source, end):
                    shapes = [_dims(use) for use in (source, end)]
                    cause = f"'{name}' is {shapes[0]} as {source.name}, and {shapes[1]} as {end.name}"
                    yield finding("TK149", graph.model.place(name), cause, "make the two shapes equal, or use -1")
                    break
            else:
                yield from _single_rows(graph, name, end)


def _single_rows(graph: _Graph, name: str, end: _Use) -> Iterator[Finding]:
    """A step without batches in an ensemble with them: it loads when the dims are equal, and answers one row only."""
    limit, source = graph.model.config.max_batch_size, graph.ends[name][0]
    differ = end.owner.config.max_batch_size == 0 < source.owner.config.max_batch_size
    if limit > 1 and differ and len(_dims(end)) == len(_dims(source)):
        cause = f"{end.name} takes no batches, so requests of more than one row fail, and the ensemble allows {limit}"
        fix = f"give '{end.owner.name}' a max_batch_size, or dims with the batch in front: [ -1, ... ]"
        yield finding("TK149", graph.model.place(name), cause, fix, severity="warning")


def _dims(use: _Use) -> list[int]:
    """Of the ensemble's own tensors the reshaped ones count."""
    tensor = use.tensor
    return list(tensor.reshape.shape if use.step is None and tensor.HasField("reshape") else tensor.dims)


def _shapes_fit(one: _Use, other: _Use) -> bool:
    """Whether two shapes can be equal, with or without the batch dimension that a batching model has."""
    full = [[-1, *_dims(use)] if use.owner.config.max_batch_size > 0 else _dims(use) for use in (one, other)]
    return any(
        len(a) == len(b) and all(x == y or -1 in (x, y) for x, y in zip(a, b, strict=True))
        for a, b in ([_dims(one), _dims(other)], full)
    )


def _circle(model: Model, models: dict[str, Model]) -> list[str] | None:
    """Names of ensembles, each of which is a step of the one before, from the model back to it."""
    trails = [[model.name]]
    seen: set[str] = set()
    while trails:
        trail = trails.pop()
        inner = models.get(trail[-1])
        if inner is None or inner.config is None:
            continue
        for name in {step.model_name for step in inner.config.ensemble_scheduling.step}:
            if name == model.name:
                return [*trail, name]
            if name not in seen:
                seen.add(name)
                trails.append([*trail, name])
    return None


def _order(graph: _Graph) -> list[int] | None:
    """The steps so that each comes behind those whose tensors it uses; None when there is no such order."""
    needs: dict[int, set[int]] = {number: set() for number in range(len(graph.model.config.ensemble_scheduling.step))}
    for name, ends in graph.consumers.items():
        for source in graph.producers.get(name, []):
            for end in ends:
                if source.step is not None and end.step is not None:
                    needs[end.step].add(source.step)
    order: list[int] = []
    while len(order) < len(needs):
        ready = [number for number in needs if number not in order and needs[number] <= set(order)]
        if not ready:
            return None
        order += ready
    return order


def _decoupling(graph: _Graph, models: dict[str, Model], order: list[int]) -> Iterator[Finding]:
    """Follows from which decoupled step each tensor stems; None stands for the request itself.

    Tensors that nothing readable produces have no stem: other rules speak about them.
    """
    model = graph.model
    steps = model.config.ensemble_scheduling.step
    stems: dict[str, int | None] = {tensor.name: None for tensor in model.config.input}
    for number in order:
        step = steps[number]
        target = models.get(step.model_name)
        sources = {stems[value] for value in step.input_map.values() if value in stems}
        if len(sources) > 1:
            cause = f"step '{step.model_name}' takes tensors from {_describe(sources, steps)}"
            place = model.at(f"ensemble_scheduling.step[{number}]")
            yield finding("TK154", place, cause, "pass what it needs through the decoupled model")
        stem = next((source for source in sources if source is not None), None)
        if target is None or target.config is None:
            continue
        if stem is not None and (count := _instance_count(target)) > 1:
            cause = f"step '{target.name}' has {count} instances behind decoupled '{steps[stem].model_name}'"
            yield finding("TK153", target.at("instance_group.count"), cause, "set its instance count to 1")
        if _is_decoupled(target, models):
            stem = number
        stems.update(dict.fromkeys(step.output_map.values(), stem))
    sources = {stems[tensor.name] for tensor in model.config.output if tensor.name in stems}
    if len(sources) > 1:
        cause = f"the outputs come from {_describe(sources, steps)}"
        yield finding("TK154", model.at("output"), cause, "return only tensors that stem from the same decoupled step")


def _describe(stems: set[int | None], steps: Any) -> str:
    names = ["before any decoupled step" if s is None else f"decoupled '{steps[s].model_name}'" for s in stems]
    return " and from ".join(sorted(names))


def _instance_count(model: Model) -> int:
    """Instances that the server makes; without a group, and without a count in it, one."""
    groups = model.config.instance_group
    return sum(max(group.count, 1) * max(len(group.gpus), 1) for group in groups) if groups else 1


def _is_decoupled(model: Model, models: dict[str, Model], seen: frozenset[str] = frozenset()) -> bool:
    if model.config is None or model.name in seen:
        return False
    if model.is_ensemble:
        steps = [models[s.model_name] for s in model.config.ensemble_scheduling.step if s.model_name in models]
        return any(_is_decoupled(step, models, seen | {model.name}) for step in steps)
    return bool(model.config.model_transaction_policy.decoupled)
