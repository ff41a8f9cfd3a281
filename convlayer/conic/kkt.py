"""The symmetric linear system of the residual map's Jacobian: factored once, solved for polish and adjoint alike.

With DPi_K*(v) = U diag(d) U', the Jacobian of F reduces to

    K = [ P          B'      ]        B = sqrt(d) U'A,  restricted to rows with d > 0
        [ B   -(1 - d)       ]

Rows with d = 0 (inactive) leave the system, rows with d = 1 are equalities. `solve(a, c)` returns (w, e) with
K (w, eta) = (a, sqrt(d) c) and e = sqrt(d) eta, both in U's coordinates: what Newton and the adjoint need of it.

What is factored is K + delta J with J = diag(1, -1), which is quasidefinite and so never singular; iterative refinement against K
removes the shift again. Where K itself is singular, a right-hand side is taken out of the null space, and so is the solution. That
needs no basis: K (x, y) = 0 means Px = 0, Bx = 0, B'y = 0 and (1 - d) y = 0, so that the null space is one of x beside one of y, and
delta (K + delta J)^-1 J is one on it and shrinks all else. Whether a null vector touches something that the user sees or moves
(`Visible`) two random vectors taken into the null space tell with probability one: canonical auxiliaries that are free, or constraints
that are redundant whatever the parameters, do no harm. Any other such row is flagged, and its derivative is the least-norm
least-squares one in the user's units: for that alone a basis is found, by inverse iteration, when it is asked for.
"""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from convlayer.autodiff.threads import lu_factor
from convlayer.cones import ProductSpectrum
from convlayer.conic.pattern import kkt_pattern
from convlayer.conic.program import DENSE_ENTRIES, Data, Operators, Program, take_rows

SHIFT = 1e-11  # delta, relative to the equilibrated matrix
SPARSE_SHIFT = 1e-7  # without pivoting it must exceed the square root of the rounding error; refinement removes it
SUSPECT = 1e-9  # a pivot below this may be the sign of a null vector
NULL = 1e-12  # |K z| below this share of |z| (times the size) makes z one;
APART = 1e-3  # above this share z has no part that inverse iteration would still bring out
FEW = 16  # null vectors fewer than this are all found; of more,
PROBES = 2  # so many random ones
TOUCHED = 1e-7  # what an entry of a unit null vector above this stands for is not unique
CLEAN = 1e-15  # |K z| below this share of |z|: z holds nothing else that matters
NOTHING = 1e-14  # a part in the null space below this share of a vector is rounding
WIDEST = 256  # null vectors in a sparse system's basis
REFINEMENTS = 6
LARGE = 96  # unknowns from which on variables are taken out of a dense system that active bounds determine,
WORTH = 0.25  # if they and their bounds are this share of it,
FIRM = 0.1  # and the bounds' equilibrated entries are no smaller
EXACT = 1e-15  # relative residual at which a solve needs no further one;
FINE = 1e-13  # below this one that halves it is worth while, above it any gain
STIFF = 1e-5  # a pivot, or the inverse of a probe's growth, below this: even Newton's solves are refined
GMRES_CYCLES, GMRES_STEPS = 3, 20
CERTIFIED = 1e-10  # relative residual that a solve must reach, or the row is flagged;
BACKWARD, GROWTH = (
    1e-13,
    1e12,
)  # or this share of the solution, provided that the solution is not larger than the right-hand side by GROWTH
DENSE_RATE, DENSE_CALL = 5e9, 1e-5  # flops a second of batched LU, and seconds a row beside them; measured
SPARSE_RATE, SPARSE_CALL = 1e9, 4e-5  # the same of sparse LDL',
ENTRY_RATE = 3e7  # whose matrix is also assembled, scaled and multiplied by: stored entries a second
PIVOTED = 20  # so many sparse factorisations a step of Newton's method may cost, where they are not accurate


class Visible(NamedTuple):
    """The entries of x and rows of A where a null vector of K would make an output or a gradient ambiguous."""

    x: Tensor  # (n,) bool
    y: Tensor  # (m,) bool


def dense_seconds(program: Program) -> float:
    """Of a factorisation by dense batched LU, a row, with about as many active rows as variables; infinite if it is too large."""
    if (program.n + program.m) * program.n > DENSE_ENTRIES:
        return math.inf
    size = program.n + min(program.m, program.n)
    return DENSE_CALL + (2 / 3 * size**3 + 40 * size**2) / DENSE_RATE


def prefers_dense(program: Program) -> bool:
    """Whether dense batched LU is expected to cost less than sparse LDL'."""
    dense = dense_seconds(program)
    return dense <= SPARSE_CALL or (dense < math.inf and dense <= _sparse_seconds(program))


def system_seconds(program: Program) -> float:
    """Of a factorisation by the cheaper of the two, a row."""
    dense = dense_seconds(program)
    return dense if dense <= SPARSE_CALL else min(dense, _sparse_seconds(program))


def _sparse_seconds(program: Program) -> float:
    pattern = kkt_pattern(program)
    return SPARSE_CALL + pattern.flops / SPARSE_RATE + pattern.nnz / ENTRY_RATE


