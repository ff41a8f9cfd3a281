"""A solver's points polished, and judged: whether they are solutions, and whether they can be
differentiated."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convlayer.conic.elimination import Eliminated
from convlayer.conic.kinks import Sides, judged
from convlayer.conic.kkt import Visible
from convlayer.conic.polish import Root, polish
from convlayer.conic.program import Data, Operators
from convlayer.conic.residual import Scaling, largest, recentre
from convlayer.declaration.canonical import Canonical
from convlayer.paths.cone_call import ConeRequest
from convlayer.paths.evaluation import NEGLIGIBLE
from convlayer.solution import Status


@dataclass(frozen=True)
class Trust:
    """How much a polished point must be trusted to be called what it is called."""

    # A point whose relative residual is above this is not even called INACCURATE.
    inaccurate: float = 1e-4
    # One more Newton step would move x by more than this share of it: the point is not called
    # SOLVED.
    sensitive: float = 3e-8
    # One more Newton step would move x by more than this share of it: the point is no solution at
    # all.
    meaningless: float = 1e-2
    # An x so many times larger than the data suggest may be on its way to infinity, and multipliers
    # so many times larger than the costs hide them.
    runaway: float = 1e6
    # Multipliers that are rounding are smaller than this, in units where multipliers or costs are
    # of size one.
    faint: float = 1e-3
    # Products of numbers in units larger than this, or smaller than its inverse, overflow.
    beyond: float = 1e100
    # A pivot below this shows that eliminating variables squared too bad a condition.
    squared: float = 1e-7


TRUST = Trust()


@dataclass(frozen=True, eq=False)
class Unpolished:
    """A solver's points, in normalised units, and how they came to be."""

    data: Data
    scaling: Scaling
    x: Tensor  # (rows, n)
    s: Tensor  # (rows, m)
    y: Tensor  # (rows, m)
    visible: Visible
    eliminated: Eliminated | None  # the program is without these variables
    dense: bool
    first: bool  # of the first attempt, or of none
    last: bool  # no attempt is left that would start the polish nearer

    def rows(self, index: Tensor) -> Unpolished:
        """Of some rows."""
        x, s, y = (part[index] for part in (self.x, self.s, self.y))
        eliminated = None if self.eliminated is None else self.eliminated.only(index)
        return replace(
            self,
            data=self.data.rows(index),
            scaling=self.scaling.rows(index),
            x=x,
            s=s,
            y=y,
            eliminated=eliminated,
        )


@dataclass(frozen=True, eq=False)
class Refined:
    """Polished points, in the original units."""

    x: Tensor
    s: Tensor
    y: Tensor
    status: Tensor
    zero: Root
    scaling: Scaling  # of the zero


def refined(request: ConeRequest, given: Unpolished) -> Refined:
    """Newton's method on the residual map, then what its residual and its last step say."""
    outer, eliminated = given.scaling, given.eliminated
    data, inner = recentre(given.data, outer, given.x, given.y, given.visible.x)
    started = outer.to_same(inner, given.x, given.s, given.y)
    # Where a sharper attempt is left, that is the cheaper second effort.
    zero = polish(Operators(data, given.dense), *started, given.visible, inner.c, follow=given.last)
    zero = _judged(request, zero, inner, eliminated)
    status = _verdict(zero, request.tolerance)
    if not data.program.is_polyhedral and zero.x.shape[1]:  # there an infimum is attained
        status = _not_run_away(status, zero.x * given.visible.x * (outer.rho / inner.rho))
    if request.elimination is not None and given.first and zero.pivot is not None:
        # The elimination squared a condition: neither the residual nor the adjoint's check can see
        # what that cost.
        squared = zero.pivot < TRUST.squared
        status = torch.where(squared & (status < Status.INACCURATE), int(Status.INACCURATE), status)
    if request.selected:
        zero = _selected(request.canonical, zero, inner, eliminated)
    status = _within_numbers(_not_swamped(status, data, zero), inner)
    if inner.unbounded is not None:
        # A bound that was taken for infinite and is active after all: this is not the solution.
        held = (inner.unbounded & (zero.y > 0)).any(1)
        status = torch.where(held, int(Status.NOT_CONVERGED), status)
    zero = _rough_near_kinks(status, zero)
    return Refined(*inner.leave(zero.x, zero.s, zero.y), status, zero, inner)


def _not_run_away(status: Tensor, seen: Tensor) -> Tensor:
    """seen (rows, n): what is seen of x, in units in which the data suggest that it is of size
    one."""
    size = seen.abs().amax(1)
    if size.amax().item() <= TRUST.runaway:
        return status
    for bound, verdict in (
        (TRUST.runaway, Status.INACCURATE),
        (TRUST.runaway**1.5, Status.NOT_CONVERGED),
    ):
        status = torch.where((size > bound) & (status < verdict), int(verdict), status)
    return status


def _not_swamped(status: Tensor, data: Data, zero: Root) -> Tensor:
    """Beside multipliers so large the costs are not seen in the residual: constraints contradict
    each other by little."""
    q, P = data.largest_costs
    costs = torch.maximum(q, P * largest(zero.x))
    swamped = largest(zero.y) > (TRUST.runaway * costs).clamp(min=TRUST.faint)
    if not bool(swamped.any()):
        return status
    swamped = (swamped & (costs > 0)).squeeze(1)
    return torch.where(swamped, status.clamp(min=int(Status.INACCURATE)), status)


