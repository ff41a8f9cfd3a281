"""The attempts at a batch of a cone program: one solver after the other, each for the rows that are
not settled yet."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from convlayer.autodiff.threads import cores
from convlayer.conic.bounds import NO_BOUND, unlimited
from convlayer.conic.costs import prefers_dense
from convlayer.conic.elimination import Eliminated
from convlayer.conic.kkt import Visible
from convlayer.conic.polish import NEWTON, is_within
from convlayer.conic.program import Data, Operators
from convlayer.conic.residual import JUDGING, Scaling, normalise, recentre, residual, term_sizes
from convlayer.paths.attempted import Attempted
from convlayer.paths.cone_call import ConeRequest
from convlayer.paths.pieces import Piece, RootPiece, rows_at_once
from convlayer.paths.refined import Refined, Unpolished, refined
from convlayer.paths.unsettled import claims_checked, refuted, running_off, with_a_feasible_point
from convlayer.paths.verdict import Verdict
from convlayer.solution import Status
from convlayer.solvers.dealing import Inline, in_threads, solve_batch
from convlayer.solvers.solver import Points

LARGE = 1_000_000  # numbers in dense matrices of a batch from which it is worked off in pieces,
PIECE = 500_000  # of about so many (4 MB)
FROM_START = -1  # the attempt before the first: Newton's method from a warm start, without a solver


def attempted(request: ConeRequest, data: Data, start: tuple[Tensor, ...] | None) -> Attempted:
    """A large dense batch in pieces that fit a cache, each from scaling to polish in one thread;
    else all rows together."""
    program = data.program if request.elimination is None else request.elimination.program
    a_row = program.n * (program.n + program.m)
    dense = request.elimination is not None or prefers_dense(program)
    if (
        not dense
        or request.device.type != "cpu"
        or request.executor is not None
        or data.batch * a_row < LARGE
    ):
        return _settled(request, data, start)
    alone = replace(request, executor=Inline())
    pieces = min(data.batch, cores() * math.ceil(data.batch * a_row / PIECE / cores()))
    bounds = [k * data.batch // pieces for k in range(pieces + 1)]
    ranges = list(pairwise(bounds))
    jobs = [
        (
            alone,
            data.between(lo, hi),
            None if start is None else tuple(part[lo:hi] for part in start),
        )
        for lo, hi in ranges
    ]
    found = in_threads(lambda job: _settled(*job), jobs, [hi - lo for lo, hi in ranges])
    return Attempted.joined(found, [lo for lo, _ in ranges])


def _settled(request: ConeRequest, data: Data, start: tuple[Tensor, ...] | None) -> Attempted:
    """The rows by one attempt after the other, each for those that are not settled yet."""
    if not data.program.is_polyhedral:
        data = unlimited(data, request.canonical.implied)
    newton, found = start is not None and not request.attempts[0].solver.warm_starts, None
    for place in range(FROM_START if newton else 0, len(request.attempts)):
        if found is None:
            found = _attempt(request, data, place, start)
            if _is_plainly_solved(found.verdict):
                return found  # as nearly always
            continue
        # What the polish could not settle may need a sharper start: a face is not told from its
        # neighbours yet.
        unsettled = found.unsettled
        if place - 1 == FROM_START or request.attempts[place - 1].solver.at_vertex:
            # A redundant constraint looks weakly active there, and is not where the multipliers are
            # shared out.
            unsettled = unsettled | (found.verdict.degenerate & ~found.stopped)
        left = torch.nonzero(unsettled).flatten()
        if not len(left):
            break
        found = found.improved(left, _attempt(request, data.rows(left), place, None))
    assert found is not None
    if data.program.is_polyhedral:
        found, data = _unlimited(request, data, found)
    else:  # an infimum need not be attained
        found = running_off(data, found)
    if not bool(found.verdict.status.any()):
        return found
    found = with_a_feasible_point(data, found, request.precision)
    if request.canonical.gp and request.canonical.sign > 0:
        # The objective's logarithm falls without end: it tends to zero.
        status = found.verdict.status
        found = found.with_status(
            torch.where(status == Status.UNBOUNDED, int(Status.UNATTAINED), status)
        )
    verdict = found.verdict
    return replace(found, verdict=replace(verdict, degenerate=verdict.degenerate & ~verdict.failed))


def _is_plainly_solved(verdict: Verdict) -> bool:
    """Nothing is left to do for any row."""
    at_rest = is_within(verdict.residual, NEWTON.settled)
    return at_rest and not bool(verdict.status.any()) and not bool(verdict.degenerate.any())


def _attempt(
    request: ConeRequest, data: Data, place: int, start: tuple[Tensor, ...] | None
) -> Attempted:
    """One attempt; the first ones on the program without its auxiliary variables, where they can be
    taken out."""
    if request.elimination is None or place > 0:
        return _attempt_in_units(
            request, *normalise(data), place, start, request.canonical.visible, None
        )
    eliminated = request.elimination.enter(data)
    assert eliminated.data is not None
    start = None if start is None else eliminated.enter_point(*start)
    scaled = normalise(eliminated.data.widen(data.batch))
    found = _attempt_in_units(
        request, *scaled, place, start, request.elimination.visible, eliminated
    )
    return found.lifted(eliminated)


def _unlimited(request: ConeRequest, data: Data, found: Attempted) -> tuple[Attempted, Data]:
    """Rows that did not settle, solved again without their infinite bounds, which a solver sees as
    large ones; and all data so.

    That is not how they start: the rows of a batch that share A, and all that is worked out from
    it, would no longer share it.
    """
    free = unlimited(data)
    if free is data:
        return found, data
    for place in range(min(1, len(request.attempts) - 1), len(request.attempts)):
        left = torch.nonzero(found.unsettled & (data.b >= NO_BOUND).any(1)).flatten()
        if len(left):
            found = found.improved(left, _attempt(request, free.rows(left), place, None))
    return found, free


def _attempt_in_units(
    request: ConeRequest,
    data: Data,
    scaling: Scaling,
    place: int,
    start: tuple[Tensor, ...] | None,
    visible: Visible,
    eliminated: Eliminated | None,
) -> Attempted:
    """Solve normalised data, check certificates, polish, judge."""
    rows, device = data.batch, request.device
    # Solve.
    start = None if start is None else scaling.enter(*start)
    if place == FROM_START:
        assert start is not None
        solved, none = (torch.full((rows,), k, device=device) for k in (int(Status.SOLVED), 0))
        point = Points(*start, solved, none)
    else:
        point = solve_batch(*request.attempts[place], data, start, request.executor)
    # Check certificates: rows that have one, that stopped, or whose point is no number are not
    # polished.
    status, usable = _usable(point)
    every = torch.arange(rows, device=device)
    refine = every
    if usable is not None or bool(status.any()):
        status = claims_checked(data, status, point.x, point.y, request.precision)
        hopeful = (status != Status.INFEASIBLE) & (status != Status.UNBOUNDED)
        refine = torch.nonzero(hopeful if usable is None else hopeful & usable).flatten()
    # Polish and judge, in pieces whose matrices are affordable.
    dense = data.dense or prefers_dense(data.program)
    given = Unpolished(
        data,
        scaling,
        point.x,
        point.s,
        point.y,
        Visible(*(part.to(device) for part in visible)),
        eliminated,
        dense,
        first=place <= 0,
        last=_is_sharpest(request, place),
    )
    at_once = rows if data.dense else rows_at_once(data.program, dense)
    if len(refine) == rows <= at_once:
        found = refined(request, given)
        parts = [(every, found)]
        x, s, y, verdict = (
            found.x,
            found.s,
            found.y,
            _verdict_of(found, point.iterations, place),
        )
    else:
        parts = [
            (part, refined(request, given.rows(part)))
            for part in refine.split(at_once)
            if len(part)
        ]
        x, s, y = scaling.leave(point.x, point.s, point.y)
        verdict = replace(Verdict.unknown(status), iterations=point.iterations)
        for part, found in parts:
            x, s, y = (
                whole.index_copy(0, part, some)
                for whole, some in zip((x, s, y), (found.x, found.s, found.y), strict=True)
            )
            verdict = verdict.put(part, _verdict_of(found, point.iterations[part], place))
    if point.stopped is not None:
        halted = torch.nonzero(point.stopped).flatten()
        left = _residual_of(
            data.rows(halted), scaling.rows(halted), *(part[halted] for part in (x, s, y))
        )
        verdict = replace(verdict, residual=verdict.residual.index_copy(0, halted, left))
    if bool(verdict.status.any()):
        candidates = point.y, scaling.enter(x, s, y)[2]
        status = refuted(data, verdict.status, candidates, request.precision, point.stopped)
        verdict = replace(verdict, status=status)
    return Attempted(
        x,
        s,
        y,
        verdict,
        torch.full((rows,), place, device=device),
        torch.zeros_like(verdict.degenerate) if point.stopped is None else point.stopped,
        [_piece(part, found) for part, found in parts] if request.differentiable else [],
    )


def _usable(point: Points) -> tuple[Tensor, Tensor | None]:
    """(status, the rows that have a point to start from), None: all rows."""
    usable = None if point.stopped is None else ~point.stopped
    points = torch.cat([point.x, point.s, point.y], 1)
    if math.isfinite(points.sum().item()):  # a finite sum has finite terms
        return point.status, usable
    finite = torch.isfinite(points).all(1)
    lost = ~finite & (point.status < Status.INFEASIBLE)
    status = torch.where(lost, int(Status.NOT_CONVERGED), point.status)
    return status, finite if usable is None else finite & usable


def _verdict_of(found: Refined, iterations: Tensor, place: int) -> Verdict:
    """Of polished rows; from a warm start the polish's steps are the iterations."""
    zero = found.zero
    spent = iterations + zero.steps if place == FROM_START else iterations
    return Verdict(found.status, spent, zero.residual, zero.degenerate, zero.margin)


def _piece(rows: Tensor, found: Refined) -> Piece:
    every = torch.arange(len(rows), device=rows.device)
    return RootPiece(rows, every, found.zero.settled(), found.scaling)


def _is_sharpest(request: ConeRequest, place: int) -> bool:
    """No attempt is left that would start the polish nearer."""
    solver, tolerance, _ = request.attempts[place]
    return place == len(request.attempts) - 1 or (place > 0 and tolerance == solver.finest)


def _residual_of(data: Data, scaling: Scaling, x: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """(rows,) relative KKT residual of points as a solver left them, in the original units; `data`
    in the scaling's."""
    start = scaling.enter(x, s, y)
    data, inner = recentre(data.widen(len(x)), scaling, start[0], start[2])
    operators, point = Operators(data), inner.enter(x, s, y)
    return residual(operators, *point, term_sizes(operators, *point, JUDGING))[2]