def factorise(
    operators: Operators, spectrum: ProductSpectrum, visible: Visible, units: Tensor | None
) -> DenseSystem | SparseSystem:
    """The system at one point, dense or sparse as the operators are."""
    if operators.dense:
        return DenseSystem(operators, spectrum, visible, units)
    return SparseSystem(operators.data, spectrum, visible, units)


class _System(ABC):
    """What the dense and the sparse system do alike about null vectors."""

    n: int
    m: int
    scale: Tensor  # (B, size) of the equilibrated matrix
    root: Tensor
    spectrum: ProductSpectrum
    units: Tensor | None
    visible: Visible
    _singular: Tensor  # (B,), of what was looked at
    projector: _Projector | None = None  # of rows with few null vectors
    null_space: _NullSpace | None = None  # of rows with many,
    _unjudged: tuple[Tensor, Tensor] | None = None  # these, if not yet looked at, and which are only expected to have many
    _ambiguous: tuple[Tensor, int] | None = None  # and those where one is visible, with about how many they have
    _least_norm: _Projector | None = None

    @property
    @abstractmethod
    def _size(self) -> int:
        """Of the matrix."""

    def _unscaled(self, rows: Tensor, vectors: Tensor) -> Tensor:
        """Vectors (rows, size, k) of the equilibrated matrix in x's own units, and as one of x beside one of the basis U."""
        return self.scale[rows].unsqueeze(-1) * vectors

    @abstractmethod
    def _near(self, rows: Tensor) -> _NullSpace:
        """What takes vectors of these rows into the null space."""

    @abstractmethod
    def _dual(self, rows: Tensor, eta: Tensor) -> Tensor:
        """Null vectors' dual parts as the system holds them, (rows, ., k) -> those of y's rows, (rows, m, k), without the basis U."""

    @abstractmethod
    def _null_vectors(self, rows: Tensor, width: int) -> Tensor:
        """Orthonormal null vectors of K among `width` Ritz vectors of inverse iteration, (rows, size, width); other columns are zero."""

    @property
    def singular(self) -> Tensor:
        """(B,) a null vector touches what the user sees or moves."""
        self.judge()
        return self._singular

    def judge(self) -> None:
        """Look at rows of many null vectors, which a step of Newton's method only takes out of right-hand sides."""
        if self._unjudged is None:
            return
        (rows, expected), self._unjudged = self._unjudged, None
        found = self._look_beyond(rows)
        few = expected & (found < FEW / 2)
        if bool(few.any()):  # what looked like null vectors were small eigenvalues
            rows = torch.cat([rows[~few], self._look_for_basis(rows[few], FEW)]).sort().values
            self.null_space = self._near(rows) if len(rows) else None

    def _look_for_null_vectors(self, suspects: Tensor, expected: Tensor | None = None) -> None:
        """Null vectors of the matrix for these rows: all of them where they are few. `expected`: about how many they have."""
        expected = torch.zeros(len(suspects), device=suspects.device) if expected is None else expected
        wide, single = expected >= 4 * FEW, expected < 6
        beyond = [self._look_for_basis(suspects[single], 4), self._look_for_basis(suspects[~wide & ~single], FEW)]
        rows, order = torch.cat([suspects[wide], *beyond]).sort()
        if len(rows):
            self.null_space = self._near(rows)
            self._unjudged = rows, order < int(wide.sum())

    def _look_for_basis(self, rows: Tensor, width: int) -> Tensor:
        """Rows with few null vectors get their projector; the others are given back."""
        parts: list[tuple[Tensor, Tensor]] = [] if self.projector is None else [(self.projector.rows, self.projector.unit)]
        while len(rows):
            vectors = self._null_vectors(rows, min(width, self._size))
            many = (vectors.abs().amax(1) > 0).all(1) & (width < self._size)
            found = rows[~many]
            if len(found):
                unit = _normalised(self._unscaled(found, vectors[~many]), found, self.units)
                self._singular[found] |= self._harmful(found, unit)
                parts.append((found, unit))
            rows = rows[many]
            if width >= FEW:
                break
            width *= 4
        if parts:
            widest = max(unit.shape[2] for _, unit in parts)
            units = [torch.nn.functional.pad(unit, (0, widest - unit.shape[2])) for _, unit in parts]
            self.projector = _Projector(torch.cat([found for found, _ in parts]), torch.cat(units), self.units)
        return rows

    def _look_beyond(self, rows: Tensor) -> Tensor:
        """Whether one of many null vectors is visible, and about how many there are, (rows,)."""
        assert self.null_space is not None
        probe = torch.randn(self._size, PROBES, dtype=self.scale.dtype, generator=torch.Generator().manual_seed(0))
        vectors, clean = self.null_space.part(probe.to(rows.device).expand(len(rows), -1, -1))
        vectors = vectors * clean.unsqueeze(1)
        unit = _normalised(self._unscaled(rows, vectors), rows, self.units)
        harmful = self._harmful(rows, unit) | ~clean.any(1)
        self._singular[rows] |= harmful
        # A random vector's part in k dimensions has length sqrt(k).
        found = vectors.square().sum(1).mean(1)
        if bool(harmful.any()):
            self._ambiguous = rows[harmful], int(found[harmful].max().item())
        return found

    def _harmful(self, rows: Tensor, unit: Tensor) -> Tensor:
        """(rows,) whether unit null vectors (rows, size, k) touch what the user sees or moves."""
        dual = self.spectrum.index_select(rows).from_basis(self._dual(rows, unit[:, self.n :]), columns=True)
        primal = unit[:, : self.n]
        seen = self.visible
        parts = [primal[:, seen.x].flatten(1), dual[:, seen.y].flatten(1), primal.new_zeros(len(primal), 1)]
        return torch.cat(parts, 1).abs().amax(1) > TOUCHED

    def _entering(self, right: Tensor, newton: bool) -> Tensor:
        """A right-hand side (B, size) in x's own units, without what no solution can meet."""
        right = _off_null(self.projector, right, -1)
        return right if newton else _off_null(self._projector(), right, -1)

    def _off_wide(self, scaled: Tensor, newton: bool) -> Tensor:
        """The equilibrated right-hand side (B, size) without what no solution can meet, where there are many null vectors."""
        return self.null_space.off(scaled) if newton and self.null_space is not None else scaled

    def _leaving(self, solution: Tensor, newton: bool) -> Tensor:
        """A solution (B, size) in x's own units, without what no right-hand side determines, where that matters."""
        solution = _off_null(self.projector, solution, 1)
        return solution if newton else _off_null(self._projector(), solution, 1)

    def _projector(self) -> _Projector | None:
        """Onto the complement of the null space, for rows of many null vectors of which some are visible."""
        self.judge()
        if self._least_norm is None and self._ambiguous is not None:
            rows, dimension = self._ambiguous
            limit, width = self._widest(), dimension + int(3 * dimension**0.5) + 8
            while True:
                width = min(width, limit)
                vectors = self._null_vectors(rows, width)
                if width == limit or not bool((vectors.abs().amax(1) > 0).all(1).any()):
                    break
                width *= 4
            unit = _normalised(self._unscaled(rows, vectors), rows, self.units)
            self._least_norm = _Projector(rows, unit, self.units)
        return self._least_norm

    def _widest(self) -> int:
        return self._size


