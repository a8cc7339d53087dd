"""Lint rules about ensembles: whether the steps fit each other, the ensemble's own tensors and the decoupled ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from trtkit.findings import Finding
from trtkit.repository.lint_rules import Model, finding


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
    """The ensemble as tensors with their ends. Ends at models that cannot be read are in `unknown`."""

    model: Model
    producers: dict[str, list[_Use]] = field(default_factory=dict)
    consumers: dict[str, list[_Use]] = field(default_factory=dict)
    unknown: set[str] = field(default_factory=set)


def lint_ensemble(model: Model, models: dict[str, Model]) -> list[Finding]:
    """Findings about an ensemble, given all models of its repository by name."""
    graph = _Graph(model)
    findings = [*_settings(model), *_steps(graph, models)]
    findings += [*_tensors_meet(graph), *_ends_agree(graph)]
    order = _order(graph)
    if order is None:
        fix = "break the circle: a step can only use what earlier ones produce"
        findings.append(finding("TK151", model.place("ensemble_scheduling"), "some steps wait for each other", fix))
    else:
        findings += _decoupling(graph, models, order)
    return findings


def _settings(model: Model) -> Iterator[Finding]:
    config = model.config
    given = [
        name
        for name in ("instance_group", "dynamic_batching", "sequence_batching", "optimization")
        if _is_set(config, name)
    ]
    given += ["backend"] if config.backend else []
    for name in given:
        yield finding("TK152", model.place(name), f"{name} is not for ensembles", f"remove {name}; set it on the steps")


def _is_set(config: Any, name: str) -> bool:
    value = getattr(config, name)
    return len(value) > 0 if name == "instance_group" else bool(config.HasField(name))


def _steps(graph: _Graph, models: dict[str, Model]) -> Iterator[Finding]:
    """Checks each step against its model, and fills the graph."""
    model = graph.model
    for tensor in model.config.input:
        graph.producers.setdefault(tensor.name, []).append(_Use(None, model, tensor))
    for tensor in model.config.output:
        graph.consumers.setdefault(tensor.name, []).append(_Use(None, model, tensor))
    for number, step in enumerate(model.config.ensemble_scheduling.step):
        target = models.get(step.model_name)
        if target is None:
            fix = f"add the model, or name one of {', '.join(name for name in models if name != model.name)}"
            yield finding(
                "TK141", model.place(step.model_name), f"model '{step.model_name}' is not in the repository", fix
            )
        elif target.config is not None:
            yield from _step_model(model, step, target)
        if target is None or target.config is None:
            graph.unknown.update(step.input_map.values(), step.output_map.values())
            continue
        yield from _connect(graph, number, step.input_map, target, is_input=True)
        yield from _connect(graph, number, step.output_map, target, is_input=False)


def _step_model(model: Model, step: Any, target: Model) -> Iterator[Finding]:
    size, limit = model.config.max_batch_size, target.config.max_batch_size
    if size > limit > 0:
        cause = f"max_batch_size {size}, but step '{target.name}' takes {limit}"
        yield finding(
            "TK150",
            model.place("max_batch_size"),
            cause,
            f"set it to {limit} or less, or raise that of '{target.name}'",
        )
    if step.model_version > 0 and step.model_version not in target.served_versions():
        cause = f"version {step.model_version} of '{target.name}' is not served"
        yield finding("TK155", model.place(target.name), cause, "use model_version: -1 for the newest")
    for tensor in target.config.input:
        if not tensor.optional and tensor.name not in step.input_map:
            cause = f"input '{tensor.name}' of step '{target.name}' is required"
            yield finding("TK143", model.place(target.name), cause, "map a tensor to it in input_map")


def _connect(graph: _Graph, number: int, mapping: Any, target: Model, *, is_input: bool) -> Iterator[Finding]:
    tensors = target.config.input if is_input else target.config.output
    kind = "input" if is_input else "output"
    ends = graph.consumers if is_input else graph.producers
    for name, value in mapping.items():
        # Every tensor of that name: the server takes an output that its model declares twice for two producers.
        found = [tensor for tensor in tensors if tensor.name == name]
        for tensor in found:
            ends.setdefault(value, []).append(_Use(number, target, tensor))
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
        if len(ends) > 1:
            cause = f"'{name}' comes from {' and '.join(end.name for end in ends)}"
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
    from tritonclient.grpc import model_config_pb2 as pb

    for name, sources in graph.producers.items():
        for end in graph.consumers.get(name, []):
            source = sources[0]
            if source.tensor.data_type != end.tensor.data_type:
                types = [pb.DataType.Name(use.tensor.data_type) for use in (source, end)]
                cause = f"'{name}' is {types[0]} as {source.name}, and {types[1]} as {end.name}"
                yield finding("TK148", graph.model.place(name), cause, "make the two types equal")
            elif not _shapes_fit(_full_shape(source), _full_shape(end)):
                shapes = [list(use.tensor.dims) for use in (source, end)]
                cause = f"'{name}' is {shapes[0]} as {source.name}, and {shapes[1]} as {end.name}"
                yield finding("TK149", graph.model.place(name), cause, "make the two shapes equal, or use -1")


def _full_shape(use: _Use) -> list[int]:
    dims = list(use.tensor.dims)
    return [-1, *dims] if use.owner.config.max_batch_size else dims


def _shapes_fit(one: list[int], other: list[int]) -> bool:
    return len(one) == len(other) and all(a == b or -1 in (a, b) for a, b in zip(one, other, strict=True))


def _order(graph: _Graph) -> list[int] | None:
    """The steps so that each comes behind those whose tensors it uses; None when there is no such order."""
    needs: dict[int, set[int]] = {number: set() for number in range(len(graph.model.config.ensemble_scheduling.step))}
    for name, ends in graph.consumers.items():
        for source in graph.producers.get(name, []):
            for end in ends:
                if source.step is not None and end.step is not None:
                    needs[end.step].add(source.step)
    names = [step.model_name for step in graph.model.config.ensemble_scheduling.step]
    if graph.model.name in names:
        return None
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
            yield finding(
                "TK154", model.place(step.model_name), cause, "pass what it needs through the decoupled model"
            )
        stem = next((source for source in sources if source is not None), None)
        if target is None or target.config is None:
            continue
        if stem is not None and (count := _instance_count(target)) > 1:
            cause = f"step '{target.name}' has {count} instances behind decoupled '{steps[stem].model_name}'"
            yield finding("TK153", f"{target.name}/config.pbtxt", cause, "set its instance count to 1")
        if _is_decoupled(target, models):
            stem = number
        stems.update(dict.fromkeys(step.output_map.values(), stem))
    sources = {stems[tensor.name] for tensor in model.config.output if tensor.name in stems}
    if len(sources) > 1:
        cause = f"the outputs come from {_describe(sources, steps)}"
        yield finding(
            "TK154", model.place("output"), cause, "return only tensors that stem from the same decoupled step"
        )


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
