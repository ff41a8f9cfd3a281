"""A constant sparse matrix applied to every row of a batch; where each output is one input, a gather."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor


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
        self.matrix = sp.csr_array(matrix)
        self.matrix.sum_duplicates()
        self._run: slice | None = None
        self._position: np.ndarray | None = None
        self._coefficient: np.ndarray | None = None
        counts = np.diff(self.matrix.indptr)
        if self.matrix.shape[1] and (counts <= 1).all():
            position = np.full(self.matrix.shape[0], blank or 0, dtype=np.int64)
            coefficient = np.full(self.matrix.shape[0], 1.0 if blank is not None else 0.0)
            position[counts == 1], coefficient[counts == 1] = self.matrix.indices, self.matrix.data
            self._position = position
            self._coefficient = None if (coefficient == 1).all() else coefficient
            if len(position) and (np.diff(position) == 1).all():
                self._run = slice(int(position[0]), int(position[-1]) + 1)
        self._placed: dict[torch.device, _Placed] = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_placed": {}}

    def __call__(self, x: Tensor) -> Tensor:
        if not self.matrix.shape[0] or not self.matrix.nnz:
            return x.new_zeros(len(x), self.matrix.shape[0])
        if self._position is None and x.device.type == "cpu":  # there SciPy's product is faster
            return torch.from_numpy(np.ascontiguousarray((self.matrix @ x.numpy().T).T))
        placed = self._on(x.device)
        picked = x[:, self._run] if self._run is not None else x.index_select(1, placed.position)
        if placed.coefficient is not None:
            picked = picked * placed.coefficient
        if placed.row is None:
            return picked
        return x.new_zeros(len(x), self.matrix.shape[0]).index_add_(1, placed.row, picked)

    def _on(self, device: torch.device) -> _Placed:
        if device not in self._placed:
            self._placed[device] = self._place(device)
        return self._placed[device]

    def _place(self, device: torch.device) -> _Placed:
        position, coefficient, row = self._position, self._coefficient, None
        if position is None:
            position, coefficient = self.matrix.indices.astype(np.int64), self.matrix.data
            row = torch.from_numpy(np.repeat(np.arange(self.matrix.shape[0]), np.diff(self.matrix.indptr))).to(device)
        weight = None if coefficient is None else torch.from_numpy(coefficient).to(device)
        return _Placed(torch.from_numpy(position).to(device), weight, row)
