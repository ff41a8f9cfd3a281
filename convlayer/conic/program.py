"""What a cone program is: one sparsity pattern, many rows of values.

    minimise    1/2 x'Px + q'x
    subject to  Ax + s = b,  s in K

with dual y in K*, Px + q + A'y = 0 and s'y = 0. A `Program` holds what all rows of a batch share
(sizes, cones, sparsity); `Data` holds the values, one row for each instance. An array whose leading
dimension is 1 is shared by all rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from convlayer.cones import Exponential, Nonnegative, Product, Zero
from convlayer.memo import once_for_each

# Dense copies of P and A may take this many numbers at a time (32 MB).
DENSE_ENTRIES = 4_000_000


class Logarithms(NamedTuple):
    """Cones (r, 1, t), t >= exp(r), and what a change of t's units moves with it: t k >= exp(r +
    log k)."""

    first: Tensor  # (k,) the row of r; those of 1 and t follow
    group: Tensor  # (n,) variables that share a cone, and so a unit, have the same number
    seen: Tensor  # (n,) bool, those of a group of which one stands in a t
    valued: Tensor  # (n,) bool, the others that stand in an r


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

    def __getstate__(self) -> dict:
        """The fields: what is worked out from them is worked out again."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

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
    def empty_matrices(self) -> tuple[sp.csc_matrix, sp.csc_matrix]:
        """The upper triangle of P, and A, without values: zeros stand in their places."""
        P, A = (self.P_rows, self.P_indptr), (self.A_rows, self.A_indptr)
        return (
            sp.csc_matrix((np.zeros(len(self.P_rows)), *P), shape=(self.n, self.n)),
            sp.csc_matrix((np.zeros(len(self.A_rows)), *A), shape=(self.m, self.n)),
        )

    @cached_property
    def indices(self) -> dict[str, Tensor]:
        """The patterns as index tensors."""
        return {
            name: torch.from_numpy(np.ascontiguousarray(getattr(self, name), dtype=np.int64))
            for name in ("P_rows", "P_cols", "A_rows", "A_cols")
        }

    @once_for_each
    def on(self, device: torch.device) -> dict[str, Tensor]:
        """The patterns as index tensors, and the rows' kinds as masks, on a device."""
        masks = {
            "inequalities": self.inequalities,
            "elementwise": self.elementwise,
            "scale_group": self.scale_group,
            "A_groups": self.scale_group[self.indices["A_rows"]],
            "single_entry": self.single_entry,
            "part_of_x": self.parts[0],
            "part_of_y": self.parts[1],
            "P_off_diagonal": self.P_off_diagonal,
            "P_off_rows": self.indices["P_rows"][self.P_off_diagonal],
            "P_off_cols": self.indices["P_cols"][self.P_off_diagonal],
        }
        return {name: part.to(device) for name, part in {**self.indices, **masks}.items()}

    @cached_property
    def P_off_diagonal(self) -> Tensor:
        """(.,) the stored entries of P that stand for two."""
        return torch.from_numpy(np.flatnonzero(self.P_rows != self.P_cols))

    @property
    def A_is_full(self) -> bool:
        return len(self.A_rows) == self.m * self.n

    @cached_property
    def scale_group(self) -> Tensor:
        """(m,) rows that must share one scale: each row of an elementwise cone its own, one for
        each block of the others."""
        group = np.arange(self.m)
        for block in self.cones.blocks:
            if not block.elementwise:
                group[block.rows] = block.start
        return torch.from_numpy(group)

    @cached_property
    def inequalities(self) -> Tensor:
        """(m,) rows of the nonnegative cone."""
        return self.cones.rows_of(Nonnegative)

    @cached_property
    def inequality_count(self) -> int:
        return int(self.inequalities.sum())

    @cached_property
    def equalities(self) -> Tensor:
        """(m,) rows of the zero cone."""
        return self.cones.rows_of(Zero)

    @cached_property
    def is_polyhedral(self) -> bool:
        """A linear or quadratic program."""
        return all(block.elementwise for block in self.cones.blocks)

    @property
    def is_linear(self) -> bool:
        return self.is_polyhedral and not len(self.P_rows)

    @cached_property
    def is_elementwise(self) -> bool:
        return bool(self.elementwise.all())

    @cached_property
    def elementwise(self) -> Tensor:
        """(m,) rows that take a scale of their own."""
        return torch.bincount(self.scale_group, minlength=self.m)[self.scale_group] == 1

    @cached_property
    def parts(self) -> tuple[Tensor, Tensor, int]:
        """The part of each variable (n,) and row (m,), and how many there are: nothing couples one
        part to another."""
        cone = self.scale_group.numpy()
        left = np.concatenate([self.A_cols, self.P_rows, self.n + np.arange(self.m)])
        right = np.concatenate([self.n + self.A_rows, self.P_cols, self.n + cone])
        size = self.n + self.m
        count, part = connected_components(
            sp.csr_array((np.ones(len(left), dtype=np.int8), (left, right)), shape=(size, size)),
            directed=False,
        )
        part = torch.from_numpy(part.astype(np.int64))
        return part[: self.n], part[self.n :], count

    @cached_property
    def single_entry(self) -> Tensor:
        """(m,) the column of the only entry of each zero or nonnegative row that has one, -1 for
        the others."""
        column = np.full(self.m, -1)
        column[self.A_rows] = self.A_cols
        alone = (np.bincount(self.A_rows, minlength=self.m) == 1) & self.elementwise.numpy()
        return torch.from_numpy(np.where(alone, column, -1))

    @cached_property
    def has_single_entries(self) -> bool:
        return bool((self.single_entry >= 0).any())

    @cached_property
    def logarithms(self) -> Logarithms | None:
        """Its exponential cones whose second row holds no variable; None: it has none."""
        filled = np.zeros(self.m, dtype=bool)
        filled[self.A_rows] = True
        blocks = (block for block in self.cones.blocks if isinstance(block.cone, Exponential))
        starts = [block.start for block in blocks if not filled[block.start + 1]]
        if not starts:
            return None
        first = np.array(starts)
        free = self.elementwise.numpy().copy()
        free[first], free[first + 2] = True, True
        tied = ~free[self.A_rows]
        left, right = self.A_cols[tied], self.n + self.scale_group.numpy()[self.A_rows[tied]]
        size = self.n + self.m
        _, group = connected_components(
            sp.csr_array((np.ones(len(left)), (left, right)), shape=(size, size)), directed=False
        )
        group = np.unique(group[: self.n], return_inverse=True)[1].astype(np.int64)
        inside, outside = (np.isin(self.A_rows, first + offset) for offset in (2, 0))
        seen, valued = np.zeros(self.n, dtype=bool), np.zeros(self.n, dtype=bool)
        seen[np.isin(group, group[self.A_cols[inside]])] = True
        valued[self.A_cols[outside]] = True
        return Logarithms(
            *(torch.from_numpy(part) for part in (first, group, seen, valued & ~seen))
        )

    @property
    def nnz(self) -> int:
        return len(self.P_rows) + len(self.A_rows)


