"""A batched, dense, primal-dual interior point for cone programs: all rows of a batch at once, in torch, on any device.

    minimise 1/2 x'Px + q'x   subject to   Cx + s = b,   s = 0 in the equalities,  s in K elsewhere         dual z

Homogeneous embedding, y being z in the inequalities, u in the equalities: a solution is x / tau, z / tau, s / tau with tau > 0;
where there is none, kappa > 0 instead, and x or z is the certificate.

    Px + C'z + q tau = 0,   Cx + s - b tau = 0,   q'x + b'z + x'Px / tau + kappa = 0
    s on the central path of y at mu,   tau kappa = mu,   mu -> 0

Newton's system is, with H y = s the scaling of `scalings` and `barriers` (y / s is H^-1 in the orthant), A the inequalities and
E the equalities,

    K = [ P + A'H^-1 A   E' ;  E   0 ]    or, with P definite, few rows and symmetric cones,    C P^-1 C' + H,

which is the first form for the dual, a quadratic program in z alone: one iteration serves both. K is factored by LU, which
in batches of such sizes costs no more than Cholesky's method and a Schur complement, and takes any semidefinite P.

H^-1 is of size 1 / mu where a cone is active, and K is no better. What keeps the digits: nothing is put through H^-1 whose image
is known (H^-1 s = y, and the corrector's); a slack's change is read off feasibility, not off y's; products with H are taken between
scaled vectors W^-T h; and the change of tau comes from terms that vanish with the residuals.

Rows:     a row ends with its solution, its certificate, or where it stalls with its best point, INACCURATE or NOT_CONVERGED.
Cost:     an iteration is 2 l n^2 + 2/3 (n + p)^3 flops a row (l inequalities, p equalities), less where A has few entries, or
          2/3 (l + p)^3 by the dual; some 150 torch calls for the orthant, 100 to 250 more for each kind of cone.
Sources:  Mehrotra (1992); Andersen and Ye (1999); Goulart and Chen (2024).
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from convlayer.autodiff.threads import one_thread
from convlayer.conic.program import Data, Program, dense_A, dense_P, take_rows
from convlayer.progress import current
from convlayer.solution import Status, is_unsettled
from convlayer.solvers.product import CONES, Cones, Pairs, RowOrder, ScaledPoint, Weight
from convlayer.solvers.solver import BatchSolver, Points, fits_densely, interrupted

# Finished rows leave the batch when the others are at most this share of it.
COMPACT = 0.875
# A slack above this no longer counts for the starting point's size.
LARGE = 1e3
# Where a look waits for the device, so many steps lie between two looks at whether rows are done.
PATIENCE = 4
# A row that has not converged ends after so many iterations, where the user says nothing else.
ITERATIONS = 50
# A program takes about so many iterations, and one of them so many seconds; each row of a batch adds
# so many to an iteration, and its flops at such a rate: fitted to measurements on two cores.
STEPS, STEP, ROW_STEP, RATE = 10, 4.5e-4, 8e-6, 1e10


@dataclass(frozen=True)
class _Shifts:
    """What is added to K's diagonal against singularity. It is proximal: it slows the last digits
    down, and moves no solution."""

    # In the orthant alone it is so small.
    orthant: float = 1e-10
    # With cones H^-1 is not diagonal, and blurs the rest of K: it is at least so much,
    cones: float = 1e-8
    # and at least this share of K's largest entry, since LU sees nothing of what is smaller.
    blur: float = 1e-16
    # The starting point is to be of moderate size.
    start: float = 1e-4


@dataclass(frozen=True)
class _ByDual:
    """When the dual is solved in the program's place."""

    # P's Cholesky factor has no pivot below this share of its largest.
    pivots: float = 1e-3
    # P^-1 makes nothing of the right-hand side larger than this.
    growth: float = 1e2
    # A batched product does so many flops in the time of one of a batched LU; measured.
    product_rate: float = 3


@dataclass(frozen=True)
class _Lengths:
    """How far a step goes."""

    # It goes at most this share of the way to the boundary.
    nearest: float = 0.99
    # After a step shorter than this, where cones are not symmetric,
    jammed: float = 0.1
    # sigma is at least so much, which brings the next one back to the central path.
    centring: float = 0.5


@dataclass(frozen=True)
class _Endings:
    """When a row has ended, and as what; errors are relative."""

    # Where kappa is above this many tau, a certificate is looked for,
    doubt: float = 10.0
    # and may have this error,
    certificate: float = 1e-6
    # or, where kappa is above so many tau,
    sure: float = 1e8
    # this one.
    loose: float = 5e-5
    # Where kappa is above this many tau and there is no certificate, there will be none.
    hopeless: float = 1e15
    # A point that is not accurate is still some solution up to this error.
    almost: float = 1e-5
    # A step shorter than this is its row's last.
    stalled: float = 1e-5
    # Where a point is worse than the best one by this factor, rounding has taken over.
    worse: float = 1e2


SHIFTS, BY_DUAL, LENGTHS, ENDINGS = _Shifts(), _ByDual(), _Lengths(), _Endings()


