"""The generic path: parameters -> Data -> solver -> polish -> (x, y, optimal value), and the adjoint back.

Everything here is float64, on the host, or on the parameters' device where the solver is a batched one. Rows that failed are left
out of all batched work and never reach the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from convlayer.autodiff.threads import cores, one_thread
from convlayer.conic.adjoint import SETTLED, Zero, adjoint, is_within, polish
from convlayer.conic.bounds import NO_BOUND, impossible, unlimited, without_infinity
from convlayer.conic.certificates import infeasible, unbounded
from convlayer.conic.elimination import Eliminated, Elimination
from convlayer.conic.kinks import Sides, judged
from convlayer.conic.kkt import Visible, prefers_dense
from convlayer.conic.program import DENSE_ENTRIES, Data, Operators, Program
from convlayer.conic.residual import (
    JUDGING,
    Scaling,
    largest,
    normalise,
    recentre,
    residual,
    term_sizes,
)
from convlayer.conic.smoothing import smoothed as smoothed_zero
from convlayer.declaration.canonical import Canonical
from convlayer.paths.cone_derivative import WHOLE_ENTRIES, ConeDerivative
from convlayer.paths.phase_one import nearest
from convlayer.paths.recession import recedes, steepest
from convlayer.solution import Cause, Status, is_unsettled
from convlayer.solvers.solver import Attempt, Inline, Points, in_threads, solve_batch

INACCURATE = 1e-4  # a relative residual above this is no solution
SENSITIVE = 3e-8  # a relative error of x, estimated by one more Newton step, above this is not called solved
UNSMOOTHED = 1e-9  # relative residual above which a point is not on the central path
MEANINGLESS = 1e-2  # above this it is no solution at all
NEGLIGIBLE = 1e-6  # weight of a term that only chooses among solutions
NOTHING = 1e-10  # a derivative below this, relative to solution and costs, is zero
RUNAWAY = 1e6  # nor is an x that many times the size which the data suggest solved: it may be on its way to infinity
FAINT = 1e-3  # multipliers that are noise are smaller, in units where multipliers or costs are of size one
BEYOND = 1e100  # a unit, or its inverse, that is larger: products of such numbers overflow
SQUARED = 1e-7  # a pivot below this, and a row is not trusted to the program without its auxiliary variables
ROUNDING = 1e-12  # a relative residual, or disagreement, below this says nothing
LARGE = 1_000_000  # numbers in dense matrices of a batch from which it is worked off in pieces,
PIECE = 500_000  # of about so many (4 MB)
FROM_START = -1  # the attempt before the first: Newton's method from a warm start, without a solver


@dataclass(eq=False)
class Call:
    """One call of the path: its options, and what comes back beside the differentiable outputs."""

    canonical: Canonical
    attempts: Sequence[Attempt]
    tolerance: float
    executor: Executor | None
    elimination: Elimination | None  # for the first attempt
    device: torch.device  # where the work is done
    bad: Tensor  # (B,) on the host: rows whose parameters are not to be used
    start: tuple[Tensor, ...] | None  # canonical (x, s, y), (B, .) each, NaN in rows that have none
    differentiable: bool
    judged: bool  # whether anybody asks which rows are degenerate
    selected: bool  # by a small proximal term, the solution of least norm
    precision: float  # relative, of the parameters: what their rounding may have moved apart is not told from what agrees
    gradient: Callable[[Call, ConeDerivative], ConeDerivative]  # the derivative to be taken in place of the exact one
    on_degenerate: Callable[
        [Tensor, Cause, Sequence[int]], None
    ]  # told of rows whose derivative wants a warning, and of parameters
    status: Tensor = field(init=False)
    iterations: Tensor = field(init=False)
    residual: Tensor = field(init=False)
    degenerate: Tensor = field(init=False)
    margin: Tensor = field(init=False)
    attempt: Tensor = field(init=False)  # (B,) which of the attempts gave the answer
    iterate: tuple[Tensor, Tensor, Tensor] = field(init=False)
    exact: ConeDerivative = field(init=False)
    blank: Tensor = field(init=False)  # (B,) rows without any iterate
    agreement: Agreement | None = field(init=False, default=None)
    stopped: Tensor | None = field(init=False, default=None)  # (B,) rows that a time limit ended; None: no row

    @cached_property
    def derivative(self) -> ConeDerivative:
        """Made when it is first needed."""
        return self.gradient(self, self.exact)


class Agreement(NamedTuple):
    """What is to be said of equalities that depend on each other, (B,) each, and y (B, m)."""

    apart: Tensor  # by how much they disagree, relative to their right-hand sides
    refuted: Tensor  # by more than rounding: there is no solution
    y: Tensor  # the proof of that


@dataclass(frozen=True, eq=False)
class Piece:
    """Some rows of the batch with the zero found for them."""

    rows: Tensor
    zero: Zero
    scaling: Scaling
    keep: Tensor  # which of `rows`, by position, this is the answer for
    eliminated: Eliminated | None = None  # the zero is of the program without these variables

    def adjoint(self, x_bar: Tensor, y_bar: Tensor) -> tuple[Tensor, Tensor]:
        """Cotangents of these rows -> (w, u), in the original units."""
        inner = (x_bar, y_bar) if self.eliminated is None else self.eliminated.enter_cotangents(x_bar, y_bar)
        w, u = self.scaling.leave_adjoint(*adjoint(self.zero, *self.scaling.enter_cotangents(*inner)))
        return (w, u) if self.eliminated is None else self.eliminated.leave_adjoint(w, u, x_bar, y_bar)

    def whole(self, batch: int) -> bool:
        """It is the answer for all rows of the batch, in order."""
        return len(self.keep) == len(self.rows) == batch

    def only(self, wanted: Tensor) -> Piece:
        """The piece as the answer for fewer rows, wanted (all rows,)."""
        return replace(self, keep=self.keep[wanted[self.rows[self.keep]]])


def evaluate(canonical: Canonical, entries: Sequence[Tensor], dense: bool, like: Tensor) -> tuple[Data, Tensor]:
    """Entries of the parameters, (B or 1, size) each -> the cone program's values and the offset d: shared stays shared."""
    maps = {**canonical.maps, **canonical.dense_maps} if dense else canonical.maps
    values = {name: mapping(entries, like) for name, mapping in maps.items()}
    if dense:
        n, m = canonical.program.n, canonical.program.m
        values["P"], values["A"] = (values[name].view(len(values[name]), k, n) for name, k in (("P", n), ("A", m)))
    d = values.pop("d")
    values["b"] = without_infinity(canonical.program, values["b"])
    return Data(canonical.program, **values), d


