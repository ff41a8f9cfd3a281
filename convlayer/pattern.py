"""The sparsity pattern of the KKT matrix of a program, its fill-reducing ordering, and factors that share it.

    K = [ P   B' ]      upper triangle in compressed columns: those of P, then the rows of B, each with its diagonal
        [ B   .  ]

B = U'A has the rows of A, but within a cone with a basis U every row has the columns of the whole block.
"""

from __future__ import annotations

import weakref
from collections import deque
from contextlib import suppress
from functools import cached_property

import numpy as np
import qdldl
import scipy.sparse as sp
import torch
from torch import Tensor

from convlayer.cones import ProductSpectrum
from convlayer.program import Program

KEPT_BYTES = 64_000_000  # factors kept for reuse between calls, a program

_patterns: weakref.WeakKeyDictionary[Program, KKTPattern] = weakref.WeakKeyDictionary()


def kkt_pattern(program: Program) -> KKTPattern:
    """The pattern of a program, worked out once."""
    pattern = _patterns.get(program)
    if pattern is None:
        pattern = _patterns[program] = KKTPattern(program)
    return pattern


class KKTPattern:
    """Where the values of P, B and the diagonal stand, and a pool of factors of this pattern."""

    def __init__(self, program: Program):
        n, m = program.n, program.m
        self.n, self.m = n, m
        A_rows, A_cols = program.A_rows.astype(np.int64), program.A_cols.astype(np.int64)
        keys = [A_rows * n + A_cols]
        self._columns_of: dict[int, np.ndarray] = {}  # first row of a block -> the columns of all its rows
        _, columns_by_row, indptr = program.A_by_row
        for block in program.cones.blocks:
            if not block.elementwise:
                columns = np.unique(columns_by_row[indptr[block.start] : indptr[block.start + block.size]])
                self._columns_of[block.start] = columns
                keys.append(((block.start + np.arange(block.size))[:, None] * n + columns).ravel())
        self._E_keys = np.unique(np.concatenate(keys)) if n else np.zeros(0, dtype=np.int64)
        E_rows, E_cols = np.divmod(self._E_keys, max(n, 1))
        self.from_A = torch.from_numpy(np.searchsorted(self._E_keys, A_rows * n + A_cols))
        self.E_rows = torch.from_numpy(E_rows)
        self._positions: dict[int, Tensor] = {}

        # Upper triangle, by columns: (row, column) of P, of B', of the diagonal.
        rows = np.concatenate([program.P_rows, E_cols, np.arange(n + m)]).astype(np.int64)
        columns = np.concatenate([program.P_cols, n + E_rows, np.arange(n + m)]).astype(np.int64)
        key, inverse = np.unique(columns * (n + m) + rows, return_inverse=True)
        columns, rows = np.divmod(key, max(n + m, 1))
        self.nnz = len(key)
        self.rows, self.columns = torch.from_numpy(rows), torch.from_numpy(columns)
        self.off_diagonal = torch.from_numpy(np.flatnonzero(rows != columns))
        sections = [len(program.P_rows), len(E_rows), n + m]
        self.place_P, self.place_E, self.place_diagonal = torch.from_numpy(inverse).split(sections)
        self._indices, self._indptr = (
            rows.astype(np.int32),
            np.searchsorted(columns, np.arange(n + m + 1)).astype(np.int32),
        )
        self._pool: deque[Factor] = deque()

    def rotated(self, A: Tensor, spectrum: ProductSpectrum) -> Tensor:
        """Values of U'A, (B or 1, nnz(A)) -> (B or 1, nnz(E))."""
        E = A.new_zeros(len(A), len(self._E_keys))
        E[:, self.from_A] = A
        if spectrum.is_diagonal:
            return E
        E = torch.cat([E, E.new_zeros(len(E), 1)], 1).expand(len(spectrum.values), -1).clone()
        source = E.clone()
        for rows, basis in spectrum.bases:
            positions = self._block_positions(rows, basis.shape[-3], basis.shape[-1])
            E[:, positions] = basis.mT @ source[:, positions]
        return E[:, :-1]

    def _block_positions(self, rows: slice | Tensor, count: int, k: int) -> Tensor:
        """(count, k, columns) where the entries of these blocks stand among the values of E; the last value is padding."""
        where = np.arange(self.m)[rows] if isinstance(rows, slice) else rows.numpy()
        where = where.reshape(count, k)
        key = int(where[0, 0])
        if key not in self._positions:
            columns = [self._columns_of[int(first)] for first in where[:, 0]]
            positions = np.full((count, k, max(map(len, columns))), len(self._E_keys), dtype=np.int64)
            for block, (block_rows, cols) in enumerate(zip(where, columns, strict=True)):
                positions[block, :, : len(cols)] = np.searchsorted(self._E_keys, block_rows[:, None] * self.n + cols)
            self._positions[key] = torch.from_numpy(positions)
        return self._positions[key]

    @cached_property
    def strict(self) -> tuple[Tensor, Tensor, Tensor]:
        """The entries off the diagonal, their rows and columns."""
        off = self.off_diagonal
        return off, self.rows[off], self.columns[off]

    def matrix(self, values: np.ndarray) -> sp.csc_matrix:
        """The upper triangle with these values."""
        return sp.csc_matrix((values, self._indices, self._indptr), shape=(self.n + self.m,) * 2)

    def factor(self, values: np.ndarray) -> Factor:
        """LDL' of the matrix with these values; the caller gives it back by `release`."""
        try:
            factor = self._pool.pop()
        except IndexError:
            return Factor(self.matrix(values.copy()))
        factor.update(values.copy())  # a view would keep the whole batch alive
        return factor

    def release(self, factors: list[Factor]) -> None:
        """Keep factors whose owner is gone: the next ones of this pattern save the ordering."""
        room = KEPT_BYTES // (16 * max(1, self.fill)) - len(self._pool)
        self._pool.extend([factor for factor in factors if factor.valid][: max(0, room)])

    @cached_property
    def _counts(self) -> np.ndarray:
        """Nonzeros of each column of the factor, the diagonal included."""
        quasidefinite = np.full(self.nnz, 1e-3)
        quasidefinite[self.place_diagonal[: self.n]] = 1e3
        quasidefinite[self.place_diagonal[self.n :]] = -1e3
        return Factor(self.matrix(quasidefinite)).counts() if self.nnz else np.zeros(0)

    @cached_property
    def fill(self) -> int:
        """Nonzeros of the factor."""
        return int(self._counts.sum())

    @cached_property
    def flops(self) -> float:
        """Of one factorisation."""
        return float((self._counts**2).sum())


class Factor:
    """One LDL' of a quasidefinite matrix; `valid` is false where a pivot vanished, and `solve` then gives NaN."""

    def __init__(self, upper: sp.csc_matrix):
        self._upper = upper
        self._solver: qdldl.Solver | None = None
        with suppress(RuntimeError):  # a pivot vanished in rounding
            self._solver = qdldl.Solver(upper, upper=True)
        self.valid = self._solver is not None

    def update(self, values: np.ndarray) -> None:
        """Factor other values on the same pattern."""
        assert self._solver is not None  # only valid factors are kept
        self._upper.data = values
        try:
            self._solver.update(self._upper, upper=True)
        except RuntimeError:  # a pivot vanished in rounding
            self.valid = False

    def solve(self, right: np.ndarray) -> np.ndarray:
        return self._solver.solve(right) if self.valid and self._solver else np.full_like(right, np.nan)

    def counts(self) -> np.ndarray:
        """Nonzeros of each column of the factor, the diagonal included."""
        assert self._solver is not None
        return np.diff(sp.csc_matrix(self._solver.factors()[0]).indptr) + 1.0
