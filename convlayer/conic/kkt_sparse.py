"""The system of the residual map as sparse LDL', a factor for each row of the batch, see `kkt`."""

from __future__ import annotations

import weakref

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from convlayer.cones import ProductSpectrum
from convlayer.conic.costs import dense_seconds, sparse_seconds
from convlayer.conic.gmres import gmres
from convlayer.conic.kkt_base import (
    REFINEMENT,
    STIFF,
    KKTSystem,
    Visible,
    probe_of,
    random_vectors,
    solved_well,
)
from convlayer.conic.kkt_dense import DenseSystem
from convlayer.conic.null_space import CLEAN, NULL, NullSpace
from convlayer.conic.pattern import kkt_pattern
from convlayer.conic.program import DENSE_ENTRIES, Data, Operators, take_rows

# delta: without pivoting it must exceed the square root of the rounding error; refinement removes
# it.
SHIFT = 1e-7
# A probe that grows by more than this share of 1 / SHIFT has a part near a null vector.
GROWN = 1e-2
# Steps of refinement, at most: each gains less than with pivots.
REFINEMENTS = 30
# Relative residual above which any gain is worth a step of refinement; below it one that halves it.
FINE = 1e-13
# Steps of inverse iteration, at most.
INVERSE_ITERATIONS = 3
# |K z| above this share of |z|: z has no part that inverse iteration would still bring out.
APART = 1e-3
# Null vectors in a basis, at most.
WIDEST = 256
# What a step of Newton's method by dense LU may cost, in sparse factorisations, where these are
# not accurate.
PIVOTED = 20


