"""A constant sparse matrix applied to every row of a batch; where each output is one input, a
gather."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from convlayer.memo import once_for_each


class _Placed(NamedTuple):
    """What a device needs of the matrix: the gather of each output, or every entry's row."""

    position: Tensor  # (outputs,), or (entries,)
    coefficient: Tensor | None  # the same, None for ones
    row: Tensor | None  # (entries,)


class LinearMap:
    """(B, inputs) -> (B, outputs), float64, for a matrix of shape (outputs, inputs).

    An output without any input reads input `blank`, which holds zero, if there is one.
    """

    def __init__(self, matrix: sp.csr_array, blank: int | None = None) -> None:
        matrix = sp.csr_array(matrix)
        matrix.sum_duplicates()
        self.shape = matrix.shape
        self.read = np.unique(matrix.indices).astype(np.int64)  # the inputs that it reads
        self._matrix: sp.csr_array | None = matrix
        self.run: slice | None = (
            None  # the inputs that the outputs are, where they are just these, in order
        )
        self._position: np.ndarray | None = None
        self._coefficient: np.ndarray | None = None
        counts = np.diff(matrix.indptr)
        if matrix.shape[1] and (counts <= 1).all():
            position = np.full(matrix.shape[0], blank or 0, dtype=np.int64)
            coefficient = np.full(matrix.shape[0], 1.0 if blank is not None else 0.0)
            position[counts == 1], coefficient[counts == 1] = matrix.indices, matrix.data
            self._matrix, self._position = None, position
            self._coefficient = None if (coefficient == 1).all() else coefficient
            if self._coefficient is None and len(position) and (np.diff(position) == 1).all():
                self.run = slice(int(position[0]), int(position[-1]) + 1)

    def __call__(self, x: Tensor) -> Tensor:
        if not self.shape[0] or not len(self.read):
            return x.new_zeros(len(x), self.shape[0])
        if self._matrix is not None and x.device.type == "cpu":  # there SciPy's product is faster
            return torch.from_numpy(np.ascontiguousarray((self._matrix @ x.numpy().T).T))
        placed = self._on(x.device)
        picked = x[:, self.run] if self.run is not None else x.index_select(1, placed.position)
        if placed.coefficient is not None:
            picked = picked * placed.coefficient
        return (
            picked
            if placed.row is None
            else x.new_zeros(len(x), self.shape[0]).index_add_(1, placed.row, picked)
        )

    @once_for_each
    def _on(self, device: torch.device) -> _Placed:
        position, coefficient, row = self._position, self._coefficient, None
        if position is None:
            assert self._matrix is not None
            position, coefficient = self._matrix.indices.astype(np.int64), self._matrix.data
            row = torch.from_numpy(
                np.repeat(np.arange(self.shape[0]), np.diff(self._matrix.indptr))
            ).to(device)
        weight = None if coefficient is None else torch.from_numpy(coefficient).to(device)
        return _Placed(torch.from_numpy(position).to(device), weight, row)
