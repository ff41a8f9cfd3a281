"""Equalities that depend on each other whatever the parameters: whether their right-hand sides
agree.

With E the rows of the zero cone that no parameter moves, and N an orthonormal basis of the null
space of E' (both marginals of a plan have the same sum, nodal balances add up to nothing, a row
stands twice), E x = b has a solution only if N'b = 0.

    agreed     b - N N'b: the least change of b, in the 2-norm, after which the rows agree. What the parameters' own rounding has
               moved apart is put together so, and the solution is that of the agreed program.
    refuted    where the rows are farther apart no x satisfies them, and y = N N'b is the proof: E'y = 0, b'y > 0.

A row of A that is empty belongs to the same kind: 0 == b, and 0 <= b in the nonnegative cone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from convlayer.conic.program import Program
from convlayer.memo import once_for_each

# |E'n| below this, E having rows of size one, makes n a null vector.
DEPENDENT = 1e-12
# An eigenvalue of EE' below this is looked at.
SQUARED = 1e-9
# An entry of N below this is rounding.
TRACE = 1e-9
# Equalities beyond which their dependences are not looked for.
LARGE = 3000


@dataclass(frozen=True, eq=False)
class Dependence:
    """The equalities of a program that depend on each other, and its empty inequalities."""

    rows: Tensor  # (t,) equalities that depend on others
    basis: Tensor  # (t, k) N
    group: Tensor  # (t,) rows that depend on each other have the same number
    empty: Tensor  # (e,) rows of the nonnegative cone without entries

    @classmethod
    def of(cls, program: Program, fixed: np.ndarray, values: np.ndarray) -> Dependence | None:
        """fixed (nnz(A),): entries that no parameter moves, with their values. None: no row depends
        on another."""
        equal = program.equalities.numpy().copy()
        equal[program.A_rows[~fixed]] = False
        equalities = np.flatnonzero(equal)
        filled = np.zeros(program.m, dtype=bool)
        filled[program.A_rows[(values != 0) | ~fixed]] = True
        empty = np.flatnonzero(program.inequalities.numpy() & ~filled)
        entangled = equalities[
            _entangled(*_among(equalities, program, values), len(equalities), program.n)
        ]
        if not len(empty) and not len(entangled):
            return None
        matrix = sp.csr_array(
            (values, (program.A_rows, program.A_cols)), shape=(program.m, program.n)
        )
        matrix.eliminate_zeros()
        null = _left_null(matrix[entangled])
        touched = (np.abs(null) > TRACE).any(1)
        if not len(empty) and not touched.any():
            return None
        equalities, basis = entangled, null[touched]
        linked = sp.csr_array(np.where(np.abs(basis) > TRACE, 1.0, 0.0))
        _, group = connected_components(linked @ linked.T, directed=False)
        parts = equalities[touched], basis, group.astype(np.int64), empty
        return cls(*(torch.from_numpy(np.ascontiguousarray(part)) for part in parts))

    def on(self, device: torch.device) -> Dependence:
        """The same on a device."""
        return self if device.type == "cpu" else self._moved(device)

    @once_for_each
    def _moved(self, device: torch.device) -> Dependence:
        parts = self.rows, self.basis, self.group, self.empty
        return Dependence(*(part.to(device) for part in parts))

    def agreed(self, b: Tensor) -> Tensor:
        """b (B or 1, m) with the least change after which the equalities agree."""
        here = self.on(b.device)
        return b.index_add(1, here.rows, here._apart(b), alpha=-1)

    def _apart(self, b: Tensor) -> Tensor:
        """N N'b, (B or 1, t)."""
        return (b.index_select(1, self.rows) @ self.basis) @ self.basis.mT

    def _below(self, b: Tensor) -> Tensor:
        """By how much empty inequalities ask for less than nothing, (B or 1, e)."""
        return (-b.index_select(1, self.empty)).clamp(min=0.0)

    def disagreement(self, b: Tensor, sizes: Tensor) -> Tensor:
        """How far the rows are from agreeing, relative to `sizes`, (B or 1,).

        sizes: (B or 1, m) of the numbers that b was made of, which may be larger than b itself.
        """
        here, batch, tiny = self.on(b.device), max(len(b), len(sizes)), torch.finfo(b.dtype).tiny
        shares = []
        if len(here.rows):
            beside = sizes.index_select(1, here.rows)
            if here._one_group:
                largest = beside.amax(1, keepdim=True)
            else:
                groups = here.group.expand(len(sizes), -1)
                largest = (
                    torch.zeros_like(beside)
                    .scatter_reduce_(1, groups, beside, "amax")
                    .gather(1, groups)
                )
            shares.append(here._apart(b).abs() / largest.clamp(min=tiny))
        if len(here.empty):
            shares.append(here._below(b) / sizes.index_select(1, here.empty).clamp(min=tiny))
        return torch.cat([part.expand(batch, -1) for part in shares], 1).amax(1)

    @cached_property
    def _one_group(self) -> bool:
        return not bool((self.group != self.group[0]).any())

    def proof(self, b: Tensor) -> Tensor:
        """(B or 1, m) y, where the rows do not agree."""
        here = self.on(b.device)
        return (
            torch.zeros_like(b)
            .index_copy(1, here.rows, -here._apart(b))
            .index_copy(1, here.empty, here._below(b))
        )


