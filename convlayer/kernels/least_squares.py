"""Least squares with weights, a ridge and several right-hand sides."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
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
    """What decides how a row is solved; sizes are those of (S'S)^-1 with the columns of S
    equilibrated."""

    # A row of a larger size is solved with orthogonal factors of S.
    safe: float = 1e10
    # Up to each size, so many corrections of a solve with the Cholesky factor leave at most 1e-12.
    corrections: tuple[tuple[float, int], ...] = ((1e4, 0), (1e6, 1), (1e10, 3))
    # A singular value of the equilibrated S below this share of the largest is zero.
    rank: float = 1e-12


LIMITS = _Limits()

# A Gram matrix of twice as many columns is made in blocks of so many: those above the diagonal
# are not computed.
GRAM_BLOCK = 256


def least_squares(
    A: Tensor,  # (B or 1, m, n)
    b: Tensor,  # (B or 1, m, k)
    w: Tensor | None = None,  # (B or 1, m), nonnegative; None for ones
    ridge: Tensor | None = None,  # (B or 1, n), nonnegative; None for zeros
    visible: Tensor
    # (n, k) one where x is looked at or what it meets moved, zero elsewhere; None for ones
    | None = None,
) -> Answer:
    """Least squares with row weights, a ridge, and k right-hand sides that share the matrix.

        minimise    sum_ij w_i (A x - b)_ij^2 + sum_jl ridge_j x_jl^2

    Solution:    (A'WA + diag ridge) x = A'W b. Where x is not unique (rank of S = [sqrt(W) A;
                 sqrt(ridge)] below n: m < n, or dependent columns), the one of minimum norm. A
                 negative weight or ridge is BAD_INPUT.
    Derivative:  of the minimum-norm solution at constant rank. With r = b - A x, z = (S'S)^+ x_bar, y = (S'S)^+ x and
                 s = x_bar - S^+ S x_bar (zero at full column rank),
                 A_bar = W (r z' - A z x' + A y s'),  b_bar = W A z,  w_bar = sum_l r o A z,  ridge_bar = -sum_l z o x.
    Shapes:      outputs (x,), (B, n, k). Where A, w and ridge are shared by the batch, so is their
                 one factorisation.
    Cost:        in multiplications a row: the Gram matrix m n^2 (half, from 512 columns on) and its
                 factor n^3/6; then for each right-hand side 3 m n + n^2 forward, 3 m n + n^2
                 backward (two m n of them A_bar's), and 2 m n + n^2 for each correction in each
                 direction. For m < n exchange m and n. A QR costs four times as much, an SVD
                 twenty. Kept for backward: n^2 + (2 m + n) k numbers a row.
    Accuracy:    float64 whatever the dtype. The Gram matrix's Cholesky factor is corrected with
                 residuals of A itself, which is as accurate as QR while cond(S)^2 < 1e10 (columns
                 equilibrated); rows beyond that, tested one by one, take a QR of S, and if S is
                 rank deficient (1e-12) its SVD. `residual` is the cosine between S's columns and
                 the residual, in units of b. Where cond(S)^2 exceeds 1e6, one more solve with the
                 residual and its own rounding tells how far x may be off: INACCURATE above 3e-8,
                 NOT_CONVERGED above 1e-2, in what is visible.
    At a kink:   rank below n is flagged as degenerate, unless the null vectors of S are zero in
                 what is visible: a change of rank is a discontinuity.
    Second derivative: by two steps of the chord method from the solution with the factor above; at
                       constant rank likewise.
    Source:      Bjorck (1996), sections 2.4 and 2.9; Golub and Pereyra (1973) for the derivative at
                 constant rank.
    """
    with torch.no_grad():
        solved = _solve(_Problem.of(A, b, w, ridge), visible)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (A, b, w, ridge)):
        x = _Differentiable.apply(solved, A, b, w, ridge)
        local = partial(_by_chord_steps, solved.factor, x, solved.y)
    else:
        x, local = solved.x.to(A.dtype), None
    return Answer((x,), solved.status, None, solved.residual, solved.degenerate, local=local)


class _Differentiable(torch.autograd.Function):
    """A solution that is known, with its first derivative by the same factor."""

    @staticmethod
    def forward(ctx, solved: _Solved, A, b, w, ridge):
        x = solved.x.to(A.dtype)
        ctx.save_for_backward(A, b, w, ridge, x)
        ctx.solved = solved.factor, solved.r, solved.y
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, x_bar: Tensor):
        *data, x = ctx.saved_tensors
        factor, r, y = ctx.solved
        bars = _pull_back(_Problem.of(*data), factor, r, y, x, x_bar, ctx.needs_input_grad[1:])
        return None, *(None if bar is None else bar.to(x.dtype) for bar in bars)


@dataclass(frozen=True, eq=False)
class _Problem:
    """The data in float64. Right-hand sides and solutions are rows, (F, k, .): products with rows
    are the faster ones.

    F is the batch of the matrices; where it is 1, the right-hand sides of the whole batch stand in
    that one.
    """

    A: Tensor  # (F or 1, m, n)
    b: Tensor  # (F or 1, k, m)
    w: Tensor | None  # (F or 1, 1, m)
    ridge: Tensor | None  # (F or 1, 1, n)
    factors: int  # F
    shape: tuple[int, int]  # B, and the right-hand sides of a row of the batch
    # A has fewer rows than columns, and the ridge does not tell columns with one from columns
    # without
    wide: bool

    @classmethod
    def of(cls, A: Tensor, b: Tensor, w: Tensor | None, ridge: Tensor | None) -> _Problem:
        sizes = [len(t) for t in (A, w, ridge) if t is not None]
        factors = max(sizes) if min(sizes) else 0
        batch = len(b) if factors == 1 or not len(b) else factors
        w, ridge = (None if t is None else t.double().unsqueeze(1) for t in (w, ridge))
        wide = A.shape[1] < A.shape[2] and (ridge is None or bool((ridge > 0).all()))
        return cls(A.double(), _rows(b, factors), w, ridge, factors, (batch, b.shape[2]), wide)

    @property
    def tall(self) -> _Problem:
        """The problem whose Gram matrix is factored: this one, or its dual, with A' for A, and the
        inverses of the ridge for weights and of the weights for a ridge. Without a ridge A x = b
        holds exactly, whatever the weights."""
        if not self.wide:
            return self
        if self.ridge is None:
            return replace(self, A=self.A.mT, w=None)
        shift = torch.ones_like(self.A[:1, :, :1].mT) if self.w is None else 1.0 / self.w
        return replace(self, A=self.A.mT, w=1.0 / self.ridge, ridge=shift)

    def weigh(self, rows: Tensor) -> Tensor:
        """rows W."""
        return rows if self.w is None else rows * self.w

    def penalise(self, rows: Tensor, x: Tensor) -> Tensor:
        """rows - ridge x."""
        return rows if self.ridge is None else rows - self.ridge * x

    def take(self, index: Tensor) -> _Problem:
        """The problem of some rows of the batch of matrices."""
        A, b = (t if len(t) == 1 else t[index] for t in (self.A, self.b))
        w, ridge = (t if t is None or len(t) == 1 else t[index] for t in (self.w, self.ridge))
        return replace(self, A=A, b=b, w=w, ridge=ridge)


def _rows(columns: Tensor, factors: int) -> Tensor:
    """(B or 1, ., k) -> rows, (F or 1, k, .)."""
    rows = columns.double().mT
    return rows.reshape(1, rows.shape[0] * rows.shape[1], rows.shape[2]) if factors == 1 else rows


def _columns(rows: Tensor, shape: tuple[int, int]) -> Tensor:
    """Rows -> (B, ., k)."""
    return rows.reshape(*shape, rows.shape[2]).mT


@dataclass(frozen=True, eq=False)
class _Factor:
    """Cholesky of the Gram matrix; for some rows of the batch, orthogonal factors instead."""

    L: Tensor
    corrections: int
    orthogonal: _Orthogonal | None


@dataclass(frozen=True, eq=False)
class _Solved:
    """The solution of a batch, its verdict, and what a derivative needs."""

    x: Tensor  # (B, n, k)
    r: Tensor  # rows b - A x
    y: Tensor  # rows W (b - A x); where A x = b whatever the weights, x = A'y
    factor: _Factor
    status: Tensor  # (B,)
    residual: Tensor  # (B,)
    degenerate: Tensor  # (B,)


def _solve(problem: _Problem, visible: Tensor | None) -> _Solved:
    """Every row by the Gram matrix's factor, corrected; those that it does not serve by orthogonal
    factors; and the verdict."""
    # The factor of the Gram matrix, and the solution by it.
    tall = problem.tall
    gram = _factorised(problem, tall)
    worst = float(gram.hard.max()) if len(gram.hard) else 0.0
    corrections = corrections_for(worst, LIMITS.corrections)
    fit = _by_cholesky(problem, tall, gram, corrections)
    off = orthogonal = None
    if not worst <= ACCURACY.doubtful:
        off = _off(problem, tall, gram.L, fit, corrections)

    # By this way x is of minimum norm where A is wide and no ridge chooses it: a change of rank
    # flags it.
    chosen = problem.wide and problem.ridge is None
    degenerate = torch.full_like(gram.hard, chosen, dtype=torch.bool)
    if visible is not None and chosen:
        degenerate = _sees_beyond(problem, gram.L, visible)

    # Rows that this factor does not serve: by orthogonal factors of S.
    if not worst <= LIMITS.safe:
        assert off is not None
        index = torch.nonzero(~(gram.hard <= LIMITS.safe)).flatten()
        bad = None if gram.bad is None else gram.bad.expand(len(gram.L))[index]
        part = problem.take(index)
        orthogonal = _Orthogonal.of(part, index, bad)
        own = orthogonal.fit(part)
        both = zip(fit, own, strict=True)
        fit = _Fit(*(rows.index_copy(0, index, new) for rows, new in both))
        degenerate[index] = orthogonal.deficient if visible is None else orthogonal.is_seen(visible)
        off = off.index_copy(0, index, orthogonal.off(part, own))

    # The verdict, row by row.
    residual = fit.residual.reshape(problem.shape).amax(1)
    error = None if off is None else _relative_error(problem, off, fit.x, visible)
    status = accuracy_status(residual, error)
    if gram.bad is not None:
        status = status.masked_fill(gram.bad, int(Status.BAD_INPUT))
        residual = residual.masked_fill(gram.bad, torch.nan)
    return _Solved(
        _columns(fit.x, problem.shape),
        fit.r,
        fit.y,
        _Factor(gram.L, corrections, orthogonal),
        status,
        residual,
        degenerate.expand(problem.shape[0]),
    )


class _Gram(NamedTuple):
    """The factored Gram matrix S'S = LL' of `problem.tall`, and a first solution by it."""

    L: Tensor  # (F, n, n)
    units: Tensor  # (F, 1, n), the lengths of the columns of S
    first: Tensor  # (F, k, n), (LL')^-1 A'W b, or (LL')^-1 b of the dual
    hard: Tensor  # (F,), the size of (S'S)^-1; infinite where there is no factor
    bad: Tensor | None  # (F,) or (1,) bool, a weight or a ridge is negative


def _factorised(problem: _Problem, tall: _Problem) -> _Gram:
    """S'S = LL', with how far it can be trusted."""
    gram = _gram(tall, problem.factors)
    L, info = torch.linalg.cholesky_ex(gram)
    units = gram.diagonal(dim1=1, dim2=2).sqrt().unsqueeze(1)
    right = problem.b if problem.wide else mm(problem.weigh(problem.b), problem.A)
    if len(right) != len(L):
        right = right.expand(len(L), -1, -1)
    # One substitution serves the right-hand sides and a probe of the inverse.
    probed = units * probe(units.shape[2], units.device)
    first = _substitute(L, torch.cat((probed, right), 1))
    # sum_j |D (LL')^-1 D probe|_j + (D / diag L)_j^2: the inverse as the probe shows it, and as the
    # pivots do where the probe should miss it.
    pivots = L.diagonal(dim1=1, dim2=2).unsqueeze(1) / units
    hard = ((first[:, :1] * units).abs() + pivots**-2).sum((1, 2))
    hard = hard.masked_fill(info != 0, torch.inf)
    bad = _negative(problem)
    if bad is not None:
        hard = hard.masked_fill(bad, torch.inf)
    if problem.wide and problem.w is not None:
        hard = hard.masked_fill((problem.w == 0).any(2).any(1), torch.inf)
    return _Gram(L, units, first[:, 1:], hard, bad)


class _Fit(NamedTuple):
    """A solution, in rows."""

    x: Tensor  # (F, k, n)
    r: Tensor  # (F, k, m), b - A x
    y: Tensor  # (F, k, m), W (b - A x); where A x = b whatever the weights, x = A'y
    residual: Tensor  # (F, k), relative, of the equations that were solved, in units of S's columns


def _by_cholesky(problem: _Problem, tall: _Problem, gram: _Gram, corrections: int) -> _Fit:
    """The solution with the Gram matrix's factor: of the normal equations, or of their dual where A
    is wide."""
    b = problem.b
    if not problem.wide:
        x, r = _fit(tall, gram.L, b, gram.first, corrections)
        y = problem.weigh(r)
        # A'W r - ridge x = 0, beside sqrt(W) b.
        error = problem.penalise(mm(y, problem.A), x)
        size = b if problem.w is None else b * problem.w.sqrt()
        return _Fit(x, r, y, relative_residual(error / gram.units, size))
    # The dual: (A ridge^-1 A' + W^-1) y = b, with x = ridge^-1 A'y and r = W^-1 y.
    y, x = _span(tall, gram.L, b, gram.first, corrections)
    r = torch.zeros_like(y) if tall.ridge is None else tall.ridge * y
    error, size = b - x @ problem.A.mT - r, x
    if tall.ridge is not None and tall.w is not None:
        size = torch.cat((x / tall.w.sqrt(), y * tall.ridge.sqrt()), 2)
    return _Fit(x, r, y, relative_residual(error / gram.units, size))


def _off(problem: _Problem, tall: _Problem, L: Tensor, fit: _Fit, corrections: int) -> Tensor:
    """How far x may be off, (F, 2 k, n), by one more solve with the factor."""
    if not problem.wide:
        return _span(problem, L, _doubtful(problem, fit.x, fit.r), corrections=corrections)[0]
    # Of the dual, A'W A y + ridge y = b and x = W A y: what y may be off by, through W A, and the
    # rounding of that product.
    size = tall.A.abs()
    left = problem.b - mm(fit.x, tall.A)
    terms = problem.b.abs() + mm(fit.x.abs(), size)
    if tall.ridge is not None:
        left, terms = left - tall.ridge * fit.y, terms + tall.ridge * fit.y.abs()
    doubt = left.repeat(1, 2, 1) + rounding_samples(terms)
    step = _span(tall, L, doubt, corrections=corrections)[1]
    return step + rounding_samples(tall.weigh(mm(fit.y.abs(), size.mT)))


def _doubtful(problem: _Problem, x: Tensor, r: Tensor) -> Tensor:
    """A'W r - ridge x with two samples of its rounding, and of that of r = b - A x, (F, 2 k, n)."""
    size = problem.A.abs()
    inner = r.repeat(1, 2, 1) + rounding_samples(problem.b.abs() + mm(x.abs(), size.mT))
    terms = problem.weigh(r.abs()) @ size
    if problem.ridge is not None:
        terms = terms + problem.ridge * x.abs()
    return _gradient(problem, inner, x.repeat(1, 2, 1)) + rounding_samples(terms)


def _relative_error(problem: _Problem, off: Tensor, x: Tensor, visible: Tensor | None) -> Tensor:
    """(B,) the largest entry of x's error that is seen, relative to x, in units of S's columns."""
    # (S'S)_jj = sum_i w_i A_ij^2 + ridge_j
    squares = problem.A.square() if problem.w is None else problem.A.square() * problem.w.mT
    units = squares.sum(1, keepdim=True)
    units = (units if problem.ridge is None else units + problem.ridge).sqrt()
    data = problem.b if problem.w is None else problem.b * problem.w.sqrt()
    data = torch.linalg.vector_norm(data, dim=2).expand(len(x), -1).reshape(problem.shape)
    off, size = largest_sample(off * units), (x * units).abs().amax(2)
    off = off.expand(len(x), -1, -1).reshape(*problem.shape, off.shape[2])
    size = size.expand(len(x), -1).reshape(problem.shape)
    if visible is not None:
        off = off * visible.to(off).mT
    return relative_to(off.amax(2), size, data).amax(1)


def _sees_beyond(problem: _Problem, L: Tensor, visible: Tensor) -> Tensor:
    """(F,) whether a visible entry of x has a part outside the row space of A, of full rank and
    factored as A A' = LL'."""
    half = torch.linalg.solve_triangular(L, problem.A.expand(len(L), -1, -1), upper=False)
    return ((1 - half.square().sum(1) > LIMITS.rank) & (visible > 0).any(1)).any(1)


def _negative(problem: _Problem) -> Tensor | None:
    """Which rows have a negative weight or ridge."""
    given = [t for t in (problem.w, problem.ridge) if t is not None]
    negative = [(t < 0).any(2).any(1) for t in given]
    return negative[0] | negative[-1] if negative else None


def _gram(problem: _Problem, count: int) -> Tensor:
    """A'WA + diag ridge, of which only the lower triangle counts."""
    A, n = problem.A, problem.A.shape[2]
    weighted = A if problem.w is None else A * problem.w.mT
    if n < 2 * GRAM_BLOCK:
        gram = mm(weighted.mT, A)
    else:
        gram = weighted.new_zeros(max(len(weighted), len(A)), n, n)
        for j in range(0, n, GRAM_BLOCK):
            gram[:, j:, j : j + GRAM_BLOCK] = weighted[:, :, j:].mT @ A[:, :, j : j + GRAM_BLOCK]
    if len(gram) != count:
        gram = gram.repeat(count, 1, 1)
    if problem.ridge is not None:
        gram.diagonal(dim1=1, dim2=2).add_(problem.ridge.squeeze(1))
    return gram


def _substitute(L: Tensor, rows: Tensor) -> Tensor:
    """Rows of (LL')^-1."""
    half = torch.linalg.solve_triangular(L, rows.mT, upper=False)
    return torch.linalg.solve_triangular(L.mT, half, upper=True).mT


def _gradient(problem: _Problem, r: Tensor, x: Tensor) -> Tensor:
    """A'W r - ridge x."""
    return problem.penalise(problem.weigh(r) @ problem.A, x)


def _fit(
    problem: _Problem, L: Tensor, b: Tensor, x: Tensor, corrections: int
) -> tuple[Tensor, Tensor]:
    """(x, b - A x) with A'W (b - A x) = ridge x, from a first x."""
    for _ in range(corrections):
        x = x + _substitute(L, _gradient(problem, b - mm(x, problem.A.mT), x))
    return x, b - mm(x, problem.A.mT)


def _span(
    problem: _Problem, L: Tensor, v: Tensor, z: Tensor | None = None, corrections: int = 0
) -> tuple[Tensor, Tensor]:
    """(z, W A z) with A'W A z + ridge z = v, from a first z."""
    z = _substitute(L, v) if z is None else z
    u = problem.weigh(mm(z, problem.A.mT))
    for _ in range(corrections):
        z = z + _substitute(L, problem.penalise(v - mm(u, problem.A), z))
        u = problem.weigh(mm(z, problem.A.mT))
    return z, u


@dataclass(frozen=True, eq=False)
class _Orthogonal:
    """S^+ = Z Q' for S = [sqrt(W) A; sqrt(ridge)], Q with orthonormal columns."""

    index: Tensor  # (R,) of the rows of the batch
    Q: Tensor  # (R, rows of S or more, n)
    Z: Tensor  # (R, n, n)
    # (R, n, n), an orthonormal basis of the null space of S, then columns of zeros
    null: Tensor | None
    deficient: Tensor  # (R,)
    root_w: Tensor | None  # (R or 1, 1, m)
    root_ridge: Tensor | None  # (R or 1, 1, n)
    size: Tensor  # (R, 1, n), norms of the columns of S

    @classmethod
    def of(cls, problem: _Problem, rows: Tensor, bad: Tensor | None) -> _Orthogonal:
        """For these rows of a batch, of which the `bad` ones get a zero for S^+."""
        count, n = len(rows), problem.A.shape[2]
        # S = [sqrt(W) A; sqrt(ridge)], with rows of zeros where it has fewer than n.
        root_w, root_ridge = (
            None if t is None else t.clamp(min=0.0).sqrt() for t in (problem.w, problem.ridge)
        )
        S = (problem.A if root_w is None else problem.A * root_w.mT).expand(count, -1, -1)
        if root_ridge is not None:
            S = torch.cat((S, torch.diag_embed(root_ridge.squeeze(1)).expand(count, -1, -1)), 1)
        S = torch.nn.functional.pad(S, (0, 0, 0, max(0, n - S.shape[1])))
        # Columns of length one; their largest entry is taken out first, whose square may overflow.
        largest = or_one(S.abs().amax(1, keepdim=True))
        size = largest * or_one(torch.linalg.vector_norm(S / largest, dim=1, keepdim=True))
        S = S / size
        # S = Q R, so that S^+ = R^-1 Q'.
        Q, R = torch.linalg.qr(S)
        eye = torch.eye(n, dtype=S.dtype, device=S.device)
        Z = torch.linalg.solve_triangular(R, eye.expand_as(R), upper=True)
        # Where |S^+| comes near 1 / rank it is not to be trusted: by singular values.
        regular = torch.linalg.vector_norm(Z, dim=(1, 2)) * n**0.5 < 0.1 / LIMITS.rank
        Z, null, deficient = Z / size.mT, None, torch.zeros_like(regular)
        index = torch.nonzero(~regular).flatten()
        if len(index):
            Q[index], Z[index], basis, deficient[index] = _singular(S[index], size[index])
            null = torch.zeros_like(Z).index_copy_(0, index, basis)
        if bad is not None:
            Z = Z.masked_fill(bad[:, None, None], 0.0)
        return cls(rows, Q, Z, null, deficient, root_w, root_ridge, size)

    def _times_Q(self, top: Tensor, bottom: Tensor | None) -> Tensor:
        """(sqrt(W) top, sqrt(ridge) bottom) Q."""
        m = top.shape[2]
        rows = (top if self.root_w is None else top * self.root_w) @ self.Q[:, :m]
        if bottom is None or self.root_ridge is None:
            return rows
        return rows + (bottom * self.root_ridge) @ self.Q[:, m : m + bottom.shape[2]]

    def _image(self, problem: _Problem, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(sqrt(W) u, S'(u, t)) with (u, t) = rows Q'."""
        m, n = problem.A.shape[1:]
        u = rows @ self.Q[:, :m].mT
        u = u if self.root_w is None else u * self.root_w
        product = u @ problem.A
        if self.root_ridge is not None:
            product = product + rows @ self.Q[:, m : m + n].mT * self.root_ridge
        return u, product

    def fit(self, problem: _Problem) -> _Fit:
        """x = S^+ (sqrt(W) b, 0), corrected once."""
        A, b = problem.A, problem.b
        x = self._times_Q(b, None) @ self.Z.mT
        x = x + self._times_Q(b - x @ A.mT, -x) @ self.Z.mT
        r = b - x @ A.mT
        scaled = b if self.root_w is None else b * self.root_w
        error = _gradient(problem, r, x) / self.size
        return _Fit(x, r, problem.weigh(r), relative_residual(error, scaled.expand(len(x), -1, -1)))

    def off(self, problem: _Problem, fit: _Fit) -> Tensor:
        """How far x may be off, (R, 2 k, n), by one more solve."""
        return self.span(problem, _doubtful(problem, fit.x, fit.r))[0]

    def is_seen(self, visible: Tensor) -> Tensor:
        """(R,) whether a null vector of S, of unit length, is not zero in what is visible, (n,
        k)."""
        if self.null is None:
            return self.deficient
        return (self.null * (visible.to(self.null) > 0).any(1, keepdim=True)).abs().amax(
            (1, 2)
        ) > ACCURACY.hidden

    def span(self, problem: _Problem, v: Tensor) -> tuple[Tensor, Tensor]:
        """(z, W A z) with z = (S'S)^+ v."""
        v = v if self.null is None else v - v @ self.null @ self.null.mT
        part = v @ self.Z
        part = part + (v - self._image(problem, part)[1]) @ self.Z
        return part @ self.Z.mT, self._image(problem, part)[0]

    def bend(self, problem: _Problem, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
        """Rows (W A y, s) with y = (S'S)^+ x and s = v - S^+ S v; None where s is zero.

        Their product is what A adds to a cotangent v of x where x follows the row space of S.
        """
        if self.null is None:
            return None
        return self._image(problem, x @ self.Z)[0], v @ self.null @ self.null.mT


def _singular(S: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Q, Z, null basis and whether there is one, for (S times size)^+ = Z Q'."""
    U, values, Vt = torch.linalg.svd(S, full_matrices=False)
    zero = values <= LIMITS.rank * values[:, :1]
    V = Vt.mT / size.mT
    null = torch.linalg.qr(V.flip(2))[0] * zero.flip(1).unsqueeze(1)
    Z = V * torch.where(zero, 0.0, 1.0 / values).unsqueeze(1)
    return U, Z - null @ (null.mT @ Z), null, zero.any(1)


def _pull_back(
    problem: _Problem,
    factor: _Factor,
    r: Tensor,
    y: Tensor,
    x: Tensor,
    x_bar: Tensor,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Cotangents of A, b, w and ridge."""
    A, w, ridge = problem.A, problem.w, problem.ridge
    x, v = _rows(x, problem.factors), _rows(x_bar, problem.factors)
    z, u = _adjoint(problem, factor, v)
    bend = None
    if factor.orthogonal is not None:
        index, part = factor.orthogonal.index, problem.take(factor.orthogonal.index)
        z_part, u_part = factor.orthogonal.span(part, v[index])
        z, u = z.index_copy(0, index, z_part), u.index_copy(0, index, u_part)
        bend = factor.orthogonal.bend(part, x[index], v[index])
    A_bar = b_bar = w_bar = ridge_bar = None
    if needed[0]:
        # A_bar = W r z' - W A z x' + W A y s', with y = W r here, and the last for rows of
        # deficient rank.
        A_bar = outer(len(A), (y, -u), (z, x))
        if bend is not None:
            A_bar = add_rows(A_bar, index, outer(len(A), bend[:1], bend[1:]))
    if needed[1]:
        # b_bar = W A z
        every = len(problem.b) == len(u)
        b_bar = _columns(u, problem.shape) if every else u.sum(0, keepdim=True).mT
    if needed[2] and w is not None:
        # w_bar = sum_l r o A z
        w_bar = sum_to(len(w), (r * torch.where(w > 0.0, u / w, mm(z, A.mT))).sum(1))
    if needed[3] and ridge is not None:
        # ridge_bar = -sum_l z o x
        ridge_bar = sum_to(len(ridge), (-z * x).sum(1))
    return A_bar, b_bar, w_bar, ridge_bar


def _adjoint(problem: _Problem, factor: _Factor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(z, W A z) with z = (S'S)^-1 v; where A x = b whatever the weights, z is v less its part in
    the row space."""
    tall, L = problem.tall, factor.L
    if not problem.wide:
        return _span(tall, L, v, corrections=factor.corrections)
    first = _substitute(L, tall.weigh(v) @ problem.A.mT)
    u, left = _fit(tall, L, v, first, factor.corrections)
    return tall.weigh(left), u


def _by_chord_steps(
    factor: _Factor,
    x: Tensor,  # (B, n, k), the solution
    y: Tensor,  # as in _Solved
    A: Tensor,
    b: Tensor,
    w: Tensor | None,
    ridge: Tensor | None,
) -> tuple[Tensor]:
    """The solution as a function of the data in plain torch operations: exact to second order."""
    L, orthogonal = factor.L, factor.orthogonal
    problem = _Problem.of(A, b, w, ridge)
    # what the matrices share may have been expanded since they were factored
    shared = len(L) if len(L) == 1 else None
    w_here, ridge_here = (None if t is None else t.detach()[:shared] for t in (w, ridge))
    here = _Problem.of(A.detach()[:shared], b.detach()[:shared], w_here, ridge_here)
    x, y = _rows(x.detach(), problem.factors), regrouped(y, problem.factors)
    if orthogonal is None:
        x = _regular(problem, here, factor, x, y)
    elif len(L) == 1:
        x = _of_minimum_norm(problem, here, orthogonal, x)
    else:
        # Apart, so that no Gram matrix without a factor comes near a derivative.
        hard = orthogonal.index
        easy, order = the_others(hard, len(L))
        own = replace(factor, L=L[easy])
        parts = (
            _regular(problem.take(easy), here.take(easy), own, x[easy], y[easy]),
            _of_minimum_norm(problem.take(hard), here.take(hard), orthogonal, x[hard]),
        )
        x = torch.cat(parts).index_select(0, order)
    return (_columns(x, problem.shape).to(A.dtype),)


def _regular(problem: _Problem, here: _Problem, factor: _Factor, x: Tensor, y: Tensor) -> Tensor:
    """x by two chord steps with the factor of K = S'S, here.

    On K x = A'W b:               x <- x + K^-1 (A'W (b - A x) - ridge x).
    On the dual, K y = b, x = W A y:  y <- y + K^-1 (b - A'(W A y) - ridge y).
    """
    tall, fixed, L = problem.tall, here.tall, factor.L

    def solve(rows: Tensor) -> Tensor:
        v = regrouped(rows, len(L))
        return regrouped(_span(fixed, L, v, corrections=factor.corrections)[0], len(rows))

    for _ in range(2):
        if problem.wide:
            span = tall.weigh(mm(y, tall.A.mT))
            y = y + solve(tall.penalise(problem.b - mm(span, tall.A), y))
        else:
            x = x + solve(_gradient(problem, problem.b - mm(x, problem.A.mT), x))
    return tall.weigh(mm(y, tall.A.mT)) if problem.wide else x


def _of_minimum_norm(
    problem: _Problem, here: _Problem, orthogonal: _Orthogonal, x: Tensor
) -> Tensor:
    """x by two chord steps with K^+, K = S'S, and N the projector on the null space of K, here.

    What K x = A'W b leaves free of x follows x = K y, with y in the range of K^+:

        x <- x + K^+ (A'W b - K x) + N (K y - x),   y <- y - K^+ (K y - x).
    """

    def solve(rows: Tensor) -> Tensor:
        v = regrouped(rows, len(orthogonal.Z))
        return regrouped(orthogonal.span(here, v)[0], len(rows))

    def beyond(x: Tensor, y: Tensor) -> Tensor:
        """K y - x."""
        return -_gradient(problem, -(y @ problem.A.mT), -y) - x

    null, y = orthogonal.null, solve(x)
    for _ in range(2):
        step = solve(_gradient(problem, problem.b - x @ problem.A.mT, x))
        x = x + step if null is None else x + step + beyond(x, y) @ null @ null.mT
        y = y if null is None else y - solve(beyond(x, y))
    return x