class InteriorPoint(BatchSolver):
    """Dense: for programs of up to some hundred variables and constraints."""

    name: ClassVar[str] = "interior_point"
    cones: ClassVar[frozenset[str] | None] = CONES
    manner: ClassVar[str] = "dense and batched"

    def check(self, program: Program, options: Mapping[str, Any]) -> None:
        self.check_cones(program)
        Ends.of(options)

    def fits(self, program: Program, batch: int) -> bool:
        return fits_densely(program, batch)

    def flops(self, program: Program) -> float:
        return STEPS * _step_flops(program)

    def seconds(self, program: Program, batch: int) -> float:
        """Of a linear or quadratic program."""
        if not program.is_polyhedral:
            return math.inf
        return STEPS * (STEP + batch * (ROW_STEP + _step_flops(program) / RATE))

    def solve_data(self, data: Data, tolerance: float, options: Mapping[str, Any]) -> Points:
        return solve_data(data, tolerance, Ends.of(options))


def _step_flops(program: Program) -> float:
    n, equalities = program.n, int((~program.inequalities).sum())
    return 2.0 * (program.m - equalities) * n**2 + (n + equalities) ** 3 / 1.5


def _blank(batch: int, n: int, m: int, device: torch.device) -> Points:
    x, s, y = (torch.zeros(batch, k, dtype=torch.float64, device=device) for k in (n, m, m))
    status = torch.full((batch,), int(Status.NOT_CONVERGED), device=device)
    return Points(x, s, y, status, torch.zeros_like(status), torch.zeros_like(status, dtype=torch.bool))


def _put(answer: Points, index: Tensor, other: Points) -> None:
    for kept, part in zip(answer, other, strict=True):
        if kept is not None and part is not None:
            kept[index] = part


@dataclass(frozen=True)
class Ends:
    """What ends rows that have not converged."""

    iterations: int = ITERATIONS
    deadline: float = math.inf  # by the monotonic clock, for the whole batch

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Ends:
        """From now on."""
        for option in options:
            if option not in ("max_iter", "time_limit"):
                raise TypeError(f"Solver interior_point has no option `{option}`. It has: tolerance, max_iter, time_limit.")
        limit, seconds = options.get("max_iter", ITERATIONS), options.get("time_limit", math.inf)
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise TypeError(f"interior_point's option `max_iter` cannot be {limit!r}: it is a positive integer.")
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
            raise TypeError(f"interior_point's option `time_limit` cannot be {seconds!r}: it is a positive number of seconds, for a batch.")
        return cls(limit, time.monotonic() + seconds)

    @property
    def late(self) -> bool:
        """Time is up, or nobody waits any more."""
        return (self.deadline < math.inf and time.monotonic() >= self.deadline) or interrupted()


UNLIMITED = Ends()


def solve_data(data: Data, tolerance: float, ends: Ends = UNLIMITED) -> Points:
    """Every row of `data`, on its device; rows fail on their own. P and A may be shared by the batch, and then are not copied."""
    program, rows, device = data.program, data.batch, data.q.device
    if not all(len(part) for part in (data.P, data.q, data.A, data.b)):
        return _blank(0, program.n, program.m, device)
    row_order = RowOrder.of(program)
    answer = _blank(rows, program.n, program.m, device)
    C, b, q = dense_A(data), data.b.expand(rows, -1), data.q.expand(rows, -1)
    order = None if row_order.order is None else row_order.order.to(device)
    if order is not None:
        C, b = C[:, order], b[:, order]
    parts, cones = (dense_P(data), q, C, b), row_order.cones()
    by_dual, factor = torch.zeros(rows, dtype=torch.bool, device=device), C
    if program.m and cones.symmetric and _dual_is_cheaper(program.n, row_order.free, program.m - row_order.free):
        by_dual, factor = _invertible(parts[0], q, C)
        by_dual = by_dual.expand(rows)
    index = torch.nonzero(by_dual).flatten()
    if len(index):
        mine = [_rows(part, index, rows) for part in (*parts, factor)]
        _put(answer, index, _by_dual(*mine, p=row_order.free, cones=cones, tolerance=tolerance, ends=ends))
    # Where the dual falters, as with a certificate that its squared matrix G blurs, the primal is tried.
    index = torch.nonzero(is_unsettled(answer.status) & ~answer.late).flatten()
    if len(index):
        mine = [_rows(part, index, rows) for part in parts]
        pairs = None if row_order.pairs is None else row_order.pairs.to(device)
        _put(
            answer, index, _by_primal(*mine, p=row_order.free, cones=cones, pairs=pairs, tolerance=tolerance, ends=ends)
        )
    if order is not None:
        s, y = torch.empty_like(answer.s), torch.empty_like(answer.y)
        s[:, order], y[:, order] = answer.s, answer.y
        answer = answer._replace(s=s, y=y)
    return answer if ends.late else answer._replace(stopped=None)  # without asking the device


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
    cones: Cones  # that the first rows of s lie in; the others are nonnegative

    def rows(self, index: Tensor):
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        chosen: dict[str, Any] = {name: take_rows(v, index) for name, v in parts.items() if isinstance(v, Tensor)}
        return replace(self, **chosen)

    @property
    def degree(self) -> int:
        """Of the barrier of s and kappa."""
        return self.cones.degree + self.b.shape[1] - self.cones.rows + 1

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
    def add_weighted(self, K: Tensor, weight: Weight) -> None:
        """K (B, N, N) += A'H^-1 A"""

    @abstractmethod
    def ray_error(self, v: Tensor) -> Tensor:
        """(B, 1) error of a ray as a certificate, beyond Px = 0 and Ax <= 0."""


