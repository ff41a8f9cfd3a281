"""Polish a solver's answer to a zero of the residual map, and differentiate that zero: one factorisation for both.

Newton:   J (dx, dv) = -F,    J = [ P  A'D ;  A  D - I ],  D = DPi_K*(v)
Adjoint:  cotangents (gx, gy):  J'(w, u) = (gx, D gy),  which is  K (w, eta) = (gx, D^1/2 gy),  u = D^1/2 eta,  and then
          dq = -w    db = u    dA = -(y w' + u x')    dP = -(w x' + x w')/2

Source: the implicit function theorem; Busseti, Moursi and Boyd (2019) for refinement at regular points.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import ClassVar

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

TARGET = 1e-13  # relative residual at which polish has nothing left to do
REUSE = 1e-3  # a factor serves another step while every row's residual falls to this share
STEPS = 20  # of Newton, at most
PATIENCE = 4  # steps without a new best before a row gives up
STUCK = 1e-9  # rows above this after Newton follow the central path
PATH, STRIDE = 40, 8  # at most this many steps, and after so many Newton's method tries again;
SHRINK = 0.05  # they are aimed at this share of every y s,
FLOOR = 1e-24  # until they are all below this
SETTLED = 1e-11  # below this residual, a step that gains less than a digit was the last
KINK = 1e-11  # |v| below this counts as weakly active: treated as inactive
MARGIN = 1e-7  # distance from a kink below which a row is flagged, or below one more Newton step


@dataclass(eq=False)
class Zero:
    """A zero of the residual map, in the data's units, with what its derivative needs."""

    operators: Operators | None
    x: Tensor  # (B, n)
    s: Tensor  # (B, m)
    y: Tensor  # (B, m)
    residual: Tensor  # (B,) relative, rounding counting for nothing
    judged: Tensor  # (B,) relative, as strictly as rounding allows
    spectrum: ProductSpectrum  # of DPi_K* at v = y - s
    error: Tensor  # (B,) estimated relative error of what the user sees of x: the size of one more Newton step
    margin: Tensor  # (B,) distance from the nearest kink
    steps: Tensor  # (B,) of Newton that found it
    pivot: Tensor | None  # (B,) the smallest of the dense factor
    visible: Visible
    units: Tensor | None
    last: DenseSystem | SparseSystem | None  # the polish's last factor, if it belongs to this very point
    flagged: Tensor  # (B,) singular, or not solved well, as the polish found it
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

    def settled(self) -> Zero:
        """Without what its derivative does not need."""
        return self if self.last is None else replace(self, operators=None)

    @cached_property
    def system(self) -> DenseSystem | SparseSystem:
        """The factored system here: the polish's last one, or where curved cones have moved since, a new one."""
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
    sizes: Sizes | None  # that it is relative to: those of its terms where the polish began; None: see `residual`

    def rows(self, index: Tensor) -> ResidualPoint:
        """The points of some rows."""
        parts = {name: getattr(self, name)[index] for name in ResidualPoint.TENSORS}
        return ResidualPoint(**parts, spectrum=self.spectrum.index_select(index), sizes=self.sizes and self.sizes.rows(index))

    def put(self, index: Tensor, other: ResidualPoint) -> ResidualPoint:
        """These points, with those of some rows replaced."""
        parts = {name: getattr(self, name).index_copy(0, index, getattr(other, name)) for name in ResidualPoint.TENSORS}
        bases = [
            (where, basis.index_copy(0, index, basis_new))
            for (where, basis), (_, basis_new) in zip(self.spectrum.bases, other.spectrum.bases, strict=True)
        ]
        values = self.spectrum.values.index_copy(0, index, other.spectrum.values)
        return ResidualPoint(**parts, spectrum=ProductSpectrum(values, bases), sizes=self.sizes)

    @classmethod
    def at(cls, operators: Operators, x: Tensor, v: Tensor, sizes: Sizes | None = None) -> ResidualPoint:
        y, s, spectrum = operators.data.program.cones.linearise_dual(v, KINK)
        return cls(x, v, y, s, *residual(operators, x, s, y, sizes), spectrum, sizes)

    @classmethod
    def inside(cls, operators: Operators, x: Tensor, s: Tensor, y: Tensor) -> ResidualPoint:
        """With s and y of the inequalities as they are, both positive: D = y / (y + s) there, as on a central path."""
        program = operators.data.program
        v = y - s
        y_edge, s_edge, spectrum = program.cones.linearise_dual(v, KINK)
        rows = program.on(x.device)["inequalities"]
        y, s = torch.where(rows, y, y_edge), torch.where(rows, s, s_edge)
        values = torch.where(rows, y / (y + s), spectrum.values)
        spectrum = ProductSpectrum(values, spectrum.bases)
        return cls(x, v, y, s, *residual(operators, x, s, y), spectrum, None)


