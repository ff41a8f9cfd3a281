"""The generic path: parameters -> Data -> solver -> polish -> (x, y, optimal value), and the adjoint back.

Everything here is float64 on the host. Rows that failed are left out of all batched work and never reach the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convlayer.adjoint import Zero, adjoint, polish, pull_back
from convlayer.canon import Canonical
from convlayer.kkt import prefers_dense
from convlayer.once import Once
from convlayer.program import DENSE_ENTRIES, Data, Operators, Program
from convlayer.residual import Scaling, normalise, recentre
from convlayer.solution import Status
from convlayer.solvers.solver import Iterate, Solver, solve_batch
from convlayer.threads import one_thread

INACCURATE = 1e-4  # a relative residual above this is no solution
SENSITIVE = 3e-8  # a relative error of x, estimated by one more Newton step, above this is not called solved
MEANINGLESS = 1e-2  # above this it is no solution at all
RUNAWAY = 1e6  # nor is an x that many times the size which the data suggest solved: it may be on its way to infinity
SHARED_WORK = 5e8  # cubed unknowns of dense systems, over the batch, from which more than one torch thread pays
CERTIFICATE = 1e-4  # relative error of a certificate of infeasibility or unboundedness, in units where x is of size one


def _threads_for(program: Program, batch: int) -> AbstractContextManager:
    """One torch thread for work that is too small to share: where other processes hold the cores, waiting for a second thread
    at every small operation costs a hundred times the operation."""
    size = program.n + min(program.m, program.n)
    large = prefers_dense(program) and batch * size**3 > SHARED_WORK
    return nullcontext() if large else one_thread()


@dataclass(eq=False)
class Call:
    """One call of the path: its options, and what comes back beside the differentiable outputs."""

    canonical: Canonical
    solver: Solver
    tolerance: float
    options: Mapping[str, Any]
    executor: Executor | None
    bad: Tensor  # (B,) rows whose parameters are not to be used
    start: tuple[Tensor, Tensor, Tensor] | None  # canonical (x, s, y), (B, .) each
    differentiable: bool
    on_degenerate: Callable[[Tensor], None]  # called at backward with the rows that are differentiated by rule
    status: Tensor = field(init=False)
    iterations: Tensor = field(init=False)
    residual: Tensor = field(init=False)
    degenerate: Tensor = field(init=False)
    iterate: tuple[Tensor, Tensor, Tensor] = field(init=False)
    blank: Tensor = field(init=False)  # (B,) rows without any iterate


@dataclass(frozen=True, eq=False)
class Piece:
    """Some rows of the batch with the zero found for them."""

    rows: Tensor
    zero: Zero
    scaling: Scaling
    keep: Tensor  # which of `rows`, by position, this is the answer for

    def only(self, wanted: Tensor) -> Piece:
        """The piece as the answer for fewer rows, wanted (all rows,)."""
        return replace(self, keep=self.keep[wanted[self.rows[self.keep]]])


def evaluate(canonical: Canonical, thetas: list[np.ndarray]) -> dict[str, Tensor]:
    """Canonical parameter entries, (B or 1, k) each -> values of P, q, A, b, d, (B or 1, .) each: shared stays shared."""
    values = {name: constant[None, :] for name, constant in canonical.constant.items()}
    for theta, parameter in zip(thetas, canonical.parameters, strict=True):
        for name, block in parameter.maps.items():
            values[name] = values[name] + np.asarray(block @ theta.T).T
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in values.items()}


class Solve(torch.autograd.Function):
    """(call, *canonical parameter entries) -> x (B, n), y (B, m), value (B,). Failed rows hold the solver's last iterate, or zeros."""

    @staticmethod
    def forward(ctx, call: Call, *thetas: Tensor):
        batch = len(call.bad)
        with _threads_for(call.canonical.program, batch):
            return Solve._forward(ctx, call, batch, thetas)

    @staticmethod
    def _forward(ctx, call: Call, batch: int, thetas: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        values = evaluate(call.canonical, [theta.detach().numpy() for theta in thetas])
        data = Data(call.canonical.program, values["P"], values["q"], values["A"], values["b"])
        x, s, y, pieces = _solve(call, data, values["d"], batch)
        value = _objective(Operators(data, dense=False), x, values["d"])
        ctx.call, ctx.data, ctx.pieces = call, data, pieces
        ctx.sizes = [len(theta) for theta in thetas]
        # A failed row's iterate may hold anything; behind the outputs its zero cotangents must stay zeros.
        call.blank |= ~(torch.isfinite(x).all(1) & torch.isfinite(y).all(1) & torch.isfinite(value))
        x[call.blank], y[call.blank], value[call.blank] = 0.0, 0.0, 0.0
        ctx.save_for_backward(x, y, *thetas)
        # Detached: an output held here would hold its own graph, and neither would ever be freed.
        call.iterate = (x.detach(), s, y.detach())
        return x, y, value

    @staticmethod
    def backward(ctx, x_bar: Tensor, y_bar: Tensor, value_bar: Tensor):
        x, y, *thetas = ctx.saved_tensors
        with torch.no_grad(), _threads_for(ctx.call.canonical.program, len(x)):
            bars = Solve._adjoint(ctx, x_bar, y_bar, value_bar, x, y)
        if torch.is_grad_enabled():
            # create_graph=True: a second derivative through here would come out as silent zeros.
            sources = [t for t in (*thetas, x_bar, y_bar, value_bar) if t.requires_grad]
            bars = [None if bar is None else Once.apply(bar, *sources) for bar in bars]
        return None, *bars

    @staticmethod
    def _adjoint(ctx, x_bar: Tensor, y_bar: Tensor, value_bar: Tensor, x: Tensor, y: Tensor) -> list[Tensor | None]:
        w, u = torch.zeros_like(x), torch.zeros_like(y)
        for piece in ctx.pieces:
            rows, scaling = piece.rows, piece.scaling
            found = scaling.leave_adjoint(*adjoint(piece.zero, *scaling.enter_cotangents(x_bar[rows], y_bar[rows])))
            w[rows[piece.keep]], u[rows[piece.keep]] = (part[piece.keep] for part in found)
        _report(ctx.call, ctx.pieces, x_bar, y_bar)
        # A failed row that the loss does use has no derivative: NaN, not zero.
        failed = ctx.call.status >= Status.INFEASIBLE
        used = (x_bar != 0).any(1) | (y_bar != 0).any(1) | (value_bar != 0)
        w[failed & used] = torch.nan
        u[failed & used] = torch.nan
        return _parameters_bar(ctx, w, u, value_bar.unsqueeze(1), x, y)


def _parameters_bar(ctx, w: Tensor, u: Tensor, value_bar: Tensor, x: Tensor, y: Tensor) -> list[Tensor | None]:
    canonical = ctx.call.canonical
    wanted = [k for k, need in enumerate(ctx.needs_input_grad[1:]) if need]
    touched = {name for k in wanted for name in canonical.parameters[k].maps}
    moving = {
        name: torch.from_numpy(canonical.moving[name] if name in touched else canonical.moving[name][:0])
        for name in ("P", "A")
    }
    # The optimal value's derivative is that of the Lagrangian: half of it has the form of an adjoint of its own.
    bars = pull_back(ctx.data, moving, x, y, w - value_bar * x / 2, u - value_bar * y / 2)
    bars = {**bars, "q": bars["q"] + value_bar * x / 2, "b": bars["b"] - value_bar * y / 2, "d": value_bar}
    result: list[Tensor | None] = [None] * len(ctx.sizes)
    for k in wanted:
        total = np.zeros((ctx.sizes[k], len(canonical.parameters[k].gather)))
        for name, block in canonical.parameters[k].transposes.items():
            bar = bars[name] if ctx.sizes[k] == len(x) else bars[name].sum(0, keepdim=True)
            total += np.asarray(block @ bar.numpy().T).T
        result[k] = torch.from_numpy(total)
    return result


def _solve(call: Call, data: Data, d: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor, list[Piece]]:
    program = data.program
    x, s, y = (torch.zeros(batch, k, dtype=torch.float64) for k in (program.n, program.m, program.m))
    finite = torch.ones(1, dtype=torch.bool)
    for part in (data.P, data.q, data.A, data.b, d):
        if not math.isfinite(part.sum().item()):
            finite = finite & torch.isfinite(part).all(1)
    good = torch.nonzero(~call.bad & finite).flatten()
    call.status = torch.full((batch,), int(Status.BAD_INPUT))
    call.iterations = torch.zeros(batch, dtype=torch.int64)
    call.residual = torch.full((batch,), torch.nan, dtype=torch.float64)
    call.degenerate = torch.zeros(batch, dtype=torch.bool)
    call.blank = torch.ones(batch, dtype=torch.bool)
    call.blank[good] = False
    if not len(good):
        return x, s, y, []

    chosen = data if len(good) == batch else data.rows(good)
    scaled, scaling = normalise(chosen.widen(len(good)))
    found = _attempt(call, scaled, scaling, call.tolerance, _start(call, scaling, good))
    unsettled = (found.status == Status.INACCURATE) | (found.status == Status.NOT_CONVERGED)
    if call.solver.finest is not None and bool(unsettled.any()):
        # What the polish could not settle may need a sharper start: a face is not told from its neighbours yet.
        again = torch.nonzero(unsettled).flatten()
        found = found.improved(again, _attempt(call, scaled.rows(again), scaling.rows(again), call.solver.finest, None))
    call.status[good], call.iterations[good] = found.status, found.iterations
    call.residual[good], call.degenerate[good] = found.residual, found.degenerate
    x[good], s[good], y[good] = found.x, found.s, found.y
    return x, s, y, [replace(piece, rows=good[piece.rows]) for piece in found.pieces]


@dataclass(frozen=True, eq=False)
class _Found:
    """What an attempt found, row by row, in the original units."""

    x: Tensor
    s: Tensor
    y: Tensor
    status: Tensor
    iterations: Tensor
    residual: Tensor
    degenerate: Tensor
    pieces: list[Piece]

    def improved(self, rows: Tensor, other: _Found) -> _Found:
        """With another attempt at some rows, where it did better."""
        better = (other.status < self.status[rows]) | (
            (other.status == self.status[rows]) & (other.residual < self.residual[rows])
        )
        won, mine = rows[better], torch.ones(len(self.status), dtype=torch.bool)
        mine[won] = False
        kept = {
            name: getattr(self, name).index_copy(0, won, getattr(other, name)[better])
            for name in ("x", "s", "y", "status", "residual", "degenerate")
        }
        pieces = [piece.only(mine) for piece in self.pieces]
        pieces += [replace(piece.only(better), rows=rows[piece.rows]) for piece in other.pieces]
        iterations = self.iterations.index_add(0, rows, other.iterations)
        return _Found(**kept, iterations=iterations, pieces=[piece for piece in pieces if len(piece.keep)])


def _attempt(call: Call, data: Data, scaling: Scaling, tolerance: float, start: list[Iterate] | None) -> _Found:
    """Solve normalised data, check certificates, polish, judge."""
    rows = data.batch
    iterates = solve_batch(call.solver, data, tolerance, call.options, start, call.executor)
    point = [
        torch.from_numpy(np.array([getattr(it, name) for it in iterates], dtype=np.float64).reshape(rows, -1))
        for name in ("x", "s", "y")
    ]
    usable = torch.isfinite(torch.cat(point, 1)).all(1)
    status = torch.tensor([int(it.status) for it in iterates])
    status[~usable & (status < Status.INFEASIBLE)] = int(Status.NOT_CONVERGED)
    status = _certified(data, status, *point)
    x, s, y = scaling.leave(*point)
    residual, degenerate = torch.full((rows,), torch.nan, dtype=x.dtype), torch.zeros(rows, dtype=torch.bool)

    pieces = []
    refine = torch.nonzero(usable & (status != Status.INFEASIBLE) & (status != Status.UNBOUNDED)).flatten()
    dense = prefers_dense(data.program)
    for part in refine.split(_rows_at_once(data.program, dense)) if len(refine) else ():
        everything = len(part) == rows
        piece_data, piece_scaling = (data, scaling) if everything else (data.rows(part), scaling.rows(part))
        piece_point = point if everything else [values[part] for values in point]
        piece_data, inner = recentre(piece_data, piece_scaling, piece_point[0], piece_point[2])
        started = inner.enter(*piece_scaling.leave(*piece_point))
        zero = polish(Operators(piece_data, dense), *started, call.canonical.visible, inner.c)
        status[part] = _verdict(zero, call.tolerance)
        size = (zero.x * (piece_scaling.rho / inner.rho)).abs()
        for bound, verdict in ((RUNAWAY, Status.INACCURATE), (RUNAWAY**1.5, Status.NOT_CONVERGED)):
            runaway = (size > bound).any(1) & (status[part] < verdict)
            status[part[runaway]] = int(verdict)
        if inner.unbounded is not None:
            # A bound that was taken for infinite and is active after all: this is not the solution.
            status[part[(inner.unbounded & (zero.y > 0)).any(1)]] = int(Status.NOT_CONVERGED)
        residual[part], degenerate[part] = zero.residual, zero.degenerate
        x[part], s[part], y[part] = inner.leave(zero.x, zero.s, zero.y)
        if call.differentiable:
            pieces.append(Piece(part, zero, inner, torch.arange(len(part))))
    return _Found(x, s, y, status, torch.tensor([it.iterations for it in iterates]), residual, degenerate, pieces)


def _certified(data: Data, status: Tensor, x: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """A claim of infeasibility or unboundedness stands if its certificate does; otherwise the row has merely not converged.

    Infeasible:  A'y = 0, b'y < 0, y in K*: no x of moderate size is feasible.
    Unbounded:   Px = 0, Ax + s = 0, q'x < 0, s in K: a ray along which the objective falls.
    """
    claimed = torch.nonzero((status == Status.INFEASIBLE) | (status == Status.UNBOUNDED)).flatten()
    if not len(claimed):
        return status
    part = data.rows(claimed).widen(len(claimed))
    operators, cones = Operators(part, dense=False), data.program.cones
    x, y = x[claimed].nan_to_num(0.0), cones.project_dual(y[claimed].nan_to_num(0.0))
    s = cones.project(-operators.A(x))
    gain, ray_gain = -(part.b * y).sum(1), -(part.q * x).sum(1)
    # b'y = s'y + x'A'y: the certificate excludes every x up to gain / |A'y|, which must be far beyond the data's size.
    size = torch.where(part.b.abs() < 1e7, part.b.abs(), 0.0).sum(1).clamp(min=1.0)
    infeasible = operators.At(y).abs().sum(1) * size <= CERTIFICATE * gain
    error = torch.cat([operators.P(x), operators.A(x) + s], 1).abs().amax(1)
    unbounded = error <= CERTIFICATE * ray_gain
    proven = torch.where(status[claimed] == Status.INFEASIBLE, infeasible & (gain > 0), unbounded & (ray_gain > 0))
    status = status.clone()
    status[claimed[~proven]] = int(Status.NOT_CONVERGED)
    return status


def _verdict(zero: Zero, tolerance: float) -> Tensor:
    """What the polished residual says, whatever the solver said: it is the KKT residual of the point in hand.

    A problem so ill-conditioned that the residual's rounding moves the solution is not called solved either.
    """
    judged = torch.where(zero.residual <= INACCURATE, int(Status.INACCURATE), int(Status.NOT_CONVERGED))
    solved = (zero.residual <= tolerance) & (zero.error <= max(SENSITIVE, 10 * tolerance))
    judged = torch.where(solved, int(Status.SOLVED), judged)
    return torch.where(zero.error <= MEANINGLESS, judged, int(Status.NOT_CONVERGED))


def _rows_at_once(program: Program, dense: bool) -> int:
    """So many rows that their matrices stay affordable."""
    a_row = (program.n + program.m) * program.n if dense else 4 * program.nnz
    return max(1, DENSE_ENTRIES // max(1, a_row))


def _start(call: Call, scaling: Scaling, good: Tensor) -> list[Iterate] | None:
    if call.start is None:
        return None
    x, s, y = scaling.enter(*(part[good] for part in call.start))
    rows = zip(x.numpy(), s.numpy(), y.numpy(), strict=True)
    return [Iterate(x_k, s_k, y_k, Status.SOLVED, 0) for x_k, s_k, y_k in rows]


def _objective(operators: Operators, x: Tensor, d: Tensor) -> Tensor:
    return (x * (operators.P(x) / 2 + operators.data.q)).sum(1) + d.squeeze(1)


def _report(call: Call, pieces: list[Piece], x_bar: Tensor, y_bar: Tensor) -> None:
    """Tell the layer which rows with a cotangent were differentiated by rule."""
    for piece in pieces:
        call.degenerate[piece.rows[piece.keep]] |= piece.zero.system.singular[
            piece.keep
        ]  # a solve may have flagged more
    used = (x_bar != 0).any(1) | (y_bar != 0).any(1)
    rows = torch.nonzero(call.degenerate & used).flatten()
    if len(rows):
        call.on_degenerate(rows)