class _Pinned(NamedTuple):
    """Variables, as many in each row of the batch, that an active row of A with no other entry determines."""

    variables: Tensor  # (B, p) their places in K,
    rows: Tensor  # (B, p) and those of the rows


def _pinned(program: Program, B: Tensor, d: Tensor, active: Tensor | None) -> _Pinned | None:
    """What may leave the system, if that makes it much smaller. B (B, active, n) equilibrated."""
    batch, rows, n = B.shape
    if n + rows < LARGE or not program.has_single_entries:
        return None
    column = program.on(B.device)["single_entry"].expand(batch, -1)
    column = column if active is None else column.gather(1, active)
    entry = B.gather(2, column.clamp(min=0).unsqueeze(2)).squeeze(2).abs()
    usable = (column >= 0) & (d == 1) & (entry >= FIRM)
    place = torch.arange(rows, device=B.device).expand(batch, -1)
    owner = torch.full((batch, n + 1), -1, device=B.device)
    owner = owner.scatter_reduce(1, torch.where(usable, column, n), place, "amax")[:, :n]
    held = owner >= 0
    count = int(held.sum(1).min())
    if 2 * count < WORTH * (n + rows):
        return None
    held &= held.cumsum(1) <= count
    variables = torch.nonzero(held)[:, 1].view(batch, count)
    return _Pinned(variables, n + owner.gather(1, variables))


@dataclass(frozen=True, eq=False)
class _Factor:
    """Batched LU of K with its shift."""

    lu: Tensor
    pivots: Tensor

    @classmethod
    def of(cls, K: Tensor) -> _Factor:
        return cls(*lu_factor(K))

    def solve(self, right: Tensor) -> Tensor:
        """(B, size, k)"""
        return torch.linalg.lu_solve(self.lu, self.pivots, right.contiguous())

    def rows(self, index: Tensor) -> _Factor:
        return _Factor(self.lu[index], self.pivots[index])


