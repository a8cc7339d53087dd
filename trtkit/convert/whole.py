"""Tensors of a whole model, as TensorRT-LLM names and joins them, made of a source's tensors and taken apart again.

What quantisation works on, and what a quantised checkpoint is read back to: TP 1, PP 1, nothing quantised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from trtkit.convert.cast import Array
from trtkit.convert.plan import PlannedTensor, plan_checkpoint
from trtkit.convert.source import source_tensors
from trtkit.hf import Source
from trtkit.safetensors_io import Reader


def whole_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the same model on one GPU, unquantised."""
    mapping = {"world_size": 1, "tp_size": 1, "pp_size": 1}
    if "moe_ep_size" in config["mapping"]:
        mapping |= {"moe_tp_size": 1, "moe_ep_size": 1}
    plain = {"quant_algo": None, "kv_cache_quant_algo": None}
    return {**config, "mapping": mapping, "use_parallel_embedding": False, "quantization": plain}


def whole_tensors(config: Mapping[str, Any]) -> tuple[dict[str, PlannedTensor], dict[str, tuple[int, ...]]]:
    """The tensors of the whole model by name, and the shapes of the source's tensors that they are made of."""
    plan = plan_checkpoint(whole_config(config))
    return {tensor.name: tensor for tensor in plan.ranks[0]}, plan.sources


class SourceReader:
    """The tensors of a source under the names of its family's table, one unit of the model at a time (see
    `trtkit.convert.plan.PlannedTensor.unit`). Use as a context manager.

    Attributes:
        whole: the tensors of the whole model by name.
        shapes: of the source's tensors.
    """

    def __init__(self, source: Source, config: Mapping[str, Any]) -> None:
        self.whole, self.shapes = whole_tensors(config)
        self._tensors = source_tensors(source)
        self._reader = Reader()
        self._units: dict[int, dict[str, None]] = {}
        for tensor in self.whole.values():
            for piece in tensor.pieces:
                self._units.setdefault(tensor.unit, {})[piece.source] = None

    def __enter__(self) -> SourceReader:
        return self

    def __exit__(self, *details: Any) -> None:
        self._reader.__exit__(*details)

    def read(self, name: str) -> Array:
        """One tensor, in the source's dtype."""
        return self._reader.tensor(self._tensors[name])

    def tensors(self, unit: int) -> Iterator[tuple[str, Array]]:
        """All tensors of a unit, one after the other."""
        for name in self._units.get(unit, ()):
            yield name, self.read(name)


def gather(tensor: PlannedTensor, read: Callable[[str], Array]) -> Array:
    """One tensor of the whole model, float32.

    Args:
        read: a tensor of the source by its name in the family's table, of any float dtype.
    """
    values = np.zeros(int(np.prod(tensor.shape)), np.float32)
    for piece in tensor.pieces:
        where = tuple(slice(start, stop) for start, stop in piece.box)
        part = read(piece.source).reshape(piece.view)[where]
        part = part.T if piece.transposed else part
        target = values[piece.element : piece.element + piece.count].reshape(part.shape)
        target[...] = part
        if piece.plus:
            target += np.float32(piece.plus)
    return values.reshape(tensor.shape)


def scatter(tensor: PlannedTensor, values: Array, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Array]]:
    """The inverse of `gather`: the source tensors that one tensor is made of, in the dtype of `values`.

    Of sources that the tensor holds only a part of, the rest is zero.
    """
    flat = np.ascontiguousarray(values).reshape(-1)
    found: dict[str, Array] = {}
    for piece in tensor.pieces:
        source = found.setdefault(piece.source, np.zeros(shapes[piece.source], values.dtype))
        extents = [stop - start for start, stop in piece.box]
        part = flat[piece.element : piece.element + piece.count]
        part = part.reshape(extents[::-1]).T if piece.transposed else part.reshape(extents)
        if piece.plus:
            part = part.astype(np.float32) - np.float32(piece.plus)
        source.reshape(piece.view)[tuple(slice(start, stop) for start, stop in piece.box)] = part
    yield from found.items()