def _evaluated(canonical: Canonical, entries: Sequence[Tensor], dense: bool, device: torch.device) -> Data:
    with torch.no_grad(), one_thread():
        return _agreed(canonical, evaluate(canonical, entries, dense, torch.zeros((), dtype=torch.float64, device=device))[0])


def _agreed(canonical: Canonical, data: Data) -> Data:
    """With right-hand sides that agree where equalities depend on each other."""
    dependence = canonical.dependence
    return data if dependence is None else replace(data, b=dependence.agreed(data.b))


def _agreement(call: Call, entries: Sequence[Tensor], b: Tensor, batch: int) -> Agreement | None:
    """Whether the right-hand sides agree to the parameters' precision; None: they do, to rounding."""
    dependence = call.canonical.dependence
    if dependence is None:
        return None
    apart = dependence.disagreement(b, b.abs())
    precision = _precision(call)
    if bool((apart > precision).any()):
        apart = dependence.disagreement(b, call.canonical.sizes_of_b(entries).to(b.device))
    if not bool((apart > ROUNDING).any()):
        return None
    parts = apart, apart > precision, dependence.proof(b)
    return Agreement(*(part.expand(batch, *part.shape[1:]).cpu() for part in parts))


class Solve(torch.autograd.Function):
    """(call, *parameters (B or 1, *shape)) -> x (B, n), y (B, m), value (B,). Failed rows hold the solver's last iterate, or zeros.

    The derivative is a first one. Where a second is wanted the layer takes another way, and nothing arrives here.
    """

    @staticmethod
    def forward(ctx, call: Call, *thetas: Tensor):
        batch = len(call.bad)
        readers, program = call.canonical.parameters, call.canonical.program
        entries = [reader.read(theta.detach()) for reader, theta in zip(readers, thetas, strict=True)]
        dense = (
            call.elimination is None
            and prefers_dense(program)
            and batch * (program.n + program.m) * program.n <= WHOLE_ENTRIES
        )
        data, d = evaluate(call.canonical, entries, dense, torch.zeros((), dtype=torch.float64, device=call.device))
        call.agreement = _agreement(call, entries, data.b, batch)
        data = _agreed(call.canonical, data)
        x, s, y, pieces = _solve(call, data, d, batch)
        if call.canonical.bounds is not None:
            x = call.canonical.bounds.hold(x, data.b)
        value = _objective(Operators(data), x, d)
        # A failed row's iterate may hold anything; behind the outputs its zero cotangents must stay zeros.
        good = math.isfinite((x.sum() + y.sum() + value.sum()).item())
        if not good:
            call.blank |= ~(torch.isfinite(x).all(1) & torch.isfinite(y).all(1) & torch.isfinite(value))
        if bool(call.blank.any()):
            x[call.blank], y[call.blank], value[call.blank] = 0.0, 0.0, 0.0
        if call.agreement is not None:
            y = torch.where(call.agreement.refuted.to(y.device).unsqueeze(1), call.agreement.y.to(y.device), y)
        # Detached: an output held here would hold its own graph, and neither would ever be freed.
        call.iterate = x.detach(), s, y.detach()
        if call.differentiable:
            solution, adjoint = (call.iterate[0], call.iterate[2], value.detach()), partial(_adjoint_of, pieces)
            tell = partial(
                _report, call.canonical, call.selected, call.degenerate, call.on_degenerate, pieces, data.q, x.detach()
            )
            again = partial(_evaluated, call.canonical, entries, dense, call.device)
            call.exact = ConeDerivative(call.canonical, again, solution, call.iterate, adjoint, tell)
        ctx.call = call
        ctx.save_for_backward(*thetas)
        ctx.set_materialize_grads(False)
        return x, y, value

    @staticmethod
    def backward(ctx, *given: Tensor | None):
        thetas, call = ctx.saved_tensors, ctx.call
        if all(bar is None for bar in given):
            return None, *(None for _ in thetas)
        with torch.no_grad(), one_thread():
            bars = [
                torch.zeros_like(value) if bar is None else bar
                for bar, value in zip(given, call.exact.solution, strict=True)
            ]
            hopeless, failed = call.status >= Status.INFEASIBLE, None
            if bool(hopeless.any()):
                # A failed row that the loss does use has no derivative: NaN, not zero.
                used = (bars[0] != 0).any(1) | (bars[1] != 0).any(1) | (bars[2] != 0)
                failed = hopeless.to(used.device) & used
            needed = ctx.needs_input_grad[1:]
            found = call.derivative.cotangent(thetas, bars, needed, failed)
            wanted = [k for k, need in enumerate(needed) if need]
            result: list[Tensor | None] = [None] * len(thetas)
            for k, bar in zip(wanted, found, strict=True):
                result[k] = call.canonical.parameters[k].pull_back(bar, thetas[k])
            return None, *result