@dataclass(frozen=True, eq=False)
class _FactorOfRest(_Factor):
    """The same after pinned variables j and their rows i are eliminated, whose block [p b; b -delta] has the determinant -D:

        K_rest - K_rest,j (delta / D) K_j,rest,   x_j = (b r_i + delta r_j) / D.

    Of P between pinned variables only the diagonal is in the block: beside b/delta the rest is nothing.
    """

    pinned: _Pinned
    rest: Tensor  # (B, size - 2 p)
    beside: Tensor  # (B, size - 2 p, p) K_rest,j
    inner: Tensor  # (B, p, p) K_jj
    b: Tensor  # (B, p, 1)
    D: Tensor  # (B, p, 1)

    @classmethod
    def without(cls, K: Tensor, pinned: _Pinned) -> _FactorOfRest:
        batch, size, _ = K.shape
        left = torch.ones(batch, size, dtype=torch.bool, device=K.device)
        left.scatter_(1, pinned.variables, False).scatter_(1, pinned.rows, False)
        rest = torch.nonzero(left)[:, 1].view(batch, -1)
        row = torch.arange(batch, device=K.device).view(-1, 1, 1)
        j, r = pinned.variables, rest
        part, beside, inner = (K[row, i.unsqueeze(2), k.unsqueeze(1)] for i, k in ((r, r), (r, j), (j, j)))
        b = K[row.squeeze(2), pinned.rows, j].unsqueeze(2)
        D = b.square() + SHIFT * inner.diagonal(dim1=1, dim2=2).unsqueeze(2)
        part = torch.baddbmm(part, beside, (beside / D.mT).mT, alpha=-SHIFT)
        return cls(*lu_factor(part), pinned, rest, beside, inner, b, D)

    def solve(self, right: Tensor) -> Tensor:
        j, i, rest = (part.unsqueeze(2).expand(-1, -1, right.shape[2]) for part in (*self.pinned, self.rest))
        first, second = right.gather(1, j), right.gather(1, i)
        x_j = (self.b * second + SHIFT * first) / self.D
        x_rest = super().solve(right.gather(1, rest) - self.beside @ x_j)
        first = first - self.beside.mT @ x_rest
        x_j = (self.b * second + SHIFT * first) / self.D
        x_i = (first - self.inner @ x_j) / self.b
        return torch.empty_like(right).scatter_(1, rest, x_rest).scatter_(1, j, x_j).scatter_(1, i, x_i)

    def rows(self, index: Tensor) -> _FactorOfRest:
        pinned = _Pinned(*(part[index] for part in self.pinned))
        parts = (part[index] for part in (self.rest, self.beside, self.inner, self.b, self.D))
        return _FactorOfRest(self.lu[index], self.pivots[index], pinned, *parts)