def polish(
    operators: Operators,
    x: Tensor,
    s: Tensor,
    y: Tensor,
    visible: Visible,
    units: Tensor | None,
    *,
    follow: bool = True,
) -> Zero:
    """The zero of the residual map near a solver's (x, s, y).

    Newton's method settles it at once where the active set is right. Rows where it is not may follow the central path from the
    solver's point a little further, and try again.

    visible: where a solution or multiplier that is not unique is flagged.
    units:   (B or 1, n) of x, in which norms of null vectors are taken; None for ones.
    follow:  no sharper point is to be had from a solver.
    """
    best, factor, steps = _settle(operators, ResidualPoint.at(operators, x, y - s), visible, units)
    rows = _above(best.size, STUCK)
    if follow and len(rows) and operators.data.program.inequality_count:
        inside = _interior(operators.rows(rows), x[rows], s[rows], y[rows])
        for _ in range(PATH // STRIDE):
            part, part_units = operators.rows(rows), units_of(units, rows)
            inside, ended = _follow(part, inside, visible, part_units)
            again, _, _ = _settle(part, ResidualPoint.at(part, inside.x, inside.v), visible, part_units)
            won = again.size < best.size[rows]
            if bool(won.any()):
                best, factor = best.put(rows[won], again.rows(torch.nonzero(won).flatten())), None
            left = torch.nonzero(again.size > SETTLED).flatten()
            if ended or not len(left):
                break
            rows, inside = rows[left], inside.rows(left)
    sizes = term_sizes(operators, best.x, best.s, best.y, JUDGING)
    judged = relative_size(best.F1, best.F2, sizes)
    hidden = _above(judged, STUCK)
    if len(hidden):
        hidden = hidden[best.size[hidden] <= STUCK]
    if len(hidden):
        # A large number elsewhere hides that these are not done.
        part, now = operators.rows(hidden), best.rows(hidden)
        now = ResidualPoint.at(part, now.x, now.v, term_sizes(part, now.x, now.s, now.y, WORKING))
        again, _, _ = _settle(part, now, visible, units_of(units, hidden))
        best, factor = best.put(hidden, again), None
        sizes = term_sizes(operators, best.x, best.s, best.y, JUDGING)
        judged = relative_size(best.F1, best.F2, sizes)
    # Flags and the error estimate want a factor of the faces where the point lies; the derivative, one of the very point.
    if factor is None or not _on_same_faces(factor[1].spectrum.values, best.spectrum.values):
        factor = factorise(operators, best.spectrum, visible, units), best
    system = factor[0]
    # One more Newton step, from a residual of which no more is known than rounding leaves: how far the solution may yet move.
    unsure = rounding(operators, best.s, best.y, sizes)
    F1, F2 = (F + part * _signs(F.shape[1], F.device) for F, part in zip((best.F1, best.F2), unsure, strict=True))
    dx, dv = newton(operators, best.spectrum, system, F1, F2)
    error = _relative_step(operators.data.program, dx, best.x, visible)
    pivot = system.smallest if isinstance(system, DenseSystem) else None
    last = system if _same(factor[1], best) else None
    margin = operators.data.program.cones.margin(best.v, best.s)
    near = margin < (dv.abs().amax(1).clamp(min=MARGIN) if dv.shape[1] else MARGIN)
    flagged = system.singular | system.poor
    return Zero(
        operators,
        best.x,
        best.s,
        best.y,
        best.size,
        judged,
        best.spectrum,
        error,
        margin,
        steps,
        pivot,
        visible,
        units,
        last,
        flagged,
        near,
        torch.zeros_like(flagged),
    )


@cache
def _signs(size: int, device: torch.device) -> Tensor:
    """(size,) of no pattern, the same for every row of a batch."""
    generator = torch.Generator().manual_seed(0)
    return (2.0 * torch.randint(2, (size,), generator=generator) - 1).to(device, torch.float64)


def _relative_step(program: Program, dx: Tensor, x: Tensor, visible: Visible) -> Tensor:
    """(B,) the largest step that is seen, relative to what is seen of x in its part of the program."""
    if not x.shape[1]:
        return x.new_zeros(len(x))
    seen, step = (x * visible.x).abs(), (dx * visible.x).abs()
    return (step / largest_of_part(seen, "part_of_x", program).clamp(min=1e-3)).amax(1)


def _interior(operators: Operators, x: Tensor, s: Tensor, y: Tensor) -> ResidualPoint:
    """A solver's point, inside every inequality."""
    rows = operators.data.program.on(x.device)["inequalities"]
    y, s = (torch.where(rows, part.clamp(min=FLOOR), part) for part in (y, s))
    return ResidualPoint.inside(operators, x, s, y)


def _follow(
    operators: Operators, point: ResidualPoint, visible: Visible, units: Tensor | None
) -> tuple[ResidualPoint, bool]:
    """Primal-dual interior-point steps, a STRIDE of them, towards y s = 0 for every inequality; and whether the path has ended.

    Newton on F and on y s = target, the target a share of what it is now for each inequality:
        s dy + y ds = r,   so   dy = D dv + r/(y + s),   ds = (D - I) dv + r/(y + s),   D = y/(y + s).
    """
    rows = operators.data.program.on(point.x.device)["inequalities"]
    for _ in range(STRIDE):
        product = torch.where(rows, point.y * point.s, 0.0)
        if bool((product.amax(1) <= FLOOR).all()):
            return point, True
        share = torch.where(rows, (SHRINK - 1) * product / torch.where(rows, point.y + point.s, 1.0), 0.0)
        system = factorise(operators, point.spectrum, visible, units)
        dx, dv = newton(operators, point.spectrum, system, point.F1 + operators.At(share), point.F2 + share)
        dy = point.spectrum.from_basis(point.spectrum.values * point.spectrum.to_basis(dv)) + share
        ds = dy - dv
        # As far as 0.99 of the way to the boundary; a row whose step is no number stays where it is.
        ratio = torch.maximum(torch.where(rows, -dy / point.y, 0.0), torch.where(rows, -ds / point.s, 0.0)).amax(1)
        length = (0.99 / ratio.clamp(min=0.99)).nan_to_num(0.0).unsqueeze(1)
        dx, dy, ds = (step.nan_to_num(0.0) * length for step in (dx, dy, ds))
        point = ResidualPoint.inside(operators, point.x + dx, point.s + ds, point.y + dy)
    return point, False


def _settle(
    operators: Operators, point: ResidualPoint, visible: Visible, units: Tensor | None
) -> tuple[ResidualPoint, tuple[DenseSystem | SparseSystem, ResidualPoint] | None, Tensor]:
    """Semismooth Newton, row by row: (the best point of each row, the last factor of all rows and where it was made, steps).

    Steps are full and need not descend: while the active set settles the residual may rise. A row gives up after PATIENCE
    steps without a new best. A factor is kept while its steps still gain REUSE each.
    """
    best, batch = point, len(point.x)
    if is_within(point.size, TARGET):
        return best, None, torch.zeros(batch, dtype=torch.int64, device=point.x.device)
    patience = torch.full((batch,), PATIENCE, device=point.x.device)
    steps = torch.zeros_like(patience)
    factor: tuple[DenseSystem | SparseSystem, ResidualPoint] | None = None  # of all rows, and where
    everything, gains = torch.arange(batch, device=point.x.device), False
    for _ in range(STEPS):
        left = (best.size > TARGET) & (patience > 0)
        all_rows = bool(left.all())
        rows = everything if all_rows else torch.nonzero(left).flatten()
        if not len(rows):
            break
        if all_rows:
            if factor is None or not (gains or _same(factor[1], point)):
                factor = factorise(operators, point.spectrum, visible, units), point
            part, now, system = operators, point, factor[0]
        else:
            part, now = operators.rows(rows), point.rows(rows)
            system = factorise(part, now.spectrum, visible, units_of(units, rows))
        steps += left
        dx, dv = newton(part, now.spectrum, system, now.F1, now.F2)
        new = ResidualPoint.at(part, now.x + dx, now.v + dv, now.sizes)
        old, patient = (best.size, patience) if all_rows else (best.size[rows], patience[rows])
        better, settled = new.size < old, (old < SETTLED) & (new.size > 0.1 * old)
        gains = bool((new.size <= torch.clamp(REUSE * old, min=TARGET)).all())
        patient = torch.where(settled, 0, torch.where(better, PATIENCE, patient - 1))
        patience = patient if all_rows else patience.index_copy(0, rows, patient)
        point = new if all_rows else point.put(rows, new)
        if all_rows and bool(better.all()):
            best = point
        elif bool(better.any()):
            best = best.put(rows[better], new.rows(torch.nonzero(better).flatten()))
    return best, factor, steps


def is_within(sizes: Tensor, limit: float) -> bool:
    """(B,), by one look at them; false where one is NaN."""
    return not sizes.numel() or sizes.amax().item() <= limit


def _above(sizes: Tensor, limit: float) -> Tensor:
    """The rows of sizes (B,) above a limit."""
    within = is_within(sizes, limit)
    return torch.nonzero(sizes > limit).flatten() if not within else sizes.new_zeros(0, dtype=torch.int64)


def units_of(units: Tensor | None, rows: Tensor) -> Tensor | None:
    """Of these rows, where units are given."""
    return None if units is None else take_rows(units, rows)


def _same(old: ResidualPoint, new: ResidualPoint) -> bool:
    """The factor of the old point is that of the new one. Curved cones must not have moved at all: where a slack is tiny, so
    is the step that changes their derivative."""
    return old is new or (old.spectrum.is_diagonal and torch.equal(old.spectrum.values, new.spectrum.values))


def _on_same_faces(old: Tensor, new: Tensor) -> bool:
    return old is new or (torch.equal(old > 0, new > 0) and torch.equal(old < 1, new < 1))


def newton(operators: Operators, spectrum: ProductSpectrum, system, F1: Tensor, F2: Tensor) -> tuple[Tensor, Tensor]:
    """The step that zeroes F to first order, in x and in the cone's variable z."""
    dx, e = system.solve(-F1, -spectrum.to_basis(F2), newton=True)
    return dx, operators.A(dx) + F2 + spectrum.from_basis(e)


def adjoint(zero: Zero, x_bar: Tensor, y_bar: Tensor) -> tuple[Tensor, Tensor]:
    """Cotangents of x (B, n) and y (B, m) -> (w (B, n), u (B, m)), from which those of the data follow (see `pull_back`).

    Of (-q, b) that is: a symmetric map, as (x, -y) is the gradient of the optimal value in (q, b). So it also takes a change of
    (-q, b) to that of (x, y).
    """
    w, e = zero.system.solve(x_bar, zero.spectrum.to_basis(y_bar))
    return w, zero.spectrum.from_basis(e)


def pull_back(name: str, program: Program, moving: Tensor, x: Tensor, y: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """Cotangents of the stored entries `moving` of P or A from the adjoint (w, u): (B, entries)."""
    index = program.on(x.device)
    moving = moving.to(x.device)
    if name == "P":
        i, j = index["P_rows"][moving], index["P_cols"][moving]
        # An off-diagonal entry of the stored triangle stands for two entries of P.
        return -(w[:, i] * x[:, j] + w[:, j] * x[:, i]) * torch.where(i == j, 0.5, 1.0).to(x.dtype)
    row, col = index["A_rows"][moving], index["A_cols"][moving]
    return -(y[:, row] * w[:, col] + u[:, row] * x[:, col])


def pull_back_whole(name: str, x: Tensor, y: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """The same of all entries: (B, n * n) or (B, m * n)."""
    left, right = ((w, x), (x, w)) if name == "P" else ((y, u), (w, x))
    bar = torch.bmm(torch.stack(left, 2), torch.stack(right, 1)).neg_()
    return (bar.mul_(0.5) if name == "P" else bar).flatten(1)