def _adjoint_of(pieces: list[Piece], x_bar: Tensor, y_bar: Tensor) -> tuple[Tensor, Tensor]:
    """(w (B, n), u (B, m)), zero in rows without a piece."""
    if len(pieces) == 1 and pieces[0].whole(len(x_bar)):
        return pieces[0].adjoint(x_bar, y_bar)
    w, u = torch.zeros_like(x_bar), torch.zeros_like(y_bar)

    def put(piece: Piece) -> None:
        rows, kept = piece.rows, piece.rows[piece.keep]
        w[kept], u[kept] = (part[piece.keep] for part in piece.adjoint(x_bar[rows], y_bar[rows]))

    if x_bar.device.type == "cpu":
        in_threads(put, pieces)
    else:
        for piece in pieces:
            put(piece)
    return w, u


def least_norm_weight(canonical: Canonical, thetas: Sequence[Tensor], device: torch.device) -> Tensor:
    """(B or 1,) of a proximal term, canonical's last parameter: NEGLIGIBLE where the row's solution and multipliers are of size one."""
    with torch.no_grad():
        none = torch.zeros(1, dtype=torch.float64, device=device)
        readers = zip(canonical.parameters, [*thetas, none], strict=True)
        data, _ = evaluate(canonical, [reader.read(theta) for reader, theta in readers], False, none)
        _, scaling = normalise(data)
        return (NEGLIGIBLE * scaling.rho / scaling.tau).squeeze(1).nan_to_num(NEGLIGIBLE)


def resolved(call: Call) -> Callable[[Data], tuple[Tensor, Tensor, Tensor]]:
    """Other data, solved as the call's were: (x, y, failed (B,))."""

    def solve(data: Data) -> tuple[Tensor, Tensor, Tensor]:
        batch = data.batch
        bad = torch.zeros(batch, dtype=torch.bool)
        again = replace(call, elimination=None, bad=bad, start=None, differentiable=False, judged=False)
        x, _, y, _ = _solve(again, data, data.q.new_zeros(1, 1), batch)
        return x, y, (again.status >= Status.INFEASIBLE).to(x.device)

    return solve


