"""Polish a solver's answer to a root of the residual map F, row by row of the batch.

Newton:   J (dx, dv) = -F,    J = [ P  A'D ;  A  D - I ],  D = DPi_K*(v)

Where the active set is right, semismooth Newton settles in a step or two. Rows where it is not
follow the central path from the solver's point a little further, and Newton's method tries again.

Source: Busseti, Moursi and Boyd (2019) for refinement at regular points.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from convlayer.cones import Product, ProductSpectrum
from convlayer.conic.kkt import DenseSystem, SparseSystem, Visible, factorise
from convlayer.conic.program import Operators, Program, take_rows
from convlayer.conic.residual import (
    JUDGING,
    WORKING,
    Sizes,
    largest_of_part,
    relative_size,
    residual,
    rounding,
    term_sizes,
)
from convlayer.memo import constants


@dataclass(frozen=True)
class _Newton:
    """When Newton's method goes on, and when it has done; all but the counts are relative
    residuals, or shares of one."""

    target: float  # there is nothing left to do
    settled: float  # below this, a step that gains less than a digit was the last
    stuck: float  # above this after Newton a row follows the central path
    reuse: float  # a factor serves another step while every row's residual falls to this share
    steps: int  # at most
    patience: int  # steps without a new best before a row gives up


@dataclass(frozen=True)
class _CentralPath:
    """How far the path is followed."""

    steps: int  # at most,
    stride: int  # and after so many Newton's method tries again;
    share: float  # they are aimed at this share of every y s,
    floor: float  # until they are all below this
    boundary: float  # the share of the way to the boundary that a step may go


NEWTON = _Newton(target=1e-13, settled=1e-11, stuck=1e-9, reuse=1e-3, steps=20, patience=4)
PATH = _CentralPath(steps=40, stride=8, share=0.05, floor=1e-24, boundary=0.99)
# |v| below this counts as weakly active: treated as inactive.
KINK = 1e-11
# Distance from a kink below which a row is flagged; one more Newton step, where that is longer,
# says the same.
MARGIN = 1e-7
# The derivative of a point whose error is above this is looked at again that far on,
UNSURE = 1e-10
# and is not to be had where it changes by more than this share.
TURNED = 0.1
# The error of x is told relative to x, and to no less than this.
SMALLEST_X = 1e-3

System = DenseSystem | SparseSystem


@dataclass(eq=False)
class Root:
    """A root of the residual map, in the data's units, with what its derivative needs."""

    operators: Operators | None
    x: Tensor  # (B, n)
    s: Tensor  # (B, m)
    y: Tensor  # (B, m)
    residual: Tensor  # (B,) relative, rounding counting for nothing
    judged: Tensor  # (B,) relative, as strictly as rounding allows
    spectrum: ProductSpectrum  # of DPi_K* at v = y - s
    # (B,) estimated relative error of what the user sees of x: the size of one more Newton step
    error: Tensor
    margin: Tensor  # (B,) distance from the nearest kink
    steps: Tensor  # (B,) of Newton that found it
    pivot: Tensor | None  # (B,) the smallest of the dense factor
    visible: Visible
    units: Tensor | None
    last: System | None  # the polish's last factor, if it belongs to this very point
    flagged: Tensor  # (B,) singular, turning or not solved well, as the polish found it
    turning: Tensor  # (B,) the derivative changes within the point's uncertainty
    near: Tensor  # (B,) at a kink, to the accuracy of the point
    unfelt: Tensor  # (B,) differentiable all the same, in what parameters move and outputs read

    @property
    def weak(self) -> Tensor:
        """(B,) a constraint is weakly active."""
        return self.near & ~self.unfelt

    @cached_property
    def degenerate(self) -> Tensor:
        """(B,) differentiated by rule."""
        return (self.near | self.flagged) & ~self.unfelt

    @property
    def cones(self) -> Product:
        assert self.operators is not None
        return self.operators.data.program.cones

    def settled(self) -> Root:
        """Without what its derivative does not need."""
        return self if self.last is None else replace(self, operators=None)

    @cached_property
    def system(self) -> System:
        """The factored system here: the polish's last one, or where curved cones have moved since,
        a new one."""
        if self.last is not None:
            return self.last
        assert self.operators is not None
        return factorise(self.operators, self.spectrum, self.visible, self.units)


