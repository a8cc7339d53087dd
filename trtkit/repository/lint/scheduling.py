"""Lint rules about batching, queues, priorities, instances and resources of one model.

The rules are those of triton-inference-server/core, src/model_config_utils.cc (ValidateModelConfig,
NormalizeInstanceGroup, ValidateInstanceGroup) and src/rate_limiter.cc.
"""

from __future__ import annotations

from collections.abc import Iterator

from trtkit.findings import Finding
from trtkit.repository.lint.repository import Model, enum_name
from trtkit.repository.lint.rules import finding


def lint_scheduling(model: Model) -> Iterator[Finding]:
    """Findings about how requests reach the model."""
    for check in (_batching, _priorities, _ordering, _cache, _decoupled, _instances, _resources, _metrics):
        yield from check(model)


def _batching(model: Model) -> Iterator[Finding]:
    config = model.config
    size = config.max_batch_size
    if size < 0:
        fix = "use 0 for no batching, or more"
        yield finding("TK111", model.at("max_batch_size"), f"max_batch_size is {size}", fix)
        return
    if config.HasField("dynamic_batching") and size == 0:
        fix = "set max_batch_size to 1 or more"
        yield finding("TK113", model.at("dynamic_batching"), "no request is ever batched", fix)
    for number, preferred in enumerate(config.dynamic_batching.preferred_batch_size):
        if not 1 <= preferred <= size:
            cause = f"preferred_batch_size {preferred} with max_batch_size {size}"
            fix = f"use sizes from 1 to {size}" if size else "remove it, or set max_batch_size"
            yield finding("TK112", model.at(f"dynamic_batching.preferred_batch_size[{number}]"), cause, fix)
    for number, tensor in enumerate(config.input):
        if tensor.allow_ragged_batch and size == 0:
            cause = f"input '{tensor.name}' allows ragged batches, but there are no batches"
            yield finding("TK114", model.at(f"input[{number}].name"), cause, "set max_batch_size to 1 or more")


def _priorities(model: Model) -> Iterator[Finding]:
    batching = model.config.dynamic_batching
    levels = batching.priority_levels
    if not levels:
        return
    place = model.at("dynamic_batching.priority_levels")
    cause = "priority levels made requests of 20 ms wait for 500 ms and more (measured on server 2.51)"
    yield finding("TK116", place, cause, "remove priority_levels; give priority before the server")
    if not 1 <= batching.default_priority_level <= levels:
        cause = f"default_priority_level {batching.default_priority_level} of {levels}"
        place = model.at("dynamic_batching.default_priority_level", "dynamic_batching.priority_levels")
        yield finding("TK117", place, cause, f"set it to 1 to {levels}")
    for level in batching.priority_queue_policy:
        if not 1 <= level <= levels:
            place = model.at("dynamic_batching.priority_queue_policy")
            cause = f"priority_queue_policy for level {level} of {levels}"
            yield finding("TK117", place, cause, f"use levels from 1 to {levels}")


def _ordering(model: Model) -> Iterator[Finding]:
    from tritonclient.grpc import model_config_pb2 as pb

    batching = model.config.dynamic_batching
    if not batching.preserve_ordering:
        return
    place = model.at("dynamic_batching.preserve_ordering")
    if batching.priority_levels > 1:
        cause = f"preserve_ordering with {batching.priority_levels} priority levels"
        yield finding("TK161", place, cause, "keep the order or use priorities, not both")
    policies = [batching.default_queue_policy, *batching.priority_queue_policy.values()]
    if any(p.default_timeout_microseconds and p.timeout_action == pb.ModelQueuePolicy.DELAY for p in policies):
        cause = "preserve_ordering, and requests that time out are delayed"
        yield finding("TK161", place, cause, "set timeout_action: REJECT, or remove preserve_ordering")