@dataclass(frozen=True, eq=False)
class Data:
    """Values of a batch of cone programs on a Program's pattern; a leading dimension of 1 is shared
    by the batch.

    Dense data hold whole matrices in place of the stored entries.
    """

    program: Program
    P: Tensor  # (B or 1, nnz(P)) upper triangle; dense: (B or 1, n, n)
    q: Tensor  # (B or 1, n)
    A: Tensor  # (B or 1, nnz(A)); dense: (B or 1, m, n)
    b: Tensor  # (B or 1, m)

    @property
    def batch(self) -> int:
        return max(len(self.P), len(self.q), len(self.A), len(self.b))

    @property
    def dense(self) -> bool:
        return self.A.ndim == 3

    @cached_property
    def largest_costs(self) -> tuple[Tensor, Tensor]:
        """The largest entries of |q| and of |P|, (B or 1, 1) each."""
        sizes = self.q.abs(), self.P.abs().flatten(1)
        q, P = (
            part.amax(1, keepdim=True) if part.shape[1] else part.new_zeros(len(part), 1)
            for part in sizes
        )
        return q, P

    def rows(self, index: Tensor) -> Data:
        """The instances at `index`; shared values stay shared."""
        return Data(
            self.program, *(take_rows(values, index) for values in (self.P, self.q, self.A, self.b))
        )

    def between(self, lo: int, hi: int) -> Data:
        """The instances of a range, without copies."""
        parts = (self.P, self.q, self.A, self.b)
        return Data(self.program, *(part if len(part) == 1 else part[lo:hi] for part in parts))

    def widen(self, batch: int) -> Data:
        """The same data with q and b repeated to `batch` rows; P and A stay shared if they were."""
        return replace(self, q=self.q.expand(batch, -1), b=self.b.expand(batch, -1))

    def to_dense(self) -> Data:
        if self.dense:
            return self
        dense = replace(self, P=dense_P(self), A=dense_A(self))
        vars(dense)["largest_costs"] = self.largest_costs
        return dense

    def host(self) -> Data:
        parts = {name: getattr(self, name).cpu() for name in ("P", "q", "A", "b")}
        return self if self.q.device.type == "cpu" else replace(self, **parts)

    @property
    def P_entries(self) -> Tensor:
        """(B or 1, nnz(P)) the stored entries."""
        index = self.program.on(self.P.device)
        return self.P[:, index["P_rows"], index["P_cols"]] if self.dense else self.P

    @property
    def A_entries(self) -> Tensor:
        """(B or 1, nnz(A)) the stored entries."""
        if not self.dense:
            return self.A
        if self.program.A_is_full:
            return self.A.mT.flatten(1)
        index = self.program.on(self.A.device)
        return self.A[:, index["A_rows"], index["A_cols"]]