def smoothed(
    call: Call, exact: ConeDerivative, kappa: float
) -> tuple[tuple[Tensor, Tensor, Tensor], Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """The rows' points (x, s, y) on the central path, and the adjoint there; NaN in rows that have none."""
    program, device = call.canonical.program, call.device
    x, s, y = (part.clone() for part in exact.point)
    good = torch.nonzero(call.status < Status.INFEASIBLE).flatten().to(device)
    visible = Visible(*(part.to(device) for part in call.canonical.visible))
    dense = exact.data.dense or prefers_dense(program)
    pieces, lost = [], torch.zeros(len(x), dtype=torch.bool, device=device)
    for rows in good.split(_rows_at_once(program, dense)):
        data, scaling = normalise(exact.data.rows(rows).widen(len(rows)))
        start = scaling.enter(x[rows], s[rows], y[rows])
        data, inner = recentre(data, scaling, start[0], start[2])
        zero = smoothed_zero(Operators(data, dense), *inner.enter(x[rows], s[rows], y[rows]), kappa, visible, inner.c)
        x[rows], s[rows], y[rows] = inner.leave(zero.x, zero.s, zero.y)
        pieces.append(Piece(rows, zero, inner, torch.arange(len(rows), device=device)))
        lost[rows] = ~(zero.residual <= UNSMOOTHED)

    warn = call.on_degenerate

    def adjoint(x_bar: Tensor, y_bar: Tensor) -> tuple[Tensor, Tensor]:
        w, u = _adjoint_of(pieces, x_bar, y_bar)
        used = lost & ((x_bar != 0).any(1) | (y_bar != 0).any(1))
        if bool(used.any()):
            warn(torch.nonzero(used).flatten().cpu(), Cause.NO_PATH, ())
        return w.masked_fill(used.unsqueeze(1), torch.nan), u.masked_fill(used.unsqueeze(1), torch.nan)

    return (x, s, y), adjoint


def _solve(call: Call, data: Data, d: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor, list[Piece]]:
    program, device = data.program, call.device
    good = torch.arange(batch, device=device)
    parts = (data.P, data.q, data.A, data.b, d)
    if not math.isfinite(torch.stack([part.sum() for part in parts]).sum().item()) or bool(call.bad.any()):
        finite = ~call.bad.to(device)
        for part in parts:
            finite = finite & torch.isfinite(part.flatten(1)).all(1)
        good = torch.nonzero(finite).flatten()
    refuted = None if call.agreement is None else call.agreement.refuted.to(device)
    nowhere = impossible(program, data.b)
    if nowhere is not None:
        refuted = nowhere.expand(batch) if refuted is None else refuted | nowhere
    if refuted is not None:
        good = good[~refuted[good]]
    everything = len(good) == batch
    call.blank = torch.zeros(batch, dtype=torch.bool, device=device)
    if not everything:
        call.blank = (~call.blank).index_fill(0, good, False)
    left_out = torch.full((batch,), int(Status.BAD_INPUT), device=device)
    if refuted is not None:
        left_out[refuted & ~call.bad.to(device)] = int(Status.INFEASIBLE)
    if not len(good):
        call.status = left_out.cpu()
        call.iterations, call.attempt = (torch.zeros(batch, dtype=torch.int64) for _ in range(2))
        call.residual = torch.full((batch,), torch.nan, dtype=torch.float64)
        call.degenerate = torch.zeros(batch, dtype=torch.bool)
        call.margin = call.residual
        x, s, y = (data.q.new_zeros(batch, k) for k in (program.n, program.m, program.m))
        return x, s, y, []

    chosen = (data if everything else data.rows(good)).widen(len(good))
    start = None if call.start is None else tuple(part.to(device)[good] for part in call.start)
    found = _found_in_pieces(call, chosen, start)
    pieces = found.pieces if everything else [replace(piece, rows=good[piece.rows]) for piece in found.pieces]

    def spread(values: Tensor, blank: float) -> Tensor:
        if everything:
            return values
        return values.new_full((batch, *values.shape[1:]), blank).index_copy_(0, good, values)

    call.status = (found.status if everything else left_out.index_copy(0, good, found.status)).cpu()
    call.iterations, call.attempt = spread(found.iterations, 0).cpu(), spread(found.attempt, 0).cpu()
    call.residual, call.degenerate = spread(found.residual, torch.nan).cpu(), spread(found.degenerate, False).cpu()
    call.margin = spread(found.margin, torch.nan).cpu()
    call.stopped = spread(found.stopped, False).cpu() if bool(found.stopped.any()) else None
    x, s, y = spread(found.x, 0.0), spread(found.s, 0.0), spread(found.y, 0.0)
    implied = call.canonical.implied
    if implied is not None:  # they were not in the program
        implied = implied.to(device)
        s[:, implied] = (data.b - Operators(data).A(x))[:, implied].clamp(min=0)
    return x, s, y, pieces


def _found_in_pieces(call: Call, data: Data, start: tuple[Tensor, ...] | None) -> _Found:
    """A large dense batch in pieces that fit a cache, each from scaling to polish in one thread; else all rows together."""
    program = data.program if call.elimination is None else call.elimination.program
    a_row = program.n * (program.n + program.m)
    dense = call.elimination is not None or prefers_dense(program)
    if not dense or call.device.type != "cpu" or call.executor is not None or data.batch * a_row < LARGE:
        return _settled(call, data, start)
    alone = replace(call, executor=Inline())
    pieces = min(data.batch, cores() * math.ceil(data.batch * a_row / PIECE / cores()))
    bounds = [k * data.batch // pieces for k in range(pieces + 1)]
    ranges = list(pairwise(bounds))
    jobs = [
        (alone, data.between(lo, hi), None if start is None else tuple(part[lo:hi] for part in start))
        for lo, hi in ranges
    ]
    return _Found.joined(in_threads(lambda job: _settled(*job), jobs), [lo for lo, _ in ranges])


def _settled(call: Call, data: Data, start: tuple[Tensor, ...] | None) -> _Found:
    """The rows by one attempt after the other, each for those that are not settled yet."""
    if not data.program.is_polyhedral:
        data = unlimited(data, call.canonical.implied)
    newton, found = start is not None and not call.attempts[0].solver.warm_starts, None
    for place in range(FROM_START if newton else 0, len(call.attempts)):
        if found is None:
            found = _attempt(call, data, place, start)
            if is_within(found.residual, SETTLED) and not bool(found.status.any()) and not bool(found.degenerate.any()):
                return found  # as nearly always
            continue
        # What the polish could not settle may need a sharper start: a face is not told from its neighbours yet.
        unsettled = found.unsettled
        if place - 1 == FROM_START or call.attempts[place - 1].solver.at_vertex:
            # A redundant constraint looks weakly active there, and is not where the multipliers are shared out.
            unsettled = unsettled | (found.degenerate & ~found.stopped)
        again = torch.nonzero(unsettled).flatten()
        if not len(again):
            break
        found = found.improved(again, _attempt(call, data.rows(again), place, None))
    assert found is not None
    if data.program.is_polyhedral:
        found, data = _unlimited(call, data, found)
    else:  # an infimum need not be attained
        found = _running_off(data, found)
    if not bool(found.status.any()):
        return found
    found = _with_a_feasible_point(call, data, found)
    if call.canonical.gp and call.canonical.sign > 0:
        # The objective's logarithm falls without end: it tends to zero.
        status = torch.where(found.status == Status.UNBOUNDED, int(Status.UNATTAINED), found.status)
        found = replace(found, status=status)
    return replace(found, degenerate=found.degenerate & (found.status < Status.INFEASIBLE))


def _attempt(call: Call, data: Data, place: int, start: tuple[Tensor, ...] | None) -> _Found:
    """One attempt; the first ones on the program without its auxiliary variables, where they can be taken out."""
    if call.elimination is None or place > 0:
        return _attempt_in_units(call, *normalise(data), place, start, call.canonical.visible, None)
    eliminated = call.elimination.enter(data)
    assert eliminated.data is not None
    start = None if start is None else eliminated.enter_point(*start)
    scaled = normalise(eliminated.data.widen(data.batch))
    found = _attempt_in_units(call, *scaled, place, start, call.elimination.visible, eliminated)
    return found.lifted(eliminated)


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
    margin: Tensor
    attempt: Tensor
    stopped: Tensor  # by a time limit
    pieces: list[Piece]

    @property
    def unsettled(self) -> Tensor:
        """(rows,) what another way may yet solve."""
        return is_unsettled(self.status) & ~self.stopped

    @classmethod
    def joined(cls, parts: list[_Found], firsts: list[int]) -> _Found:
        """What was found for consecutive rows, beginning at `firsts`."""
        names = [field.name for field in fields(cls) if field.name != "pieces"]
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        pieces = [
            replace(p, rows=p.rows + first) for part, first in zip(parts, firsts, strict=True) for p in part.pieces
        ]
        return cls(**joined, pieces=pieces)

    def lifted(self, eliminated: Eliminated) -> _Found:
        """The same for the program before the elimination."""
        x, s, y = eliminated.leave(self.x, self.s, self.y)
        pieces = [replace(piece, eliminated=eliminated.only(piece.rows)) for piece in self.pieces]
        return replace(self, x=x, s=s, y=y, pieces=pieces)

    def improved(self, rows: Tensor, other: _Found) -> _Found:
        """With another attempt at some rows, where it did better."""
        rank, other_rank = _rank(self.status[rows], self.degenerate[rows]), _rank(other.status, other.degenerate)
        # Of two that are solved the later one, which is no vertex, and not by a toss between their rounding errors.
        closer = other.residual <= self.residual[rows].clamp(min=ROUNDING)
        better = (other_rank < rank) | ((other_rank == rank) & closer)
        won, mine = rows[better], torch.ones_like(self.degenerate)
        mine[won] = False
        kept = {
            name: getattr(self, name).index_copy(0, won, getattr(other, name)[better])
            for name in ("x", "s", "y", "status", "residual", "degenerate", "margin", "attempt")
        }
        pieces = [piece.only(mine) for piece in self.pieces]
        pieces += [replace(piece.only(better), rows=rows[piece.rows]) for piece in other.pieces]
        iterations = self.iterations.index_add(0, rows, other.iterations)
        stopped = self.stopped.index_put((rows,), other.stopped)
        return _Found(**kept, iterations=iterations, stopped=stopped, pieces=[piece for piece in pieces if len(piece.keep)])


def _rank(status: Tensor, degenerate: Tensor) -> Tensor:
    """The lower, the more is known: a proof that there is no solution is worth more than a point that is not quite one."""
    order = (Status.SOLVED, Status.INFEASIBLE, Status.UNBOUNDED, Status.INACCURATE, Status.UNATTAINED, Status.NOT_CONVERGED, Status.BAD_INPUT)
    places = torch.tensor([order.index(one) for one in Status], device=status.device)
    return 2 * places[status] + degenerate


def _attempt_in_units(
    call: Call,
    data: Data,
    scaling: Scaling,
    place: int,
    start: tuple[Tensor, ...] | None,
    visible: Visible,
    eliminated: Eliminated | None,
) -> _Found:
    """Solve normalised data, check certificates, polish, judge."""
    rows, device = data.batch, call.device
    visible = Visible(*(part.to(device) for part in visible))
    start = None if start is None else scaling.enter(*start)
    if place == FROM_START:
        assert start is not None
        solved, none = (torch.full((rows,), k, device=device) for k in (int(Status.SOLVED), 0))
        point = Points(*start, solved, none)
    else:
        point = solve_batch(*call.attempts[place], data, start, call.executor)
    status = point.status
    stopped = point.stopped
    usable = None if stopped is None else ~stopped
    points = torch.cat([point.x, point.s, point.y], 1)
    if not math.isfinite(points.sum().item()):  # a finite sum has finite terms
        finite = torch.isfinite(points).all(1)
        usable = finite if usable is None else finite & usable
        status = torch.where(~finite & (status < Status.INFEASIBLE), int(Status.NOT_CONVERGED), status)
    refine = torch.arange(rows, device=device)
    if usable is not None or bool(status.any()):
        status = _claims_checked(data, status, point.x, point.y, _precision(call))
        hopeless = (status == Status.INFEASIBLE) | (status == Status.UNBOUNDED)
        refine = torch.nonzero(~hopeless if usable is None else ~hopeless & usable).flatten()
    attempt = torch.full((rows,), place, device=device)
    dense = data.dense or prefers_dense(data.program)
    at_once = rows if data.dense else _rows_at_once(data.program, dense)
    if len(refine) == rows <= at_once:
        found = _refined(call, data, scaling, point.x, point.s, point.y, dense, visible, place, eliminated)
        status = _refuted(data, scaling, found.status, point.y, found, _precision(call))
        pieces = [Piece(refine, found.zero.settled(), found.scaling, refine)] if call.differentiable else []
        return _Found(
            found.x,
            found.s,
            found.y,
            status,
            point.iterations + found.zero.steps if place == FROM_START else point.iterations,
            found.zero.residual,
            found.zero.degenerate,
            found.zero.margin,
            attempt,
            torch.zeros_like(found.zero.degenerate),
            pieces,
        )
    x, s, y = scaling.leave(point.x, point.s, point.y)
    sizes = torch.full((rows,), torch.nan, dtype=x.dtype, device=device)
    degenerate, status = torch.zeros(rows, dtype=torch.bool, device=device), status.clone()
    margin = torch.full_like(sizes, torch.nan)
    iterations, pieces = point.iterations.clone(), []
    for part in refine.split(at_once) if len(refine) else ():
        start_x, start_s, start_y = (values[part] for values in (point.x, point.s, point.y))
        inner = None if eliminated is None else eliminated.only(part)
        units = scaling.rows(part)
        found = _refined(call, data.rows(part), units, start_x, start_s, start_y, dense, visible, place, inner)
        status[part], sizes[part], degenerate[part] = found.status, found.zero.residual, found.zero.degenerate
        margin[part] = found.zero.margin
        x[part], s[part], y[part] = found.x, found.s, found.y
        iterations[part] += found.zero.steps if place == FROM_START else 0
        if call.differentiable:
            pieces.append(Piece(part, found.zero.settled(), found.scaling, torch.arange(len(part), device=device)))
    if stopped is None:
        stopped = torch.zeros_like(degenerate)
    else:
        halted = torch.nonzero(stopped).flatten()
        sizes[halted] = _residual_of(data.rows(halted), scaling.rows(halted), *(part[halted] for part in (x, s, y)))
    whole = _Found(x, s, y, status, iterations, sizes, degenerate, margin, attempt, stopped, pieces)
    return replace(whole, status=_refuted(data, scaling, status, point.y, whole, _precision(call), stopped))


def _is_sharpest(call: Call, place: int) -> bool:
    """No attempt is left that would start the polish nearer."""
    solver, tolerance, _ = call.attempts[place]
    return place == len(call.attempts) - 1 or (place > 0 and tolerance == solver.finest)


def _residual_of(data: Data, scaling: Scaling, x: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """(rows,) relative KKT residual of points as a solver left them, in the original units; `data` in the scaling's."""
    start = scaling.enter(x, s, y)
    data, inner = recentre(data.widen(len(x)), scaling, start[0], start[2])
    operators, point = Operators(data), inner.enter(x, s, y)
    return residual(operators, *point, term_sizes(operators, *point, JUDGING))[2]


class _Refined(NamedTuple):
    """A polished piece, in the original units."""

    x: Tensor
    s: Tensor
    y: Tensor
    status: Tensor
    zero: Zero
    scaling: Scaling  # of the zero


def _refined(
    call: Call,
    data: Data,
    scaling: Scaling,
    x: Tensor,
    s: Tensor,
    y: Tensor,
    dense: bool,
    visible: Visible,
    place: int,
    eliminated: Eliminated | None,
) -> _Refined:
    outer = scaling
    data, inner = recentre(data, scaling, x, y, visible.x)
    started = outer.to_same(inner, x, s, y)
    # Where a sharper attempt is left, that is the cheaper second effort.
    zero = polish(Operators(data, dense), *started, visible, inner.c, follow=_is_sharpest(call, place))
    zero = _judged(call, zero, inner, eliminated)
    status = _verdict(zero, call.tolerance)
    if not data.program.is_polyhedral and zero.x.shape[1]:  # there an infimum is attained
        size = (zero.x * visible.x * (outer.rho / inner.rho)).abs().amax(1)
        if not size.amax().item() <= RUNAWAY:
            for bound, verdict in ((RUNAWAY, Status.INACCURATE), (RUNAWAY**1.5, Status.NOT_CONVERGED)):
                status = torch.where((size > bound) & (status < verdict), int(verdict), status)
    if call.elimination is not None and place <= 0 and zero.pivot is not None:
        # The elimination squared a condition: neither the residual nor the adjoint's check can see what that cost.
        status = torch.where((zero.pivot < SQUARED) & (status < Status.INACCURATE), int(Status.INACCURATE), status)
    if call.selected:
        zero = _selected(call, zero, inner, eliminated)
    # Beside multipliers so large the costs are not seen in the residual: constraints contradict each other by little.
    q, P = data.largest_costs
    costs = torch.maximum(q, P * largest(zero.x))
    swamped = largest(zero.y) > (RUNAWAY * costs).clamp(min=FAINT)
    if bool(swamped.any()):
        swamped = (swamped & (costs > 0)).squeeze(1)
        status = torch.where(swamped, status.clamp(min=int(Status.INACCURATE)), status)
    # And products of numbers of this size overflow.
    units = torch.cat([inner.rho, inner.tau], 1)
    least, most = (end.item() for end in torch.aminmax(units))
    if not (least >= 1 / BEYOND and most <= BEYOND):
        beyond = ((units < 1 / BEYOND) | (units > BEYOND)).any(1)
        status = torch.where(beyond, int(Status.NOT_CONVERGED), status)
    if inner.unbounded is not None:
        # A bound that was taken for infinite and is active after all: this is not the solution.
        status = torch.where((inner.unbounded & (zero.y > 0)).any(1), int(Status.NOT_CONVERGED), status)
    rough = status == Status.INACCURATE
    if bool(rough.any()):
        # Such a point tells a kink from its neighbourhood no better than that.
        near = rough & (zero.margin < zero.judged.sqrt())
        zero = replace(zero, near=zero.near | near, unfelt=zero.unfelt & ~near)
    return _Refined(*inner.leave(zero.x, zero.s, zero.y), status, zero, inner)


def _judged(call: Call, zero: Zero, scaling: Scaling, eliminated: Eliminated | None) -> Zero:
    """The zero, its degenerate rows judged by what parameters move and outputs read."""
    if not call.judged or not bool(zero.degenerate.any()):
        return zero
    rows = torch.nonzero(zero.degenerate & (zero.residual <= INACCURATE)).flatten()
    return judged(zero, rows, _sides(call.canonical, zero, scaling, eliminated, rows)) if len(rows) else zero


def _selected(call: Call, zero: Zero, scaling: Scaling, eliminated: Eliminated | None) -> Zero:
    """The zero, flagged where it is one of many solutions, chosen by the negligible term, and parameters move the choice.

    Where the pivots are no larger than the term, it chooses; a direction of the parameters along which the solution moves as fast as the
    term is small leads from one to another.
    """
    chosen = zero.system.smallest <= 10 * NEGLIGIBLE
    if not bool(chosen.any()):
        return zero
    sides = _sides(call.canonical, zero, scaling, eliminated, torch.arange(len(zero.x), device=zero.x.device))
    w, _ = zero.system.solve(sides.moved[0], zero.spectrum.to_basis(sides.moved[1]))
    jumps = chosen & ~(w.abs().amax(1) <= NEGLIGIBLE**-0.5)
    return replace(zero, flagged=zero.flagged | jumps, unfelt=zero.unfelt & ~jumps)


def _sides(canonical: Canonical, zero: Zero, scaling: Scaling, eliminated: Eliminated | None, rows: Tensor) -> Sides:
    """What parameters move and outputs read, in the units of some rows of a zero: every parameter as much as the others."""
    units = scaling.rows(rows)
    point = units.leave(zero.x[rows], zero.s[rows], zero.y[rows])
    part = None if eliminated is None else eliminated.only(rows)
    x, _, y = point if part is None else part.leave(*point)

    def entered(a: Tensor, c: Tensor) -> Tensor:
        inner = units.enter_cotangents(*((a, c) if part is None else part.enter_cotangents(a, c)))
        both = torch.cat(inner, 1)
        size = both.norm(dim=1, keepdim=True)  # not the largest entry's: two of size one would cancel
        return both / torch.where(size > 0, size, 1.0)

    a, c = (values.to(x.device).expand(len(rows), -1) for values in canonical.reading)
    read, moved = entered(a, c), x.new_zeros(len(rows), zero.x.shape[1] + zero.y.shape[1])
    turning, sizes = [], [zero.x.shape[1], zero.y.shape[1]]
    for direction in canonical.directions:
        change = {name: value.to(x.device) for name, value in direction.items()}
        operators = Operators(Data(canonical.program, *(change[name] for name in ("P", "q", "A", "b"))))
        moved = moved + entered(-(operators.P(x) + operators.At(y) + change["q"]), change["b"] - operators.A(x))
        if bool(change["P"].any()) or bool(change["A"].any()):
            turning.append(operators)

    def turned(index: Tensor, dx: Tensor, dy: Tensor) -> list[tuple[Tensor, Tensor]]:
        inner = units.rows(index)
        x, s, y = inner.leave(dx, torch.zeros_like(dy), dy)
        if part is not None:
            here = part.only(index)
            none = here.leave(*(torch.zeros_like(values) for values in (x, s, y)))
            x, _, y = (there - origin for there, origin in zip(here.leave(x, s, y), none, strict=True))
        images = [(-(operators.P(x) + operators.At(y)), -operators.A(x)) for operators in turning]
        return [inner.enter_cotangents(*(pair if part is None else here.enter_cotangents(*pair))) for pair in images]

    constant = canonical.constant if part is None else canonical.constant[torch.from_numpy(part.elimination.rows)]
    return Sides(moved.split(sizes, 1), read.split(sizes, 1), constant.to(x.device), turned)


def _claims_checked(data: Data, status: Tensor, x: Tensor, y: Tensor, precision: float) -> Tensor:
    """A solver's claim that there is no solution stands if its certificate does; otherwise the row has merely not converged."""
    claimed = torch.nonzero((status == Status.INFEASIBLE) | (status == Status.UNBOUNDED)).flatten()
    if not len(claimed):
        return status
    part = data.rows(claimed).widen(len(claimed))
    proven = torch.where(unbounded(part, x[claimed]), int(Status.UNBOUNDED), int(Status.NOT_CONVERGED))
    proven = torch.where(status[claimed] == Status.UNBOUNDED, proven, int(Status.NOT_CONVERGED))
    proven = torch.where(infeasible(part, y[claimed], precision), int(Status.INFEASIBLE), proven)
    return status.index_copy(0, claimed, proven.to(status.dtype))


def _refuted(
    data: Data,
    scaling: Scaling,
    status: Tensor,
    y: Tensor,
    found: _Found | _Refined,
    precision: float,
    stopped: Tensor | None = None,
) -> Tensor:
    """Rows that did not settle, INFEASIBLE where the multipliers that they ran off with prove it: the solver's y, or the polish's."""
    if not bool(status.any()):
        return status
    for candidate in (y, scaling.enter(found.x, found.s, found.y)[2]):
        unsettled = is_unsettled(status) if stopped is None else is_unsettled(status) & ~stopped
        rows = torch.nonzero(unsettled).flatten()
        if not len(rows):
            break
        proven = infeasible(data.rows(rows).widen(len(rows)), candidate[rows], precision)
        status = status.index_fill(0, rows[proven], int(Status.INFEASIBLE))
    return status


def _with_a_feasible_point(call: Call, data: Data, found: _Found) -> _Found:
    """Rows without a solution, looked at without their costs: they may have no feasible point.

    Only with one is a row unbounded, along whose directions the objective falls; and costs hide a proof of infeasibility.
    """
    rows = torch.nonzero(found.unsettled | (found.status == Status.UNBOUNDED)).flatten()
    if not len(rows):
        return found
    part, _ = normalise(data.rows(rows).widen(len(rows)))
    gap, y = nearest(part)
    doubted = (found.status[rows] == Status.UNBOUNDED) & ~(gap <= INACCURATE)
    status = torch.where(doubted, int(Status.NOT_CONVERGED), found.status[rows])
    status = torch.where(infeasible(part, y, _precision(call)), int(Status.INFEASIBLE), status)
    # A solver's direction may be too rough a proof.
    left = torch.nonzero((found.status[rows] == Status.NOT_CONVERGED) & (status == Status.NOT_CONVERGED) & (gap <= INACCURATE)).flatten()
    if len(left):
        one = part.rows(left).widen(len(left))
        falls = unbounded(one, steepest(one))
        status = status.index_fill(0, left[falls], int(Status.UNBOUNDED))
    return replace(found, status=found.status.index_copy(0, rows, status.to(found.status.dtype)))


def _unlimited(call: Call, data: Data, found: _Found) -> tuple[_Found, Data]:
    """Rows that did not settle, solved again without their infinite bounds, which a solver sees as large ones; and all data so.

    Not from the start: the rows of a batch that share A, and all that is worked out from it, would no longer.
    """
    free = unlimited(data)
    if free is data:
        return found, data
    for place in range(min(1, len(call.attempts) - 1), len(call.attempts)):
        again = torch.nonzero(found.unsettled & (data.b >= NO_BOUND).any(1)).flatten()
        if len(again):
            found = found.improved(again, _attempt(call, free.rows(again), place, None))
    return found, free


def _running_off(data: Data, found: _Found) -> _Found:
    """Rows whose infimum is not attained, of those that the polish did not bring to rest."""
    restless = found.residual > SETTLED
    rows = torch.nonzero(found.unsettled | ((found.status == Status.SOLVED) & restless)).flatten()
    if not len(rows):
        return found
    part, scaling = normalise(data.rows(rows).widen(len(rows)))
    off = recedes(part, scaling.enter(found.x[rows], found.s[rows], found.y[rows])[0])
    return replace(found, status=found.status.index_fill(0, rows[off], int(Status.UNATTAINED)))


def _precision(call: Call) -> float:
    """Relative: what is infeasible by less is feasible to the tolerance, or to the parameters' own rounding."""
    return max(call.precision, call.tolerance)


def _verdict(zero: Zero, tolerance: float) -> Tensor:
    """What the polished residual says, whatever the solver said: it is the KKT residual of the point in hand.

    A problem so ill-conditioned that the residual's rounding moves the solution is not called solved either.
    """
    solved = (zero.judged <= tolerance) & (zero.error <= min(max(SENSITIVE, 10 * tolerance), MEANINGLESS))
    if bool(solved.all()):
        return torch.full_like(solved, int(Status.SOLVED), dtype=torch.int64)
    judged = torch.where(zero.judged <= INACCURATE, int(Status.INACCURATE), int(Status.NOT_CONVERGED))
    judged = torch.where(solved, int(Status.SOLVED), judged)
    return torch.where(zero.error <= MEANINGLESS, judged, int(Status.NOT_CONVERGED))


def _rows_at_once(program: Program, dense: bool) -> int:
    """So many rows that their matrices stay affordable."""
    a_row = (program.n + program.m) * program.n if dense else 4 * program.nnz
    return max(1, DENSE_ENTRIES // max(1, a_row))


def _objective(operators: Operators, x: Tensor, d: Tensor) -> Tensor:
    return (x * (operators.P(x) / 2 + operators.data.q)).sum(1) + d.squeeze(1)


def _report(
    canonical: Canonical,
    selected: bool,
    degenerate: Tensor,
    warn: Callable[[Tensor, Cause, Sequence[int]], None],
    pieces: list[Piece],
    q: Tensor,
    x: Tensor,
    x_bar: Tensor,
    used: Tensor,
    found: dict[int, Tensor],
) -> None:
    """Tell of rows (`used`, (B,)) that were differentiated by rule, or whose gradients `found` say nothing."""
    causes: dict[Cause, Tensor] = {}
    for piece in pieces:
        zero = piece.zero
        poor, singular = zero.system.poor, zero.system.singular
        if not bool((zero.near | zero.flagged | singular | poor).any()):
            continue
        rows, keep = piece.rows[piece.keep], piece.keep
        flags = {
            Cause.ONE_SIDED: zero.weak,
            Cause.SINGULAR: (singular | (zero.flagged & ~poor)) & ~zero.unfelt,
            Cause.ILL_CONDITIONED: poor,
        }
        for cause, flag in flags.items():
            causes.setdefault(cause, torch.zeros_like(used))[rows] = flag[keep]
        more = flags[Cause.SINGULAR] | poor  # a solve may have flagged more
        degenerate[rows.cpu()] |= more[keep].cpu()
    costs = [k for k in canonical.costs if k in found]
    if costs and (canonical.program.is_linear or selected):
        size = x_bar.abs().amax(1) * x.abs().amax(1)
        unmoved = used & (size > 0)
        if Cause.SINGULAR in causes:  # what that means is told already
            unmoved = unmoved & ~causes[Cause.SINGULAR]
        for k in costs:
            unmoved = unmoved & (found[k].flatten(1).abs().amax(1) * q.abs().amax(1) <= NOTHING * size)
        causes[Cause.ZERO] = unmoved
    for cause, mask in causes.items():
        if bool((mask & used).any()):
            warn(torch.nonzero(mask & used).flatten().cpu(), cause, costs)
