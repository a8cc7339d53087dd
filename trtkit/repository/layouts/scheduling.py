"""Parts of config.pbtxt that say when and where a model runs: batches, queue, instances, versions, cache, warm-up.

Sources: triton-inference-server/common, protobuf/model_config.proto; triton-inference-server/server,
docs/user_guide/model_configuration.md, optimization.md and rate_limiter.md.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trtkit.config_serving import ServingConfig
from trtkit.contract_tensors import Tensor
from trtkit.repository.layouts.job import Files

_PACKED = {"BOOL": "?", "INT32": "i", "INT64": "q", "UINT64": "Q", "FP32": "f"}


def batching(serving: ServingConfig) -> dict[str, Any]:
    """Fields of `ModelDynamicBatching`. Defaults are left out, so that what is written was asked for."""
    queue = serving.queue
    policy: dict[str, Any] = {"max_queue_size": serving.max_queue_size}
    if queue.default_timeout_microseconds:
        policy["default_timeout_microseconds"] = queue.default_timeout_microseconds
        policy["timeout_action"] = queue.timeout_action.upper()
    if queue.allow_timeout_override:
        policy["allow_timeout_override"] = True
    fields: dict[str, Any] = {
        "preferred_batch_size": serving.preferred_batch_size,
        "max_queue_delay_microseconds": serving.max_queue_delay_microseconds,
        "default_queue_policy": policy,
    }
    if queue.priority_levels:
        fields["priority_levels"] = queue.priority_levels
        fields["default_priority_level"] = queue.default_level
    return fields


def place(message: Any, serving: ServingConfig, *, kind: str = "KIND_CPU", gpus: bool = False) -> None:
    """Writes the instance groups of the model that executes: how many, where, and what each execution takes.

    Args:
        kind: `KIND_CPU` for python models and for backends that choose their GPUs by a parameter of their own.
        gpus: make one group of kind KIND_GPU for each entry of `gpu_device_ids` instead.
    """
    from tritonclient.grpc import model_config_pb2 as pb

    del message.instance_group[:]
    if gpus and serving.gpu_device_ids:
        for entry in serving.gpu_device_ids:
            ids = [int(one) for one in entry.split(",")]
            message.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_GPU, gpus=ids)
    else:
        message.instance_group.add(count=serving.instances, kind=pb.ModelInstanceGroup.Kind.Value(kind))
    limiter = serving.rate_limiter
    for group in message.instance_group if limiter else ():
        for name, count in limiter.resources.items() if limiter else ():
            group.rate_limiter.resources.add(name=name, count=count)
        group.rate_limiter.priority = limiter.priority if limiter else 0


def choose_versions(message: Any, serving: ServingConfig) -> None:
    """Writes the version policy; the latest version alone is Triton's default."""
    policy = serving.version_policy
    if policy == "all":
        message.version_policy.all.SetInParent()
    elif isinstance(policy, list):
        message.version_policy.specific.versions.extend(policy)
    elif isinstance(policy, int) and policy > 1:
        message.version_policy.latest.num_versions = policy


def cache(message: Any, serving: ServingConfig) -> None:
    """Turns the response cache on where the config says so."""
    if serving.response_cache:
        message.response_cache.enable = True


def warm_up(message: Any, name: str, count: int, values: Sequence[tuple[Tensor, Sequence[Any]]]) -> Files:
    """Adds a warm-up request with these values to a model, and gives the files that hold them.

    Args:
        values: tensors with their elements, as many as one request has; dims of -1 become what is left.
    """
    from tritonclient.grpc import model_config_pb2 as pb

    files: Files = {}
    # batch_size is 1 without batches too: the server skips a request of batch size 0 and does not say so.
    warmup = message.model_warmup.add(name=name, batch_size=1, count=count)
    for tensor, elements in values:
        fixed = math.prod(dim for dim in tensor.dims if dim > 0)
        dims = [dim if dim > 0 else len(elements) // fixed for dim in tensor.dims]
        file = f"{name}_{tensor.name}"
        item = warmup.inputs[tensor.name]
        item.data_type = pb.DataType.Value(f"TYPE_{tensor.dtype}")
        item.dims.extend(dims)
        item.input_data_file = file
        files[f"{message.name}/warmup/{file}"] = raw(tensor.dtype, elements)
    return files


def warm_up_zeros(message: Any, name: str, count: int, size: int) -> None:
    """Adds a warm-up request of zeros and empty texts, with `size` for every dynamic dim."""
    warmup = message.model_warmup.add(name=name, batch_size=1, count=count)
    for tensor in message.input:
        item = warmup.inputs[tensor.name]
        item.data_type = tensor.data_type
        item.dims.extend(dim if dim > 0 else size for dim in tensor.dims)
        item.zero_data = True


def raw(dtype: str, elements: Sequence[Any]) -> bytes:
    """Elements as Triton reads them from a file: little-endian, texts each behind its length in four bytes."""
    if dtype == "STRING":
        texts = [one if isinstance(one, bytes) else str(one).encode() for one in elements]
        return b"".join(struct.pack("<I", len(text)) + text for text in texts)
    return struct.pack(f"<{len(elements)}{_PACKED[dtype]}", *elements)


def token_ids(tokenizer_dir: Path, text: str, *, add_special_tokens: bool) -> list[int]:
    """Tokens of a text, by the tokenizer that is copied into the repository."""
    from tokenizers import Tokenizer

    ids: list[int] = (
        Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
        .encode(text, add_special_tokens=add_special_tokens)
        .ids
    )
    return ids
