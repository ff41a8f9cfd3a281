"""Quadratic programs with equality constraints only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from convlayer.autodiff.once import once_differentiable
from convlayer.kernels.accuracy import (
    ACCURACY,
    accuracy_status,
    corrections_for,
    largest_sample,
    probe,
    relative_residual,
    relative_to,
    rounding_samples,
)
from convlayer.kernels.answer import Answer
from convlayer.kernels.batches import add_rows, mm, or_one, outer, regrouped, sum_to, the_others
from convlayer.solution import Status


@dataclass(frozen=True)
class _Limits:
    """What decides how a row is solved, and whether it has a solution.

    Sizes are those of both factored matrices' inverses in equilibrated units, multiplied.
    """

    # A row of a larger size takes the null-space method.
    safe: float = 1e11
    # Up to each size, so many corrections of a solve with the Cholesky factors leave at most 1e-12.
    corrections: tuple[tuple[float, int], ...] = ((1e4, 0), (1e7, 1), (1e11, 2))
    # Singular values and curvatures below this share of the largest are zero (float32: 8 of its
    # roundings).
    rank: float = 1e-12
    # A dependent row of Ax = b, and a slope without curvature, vanish to this share of their terms.
    consistent: float = 1e-9
    # Rounds of equilibration before the null-space method.
    sweeps: int = 8


LIMITS = _Limits()


def equality_constrained_qp(
    P: Tensor,  # (B or 1, n, n), its symmetric part counts
    q: Tensor,  # (B or 1, n)
    A: Tensor,  # (B or 1, p, n), p >= 0
    b: Tensor,  # (B or 1, p)
    visible: Tensor
    # (n + p,) one where (x, nu) is looked at or moved, zero elsewhere; None for ones
    | None = None,
) -> Answer:
    """Quadratic program with equality constraints only.

        minimise    1/2 x'Px + q'x
        subject to  Ax = b                                  (multiplier nu, L = objective + nu'(Ax - b))

    Solution:    K (x, nu) = (-q, b) with K = [P A'; A 0]. Where x or nu is not unique, (x, nu) of
                 minimum norm; where P is positive semidefinite that is the minimum norm of each.
                 INFEASIBLE: Ax = b has no solution. UNBOUNDED: P has negative curvature on the null
                 space of A, or none and a slope.
    Derivative:  K (d, e) = (x_bar, nu_bar) gives P_bar = -(d x' + x d')/2, q_bar = -d, A_bar = -(e
                 x' + nu d'), b_bar = e. Where K is singular that is K^+ at constant rank, and with
                 (s, t) the null part of (x_bar, nu_bar) and (y, u) = K^+ (x, nu) there is more:
                 P_bar + (s y' + y s')/2, A_bar + t y' + u s'.
    Shapes:      outputs x (B, n), nu (B, p). Where P and A are shared by the batch, so is their one
                 factorisation.
    Cost:        in multiplications a row: the factors n^3/6 + n^2 p/2 + n p^2 + p^3/6; a solve n^2
                 + 2 n p + p^2, once forward and once backward, and twice as much more for each
                 correction; the residual n^2 + 2 n p; P_bar and A_bar 2 n^2 + 2 n p. Where P is
                 singular n^2 p more and the factors again; the null-space method about 40 (n +
                 p)^3. Kept for backward: n^2 + n p + p^2 numbers a row, and 2 (n + p)^2 for rows of
                 the null-space method.
    Accuracy:    float64 whatever the dtype. Tested row by row: Cholesky of P and of A P^-1 A'; else
                 of P + A'RA for P; else the null-space method by orthogonal factors of the
                 equilibrated K. All corrected with residuals of K. `residual` is that of K in the
                 units of its equilibrated rows and columns, relative to their terms. Where K is
                 nearly singular, one more solve with the residual and its own rounding tells how
                 far the solution may be off: INACCURATE above 3e-8, NOT_CONVERGED above 1e-2, in
                 what is visible.
    At a kink:   a singular K is flagged as degenerate, unless its null vectors are zero in what is
                 visible: a change of rank is a discontinuity.
    Second derivative: by two steps of the chord method from the solution with the factor above; at
                       constant rank likewise.
    Source:      Nocedal and Wright (2006), chapter 16; Golub and Pereyra (1973) for the derivative
                 at constant rank.
    """
    with torch.no_grad():
        solved = _solve(_Problem.of(P, q, A, b), visible)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (P, q, A, b)):
        x, nu = _Differentiable.apply(solved, P, q, A, b)
        local = partial(_by_chord_steps, solved.factor, solved.failed, x, nu)
    else:
        x, nu, local = solved.x.to(P.dtype), solved.nu.to(P.dtype), None
    apart = None if solved.apart is None else partial(torch.Tensor.detach, solved.apart)
    return Answer(
        (x, nu),
        solved.status,
        None,
        solved.residual,
        solved.degenerate,
        solved.definite,
        local,
        apart,
    )


class _Differentiable(torch.autograd.Function):
    """A solution that is known, with its first derivative by the same factor."""

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
    """A vector of K's size, as rows (F, k, n) and (F, k, p): products with rows are the faster
    ones."""

    x: Tensor
    nu: Tensor


@dataclass(frozen=True, eq=False)
class _Problem:
    """The data in float64. F is the batch of the matrices; where it is 1, the right-hand sides of
    the whole batch stand in it."""

    given: Tensor  # (F or 1, n, n), P as it was given
    A: Tensor  # (F or 1, p, n)
    right: _Pair  # (-q, b)
    factors: int  # F
    batch: int  # B
    rank: float  # LIMITS.rank and .consistent for this dtype
    consistent: float

    @classmethod
    def of(cls, P: Tensor, q: Tensor, A: Tensor, b: Tensor) -> _Problem:
        sizes = [len(t) for t in (P, q, A, b)]
        batch, factors = (
            max(sizes) if min(sizes) else 0,
            max(sizes[0], sizes[2]) if sizes[0] and sizes[2] else 0,
        )
        eps = torch.finfo(P.dtype).eps
        right = _Pair(-_rows(q, factors, batch), _rows(b, factors, batch))
        return cls(
            P,
            A.double(),
            right,
            factors,
            batch,
            max(LIMITS.rank, 8 * eps),
            max(LIMITS.consistent, 100 * eps),
        )

    @cached_property
    def P(self) -> Tensor:
        """(F or 1, n, n), symmetric."""
        P = self.given.double()
        return (P + P.mT).mul_(0.5)

    def residual(self, right: _Pair, z: _Pair) -> _Pair:
        """right - K z."""
        x = right.x - mm(z.x, self.P)
        if not self.A.shape[1]:
            return _Pair(x, right.nu)
        return _Pair(x - mm(z.nu, self.A), right.nu - mm(z.x, self.A.mT))

    def terms(self, right: _Pair, z: _Pair) -> _Pair:
        """The sizes of what `residual` adds up."""
        x, nu = z.x.abs(), z.nu.abs()
        rows = right.x.abs() + mm(x, self.P.abs())
        if not self.A.shape[1]:
            return _Pair(rows, right.nu)
        return _Pair(rows + mm(nu, self.A.abs()), right.nu.abs() + mm(x, self.A.abs().mT))

    def take(self, index: Tensor) -> _Problem:
        """The problem of some rows of the batch of matrices."""
        P, A = (t if len(t) == 1 else t[index] for t in (self.given, self.A))
        return replace(self, given=P, A=A, right=_Pair(self.right.x[index], self.right.nu[index]))


def _rows(vectors: Tensor, factors: int, batch: int) -> Tensor:
    """(B or 1, .) -> rows."""
    vectors = vectors.double()
    return (vectors if len(vectors) == batch else vectors.expand(batch, -1)).unsqueeze(
        0 if factors == 1 else 1
    )


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
        """K^-1 (f, g), uncorrected: (P + A'RA) x + A'nu = f + A'R g and A x = g."""
        f, g = right
        if self.R is not None:
            f = f + mm(g * self.R, A)
        # half = L^-1 f
        half, nu = torch.linalg.solve_triangular(self.L, f.mT, upper=False), g
        if g.shape[2]:
            # MM' nu = Y' half - g,  then half - Y nu is left for x
            nu = torch.linalg.solve_triangular(self.M, mm(self.Y.mT, half) - g.mT, upper=False)
            nu = torch.linalg.solve_triangular(self.M.mT, nu, upper=True)
            half, nu = half - mm(self.Y, nu), nu.mT
        # L' x = half
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
    # (rows, n + p, n + p) an orthonormal basis of the null space of K, and columns of zeros
    null: Tensor

    def solve_into(self, z: _Pair, problem: _Problem, right: _Pair) -> _Pair:
        """z, with K^+ right in these rows."""
        exact = self.solve(
            problem.take(self.index), _Pair(right.x[self.index], right.nu[self.index])
        )
        return _Pair(
            z.x.index_copy(0, self.index, exact.x), z.nu.index_copy(0, self.index, exact.nu)
        )

    def solve(self, problem: _Problem, right: _Pair) -> _Pair:
        """K^+ right, for the problem of these rows."""
        exact = _times(right, self.inverse)
        for _ in range(2):
            exact = _sum(exact, _times(problem.residual(right, exact), self.inverse))
        return exact


def _sum(z: _Pair, step: _Pair) -> _Pair:
    """z + step."""
    return _Pair(z.x + step.x, z.nu + step.nu)


def _times(z: _Pair, matrix: Tensor) -> _Pair:
    """Rows times a matrix of K's size."""
    return _Pair(*(torch.cat(z, 2) @ matrix).split((z.x.shape[2], z.nu.shape[2]), 2))


@dataclass(frozen=True, eq=False)
class _Solved:
    """The solution of a batch, its verdict, and what a derivative needs."""

    factor: _Factor
    failed: Tensor | None  # (F, k)
    x: Tensor  # (B, n)
    nu: Tensor  # (B, p)
    status: Tensor  # (B,)
    residual: Tensor  # (B,)
    degenerate: Tensor  # (B,)
    definite: bool  # every P is positive definite
    # (B,) by how much rows of Ax = b that depend on each other disagree; None: no row does
    apart: Tensor | None


def _solve(problem: _Problem, visible: Tensor | None) -> _Solved:
    """Every row by its factor, corrected; those that it does not serve by K^+; and the verdict on
    each."""
    right = problem.right

    # The factor of K; K^+ itself for rows in which it is nearly singular, or is.
    factor, hard, worst, definite = _factorised(problem)
    factor = replace(factor, corrections=corrections_for(worst, LIMITS.corrections))
    singular = None
    if not worst <= LIMITS.safe:
        index = torch.nonzero(~(hard <= LIMITS.safe)).flatten()
        singular = _null_space(problem.take(index), len(index))
        exact = _PseudoInverse(index, singular.inverse, singular.null)
        units = factor.units.index_copy(0, index, singular.units)
        factor = replace(factor, exact=exact, units=units)

    # K z = (-q, b), what is left of it in K's units, and how far z may be off.
    z = factor.solve(problem, right)
    gap, units = problem.residual(right, z), factor.units
    terms = torch.cat(right, 2) / units, torch.cat(z, 2) * units
    residual = relative_residual(torch.cat(gap, 2) / units, *terms)
    doubted = not worst <= ACCURACY.doubtful
    error = _error(problem, factor, right, z, gap, visible) if doubted else None

    # The verdict, row by row.
    status = accuracy_status(residual, error, 10 * problem.rank)
    degenerate = torch.zeros_like(status, dtype=torch.bool)
    failed = apart = None
    if singular is not None:
        failure = torch.zeros_like(status).index_copy_(0, index, singular.status)
        failed = failure > 0
        z = _Pair(*(t.masked_fill(failed.unsqueeze(2), 0.0) for t in z))
        status = torch.where(failed, failure, status)
        residual = residual.masked_fill(failed, torch.nan)
        degenerate[index] = singular.is_seen(visible).unsqueeze(1) & ~failed[index]
        apart = torch.zeros_like(residual).index_copy(0, index, singular.apart)
        apart = apart.reshape(problem.batch)
    x, nu, status, residual, degenerate = (
        t.reshape(problem.batch, *t.shape[2:]) for t in (*z, status, residual, degenerate)
    )
    return _Solved(factor, failed, x, nu, status, residual, degenerate, definite, apart)


def _factorised(problem: _Problem) -> tuple[_Factor, Tensor, float, bool]:
    """The factor, the size of each row, the largest, and whether every P is positive definite."""
    P, A = problem.P, problem.A
    factor, hard = _factorise(problem, None)
    worst = float(hard.max()) if len(hard) else 0.0
    definite = worst <= LIMITS.safe
    if definite or not A.shape[1]:
        return factor, hard, worst, definite
    # P + A'RA has the same solution, R being a term that vanishes on Ax = b, as large as P: for the
    # rows that want it.
    curvature = or_one(P.diagonal(dim1=1, dim2=2).abs().amax(1))[:, None, None]
    R = curvature / or_one(A.square().sum(2)).unsqueeze(1)
    R = R.masked_fill((hard <= LIMITS.safe)[:, None, None], 0.0)
    factor, hard = _factorise(problem, R)
    return factor, hard, float(hard.max()), definite


def _factorise(problem: _Problem, R: Tensor | None) -> tuple[_Factor, Tensor]:
    """The factor with this R, and the sizes of the two inverses in equilibrated units,
    multiplied."""
    count, (p, n) = problem.factors, problem.A.shape[1:]
    A = problem.A if len(problem.A) == count else problem.A.expand(count, -1, -1)
    # LL' = H = P + A'RA. One substitution gives Y = L^-1 A' and L^-1 of a probe in H's units.
    H = problem.P if R is None else problem.P + A.mT @ (A * R.mT)
    L, info = torch.linalg.cholesky_ex(H)
    units = H.diagonal(dim1=1, dim2=2).sqrt().unsqueeze(1)
    if len(H) != count:
        units = units.expand(count, -1, -1)
    probed = torch.cat((A, units * probe(n, L.device)), 1)
    half = torch.linalg.solve_triangular(L, probed.mT, upper=False)
    hard = _size(L, units, half[:, :, p:]).masked_fill(info != 0, torch.inf)
    if not p:
        return _Factor(L, half, L, R, units), hard.nan_to_num(torch.inf, torch.inf)
    # MM' = S = A H^-1 A' = Y'Y
    Y = half[:, :, :p]
    S = mm(Y.mT, Y)
    M, info = torch.linalg.cholesky_ex(S)
    units_nu = S.diagonal(dim1=1, dim2=2).sqrt().unsqueeze(1)
    probed = (units_nu * probe(p, M.device)).mT
    half = torch.linalg.solve_triangular(M, probed, upper=False)
    hard = (hard * _size(M, units_nu, half)).masked_fill(info != 0, torch.inf)
    factor = _Factor(L, Y, M, R, torch.cat((units, units_nu), 2))
    return factor, hard.nan_to_num(torch.inf, torch.inf)


def _size(L: Tensor, unit: Tensor, probed: Tensor) -> Tensor:
    """Of (LL')^-1 in equilibrated units: as seen by a probe's half solution, or by pivots where
    that should miss it."""
    pivots = unit.squeeze(1) / L.diagonal(dim1=1, dim2=2)
    return torch.maximum(probed.square().sum((1, 2)) / probed.shape[1], pivots.square().amax(1))


def _error(
    problem: _Problem,
    factor: _Factor,
    right: _Pair,
    z: _Pair,
    gap: _Pair,
    visible: Tensor | None,
) -> Tensor:
    """(F, k) how far z may be off, in K's equilibrated units, by one more solve from its residual
    `gap`.

    Of x's, relative to x, and of nu's the larger.
    """
    sizes, units = (z.x.shape[2], z.nu.shape[2]), factor.units
    samples = rounding_samples(torch.cat(problem.terms(right, z), 2)).split(sizes, 2)
    doubt = _Pair(*(g.repeat(1, 2, 1) + t for g, t in zip(gap, samples, strict=True)))
    off = largest_sample(torch.cat(factor.solve(problem, doubt), 2) * units)
    if visible is not None:
        off = off * visible.to(off)
    here, data = torch.cat(z, 2) * units, _largest(torch.cat(right, 2) / units)
    parts = (
        relative_to(_largest(part), _largest(size), data)
        for part, size in zip(off.split(sizes, 2), here.split(sizes, 2), strict=True)
    )
    return torch.maximum(*parts)


def _largest(rows: Tensor) -> Tensor:
    """(F, k, .) -> (F, k), zero of none."""
    return rows.abs().amax(2) if rows.shape[2] else rows.new_zeros(rows.shape[:2])


class _Singular(NamedTuple):
    """What the null-space method finds of some rows."""

    inverse: Tensor  # (rows, n + p, n + p), K^+
    null: Tensor  # (rows, n + p, n + p), an orthonormal basis of the null space of K, and zeros
    units: Tensor  # (rows, 1, n + p), sizes of K's rows
    status: Tensor  # (rows, k)
    apart: Tensor  # (rows, k), how far dependent rows of Ax = b are apart

    def is_seen(self, visible: Tensor | None) -> Tensor:
        """(rows,) whether a null vector is not zero in what is visible."""
        shown = self.null if visible is None else self.null * visible.to(self.null).unsqueeze(1)
        return torch.any(shown.abs() > ACCURACY.hidden, 2).any(1)


def _null_space(problem: _Problem, count: int) -> _Singular:
    """K^+ by orthogonal factors of the equilibrated A and of P on its null space.

    With A^+ the pseudo-inverse, Z its null basis, and G = Z (Z'PZ)^+ Z', a generalised inverse of K
    is

        [ G           (I - G P) A^+          ]
        [ .'   -A^+'(P - P G P) A^+          ]

    and its null space is spanned by (x, -A^+' P x) with x = Z (null vector of Z'PZ), and by (0,
    null vector of A').
    """
    p, n = problem.A.shape[1:]
    P, A = problem.P.expand(count, -1, -1), problem.A.expand(count, -1, -1)
    D = _equilibrate(P, A)
    e, f = D[:, :n], D[:, n:]
    P, A = e.unsqueeze(2) * P * e.unsqueeze(1), f.unsqueeze(2) * A * e.unsqueeze(1)

    # A = U diag(values) V':  A^+ = V diag(1 / values) U' over those that are not zero, Z the rest
    # of V.
    U, values, Vt = torch.linalg.svd(A, full_matrices=True)
    used = values > problem.rank * values.amax(1, keepdim=True) if p else values > 0
    range_x, range_nu = (
        torch.nn.functional.pad(used, (0, size - used.shape[1])) for size in (n, p)
    )
    V, r = Vt.mT, min(n, p)
    pinv = V[:, :, :r] * torch.where(used, 1.0 / values, 0.0).unsqueeze(1) @ U[:, :, :r].mT
    Z = V * ~range_x.unsqueeze(1)

    # Z'PZ = Q diag(curvature) Q':  G = Z Q diag(1 / curvature) Q'Z' over those that are not flat.
    # A marker takes the columns of Z that are zero to the end.
    size = P.abs().amax((1, 2))
    marker = torch.diag_embed(range_x * (4.0 * n * or_one(size)).unsqueeze(1))
    curvature, Q = torch.linalg.eigh(Z.mT @ P @ Z + marker)
    Z, inside = Z @ Q, ~range_x.flip(1)
    threshold = problem.rank * n * size.unsqueeze(1)
    flat = (curvature.abs() <= threshold) & inside
    G = Z * torch.where(inside & ~flat, 1.0 / curvature, 0.0).unsqueeze(1) @ Z.mT

    # The generalised inverse: C = A^+ - G P A^+,  below it -(P A^+)'C, symmetrised.
    C = pinv - G @ (P @ pinv)
    lower = -(P @ pinv).mT @ C
    lower = (lower + lower.mT) * 0.5
    inverse = torch.cat((torch.cat((G, C), 2), torch.cat((C.mT, lower), 2)), 1)

    # The null vectors (Z flat, -A^+' P Z flat) and (0, U free), in the units of K itself.
    level = Z * flat.unsqueeze(1)
    free = U * ~range_nu.unsqueeze(1)
    by_x = torch.cat((level, -pinv.mT @ (P @ level)), 1)
    by_nu = torch.nn.functional.pad(free, (0, 0, n, 0))
    null = torch.cat((by_x, by_nu), 2)
    null = _orthonormal(D.unsqueeze(2) * null, torch.cat((flat, ~range_nu), 1))

    # K^+ = (I - N N') D inverse D (I - N N')
    inverse = D.unsqueeze(2) * inverse * D.unsqueeze(1)
    inverse = inverse - null @ (null.mT @ inverse)
    inverse = inverse - (inverse @ null) @ null.mT

    # INFEASIBLE: b sticks out of the range of A.
    g = problem.right.nu * f.unsqueeze(1)
    apart = _apart(free, g)
    infeasible = apart > problem.consistent

    # UNBOUNDED: a negative curvature, or a slope q + P x along flat directions, at the minimum
    # along the curved ones: rounding may turn one a little into the other.
    q = -problem.right.x * e.unsqueeze(1)
    x = g @ pinv.mT
    x = x - (q + x @ P) @ G
    slope, terms = q + x @ P, q.abs() + x.abs() @ P.abs()
    unbounded = _sticks_out(level, slope, terms, problem.consistent)
    unbounded = unbounded | ((curvature < -threshold) & inside).any(1, keepdim=True)
    status = torch.where(unbounded, int(Status.UNBOUNDED), 0)
    status = torch.where(infeasible, int(Status.INFEASIBLE), status)
    return _Singular(inverse, null, 1.0 / D.unsqueeze(1), status, apart)


def _equilibrate(P: Tensor, A: Tensor) -> Tensor:
    """D with the largest entry of every row of D K D near 1, rows of zeros apart."""
    K = torch.cat((torch.cat((P, A.mT), 2), torch.nn.functional.pad(A, (0, A.shape[1]))), 1).abs()
    D = torch.ones_like(K[:, 0])
    for _ in range(LIMITS.sweeps):
        D = D / or_one((D.unsqueeze(2) * K * D.unsqueeze(1)).amax(2)).sqrt()
    return D


def _orthonormal(columns: Tensor, chosen: Tensor) -> Tensor:
    """An orthonormal basis of the chosen columns, first; zeros after it."""
    order = chosen.int().argsort(dim=1, descending=True, stable=True)
    basis = torch.linalg.qr(columns.gather(2, order.unsqueeze(1).expand_as(columns)))[0]
    return basis * chosen.gather(1, order).unsqueeze(1)


def _apart(basis: Tensor, rows: Tensor) -> Tensor:
    """(F, k) the largest part of a right-hand side along an orthonormal basis of the null space of
    A', relative to the largest of those that it depends on: the measure of the cone program's
    equalities."""
    if not rows.shape[2]:
        return rows.new_zeros(rows.shape[:2])
    projector = basis @ basis.mT
    linked = (projector.abs() > ACCURACY.hidden).unsqueeze(1)  # (F, 1, p, p)
    size = torch.where(linked, rows.abs().unsqueeze(2), 0.0).amax(3)
    noise = ACCURACY.rounding * rows.shape[2] * rows.abs().amax(2, keepdim=True)
    part = ((rows @ projector).abs() - noise).clamp(min=0.0)
    return (part / size.clamp(min=torch.finfo(size.dtype).tiny)).amax(2)


def _sticks_out(basis: Tensor, rows: Tensor, terms: Tensor, tolerance: float) -> Tensor:
    """Which rows have a part along an orthonormal basis that is no rounding of their terms."""
    if not rows.shape[2]:
        return torch.zeros(rows.shape[:2], dtype=torch.bool, device=rows.device)
    projector = basis @ basis.mT
    noise = 1e-5 * tolerance * terms.amax(2, keepdim=True)
    return ((rows @ projector).abs() > tolerance * terms @ projector.abs() + noise).any(2)


def _pull_back(
    data: list[Tensor],
    factor: _Factor,
    failed: Tensor | None,
    z: _Pair,
    z_bar: _Pair,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Cotangents of P, q, A and b."""
    P, q, A, b = data
    problem = _Problem.of(P, q, A, b)
    (x, nu), right = (
        _Pair(*(_rows(t, problem.factors, problem.batch) for t in pair)) for pair in (z, z_bar)
    )
    if failed is not None:
        right = _Pair(*(torch.where(failed.unsqueeze(2), 0.0 * t, t) for t in right))
    # K (d, e) = (x_bar, nu_bar)
    d, e = factor.solve(problem, right)
    P_bar = q_bar = A_bar = b_bar = None
    if needed[0]:
        # P_bar = -(d x' + x d') / 2
        P_bar = -0.5 * outer(len(P), (d, x), (x, d))
    if needed[1]:
        # q_bar = -d
        q_bar = sum_to(len(q), -_of_batch(d, problem.batch))
    if needed[2]:
        # A_bar = -(e x' + nu d')
        A_bar = -outer(len(A), (e, nu), (x, d))
    if needed[3]:
        # b_bar = e
        b_bar = sum_to(len(b), _of_batch(e, problem.batch))
    if factor.exact is not None:
        # Of rows with a singular K there is more, with (s, t) the null part of (x_bar, nu_bar) and
        # (y, u) = K^+ (x, nu):  P_bar + (s y' + y s') / 2,  A_bar + t y' + u s'.
        index, null = factor.exact.index, factor.exact.null
        s, t = _times(_Pair(right.x[index], right.nu[index]), null @ null.mT)
        y, u = _times(_Pair(x[index], nu[index]), factor.exact.inverse)
        if P_bar is not None:
            P_bar = add_rows(P_bar, index, 0.5 * outer(len(P), (s, y), (y, s)))
        if A_bar is not None:
            A_bar = add_rows(A_bar, index, outer(len(A), (t, u), (y, s)))
    return P_bar, q_bar, A_bar, b_bar


def _of_batch(rows: Tensor, batch: int) -> Tensor:
    """(F, k, .) -> (B, .)."""
    return rows.reshape(batch, rows.shape[2])


def _by_chord_steps(
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
        easy, order = the_others(hard, count)
        first = _Pair(z.x[easy], z.nu[easy])
        first = _regular(problem.take(easy), here.take(easy), factor.take(easy), first)
        last = _of_minimum_norm(
            problem.take(hard), here.take(hard), exact, _Pair(z.x[hard], z.nu[hard])
        )
        z = _Pair(
            *(torch.cat(parts).index_select(0, order) for parts in zip(first, last, strict=True))
        )
    x, nu = (t.reshape(problem.batch, t.shape[2]).to(P.dtype) for t in z)
    if failed is not None:
        rows = failed.reshape(-1, 1)
        x, nu = x.masked_fill(rows, 0.0), nu.masked_fill(rows, 0.0)
    return x, nu


def _laid(z: _Pair, factors: int) -> _Pair:
    """Rows of the whole batch as those of so many matrices."""
    return _Pair(*(regrouped(t, factors) for t in z))


def _regular(problem: _Problem, here: _Problem, factor: _Factor, z: _Pair) -> _Pair:
    """z by two chord steps with the factor of K, here:  z <- z + K^-1 ((-q, b) - K z)."""
    for _ in range(2):
        gap = problem.residual(problem.right, z)
        z = _sum(z, _laid(factor.solve(here, _laid(gap, len(factor.units))), len(gap.x)))
    return z


def _of_minimum_norm(problem: _Problem, here: _Problem, exact: _PseudoInverse, z: _Pair) -> _Pair:
    """z by two chord steps with K^+, and N the projector on the null space of K, here.

    What K z = (-q, b) leaves free of z follows z = K y, with y in the range of K^+:

        z <- z + K^+ ((-q, b) - K z) + N (K y - z),   y <- y + K^+ (z - K y).
    """

    def solve(right: _Pair) -> _Pair:
        return _laid(exact.solve(here, _laid(right, len(exact.inverse))), len(right.x))

    projector, y = exact.null @ exact.null.mT, solve(z)
    for _ in range(2):
        beyond = _times(problem.residual(z, y), -projector)
        z = _sum(_sum(z, solve(problem.residual(problem.right, z))), beyond)
        y = _sum(y, solve(problem.residual(z, y)))
    return z