@dataclass(eq=False)
class ResidualPoint:
    """A point of the polish, row by row."""

    TENSORS: ClassVar = ("x", "v", "y", "s", "F1", "F2", "size")

    x: Tensor  # (B, n)
    v: Tensor  # (B, m)
    y: Tensor
    s: Tensor
    F1: Tensor
    F2: Tensor
    size: Tensor  # (B,) relative residual
    spectrum: ProductSpectrum
    # that it is relative to: those of its terms where the polish began; None: see `residual`
    sizes: Sizes | None

    def rows(self, index: Tensor) -> ResidualPoint:
        """The points of some rows."""
        parts = {name: getattr(self, name)[index] for name in ResidualPoint.TENSORS}
        sizes = self.sizes and self.sizes.rows(index)
        return ResidualPoint(**parts, spectrum=self.spectrum.index_select(index), sizes=sizes)

    def put(self, index: Tensor, other: ResidualPoint) -> ResidualPoint:
        """These points, with those of some rows replaced."""
        parts = {
            name: getattr(self, name).index_copy(0, index, getattr(other, name))
            for name in ResidualPoint.TENSORS
        }
        return ResidualPoint(
            **parts, spectrum=self.spectrum.put(index, other.spectrum), sizes=self.sizes
        )

    @classmethod
    def at(
        cls, operators: Operators, x: Tensor, v: Tensor, sizes: Sizes | None = None
    ) -> ResidualPoint:
        """y = Pi_K*(v), s = Pi_K(-v)"""
        y, s, spectrum = operators.data.program.cones.linearise_dual(v, KINK)
        return cls(x, v, y, s, *residual(operators, x, s, y, sizes), spectrum, sizes)

    @classmethod
    def inside(cls, operators: Operators, x: Tensor, s: Tensor, y: Tensor) -> ResidualPoint:
        """With s and y of the inequalities as they are, both positive: D = y / (y + s) there, as
        on a central path."""
        program = operators.data.program
        v = y - s
        y_edge, s_edge, spectrum = program.cones.linearise_dual(v, KINK)
        rows = program.on(x.device)["inequalities"]
        y, s = torch.where(rows, y, y_edge), torch.where(rows, s, s_edge)
        values = torch.where(rows, y / (y + s), spectrum.values)
        spectrum = ProductSpectrum(values, spectrum.bases)
        return cls(x, v, y, s, *residual(operators, x, s, y), spectrum, None)


class _Factored(NamedTuple):
    """A factor of all rows, and the point where it was made."""

    system: System
    point: ResidualPoint

    def is_of(self, new: ResidualPoint) -> bool:
        """Whether it is the factor of that point, too. Curved cones must not have moved at all:
        where a slack is tiny, so is the step that changes their derivative."""
        old = self.point
        return old is new or (
            old.spectrum.is_diagonal and torch.equal(old.spectrum.values, new.spectrum.values)
        )

    def is_on_faces_of(self, new: ResidualPoint) -> bool:
        """Whether the same rows are free, fixed, and between."""
        old_d, new_d = self.point.spectrum.values, new.spectrum.values
        return old_d is new_d or (
            torch.equal(old_d > 0, new_d > 0) and torch.equal(old_d < 1, new_d < 1)
        )


