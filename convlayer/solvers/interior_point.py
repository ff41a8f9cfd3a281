"""A batched, dense, primal-dual interior point for cone programs: all rows of a batch at once, in
torch, on any device.

    minimise 1/2 x'Px + q'x   subject to   Cx + s = b,   s = 0 in the equalities,  s in K elsewhere         dual z

Homogeneous embedding, y being z in the inequalities, u in the equalities: a solution is x / tau, z
/ tau, s / tau with tau > 0; where there is none, kappa > 0 instead, and x or z is the certificate.

    Px + C'z + q tau = 0,   Cx + s - b tau = 0,   q'x + b'z + x'Px / tau + kappa = 0
    s on the central path of y at mu,   tau kappa = mu,   mu -> 0

Newton's system is, with H y = s the scaling of `scalings` and `barriers` (y / s is H^-1 in the
orthant), A the inequalities and E the equalities,

    K = [ P + A'H^-1 A   E' ;  E   0 ]    or, with P definite, few rows and symmetric cones,    C P^-1 C' + H,

which is the first form for the dual, a quadratic program in z alone: one iteration serves both. K
is factored by LU, which in batches of such sizes costs no more than Cholesky's method and a Schur
complement, and takes any semidefinite P.

H^-1 is of size 1 / mu where a cone is active, and K is no better. What keeps the digits: nothing is
put through H^-1 whose image is known (H^-1 s = y, and the corrector's); a slack's change is read
off feasibility, not off y's; products with H are taken between scaled vectors W^-T h; and the
change of tau comes from terms that vanish with the residuals.

Rows:     a row ends with its solution, its certificate, or where it stalls with its best point,
          INACCURATE or NOT_CONVERGED.
Cost:     an iteration is 2 l n^2 + 2/3 (n + p)^3 flops a row (l inequalities, p equalities), less
          where A has few entries, or 2/3 (l + p)^3 by the dual; some 150 torch calls for the
          orthant, 100 to 250 more for each kind of cone.
Sources:  Mehrotra (1992); Andersen and Ye (1999); Goulart and Chen (2024).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from convlayer.conic.program import Data, Program, dense_A, dense_P, take_rows
from convlayer.progress import current
from convlayer.solution import Status, is_unsettled
from convlayer.solvers.direction import direction, starting_point
from convlayer.solvers.forms import (
    DualForm,
    EmbeddingResidual,
    Form,
    PrimalForm,
    dot,
    embedding_residual,
    largest_entry,
    row_products,
)
from convlayer.solvers.product import CONES, Cones, Pairs, RowOrder
from convlayer.solvers.solver import BatchSolver, Points, fits_densely, interrupted

# Finished rows leave the batch when the others are at most this share of it.
COMPACT = 0.875
# Where a look waits for the device, so many steps lie between two looks at whether rows are done.
PATIENCE = 4
# A row that has not converged ends after so many iterations, where the user says nothing else.
ITERATIONS = 50
# A program takes about so many iterations, and one of them so many seconds; each row of a batch
# adds so many to an iteration, and its flops at such a rate: fitted to measurements on two cores.
STEPS, STEP, ROW_STEP, RATE = 10, 4.5e-4, 8e-6, 1e10


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


BY_DUAL, ENDINGS = _ByDual(), _Endings()


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
    return Points(
        x, s, y, status, torch.zeros_like(status), torch.zeros_like(status, dtype=torch.bool)
    )


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
                raise TypeError(
                    f"Solver interior_point has no option `{option}`. It has: tolerance, max_iter, time_limit."
                )
        limit, seconds = options.get("max_iter", ITERATIONS), options.get("time_limit", math.inf)
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise TypeError(
                f"interior_point's option `max_iter` cannot be {limit!r}: it is a positive integer."
            )
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
            raise TypeError(
                f"interior_point's option `time_limit` cannot be {seconds!r}: it is a positive number of seconds, for a batch."
            )
        return cls(limit, time.monotonic() + seconds)

    @property
    def late(self) -> bool:
        """Time is up, or nobody waits any more."""
        return (self.deadline < math.inf and time.monotonic() >= self.deadline) or interrupted()


UNLIMITED = Ends()


def solve_data(data: Data, tolerance: float, ends: Ends = UNLIMITED) -> Points:
    """Every row of `data`, on its device; rows fail on their own. P and A may be shared by the
    batch, and then are not copied."""
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
    if (
        program.m
        and cones.symmetric
        and _dual_is_cheaper(program.n, row_order.free, program.m - row_order.free)
    ):
        by_dual, factor = _invertible(parts[0], q, C)
        by_dual = by_dual.expand(rows)
    index = torch.nonzero(by_dual).flatten()
    if len(index):
        mine = [_rows(part, index, rows) for part in (*parts, factor)]
        _put(
            answer,
            index,
            _by_dual(*mine, p=row_order.free, cones=cones, tolerance=tolerance, ends=ends),
        )
    # Where the dual falters, as with a certificate that its squared matrix G blurs, the primal is
    # tried.
    index = torch.nonzero(is_unsettled(answer.status) & ~answer.late).flatten()
    if len(index):
        mine = [_rows(part, index, rows) for part in parts]
        pairs = None if row_order.pairs is None else row_order.pairs.to(device)
        _put(
            answer,
            index,
            _by_primal(
                *mine, p=row_order.free, cones=cones, pairs=pairs, tolerance=tolerance, ends=ends
            ),
        )
    if order is not None:
        s, y = torch.empty_like(answer.s), torch.empty_like(answer.y)
        s[:, order], y[:, order] = answer.s, answer.y
        answer = answer._replace(s=s, y=y)
    return answer if ends.late else answer._replace(stopped=None)  # without asking the device


def _dual_is_cheaper(n: int, p: int, l: int) -> bool:
    return (p + l) ** 3 <= (n + p) ** 3 + 3 * l * n**2 / BY_DUAL.product_rate


def _invertible(P: Tensor, q: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) rows whose P is so well conditioned that the dual can be solved in its place; Cholesky
    factor of P."""
    factor, info = torch.linalg.cholesky_ex(P)
    pivots = factor.diagonal(dim1=1, dim2=2)
    sound = (info == 0) & (pivots.amin(1) >= BY_DUAL.pivots * pivots.amax(1))
    return sound & (
        largest_entry(row_products(_solve_P(factor, q).unsqueeze(1), C.mT).squeeze(1)).squeeze(1)
        <= BY_DUAL.growth
    ), factor


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
    v, s, y, *told = _embedding(PrimalForm.of(P, q, C, b, p, cones, pairs), tolerance, ends)
    return Points(v[:, :n], torch.constant_pad_nd(s, (p, 0)), torch.cat([v[:, n:], y], 1), *told)