def _cache(model: Model) -> Iterator[Finding]:
    config = model.config
    if not config.response_cache.enable:
        return
    place = model.at("response_cache")
    if config.HasField("sequence_batching"):
        fix = "turn off response_cache"
        yield finding("TK118", place, "the cache does not know that answers depend on the sequence", fix)
    elif config.model_transaction_policy.decoupled:
        yield finding("TK118", place, "the cache holds single answers only", "turn off response_cache or decoupled")
    elif model.server.cache is False:
        cause = "the server has no cache and serves the model without one"
        yield finding("TK165", place, cause, "start the server with --cache-config, or turn off response_cache")
    elif model.server.cache is None:
        cause = "it does nothing unless the server is started with --cache-config"
        yield finding("TK165", place, cause, "give the server a cache, such as local,size=268435456", severity="info")


def _decoupled(model: Model) -> Iterator[Finding]:
    config = model.config
    if not config.model_transaction_policy.decoupled:
        return
    if config.dynamic_batching.preserve_ordering:
        cause = "preserve_ordering does nothing for the responses of a decoupled model"
        yield finding("TK119", model.at("dynamic_batching.preserve_ordering"), cause, "remove it")
    if config.HasField("sequence_batching"):
        cause = "sequence batching expects one response per request"
        fix = "turn off decoupled, or batch dynamically"
        yield finding("TK119", model.at("sequence_batching"), cause, fix)


def _instances(model: Model) -> Iterator[Finding]:
    from tritonclient.grpc import model_config_pb2 as pb

    kinds = pb.ModelInstanceGroup
    if model.is_ensemble:
        return
    gpus = model.server.gpus
    for number, group in enumerate(model.config.instance_group):
        here = f"instance_group[{number}]"
        kind = enum_name(kinds.Kind, group.kind)
        if group.gpus and group.kind in (kinds.KIND_CPU, kinds.KIND_MODEL):
            place = model.at(f"{here}.gpus")
            yield finding("TK115", place, f"{kind} with gpus {list(group.gpus)}", "remove gpus, or use KIND_GPU")
        absent = [gpu for gpu in group.gpus if gpus is not None and not 0 <= gpu < gpus]
        if group.kind == kinds.KIND_AUTO and absent:
            cause = f"GPU {absent[0]} is not there, so the instances go to the CPU, where gpus may not be given"
            yield finding("TK115", model.at(f"{here}.gpus"), cause, "remove gpus")
        elif group.kind == kinds.KIND_GPU and (absent or gpus == 0):
            cause = f"KIND_GPU, and the server sees {gpus} GPUs" + (f", not GPU {absent[0]}" if absent else "")
            yield finding("TK167", model.at(f"{here}.kind"), cause, "use KIND_CPU, or a machine with that GPU")
        if group.count < 0 or (group.count == 0 and "count" in model.text and model.says(f"{here}.count")):
            cause = f"count {group.count} makes one instance or more, by the backend's default"
            yield finding("TK166", model.at(f"{here}.count"), cause, "write the number of instances that you want")
        if group.profile and model.config.platform != "tensorrt_plan":
            fix = "remove profile; only TensorRT plans have them"
            yield finding("TK168", model.at(f"{here}.profile"), f"profile {list(group.profile)}", fix)


def _resources(model: Model) -> Iterator[Finding]:
    seen: dict[str, bool] = {}
    for number, group in enumerate(model.config.instance_group):
        for resource in group.rate_limiter.resources:
            is_global = getattr(resource, "global")
            if seen.setdefault(resource.name, is_global) != is_global:
                place = model.at(f"instance_group[{number}].rate_limiter.resources")
                cause = f"resource '{resource.name}' is global in one place and per device in another"
                yield finding("TK169", place, cause, "use two names, or make both the same")


def _metrics(model: Model) -> Iterator[Finding]:
    for number, control in enumerate(model.config.model_metrics.metric_control):
        if not control.metric_identifier.family or not control.histogram_options.buckets:
            place = model.at(f"model_metrics.metric_control[{number}]")
            cause = "metric_control needs metric_identifier.family and histogram_options.buckets"
            yield finding("TK177", place, cause, "add what is missing")