class DenseSystem(_System):
    """Batched LU of the equilibrated matrix."""

    def __init__(self, operators: Operators, spectrum: ProductSpectrum, visible: Visible, units: Tensor | None):
        A, P, d = operators.A_values, operators.P_values, spectrum.values
        batch, m, n = len(d), A.shape[1], A.shape[2]
        holding = d > 0
        active = int(holding.sum(-1).max()) if d.numel() else 0
        A = A if len(A) == batch else A.expand(batch, -1, -1)
        A = A if spectrum.is_diagonal else spectrum.to_basis(A, columns=True)
        self.n, self.m, self.spectrum, self.visible, self.units = n, m, spectrum, visible, units
        # The rows with d > 0, gathered to the front; a batch row with fewer is padded by rows with d = 0, which are decoupled.
        self.active = None if active == m else torch.topk(holding.to(torch.uint8), active, dim=1, sorted=True).indices
        if self.active is not None:
            d = d.gather(1, self.active)
            A = A.gather(1, self.active.unsqueeze(-1).expand(-1, -1, n))
        self.root = d.clamp(min=0).sqrt()
        B = A * self.root.unsqueeze(-1)
        # K is kept with the shift on its diagonal; `_product` takes it off again.
        self.shift = _shift(n, active, P.device)
        K = P.new_zeros(batch, n + active, n + active)
        above, below = K.narrow(1, 0, n), K.narrow(1, n, active)
        above.narrow(2, 0, n).copy_(P)
        above.narrow(2, n, active).copy_(B.mT)
        below.narrow(2, 0, n).copy_(B)
        diagonal = K.diagonal(dim1=1, dim2=2)
        diagonal.narrow(1, n, active).copy_(d).sub_(1)
        largest = K.abs().amax(2) if K.numel() else K.new_zeros(batch, n + active)
        filled = not largest.numel() or largest.amin().item() > 0  # as nearly always
        self.scale = largest.rsqrt() if filled else torch.where(largest > 0, largest.rsqrt(), 1.0)
        K.mul_(self.scale.unsqueeze(2) * self.scale.unsqueeze(1))
        pinned = _pinned(operators.data.program, below.narrow(2, 0, n), d, self.active)
        # A variable that no active row and no quadratic term holds is a null vector by itself: it stays where it is.
        self.held = largest.narrow(1, 0, n) > 0
        self.all_held = filled or bool(self.held.all())
        if not self.all_held:
            diagonal.narrow(1, 0, n).add_(~self.held)
        diagonal.add_(self.shift)
        self.K = K
        self.factor = _Factor.of(K) if pinned is None else _FactorOfRest.without(K, pinned)
        self.poor = torch.zeros(
            batch, dtype=torch.bool, device=K.device
        )  # rows of which a solve could not be certified
        self._singular = torch.zeros_like(self.poor) if self.all_held else (visible.x & ~self.held).any(1)
        pivots = self.factor.lu.diagonal(dim1=1, dim2=2).abs()
        smallest = self.smallest = pivots.amin(1) if pivots.shape[1] else pivots.new_ones(batch)
        growth = self._growth()
        least, most = (smallest.amin().item(), growth.amax().item()) if batch else (math.inf, 0.0)
        self.stiff = not least > STIFF and bool((smallest <= STIFF).any())
        if not (least > SUSPECT and most < 1 / SUSPECT):  # no number is told from others below
            suspects = torch.nonzero((smallest <= SUSPECT) | (growth >= 1 / SUSPECT)).flatten()
            if len(suspects):
                self._look_for_null_vectors(suspects)

    def _growth(self) -> Tensor:
        """(B,) by how much the factor enlarges a random vector. Where it divides by the shift and cancels again, no pivot is small."""
        probe = _probe(self.K.shape[1], self.K.device).expand(len(self.K), -1, -1)
        return torch.linalg.vector_norm(self.factor.solve(probe), dim=(1, 2))

    def solve(self, a: Tensor, c: Tensor, *, newton: bool = False) -> tuple[Tensor, Tensor]:
        """a (B, n), c (B, m) -> w (B, n), e (B, m); for a step of Newton's method to the accuracy of the shifted factor, unless it is
        stiff, and not of least norm in the user's units."""
        c_active = c if self.active is None else c.gather(1, self.active)
        right = self._entering(torch.cat([a if self.all_held else a * self.held, self.root * c_active], 1), newton)
        scaled = self._off_wide(right * self.scale, newton).unsqueeze(-1)
        solution = self.factor.solve(scaled)
        if scaled.numel() and (self.stiff or not newton):
            solution = self._refined(scaled, solution)
        solution = self._leaving(solution.squeeze(-1) * self.scale, newton)
        w, eta = solution[:, : self.n], solution[:, self.n :] * self.root
        if self.active is not None:
            eta = c.new_zeros(len(c), self.m).scatter_(1, self.active, eta)
        return w, eta

    def _refined(self, right: Tensor, solution: Tensor) -> Tensor:
        """Iterative refinement against K itself; a row that stays inaccurate is flagged."""
        goal = right.abs().amax(1, keepdim=True)
        error = right - self._product(solution)
        for _ in range(REFINEMENTS):
            trial = solution + self.factor.solve(error)
            trial_error = right - self._product(trial)
            before, after = error.abs().amax(1, keepdim=True), trial_error.abs().amax(1, keepdim=True)
            better = after < before
            solution, error = torch.where(better, trial, solution), torch.where(better, trial_error, error)
            left = after > EXACT * goal
            if not bool(left.any()) or not bool((better & (after < 0.5 * before) & left).any()):
                break
        size, goal = error.abs().amax(1), goal.squeeze(1)
        if not bool((size <= CERTIFIED * goal).all()):
            self.poor |= ~_solved_well(size, solution.abs().amax(1), goal).squeeze(1)
        return solution

    def _product(self, x: Tensor) -> Tensor:
        """K x for x (B, size, k)."""
        return self.K @ x - self.shift.unsqueeze(-1) * x

    def _near(self, rows: Tensor) -> _NullSpace:
        K = self.K if len(rows) == len(self.K) else self.K[rows]
        factor = self.factor if len(rows) == len(self.K) else self.factor.rows(rows)
        shift = take_rows(self.shift, rows).unsqueeze(-1)
        return _NullSpace(rows, shift, lambda x: K @ x - shift * x, factor.solve)

    @property
    def _size(self) -> int:
        return self.K.shape[1]

    def _dual(self, rows: Tensor, eta: Tensor) -> Tensor:
        dual = eta * self.root[rows].unsqueeze(-1)
        if self.active is None:
            return dual
        place = self.active[rows].unsqueeze(-1).expand_as(dual)
        return dual.new_zeros(len(rows), self.m, dual.shape[2]).scatter_(1, place, dual)

    def _null_vectors(self, rows: Tensor, width: int) -> Tensor:
        K, factor, shift = self.K[rows], self.factor.rows(rows), take_rows(self.shift, rows).unsqueeze(-1)
        size = K.shape[1]
        basis = torch.randn(size, width, dtype=K.dtype, generator=torch.Generator().manual_seed(0))
        basis = basis.to(K.device).expand(len(K), -1, -1)
        for _ in range(2):
            basis, _ = torch.linalg.qr(factor.solve(basis))
        image = K @ basis - shift * basis
        _, values, mixing = torch.linalg.svd(image, full_matrices=False)
        zero = values <= NULL * size**0.5
        return torch.where(zero.unsqueeze(1), basis @ mixing.mT, 0.0)


@lru_cache(maxsize=256)
def _shift(n: int, active: int, device: torch.device) -> Tensor:
    """(1, n + active) delta J."""
    signs = torch.cat([torch.ones(1, n, dtype=torch.float64), -torch.ones(1, active, dtype=torch.float64)], 1)
    return (SHIFT * signs).to(device)


@lru_cache(maxsize=256)
def _probe(size: int, device: torch.device) -> Tensor:
    """(size, 1) a random vector."""
    return torch.randn(size, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)