def _by_dual(
    P: Tensor,
    q: Tensor,
    C: Tensor,
    b: Tensor,
    factor: Tensor,
    *,
    p: int,
    cones: Cones,
    tolerance: float,
    ends: Ends,
) -> Points:
    """The same by the dual, with the Cholesky factor of P."""
    V = torch.linalg.solve_triangular(factor, C.mT, upper=False)
    G = V.mT @ V
    unconstrained = _solve_P(factor, q)
    h = b + row_products(unconstrained.unsqueeze(1), C.mT).squeeze(1)
    zero = torch.zeros_like(b[:, p:])
    form = DualForm(G, h, zero, h, b.abs(), zero, h.shape[1], True, cones, p, C, _size(b))
    z, s, y, status, iterations, stopped = _embedding(form, tolerance, ends)
    z = torch.cat([z[:, :p], s], 1)
    x = -unconstrained - _solve_P(factor, row_products(z.unsqueeze(1), C).squeeze(1))
    # A ray of the dual is the primal's certificate; the dual itself is never infeasible.
    status = torch.where(status == Status.UNBOUNDED, int(Status.INFEASIBLE), status)
    return Points(x, torch.constant_pad_nd(y, (p, 0)), z, status, iterations, stopped)


def _size(b: Tensor) -> Tensor:
    """(B, m) -> (B, 1) the sum of the right-hand sides that are not as good as infinite, at least
    1."""
    size = b.abs()
    return torch.where(size < 1e7, size, 0.0).sum(1, keepdim=True).clamp(min=1.0)