def _left_null(matrix: sp.csr_array) -> np.ndarray:
    """An orthonormal basis of the vectors n with n'E = 0, (rows, k)."""
    linked = sp.csr_array((np.ones(matrix.nnz), matrix.indices, matrix.indptr), shape=matrix.shape)
    _, part = connected_components(linked @ linked.T, directed=False)
    found = [np.zeros((matrix.shape[0], 0))]
    for k in np.unique(part):
        mine = np.flatnonzero(part == k)
        if len(mine) <= LARGE:
            null = _left_null_densely(matrix[mine])
            found.append(np.zeros((matrix.shape[0], null.shape[1])))
            found[-1][mine] = null
    return np.hstack(found)


def _among(rows: np.ndarray, program: Program, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(place among `rows`, column) of the entries of A in these rows that are not zero."""
    place = np.full(program.m, -1)
    place[rows] = np.arange(len(rows))
    mine = (place[program.A_rows] >= 0) & (values != 0)
    return place[program.A_rows[mine]], program.A_cols[mine]


def _entangled(row: np.ndarray, column: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The rows, of entries at (row, column), without those that depend on no other, having a
    variable for themselves, or once such rows are gone."""
    order = np.argsort(row, kind="stable")
    row, column = row[order], column[order]
    start = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=rows))])
    # Of each column: how many rows are left in it, and the sum of their numbers, which is the last
    # one's own.
    count = np.bincount(column, minlength=columns)
    total = np.zeros(columns, dtype=np.int64)
    np.add.at(total, column, row)
    left = np.ones(rows, dtype=bool)
    single = np.flatnonzero(count == 1)
    while len(single):
        gone = np.unique(total[single])
        left[gone] = False
        places = np.concatenate([np.arange(start[k], start[k + 1]) for k in gone.tolist()])
        touched = column[places]
        np.subtract.at(count, touched, 1)
        np.subtract.at(total, touched, row[places])
        touched = np.unique(touched)
        single = touched[count[touched] == 1]
    return np.flatnonzero(left)


def _left_null_densely(matrix: sp.csr_array) -> np.ndarray:
    rows = matrix.shape[0]
    nothing = np.zeros((rows, 0))
    size = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1)).ravel())
    scale = 1 / np.where(size > 0, size, 1.0)
    scaled = sp.csr_array(sp.diags_array(scale) @ matrix)
    values, vectors = np.linalg.eigh((scaled @ scaled.T).toarray())
    span = vectors[:, values < SQUARED]
    if not span.shape[1]:
        return nothing
    # An eigenvector of EE' is exact to the square root of rounding alone: within their span
    # singular vectors are exact to rounding.
    triangle = np.linalg.qr(np.vstack([scaled.T @ span, np.zeros((span.shape[1],) * 2)]), mode="r")
    _, small, mixing = np.linalg.svd(triangle)
    null = span @ mixing[small <= DEPENDENT * rows**0.5].T
    return np.linalg.qr(scale[:, None] * null)[0] if null.shape[1] else nothing
