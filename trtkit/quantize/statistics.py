"""What calibration keeps of the inputs of a linear: sums over tokens, never the tokens themselves.

With the Gram matrix G = X^T X / tokens of the inputs X, the squared error that a changed weight makes at the outputs is
tr(E G E^T) with E the change of the weight: exact for these tokens, and as cheap for a million of them as for one.
"""

from __future__ import annotations

import numpy as np
import torch


class InputStatistics:
    """Sums over the inputs of one linear.

    Args:
        columns: input features.
        gram: also keep the Gram matrix, float32 (columns, columns).

    Attributes:
        tokens: how many inputs were seen.
        largest: (columns,) the largest magnitude of each input, float32.
    """

    def __init__(self, columns: int, *, gram: bool, device: torch.device) -> None:
        self.tokens = 0
        self.largest = torch.zeros(columns, device=device)
        self._magnitudes = torch.zeros(columns, device=device)
        self._gram = torch.zeros(columns, columns, device=device) if gram else None
        self._cross: torch.Tensor | None = None
        self._averaged = False

    def add(self, inputs: torch.Tensor, exact: torch.Tensor | None = None) -> None:
        """Counts inputs (..., columns).

        Args:
            exact: what the same inputs are in the unquantised model, if they differ.
        """
        if self._averaged:
            raise ValueError("the sums were averaged already")
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        self.tokens += len(rows)
        magnitudes = rows.abs()
        self._magnitudes += magnitudes.sum(0)
        self.largest = torch.maximum(self.largest, magnitudes.amax(0))
        if self._gram is None:
            return
        _add_product(self._gram, rows, rows)
        if exact is not None:
            if self._cross is None:
                self._cross = torch.zeros_like(self._gram)
            _add_product(self._cross, exact.reshape(-1, exact.shape[-1]).float(), rows)

    @property
    def mean_magnitude(self) -> torch.Tensor:
        """(columns,) mean of the magnitude of each input, float32."""
        return self._magnitudes / max(1, self.tokens)

    @property
    def gram(self) -> torch.Tensor:
        """X^T X / tokens. Once it was asked for nothing can be added."""
        if self._gram is None:
            raise ValueError("no Gram matrix was kept")
        self._average()
        return self._gram

    @property
    def cross(self) -> torch.Tensor | None:
        """Y^T X / tokens with Y the inputs in the unquantised model; None where these are the same."""
        self._average()
        return self._cross

    def _average(self) -> None:
        """Divides the matrices by the tokens, in place: they are the largest things in memory."""
        if not self._averaged:
            self._averaged = True
            for matrix in (self._gram, self._cross):
                if matrix is not None:
                    matrix.div_(max(1, self.tokens))

    @property
    def finite(self) -> bool:
        return bool(torch.isfinite(self._magnitudes).all())


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left^T right."""
    if left is right and left.device.type == "cpu":
        # BLAS computes half of a symmetric product, which numpy asks it for.
        rows = left.numpy()
        total += torch.from_numpy(np.dot(rows.T, rows))
    else:
        total.addmm_(left.T, right)