@dataclass(frozen=True, eq=False)
class _Primal(_Form):
    """The program itself."""

    A: Tensor  # (B or 1, l, n)
    At: Tensor  # (B or 1, n, l) contiguous: a row times a matrix runs at twice the speed of a matrix times a column
    entries: Tensor  # (B or 1, nnz) of A, where `pairs` is there
    terms: Tensor  # (B or 1, terms) A[left] A[right]
    pairs: Pairs | None

    @classmethod
    def of(cls, P: Tensor, q: Tensor, C: Tensor, b: Tensor, p: int, cones: Cones, pairs: Pairs | None) -> _Primal:
        n, E, A, e = P.shape[1], C[:, :p], C[:, p:], b[:, :p]
        base, c, gradient = P, q, q
        if p:
            base = P.new_zeros(max(len(P), len(C)), n + p, n + p)
            base[:, :n, :n], base[:, n:, :n], base[:, :n, n:] = P, E, E.mT
            c, gradient = torch.cat([q, -e], 1), torch.cat([q, e], 1)
        curved, terms, entries = bool((P != 0).any()), C[:, :0, 0], C[:, :0, 0]
        if pairs is not None:
            entries, flat = A[:, pairs.rows, pairs.columns], C.flatten(1)
            terms = flat.index_select(1, pairs.left) * flat.index_select(1, pairs.right)
        At = A.mT.contiguous()
        return cls(base, c, b[:, p:], gradient, c.abs(), b[:, p:].abs(), n, curved, cones, A, At, entries, terms, pairs)

    def A_times(self, v: Tensor) -> Tensor:
        if self.pairs is not None:
            into = v.new_zeros(*v.shape[:2], self.A.shape[1])
            return into.index_add_(
                2, self.pairs.rows, v.index_select(2, self.pairs.columns) * self.entries.unsqueeze(1)
            )
        return _times(v[..., : self.n] if v.shape[2] > self.n else v, self.At)

    def At_times(self, y: Tensor) -> Tensor:
        if self.pairs is not None:
            into = y.new_zeros(*y.shape[:2], self.c.shape[1])
            return into.index_add_(
                2, self.pairs.columns, y.index_select(2, self.pairs.rows) * self.entries.unsqueeze(1)
            )
        found, p = _times(y, self.A), self.c.shape[1] - self.n
        return torch.constant_pad_nd(found, (0, p)) if p else found

    def add_weighted(self, K: Tensor, weight: Weight) -> None:
        if self.pairs is not None:
            self._add_terms(K, weight)
            return
        block, weighted = K[:, : self.n, : self.n], weight(self.At)
        if len(self.A) == 1:
            block += weighted @ self.A[0]
        else:
            block.baddbmm_(weighted, self.A)

    def _add_terms(self, K: Tensor, weight: Weight) -> None:
        pairs, n = self.pairs, self.n
        assert pairs is not None
        values = weight.flat().index_select(1, pairs.source) * self.terms
        if K.shape[1] == n:
            K.view(len(K), -1).index_add_(1, pairs.target, values)
            return
        block = K.new_zeros(len(K), n * n).index_add_(1, pairs.target, values)
        K[:, :n, :n] += block.view(-1, n, n)

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

    def add_weighted(self, K: Tensor, weight: Weight) -> None:
        weight.add_to(K[:, self.free :, self.free :])

    def ray_error(self, v: Tensor) -> Tensor:
        return _times(v.unsqueeze(1), self.C).squeeze(1).abs().sum(1, keepdim=True) * self.size


def _times(rows: Tensor, matrix: Tensor) -> Tensor:
    """(B, k, i) and (B or 1, i, j) -> (B, k, j)."""
    return torch.matmul(rows, matrix[0]) if len(matrix) == 1 else torch.bmm(rows, matrix)


def _dual_is_cheaper(n: int, p: int, l: int) -> bool:
    return (p + l) ** 3 <= (n + p) ** 3 + 3 * l * n**2 / BY_DUAL.product_rate