class SparseSystem(KKTSystem):
    """Sparse LDL' of the equilibrated matrix; the fill-reducing ordering is found once a program.

    All m rows of A stay in the pattern: inactive ones have a zero coupling and -1 on the diagonal.
    What the matrix is where large second-order cones are split stands in `pattern`: `_spread` and
    `_own` lead there and back.
    """

    def __init__(
        self, data: Data, spectrum: ProductSpectrum, visible: Visible, units: Tensor | None
    ):
        pattern, d = kkt_pattern(data.program), spectrum.values
        batch, n, m = len(d), data.program.n, data.program.m
        self.n, self.m, self.data, self.spectrum, self.pattern = n, m, data, spectrum, pattern
        self.visible, self.units = visible, units
        # rows that need pivoting, and their system
        self.dense: tuple[Tensor, DenseSystem] | None = None
        self.active: Tensor | None = None  # all rows stay
        self.sqrt_d = d.clamp(min=0).sqrt()
        self.turn = ProductSpectrum(d, pattern.split.bases(spectrum))

        # (nnz, B) from here on: products gather and add whole rows of memory.
        values = self._assembled().mT.contiguous()

        # Equilibrated: each row and column by one over the root of its largest entry.
        sizes, size = values.abs(), pattern.size
        largest = values.new_zeros(size, batch)
        for index in (pattern.rows, pattern.columns):
            largest.scatter_reduce_(0, index.unsqueeze(1).expand(-1, batch), sizes, "amax")
        scale = torch.where(largest > 0, largest.rsqrt(), 1.0)
        self.scale = scale.mT.contiguous()
        self.K = values * scale[pattern.rows] * scale[pattern.columns]

        # A variable that no active row and no quadratic term holds is a null vector by itself: it
        # stays where it is.
        self.held = (largest[:n] > 0).mT
        self.K[pattern.place_diagonal[:n]] += ~self.held.mT

        # Factors of K + delta J.
        shifted = self.K.mT.clone(memory_format=torch.contiguous_format)
        shifted[:, pattern.place_diagonal] += SHIFT * pattern.signs
        self.factors = [pattern.factor(row) for row in shifted.numpy()]
        self.broken = torch.tensor([not factor.valid for factor in self.factors])
        _ = pattern.fill  # worked out here rather than while an object is being taken down
        weakref.finalize(self, pattern.release, self.factors).atexit = False
        self.poor = torch.zeros(batch, dtype=torch.bool)
        self._singular = (visible.x & ~self.held).any(1)
        self._stacked: dict[bytes, sp.csr_array] = {}  # K of some rows as one matrix
        self._all_rows = torch.arange(batch)
        self._look_at_growth()

    def _assembled(self) -> Tensor:
        """(B, nnz) the values of K, with the cones of the split in their axes:

        rows     sqrt(c) A w - (1 - c) r - f t - g h
        axes     sqrt(d) f'A w - (1 - d) p,   and so for g and q
        """
        data, spectrum, pattern, n, m = self.data, self.spectrum, self.pattern, self.n, self.m
        split, d, sqrt_d = pattern.split, spectrum.values, self.sqrt_d
        # c of split cones stands in their third row, and is that of all their rows.
        c, sqrt_c = (part[:, split.source] if len(split) else part for part in (d, sqrt_d))
        # sqrt(c) U'A
        E = pattern.rotated(data.A, spectrum) * sqrt_c[:, pattern.E_rows]
        values = E.new_zeros(len(d), pattern.nnz)
        values[:, pattern.place_P] = data.P
        values[:, pattern.place_E] = E
        # -(1 - c)
        values[:, pattern.place_diagonal[n : n + m]] = c - 1
        if not len(split):
            return values
        # sqrt(d) f'A and sqrt(d) g'A;  -f and -g;  -(1 - d)
        axes, first = split.axes(spectrum), torch.stack([split.starts, split.starts + 1])
        along = split.along(data.A, axes) * sqrt_d[:, first][:, :, split.cone]
        values[:, pattern.place_axes] = along.flatten(1)
        values[:, pattern.place_multipliers] = -axes.mT[:, :, split.inside].flatten(1)
        last = slice(n + m, n + m + 2 * len(split))
        values[:, pattern.place_diagonal[last]] = d[:, first.flatten()] - 1
        return values

    def _look_at_growth(self) -> None:
        """Pivots tell nothing without pivoting; a null vector shows as a solution of size 1 /
        shift."""
        probe = probe_of(self._size, self.K.device).mT.expand(len(self.factors), -1)
        growth = self._back_substitute(probe).norm(dim=1)
        self.smallest = 1 / growth
        self.stiff = not bool((growth < 1 / STIFF).all())
        suspects = torch.nonzero((growth > GROWN / SHIFT) & ~self.broken).flatten()
        if len(suspects):
            # Of a random vector's part in k dimensions, of length sqrt(k), the shift is all that
            # holds it.
            self._look_for_null_vectors(suspects, (SHIFT * growth[suspects]).square())

    def solve(self, a: Tensor, c: Tensor, *, newton: bool = False) -> tuple[Tensor, Tensor]:
        # K (w, eta) = (a, sqrt(d) c), in the units of the equilibrated matrix
        right = self._entering(torch.cat([a * self.held, self.sqrt_d * c], 1), newton)
        scaled = self._off_wide(self._spread(right) * self.scale, newton)
        if self.stiff or not newton:
            solution, poor = self._refined(scaled)
            for row in torch.nonzero(poor & ~self.broken).flatten().tolist():
                found, good = self._krylov(row, scaled[row])
                solution[row], poor[row] = found, not good
        else:
            solution, poor = self._back_substitute(scaled), self.broken
        solution = self._own((solution * self.scale).unsqueeze(-1)).squeeze(-1)
        solution = self._leaving(solution, newton)
        # e = sqrt(d) eta
        w, e = solution[:, : self.n], solution[:, self.n :] * self.sqrt_d
        program = self.data.program
        if newton and dense_seconds(program) > PIVOTED * sparse_seconds(program):
            poor = self.broken  # as good a step as there is: the residual judges where it leads
        rows = torch.nonzero(poor).flatten()
        return self._pivoted(rows, a, c, w, e, newton) if len(rows) else (w, e)

    def _spread(self, right: Tensor) -> Tensor:
        """A right-hand side (B, n + m) of x and the basis U as one of the matrix, (B, size).

        Of a split cone the first two rows go to its axes, and the rest into its rows' own
        coordinates; multipliers have none.
        """
        split, n = self.pattern.split, self.n
        if not len(split):
            return right
        first = torch.cat([split.starts, split.starts + 1])
        rows = right[:, n:]
        across = self.turn.from_basis(rows.index_fill(1, first, 0.0))
        rest = torch.where(split.inside, across, rows)
        of_multipliers = right.new_zeros(len(right), 2 * len(split))
        return torch.cat([right[:, :n], rest, rows[:, first], of_multipliers], 1)

    def _own(self, vectors: Tensor, rows: Tensor | None = None) -> Tensor:
        """Solutions (B, size, k) of the matrix as those of x and the basis U, (B, n + m, k)."""
        split, n = self.pattern.split, self.n
        if not len(split):
            return vectors
        end = n + self.m
        turn = self.turn if rows is None else self.turn.index_select(rows)
        dual = turn.to_basis(vectors[:, n:end], columns=True)
        first = torch.cat([split.starts, split.starts + 1])
        dual = dual.index_copy(1, first, vectors[:, end : end + len(first)])
        return torch.cat([vectors[:, :n], dual], 1)

    def _unscaled(self, rows: Tensor, vectors: Tensor) -> Tensor:
        return self._own(super()._unscaled(rows, vectors), rows)

    def _refined(self, right: Tensor) -> tuple[Tensor, Tensor]:
        """Iterative refinement against K itself: the solution, (B, size), and which rows stay
        inaccurate."""
        if not right.shape[1]:
            return right, self.broken
        goal = right.abs().amax(1)
        solution = self._back_substitute(right)
        error = right - self._product(solution)
        enough, size = REFINEMENT.exact * goal, error.abs().amax(1)
        for _ in range(REFINEMENTS):
            if not bool((size > enough).any()):
                break
            # x + (K + delta J)^-1 (r - K x), where that is better
            trial = solution + self._back_substitute(error)
            trial_error = right - self._product(trial)
            before, after = size, trial_error.abs().amax(1)
            better = after < before
            solution = torch.where(better.unsqueeze(1), trial, solution)
            error = torch.where(better.unsqueeze(1), trial_error, error)
            size = torch.where(better, after, before)
            # Slow gains are worth it where something is left to gain, not at the level of
            # rounding; rows that are done gain for ever.
            rate = torch.where(after > FINE * goal, 0.9, 0.5)
            if not bool(((after > enough) & (after < rate * before)).any()):
                break
        good = (size <= enough) | solved_well(size, solution.abs().amax(1), goal)
        return solution, ~good | self.broken

    def _krylov(self, row: int, right: Tensor) -> tuple[Tensor, bool]:
        """One row's solve (size,) by a Krylov method, and whether it is good."""
        found, left = gmres(self._matrix(row), self.factors[row].solve, right.numpy())
        solution, error = torch.from_numpy(found), torch.from_numpy(left)
        if not len(found):
            return solution, True
        sizes = (part.abs().amax() for part in (error, solution, right))
        return solution, bool(solved_well(*sizes))

    def _matrix(self, row: int) -> sp.csr_array:
        """K of one row, both triangles."""
        return self.pattern.stacked(self.K.mT[row : row + 1].numpy())

    def _pivoted(
        self, rows: Tensor, a: Tensor, c: Tensor, w: Tensor, e: Tensor, newton: bool
    ) -> tuple[Tensor, Tensor]:
        """Rows for which LDL' without pivoting is not accurate enough: dense LU, if that fits;
        otherwise flagged."""
        if (self.n + self.m) ** 2 > 4 * DENSE_ENTRIES:
            self.poor[rows] = True
            return w, e
        if self.dense is None or not torch.equal(self.dense[0], rows):
            units = None if self.units is None else take_rows(self.units, rows)
            operators = Operators(self.data.rows(rows), dense=True)
            spectrum = self.spectrum.index_select(rows)
            self.dense = rows, DenseSystem(operators, spectrum, self.visible, units)
        system = self.dense[1]
        w_rows, e_rows = system.solve(a[rows], c[rows], newton=newton)
        self.judge()
        self._singular[rows], self.poor[rows] = system.singular, system.poor
        return w.index_copy(0, rows, w_rows), e.index_copy(0, rows, e_rows)

    def _back_substitute(self, right: Tensor) -> Tensor:
        """(K + delta J)^-1 x of every row, x (B, size)."""
        rows = right.contiguous().numpy()
        solved = [factor.solve(row) for factor, row in zip(self.factors, rows, strict=True)]
        return torch.from_numpy(np.array(solved).reshape(rows.shape))

    def _product(self, x: Tensor) -> Tensor:
        """K x of every row, x (B, size)."""
        return self._image(self._all_rows, x.unsqueeze(-1)).squeeze(-1)

    def _image(self, rows: Tensor, x: Tensor) -> Tensor:
        """K x for some rows, x (rows, size, k)."""
        key = rows.numpy().tobytes()
        if key not in self._stacked:
            self._stacked[key] = self.pattern.stacked(self.K.mT[rows].numpy())
        return torch.from_numpy(self._stacked[key] @ x.flatten(0, 1).numpy()).view(x.shape)

    def _solve_columns(self, rows: Tensor, x: Tensor) -> Tensor:
        """(K + delta J)^-1 x for some rows, x (rows, size, k)."""
        columns = x.mT.contiguous().numpy()
        solved = [
            [self.factors[row].solve(column) for column in block]
            for row, block in zip(rows.tolist(), columns, strict=True)
        ]
        return torch.from_numpy(np.array(solved)).mT

    def _near(self, rows: Tensor) -> NullSpace:
        return NullSpace(
            rows,
            (SHIFT * self.pattern.signs).unsqueeze(-1),
            image=lambda x: self._image(rows, x),
            solve=lambda x: self._solve_columns(rows, x),
            exact=lambda place, right: self._krylov(int(rows[place]), right)[0],
        )

    @property
    def _size(self) -> int:
        return self.pattern.size

    def _dual(self, rows: Tensor, eta: Tensor) -> Tensor:
        return self.sqrt_d[rows].unsqueeze(-1) * eta

    def _widest(self) -> int:
        return min(self._size, WIDEST)

    def _null_vectors(self, rows: Tensor, width: int) -> Tensor:
        basis = random_vectors(self._size, width)
        basis = self._solve_columns(rows, basis.expand(len(rows), -1, -1))
        basis /= basis.norm(dim=1, keepdim=True)
        for _ in range(INVERSE_ITERATIONS):
            # z - (K + delta J)^-1 K z takes z's other parts away: inverse iteration that corrects
            # its own rounding.
            basis = basis - self._solve_columns(rows, self._image(rows, basis))
            basis, _ = torch.linalg.qr(basis)
            values, mixing = _ritz(self._image(rows, basis))
            zero = values <= NULL * self._size**0.5
            if bool(((values <= CLEAN * self._size**0.5) | (values >= APART)).all()):
                break
        return torch.where(zero.unsqueeze(1), basis @ mixing.mT, 0.0)


def _ritz(image: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values and right singular vectors of (rows, size, k)."""
    _, values, mixing = torch.linalg.svd(torch.linalg.qr(image)[1])
    return values, mixing