def _gmres(K: sp.csr_array, inverse: Callable[[np.ndarray], np.ndarray], right: np.ndarray) -> tuple[np.ndarray, bool]:
    """K x = right with an approximate inverse as right preconditioner: (x, whether it is certified).

    Where a few eigenvalues of K are below the shift, refinement stalls on them; each costs a Krylov method one step.
    Source: Saad and Schultz (1986).
    """
    x, size = np.zeros_like(right), np.abs(right).max(initial=0.0)
    for _ in range(GMRES_CYCLES):
        residual = right - K @ x
        length = np.linalg.norm(residual)
        if np.abs(residual).max(initial=0.0) <= 1e-15 * size or not np.isfinite(length):
            break
        basis, images, H = [residual / length], [], np.zeros((GMRES_STEPS + 1, GMRES_STEPS))
        for k in range(GMRES_STEPS):
            images.append(inverse(basis[k]))
            new = K @ images[k]
            for _ in range(2):  # orthogonal to rounding
                for i, vector in enumerate(basis):
                    part = vector @ new
                    H[i, k] += part
                    new = new - part * vector
            H[k + 1, k] = np.linalg.norm(new)
            if not H[k + 1, k] > 1e-14 * np.abs(H[: k + 1, k]).max():
                break
            basis.append(new / H[k + 1, k])
        if not np.isfinite(H).all():
            break
        steps = len(images)
        goal = np.zeros(steps + 1)
        goal[0] = length
        weights = np.linalg.lstsq(H[: steps + 1, :steps], goal, rcond=None)[0]
        better = x + sum(weight * image for weight, image in zip(weights, images, strict=True))
        if not np.linalg.norm(right - K @ better) < length:
            break
        x = better
    error, solution = np.abs(right - K @ x).max(initial=0.0), np.abs(x).max(initial=0.0)
    return x, bool(_solved_well(*(torch.tensor(value) for value in (error, solution, size))))


def _solved_well(error: Tensor, solution: Tensor, right: Tensor) -> Tensor:
    """Whether a solve of the equilibrated system is good: by its residual, or by backward stability where K is ill-conditioned."""
    stable = (error <= BACKWARD * solution) & (solution <= GROWTH * right)
    return (error <= CERTIFIED * right) | stable