def _within_numbers(status: Tensor, scaling: Scaling) -> Tensor:
    """Products of numbers of some sizes overflow."""
    units = torch.cat([scaling.rho, scaling.tau], 1)
    least, most = (end.item() for end in torch.aminmax(units))
    if least >= 1 / TRUST.beyond and most <= TRUST.beyond:
        return status
    beyond = ((units < 1 / TRUST.beyond) | (units > TRUST.beyond)).any(1)
    return torch.where(beyond, int(Status.NOT_CONVERGED), status)


def _rough_near_kinks(status: Tensor, zero: Root) -> Root:
    """A point that is not quite a solution tells a kink from its neighbourhood no better than
    that."""
    rough = status == Status.INACCURATE
    if not bool(rough.any()):
        return zero
    near = rough & (zero.margin < zero.judged.sqrt())
    return replace(zero, near=zero.near | near, unfelt=zero.unfelt & ~near)


def _verdict(zero: Root, tolerance: float) -> Tensor:
    """What the polished residual says, whatever the solver said: it is the KKT residual of the
    point in hand.

    A problem so ill-conditioned that the residual's rounding moves the solution is not called
    solved either.
    """
    solved = (zero.judged <= tolerance) & (
        zero.error <= min(max(TRUST.sensitive, 10 * tolerance), TRUST.meaningless)
    )
    if bool(solved.all()):
        return torch.full_like(solved, int(Status.SOLVED), dtype=torch.int64)
    judged = torch.where(
        zero.judged <= TRUST.inaccurate, int(Status.INACCURATE), int(Status.NOT_CONVERGED)
    )
    judged = torch.where(solved, int(Status.SOLVED), judged)
    return torch.where(zero.error <= TRUST.meaningless, judged, int(Status.NOT_CONVERGED))


def _judged(
    request: ConeRequest, zero: Root, scaling: Scaling, eliminated: Eliminated | None
) -> Root:
    """The zero, its degenerate rows judged by what parameters move and outputs read."""
    if not request.judged or not bool(zero.degenerate.any()):
        return zero
    rows = torch.nonzero(zero.degenerate & (zero.residual <= TRUST.inaccurate)).flatten()
    return (
        judged(zero, rows, _sides(request.canonical, zero, scaling, eliminated, rows))
        if len(rows)
        else zero
    )


def _selected(
    canonical: Canonical, zero: Root, scaling: Scaling, eliminated: Eliminated | None
) -> Root:
    """The zero, flagged where it is one of many solutions, chosen by the negligible term, and
    parameters move the choice.

    Where the pivots are no larger than the term, it chooses; a direction of the parameters along
    which the solution moves as fast as the term is small leads from one to another.
    """
    chosen = zero.system.smallest <= 10 * NEGLIGIBLE
    if not bool(chosen.any()):
        return zero
    sides = _sides(
        canonical, zero, scaling, eliminated, torch.arange(len(zero.x), device=zero.x.device)
    )
    w, _ = zero.system.solve(sides.moved[0], zero.spectrum.to_basis(sides.moved[1]))
    jumps = chosen & ~(w.abs().amax(1) <= NEGLIGIBLE**-0.5)
    return replace(zero, flagged=zero.flagged | jumps, unfelt=zero.unfelt & ~jumps)


def _sides(
    canonical: Canonical, zero: Root, scaling: Scaling, eliminated: Eliminated | None, rows: Tensor
) -> Sides:
    """What parameters move and outputs read, in the units of some rows of a zero: every parameter
    as much as the others."""
    units = scaling.rows(rows)
    point = units.leave(zero.x[rows], zero.s[rows], zero.y[rows])
    part = None if eliminated is None else eliminated.only(rows)
    x, _, y = point if part is None else part.leave(*point)

    def entered(a: Tensor, c: Tensor) -> Tensor:
        inner = units.enter_cotangents(*((a, c) if part is None else part.enter_cotangents(a, c)))
        both = torch.cat(inner, 1)
        # not the largest entry's: two of size one would cancel
        size = both.norm(dim=1, keepdim=True)
        return both / torch.where(size > 0, size, 1.0)

    a, c = (values.to(x.device).expand(len(rows), -1) for values in canonical.reading)
    read, moved = entered(a, c), x.new_zeros(len(rows), zero.x.shape[1] + zero.y.shape[1])
    turning, sizes = [], [zero.x.shape[1], zero.y.shape[1]]
    for direction in canonical.directions:
        change = {name: value.to(x.device) for name, value in direction.items()}
        operators = Operators(
            Data(canonical.program, *(change[name] for name in ("P", "q", "A", "b")))
        )
        moved = moved + entered(
            -(operators.P(x) + operators.At(y) + change["q"]), change["b"] - operators.A(x)
        )
        if bool(change["P"].any()) or bool(change["A"].any()):
            turning.append(operators)

    def turned(index: Tensor, dx: Tensor, dy: Tensor) -> list[tuple[Tensor, Tensor]]:
        inner = units.rows(index)
        x, s, y = inner.leave(dx, torch.zeros_like(dy), dy)
        if part is not None:
            here = part.only(index)
            none = here.leave(*(torch.zeros_like(values) for values in (x, s, y)))
            x, _, y = (
                there - origin for there, origin in zip(here.leave(x, s, y), none, strict=True)
            )
        images = [(-(operators.P(x) + operators.At(y)), -operators.A(x)) for operators in turning]
        return [
            inner.enter_cotangents(*(pair if part is None else here.enter_cotangents(*pair)))
            for pair in images
        ]

    constant = (
        canonical.constant
        if part is None
        else canonical.constant[torch.from_numpy(part.elimination.rows)]
    )
    return Sides(moved.split(sizes, 1), read.split(sizes, 1), constant.to(x.device), turned)
