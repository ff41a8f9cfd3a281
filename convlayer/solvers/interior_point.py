"""A batched, dense, primal-dual interior point for quadratic and linear programs: all rows of a batch at once, in torch.

    minimise 1/2 x'Px + q'x   subject to   Cx + s = b,   s = 0 in the equalities,  s >= 0 elsewhere         dual z

Homogeneous embedding, y being z in the inequalities, u in the equalities: a solution is x / tau, z / tau, s / tau with tau > 0;
where there is none, kappa > 0 instead, and x or z is the certificate.

    Px + C'z + q tau = 0,   Cx + s - b tau = 0,   q'x + b'z + x'Px / tau + kappa = 0
    s y = mu,   tau kappa = mu,   mu -> 0

Newton's system is, with w = y / s, A the inequalities and E the equalities,

    K = [ P + A'wA   E' ;  E   0 ]    or, with P definite and few rows,    C P^-1 C' + 1 / w,

which is the first form for the dual, a quadratic program in z alone: one iteration serves both. K is factored by LU, which
in batches of such sizes costs no more than Cholesky's method and a Schur complement, and takes any semidefinite P.

Cost:     an iteration is 2 l n^2 + 2/3 (n + p)^3 flops a row (l inequalities, p equalities), or 2/3 (l + p)^3 by the dual.
Sources:  Mehrotra (1992); Andersen and Ye (1999); Goulart and Chen (2024).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from convlayer.program import Data, Program, dense_A, dense_P, take_rows
from convlayer.solution import Status
from convlayer.solvers.solver import Iterate, Solver, Task
from convlayer.threads import one_thread

SHIFT = 1e-10  # on K's diagonal, against singularity; proximal: it slows the last digits down, and moves no solution
START_SHIFT = 1e-4  # the same for the starting point, which is to be of moderate size
PIVOTS = 1e-3  # least pivot of P's Cholesky factor, as a share of the largest, for the dual to be solved instead
GROWTH = 1e2  # and the most by which P^-1 may blow up the right-hand side
PRODUCT_RATE = 3  # flops of a batched product in the time of one of a batched LU; measured
NEAREST = 0.99  # share of the way to the boundary that a step may go
DOUBT = 10.0  # kappa above this many tau: look for a certificate
CERTIFICATE = 1e-6  # relative error of a certificate;
SURE, LOOSE = 1e8, 5e-5  # this is enough where kappa is above so many tau
HOPELESS = 1e15  # and without a certificate by then, there will be none
ALMOST = 1e-5  # relative error up to which a point that is not accurate is still some solution
STALLED = 1e-5  # a step shorter than this is its row's last
COMPACT = 0.875  # finished rows leave the batch when the others are at most this share of it
LARGE = 1e3  # slack that no longer counts for the starting point's size
ITERATIONS = 50


class InteriorPoint(Solver):
    """Takes a batch as one task. Dense: for programs of up to some hundred variables and constraints."""

    name: ClassVar[str] = "interior_point"
    batched: ClassVar[bool] = True

    def check(self, program: Program, options: Mapping[str, Any]) -> None:
        others = sorted({block.name for block in program.cones.blocks} - {"zero", "nonnegative"})
        if others:
            raise ValueError(
                f"Solver interior_point takes linear and quadratic programs, and this problem has a cone of the kind "
                f"{', '.join(others)}; use solver='clarabel'."
            )
        _max_iter(options)

    def solve(self, task: Task) -> list[Iterate]:
        program, limit = task.program, _max_iter(task.options)
        rows = len(task)
        data = Data(program, *(torch.from_numpy(part) for part in (task.P, task.q, task.A, task.b)))
        order = torch.argsort(program.inequalities.to(torch.uint8), stable=True)
        equalities = program.m - int(program.inequalities.sum())
        C, b = dense_A(data), data.b
        if bool((order[1:] < order[:-1]).any()):
            C, b = C[:, order], b[:, order]
        parts = dense_P(data), data.q, C, b
        answer = _Answer.blank(rows, program.n, program.m)
        by_dual, factor = torch.zeros(rows, dtype=torch.bool), C
        if rows and program.m and _dual_is_cheaper(program.n, equalities, program.m - equalities):
            by_dual, factor = _invertible(parts[0], data.q, C)
            by_dual = by_dual.expand(rows)
        index = torch.nonzero(by_dual).flatten()
        if len(index):
            mine = [_rows(part, index, rows) for part in (*parts, factor)]
            answer.put(index, _by_dual(*mine, p=equalities, tolerance=task.tolerance, limit=limit))
        # Where the dual falters, as with a certificate that its squared matrix G blurs, the primal is tried.
        index = torch.nonzero((answer.status == Status.NOT_CONVERGED) | (answer.status == Status.INACCURATE)).flatten()
        if len(index):
            mine = [_rows(part, index, rows) for part in parts]
            answer.put(index, _by_primal(*mine, p=equalities, tolerance=task.tolerance, limit=limit))
        return answer.iterates(order)


def _max_iter(options: Mapping[str, Any]) -> int:
    for option in options:
        if option != "max_iter":
            raise TypeError(f"Solver interior_point has no option `{option}`. It has: tolerance, max_iter.")
    limit = options.get("max_iter", ITERATIONS)
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise TypeError(f"interior_point's option `max_iter` cannot be {limit!r}: it is a positive integer.")
    return limit


@dataclass(eq=False)
class _Answer:
    """x (B, n), s and z (B, m), statuses and iterations (B,); rows as in the Task, constraints with the equalities first."""

    x: Tensor
    s: Tensor
    z: Tensor
    status: Tensor
    iterations: Tensor

    @classmethod
    def blank(cls, batch: int, n: int, m: int) -> _Answer:
        x, s, z = (torch.zeros(batch, k, dtype=torch.float64) for k in (n, m, m))
        return cls(x, s, z, torch.full((batch,), int(Status.NOT_CONVERGED)), torch.zeros(batch, dtype=torch.int64))

    def put(self, index: Tensor, other: _Answer) -> None:
        for name in ("x", "s", "z", "status", "iterations"):
            getattr(self, name)[index] = getattr(other, name)

    def iterates(self, order: Tensor) -> list[Iterate]:
        s, y = torch.empty_like(self.s), torch.empty_like(self.z)
        s[:, order], y[:, order] = self.s, self.z
        parts = zip(self.x.numpy(), s.numpy(), y.numpy(), self.status.tolist(), self.iterations.tolist(), strict=True)
        return [Iterate(x, s, y, Status(status), iterations) for x, s, y, status, iterations in parts]


@dataclass(frozen=True, eq=False)
class _Form(ABC):
    """minimise 1/2 x'Px + q'x subject to Ax + s = b, s >= 0, Ex = e, with v = (x, u): matrices shared by all rows have B = 1."""

    base: Tensor  # (B or 1, N, N) [ P  E' ; E  0 ]
    c: Tensor  # (B, N) (q, -e)
    b: Tensor  # (B, l)
    gradient: Tensor  # (B, N) (q, e)
    c_size: Tensor  # (B, N) against which residuals are measured
    b_size: Tensor  # (B, l)
    n: int  # of x
    curved: bool  # P is not zero

    def rows(self, index: Tensor):
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        chosen: dict[str, Any] = {name: take_rows(v, index) for name, v in parts.items() if isinstance(v, Tensor)}
        return replace(self, **chosen)

    def P_times(self, x: Tensor) -> Tensor:
        """(B, n) -> (B, n)"""
        return _times(x.unsqueeze(1), self.base[:, : self.n, : self.n]).squeeze(1)

    @abstractmethod
    def A_times(self, v: Tensor) -> Tensor:
        """(B, k, N) -> (B, k, l)"""

    @abstractmethod
    def At_times(self, y: Tensor) -> Tensor:
        """(B, k, l) -> (B, k, N), zero beyond x"""

    @abstractmethod
    def add_weighted(self, K: Tensor, w: Tensor) -> None:
        """K (B, N, N) += A'wA"""

    @abstractmethod
    def ray_error(self, v: Tensor) -> Tensor:
        """(B, 1) error of a ray as a certificate, beyond Px = 0 and Ax <= 0."""


