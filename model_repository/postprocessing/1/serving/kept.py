"""Small output tensors that are kept and sent again: most pieces of text are one of a few thousand words.

The server puts a tensor into shared memory when it is sent first, counts who reads it there, and finds it there when it
is sent again (python_backend, `PbTensor::SaveToSharedMemory`, since 22.04). Making one costs 3 to 6 us and more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

LONGEST = 64
"""Bytes of the largest content that is kept."""


class KeptTensors:
    """The tensors of one model.

    Args:
        limit: most tensors that are kept; each takes about 300 bytes of the model's shared memory.
    """

    def __init__(self, limit: int = 4096) -> None:
        self._limit = limit
        self._kept: dict[Any, Any] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def texts(self, name: str, texts: Sequence[str], shape: tuple[int, ...]) -> Any:
        """A STRING tensor."""
        key = (name, shape, *texts)
        tensor = self._kept.get(key)
        if tensor is None:
            array = np.empty(len(texts), dtype=np.object_)
            array[:] = [text.encode() for text in texts]
            tensor = self._keep(key, sum(map(len, array)), pb_utils.Tensor(name, array.reshape(shape)))
        return tensor

    def array(self, name: str, array: Any) -> Any:
        """A tensor of numbers. One name always has the same dtype."""
        if array.nbytes > LONGEST:
            return pb_utils.Tensor(name, array)
        key = (name, array.shape, array.tobytes())
        tensor = self._kept.get(key)
        if tensor is None:
            tensor = self._keep(key, array.nbytes, pb_utils.Tensor(name, array.copy()))
        return tensor

    def clear(self) -> None:
        """Lets go of all tensors, for a model that outlives its `finalize` in a cycle or a thread."""
        self._kept.clear()

    def _keep(self, key: Any, size: int, tensor: Any) -> Any:
        if size <= LONGEST:
            if len(self._kept) >= self._limit:  # contents come from clients, so what is kept is bounded
                self._kept.clear()
            self._kept[key] = tensor
        return tensor