class SparseSystem(_System):
    """Sparse LDL' of the equilibrated matrix, a factor for each row; the fill-reducing ordering is found once a program.

    All m rows of A stay in the pattern: inactive ones have a zero coupling and -1 on the diagonal.
    """

    def __init__(self, data: Data, spectrum: ProductSpectrum, visible: Visible, units: Tensor | None):
        pattern = kkt_pattern(data.program)
        d = spectrum.values
        batch, n, m = len(d), data.program.n, data.program.m
        self.n, self.m, self.data, self.spectrum, self.pattern = n, m, data, spectrum, pattern
        self.visible, self.units = visible, units
        self.dense: tuple[Tensor, DenseSystem] | None = None  # rows that need pivoting, and their system
        self.root = d.clamp(min=0).sqrt()
        split = pattern.split
        inner, root = (part[:, split.source] if len(split) else part for part in (d, self.root))
        E = pattern.rotated(data.A, spectrum) * root[:, pattern.E_rows]
        values = E.new_zeros(batch, pattern.nnz)
        values[:, pattern.place_P] = data.P
        values[:, pattern.place_E] = E
        values[:, pattern.place_diagonal[n : n + m]] = inner - 1
        self.turn = ProductSpectrum(d, split.bases(spectrum))
        if len(split):
            axes, first = split.axes(spectrum), torch.stack([split.starts, split.starts + 1])
            along = split.along(data.A, axes) * self.root[:, first][:, :, split.cone]
            values[:, pattern.place_axes] = along.flatten(1)
            values[:, pattern.place_multipliers] = -axes.mT[:, :, split.inside].flatten(1)
            values[:, pattern.place_diagonal[n + m : n + m + 2 * len(split)]] = d[:, first.flatten()] - 1
        # (nnz, B) from here on: products gather and add whole rows of memory.
        values = values.mT.contiguous()
        sizes = values.abs()
        size = pattern.size
        largest = values.new_zeros(size, batch)
        for index in (pattern.rows, pattern.columns):
            largest.scatter_reduce_(0, index.unsqueeze(1).expand(-1, batch), sizes, "amax")
        scale = torch.where(largest > 0, largest.rsqrt(), 1.0)
        self.scale = scale.mT.contiguous()
        self.K = values * scale[pattern.rows] * scale[pattern.columns]
        # A variable that no active row and no quadratic term holds is a null vector by itself: it stays where it is.
        self.held = (largest[:n] > 0).mT
        self.K[pattern.place_diagonal[:n]] += ~self.held.mT
        shifted = self.K.mT.clone(memory_format=torch.contiguous_format)
        shifted[:, pattern.place_diagonal] += SPARSE_SHIFT * pattern.signs
        self.factors = [pattern.factor(row) for row in shifted.numpy()]
        self.broken = torch.tensor([not factor.valid for factor in self.factors])
        _ = pattern.fill  # worked out here rather than while an object is being taken down
        weakref.finalize(self, pattern.release, self.factors).atexit = False
        self._singular = (visible.x & ~self.held).any(1)
        self.poor = torch.zeros_like(self.singular)
        self.active: Tensor | None = None  # all rows stay
        # Pivots tell nothing without pivoting; a null vector shows as a solution of size 1 / shift.
        self._stacked: dict[bytes, sp.csr_array] = {}  # K of some rows as one matrix
        self._all_rows = torch.arange(batch)
        growth = self._back_substitute(_probe(size, d.device).mT.expand(batch, -1)).norm(dim=1)
        grows = growth > 1e-2 / SPARSE_SHIFT
        self.smallest = 1 / growth
        self.stiff = not bool((growth < 1 / STIFF).all())
        suspects = torch.nonzero(grows & ~self.broken).flatten()
        if len(suspects):
            self._look_for_null_vectors(suspects, (SPARSE_SHIFT * growth[suspects]).square())

    def solve(self, a: Tensor, c: Tensor, *, newton: bool = False) -> tuple[Tensor, Tensor]:
        """a (B, n), c (B, m) -> w (B, n), e (B, m); for a step of Newton's method to six digits, unless it is stiff, and not of
        least norm in the user's units."""
        right = self._entering(torch.cat([a * self.held, self.root * c], 1), newton)
        scaled = self._off_wide(self._spread(right) * self.scale, newton)
        if self.stiff or not newton:
            solution, poor = self._refined(scaled)
            for row in torch.nonzero(poor & ~self.broken).flatten().tolist():
                found, good = _gmres(self._matrix(row), self.factors[row].solve, scaled[row].numpy())
                solution[row], poor[row] = torch.from_numpy(found), not good
        else:
            solution, poor = self._back_substitute(scaled), self.broken
        solution = self._leaving(self._own((solution * self.scale).unsqueeze(-1)).squeeze(-1), newton)
        if newton and dense_seconds(self.data.program) > PIVOTED * _sparse_seconds(self.data.program):
            poor = self.broken  # as good a step as there is: the residual judges where it leads
        w, e = solution[:, : self.n], solution[:, self.n :] * self.root
        return self._pivoted(torch.nonzero(poor).flatten(), a, c, w, e, newton) if bool(poor.any()) else (w, e)

    def _spread(self, right: Tensor) -> Tensor:
        """A right-hand side (B, n + m) of x and the basis U as one of the matrix, (B, size); see `pattern`."""
        split, n = self.pattern.split, self.n
        if not len(split):
            return right
        first = torch.cat([split.starts, split.starts + 1])
        rows = right[:, n:]
        across = self.turn.from_basis(rows.index_fill(1, first, 0.0))
        rest = torch.where(split.inside, across, rows)
        return torch.cat([right[:, :n], rest, rows[:, first], right.new_zeros(len(right), 2 * len(split))], 1)

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
        """Iterative refinement against K itself: the solution, (B, size), and which rows stay inaccurate."""
        if not right.shape[1]:
            return right, self.broken
        goal = right.abs().amax(1)
        solution = self._back_substitute(right)
        error = right - self._product(solution)
        enough, size = EXACT * goal, error.abs().amax(1)
        for _ in range(5 * REFINEMENTS):
            if not bool((size > enough).any()):
                break
            trial = solution + self._back_substitute(error)
            trial_error = right - self._product(trial)
            before, after = size, trial_error.abs().amax(1)
            better = after < before
            solution, error = (torch.where(better.unsqueeze(1), *pair) for pair in ((trial, solution), (trial_error, error)))
            size = torch.where(better, after, before)
            # Slow gains are worth it where something is left to gain, not at the level of rounding; rows that are done gain for ever.
            rate = torch.where(after > FINE * goal, 0.9, 0.5)
            if not bool(((after > enough) & (after < rate * before)).any()):
                break
        return solution, ~((size <= enough) | _solved_well(size, solution.abs().amax(1), goal)) | self.broken

    def _matrix(self, row: int) -> sp.csr_array:
        """K of one row, both triangles."""
        return self.pattern.stacked(self.K.mT[row : row + 1].numpy())

    def _pivoted(self, rows: Tensor, a: Tensor, c: Tensor, w: Tensor, e: Tensor, newton: bool) -> tuple[Tensor, Tensor]:
        """Rows for which LDL' without pivoting is not accurate enough: dense LU, if that fits; otherwise flagged."""
        if (self.n + self.data.program.m) ** 2 > 4 * DENSE_ENTRIES:
            self.poor[rows] = True
            return w, e
        if self.dense is None or not torch.equal(self.dense[0], rows):
            units = None if self.units is None else take_rows(self.units, rows)
            operators = Operators(self.data.rows(rows), dense=True)
            self.dense = rows, DenseSystem(operators, self.spectrum.index_select(rows), self.visible, units)
        w_rows, e_rows = self.dense[1].solve(a[rows], c[rows], newton=newton)
        self.judge()
        self._singular[rows], self.poor[rows] = self.dense[1].singular, self.dense[1].poor
        return w.index_copy(0, rows, w_rows), e.index_copy(0, rows, e_rows)

    def _back_substitute(self, right: Tensor) -> Tensor:
        """(K + shift)^-1 x of every row, x (B, size)."""
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
        """(K + shift)^-1 x for some rows, x (rows, size, k)."""
        columns = x.mT.contiguous().numpy()
        solved = [
            [self.factors[row].solve(column) for column in block]
            for row, block in zip(rows.tolist(), columns, strict=True)
        ]
        return torch.from_numpy(np.array(solved)).mT

    def _near(self, rows: Tensor) -> _NullSpace:
        shift = (SPARSE_SHIFT * self.pattern.signs).unsqueeze(-1)

        def exact(row: int, right: Tensor) -> Tensor:
            k = int(rows[row])
            return torch.from_numpy(_gmres(self._matrix(k), self.factors[k].solve, right.numpy())[0])

        return _NullSpace(rows, shift, lambda x: self._image(rows, x), lambda x: self._solve_columns(rows, x), exact)

    @property
    def _size(self) -> int:
        return self.pattern.size

    def _dual(self, rows: Tensor, eta: Tensor) -> Tensor:
        return self.root[rows].unsqueeze(-1) * eta

    def _widest(self) -> int:
        return min(self._size, WIDEST)

    def _null_vectors(self, rows: Tensor, width: int) -> Tensor:
        basis = torch.randn(self._size, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        basis = self._solve_columns(rows, basis.expand(len(rows), -1, -1))
        basis /= basis.norm(dim=1, keepdim=True)
        for _ in range(3):
            # z - (K + shift)^-1 K z takes z's other parts away: inverse iteration that corrects its own rounding.
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


class _NullSpace:
    """The null space of K for some rows of a batch, without a basis.

    With J = diag(1, -1) the map  delta (K + delta J)^-1 J = 1 - (K + delta J)^-1 K  is one on it and shrinks every other part.
    """

    def __init__(
        self,
        rows: Tensor,
        shift: Tensor,  # (size, 1) or (rows, size, 1) delta J
        image: Callable[[Tensor], Tensor],  # K x, for x (rows, size, k)
        solve: Callable[[Tensor], Tensor],  # (K + delta J)^-1 x
        exact: Callable[[int, Tensor], Tensor] | None = None,  # K^+ in K's range, of one row
    ):
        self.rows, self.size = rows, shift.shape[-2]
        self._shift, self._image, self._solve, self._exact = shift, image, solve, exact

    def part(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(the part of x (rows, size, k) in the null space, which of its columns (rows, k) are nothing but null vectors)."""
        least = NOTHING * x.norm(dim=1)
        part = self._solve(self._shift * x)
        image = self._image(part)
        for _ in range(5 * REFINEMENTS):
            before = image.norm(dim=1)
            if bool(((before <= CLEAN * part.norm(dim=1)) | (part.norm(dim=1) <= least)).all()):
                break
            trial = part - self._solve(image)
            trial_image = self._image(trial)
            better = trial_image.norm(dim=1) < 0.9 * before
            if not bool(better.any()):
                break
            part, image = (
                torch.where(better.unsqueeze(1), new, old) for new, old in ((trial, part), (trial_image, image))
            )
        clean = self._is_clean(part, image)
        if self._exact is not None:
            for row, column in torch.nonzero(~clean & (part.norm(dim=1) > least)).tolist():
                part[row, :, column] -= self._exact(row, image[row, :, column])
            clean = clean if bool(clean.all()) else self._is_clean(part, self._image(part))
        return part, clean & (part.norm(dim=1) > least)

    def off(self, vector: Tensor) -> Tensor:
        """(B, size) without these rows' parts in the null space."""
        rest = vector[self.rows].unsqueeze(-1)
        for _ in range(3):  # what rounding leaves of a part, the factor of the shifted matrix would make large again
            part, clean = self.part(rest)
            if not bool(clean.any()):
                break
            rest = rest - part * clean.unsqueeze(1)
        return vector.index_copy(0, self.rows, rest.squeeze(-1))

    def _is_clean(self, part: Tensor, image: Tensor) -> Tensor:
        return image.norm(dim=1) <= NULL * self.size**0.5 * part.norm(dim=1)


def _normalised(vectors: Tensor, rows: Tensor, units: Tensor | None) -> Tensor:
    """Vectors (rows, size, k) in x's own units as unit vectors in the user's; zeros stay zeros."""
    if units is not None:
        vectors = vectors.clone()
        vectors[:, : units.shape[1]] *= take_rows(units, rows).unsqueeze(-1)
    return vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-300)


class _Projector:
    """Takes the null spaces of some rows of a batch out of vectors in x's own units: a solution is in units^1, a right-hand
    side in units^-1."""

    def __init__(self, rows: Tensor, unit: Tensor, units: Tensor | None):
        """unit (rows, size, k) as `_normalised` gives them, zero where there are fewer than k; units (B or 1, n) of x, None for ones."""
        self.rows = rows
        self.units = unit.new_ones(unit.shape[:2])
        if units is not None:
            self.units[:, : units.shape[1]] = take_rows(units, rows)
        self.unit = unit
        self.dual = self.unit @ torch.linalg.pinv(self.unit.mT @ self.unit, hermitian=True)

    def __call__(self, vector: Tensor, power: int) -> Tensor:
        """vector (B, size)."""
        units = self.units**power
        part = vector[self.rows] * units
        part = (part - (self.dual @ (self.unit.mT @ part.unsqueeze(-1))).squeeze(-1)) / units
        return vector.index_copy(0, self.rows, part)


def _off_null(projector: _Projector | None, vector: Tensor, power: int) -> Tensor:
    """The part of (B, size) orthogonal to the null spaces, where there are any."""
    return vector if projector is None else projector(vector, power)