def _invertible(P: Tensor, q: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) rows whose P is so well conditioned that the dual can be solved in its place; Cholesky factor of P."""
    factor, info = torch.linalg.cholesky_ex(P)
    pivots = factor.diagonal(dim1=1, dim2=2)
    sound = (info == 0) & (pivots.amin(1) >= BY_DUAL.pivots * pivots.amax(1))
    return sound & (_largest(_times(_solve_P(factor, q).unsqueeze(1), C.mT).squeeze(1)).squeeze(1) <= BY_DUAL.growth), factor


def _rows(values: Tensor, index: Tensor, rows: int) -> Tensor:
    return values if len(index) == rows else take_rows(values, index)


def _solve_P(factor: Tensor, x: Tensor) -> Tensor:
    """(B or 1, n, n), (B, n) -> (B, n)"""
    if len(factor) == 1:
        return torch.cholesky_solve(x.mT, factor[0]).mT
    return torch.cholesky_solve(x.unsqueeze(2), factor).squeeze(2)


def _by_primal(
    P: Tensor,
    q: Tensor,
    C: Tensor,
    b: Tensor,
    *,
    p: int,
    cones: Cones,
    pairs: Pairs | None,
    tolerance: float,
    ends: Ends,
) -> Points:
    n = P.shape[1]
    v, s, y, *told = _embedding(_Primal.of(P, q, C, b, p, cones, pairs), tolerance, ends)
    return Points(v[:, :n], torch.constant_pad_nd(s, (p, 0)), torch.cat([v[:, n:], y], 1), *told)


def _by_dual(
    P: Tensor, q: Tensor, C: Tensor, b: Tensor, factor: Tensor, *, p: int, cones: Cones, tolerance: float, ends: Ends
) -> Points:
    """The same by the dual, with the Cholesky factor of P."""
    V = torch.linalg.solve_triangular(factor, C.mT, upper=False)
    G = V.mT @ V
    unconstrained = _solve_P(factor, q)
    h = b + _times(unconstrained.unsqueeze(1), C.mT).squeeze(1)
    zero = torch.zeros_like(b[:, p:])
    form = _Dual(G, h, zero, h, b.abs(), zero, h.shape[1], True, cones, p, C, _size(b))
    z, s, y, status, iterations, stopped = _embedding(form, tolerance, ends)
    z = torch.cat([z[:, :p], s], 1)
    x = -unconstrained - _solve_P(factor, _times(z.unsqueeze(1), C).squeeze(1))
    # A ray of the dual is the primal's certificate; the dual itself is never infeasible.
    status = torch.where(status == Status.UNBOUNDED, int(Status.INFEASIBLE), status)
    return Points(x, torch.constant_pad_nd(y, (p, 0)), z, status, iterations, stopped)


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


def _judge(form: _Form, r: _Residual, v: Tensor, Y: Tensor, S: Tensor, tolerance: float) -> tuple[Tensor, ...]:
    """(status (B, 1), its error (B, 1), scale (B, 1) by which the point is to be divided)"""
    n, tau, kappa = form.n, Y[:, -1:], S[:, -1:]
    x_size, y_size = torch.maximum(_largest(v[:, :n]), tau), torch.maximum(_largest(v[:, n:]), _largest(Y))
    dual = _largest(r.v[:, :n] / torch.addcmul(y_size, form.c_size[:, :n], tau))
    equal = _largest(r.v[:, n:] / torch.addcmul(x_size, form.c_size[:, n:], tau))
    primal = _largest(r.s / torch.addcmul(x_size, form.b_size, tau))
    error = torch.stack([dual, equal, primal, r.gap]).amax(0)
    status = torch.where(error <= ENDINGS.almost, int(Status.INACCURATE), int(Status.NOT_CONVERGED))
    status = torch.where(error <= tolerance, int(Status.SOLVED), status)
    scale = tau
    if not v.is_cpu or bool((kappa > ENDINGS.doubt * tau).any()):
        Px = 0.0 if r.Px is None else r.Px
        share = torch.where(kappa > ENDINGS.sure * tau, ENDINGS.loose, ENDINGS.certificate)
        qx = _dot(form.gradient[:, :n], v[:, :n])
        gain, ray_gain = qx - r.cv - r.by, -qx  # -(e'u + b'y), -q'x
        size = _size(torch.cat([form.c_size[:, n:], form.b_size], 1))
        infeasible = (r.homogeneous[:, :n] - Px).abs().sum(1, keepdim=True) * size <= share * gain
        errors = [_largest(r.homogeneous[:, n:]), _largest(r.Ax_s), form.ray_error(v)]
        errors += [] if r.Px is None else [_largest(r.Px)]
        unbounded = torch.stack(errors).amax(0) <= share * ray_gain
        infeasible, unbounded = (
            (kappa > ENDINGS.doubt * tau) & claim for claim in (infeasible & (gain > 0), unbounded & (ray_gain > 0))
        )
        status = torch.where(unbounded, int(Status.UNBOUNDED), status)
        status = torch.where(infeasible, int(Status.INFEASIBLE), status)
        scale = torch.where(infeasible | unbounded, torch.maximum(x_size, y_size), tau)
    return status, error, scale


def _embedding(form: _Form, tolerance: float, ends: Ends) -> list[Tensor]:
    """v (B, N), s and y (B, l), statuses, iterations and whether time ended it (B,), by Mehrotra's predictor and corrector.

    Y = (y, tau) and S = (s, kappa) are kept together: one cone. A row that has finished is recorded, and left to itself until
    enough of them are there for the batch to be closed up. On the host it is asked after every step whether a row has; elsewhere
    asking waits for all the work so far, and is done now and then.
    """
    batch, (N, l), device, limit = len(form.c), (form.c.shape[1], form.b.shape[1]), form.c.device, ends.iterations
    answer = [form.c.new_zeros(batch, k) for k in (N, l, l)]
    answer += [torch.full((batch,), value, device=device) for value in (int(Status.NOT_CONVERGED), limit, False)]
    live, running = torch.arange(batch, device=device), torch.ones(batch, 1, dtype=torch.bool, device=device)
    record, best, on_host = answer, form.c.new_full((batch, 1), torch.inf), device.type == "cpu"
    K = form.c.new_empty(batch, N, N)
    v, Y, S = _start(form, K)
    length = v.new_ones(batch, 1)
    work, finished = current(), 0
    near = ENDINGS.almost if form.cones.rows else tolerance  # with cones a later point may be worse, and every one is looked at
    for iteration in range(limit + 1):
        work.note(f"iteration {iteration}")
        r = _residual(form, v, Y, S)
        stuck = (length <= ENDINGS.stalled) | (S[:, l:] > ENDINGS.hopeless * Y[:, l:])
        late = ends.late
        if iteration == limit or late:
            stuck = torch.ones_like(stuck)
        lost = S[:, l:] > ENDINGS.doubt * Y[:, l:]
        close = ((r.gap <= near) | lost | stuck) & running
        some = not on_host or bool(close.any())
        if some:
            status, error, scale = _judge(form, r, v, Y, S, tolerance)
            done = (status < Status.NOT_CONVERGED) & (status != Status.INACCURATE)
            better = running & (done | (error < best))
            over = running & (done | stuck | ((best <= ENDINGS.almost) & (error > ENDINGS.worse * best)))
            best = torch.where(better, error, best)
            now = (v / scale, S[:, :l] / scale, Y[:, :l] / scale)
            record = [torch.where(better, new, old) for new, old in zip(now, record[:3], strict=True)] + [
                torch.where(mask.squeeze(1), new, old)
                for mask, new, old in zip(
                    (better, over), (status.squeeze(1), torch.full_like(live, iteration)), record[3:5], strict=True
                )
            ]
            if late:
                stopped = (running & ~done).squeeze(1)
                record[3] = record[3].masked_fill(stopped, int(Status.NOT_CONVERGED))
                record.append(stopped)
            running = running & ~over
            if work.watched:
                solved, finished = finished, batch - int(running.sum())
                work.advance(finished - solved)
            if late or on_host or iteration % PATIENCE == 0 or iteration == limit:
                left = torch.nonzero(running.squeeze(1)).flatten()
                if not len(left):
                    break
                if len(left) <= COMPACT * len(live):
                    _file(answer, live, record)
                    form, K = form.rows(left), K[: len(left)]
                    live, running, best, length, lost, v, Y, S = (
                        part[left] for part in (live, running, best, length, lost, v, Y, S)
                    )
                    record = [part[left] for part in record]
                    r = _Residual._make(None if part is None else part[left] for part in r)
        dv, dY, dS, length = _direction(form, r, v, Y, S, K, length, lost if some else None)
        # A row that stalls stays where it is: a direction that allows no step is rounding, and may be of any size.
        taken = length.masked_fill(length <= ENDINGS.stalled, 0.0)
        v, Y, S = (torch.addcmul(part, taken, step) for part, step in ((v, dv), (Y, dY), (S, dS)))
    _file(answer, live, record)
    return answer


def _file(answer: list[Tensor], live: Tensor, record: list[Tensor]) -> None:
    for kept, part in zip(answer, record, strict=False):  # whether time ended it, where it did
        kept[live] = part


@dataclass(frozen=True, eq=False)
class _Place:
    """A point with its scaling H, and K factored there.

    The first `cone_rows` lie in the cones of the form; in the others, the orthant, H^-1 is y / s.
    """

    form: _Form
    y: Tensor  # (B, l)
    s: Tensor  # (B, l)
    tau: Tensor  # (B, 1)
    kappa: Tensor  # (B, 1)
    orthant_y: Tensor  # (B, .) y of the orthant, then tau
    orthant_s: Tensor  # (B, .) s of the orthant, then kappa
    product: Tensor  # (B, l + 1) Y S
    point: ScaledPoint | None  # of the cones
    weight: Weight  # H^-1
    lu: Tensor
    pivots: Tensor
    shift: float | Tensor  # of K's diagonal

    @classmethod
    def of(cls, form: _Form, Y: Tensor, S: Tensor, K: Tensor) -> _Place:
        l, g = form.b.shape[1], form.cones.rows
        (y, tau), (s, kappa) = Y.split_with_sizes((l, 1), 1), S.split_with_sizes((l, 1), 1)
        orthant_y, orthant_s = (Y[:, g:], S[:, g:]) if g else (Y, S)
        point = form.cones.at(s[:, :g], y[:, :g]) if g else None
        weight = Weight(orthant_y[:, :-1] / orthant_s[:, :-1], point)
        factor = _factorise(form, weight, K, SHIFTS.cones if g else SHIFTS.orthant)
        return cls(
            form, y, s, tau, kappa, orthant_y, orthant_s, Y * S, point, weight, *factor
        )

    @property
    def cone_rows(self) -> int:
        return self.form.cones.rows

    def of_orthant(self, values: Tensor) -> Tensor:
        return values[:, self.cone_rows :] if self.cone_rows else values

    def reduced(self, a: Tensor, r_s: Tensor, ky: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(v, y, h) by K, each (B, k, .), of

            base v + A'y = a
            A v + r_s    = h = H (y + ky)

        ky = H^-1 ks is not left to H^-1, which may be of size 1 / mu while ky is of size one.
        """
        right = a + self.form.At_times(ky - self.weight(r_s))
        v = torch.linalg.lu_solve(self.lu, self.pivots, right.mT).mT
        h = self.form.A_times(v) + r_s
        return v, self.weight(h) - ky, h


