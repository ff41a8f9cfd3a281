"""Quadratic programs with equality constraints only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from convlayer.autodiff.once import once_differentiable
from convlayer.kernels.answer import Answer
from convlayer.solution import Status

SAFE = 1e11  # product of the sizes of both factored matrices' inverses above which a row takes the null-space method
CORRECTIONS = ((1e4, 0), (1e7, 1), (SAFE, 2))  # below each such product, that many leave at most 1e-12
RANK = 1e-12  # singular values and curvatures below this share of the largest are zero (float32: 8 of its roundings)
CONSISTENT = 1e-9  # share of its terms to which a dependent row of Ax = b, or a slope without curvature, must vanish
ACCURATE = 1e-8  # residual above which a row is INACCURATE
DOUBTFUL = 1e6  # product as in SAFE up to which rounding cannot move the solution by as much as SENSITIVE
SENSITIVE = 3e-8  # relative error of the solution, estimated by one more solve, above which a row is INACCURATE,
MEANINGLESS = 1e-2  # and above which it is none
ROUNDING = 2e-16  # of an entry of the residual, relative to the terms that it is the sum of
FLOOR = 1e-3  # a solution smaller than this share of the data is measured by them
HIDDEN = 1e-7  # an entry of a unit null vector up to which it is zero
SWEEPS = 8  # of equilibration before the null-space method


def equality_constrained_qp(
    P: Tensor,  # (B or 1, n, n), its symmetric part counts
    q: Tensor,  # (B or 1, n)
    A: Tensor,  # (B or 1, p, n), p >= 0
    b: Tensor,  # (B or 1, p)
    visible: Tensor | None = None,  # (n + p,) one where (x, nu) is looked at or moved, zero elsewhere; None for ones
) -> Answer:
    """Quadratic program with equality constraints only.

        minimise    1/2 x'Px + q'x
        subject to  Ax = b                                  (multiplier nu, L = objective + nu'(Ax - b))

    Solution:    K (x, nu) = (-q, b) with K = [P A'; A 0]. Where x or nu is not unique, (x, nu) of minimum norm; where P is
                 positive semidefinite that is the minimum norm of each. INFEASIBLE: Ax = b has no solution. UNBOUNDED: P has
                 negative curvature on the null space of A, or none and a slope.
    Derivative:  K (d, e) = (x_bar, nu_bar) gives P_bar = -(d x' + x d')/2, q_bar = -d, A_bar = -(e x' + nu d'), b_bar = e.
                 Where K is singular that is K^+ at constant rank, and with (s, t) the null part of (x_bar, nu_bar) and
                 (y, u) = K^+ (x, nu) there is more: P_bar + (s y' + y s')/2, A_bar + t y' + u s'.
    Shapes:      outputs x (B, n), nu (B, p). Where P and A are shared by the batch, so is their one factorisation.
    Cost:        in multiplications a row: the factors n^3/6 + n^2 p/2 + n p^2 + p^3/6; a solve n^2 + 2 n p + p^2, once forward
                 and once backward, and twice as much more for each correction; the residual n^2 + 2 n p; P_bar and A_bar
                 2 n^2 + 2 n p. Where P is singular n^2 p more and the factors again; the null-space method about 40 (n + p)^3.
                 Kept for backward: n^2 + n p + p^2 numbers a row, and 2 (n + p)^2 for rows of the null-space method.
    Accuracy:    float64 whatever the dtype. Tested row by row: Cholesky of P and of A P^-1 A'; else of P + A'RA for P; else
                 the null-space method by orthogonal factors of the equilibrated K. All corrected with residuals of K.
                 `residual` is that of K in the units of its equilibrated rows and columns, relative to their terms. Where K is
                 nearly singular, one more solve with the residual and its own rounding tells how far the solution may be off:
                 INACCURATE above 3e-8, NOT_CONVERGED above 1e-2, in what is visible.
    At a kink:   a singular K is flagged as degenerate, unless its null vectors are zero in what is visible: a change of rank is a
                 discontinuity.
    Second derivative: by two steps of the chord method from the solution with the factor above; at constant rank likewise.
    Source:      Nocedal and Wright (2006), chapter 16; Golub and Pereyra (1973) for the derivative at constant rank.
    """
    with torch.no_grad():
        solved = _solve(_Problem.of(P, q, A, b), visible)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (P, q, A, b)):
        x, nu = _Differentiable.apply(solved, P, q, A, b)
        local = partial(_again, solved.factor, solved.failed, x, nu)
    else:
        x, nu, local = solved.x.to(P.dtype), solved.nu.to(P.dtype), None
    apart = None if solved.apart is None else partial(torch.Tensor.detach, solved.apart)
    return Answer((x, nu), solved.status, None, solved.residual, solved.degenerate, solved.definite, local, apart)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, solved: _Solved, P, q, A, b):
        x, nu = solved.x.to(P.dtype), solved.nu.to(P.dtype)
        ctx.save_for_backward(P, q, A, b, x, nu)
        ctx.factor, ctx.failed = solved.factor, solved.failed
        return x, nu

    @staticmethod
    @once_differentiable
    def backward(ctx, x_bar: Tensor, nu_bar: Tensor):
        *data, x, nu = ctx.saved_tensors
        z, z_bar = _Pair(x, nu), _Pair(x_bar, nu_bar)
        bars = _pull_back(data, ctx.factor, ctx.failed, z, z_bar, ctx.needs_input_grad[1:])
        return None, *(None if bar is None else bar.to(x.dtype) for bar in bars)


class _Pair(NamedTuple):
    """A vector of K's size, as rows (F, k, n) and (F, k, p): products with rows are the faster ones."""

    x: Tensor
    nu: Tensor


@dataclass(frozen=True, eq=False)
class _Problem:
    """The data in float64. F is the batch of the matrices; where it is 1, the right-hand sides of the whole batch stand in it."""

    given: Tensor  # (F or 1, n, n), P as it was given
    A: Tensor  # (F or 1, p, n)
    right: _Pair  # (-q, b)
    factors: int  # F
    batch: int  # B
    rank: float  # RANK and CONSISTENT for this dtype
    consistent: float

    @classmethod
    def of(cls, P: Tensor, q: Tensor, A: Tensor, b: Tensor) -> _Problem:
        sizes = [len(t) for t in (P, q, A, b)]
        batch, factors = max(sizes) if min(sizes) else 0, max(sizes[0], sizes[2]) if sizes[0] and sizes[2] else 0
        eps = torch.finfo(P.dtype).eps
        right = _Pair(-_rows(q, factors, batch), _rows(b, factors, batch))
        return cls(P, A.double(), right, factors, batch, max(RANK, 8 * eps), max(CONSISTENT, 100 * eps))

    @cached_property
    def P(self) -> Tensor:
        """(F or 1, n, n), symmetric."""
        P = self.given.double()
        return (P + P.mT).mul_(0.5)

    def residual(self, right: _Pair, z: _Pair) -> _Pair:
        """right - K z."""
        x = right.x - _mm(z.x, self.P)
        if not self.A.shape[1]:
            return _Pair(x, right.nu)
        return _Pair(x - _mm(z.nu, self.A), right.nu - _mm(z.x, self.A.mT))

    def terms(self, right: _Pair, z: _Pair) -> _Pair:
        """The sizes of what `residual` adds up."""
        x, nu = z.x.abs(), z.nu.abs()
        rows = right.x.abs() + _mm(x, self.P.abs())
        if not self.A.shape[1]:
            return _Pair(rows, right.nu)
        return _Pair(rows + _mm(nu, self.A.abs()), right.nu.abs() + _mm(x, self.A.abs().mT))

    def take(self, index: Tensor) -> _Problem:
        """The problem of some rows of the batch of matrices."""
        P, A = (t if len(t) == 1 else t[index] for t in (self.given, self.A))
        return replace(self, given=P, A=A, right=_Pair(self.right.x[index], self.right.nu[index]))


def _rows(vectors: Tensor, factors: int, batch: int) -> Tensor:
    """(B or 1, .) -> rows."""
    vectors = vectors.double()
    return (vectors if len(vectors) == batch else vectors.expand(batch, -1)).unsqueeze(0 if factors == 1 else 1)


def _mm(left: Tensor, right: Tensor) -> Tensor:
    """left @ right without the price of broadcasting where there is none."""
    return torch.bmm(left, right) if len(left) == len(right) else left @ right


@dataclass(frozen=True, eq=False)
class _Factor:
    """Cholesky of H = P + A'RA and of A H^-1 A'; for some rows of the batch, K^+ itself."""

    L: Tensor  # (F or 1, n, n)
    Y: Tensor  # (F, n, p)  L^-1 A'
    M: Tensor  # (F, p, p)  MM' = Y'Y
    R: Tensor | None  # (F, 1, p)
    units: Tensor  # (F, 1, n + p)  sizes of K's rows: D^-1 where DKD is equilibrated
    corrections: int = 0
    exact: _PseudoInverse | None = None  # of some rows

    def substitute(self, A: Tensor, right: _Pair) -> _Pair:
        """K^-1 right, uncorrected."""
        f, g = right
        if self.R is not None:
            f = f + _mm(g * self.R, A)
        half, nu = torch.linalg.solve_triangular(self.L, f.mT, upper=False), g
        if g.shape[2]:
            nu = torch.linalg.solve_triangular(self.M, _mm(self.Y.mT, half) - g.mT, upper=False)
            nu = torch.linalg.solve_triangular(self.M.mT, nu, upper=True)
            half, nu = half - _mm(self.Y, nu), nu.mT
        return _Pair(torch.linalg.solve_triangular(self.L.mT, half, upper=True).mT, nu)

    def solve(self, problem: _Problem, right: _Pair) -> _Pair:
        """K^-1 right, or K^+ right."""
        z = self.substitute(problem.A, right)
        for _ in range(self.corrections):
            z = _sum(z, self.substitute(problem.A, problem.residual(right, z)))
        return z if self.exact is None else self.exact.solve_into(z, problem, right)

    def take(self, index: Tensor) -> _Factor:
        """That of some rows of the batch, none of which has a K^+ of its own."""
        L = self.L if len(self.L) == 1 else self.L[index]
        R = None if self.R is None else self.R[index]
        return _Factor(L, self.Y[index], self.M[index], R, self.units[index], self.corrections)


@dataclass(frozen=True, eq=False)
class _PseudoInverse:
    """K^+ of some rows of the batch."""

    index: Tensor  # of the rows
    inverse: Tensor  # (rows, n + p, n + p)
    null: Tensor  # (rows, n + p, n + p)  an orthonormal basis of the null space of K, and columns of zeros

    def solve_into(self, z: _Pair, problem: _Problem, right: _Pair) -> _Pair:
        """z, with K^+ right in these rows."""
        exact = self.solve(problem.take(self.index), _Pair(right.x[self.index], right.nu[self.index]))
        return _Pair(z.x.index_copy(0, self.index, exact.x), z.nu.index_copy(0, self.index, exact.nu))

    def solve(self, problem: _Problem, right: _Pair) -> _Pair:
        """K^+ right, for the problem of these rows."""
        exact = _times(right, self.inverse)
        for _ in range(2):
            exact = _sum(exact, _times(problem.residual(right, exact), self.inverse))
        return exact


def _sum(z: _Pair, step: _Pair) -> _Pair:
    return _Pair(z.x + step.x, z.nu + step.nu)


def _times(z: _Pair, matrix: Tensor) -> _Pair:
    """Rows times a matrix of K's size."""
    return _Pair(*(torch.cat(z, 2) @ matrix).split((z.x.shape[2], z.nu.shape[2]), 2))


@dataclass(frozen=True, eq=False)
class _Solved:
    factor: _Factor
    failed: Tensor | None  # (F, k)
    x: Tensor  # (B, n)
    nu: Tensor  # (B, p)
    status: Tensor  # (B,)
    residual: Tensor  # (B,)
    degenerate: Tensor  # (B,)
    definite: bool  # every P is positive definite
    apart: Tensor | None  # (B,) by how much rows of Ax = b that depend on each other disagree; None: no row does


def _solve(problem: _Problem, visible: Tensor | None) -> _Solved:
    P, A, right = problem.P, problem.A, problem.right
    factor, hard = _factorise(problem, None)
    worst = float(hard.max()) if len(hard) else 0.0
    definite = worst <= SAFE
    if not worst <= SAFE and A.shape[1]:
        # A term that vanishes on Ax = b, as large as P, for the rows that want it.
        curvature = _or_one(P.diagonal(dim1=1, dim2=2).abs().amax(1))[:, None, None]
        R = (curvature / _or_one(A.square().sum(2)).unsqueeze(1)).masked_fill((hard <= SAFE)[:, None, None], 0.0)
        factor, hard = _factorise(problem, R)
        worst = float(hard.max())
    corrections = next((count for limit, count in CORRECTIONS if worst <= limit), CORRECTIONS[-1][1])
    factor = replace(factor, corrections=corrections)
    failed = apart = None
    if not worst <= SAFE:
        index = torch.nonzero(~(hard <= SAFE)).flatten()
        inverse, null, units, found, gaps = _null_space(problem.take(index), len(index))
        exact, units = _PseudoInverse(index, inverse, null), factor.units.index_copy(0, index, units)
        factor = replace(factor, exact=exact, units=units)
        status = torch.zeros(right.x.shape[:2], dtype=torch.int64, device=A.device).index_copy_(0, index, found)
        failed = status > 0
        apart = torch.zeros_like(right.x[:, :, 0]).expand(status.shape).index_copy(0, index, gaps).reshape(problem.batch)
    z = factor.solve(problem, right)
    gap = problem.residual(right, z)
    residual = _relative(factor.units, gap, z, right)
    accurate = residual <= max(ACCURATE, 10 * problem.rank)
    accuracy = torch.where(accurate, int(Status.SOLVED), int(Status.INACCURATE))
    if not worst <= DOUBTFUL:
        error = _error(problem, factor, right, z, gap, visible)
        sure = error <= max(SENSITIVE, 10 * problem.rank)
        accuracy = torch.where(accurate & sure, int(Status.SOLVED), int(Status.INACCURATE))
        accuracy = torch.where(error <= MEANINGLESS, accuracy, int(Status.NOT_CONVERGED))
    degenerate = torch.zeros_like(accuracy, dtype=torch.bool)
    if failed is None:
        status = accuracy
    else:
        shown = null if visible is None else null * visible.to(null).unsqueeze(1)
        singular = torch.any(shown.abs() > HIDDEN, 2).any(1)
        degenerate[index] = singular.unsqueeze(1) & ~failed[index]
        z = _Pair(*(t.masked_fill(failed.unsqueeze(2), 0.0) for t in z))
        status, residual = torch.where(failed, status, accuracy), residual.masked_fill(failed, torch.nan)
    x, nu, status, residual, degenerate = (
        t.reshape(problem.batch, *t.shape[2:]) for t in (*z, status, residual, degenerate)
    )
    return _Solved(factor, failed, x, nu, status, residual, degenerate, definite, apart)


@lru_cache(maxsize=64)
def _probe(n: int, device: torch.device) -> Tensor:
    """Entries without a pattern, so that no vector of interest is orthogonal to it."""
    return torch.arange(n, dtype=torch.float64, device=device).square().cos()


def _factorise(problem: _Problem, R: Tensor | None) -> tuple[_Factor, Tensor]:
    """The factor, and the sizes of the two inverses in equilibrated units, multiplied."""
    count, (p, n) = problem.factors, problem.A.shape[1:]
    A = problem.A if len(problem.A) == count else problem.A.expand(count, -1, -1)
    H = problem.P if R is None else problem.P + A.mT @ (A * R.mT)
    L, info = torch.linalg.cholesky_ex(H)
    units = H.diagonal(dim1=1, dim2=2).sqrt().unsqueeze(1)
    if len(H) != count:
        units = units.expand(count, -1, -1)
    half = torch.linalg.solve_triangular(L, torch.cat((A, units * _probe(n, L.device)), 1).mT, upper=False)
    hard = _size(L, units, half[:, :, p:]).masked_fill(info != 0, torch.inf)
    if not p:
        return _Factor(L, half, L, R, units), hard.nan_to_num(torch.inf, torch.inf)
    Y = half[:, :, :p]
    S = _mm(Y.mT, Y)
    M, info = torch.linalg.cholesky_ex(S)
    units_nu = S.diagonal(dim1=1, dim2=2).sqrt().unsqueeze(1)
    probe = torch.linalg.solve_triangular(M, (units_nu * _probe(p, M.device)).mT, upper=False)
    hard = (hard * _size(M, units_nu, probe)).masked_fill(info != 0, torch.inf)
    return _Factor(L, Y, M, R, torch.cat((units, units_nu), 2)), hard.nan_to_num(torch.inf, torch.inf)


def _size(L: Tensor, unit: Tensor, probe: Tensor) -> Tensor:
    """Of (LL')^-1 in equilibrated units: as seen by a probe's half solution, or by pivots where that should miss it."""
    pivots = unit.squeeze(1) / L.diagonal(dim1=1, dim2=2)
    return torch.maximum(probe.square().sum((1, 2)) / probe.shape[1], pivots.square().amax(1))


def _or_one(size: Tensor) -> Tensor:
    return torch.where(size > 0, size, 1.0)


def _relative(units: Tensor, error: _Pair, z: _Pair, right: _Pair) -> Tensor:
    """The size of an error of K z = right, in K's equilibrated units, relative to that of its terms."""
    terms = torch.cat(error, 2) / units, torch.cat(right, 2) / units, torch.cat(z, 2) * units
    error_size, right_size, z_size = (torch.linalg.vector_norm(t, dim=2) for t in terms)
    return error_size / (right_size + z_size).clamp(min=torch.finfo(z_size.dtype).tiny)


def _error(problem: _Problem, factor: _Factor, right: _Pair, z: _Pair, gap: _Pair, visible: Tensor | None) -> Tensor:
    """(F, k) how far z may be off, in K's equilibrated units, by one more solve from a residual, right - K z = `gap`, of which no more
    is known than rounding leaves; the larger of x's, relative to x, and nu's."""
    sizes, terms = (z.x.shape[2], z.nu.shape[2]), problem.terms(right, z)
    waves = _waves(sum(sizes), z.x.device).split(sizes, 1)
    doubtful = (_doubtful(g, t, wave) for g, t, wave in zip(gap, terms, waves, strict=True))
    step, at = (torch.cat(pair, 2) * factor.units for pair in (factor.solve(problem, _Pair(*doubtful)), z))
    off = step.abs().unflatten(1, (2, -1)).amax(1)
    if visible is not None:
        off = off * visible.to(off)
    data = FLOOR * _largest(torch.cat(right, 2) / factor.units)
    parts = [
        _largest(moved) / torch.maximum(_largest(here), data).clamp(min=torch.finfo(data.dtype).tiny)
        for moved, here in zip(off.split(sizes, 2), at.split(sizes, 2), strict=True)
    ]
    return torch.maximum(*parts)


def _doubtful(gap: Tensor, terms: Tensor, waves: Tensor) -> Tensor:
    """(F, k, .) -> (F, 2 k, .): the residual with two samples of its rounding."""
    return (gap.unsqueeze(1) + ROUNDING * terms.unsqueeze(1) * waves.unsqueeze(1)).flatten(1, 2)


@lru_cache(maxsize=64)
def _waves(n: int, device: torch.device) -> Tensor:
    """(2, n) in which no two columns, and so no two rows of a matrix, are alike."""
    phase = torch.arange(n, dtype=torch.float64, device=device).square()
    return 2**0.5 * torch.stack((phase.cos(), phase.sin()))


def _largest(rows: Tensor) -> Tensor:
    """(F, k, .) -> (F, k), zero of none."""
    return rows.abs().amax(2) if rows.shape[2] else rows.new_zeros(rows.shape[:2])


def _null_space(problem: _Problem, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(K^+, null basis of K, sizes of K's rows, statuses, how far dependent rows of Ax = b are apart), by orthogonal factors of the
    equilibrated A and of P on its null space.

    With A^+ the pseudo-inverse, Z its null basis, and G = Z (Z'PZ)^+ Z', a generalised inverse of K is

        [ G           (I - G P) A^+          ]
        [ .'   -A^+'(P - P G P) A^+          ]

    and its null space is spanned by (x, -A^+' P x) with x = Z (null vector of Z'PZ), and by (0, null vector of A').
    """
    p, n = problem.A.shape[1:]
    P, A = problem.P.expand(count, -1, -1), problem.A.expand(count, -1, -1)
    D = _equilibrate(P, A)
    e, f = D[:, :n], D[:, n:]
    P, A = e.unsqueeze(2) * P * e.unsqueeze(1), f.unsqueeze(2) * A * e.unsqueeze(1)
    U, values, Vt = torch.linalg.svd(A, full_matrices=True)
    used = values > problem.rank * values.amax(1, keepdim=True) if p else values > 0
    range_x, range_nu = (torch.nn.functional.pad(used, (0, size - used.shape[1])) for size in (n, p))
    V, r = Vt.mT, min(n, p)
    pinv = V[:, :, :r] * torch.where(used, 1.0 / values, 0.0).unsqueeze(1) @ U[:, :, :r].mT
    Z = V * ~range_x.unsqueeze(1)
    size = P.abs().amax((1, 2))
    # A marker takes the columns of Z that are zero to the end.
    curvature, Q = torch.linalg.eigh(Z.mT @ P @ Z + torch.diag_embed(range_x * (4.0 * n * _or_one(size)).unsqueeze(1)))
    Z, inside = Z @ Q, ~range_x.flip(1)
    threshold = problem.rank * n * size.unsqueeze(1)
    flat = (curvature.abs() <= threshold) & inside
    G = Z * torch.where(inside & ~flat, 1.0 / curvature, 0.0).unsqueeze(1) @ Z.mT
    C = pinv - G @ (P @ pinv)
    lower = -(P @ pinv).mT @ C
    K = torch.cat((torch.cat((G, C), 2), torch.cat((C.mT, (lower + lower.mT) * 0.5), 2)), 1)
    level = Z * flat.unsqueeze(1)
    free = U * ~range_nu.unsqueeze(1)
    null = torch.cat((torch.cat((level, -pinv.mT @ (P @ level)), 1), torch.nn.functional.pad(free, (0, 0, n, 0))), 2)
    null = _orthonormal(D.unsqueeze(2) * null, torch.cat((flat, ~range_nu), 1))
    K = D.unsqueeze(2) * K * D.unsqueeze(1)
    K = K - null @ (null.mT @ K)
    K = K - (K @ null) @ null.mT
    g = problem.right.nu * f.unsqueeze(1)
    start = g @ pinv.mT
    apart = _apart(free, g)
    infeasible = apart > problem.consistent
    # The slope along flat directions, at the minimum along the curved ones: rounding may turn one a little into the other.
    q = -problem.right.x * e.unsqueeze(1)
    start = start - (q + start @ P) @ G
    slope, terms = q + start @ P, q.abs() + start.abs() @ P.abs()
    unbounded = _sticks_out(level, slope, terms, problem.consistent)
    unbounded = unbounded | ((curvature < -threshold) & inside).any(1, keepdim=True)
    status = torch.where(infeasible, int(Status.INFEASIBLE), torch.where(unbounded, int(Status.UNBOUNDED), 0))
    return K, null, 1.0 / D.unsqueeze(1), status, apart


def _equilibrate(P: Tensor, A: Tensor) -> Tensor:
    """D with the largest entry of every row of D K D near 1, rows of zeros apart."""
    K = torch.cat((torch.cat((P, A.mT), 2), torch.nn.functional.pad(A, (0, A.shape[1]))), 1).abs()
    D = torch.ones_like(K[:, 0])
    for _ in range(SWEEPS):
        D = D / _or_one((D.unsqueeze(2) * K * D.unsqueeze(1)).amax(2)).sqrt()
    return D


def _orthonormal(columns: Tensor, chosen: Tensor) -> Tensor:
    """An orthonormal basis of the chosen columns, first; zeros after it."""
    order = chosen.int().argsort(dim=1, descending=True, stable=True)
    basis = torch.linalg.qr(columns.gather(2, order.unsqueeze(1).expand_as(columns)))[0]
    return basis * chosen.gather(1, order).unsqueeze(1)


def _apart(basis: Tensor, rows: Tensor) -> Tensor:
    """(F, k) the largest part of a right-hand side along an orthonormal basis of the null space of A', relative to the largest of
    those that it depends on: the measure of the cone program's equalities."""
    if not rows.shape[2]:
        return rows.new_zeros(rows.shape[:2])
    projector = basis @ basis.mT
    linked = (projector.abs() > HIDDEN).unsqueeze(1)  # (F, 1, p, p)
    size = torch.where(linked, rows.abs().unsqueeze(2), 0.0).amax(3)
    rounding = ROUNDING * rows.shape[2] * rows.abs().amax(2, keepdim=True)
    part = ((rows @ projector).abs() - rounding).clamp(min=0.0)
    return (part / size.clamp(min=torch.finfo(size.dtype).tiny)).amax(2)


def _sticks_out(basis: Tensor, rows: Tensor, terms: Tensor, tolerance: float) -> Tensor:
    """Which rows have a part along an orthonormal basis that is no rounding of their terms."""
    if not rows.shape[2]:
        return torch.zeros(rows.shape[:2], dtype=torch.bool, device=rows.device)
    projector = basis @ basis.mT
    rounding = 1e-5 * tolerance * terms.amax(2, keepdim=True)
    return ((rows @ projector).abs() > tolerance * terms @ projector.abs() + rounding).any(2)


def _pull_back(
    data: list[Tensor], factor: _Factor, failed: Tensor | None, z: _Pair, z_bar: _Pair, needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Cotangents of P, q, A and b."""
    P, q, A, b = data
    problem = _Problem.of(P, q, A, b)
    (x, nu), right = (_Pair(*(_rows(t, problem.factors, problem.batch) for t in pair)) for pair in (z, z_bar))
    if failed is not None:
        right = _Pair(*(torch.where(failed.unsqueeze(2), 0.0 * t, t) for t in right))
    d, e = factor.solve(problem, right)
    P_bar = q_bar = A_bar = b_bar = None
    if needed[0]:
        P_bar = -0.5 * _outer(P, (d, x), (x, d))
    if needed[1]:
        q_bar = -_of_batch(q, d, problem.batch)
    if needed[2]:
        A_bar = -_outer(A, (e, nu), (x, d))
    if needed[3]:
        b_bar = _of_batch(b, e, problem.batch)
    if factor.exact is not None:
        index, null = factor.exact.index, factor.exact.null
        s, t = _times(_Pair(right.x[index], right.nu[index]), null @ null.mT)
        y, u = _times(_Pair(x[index], nu[index]), factor.exact.inverse)
        if P_bar is not None:
            P_bar = _add(P_bar, index, 0.5 * _outer(P, (s, y), (y, s)))
        if A_bar is not None:
            A_bar = _add(A_bar, index, _outer(A, (t, u), (y, s)))
    return P_bar, q_bar, A_bar, b_bar


def _outer(given: Tensor, lefts: tuple[Tensor, ...], rights: tuple[Tensor, ...]) -> Tensor:
    """The sum of the products of rows, over the batch where `given` is one for it."""
    left, right = torch.cat(lefts, 1), torch.cat(rights, 1)
    if len(given) == 1:
        left, right = left.flatten(0, 1).unsqueeze(0), right.flatten(0, 1).unsqueeze(0)
    return _mm(left.mT, right)


def _add(bar: Tensor, index: Tensor, part: Tensor) -> Tensor:
    return bar + part if len(bar) == 1 else bar.index_add(0, index, part)


def _of_batch(given: Tensor, rows: Tensor, batch: int) -> Tensor:
    rows = rows.reshape(batch, rows.shape[2])
    return rows.sum(0, keepdim=True) if len(given) == 1 else rows


def _again(
    factor: _Factor,
    failed: Tensor | None,
    x: Tensor,  # (B, n), the solution
    nu: Tensor,  # (B, p)
    P: Tensor,
    q: Tensor,
    A: Tensor,
    b: Tensor,
) -> tuple[Tensor, Tensor]:
    """The solution as a function of the data in plain torch operations: exact to second order."""
    problem, count, exact = _Problem.of(P, q, A, b), len(factor.units), factor.exact
    # what the matrices share may have been expanded since they were factored
    shared = count if count == 1 else None
    here = _Problem.of(P.detach()[:shared], q.detach(), A.detach()[:shared], b.detach())
    z = _Pair(*(_rows(t.detach(), problem.factors, problem.batch) for t in (x, nu)))
    if exact is None:
        z = _regular(problem, here, factor, z)
    elif count == 1:
        z = _of_minimum_norm(problem, here, exact, z)
    else:
        # Apart, so that no matrix without a factor comes near a derivative.
        hard = exact.index
        easy = torch.ones(count, dtype=torch.bool, device=x.device).index_fill_(0, hard, False).nonzero().flatten()
        first = _Pair(z.x[easy], z.nu[easy])
        first = _regular(problem.take(easy), here.take(easy), factor.take(easy), first)
        last = _of_minimum_norm(problem.take(hard), here.take(hard), exact, _Pair(z.x[hard], z.nu[hard]))
        order = torch.cat((easy, hard)).argsort()
        z = _Pair(*(torch.cat(parts).index_select(0, order) for parts in zip(first, last, strict=True)))
    x, nu = (t.reshape(problem.batch, t.shape[2]).to(P.dtype) for t in z)
    if failed is not None:
        rows = failed.reshape(-1, 1)
        x, nu = x.masked_fill(rows, 0.0), nu.masked_fill(rows, 0.0)
    return x, nu


def _laid(z: _Pair, factors: int) -> _Pair:
    """Rows of the whole batch as those of so many matrices."""
    return _Pair(*(t if len(t) == factors else _regrouped(t, factors) for t in z))


def _regrouped(rows: Tensor, factors: int) -> Tensor:
    """(F, k, .) -> (factors, ., .), of rows without entries too."""
    return rows.reshape(factors, len(rows) * rows.shape[1] // factors if factors else 0, rows.shape[2])


def _regular(problem: _Problem, here: _Problem, factor: _Factor, z: _Pair) -> _Pair:
    """z by chord steps on K z = (-q, b) with the factor of K, here."""
    for _ in range(2):
        gap = problem.residual(problem.right, z)
        z = _sum(z, _laid(factor.solve(here, _laid(gap, len(factor.units))), len(gap.x)))
    return z


def _of_minimum_norm(problem: _Problem, here: _Problem, exact: _PseudoInverse, z: _Pair) -> _Pair:
    """z by chord steps with K^+ on K z = (-q, b); the part of z that this leaves free, on z = K y, y in the range of K^+."""

    def solve(right: _Pair) -> _Pair:
        return _laid(exact.solve(here, _laid(right, len(exact.inverse))), len(right.x))

    projector, y = exact.null @ exact.null.mT, solve(z)
    for _ in range(2):
        beyond = _times(problem.residual(z, y), -projector)
        z = _sum(_sum(z, solve(problem.residual(problem.right, z))), beyond)
        y = _sum(y, solve(problem.residual(z, y)))
    return z
