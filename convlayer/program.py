"""What a cone program is: one sparsity pattern, many rows of values.

    minimise    1/2 x'Px + q'x
    subject to  Ax + s = b,  s in K

with dual y in K*, Px + q + A'y = 0 and s'y = 0. A `Program` holds what all rows of a batch share (sizes, cones, sparsity);
`Data` holds the values, one row for each instance. An array whose leading dimension is 1 is shared by all rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from convlayer.cones import Product

DENSE_ENTRIES = 4_000_000  # a dense copy of P and A may take this many numbers a batch (32 MB)


@dataclass(frozen=True, eq=False)
class Program:
    """The shared part of a family of cone programs.

    P is symmetric and stored by its upper triangle; both patterns are in compressed-column order.
    """

    n: int
    m: int
    cones: Product
    P_rows: np.ndarray  # (nnz(P),) row of each stored entry, P_rows <= P_cols
    P_cols: np.ndarray  # (nnz(P),)
    A_rows: np.ndarray  # (nnz(A),)
    A_cols: np.ndarray  # (nnz(A),)

    @cached_property
    def P_indptr(self) -> np.ndarray:
        return np.searchsorted(self.P_cols, np.arange(self.n + 1)).astype(np.int64)

    @cached_property
    def A_indptr(self) -> np.ndarray:
        return np.searchsorted(self.A_cols, np.arange(self.n + 1)).astype(np.int64)

    @cached_property
    def A_by_row(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A in compressed-row order: (permutation of the stored values, columns, row pointer)."""
        order = np.lexsort((self.A_cols, self.A_rows))
        indptr = np.searchsorted(self.A_rows[order], np.arange(self.m + 1)).astype(np.int64)
        return order, self.A_cols[order], indptr

    @cached_property
    def indices(self) -> dict[str, Tensor]:
        """The patterns as index tensors."""
        return {name: torch.from_numpy(np.ascontiguousarray(getattr(self, name), dtype=np.int64))
                for name in ("P_rows", "P_cols", "A_rows", "A_cols")}

    @cached_property
    def scale_group(self) -> Tensor:
        """(m,) rows that must share one scale: each row of an elementwise cone its own, one for each block of the others."""
        group = np.arange(self.m)
        for block in self.cones.blocks:
            if block.name not in ("zero", "nonnegative"):
                group[block.start:block.start + block.size] = block.start
        return torch.from_numpy(group)

    @cached_property
    def inequalities(self) -> Tensor:
        """(m,) rows of the nonnegative cone."""
        rows = torch.zeros(self.m, dtype=torch.bool)
        for block in self.cones.blocks:
            if block.name == "nonnegative":
                rows[block.start:block.start + block.size] = True
        return rows

    @cached_property
    def singletons(self) -> Tensor:
        """(nnz(A),) entries that are alone in their row, of an elementwise cone."""
        alone = np.bincount(self.A_rows, minlength=self.m) == 1
        elementwise = np.bincount(self.scale_group.numpy(), minlength=self.m)[self.scale_group.numpy()] == 1
        return torch.from_numpy((alone & elementwise)[self.A_rows])

    @property
    def nnz(self) -> int:
        return len(self.P_rows) + len(self.A_rows)

    def dense_is_affordable(self, batch: int) -> bool:
        return max(batch, 1) * (self.n + self.m) * self.n <= DENSE_ENTRIES


@dataclass(frozen=True, eq=False)
class Data:
    """Values of a batch of cone programs on a Program's pattern; a leading dimension of 1 is shared by the batch."""

    program: Program
    P: Tensor  # (B or 1, nnz(P)) upper triangle
    q: Tensor  # (B or 1, n)
    A: Tensor  # (B or 1, nnz(A))
    b: Tensor  # (B or 1, m)

    @property
    def batch(self) -> int:
        return max(len(self.P), len(self.q), len(self.A), len(self.b))

    def rows(self, index: Tensor) -> Data:
        """The instances at `index`; shared values stay shared."""
        def pick(values: Tensor) -> Tensor:
            return values if len(values) == 1 else values[index]
        return replace(self, P=pick(self.P), q=pick(self.q), A=pick(self.A), b=pick(self.b))

    def widen(self, batch: int) -> Data:
        """The same data with q and b repeated to `batch` rows; P and A stay shared if they were."""
        return replace(self, q=self.q.expand(batch, -1), b=self.b.expand(batch, -1))


class Operators:
    """Products with P and A for a batch, dense where that is affordable, by index otherwise.

    Shapes: x (B, n), y (B, m); results have the same leading dimension.
    """

    def __init__(self, data: Data, dense: bool | None = None):
        program = data.program
        self.data = data
        self.index = program.indices
        self.dense = program.dense_is_affordable(max(len(data.P), len(data.A))) if dense is None else dense
        if self.dense:
            self.P_dense, self.A_dense = dense_P(data), dense_A(data)

    def rows(self, index: Tensor) -> Operators:
        """The operators of the instances at `index`, without assembling them again."""
        chosen = object.__new__(Operators)
        chosen.data, chosen.index, chosen.dense = self.data.rows(index), self.index, self.dense
        if self.dense:
            chosen.P_dense = self.P_dense if len(self.P_dense) == 1 else self.P_dense[index]
            chosen.A_dense = self.A_dense if len(self.A_dense) == 1 else self.A_dense[index]
        return chosen

    def P(self, x: Tensor) -> Tensor:
        if not self.data.P.shape[1]:
            return torch.zeros_like(x)
        if self.dense:
            return _product(self.P_dense, x)
        i, j, values = self.index["P_rows"], self.index["P_cols"], self.data.P
        strict = torch.where(i == j, 0.0, values)
        return x.new_zeros(x.shape).index_add_(1, i, values * x[:, j]).index_add_(1, j, strict * x[:, i])

    def A(self, x: Tensor) -> Tensor:
        if self.dense:
            return _product(self.A_dense, x)
        return x.new_zeros(len(x), self.data.program.m).index_add_(1, self.index["A_rows"], self.data.A * x[:, self.index["A_cols"]])

    def At(self, y: Tensor) -> Tensor:
        if self.dense:
            return _product(self.A_dense.mT, y)
        return y.new_zeros(len(y), self.data.program.n).index_add_(1, self.index["A_cols"], self.data.A * y[:, self.index["A_rows"]])


def dense_P(data: Data) -> Tensor:
    """(B or 1, n, n), symmetric."""
    n, i, j = data.program.n, data.program.indices["P_rows"], data.program.indices["P_cols"]
    P = data.P.new_zeros(len(data.P), n * n)
    P[:, i * n + j] = data.P
    P[:, j * n + i] = data.P
    return P.view(len(P), n, n)


def dense_A(data: Data) -> Tensor:
    """(B or 1, m, n)."""
    n, m = data.program.n, data.program.m
    A = data.A.new_zeros(len(data.A), m * n)
    A[:, data.program.indices["A_rows"] * n + data.program.indices["A_cols"]] = data.A
    return A.view(len(A), m, n)


def _product(matrix: Tensor, x: Tensor) -> Tensor:
    if len(matrix) == 1:
        return x @ matrix[0].mT
    return torch.bmm(matrix, x.unsqueeze(-1)).squeeze(-1)