@dataclass(frozen=True, eq=False)
class _Primal(_Form):
    """The program itself."""

    A: Tensor  # (B or 1, l, n)
    At: Tensor  # (B or 1, n, l) contiguous: a row times a matrix runs at twice the speed of a matrix times a column

    @classmethod
    def of(cls, P: Tensor, q: Tensor, C: Tensor, b: Tensor, p: int) -> _Primal:
        n, E, A, e = P.shape[1], C[:, :p], C[:, p:], b[:, :p]
        base, c, gradient = P, q, q
        if p:
            base = P.new_zeros(max(len(P), len(C)), n + p, n + p)
            base[:, :n, :n], base[:, n:, :n], base[:, :n, n:] = P, E, E.mT
            c, gradient = torch.cat([q, -e], 1), torch.cat([q, e], 1)
        curved = bool((P != 0).any())
        return cls(base, c, b[:, p:], gradient, c.abs(), b[:, p:].abs(), n, curved, A, A.mT.contiguous())

    def A_times(self, v: Tensor) -> Tensor:
        return _times(v[..., : self.n] if v.shape[2] > self.n else v, self.At)

    def At_times(self, y: Tensor) -> Tensor:
        found, p = _times(y, self.A), self.c.shape[1] - self.n
        return torch.constant_pad_nd(found, (0, p)) if p else found

    def add_weighted(self, K: Tensor, w: Tensor) -> None:
        block, weighted = K[:, : self.n, : self.n], self.At * w.unsqueeze(1)
        if len(self.A) == 1:
            block += weighted @ self.A[0]
        else:
            block.baddbmm_(weighted, self.A)

    def ray_error(self, v: Tensor) -> Tensor:
        return v.new_zeros(len(v), 1)


