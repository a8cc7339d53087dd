"""Hidden states between two layers, on disk: (samples, length, hidden), raw numbers in the dtype of the model.

Only a batch is in memory. The page cache keeps the rest there as long as there is room, and the disk takes what does
not fit. A finished file has its final name, so a run that was killed goes on with the layer that it was at.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


class HiddenStates:
    """What goes into one layer.

    Args:
        path: final name of the file.
        shape: (samples, length, hidden).
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.path, self.shape, self.dtype = path, shape, dtype
        self._partial = path.with_name(f"{path.name}.part")
        self._sample = shape[1] * shape[2] * dtype.itemsize

    @property
    def complete(self) -> bool:
        return self.path.is_file() and self.path.stat().st_size == self.shape[0] * self._sample

    def read(self, where: slice, device: torch.device) -> torch.Tensor:
        """Samples of a complete file, (samples, length, hidden)."""
        count = where.stop - where.start
        raw = bytearray(count * self._sample)
        with self.path.open("rb", buffering=0) as file:
            file.seek(where.start * self._sample)
            if file.readinto(raw) != len(raw):
                raise OSError(f"{self.path} is shorter than it was")
        return torch.frombuffer(raw, dtype=self.dtype).view(count, *self.shape[1:]).to(device)

    def write(self, where: slice, values: torch.Tensor) -> None:
        """Samples of a file under construction."""
        raw = values.to("cpu", self.dtype).contiguous().view(_BITS[self.dtype]).numpy().data
        descriptor = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            view, offset = memoryview(raw).cast("B"), where.start * self._sample
            while view:
                count = os.pwrite(descriptor, view, offset)
                view, offset = view[count:], offset + count
        finally:
            os.close(descriptor)

    def finish(self) -> None:
        os.truncate(self._partial, self.shape[0] * self._sample)  # a leftover of another run may have been longer
        self._partial.replace(self.path)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
