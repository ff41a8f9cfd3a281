"""The system of the residual map as dense batched LU of the active rows, see `kkt`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from convlayer.autodiff.threads import lu_factor
from convlayer.cones import ProductSpectrum
from convlayer.conic.kkt_base import (
    REFINEMENT,
    STIFF,
    KKTSystem,
    Visible,
    probe_of,
    random_vectors,
    solved_well,
)
from convlayer.conic.null_space import NULL, NullSpace
from convlayer.conic.program import Operators, Program, take_rows
from convlayer.memo import constants

# delta, relative to the equilibrated matrix.
SHIFT = 1e-11
# A pivot, or the inverse of a probe's growth, below this may be the sign of a null vector.
SUSPECT = 1e-9
# Steps of inverse iteration: one leaves of the other parts a share of SHIFT over their eigenvalue.
INVERSE_ITERATIONS = 2


@dataclass(frozen=True)
class _Pinning:
    """When variables that active bounds determine are taken out of the system."""

    large: int  # unknowns from which on it pays,
    worth: float  # if they and their bounds are this share of it,
    firm: float  # and the bounds' equilibrated entries are no smaller


PINNING = _Pinning(large=96, worth=0.25, firm=0.1)


class _Pinned(NamedTuple):
    """Variables, as many in each row of the batch, that an active row of A with no other entry
    determines."""

    variables: Tensor  # (B, p) their places in K,
    rows: Tensor  # (B, p) and those of the rows


def _pinned(program: Program, B: Tensor, d: Tensor, active: Tensor | None) -> _Pinned | None:
    """What may leave the system, if that makes it much smaller. B (B, active, n) equilibrated."""
    batch, rows, n = B.shape
    if n + rows < PINNING.large or not program.has_single_entries:
        return None
    column = program.on(B.device)["single_entry"].expand(batch, -1)
    column = column if active is None else column.gather(1, active)
    entry = B.gather(2, column.clamp(min=0).unsqueeze(2)).squeeze(2).abs()
    usable = (column >= 0) & (d == 1) & (entry >= PINNING.firm)
    # Of each variable's usable rows the last one; variable n stands for none.
    place = torch.arange(rows, device=B.device).expand(batch, -1)
    owner = torch.full((batch, n + 1), -1, device=B.device)
    owner = owner.scatter_reduce(1, torch.where(usable, column, n), place, "amax")[:, :n]
    held = owner >= 0
    count = int(held.sum(1).min())
    if 2 * count < PINNING.worth * (n + rows):
        return None
    held &= held.cumsum(1) <= count
    variables = torch.nonzero(held)[:, 1].view(batch, count)
    return _Pinned(variables, n + owner.gather(1, variables))


@dataclass(frozen=True, eq=False)
class _Factor:
    """Batched LU of K + delta J."""

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
    """The same after pinned variables j and their rows i are eliminated.

    Their block of K + delta J is

        [ p     b   ]                          inverse   1/D [ delta   b ]
        [ b  -delta ],   D = b^2 + delta p,                  [   b    -p ]

    and of it only x_j meets the rest, in the columns C = K_rest,j:

        (K_rest - C (delta/D) C') x_rest = r_rest - C (b r_i + delta r_j) / D
                                     x_j = (b r_i + delta (r_j - C'x_rest)) / D
                                     x_i = (r_j - C'x_rest - K_jj x_j) / b

    Of P between pinned variables only the diagonal p is in the block: beside b/delta the rest is
    nothing.
    """

    pinned: _Pinned
    rest: Tensor  # (B, size - 2 p)
    C: Tensor  # (B, size - 2 p, p)
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
        # The blocks K_rest,rest, C and K_jj.
        part, C, inner = (
            K[row, i.unsqueeze(2), k.unsqueeze(1)] for i, k in ((r, r), (r, j), (j, j))
        )
        b = K[row.squeeze(2), pinned.rows, j].unsqueeze(2)
        # D = b^2 + delta p
        p = inner.diagonal(dim1=1, dim2=2).unsqueeze(2)
        D = b.square() + SHIFT * p
        # K_rest - C (delta/D) C'
        part = torch.baddbmm(part, C, (C / D.mT).mT, alpha=-SHIFT)
        return cls(*lu_factor(part), pinned, rest, C, inner, b, D)

    def solve(self, right: Tensor) -> Tensor:
        j, i, rest = (
            part.unsqueeze(2).expand(-1, -1, right.shape[2]) for part in (*self.pinned, self.rest)
        )
        r_j, r_i = right.gather(1, j), right.gather(1, i)
        # x_rest = (K_rest - C (delta/D) C')^-1 (r_rest - C (b r_i + delta r_j)/D)
        x_j = (self.b * r_i + SHIFT * r_j) / self.D
        x_rest = super().solve(right.gather(1, rest) - self.C @ x_j)
        # x_j = (b r_i + delta (r_j - C'x_rest)) / D
        r_j = r_j - self.C.mT @ x_rest
        x_j = (self.b * r_i + SHIFT * r_j) / self.D
        # x_i = (r_j - C'x_rest - K_jj x_j) / b
        x_i = (r_j - self.inner @ x_j) / self.b
        x = torch.empty_like(right).scatter_(1, rest, x_rest)
        return x.scatter_(1, j, x_j).scatter_(1, i, x_i)

    def rows(self, index: Tensor) -> _FactorOfRest:
        pinned = _Pinned(*(part[index] for part in self.pinned))
        parts = (part[index] for part in (self.rest, self.C, self.inner, self.b, self.D))
        return _FactorOfRest(self.lu[index], self.pivots[index], pinned, *parts)


class DenseSystem(KKTSystem):
    """Batched LU of the equilibrated matrix.

    K = scale [ P        B'      ] scale,   B = sqrt(d) U'A,   rows with d > 0
              [ B   -(1 - d)     ]
    """

    def __init__(
        self,
        operators: Operators,
        spectrum: ProductSpectrum,
        visible: Visible,
        units: Tensor | None,
    ):
        A, P, d = operators.A_values, operators.P_values, spectrum.values
        batch, m, n = len(d), A.shape[1], A.shape[2]
        self.n, self.m, self.spectrum, self.visible, self.units = n, m, spectrum, visible, units

        # U'A, of the rows with d > 0, gathered to the front; a row of the batch with fewer is
        # padded by rows with d = 0, which are decoupled.
        holding = d > 0
        active = int(holding.sum(-1).max()) if d.numel() else 0
        A = A if len(A) == batch else A.expand(batch, -1, -1)
        A = A if spectrum.is_diagonal else spectrum.to_basis(A, columns=True)
        self.active: Tensor | None = None
        if active < m:
            self.active = torch.topk(holding.to(torch.uint8), active, dim=1, sorted=True).indices
            d = d.gather(1, self.active)
            A = A.gather(1, self.active.unsqueeze(-1).expand(-1, -1, n))
        self.sqrt_d = d.clamp(min=0).sqrt()

        # K = [P B'; B -(1 - d)], written block by block.
        B = A * self.sqrt_d.unsqueeze(-1)
        K = P.new_zeros(batch, n + active, n + active)
        above, below = K.narrow(1, 0, n), K.narrow(1, n, active)
        above.narrow(2, 0, n).copy_(P)
        above.narrow(2, n, active).copy_(B.mT)
        below.narrow(2, 0, n).copy_(B)
        diagonal = K.diagonal(dim1=1, dim2=2)
        diagonal.narrow(1, n, active).copy_(d).sub_(1)

        # Equilibrated: each row and column by one over the root of its largest entry.
        largest = K.abs().amax(2) if K.numel() else K.new_zeros(batch, n + active)
        filled = not largest.numel() or largest.amin().item() > 0  # as nearly always
        self.scale = largest.rsqrt() if filled else torch.where(largest > 0, largest.rsqrt(), 1.0)
        K.mul_(self.scale.unsqueeze(2) * self.scale.unsqueeze(1))
        pinned = _pinned(operators.data.program, below.narrow(2, 0, n), d, self.active)

        # A variable that no active row and no quadratic term holds is a null vector by itself: it
        # stays where it is.
        self.held = largest.narrow(1, 0, n) > 0
        self.all_held = filled or bool(self.held.all())
        if not self.all_held:
            diagonal.narrow(1, 0, n).add_(~self.held)

        # K + delta J, kept so, and its factor; `_product` takes the shift off again.
        self.shift = _shift(n, active, P.device)
        diagonal.add_(self.shift)
        self.K = K
        self.factor = _Factor.of(K) if pinned is None else _FactorOfRest.without(K, pinned)
        self.poor = torch.zeros(batch, dtype=torch.bool, device=K.device)
        self._singular = torch.zeros_like(self.poor)
        if not self.all_held:
            self._singular = (visible.x & ~self.held).any(1)
        self._look_at_pivots()

    def _look_at_pivots(self) -> None:
        """Small pivots, or a random vector that grows much, may be null vectors'."""
        pivots = self.factor.lu.diagonal(dim1=1, dim2=2).abs()
        self.smallest = pivots.amin(1) if pivots.shape[1] else pivots.new_ones(len(pivots))
        growth = self._growth()
        least = self.smallest.amin().item() if len(growth) else math.inf
        most = growth.amax().item() if len(growth) else 0.0
        self.stiff = not least > STIFF and bool((self.smallest <= STIFF).any())
        if least > SUSPECT and most < 1 / SUSPECT:  # false where one is NaN
            return
        suspects = torch.nonzero((self.smallest <= SUSPECT) | (growth >= 1 / SUSPECT)).flatten()
        if len(suspects):
            self._look_for_null_vectors(suspects)

    def _growth(self) -> Tensor:
        """(B,) by how much the factor enlarges a random vector. Where it divides by the shift and
        cancels again, no pivot is small."""
        probe = probe_of(self.K.shape[1], self.K.device).expand(len(self.K), -1, -1)
        return torch.linalg.vector_norm(self.factor.solve(probe), dim=(1, 2))

    def solve(self, a: Tensor, c: Tensor, *, newton: bool = False) -> tuple[Tensor, Tensor]:
        # K (w, eta) = (a, sqrt(d) c), of the active rows, in the units of the equilibrated matrix
        c_active = c if self.active is None else c.gather(1, self.active)
        right = torch.cat([a if self.all_held else a * self.held, self.sqrt_d * c_active], 1)
        right = self._entering(right, newton)
        scaled = self._off_wide(right * self.scale, newton).unsqueeze(-1)
        solution = self.factor.solve(scaled)
        if scaled.numel() and (self.stiff or not newton):
            solution = self._refined(scaled, solution)
        solution = self._leaving(solution.squeeze(-1) * self.scale, newton)
        # e = sqrt(d) eta, zero in the rows that had left
        w, e = solution[:, : self.n], solution[:, self.n :] * self.sqrt_d
        if self.active is not None:
            e = c.new_zeros(len(c), self.m).scatter_(1, self.active, e)
        return w, e

    def _refined(self, right: Tensor, solution: Tensor) -> Tensor:
        """Iterative refinement against K itself; a row that stays inaccurate is flagged."""
        goal = right.abs().amax(1, keepdim=True)
        error = right - self._product(solution)
        for _ in range(REFINEMENT.steps):
            # x + (K + delta J)^-1 (r - K x), where that is better
            trial = solution + self.factor.solve(error)
            trial_error = right - self._product(trial)
            before = error.abs().amax(1, keepdim=True)
            after = trial_error.abs().amax(1, keepdim=True)
            better = after < before
            solution = torch.where(better, trial, solution)
            error = torch.where(better, trial_error, error)
            left = after > REFINEMENT.exact * goal
            if not bool(left.any()) or not bool((better & (after < 0.5 * before) & left).any()):
                break
        size, goal = error.abs().amax(1), goal.squeeze(1)
        if not bool((size <= REFINEMENT.certified * goal).all()):
            self.poor |= ~solved_well(size, solution.abs().amax(1), goal).squeeze(1)
        return solution

    def _product(self, x: Tensor) -> Tensor:
        """K x for x (B, size, k)."""
        return self.K @ x - self.shift.unsqueeze(-1) * x

    def _near(self, rows: Tensor) -> NullSpace:
        whole = len(rows) == len(self.K)
        K, factor = (self.K, self.factor) if whole else (self.K[rows], self.factor.rows(rows))
        shift = take_rows(self.shift, rows).unsqueeze(-1)
        return NullSpace(rows, shift, lambda x: K @ x - shift * x, factor.solve)

    @property
    def _size(self) -> int:
        return self.K.shape[1]

    def _dual(self, rows: Tensor, eta: Tensor) -> Tensor:
        dual = eta * self.sqrt_d[rows].unsqueeze(-1)
        if self.active is None:
            return dual
        place = self.active[rows].unsqueeze(-1).expand_as(dual)
        return dual.new_zeros(len(rows), self.m, dual.shape[2]).scatter_(1, place, dual)

    def _null_vectors(self, rows: Tensor, width: int) -> Tensor:
        K, factor = self.K[rows], self.factor.rows(rows)
        shift = take_rows(self.shift, rows).unsqueeze(-1)
        size = K.shape[1]
        basis = random_vectors(size, width).to(K).expand(len(K), -1, -1)
        for _ in range(INVERSE_ITERATIONS):
            basis, _ = torch.linalg.qr(factor.solve(basis))
        # Within the basis K's right singular vectors; those of no singular value are null.
        _, values, mixing = torch.linalg.svd(K @ basis - shift * basis, full_matrices=False)
        zero = values <= NULL * size**0.5
        return torch.where(zero.unsqueeze(1), basis @ mixing.mT, 0.0)


@constants
def _shift(n: int, active: int, device: torch.device) -> Tensor:
    """(1, n + active) delta J."""
    ones = torch.ones(1, n, dtype=torch.float64), -torch.ones(1, active, dtype=torch.float64)
    return (SHIFT * torch.cat(ones, 1)).to(device)