@dataclass(frozen=True, eq=False)
class _Dual(_Form):
    """minimise 1/2 z'Gz + h'z  subject to  z >= 0 but for the first k: the dual, with G = C P^-1 C', h = b + C P^-1 q.

    Its A is minus the last rows of the identity, its slack is z, and its multiplier is the primal's slack.
    """

    free: int
    C: Tensor  # (B or 1, m, n) for the primal's certificate C'z = 0, which Gz = 0 says with half the digits
    size: Tensor  # (B, 1) of b

    def A_times(self, v: Tensor) -> Tensor:
        return -v[..., self.free :]

    def At_times(self, y: Tensor) -> Tensor:
        return torch.constant_pad_nd(-y, (self.free, 0)) if self.free else -y

    def add_weighted(self, K: Tensor, w: Tensor) -> None:
        K.diagonal(dim1=1, dim2=2)[:, self.free :] += w

    def ray_error(self, v: Tensor) -> Tensor:
        return _times(v.unsqueeze(1), self.C).squeeze(1).abs().sum(1, keepdim=True) * self.size


def _times(rows: Tensor, matrix: Tensor) -> Tensor:
    """(B, k, i) and (B or 1, i, j) -> (B, k, j)."""
    return torch.matmul(rows, matrix[0]) if len(matrix) == 1 else torch.bmm(rows, matrix)


def _dual_is_cheaper(n: int, p: int, l: int) -> bool:
    return (p + l) ** 3 <= (n + p) ** 3 + 3 * l * n**2 / PRODUCT_RATE


