"""Least squares with weights, a ridge and several right-hand sides."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from convlayer.autodiff.once import once_differentiable
from convlayer.kernels.answer import Answer
from convlayer.solution import Status

SAFE = 1e10  # |(S'S)^-1| in equilibrated columns above which a row is solved with orthogonal factors of S
CORRECTIONS = ((1e4, 0), (1e6, 1), (SAFE, 3))  # below each such size, that many leave at most 1e-12
RANK = 1e-12  # singular values of S in equilibrated columns below this share of the largest are zero
ACCURATE = 1e-8  # residual above which a row is INACCURATE
DOUBTFUL = 1e6  # size as in SAFE up to which rounding cannot move the solution by as much as SENSITIVE
SENSITIVE = 3e-8  # relative error of the solution, estimated by one more solve, above which a row is INACCURATE,
MEANINGLESS = 1e-2  # and above which it is none
ROUNDING = 2e-16  # of an entry of a residual, relative to the terms that it is the sum of
FLOOR = 1e-3  # a solution smaller than this share of the data is measured by them
HIDDEN = 1e-7  # an entry of a unit null vector up to which it is zero
BLOCK = 256  # columns of a block of a large Gram matrix: blocks above the diagonal are not computed


def least_squares(
    A: Tensor,  # (B or 1, m, n)
    b: Tensor,  # (B or 1, m, k)
    w: Tensor | None = None,  # (B or 1, m), nonnegative; None for ones
    ridge: Tensor | None = None,  # (B or 1, n), nonnegative; None for zeros
    visible: Tensor | None = None,  # (n, k) one where x is looked at or what it meets moved, zero elsewhere; None for ones
) -> Answer:
    """Least squares with row weights, a ridge, and k right-hand sides that share the matrix.

        minimise    sum_ij w_i (A x - b)_ij^2 + sum_jl ridge_j x_jl^2

    Solution:    (A'WA + diag ridge) x = A'W b. Where x is not unique (rank of S = [sqrt(W) A; sqrt(ridge)] below n: m < n, or
                 dependent columns), the one of minimum norm. A negative weight or ridge is BAD_INPUT.
    Derivative:  of the minimum-norm solution at constant rank. With r = b - A x, z = (S'S)^+ x_bar, y = (S'S)^+ x and
                 s = x_bar - S^+ S x_bar (zero at full column rank),
                 A_bar = W (r z' - A z x' + A y s'),  b_bar = W A z,  w_bar = sum_l r o A z,  ridge_bar = -sum_l z o x.
    Shapes:      outputs (x,), (B, n, k). Where A, w and ridge are shared by the batch, so is their one factorisation.
    Cost:        in multiplications a row: the Gram matrix m n^2 (half, from 2 BLOCK columns on) and its factor n^3/6; then for
                 each right-hand side 3 m n + n^2 forward, 3 m n + n^2 backward (two m n of them A_bar's), and 2 m n + n^2 for each
                 correction in each direction. For m < n exchange m and n. A QR costs four times as much, an SVD twenty.
                 Kept for backward: n^2 + (2 m + n) k numbers a row.
    Accuracy:    float64 whatever the dtype. The Gram matrix's Cholesky factor is corrected with residuals of A itself, which is
                 as accurate as QR while cond(S)^2 < SAFE (columns equilibrated); rows beyond that, tested one by one, take a
                 QR of S, and if S is rank deficient (RANK) its SVD. `residual` is the cosine between S's columns and the
                 residual, in units of b. Where that size exceeds DOUBTFUL, one more solve with the residual and its own rounding
                 tells how far x may be off: INACCURATE above 3e-8, NOT_CONVERGED above 1e-2, in what is visible.
    At a kink:   rank below n is flagged as degenerate, unless the null vectors of S are zero in what is visible: a change of rank
                 is a discontinuity.
    Second derivative: by two steps of the chord method from the solution with the factor above; at constant rank likewise.
    Source:      Bjorck (1996), sections 2.4 and 2.9; Golub and Pereyra (1973) for the derivative at constant rank.
    """
    with torch.no_grad():
        solved = _solve(_Problem.of(A, b, w, ridge), visible)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (A, b, w, ridge)):
        x = _Differentiable.apply(solved, A, b, w, ridge)
        local = partial(_again, solved.factor, x, solved.y)
    else:
        x, local = solved.x.to(A.dtype), None
    return Answer((x,), solved.status, None, solved.residual, solved.degenerate, local=local)


class _Differentiable(torch.autograd.Function):
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
    """The data in float64. Right-hand sides and solutions are rows, (F, k, .): products with rows are the faster ones.

    F is the batch of the matrices; where it is 1, the right-hand sides of the whole batch stand in that one.
    """

    A: Tensor  # (F or 1, m, n)
    b: Tensor  # (F or 1, k, m)
    w: Tensor | None  # (F or 1, 1, m)
    ridge: Tensor | None  # (F or 1, 1, n)
    factors: int  # F
    shape: tuple[int, int]  # B, and the right-hand sides of a row of the batch
    wide: bool  # A has fewer rows than columns, and the ridge does not tell columns with one from columns without

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
        """The problem whose Gram matrix is factored: this one, or its dual, with A' for A, and the inverses of the ridge for
        weights and of the weights for a ridge. Without a ridge A x = b holds exactly, whatever the weights."""
        if not self.wide:
            return self
        if self.ridge is None:
            return replace(self, A=self.A.mT, w=None)
        shift = torch.ones_like(self.A[:1, :, :1].mT) if self.w is None else 1.0 / self.w
        return replace(self, A=self.A.mT, w=1.0 / self.ridge, ridge=shift)

    def weigh(self, rows: Tensor) -> Tensor:
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
    x: Tensor  # (B, n, k)
    r: Tensor  # rows b - A x
    y: Tensor  # rows W (b - A x); where A x = b whatever the weights, x = A'y
    factor: _Factor
    status: Tensor  # (B,)
    residual: Tensor  # (B,)
    degenerate: Tensor  # (B,)


def _solve(problem: _Problem, visible: Tensor | None) -> _Solved:
    tall, wide, b = problem.tall, problem.wide, problem.b
    gram = _gram(tall, problem.factors)
    L, info = torch.linalg.cholesky_ex(gram)
    scale = gram.diagonal(dim1=1, dim2=2).sqrt().unsqueeze(1)
    right = b if wide else _mm(problem.weigh(b), problem.A)
    if len(right) != len(L):
        right = right.expand(len(L), -1, -1)
    first = _substitute(L, torch.cat((scale * _probe(scale.shape[2], scale.device), right), 1))
    # The size of the inverse in equilibrated columns: as the probe shows it, and as pivots do where the probe should miss it.
    pivots = L.diagonal(dim1=1, dim2=2).unsqueeze(1) / scale
    hard = ((first[:, :1] * scale).abs() + pivots**-2).sum((1, 2)).masked_fill(info != 0, torch.inf)
    bad = _negative(problem)
    if bad is not None:
        hard = hard.masked_fill(bad, torch.inf)
    if wide and problem.w is not None:
        hard = hard.masked_fill((problem.w == 0).any(2).any(1), torch.inf)
    worst = float(hard.max()) if len(hard) else 0.0
    corrections = next((count for limit, count in CORRECTIONS if worst <= limit), CORRECTIONS[-1][1])
    if wide:
        y, x = _span(tall, L, b, first[:, 1:], corrections)
        r = torch.zeros_like(y) if tall.ridge is None else tall.ridge * y
        error, size = b - x @ problem.A.mT - r, x
        if tall.ridge is not None and tall.w is not None:
            size = torch.cat((x / tall.w.sqrt(), y * tall.ridge.sqrt()), 2)
    else:
        x, r = _fit(tall, L, b, first[:, 1:], corrections)
        y = problem.weigh(r)
        error, size = problem.penalise(_mm(y, problem.A), x), b if problem.w is None else b * problem.w.sqrt()
    residual = _relative(error / scale, size)
    degenerate = torch.full_like(info, wide and problem.ridge is None, dtype=torch.bool)
    if visible is not None and wide and problem.ridge is None:
        degenerate = _sees_beyond(problem, L, visible)
    orthogonal, off = None, None
    if not worst <= DOUBTFUL:
        if wide:
            off = _off(tall, L, b, x, y, corrections)
        else:
            off, _ = _span(problem, L, _doubtful(problem, x, r), corrections=corrections)
    if not worst <= SAFE:
        index = torch.nonzero(~(hard <= SAFE)).flatten()
        part = problem.take(index)
        orthogonal = _Orthogonal.of(part, index, None if bad is None else bad.expand(len(L))[index])
        x_part, r_part, residual[index] = orthogonal.fit(part)
        x, r = x.index_copy(0, index, x_part), r.index_copy(0, index, r_part)
        y = y.index_copy(0, index, part.weigh(r_part))
        degenerate[index] = orthogonal.deficient if visible is None else orthogonal.is_seen(visible)
        assert off is not None
        off = off.index_copy(0, index, orthogonal.off(part, x_part, r_part))
    residual = residual.reshape(problem.shape).amax(1)
    status = torch.where(residual <= ACCURATE, int(Status.SOLVED), int(Status.INACCURATE))
    if off is not None:
        error = _relative_error(problem, off, x, visible)
        status = status.masked_fill(~(error <= SENSITIVE), int(Status.INACCURATE))
        status = status.masked_fill(~(error <= MEANINGLESS), int(Status.NOT_CONVERGED))
    if bad is not None:
        status, residual = status.masked_fill(bad, int(Status.BAD_INPUT)), residual.masked_fill(bad, torch.nan)
    factor = _Factor(L, corrections, orthogonal)
    return _Solved(_columns(x, problem.shape), r, y, factor, status, residual, degenerate.expand(problem.shape[0]))


@lru_cache(maxsize=64)
def _waves(n: int, device: torch.device) -> Tensor:
    """(2, 1, n) in which no two columns, and so no two rows of a matrix, are alike."""
    phase = torch.arange(n, dtype=torch.float64, device=device).square()
    return 2**0.5 * torch.stack((phase.cos(), phase.sin())).unsqueeze(1)


def _rounded(terms: Tensor) -> Tensor:
    """(F, k, .) -> (F, 2, k, .): two samples of what rounding may make of sums of these sizes."""
    return ROUNDING * terms.unsqueeze(1) * _waves(terms.shape[2], terms.device)


def _doubtful(problem: _Problem, x: Tensor, r: Tensor) -> Tensor:
    """A'W r - ridge x with two samples of its rounding, and of that of r = b - A x, (F, 2 k, n)."""
    size = problem.A.abs()
    inner = r.unsqueeze(1) + _rounded(problem.b.abs() + _mm(x.abs(), size.mT))
    terms = problem.weigh(r.abs()) @ size
    terms = terms if problem.ridge is None else terms + problem.ridge * x.abs()
    whole = _gradient(problem, inner.flatten(1, 2), x.repeat(1, 2, 1))
    return whole + _rounded(terms).flatten(1, 2)


def _off(problem: _Problem, L: Tensor, b: Tensor, x: Tensor, y: Tensor, corrections: int) -> Tensor:
    """How far x may be off, (F, 2 k, .), by one more solve of the dual problem, A'W A y + ridge y = b and x = W A y."""
    size = problem.A.abs()
    left, terms = b - _mm(x, problem.A), b.abs() + _mm(x.abs(), size)
    if problem.ridge is not None:
        left, terms = left - problem.ridge * y, terms + problem.ridge * y.abs()
    step = _span(problem, L, (left.unsqueeze(1) + _rounded(terms)).flatten(1, 2), corrections=corrections)[1]
    return step + _rounded(problem.weigh(_mm(y.abs(), size.mT))).flatten(1, 2)


def _relative_error(problem: _Problem, off: Tensor, x: Tensor, visible: Tensor | None) -> Tensor:
    """(B,) the largest entry of x's error that is seen, relative to x, in units of S's columns."""
    units = problem.A.square() if problem.w is None else problem.A.square() * problem.w.mT
    units = units.sum(1, keepdim=True) if problem.ridge is None else units.sum(1, keepdim=True) + problem.ridge
    data = problem.b if problem.w is None else problem.b * problem.w.sqrt()
    units, data = units.sqrt(), FLOOR * torch.linalg.vector_norm(data, dim=2)
    off, size = (off * units).abs().unflatten(1, (2, -1)).amax(1), (x * units).abs().amax(2)
    off, size = (t.expand(len(x), -1, *t.shape[2:]).reshape(*problem.shape, *t.shape[2:]) for t in (off, size))
    if visible is not None:
        off = off * visible.to(off).mT
    data = data.expand(len(x), -1).reshape(problem.shape)
    return (off.amax(2) / torch.maximum(size, data).clamp(min=torch.finfo(off.dtype).tiny)).amax(1)


def _sees_beyond(problem: _Problem, L: Tensor, visible: Tensor) -> Tensor:
    """(F,) whether a visible entry of x has a part outside the row space of A, of full rank and factored as A A' = LL'."""
    half = torch.linalg.solve_triangular(L, problem.A.expand(len(L), -1, -1), upper=False)
    return ((1 - half.square().sum(1) > RANK) & (visible > 0).any(1)).any(1)


@lru_cache(maxsize=64)
def _probe(n: int, device: torch.device) -> Tensor:
    """Entries without a pattern, so that no vector of interest is orthogonal to it."""
    return torch.arange(n, dtype=torch.float64, device=device).square().cos()


def _negative(problem: _Problem) -> Tensor | None:
    """Which rows have a negative weight or ridge."""
    found = [(given < 0).any(2).any(1) for given in (problem.w, problem.ridge) if given is not None]
    return found[0] | found[-1] if found else None


def _gram(problem: _Problem, count: int) -> Tensor:
    """A'WA + diag ridge, of which only the lower triangle counts."""
    A, n = problem.A, problem.A.shape[2]
    weighted = A if problem.w is None else A * problem.w.mT
    if n < 2 * BLOCK:
        gram = _mm(weighted.mT, A)
    else:
        gram = weighted.new_zeros(max(len(weighted), len(A)), n, n)
        for j in range(0, n, BLOCK):
            gram[:, j:, j : j + BLOCK] = weighted[:, :, j:].mT @ A[:, :, j : j + BLOCK]
    if len(gram) != count:
        gram = gram.repeat(count, 1, 1)
    if problem.ridge is not None:
        gram.diagonal(dim1=1, dim2=2).add_(problem.ridge.squeeze(1))
    return gram


def _mm(left: Tensor, right: Tensor) -> Tensor:
    """left @ right without the price of broadcasting where there is none."""
    return torch.bmm(left, right) if len(left) == len(right) else left @ right


def _substitute(L: Tensor, rows: Tensor) -> Tensor:
    """Rows of (LL')^-1."""
    half = torch.linalg.solve_triangular(L, rows.mT, upper=False)
    return torch.linalg.solve_triangular(L.mT, half, upper=True).mT


def _gradient(problem: _Problem, r: Tensor, x: Tensor) -> Tensor:
    """A'W r - ridge x."""
    return problem.penalise(problem.weigh(r) @ problem.A, x)


def _relative(error: Tensor, size: Tensor) -> Tensor:
    size = torch.linalg.vector_norm(size, dim=2)
    return torch.linalg.vector_norm(error, dim=2) / size.clamp(min=torch.finfo(size.dtype).tiny)


def _fit(problem: _Problem, L: Tensor, b: Tensor, x: Tensor, corrections: int) -> tuple[Tensor, Tensor]:
    """(x, b - A x) with A'W (b - A x) = ridge x, from a first x."""
    for _ in range(corrections):
        x = x + _substitute(L, _gradient(problem, b - _mm(x, problem.A.mT), x))
    return x, b - _mm(x, problem.A.mT)


def _span(
    problem: _Problem, L: Tensor, v: Tensor, z: Tensor | None = None, corrections: int = 0
) -> tuple[Tensor, Tensor]:
    """(z, W A z) with A'W A z + ridge z = v, from a first z."""
    z = _substitute(L, v) if z is None else z
    u = problem.weigh(_mm(z, problem.A.mT))
    for _ in range(corrections):
        z = z + _substitute(L, problem.penalise(v - _mm(u, problem.A), z))
        u = problem.weigh(_mm(z, problem.A.mT))
    return z, u


@dataclass(frozen=True, eq=False)
class _Orthogonal:
    """S^+ = Z Q' for S = [sqrt(W) A; sqrt(ridge)], Q with orthonormal columns."""

    index: Tensor  # (R,) of the rows of the batch
    Q: Tensor  # (R, rows of S or more, n)
    Z: Tensor  # (R, n, n)
    null: Tensor | None  # (R, n, n), an orthonormal basis of the null space of S, then columns of zeros
    deficient: Tensor  # (R,)
    root_w: Tensor | None  # (R or 1, 1, m)
    root_ridge: Tensor | None  # (R or 1, 1, n)
    size: Tensor  # (R, 1, n), norms of the columns of S

    @classmethod
    def of(cls, problem: _Problem, rows: Tensor, bad: Tensor | None) -> _Orthogonal:
        """For these rows of a batch, of which the `bad` ones get a zero for S^+."""
        count = len(rows)
        root_w, root_ridge = (None if t is None else t.clamp(min=0.0).sqrt() for t in (problem.w, problem.ridge))
        S = (problem.A if root_w is None else problem.A * root_w.mT).expand(count, -1, -1)
        if root_ridge is not None:
            S = torch.cat((S, torch.diag_embed(root_ridge.squeeze(1)).expand(count, -1, -1)), 1)
        S = torch.nn.functional.pad(S, (0, 0, 0, max(0, S.shape[2] - S.shape[1])))
        largest = _or_one(S.abs().amax(1, keepdim=True))
        size = largest * _or_one(torch.linalg.vector_norm(S / largest, dim=1, keepdim=True))
        S = S / size
        Q, R = torch.linalg.qr(S)
        Z = torch.linalg.solve_triangular(
            R, torch.eye(S.shape[2], dtype=S.dtype, device=S.device).expand_as(R), upper=True
        )
        regular = torch.linalg.vector_norm(Z, dim=(1, 2)) * S.shape[2] ** 0.5 < 0.1 / RANK
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

    def fit(self, problem: _Problem) -> tuple[Tensor, Tensor, Tensor]:
        """(x, b - A x, residual)."""
        x = self._times_Q(problem.b, None) @ self.Z.mT
        x = x + self._times_Q(problem.b - x @ problem.A.mT, -x) @ self.Z.mT
        r = problem.b - x @ problem.A.mT
        scaled = problem.b if self.root_w is None else problem.b * self.root_w
        return x, r, _relative(_gradient(problem, r, x) / self.size, scaled.expand(len(x), -1, -1))

    def off(self, problem: _Problem, x: Tensor, r: Tensor) -> Tensor:
        """How far x may be off, (R, 2 k, n), by one more solve."""
        return self.span(problem, _doubtful(problem, x, r))[0]

    def is_seen(self, visible: Tensor) -> Tensor:
        """(R,) whether a null vector of S, of unit length, is not zero in what is visible, (n, k)."""
        if self.null is None:
            return self.deficient
        return (self.null * (visible.to(self.null) > 0).any(1, keepdim=True)).abs().amax((1, 2)) > HIDDEN

    def span(self, problem: _Problem, v: Tensor) -> tuple[Tensor, Tensor]:
        """(z, W A z) with z = (S'S)^+ v."""
        v = v if self.null is None else v - v @ self.null @ self.null.mT
        part = v @ self.Z
        part = part + (v - self._image(problem, part)[1]) @ self.Z
        return part @ self.Z.mT, self._image(problem, part)[0]

    def bend(self, problem: _Problem, x: Tensor, v: Tensor) -> Tensor | None:
        """W A y s' with y = (S'S)^+ x and s = v - S^+ S v: x follows the row space of S."""
        if self.null is None:
            return None
        return self._image(problem, x @ self.Z)[0].mT @ (v @ self.null @ self.null.mT)


def _or_one(size: Tensor) -> Tensor:
    return torch.where(size > 0, size, 1.0)


def _singular(S: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Q, Z, null basis and whether there is one, for (S times size)^+ = Z Q'."""
    U, values, Vt = torch.linalg.svd(S, full_matrices=False)
    zero = values <= RANK * values[:, :1]
    V = Vt.mT / size.mT
    null = torch.linalg.qr(V.flip(2))[0] * zero.flip(1).unsqueeze(1)
    Z = V * torch.where(zero, 0.0, 1.0 / values).unsqueeze(1)
    return U, Z - null @ (null.mT @ Z), null, zero.any(1)


def _pull_back(
    problem: _Problem, factor: _Factor, r: Tensor, y: Tensor, x: Tensor, x_bar: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Cotangents of A, b, w and ridge."""
    A, w = problem.A, problem.w
    x, v = _rows(x, problem.factors), _rows(x_bar, problem.factors)
    tall, orthogonal = problem.tall, factor.orthogonal
    # z = (S'S)^+ v, u = W A z; where A x = b whatever the weights, z is v less its part in the row space.
    if problem.wide:
        u, s = _fit(tall, factor.L, v, _substitute(factor.L, tall.weigh(v) @ A.mT), factor.corrections)
        z = tall.weigh(s)
    else:
        z, u = _span(tall, factor.L, v, corrections=factor.corrections)
    if orthogonal is not None:
        index, part = orthogonal.index, problem.take(orthogonal.index)
        z_part, u_part = orthogonal.span(part, v[index])
        z, u = z.index_copy(0, index, z_part), u.index_copy(0, index, u_part)
    A_bar = b_bar = w_bar = ridge_bar = None
    if needed[0]:
        left, right = torch.cat((y, -u), 1), torch.cat((z, x), 1)
        if len(A) == 1:
            left, right = left.flatten(0, 1).unsqueeze(0), right.flatten(0, 1).unsqueeze(0)
        A_bar = _mm(left.mT, right)
        if orthogonal is not None and (bend := orthogonal.bend(part, x[index], v[index])) is not None:
            A_bar = A_bar + bend.sum(0) if len(A) == 1 else A_bar.index_add(0, index, bend)
    if needed[1]:
        b_bar = _columns(u, problem.shape) if len(problem.b) == len(u) else u.sum(0, keepdim=True).mT
    if needed[2] and w is not None:
        w_bar = _sum_to(w, r * torch.where(w > 0.0, u / w, _mm(z, A.mT)))
    if needed[3] and problem.ridge is not None:
        ridge_bar = _sum_to(problem.ridge, -z * x)
    return A_bar, b_bar, w_bar, ridge_bar


def _sum_to(shared: Tensor, rows: Tensor) -> Tensor:
    """The gradient of values that the right-hand sides share, and the batch where they are one for it."""
    rows = rows.sum(1)
    return rows.sum(0, keepdim=True) if len(shared) == 1 else rows


def _again(
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
    x, y = _rows(x.detach(), problem.factors), _laid(y, problem.factors)
    if orthogonal is None:
        x = _regular(problem, here, factor, x, y)
    elif len(L) == 1:
        x = _of_minimum_norm(problem, here, orthogonal, x)
    else:
        # Apart, so that no Gram matrix without a factor comes near a derivative.
        hard = orthogonal.index
        easy = torch.ones(len(L), dtype=torch.bool, device=L.device).index_fill_(0, hard, False).nonzero().flatten()
        parts = (
            _regular(problem.take(easy), here.take(easy), replace(factor, L=L[easy]), x[easy], y[easy]),
            _of_minimum_norm(problem.take(hard), here.take(hard), orthogonal, x[hard]),
        )
        x = torch.cat(parts).index_select(0, torch.cat((easy, hard)).argsort())
    return (_columns(x, problem.shape).to(A.dtype),)


def _laid(rows: Tensor, factors: int) -> Tensor:
    """Rows of the whole batch as those of so many matrices."""
    if len(rows) == factors:
        return rows
    return rows.reshape(factors, len(rows) * rows.shape[1] // factors if factors else 0, rows.shape[2])


def _regular(problem: _Problem, here: _Problem, factor: _Factor, x: Tensor, y: Tensor) -> Tensor:
    """x by chord steps with the Gram matrix's factor, here: on K x = A'W b, or on K y = b of the dual and x = W A y."""
    tall, fixed, L = problem.tall, here.tall, factor.L

    def solve(rows: Tensor) -> Tensor:
        v = _laid(rows, len(L))
        return _laid(_span(fixed, L, v, corrections=factor.corrections)[0], len(rows))

    for _ in range(2):
        if problem.wide:
            span = tall.weigh(_mm(y, tall.A.mT))
            y = y + solve(tall.penalise(problem.b - _mm(span, tall.A), y))
        else:
            x = x + solve(_gradient(problem, problem.b - _mm(x, problem.A.mT), x))
    return tall.weigh(_mm(y, tall.A.mT)) if problem.wide else x


def _of_minimum_norm(problem: _Problem, here: _Problem, orthogonal: _Orthogonal, x: Tensor) -> Tensor:
    """x by chord steps with K^+, K = S'S, on K x = A'W b; the part of x that this leaves free, on x = K y, y in the range of K^+."""

    def solve(rows: Tensor) -> Tensor:
        return _laid(orthogonal.span(here, _laid(rows, len(orthogonal.Z)))[0], len(rows))

    def beyond(x: Tensor, y: Tensor) -> Tensor:
        """K y - x."""
        return -_gradient(problem, -(y @ problem.A.mT), -y) - x

    null, y = orthogonal.null, solve(x)
    for _ in range(2):
        step = solve(_gradient(problem, problem.b - x @ problem.A.mT, x))
        x = x + step if null is None else x + step + beyond(x, y) @ null @ null.mT
        y = y if null is None else y - solve(beyond(x, y))
    return x