def polish(
    operators: Operators,
    x: Tensor,
    s: Tensor,
    y: Tensor,
    visible: Visible,
    units: Tensor | None,
    *,
    follow: bool = True,
) -> Root:
    """The root of the residual map near a solver's (x, s, y).

    visible: where a solution or multiplier that is not unique is flagged.
    units:   (B or 1, n) of x, in which norms of null vectors are taken; None for ones.
    follow:  no sharper point is to be had from a solver.
    """
    # Newton's method, from v = y - s.
    best, factor, steps = _settle(operators, ResidualPoint.at(operators, x, y - s), visible, units)

    # Rows that it did not settle, along the central path.
    rows = _above(best.size, NEWTON.stuck)
    if follow and len(rows) and operators.data.program.inequality_count:
        inside = _interior(operators.rows(rows), x[rows], s[rows], y[rows])
        best, factor = _along_path(operators, rows, inside, best, factor, visible, units)

    # Rows where a large number elsewhere hides that they are not done.
    sizes = term_sizes(operators, best.x, best.s, best.y, JUDGING)
    judged = relative_size(best.F1, best.F2, sizes)
    hidden = _hidden(judged, best)
    if len(hidden):
        # Nearly always one more step does, by the factor of the point where they are.
        if factor is None or not factor.is_of(best):
            factor = _Factored(factorise(operators, best.spectrum, visible, units), best)
        best = _stepped(operators, hidden, best, factor)
        sizes = term_sizes(operators, best.x, best.s, best.y, JUDGING)
        judged = relative_size(best.F1, best.F2, sizes)
        hidden = _hidden(judged, best)
    if len(hidden):
        best, factor = best.put(hidden, _unhidden(operators, hidden, best, visible, units)), None
        sizes = term_sizes(operators, best.x, best.s, best.y, JUDGING)
        judged = relative_size(best.F1, best.F2, sizes)

    # Flags and the error estimate want a factor of the faces where the point lies; the derivative,
    # one of the very point.
    if factor is None or not factor.is_on_faces_of(best):
        factor = _Factored(factorise(operators, best.spectrum, visible, units), best)
    system = factor.system
    dx, dv = _uncertainty(operators, best, system, sizes)
    error = _relative_step(operators.data.program, dx, best.x, visible)
    turning = _turning(operators, best, system, (dx, dv), error, visible, units)
    margin = operators.data.program.cones.margin(best.v, best.s)
    return Root(
        operators,
        best.x,
        best.s,
        best.y,
        residual=best.size,
        judged=judged,
        spectrum=best.spectrum,
        error=error,
        margin=margin,
        steps=steps,
        pivot=system.smallest if isinstance(system, DenseSystem) else None,
        visible=visible,
        units=units,
        last=system if factor.is_of(best) else None,
        flagged=system.singular | system.poor | turning,
        turning=turning,
        near=margin < (dv.abs().amax(1).clamp(min=MARGIN) if dv.shape[1] else MARGIN),
        unfelt=torch.zeros_like(margin, dtype=torch.bool),
    )


def _settle(
    operators: Operators, point: ResidualPoint, visible: Visible, units: Tensor | None
) -> tuple[ResidualPoint, _Factored | None, Tensor]:
    """Semismooth Newton, row by row: (the best point of each row, the last factor of all rows,
    steps).

    Steps are full and need not descend: while the active set settles the residual may rise. A row
    gives up after some steps without a new best. A factor is kept while its steps still gain much.
    """
    best, batch = point, len(point.x)
    if is_within(point.size, NEWTON.target):
        return best, None, torch.zeros(batch, dtype=torch.int64, device=point.x.device)
    patience = torch.full((batch,), NEWTON.patience, device=point.x.device)
    steps = torch.zeros_like(patience)
    factor: _Factored | None = None
    everything, gains = torch.arange(batch, device=point.x.device), False
    for _ in range(NEWTON.steps):
        # The rows that are left, and their factor.
        left = (best.size > NEWTON.target) & (patience > 0)
        all_rows = bool(left.all())
        rows = everything if all_rows else torch.nonzero(left).flatten()
        if not len(rows):
            break
        if all_rows:
            if factor is None or not (gains or factor.is_of(point)):
                factor = _Factored(factorise(operators, point.spectrum, visible, units), point)
            part, now, system = operators, point, factor.system
        else:
            part, now = operators.rows(rows), point.rows(rows)
            system = factorise(part, now.spectrum, visible, units_of(units, rows))
        steps += left

        # (x, v) + (dx, dv),  J (dx, dv) = -F
        dx, dv = newton(part, now.spectrum, system, now.F1, now.F2)
        new = ResidualPoint.at(part, now.x + dx, now.v + dv, now.sizes)

        # What it gained: a new best renews a row's patience, a last small gain ends it.
        old, patient = (best.size, patience) if all_rows else (best.size[rows], patience[rows])
        better, settled = new.size < old, (old < NEWTON.settled) & (new.size > 0.1 * old)
        gains = bool((new.size <= torch.clamp(NEWTON.reuse * old, min=NEWTON.target)).all())
        patient = torch.where(settled, 0, torch.where(better, NEWTON.patience, patient - 1))
        patience = patient if all_rows else patience.index_copy(0, rows, patient)
        point = new if all_rows else point.put(rows, new)
        if all_rows and bool(better.all()):
            best = point
        elif bool(better.any()):
            best = best.put(rows[better], new.rows(torch.nonzero(better).flatten()))
    return best, factor, steps


