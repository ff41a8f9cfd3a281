"""A constant sparse matrix applied to every row of a batch; where each output is one input, a gather."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor


class _Placed(NamedTuple):
    """What a device needs of the matrix: the gather, or the whole of it."""

    position: Tensor | None  # (outputs,)
    coefficient: Tensor | None  # (outputs,), None for ones
    matrix: Tensor | None  # compressed rows; on the host SciPy's own is faster


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
        if self._position is None and x.device.type == "cpu":
            return torch.from_numpy(np.ascontiguousarray((self.matrix @ x.numpy().T).T))
        placed = self._on(x.device)
        if placed.matrix is not None:
            return (placed.matrix @ x.mT).mT
        assert placed.position is not None
        picked = x[:, self._run] if self._run is not None else x.index_select(1, placed.position)
        return picked if placed.coefficient is None else picked * placed.coefficient

    def _on(self, device: torch.device) -> _Placed:
        if device not in self._placed:
            self._placed[device] = self._place(device)
        return self._placed[device]

    def _place(self, device: torch.device) -> _Placed:
        if self._position is not None:
            coefficient = None if self._coefficient is None else torch.from_numpy(self._coefficient).to(device)
            return _Placed(torch.from_numpy(self._position).to(device), coefficient, None)
        pointer, column = (
            torch.from_numpy(part.astype(np.int64)) for part in (self.matrix.indptr, self.matrix.indices)
        )
        values, shape = torch.from_numpy(self.matrix.data), list(self.matrix.shape)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that compressed rows are a beta feature
            matrix = torch.sparse_csr_tensor(pointer, column, values, size=shape, device=device)
        return _Placed(None, None, matrix)