class Operators:
    """Products with P and A for a batch, by dense matrices or by index.

    Shapes: x (B, n), y (B, m); results have the same leading dimension.
    """

    def __init__(self, data: Data, dense: bool = False):
        self.data = data.to_dense() if dense else data
        self.dense = self.data.dense

    @cached_property
    def P_values(self) -> Tensor:
        return self._laid_out(self.data.P)

    @cached_property
    def A_values(self) -> Tensor:
        return self._laid_out(self.data.A)

    def _laid_out(self, values: Tensor) -> Tensor:
        """Stored entries as (nnz, B): gathers and sums then move whole rows of memory."""
        return values if self.dense else values.mT.contiguous()

    def rows(self, index: Tensor) -> Operators:
        """The operators of the instances at `index`, without assembling them again."""
        chosen = object.__new__(Operators)
        chosen.data, chosen.dense = self.data.rows(index), self.dense
        if self.dense:
            chosen.P_values, chosen.A_values = chosen.data.P, chosen.data.A
        else:
            chosen.P_values, chosen.A_values = (
                take_rows(values, index, 1) for values in (self.P_values, self.A_values)
            )
        return chosen

    @cached_property
    def right_sizes(self) -> tuple[Tensor, Tensor]:
        """|q| and |b|."""
        return self.data.q.abs(), self.data.b.abs()

    @cached_property
    def absolute(self) -> Operators:
        """Of |P| and |A|."""
        data = self.data
        return Operators(replace(data, P=data.P.abs(), A=data.A.abs()))

    @cached_property
    def _strict(self) -> Tensor:
        """(., B or 1) the stored entries of P off its diagonal."""
        return self.P_values.index_select(
            0, self.data.program.on(self.P_values.device)["P_off_diagonal"]
        )

    def P(self, x: Tensor) -> Tensor:
        if not len(self.data.program.P_rows):
            return torch.zeros_like(x)
        if self.dense:
            return product(self.P_values, x)
        index = self.data.program.on(x.device)
        columns = x.mT.contiguous()
        image = torch.zeros_like(columns)
        image.index_add_(
            0, index["P_rows"], self.P_values * columns.index_select(0, index["P_cols"])
        )
        if len(self.data.program.P_off_diagonal):
            i, j = index["P_off_rows"], index["P_off_cols"]
            image.index_add_(0, j, self._strict * columns.index_select(0, i))
        return image.mT

    def A(self, x: Tensor) -> Tensor:
        if self.dense:
            return product(self.A_values, x)
        index = self.data.program.on(x.device)
        return _gather_add(self.A_values, x, index["A_cols"], index["A_rows"], self.data.program.m)

    def At(self, y: Tensor) -> Tensor:
        if self.dense:
            return product(self.A_values.mT, y)
        index = self.data.program.on(y.device)
        return _gather_add(self.A_values, y, index["A_rows"], index["A_cols"], self.data.program.n)


def take_rows(values: Tensor, index: Tensor, dim: int = 0) -> Tensor:
    """The instances at `index`, on whatever device, along the batch dimension `dim`; what all share
    stays shared."""
    if values.shape[dim] == 1:
        return values
    return values.index_select(dim, index.to(values.device))


def _gather_add(values: Tensor, x: Tensor, source: Tensor, target: Tensor, size: int) -> Tensor:
    """Sparse product by index: values (nnz, B or 1), x (B, .) -> (B, size)."""
    return (
        x.new_zeros(size, len(x))
        .index_add_(0, target, values * x.mT.contiguous().index_select(0, source))
        .mT
    )


def dense_P(data: Data) -> Tensor:
    """(B or 1, n, n), symmetric."""
    if data.dense:
        return data.P
    n, index = data.program.n, data.program.on(data.P.device)
    i, j = index["P_rows"], index["P_cols"]
    P = data.P.new_zeros(len(data.P), n * n)
    P[:, i * n + j] = data.P
    P[:, j * n + i] = data.P
    return P.view(len(P), n, n)


def dense_A(data: Data) -> Tensor:
    """(B or 1, m, n)."""
    if data.dense:
        return data.A
    n, m = data.program.n, data.program.m
    if data.program.A_is_full:
        return data.A.view(len(data.A), n, m).mT.contiguous()
    index = data.program.on(data.A.device)
    A = data.A.new_zeros(len(data.A), m * n)
    A[:, index["A_rows"] * n + index["A_cols"]] = data.A
    return A.view(len(A), m, n)


def product(matrix: Tensor, x: Tensor) -> Tensor:
    """(B or 1, m, n), (B, n) -> (B, m)"""
    if len(matrix) == 1:
        return x @ matrix[0].mT
    return torch.bmm(matrix, x.unsqueeze(-1)).squeeze(-1)