def _judge(
    form: Form, r: EmbeddingResidual, v: Tensor, Y: Tensor, S: Tensor, tolerance: float
) -> tuple[Tensor, ...]:
    """(status (B, 1), its error (B, 1), scale (B, 1) by which the point is to be divided)"""
    n, tau, kappa = form.n, Y[:, -1:], S[:, -1:]
    x_size, y_size = (
        torch.maximum(largest_entry(v[:, :n]), tau),
        torch.maximum(largest_entry(v[:, n:]), largest_entry(Y)),
    )
    dual = largest_entry(r.v[:, :n] / torch.addcmul(y_size, form.c_size[:, :n], tau))
    equal = largest_entry(r.v[:, n:] / torch.addcmul(x_size, form.c_size[:, n:], tau))
    primal = largest_entry(r.s / torch.addcmul(x_size, form.b_size, tau))
    error = torch.stack([dual, equal, primal, r.gap]).amax(0)
    status = torch.where(error <= ENDINGS.almost, int(Status.INACCURATE), int(Status.NOT_CONVERGED))
    status = torch.where(error <= tolerance, int(Status.SOLVED), status)
    scale = tau
    if not v.is_cpu or bool((kappa > ENDINGS.doubt * tau).any()):
        Px = 0.0 if r.Px is None else r.Px
        share = torch.where(kappa > ENDINGS.sure * tau, ENDINGS.loose, ENDINGS.certificate)
        qx = dot(form.gradient[:, :n], v[:, :n])
        gain, ray_gain = qx - r.cv - r.by, -qx  # -(e'u + b'y), -q'x
        size = _size(torch.cat([form.c_size[:, n:], form.b_size], 1))
        infeasible = (r.homogeneous[:, :n] - Px).abs().sum(1, keepdim=True) * size <= share * gain
        errors = [largest_entry(r.homogeneous[:, n:]), largest_entry(r.Ax_s), form.ray_error(v)]
        errors += [] if r.Px is None else [largest_entry(r.Px)]
        unbounded = torch.stack(errors).amax(0) <= share * ray_gain
        infeasible, unbounded = (
            (kappa > ENDINGS.doubt * tau) & claim
            for claim in (infeasible & (gain > 0), unbounded & (ray_gain > 0))
        )
        status = torch.where(unbounded, int(Status.UNBOUNDED), status)
        status = torch.where(infeasible, int(Status.INFEASIBLE), status)
        scale = torch.where(infeasible | unbounded, torch.maximum(x_size, y_size), tau)
    return status, error, scale


def _embedding(form: Form, tolerance: float, ends: Ends) -> list[Tensor]:
    """v (B, N), s and y (B, l), statuses, iterations and whether time ended it (B,), by Mehrotra's
    predictor and corrector.

    Y = (y, tau) and S = (s, kappa) are kept together: one cone. A row that has finished is
    recorded, and left to itself until enough of them are there for the batch to be closed up. On
    the host it is asked after every step whether a row has; elsewhere asking waits for all the work
    so far, and is done now and then.
    """
    batch, (N, l), device, limit = (
        len(form.c),
        (form.c.shape[1], form.b.shape[1]),
        form.c.device,
        ends.iterations,
    )
    answer = [form.c.new_zeros(batch, k) for k in (N, l, l)]
    answer += [
        torch.full((batch,), value, device=device)
        for value in (int(Status.NOT_CONVERGED), limit, False)
    ]
    live, running = (
        torch.arange(batch, device=device),
        torch.ones(batch, 1, dtype=torch.bool, device=device),
    )
    record, best, on_host = answer, form.c.new_full((batch, 1), torch.inf), device.type == "cpu"
    K = form.c.new_empty(batch, N, N)
    v, Y, S = starting_point(form, K)
    length = v.new_ones(batch, 1)
    work, finished = current(), 0
    # with cones a later point may be worse, and every one is looked at
    near = ENDINGS.almost if form.cones.rows else tolerance
    for iteration in range(limit + 1):
        work.note(f"iteration {iteration}")
        r = embedding_residual(form, v, Y, S)
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
            over = running & (
                done | stuck | ((best <= ENDINGS.almost) & (error > ENDINGS.worse * best))
            )
            best = torch.where(better, error, best)
            now = (v / scale, S[:, :l] / scale, Y[:, :l] / scale)
            record = [
                torch.where(better, new, old) for new, old in zip(now, record[:3], strict=True)
            ] + [
                torch.where(mask.squeeze(1), new, old)
                for mask, new, old in zip(
                    (better, over),
                    (status.squeeze(1), torch.full_like(live, iteration)),
                    record[3:5],
                    strict=True,
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
                    r = EmbeddingResidual._make(None if part is None else part[left] for part in r)
        dv, dY, dS, length = direction(form, r, v, Y, S, K, length, lost if some else None)
        # A row that stalls stays where it is: a direction that allows no step is rounding, and may
        # be of any size.
        taken = length.masked_fill(length <= ENDINGS.stalled, 0.0)
        v, Y, S = (torch.addcmul(part, taken, step) for part, step in ((v, dv), (Y, dY), (S, dS)))
    _file(answer, live, record)
    return answer


def _file(answer: list[Tensor], live: Tensor, record: list[Tensor]) -> None:
    for kept, part in zip(answer, record, strict=False):  # whether time ended it, where it did
        kept[live] = part