def _invertible(P: Tensor, q: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) rows whose P is so well conditioned that the dual can be solved in its place; Cholesky factor of P."""
    factor, info = torch.linalg.cholesky_ex(P)
    pivots = factor.diagonal(dim1=1, dim2=2)
    sound = (info == 0) & (pivots.amin(1) >= PIVOTS * pivots.amax(1))
    return sound & (_largest(_times(_solve_P(factor, q).unsqueeze(1), C.mT).squeeze(1)).squeeze(1) <= GROWTH), factor


def _rows(values: Tensor, index: Tensor, rows: int) -> Tensor:
    return values if len(index) == rows else take_rows(values, index)


def _solve_P(factor: Tensor, x: Tensor) -> Tensor:
    """(B or 1, n, n), (B, n) -> (B, n)"""
    if len(factor) == 1:
        return torch.cholesky_solve(x.mT, factor[0]).mT
    return torch.cholesky_solve(x.unsqueeze(2), factor).squeeze(2)


def _by_primal(P: Tensor, q: Tensor, C: Tensor, b: Tensor, *, p: int, tolerance: float, limit: int) -> _Answer:
    n = P.shape[1]
    v, s, y, status, iterations = _embedding(_Primal.of(P, q, C, b, p), tolerance, limit)
    return _Answer(v[:, :n], torch.constant_pad_nd(s, (p, 0)), torch.cat([v[:, n:], y], 1), status, iterations)


def _by_dual(
    P: Tensor, q: Tensor, C: Tensor, b: Tensor, factor: Tensor, *, p: int, tolerance: float, limit: int
) -> _Answer:
    """The same by the dual, with the Cholesky factor of P."""
    V = torch.linalg.solve_triangular(factor, C.mT, upper=False)
    G = V.mT @ V
    unconstrained = _solve_P(factor, q)
    h = b + _times(unconstrained.unsqueeze(1), C.mT).squeeze(1)
    zero = torch.zeros_like(b[:, p:])
    form = _Dual(G, h, zero, h, b.abs(), zero, h.shape[1], True, p, C, _size(b))
    z, s, y, status, iterations = _embedding(form, tolerance, limit)
    z = torch.cat([z[:, :p], s], 1)
    x = -unconstrained - _solve_P(factor, _times(z.unsqueeze(1), C).squeeze(1))
    # A ray of the dual is the primal's certificate; the dual itself is never infeasible.
    status = torch.where(status == Status.UNBOUNDED, int(Status.INFEASIBLE), status)
    return _Answer(x, torch.constant_pad_nd(y, (p, 0)), z, status, iterations)


def _size(b: Tensor) -> Tensor:
    """(B, m) -> (B, 1) the sum of the right-hand sides that are not as good as infinite, at least 1."""
    size = b.abs()
    return torch.where(size < 1e7, size, 0.0).sum(1, keepdim=True).clamp(min=1.0)


class _Residual(NamedTuple):
    """What the embedding's equations leave, and what the tests of a row's end need beside it."""

    v: Tensor  # (B, N)
    s: Tensor  # (B, l)
    tau: Tensor  # (B, 1)
    gap: Tensor  # (B, 1) relative
    Px: Tensor | None  # (B, n), None for zero
    homogeneous: Tensor  # (B, N) (Px + E'u + A'y, Ex)
    Ax_s: Tensor  # (B, l)
    cv: Tensor  # (B, 1) q'x + e'u
    by: Tensor  # (B, 1)


def _residual(form: _Form, v: Tensor, Y: Tensor, S: Tensor) -> _Residual:
    n, l = form.n, form.b.shape[1]
    (y, tau), (s, kappa) = Y.split_with_sizes((l, 1), 1), S.split_with_sizes((l, 1), 1)
    total = form.At_times(y.unsqueeze(1)).squeeze(1)
    Px = None
    if form.c.shape[1] > n:
        x = v[:, :n]
        total = total + _times(v.unsqueeze(1), form.base).squeeze(1)
        if form.curved:
            Px = form.P_times(x)
    elif form.curved:
        x, Px = v, form.P_times(v)
        total = total + Px
    xPx = _dot(x, Px) if Px is not None else torch.zeros_like(tau)
    Ax_s = form.A_times(v.unsqueeze(1)).squeeze(1) + s
    cv, by, curve = _dot(form.gradient, v), _dot(form.b, y), xPx / tau
    r_tau = cv + by + curve
    gap = r_tau.abs() / torch.maximum((curve / 2 + by).abs(), tau)
    r_v, r_s = torch.addcmul(total, form.c, tau), torch.addcmul(Ax_s, form.b, tau, value=-1)
    return _Residual(r_v, r_s, r_tau + kappa, gap, Px, total, Ax_s, cv, by)


def _judge(form: _Form, r: _Residual, v: Tensor, Y: Tensor, S: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """(status (B,), scale (B, 1) by which the point is to be divided)"""
    n, tau, kappa = form.n, Y[:, -1:], S[:, -1:]
    x_size, y_size = torch.maximum(_largest(v[:, :n]), tau), torch.maximum(_largest(v[:, n:]), _largest(Y))
    dual = _largest(r.v[:, :n] / torch.addcmul(y_size, form.c_size[:, :n], tau))
    equal = _largest(r.v[:, n:] / torch.addcmul(x_size, form.c_size[:, n:], tau))
    primal = _largest(r.s / torch.addcmul(x_size, form.b_size, tau))
    error = torch.stack([dual, equal, primal, r.gap]).amax(0)
    status = torch.where(error <= ALMOST, int(Status.INACCURATE), int(Status.NOT_CONVERGED))
    status = torch.where(error <= tolerance, int(Status.SOLVED), status)
    scale = tau
    if bool((kappa > DOUBT * tau).any()):
        Px = 0.0 if r.Px is None else r.Px
        share = torch.where(kappa > SURE * tau, LOOSE, CERTIFICATE)
        qx = _dot(form.gradient[:, :n], v[:, :n])
        gain, ray_gain = qx - r.cv - r.by, -qx  # -(e'u + b'y), -q'x
        size = _size(torch.cat([form.c_size[:, n:], form.b_size], 1))
        infeasible = (r.homogeneous[:, :n] - Px).abs().sum(1, keepdim=True) * size <= share * gain
        errors = [_largest(r.homogeneous[:, n:]), _largest(r.Ax_s), form.ray_error(v)]
        errors += [] if r.Px is None else [_largest(r.Px)]
        unbounded = torch.stack(errors).amax(0) <= share * ray_gain
        infeasible, unbounded = (
            (kappa > DOUBT * tau) & claim for claim in (infeasible & (gain > 0), unbounded & (ray_gain > 0))
        )
        status = torch.where(unbounded, int(Status.UNBOUNDED), status)
        status = torch.where(infeasible, int(Status.INFEASIBLE), status)
        scale = torch.where(infeasible | unbounded, torch.maximum(x_size, y_size), tau)
    return status.squeeze(1), scale


def _embedding(form: _Form, tolerance: float, limit: int) -> list[Tensor]:
    """v (B, N), s and y (B, l), statuses and iterations (B,), by Mehrotra's predictor and corrector.

    Y = (y, tau) and S = (s, kappa) are kept together: one cone. A row that has finished is recorded, and left to itself until
    enough of them are there for the batch to be closed up.
    """
    batch, (N, l) = len(form.c), (form.c.shape[1], form.b.shape[1])
    answer = [form.c.new_zeros(batch, k) for k in (N, l, l)]
    answer += [torch.zeros(batch, dtype=torch.int64), torch.full((batch,), limit)]
    live, running = torch.arange(batch), torch.ones(batch, 1, dtype=torch.bool)
    K = form.c.new_empty(batch, N, N)
    v, Y, S = _start(form, K)
    length = v.new_ones(batch, 1)
    for iteration in range(limit + 1):
        r = _residual(form, v, Y, S)
        stuck = (length <= STALLED) | (S[:, l:] > HOPELESS * Y[:, l:])
        close = ((r.gap <= tolerance) | (S[:, l:] > DOUBT * Y[:, l:]) | stuck) & running
        if iteration == limit or bool(close.any()):
            status, scale = _judge(form, r, v, Y, S, tolerance)
            ends = running.squeeze(1)
            if iteration < limit:
                ends = ends & ((status < Status.NOT_CONVERGED) & (status != Status.INACCURATE) | stuck.squeeze(1))
            index = torch.nonzero(ends).flatten()
            if len(index):
                now = (v / scale, S[:, :l] / scale, Y[:, :l] / scale, status, torch.full_like(status, iteration))
                for kept, value in zip(answer, now, strict=True):
                    kept[live[index]] = value[index]
                running[index] = False
                left = torch.nonzero(running.squeeze(1)).flatten()
                if not len(left):
                    break
                if len(left) <= COMPACT * len(live):
                    form, K = form.rows(left), K[: len(left)]
                    live, running, v, Y, S = (part[left] for part in (live, running, v, Y, S))
                    r = _Residual._make(None if part is None else part[left] for part in r)
        dv, dY, dS, length = _direction(form, r, v, Y, S, K)
        v, Y, S = (torch.addcmul(part, length, step) for part, step in ((v, dv), (Y, dY), (S, dS)))
    return answer


def _direction(
    form: _Form, r: _Residual, v: Tensor, Y: Tensor, S: Tensor, K: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dv, dY, dS, length of the step)"""
    n, l = form.n, form.b.shape[1]
    (y, tau), (s, kappa) = Y.split_with_sizes((l, 1), 1), S.split_with_sizes((l, 1), 1)
    w = y / s
    lu, pivots = _factorise(form, w, K, SHIFT)
    w = w.unsqueeze(1)

    def reduced(a: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """(v, y) of  base v + A'y = a,  Av - y / w = c,  each (B, k, .), by K."""
        right = a + form.At_times(w * c)
        v = torch.linalg.lu_solve(lu, pivots, right.mT).mT
        return v, w * (form.A_times(v) - c)

    # A change of tau moves (v, y) along itself and by a ray, which is small near a solution: nothing cancels.
    away, inside = r.v.neg(), s - r.s
    (v1, ray_v), (y1, ray_y) = (
        part.unbind(1)
        for part in reduced(torch.stack([away, away / tau], 1), torch.stack([inside, (s + inside) / tau], 1))
    )
    product = Y * S
    # The Schur complement of tau: kappa/tau + |ray|_P^2 + |y / tau + ray_y|^2 / w, by the equations of the ray.
    slope = ray_v * r.v
    slope = slope.sum(1, keepdim=True) if slope.shape[1] == n else _signed(slope, n)
    pivot = (product.sum(1, keepdim=True) / tau + _dot(ray_y, r.s) - slope) / tau
    pivot = torch.maximum(pivot, kappa / tau)
    along_v, along_y = ray_v + v / tau, ray_y + y / tau
    gradient = form.gradient
    if r.Px is not None:
        bend = r.Px * (2 / tau)
        gradient = gradient + (bend if form.c.shape[1] == n else torch.constant_pad_nd(bend, (0, form.c.shape[1] - n)))

    def whole(v1: Tensor, y1: Tensor, target: Tensor, r_tau: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        d_tau = (r_tau - target[:, l:] / tau + _dot(gradient, v1) + _dot(form.b, y1)) / pivot
        dY = torch.cat([torch.addcmul(y1, d_tau, along_y), d_tau], 1)
        relative = dY / Y
        other = -(target / product + relative)
        return d_tau, dY, other * S, torch.minimum(other, relative).amin(1, keepdim=True)

    _, dY, dS, worst = whole(v1, y1, product, r.tau)
    sigma = (1 - worst.neg().clamp(min=1).reciprocal()) ** 3
    keep = 1 - sigma
    target = torch.addcmul(product, dY, dS) - sigma * product.mean(1, keepdim=True)
    a, c = (keep * away).unsqueeze(1), ((target / Y)[:, :l] - keep * r.s).unsqueeze(1)
    v1, y1 = (part.squeeze(1) for part in reduced(a, c))
    d_tau, dY, dS, worst = whole(v1, y1, target, keep * r.tau)
    dv, length = torch.addcmul(v1, d_tau, along_v), NEAREST * worst.neg().clamp(min=NEAREST).reciprocal()
    if not math.isfinite((dv.sum() + length.sum()).item()):
        broken = ~torch.isfinite(length + dv.sum(1, keepdim=True))
        dv, dY, dS, length = (torch.where(broken, 0.0, part) for part in (dv, dY, dS, length))
    return dv, dY, dS, length


def _signed(values: Tensor, n: int) -> Tensor:
    return values[:, :n].sum(1, keepdim=True) - values[:, n:].sum(1, keepdim=True)


def _factorise(form: _Form, w: Tensor, K: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """LU of K (B, N, N), made quasidefinite by `shift`, in K's own memory: fresh pages cost more than the arithmetic."""
    _assemble(form, w, K, shift)
    # K is symmetric, and its transpose in the column order that LAPACK wants.
    lu = K.mT
    pivots, info = torch.empty(lu.shape[:2], dtype=torch.int32), torch.empty(len(lu), dtype=torch.int32)
    torch.linalg.lu_factor_ex(lu, out=(lu, pivots, info))
    if pivots.numel() and int(pivots.min()) < 1:  # see `lu_factor`
        _assemble(form, w, K, shift)
        with one_thread():
            torch.linalg.lu_factor_ex(lu, out=(lu, pivots, info))
    return lu, pivots


def _assemble(form: _Form, w: Tensor, K: Tensor, shift: float) -> None:
    K.copy_(form.base)
    form.add_weighted(K, w)
    diagonal = K.diagonal(dim1=1, dim2=2)
    if form.n == K.shape[1]:
        diagonal += shift
    else:
        diagonal[:, : form.n] += shift
        diagonal[:, form.n :] -= shift


def _start(form: _Form, K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The point with w = 1, y + s = 0, both shifted inside."""
    lu, pivots = _factorise(form, torch.ones_like(form.b), K, START_SHIFT)
    right = form.At_times(form.b.unsqueeze(1)).squeeze(1) - form.c
    v = torch.linalg.lu_solve(lu, pivots, right.unsqueeze(2)).squeeze(2)
    y = form.A_times(v.unsqueeze(1)).squeeze(1) - form.b
    one = v.new_ones(len(v), 1)
    return v, torch.cat([_inside(y), one], 1), torch.cat([_inside(-y), one], 1)


def _inside(v: Tensor) -> Tensor:
    """v >= its typical size, at least 1; what is as good as infinite does not count."""
    if not v.shape[1]:
        return v
    return torch.maximum(v, v.clamp(0.0, LARGE).mean(1, keepdim=True).clamp(min=1.0))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1, keepdim=True)


def _largest(values: Tensor) -> Tensor:
    return values.abs().amax(1, keepdim=True) if values.shape[1] else values.new_zeros(len(values), 1)