@dataclass(frozen=True, eq=False)
class _Ray:
    """How v and y follow tau:  base v' + A'y' + c = 0,  A v' - b = H y'  (a slack follows by -H y').

    v and y are along themselves, divided by tau, and a turn, which is small near a solution: nothing
    cancels. Where no solution is to be expected (v, y) / tau is what cancels: the turn is the whole.
    """

    v: Tensor  # (B, N) v'
    y: Tensor  # (B, l) y'
    orthant_y: Tensor  # (B, .)
    h: Tensor | None  # (B, cone_rows) H y' in the cones
    scaled_h: Tensor | None  # (B, cone_rows) W^-T H y' = W y'
    bend: Tensor  # (B, N) the derivative of x'Px / tau along v', with the shift of K as curvature
    pivot: Tensor  # (B, 1) the Schur complement of tau
    common: Tensor  # (B, 1) what r leaves of tau's equation

    @staticmethod
    def sides(
        at: _Place, r: _Residual, lost: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """1 / tau, or zero where a solution is not expected; (a, r_s, ky) of the turn."""
        lead = at.tau.reciprocal()
        if lost is not None:
            lead = lead.masked_fill(lost, 0.0)
        a, r_s, ky = r.v * lead, r.s * lead, at.y * (2 * lead)
        if lost is not None:
            a = torch.where(lost, at.form.c, a)
            r_s = torch.where(lost, -at.form.b, r_s)
        return lead, a, r_s, ky

    @classmethod
    def of(
        cls,
        at: _Place,
        r: _Residual,
        v: Tensor,
        lead: Tensor,
        *,
        turn: Tensor,  # (B, N) of v
        turn_y: Tensor,  # (B, l)
        turn_h: Tensor,  # (B, l) H (turn_y + 2 y lead)
        scaled_turn_h: Tensor | None,
    ) -> _Ray:
        form, n, g = at.form, at.form.n, at.cone_rows
        along_v, along_y = torch.addcmul(turn, lead, v), torch.addcmul(turn_y, lead, at.y)
        mirrored = along_v
        if form.c.shape[1] > n:
            mirrored = torch.cat([along_v[:, :n], -along_v[:, n:]], 1)
        orthant_y = along_y[:, g:]
        # pivot = kappa / tau + |y'|_H^2 + |v' - v / tau|_P^2, and K's shift, as the ray's equations
        # hold with it. It is positive, whatever rounding says.
        least = at.kappa / at.tau
        in_orthant = (orthant_y.square() / at.weight.w).sum(1, keepdim=True)
        pivot = least + in_orthant + at.shift * _dot(along_v, turn)
        bend = (along_v + turn) * at.shift
        if form.curved:
            off = (along_v - v / at.tau)[:, :n]
            P_off = form.P_times(off)
            pivot = pivot + _dot(P_off, off)
            bend[:, :n].add_(P_off, alpha=2)
        h = scaled_h = None
        if at.point is not None and scaled_turn_h is not None:
            # W y' = W^-T H y': products with H lose no digits where W is taken apart, however large
            # H^-1 is.
            scaled_h = torch.addcmul(scaled_turn_h, lead, at.point.scaled, value=-1)
            h = torch.addcmul(turn_h[:, :g], lead, at.s[:, :g], value=-1)
            pivot = pivot + _dot(scaled_h, scaled_h)
        pivot = torch.maximum(pivot, least)
        # q'v + b'y by the ray's equations: of terms as small as the residuals.
        common = r.tau - _dot(mirrored, r.v) + _dot(along_y, r.s)
        return cls(along_v, along_y, orthant_y, h, scaled_h, bend, pivot, common)


class _Step(NamedTuple):
    """A change of the point. In the cones also in scaled terms, d_s = W^-T ds and d_y = W dy."""

    d_tau: Tensor  # (B, 1)
    dy: Tensor  # (B, l + 1) of y and tau
    orthant_ds: Tensor  # (B, .) of the orthant's s and kappa
    scaled_ds: Tensor | None  # (B, cone_rows)
    scaled_dy: Tensor | None
    worst: Tensor  # (B, 1) -1 / (longest step), but for cones that are not symmetric


def _step(
    at: _Place,
    ray: _Ray,
    v: Tensor,  # (B, N) v, y, h of `reduced`: the step while tau stays
    y: Tensor,
    h: Tensor,
    scaled_h: Tensor | None,  # W^-T h in the cones
    common: Tensor,  # (B, 1) what is to be taken away of tau's equation
    target: Tensor,  # (B, .) Y S in the orthant and tau, with what the corrector adds
    pull: Tensor | None = None,  # (B, .) what it adds, over y
    correction: Tensor | None = None,  # (B, cone_rows) and in the cones, scaled
) -> _Step:
    """tau's change, by the equation that is left for it, and the others by the ray.

        pivot dtau = common - target_tau / tau + y''(s + pull - 2h) - bend'v        in the orthant
                     - (W y')'(2 W^-T h - lambda - correction)                      in the cones

        dY = y + dtau y',   dS = -(target / Y + S / Y dY)
        d_s = -(W^-T h + dtau W y'),   d_y = -(lambda + correction + d_s)
    """
    g, slack = at.cone_rows, at.orthant_s[:, :-1]
    right = common
    if at.point is not None and scaled_h is not None and ray.scaled_h is not None:
        left = 2 * scaled_h - at.point.scaled
        right = right - _dot(ray.scaled_h, left if correction is None else left - correction)
    rest = torch.sub(slack if pull is None else slack + pull, h[:, g:], alpha=2)
    right = right - target[:, -1:] / at.tau + _dot(ray.orthant_y, rest) - _dot(ray.bend, v)
    d_tau = right / ray.pivot

    dY = torch.cat([torch.addcmul(y, d_tau, ray.y), d_tau], 1)
    relative_Y = at.of_orthant(dY) / at.orthant_y
    relative_S = -(target / at.of_orthant(at.product) + relative_Y)
    dS = relative_S * at.orthant_s
    worst = torch.minimum(relative_S, relative_Y).amin(1, keepdim=True)
    if at.point is None or scaled_h is None or ray.scaled_h is None:
        return _Step(d_tau, dY, dS, None, None, worst)

    aim = at.point.scaled if correction is None else at.point.scaled + correction
    d_s = -torch.addcmul(scaled_h, d_tau, ray.scaled_h)
    d_y = -(aim + d_s)
    return _Step(d_tau, dY, dS, d_s, d_y, at.point.worst(d_s, d_y, worst))


def _change_of_s(ray: _Ray, h: Tensor, d_tau: Tensor) -> Tensor:
    """(B, cone_rows) ds = -H (y + dtau y') as it is, not scaled."""
    assert ray.h is not None
    return -torch.addcmul(h[:, : ray.h.shape[1]], d_tau, ray.h)


def _direction(
    form: _Form,
    r: _Residual,
    v: Tensor,
    Y: Tensor,
    S: Tensor,
    K: Tensor,
    before: Tensor,  # (B, 1) the length of the last step
    lost: Tensor | None,  # (B, 1) where no solution is to be expected
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dv, dY, dS, length of the step): Newton's equations, for 1 - sigma of the residuals,

        base dv + A'dy + c dtau                    = -(1 - sigma) r_v
        A dv + ds - b dtau                         = -(1 - sigma) r_s
        d(q'v + b'y + x'Px / tau) + dkappa         = -(1 - sigma) r_tau
        H dy + ds                                  = -(s + H push)
        tau dkappa + kappa dtau                    = -(tau kappa + more)

    with sigma = push = more = 0 to predict.
    """
    g, symmetric = form.cones.rows, form.cones.symmetric
    at = _Place.of(form, Y, S, K)
    point = at.point

    # What follows tau, and the predictor while tau stays: by one call of the factor.
    lead, *turning = _Ray.sides(at, r, lost)
    a, r_s, ky = (torch.stack(pair, 1) for pair in zip((r.v, r.s, at.y), turning, strict=True))
    v1, y1, h1 = at.reduced(a.neg_(), r_s, ky)
    scaled_h, scaled_turn_h = (None, None)
    if point is not None:
        scaled_h, scaled_turn_h = point.reduce(h1[..., :g]).unbind(1)
    ray = _Ray.of(
        at,
        r,
        v,
        lead,
        turn=v1[:, 1],
        turn_y=y1[:, 1],
        turn_h=h1[:, 1],
        scaled_turn_h=scaled_turn_h,
    )

    # Predictor:  H dy + ds = -s,  Y dS + S dY = -Y S.
    product = at.of_orthant(at.product)
    ahead = _step(at, ray, v1[:, 0], y1[:, 0], h1[:, 0], scaled_h, ray.common, product)
    length = ahead.worst.neg().clamp(min=1).reciprocal()
    ds = None
    if point is not None and not symmetric:
        ds = _change_of_s(ray, h1[:, 0], ahead.d_tau)
        length = point.shorten(length.clamp(max=LENGTHS.nearest), ds, ahead.dy[:, :g])

    # Centring:  sigma = (1 - length)^3,  mu = (s'y + tau kappa) / degree.
    sigma = (1 - length) ** 3
    if not symmetric:
        jammed = before < LENGTHS.jammed
        sigma = torch.where(jammed, sigma.clamp(min=LENGTHS.centring), sigma)
    mu = at.product.sum(1, keepdim=True) / form.degree
    keep, sigma_mu = 1 - sigma, sigma * mu

    # Corrector, with what the predictor left out:  in the orthant  more = dY dS - sigma mu,
    # push = more / s;  in the cones  push = W^-1 correction, of lambda \ (d_s o d_y - sigma mu e).
    more = torch.addcmul(-sigma_mu, at.of_orthant(ahead.dy), ahead.orthant_ds)
    pull = more[:, :-1] / at.orthant_y[:, :-1]
    push, correction = pull * at.weight.w, None
    if point is not None and ahead.scaled_ds is not None and ahead.scaled_dy is not None:
        scaled = (ahead.scaled_ds, ahead.scaled_dy)
        correction = point.correction(*scaled, ds, ahead.dy[:, :g], sigma_mu)
        push = torch.cat([point.enlarge(correction), push], 1)
    sides = ((sigma - 1) * r.v, keep * r.s, at.y + push)
    found = at.reduced(*(side.unsqueeze(1) for side in sides))
    v1, y1, h = (part.squeeze(1) for part in found)
    if point is not None:
        scaled_h = point.reduce(h[:, None, :g]).squeeze(1)
    target = product + more
    step = _step(at, ray, v1, y1, h, scaled_h, keep * ray.common, target, pull, correction)

    # The step, and how much of it stays inside.
    dv = torch.addcmul(v1, step.d_tau, ray.v)
    dS = step.orthant_ds
    length = LENGTHS.nearest * step.worst.neg().clamp(min=LENGTHS.nearest).reciprocal()
    if point is not None:
        ds = _change_of_s(ray, h, step.d_tau)
        dS = torch.cat([ds, dS], 1)
        if not symmetric:
            length = point.shorten(length.clamp(max=LENGTHS.nearest), ds, step.dy[:, :g])
    return _unless_broken(step.worst, dv, step.dy, dS, length)


def _unless_broken(
    worst: Tensor, dv: Tensor, dY: Tensor, dS: Tensor, length: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Zero where a row is not finite: what is not anywhere in it is not so in its longest step."""
    if dv.is_cpu and math.isfinite(worst.sum().item()):
        return dv, dY, dS, length
    total = worst + length + dv.sum(1, keepdim=True) + dS.sum(1, keepdim=True)
    broken = ~torch.isfinite(total)
    dv, dY, dS, length = (torch.where(broken, 0.0, part) for part in (dv, dY, dS, length))
    return dv, dY, dS, length


def _factorise(form: _Form, weight: Weight, K: Tensor, least: float) -> tuple[Tensor, Tensor, float | Tensor]:
    """LU of K (B, N, N), made quasidefinite by a shift of at least `least`, and the shift, a number or (B, 1).

    In K's own memory: fresh pages cost more than the arithmetic.
    """
    shift = _assemble(form, weight, K, least)
    # K is symmetric, and its transpose in the column order that LAPACK wants.
    lu = K.mT
    pivots, info = (torch.empty(shape, dtype=torch.int32, device=K.device) for shape in (lu.shape[:2], lu.shape[:1]))
    torch.linalg.lu_factor_ex(lu, out=(lu, pivots, info))
    if lu.is_cpu and pivots.numel() and int(pivots.min()) < 1:  # see `lu_factor`
        _assemble(form, weight, K, least)
        with one_thread():
            torch.linalg.lu_factor_ex(lu, out=(lu, pivots, info))
    return lu, pivots, shift


def _assemble(form: _Form, weight: Weight, K: Tensor, least: float) -> float | Tensor:
    """Fills K and returns the shift of its diagonal."""
    K.copy_(form.base)
    form.add_weighted(K, weight)
    diagonal = K.diagonal(dim1=1, dim2=2)
    shift = (SHIFTS.blur * diagonal.amax(1, keepdim=True)).clamp(min=least) if form.cones.rows else least
    if form.n == K.shape[1]:
        diagonal += shift
    else:
        diagonal[:, : form.n] += shift
        diagonal[:, form.n :] -= shift
    return shift


def _start(form: _Form, K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The point with H = I, y + s = 0, both shifted inside; with cones that are not symmetric, the central point of each cone."""
    one = form.b.new_ones(len(form.b), 1)
    if not form.cones.symmetric:
        centre = torch.cat([form.cones.unit(form.b), torch.ones_like(form.b[:, form.cones.rows :]), one], 1)
        return torch.zeros_like(form.c), centre, centre.clone()
    point = form.cones.at_unit(form.b) if form.cones.rows else None
    lu, pivots, _ = _factorise(form, Weight(torch.ones_like(form.b[:, form.cones.rows :]), point), K, SHIFTS.start)
    right = form.At_times(form.b.unsqueeze(1)).squeeze(1) - form.c
    v = torch.linalg.lu_solve(lu, pivots, right.unsqueeze(2)).squeeze(2)
    y = form.A_times(v.unsqueeze(1)).squeeze(1) - form.b
    return v, torch.cat([_inside(y, form.cones), one], 1), torch.cat([_inside(-y, form.cones), one], 1)


def _inside(v: Tensor, cones: Cones) -> Tensor:
    """Every eigenvalue of v at least their typical size, at least 1; what is as good as infinite does not count."""
    if not v.shape[1]:
        return v
    if not cones.rows:
        return torch.maximum(v, _floor(v))
    values, back = cones.inside(v)
    return back(torch.maximum(values, _floor(values)))


def _floor(values: Tensor) -> Tensor:
    return values.clamp(0.0, LARGE).mean(1, keepdim=True).clamp(min=1.0)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1, keepdim=True)


def _largest(values: Tensor) -> Tensor:
    return values.abs().amax(1, keepdim=True) if values.shape[1] else values.new_zeros(len(values), 1)