def _along_path(
    operators: Operators,
    rows: Tensor,
    inside: ResidualPoint,
    best: ResidualPoint,
    factor: _Factored | None,
    visible: Visible,
    units: Tensor | None,
) -> tuple[ResidualPoint, _Factored | None]:
    """Some rows, from points inside their inequalities: Newton's method tries again after every
    stride along the path.

    (the best points of all rows, the factor where it is still theirs).
    """
    for _ in range(PATH.steps // PATH.stride):
        part, part_units = operators.rows(rows), units_of(units, rows)
        inside, ended = _follow(part, inside, visible, part_units)
        again, _, _ = _settle(part, ResidualPoint.at(part, inside.x, inside.v), visible, part_units)
        won = again.size < best.size[rows]
        if bool(won.any()):
            best, factor = best.put(rows[won], again.rows(torch.nonzero(won).flatten())), None
        left = torch.nonzero(again.size > NEWTON.settled).flatten()
        if ended or not len(left):
            break
        rows, inside = rows[left], inside.rows(left)
    return best, factor


def _interior(operators: Operators, x: Tensor, s: Tensor, y: Tensor) -> ResidualPoint:
    """A solver's point, inside every inequality."""
    rows = operators.data.program.on(x.device)["inequalities"]
    y, s = (torch.where(rows, part.clamp(min=PATH.floor), part) for part in (y, s))
    return ResidualPoint.inside(operators, x, s, y)


def _follow(
    operators: Operators, point: ResidualPoint, visible: Visible, units: Tensor | None
) -> tuple[ResidualPoint, bool]:
    """A stride of primal-dual interior-point steps towards y s = 0 for every inequality; and
    whether the path has ended.

    Newton on F and on y s = target, the target a share of what it is now for each inequality:

        s dy + y ds = target - y s = r,   dv = dy - ds,   D = y/(y + s),   so
        dy = D dv + r/(y + s),   ds = (D - I) dv + r/(y + s)
    """
    rows = operators.data.program.on(point.x.device)["inequalities"]
    for _ in range(PATH.stride):
        product = torch.where(rows, point.y * point.s, 0.0)
        if bool((product.amax(1) <= PATH.floor).all()):
            return point, True
        # r/(y + s),  r = (share - 1) y s
        both = torch.where(rows, point.y + point.s, 1.0)
        centring = torch.where(rows, (PATH.share - 1) * product / both, 0.0)
        # F with this much of the step in y and s taken already:  F1 + A' r/(y + s),  F2 + r/(y + s)
        system = factorise(operators, point.spectrum, visible, units)
        F1, F2 = point.F1 + operators.At(centring), point.F2 + centring
        dx, dv = newton(operators, point.spectrum, system, F1, F2)
        # dy = D dv + r/(y + s),  ds = dy - dv
        d = point.spectrum.values
        dy = point.spectrum.from_basis(d * point.spectrum.to_basis(dv)) + centring
        ds = dy - dv
        # Nearly to the boundary, at most; a row whose step is no number stays where it is.
        leaving_y = torch.where(rows, -dy / point.y, 0.0)
        leaving_s = torch.where(rows, -ds / point.s, 0.0)
        ratio = torch.maximum(leaving_y, leaving_s).amax(1)
        length = (PATH.boundary / ratio.clamp(min=PATH.boundary)).nan_to_num(0.0).unsqueeze(1)
        dx, dy, ds = (step.nan_to_num(0.0) * length for step in (dx, dy, ds))
        point = ResidualPoint.inside(operators, point.x + dx, point.s + ds, point.y + dy)
    return point, False


def _hidden(judged: Tensor, best: ResidualPoint) -> Tensor:
    """The rows that are at rest, and are not where every entry is measured by its own terms."""
    rows = _above(judged, NEWTON.stuck)
    return rows[best.size[rows] <= NEWTON.stuck] if len(rows) else rows


def _stepped(
    operators: Operators, rows: Tensor, best: ResidualPoint, factor: _Factored
) -> ResidualPoint:
    """One step of Newton's method for some rows, by a factor of all that is theirs."""
    dx, dv = newton(operators, best.spectrum, factor.system, best.F1, best.F2)
    x, v = (best.x + dx)[rows], (best.v + dv)[rows]
    new = ResidualPoint.at(operators.rows(rows), x, v)
    better = new.size <= NEWTON.stuck
    if not bool(better.any()):
        return best
    return best.put(rows[better], new.rows(torch.nonzero(better).flatten()))


def _unhidden(
    operators: Operators, rows: Tensor, best: ResidualPoint, visible: Visible, units: Tensor | None
) -> ResidualPoint:
    """Newton's method again for some rows, every entry of F measured against its own terms."""
    part, now = operators.rows(rows), best.rows(rows)
    sizes = term_sizes(part, now.x, now.s, now.y, WORKING)
    start = ResidualPoint.at(part, now.x, now.v, sizes)
    again, _, _ = _settle(part, start, visible, units_of(units, rows))
    return again


def _uncertainty(
    operators: Operators, point: ResidualPoint, system: System, sizes: Sizes
) -> tuple[Tensor, Tensor]:
    """One more Newton step, from a residual of which no more is known than rounding leaves: how
    far the solution may yet move."""
    unsure = rounding(operators, point.s, point.y, sizes)
    F1 = point.F1 + unsure.dual * _signs(point.F1.shape[1], point.F1.device)
    F2 = point.F2 + unsure.primal * _signs(point.F2.shape[1], point.F2.device)
    return newton(operators, point.spectrum, system, F1, F2)


@constants
def _signs(size: int, device: torch.device) -> Tensor:
    """(size,) of no pattern, the same for every row of a batch."""
    generator = torch.Generator().manual_seed(0)
    return (2.0 * torch.randint(2, (size,), generator=generator) - 1).to(device, torch.float64)


def _turning(
    operators: Operators,
    point: ResidualPoint,
    system: System,
    step: tuple[Tensor, Tensor],
    error: Tensor,
    visible: Visible,
    units: Tensor | None,
) -> Tensor:
    """(B,) the derivative is another one within the point's uncertainty.

    So at a double root, where a curved cone touches what already fixes the solution: the residual
    is the square of the distance, and the derivative grows without end on the way there.
    """
    turning = torch.zeros_like(error, dtype=torch.bool)
    rows = error.new_zeros(0) if point.spectrum.is_diagonal else _above(error, UNSURE)
    if not len(rows):
        return turning
    x, v = (part + moved for part, moved in zip((point.x, point.v), step, strict=True))
    part = operators.rows(rows)
    there = ResidualPoint.at(part, x[rows], v[rows])
    other = factorise(part, there.spectrum, visible, units_of(units, rows))
    probe = [_signs(size.shape[1], x.device).expand_as(size) for size in step]
    here, _ = system.solve(*probe, newton=True)
    moved, _ = other.solve(*(side[rows] for side in probe), newton=True)
    here = here[rows]
    turning[rows] = (moved - here).abs().amax(1) > TURNED * here.abs().amax(1)
    return turning


def _relative_step(program: Program, dx: Tensor, x: Tensor, visible: Visible) -> Tensor:
    """(B,) the largest step that is seen, relative to what is seen of x in its part of the
    program."""
    if not x.shape[1]:
        return x.new_zeros(len(x))
    seen, step = (x * visible.x).abs(), (dx * visible.x).abs()
    return (step / largest_of_part(seen, "part_of_x", program).clamp(min=SMALLEST_X)).amax(1)


def newton(
    operators: Operators, spectrum: ProductSpectrum, system: System, F1: Tensor, F2: Tensor
) -> tuple[Tensor, Tensor]:
    """The step that zeroes F to first order, in x and in the cone's variable v.

    P dx + A'D dv = -F1,   A dx - (I - D) dv = -F2

    With D dv = U e:   K (dx, eta) = (-F1, -sqrt(d) U'F2),   e = sqrt(d) eta

    dv = A dx + F2 + U e
    """
    dx, e = system.solve(-F1, -spectrum.to_basis(F2), newton=True)
    return dx, operators.A(dx) + F2 + spectrum.from_basis(e)


def is_within(sizes: Tensor, limit: float) -> bool:
    """(B,), by one look at them; false where one is NaN."""
    return not sizes.numel() or sizes.amax().item() <= limit


def _above(sizes: Tensor, limit: float) -> Tensor:
    """The rows of sizes (B,) above a limit."""
    if is_within(sizes, limit):
        return sizes.new_zeros(0, dtype=torch.int64)
    return torch.nonzero(sizes > limit).flatten()


def units_of(units: Tensor | None, rows: Tensor) -> Tensor | None:
    """Of these rows, where units are given."""
    return None if units is None else take_rows(units, rows)
