"""The sparsity pattern of the KKT matrix of a program, its fill-reducing ordering, and factors that
share it.

    K = [ P   B' ]      upper triangle in compressed columns: those of P, then the rows of B, each with its diagonal
        [ B   .  ]

B = U'A has the rows of A, but within a cone with a basis U every row has the columns of the whole
block. A large second-order cone is split instead, which leaves its rows as sparse as they are. Its
derivative is one number c but along two axes f and g, the first columns of U: with eta = f p + g q
+ r, r orthogonal to both, these are

    sqrt(c) A w - (1 - c) r - f t - g h = .     f'r = g'r = 0     sqrt(d) f'A w - (1 - d) p = .     and so for g and q

of r in the rows' own coordinates, four unknowns more than rows, and two rows that have the columns
of the whole block.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import qdldl
import scipy.sparse as sp
import torch
from torch import Tensor

from convlayer.cones import ProductSpectrum
from convlayer.cones.cone import axes, to_basis
from convlayer.conic.program import Program
from convlayer.memo import once_for_each

# Factors of a program that are kept for reuse between calls may take so much memory.
KEPT_BYTES = 64_000_000


@once_for_each
def kkt_pattern(program: Program) -> KKTPattern:
    """The pattern of a program, worked out once."""
    return KKTPattern(program)


class KKTPattern:
    """Where the values of P, B and the diagonal stand, and a pool of factors of this pattern."""

    def __init__(self, program: Program):
        n, m = program.n, program.m
        self.n, self.m = n, m
        A_rows, A_cols = program.A_rows.astype(np.int64), program.A_cols.astype(np.int64)

        # The columns of all rows of each block with a basis, by its first row; large blocks are
        # split.
        self._columns_of: dict[int, np.ndarray] = {}
        _, columns_by_row, indptr = program.A_by_row
        for block in program.cones.blocks:
            if not block.elementwise:
                own = slice(indptr[block.start], indptr[block.start + block.size])
                self._columns_of[block.start] = np.unique(columns_by_row[own])
        self.split = _Split.of(program, self._columns_of)

        # The entries E of U'A: those of A, and in the other blocks with a basis every row's in all
        # their columns.
        keys = [A_rows * n + A_cols]
        for block in program.cones.blocks:
            if block.start in self._columns_of and block.size not in self.split.sizes:
                columns = self._columns_of[block.start]
                keys.append(((block.start + np.arange(block.size))[:, None] * n + columns).ravel())
        self._E_keys = np.unique(np.concatenate(keys)) if n else np.zeros(0, dtype=np.int64)
        E_rows, E_cols = np.divmod(self._E_keys, max(n, 1))
        self.from_A = torch.from_numpy(np.searchsorted(self._E_keys, A_rows * n + A_cols))
        self.E_rows = torch.from_numpy(E_rows)

        # Upper triangle, by columns: (row, column) of P, of B', of f'A and g'A, of f and g, of the
        # diagonal.
        split, size = self.split, n + m + 4 * len(self.split.starts)
        self.size = size
        diagonal = np.arange(size)
        end = n + m
        places = (
            (program.P_rows, program.P_cols),
            (E_cols, n + E_rows),
            (split.columns, end + split.owners),
            (n + split.rows, end + split.multipliers),
            (diagonal, diagonal),
        )
        rows, columns = (
            np.concatenate(side).astype(np.int64) for side in zip(*places, strict=True)
        )
        key, inverse = np.unique(columns * size + rows, return_inverse=True)
        columns, rows = np.divmod(key, max(size, 1))
        self.nnz = len(key)
        self.rows, self.columns = torch.from_numpy(rows), torch.from_numpy(columns)
        self.off_diagonal = torch.from_numpy(np.flatnonzero(rows != columns))
        where = torch.from_numpy(inverse).split([len(side) for side, _ in places])
        self.place_P, self.place_E, self.place_axes, self.place_multipliers, self.place_diagonal = (
            where
        )

        # Of a quasidefinite matrix: the variables' and the multipliers' unknowns, and the rows'.
        self.signs = torch.ones(size, dtype=torch.float64)
        self.signs[n : n + m + 2 * len(split.starts)] = -1.0
        self._indices = rows.astype(np.int32)
        self._indptr = np.searchsorted(columns, np.arange(size + 1)).astype(np.int32)
        self._pool: deque[Factor] = deque()
        self._counted = None if self.nnz else np.zeros(0)

    def rotated(self, A: Tensor, spectrum: ProductSpectrum) -> Tensor:
        """Values of U'A, (B or 1, nnz(A)) -> (B or 1, nnz(E)); of A in split cones."""
        E = A.new_zeros(len(A), len(self._E_keys))
        E[:, self.from_A] = A
        if spectrum.is_diagonal:
            return E
        E = torch.cat([E, E.new_zeros(len(E), 1)], 1).expand(len(spectrum.values), -1).clone()
        source = E.clone()
        for rows, basis in spectrum.bases:
            if basis.shape[-2] in self.split.sizes:
                continue
            count, k = basis.shape[-3:-1]
            where = np.arange(self.m)[rows] if isinstance(rows, slice) else rows.numpy()
            positions = self._block_positions(k, tuple(where.reshape(count, k)[:, 0].tolist()))
            E[:, positions] = to_basis(basis, source[:, positions])
        return E[:, :-1]

    @once_for_each
    def _block_positions(self, k: int, starts: tuple[int, ...]) -> Tensor:
        """(blocks, k, columns) where the entries of these blocks of k rows stand among the values
        of E; the last value is padding."""
        columns = [self._columns_of[start] for start in starts]
        positions = np.full(
            (len(starts), k, max(map(len, columns))), len(self._E_keys), dtype=np.int64
        )
        for block, (start, own) in enumerate(zip(starts, columns, strict=True)):
            rows = start + np.arange(k)[:, None]
            positions[block, :, : len(own)] = np.searchsorted(self._E_keys, rows * self.n + own)
        return torch.from_numpy(positions)

    def stacked(self, values: np.ndarray) -> sp.csr_array:
        """Both triangles with these values (rows, nnz), as one block-diagonal matrix."""
        count, (source, indices, indptr) = len(values), self._whole
        shift = np.arange(count)[:, None]
        columns = (indices + self.size * shift).ravel().astype(np.int32)
        starts = np.append((indptr[:-1] + len(source) * shift).ravel(), count * len(source)).astype(
            np.int32
        )
        return sp.csr_array(
            (values[:, source].ravel(), columns, starts), shape=(count * self.size,) * 2
        )

    @cached_property
    def _whole(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Both triangles in compressed rows: (the stored value of each entry, columns, row
        pointer)."""
        rows, columns, off = self.rows.numpy(), self.columns.numpy(), self.off_diagonal.numpy()
        i, j = np.concatenate([rows, columns[off]]), np.concatenate([columns, rows[off]])
        order = np.lexsort((j, i))
        source = np.concatenate([np.arange(self.nnz), off])[order]
        return source, j[order], np.searchsorted(i[order], np.arange(self.size + 1))

    def matrix(self, values: np.ndarray) -> sp.csc_matrix:
        """The upper triangle with these values."""
        return sp.csc_matrix((values, self._indices, self._indptr), shape=(self.size,) * 2)

    def factor(self, values: np.ndarray) -> Factor:
        """LDL' of the matrix with these values; the caller gives it back by `release`."""
        try:
            factor = self._pool.pop()
        except IndexError:
            factor = Factor(self.matrix(values.copy()))
            if self._counted is None and factor.valid:
                self._counted = factor.counts()
            return factor
        factor.update(values.copy())  # a view would keep the whole batch alive
        return factor

    def release(self, factors: list[Factor]) -> None:
        """Keep factors whose owner is gone: the next ones of this pattern save the ordering."""
        room = KEPT_BYTES // (16 * max(1, self.fill)) - len(self._pool)
        self._pool.extend([factor for factor in factors if factor.valid][: max(0, room)])

    @property
    def _counts(self) -> np.ndarray:
        """Nonzeros of each column of the factor, the diagonal included; the same for all values."""
        if self._counted is None:
            quasidefinite = np.full(self.nnz, 1e-3)
            quasidefinite[self.place_diagonal.numpy()] = 1e3 * self.signs.numpy()
            self.release([self.factor(quasidefinite)])
        assert self._counted is not None  # the factor exists: the pivots are the diagonal's
        return self._counted

    @cached_property
    def fill(self) -> int:
        """Nonzeros of the factor."""
        return int(self._counts.sum())

    @cached_property
    def flops(self) -> float:
        """Of one factorisation."""
        return float((self._counts**2).sum())


@dataclass(frozen=True, eq=False)
class _Split:
    """The large second-order cones, those of a size all or none, and where their axes f and g and
    the multipliers t and h stand.

    The unknowns beside x and the rows are p of every cone, q of every cone, t of every cone, h of
    every cone.
    """

    sizes: frozenset[int]
    # (k,) the cones' first rows, which stand for f in the basis, as the second ones do for g
    starts: Tensor
    inside: Tensor  # (m,) bool, their rows
    # (m,) for every row one that has its eigenvalue: for the first two of these the third
    source: Tensor
    # f'A and g'A, for both all columns of every cone:
    columns: np.ndarray  # (2 s,)
    owners: np.ndarray  # (2 s,) the unknown
    cone: Tensor  # (s,)
    entries: Tensor  # the stored entries of A in these cones,
    entry_rows: Tensor  # their rows
    entry_columns: Tensor  # and their places among the s columns
    # f and g themselves:
    rows: np.ndarray  # (2 r,)
    multipliers: np.ndarray  # (2 r,) the unknown

    @classmethod
    def of(cls, program: Program, columns_of: dict[int, np.ndarray]) -> _Split:
        """Those cones of which the rows without basis and the axes have less than half of the
        entries that the rows with it have."""
        indptr = program.A_by_row[2]
        blocks = [block for block in program.cones.blocks if block.cone.two_axes and block.size > 3]
        gain: dict[int, int] = {}
        for start, size in ((block.start, block.size) for block in blocks):
            apart = indptr[start + size] - indptr[start] + 2 * (len(columns_of[start]) + size)
            gain[size] = gain.get(size, 0) + size * len(columns_of[start]) - 2 * int(apart)
        sizes = frozenset(size for size, saved in gain.items() if saved > 0)
        blocks = [block for block in blocks if block.size in sizes]
        starts = np.array([block.start for block in blocks], dtype=np.int64)
        rows = _joined(block.start + np.arange(block.size) for block in blocks)
        columns = _joined(columns_of[block.start] for block in blocks)
        cone_of_row = np.repeat(np.arange(len(blocks)), [block.size for block in blocks])
        cone = np.repeat(np.arange(len(blocks)), [len(columns_of[block.start]) for block in blocks])
        inside = np.zeros(program.m, dtype=bool)
        inside[rows] = True
        source = np.arange(program.m)
        source[starts] = source[starts + 1] = starts + 2
        entries = np.flatnonzero(inside[program.A_rows])
        owner = np.zeros(program.m, dtype=np.int64)
        owner[rows] = cone_of_row
        # Columns are sorted within a cone, and the cones by number.
        wanted = owner[program.A_rows[entries]] * program.n + program.A_cols[entries]
        where = np.searchsorted(cone * program.n + columns, wanted)
        k = len(blocks)
        return cls(
            sizes,
            torch.from_numpy(starts),
            torch.from_numpy(inside),
            torch.from_numpy(source),
            columns=np.tile(columns, 2),
            owners=np.concatenate([cone, k + cone]),
            cone=torch.from_numpy(cone),
            entries=torch.from_numpy(entries),
            entry_rows=torch.from_numpy(program.A_rows[entries].astype(np.int64)),
            entry_columns=torch.from_numpy(where),
            rows=np.tile(rows, 2),
            multipliers=np.concatenate([2 * k + cone_of_row, 3 * k + cone_of_row]),
        )

    def __len__(self) -> int:
        return len(self.starts)

    def axes(self, spectrum: ProductSpectrum) -> Tensor:
        """(B, m, 2) f and g of every cone."""
        found = spectrum.values.new_zeros(*spectrum.values.shape, 2)
        for rows, basis in self.bases(spectrum):
            found[:, rows if isinstance(rows, slice) else rows.flatten()] = axes(basis).flatten(
                1, 2
            )
        return found

    def bases(self, spectrum: ProductSpectrum) -> list[tuple[slice | Tensor, Tensor]]:
        return [(rows, basis) for rows, basis in spectrum.bases if basis.shape[-2] in self.sizes]

    def along(self, A: Tensor, axes: Tensor) -> Tensor:
        """(B, 2, s) f'A and g'A, A (B or 1, nnz(A))."""
        terms = A[:, self.entries].unsqueeze(1) * axes[:, self.entry_rows].mT
        return terms.new_zeros(len(terms), 2, len(self.cone)).index_add_(
            2, self.entry_columns, terms
        )


def _joined(parts: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts]).astype(np.int64)


class Factor:
    """One LDL' of a quasidefinite matrix; `valid` is false where a pivot vanished, and `solve` then
    gives NaN."""

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
        return (
            self._solver.solve(right)
            if self.valid and self._solver
            else np.full_like(right, np.nan)
        )

    def counts(self) -> np.ndarray:
        """Nonzeros of each column of the factor, the diagonal included."""
        assert self._solver is not None
        return np.diff(sp.csc_matrix(self._solver.factors()[0]).indptr) + 1.0
