"""The zero of the smoothed residual map: the point of the central path at kappa, from which a smoothed derivative follows.

    minimise 1/2 x'Px + q'x + kappa f(s)  subject to Ax + s = b,     f the barrier of K, rows of the zero cone at s = 0

With v = y - s, y = y_kappa(v) inside K* and s = s_kappa(v) inside K satisfy y = -kappa grad f(s) by construction, so that this is

    F_kappa(x, v) = [ Px + q + A'y ;  Ax + s - b ] = 0,     J = [ P  A'D ;  A  D - I ],  D = dy/dv, between 0 and I:

the residual map of `adjoint` with other y, s and D, and hence its systems, its Newton step and its adjoint. The path exists
where primal and dual have strictly feasible points; elsewhere the zero is at infinity.

Source: Chen and Mangasarian (1996) for smoothing a projection; Nesterov and Nemirovskii (1994) for the path.
"""

from __future__ import annotations

import torch
from torch import Tensor

from convlayer.adjoint import TARGET, Zero, _newton, _Point, _units_of
from convlayer.kkt import DenseSystem, Visible, factorise
from convlayer.program import Operators
from convlayer.residual import residual

STEPS = 40  # of Newton, at most
HALVINGS = 30  # of a step
DESCENT = 1e-4  # share of the promised descent that a step must keep
STUCK = 1e-12  # rows above this after Newton come along the path from a larger kappa,
ROUGH = 1e-6  # met to this,
HIGH = 1.0  # which starts at this or more,
TRIES = 3  # or 100 times more, or again,
SHRINK = 0.1  # and falls by this share or, where that is too fast, its square root,
SLOW = 0.9  # unless that is above this
PATH = 100
AWAY = 1e-6  # a Newton step longer than this share of the point says that the zero is elsewhere, whatever the residual


def smoothed(
    operators: Operators,
    x: Tensor,
    s: Tensor,
    y: Tensor,
    kappa: float,
    visible: Visible,
    units: Tensor | None,
) -> Zero:
    """The zero of F_kappa, from solutions (x, s, y) of the program itself, with what its derivative needs.

    A row without one, or where it was not found, has a residual above 1e-12: where the path runs away, the residual falls
    and the points grow without end, and so the length of the next Newton step, relative to the point, counts as well.

    kappa: positive, in the units of the operators' data.
    visible, units: as in `polish`.
    """
    level = x.new_full((len(x),), kappa)
    point = _settle(operators, _at(operators, x, y - s, level), level, visible, units, TARGET)
    rows = torch.nonzero(~(point.size <= STUCK)).flatten()
    if len(rows):
        part, part_units = operators.rows(rows), _units_of(units, rows)
        other = _follow(part, x[rows], (y - s)[rows], level[rows], visible, part_units)
        other = _settle(part, other, level[rows], visible, part_units, TARGET)
        point = point.put(rows, other)
    system = factorise(operators, point.spectrum, visible, units)
    dx, dv = _newton(operators, point.spectrum, system, point.F1, point.F2)
    step = torch.maximum(_relative(dx, point.x), _relative(dv, point.v)).nan_to_num(torch.inf)
    error = (dx * visible.x).abs().amax(1) / point.x.abs().amax(1).clamp(min=1e-3)
    return Zero(
        operators,
        point.x,
        point.s,
        point.y,
        torch.where(step <= AWAY, point.size, torch.maximum(point.size, step)),
        point.spectrum,
        error,
        system.singular,
        torch.zeros_like(rows).new_zeros(len(x)),
        system.smallest if isinstance(system, DenseSystem) else None,
        visible,
        units,
        system,
    )


def _at(operators: Operators, x: Tensor, v: Tensor, kappa: Tensor) -> _Point:
    y, s, spectrum = operators.data.program.cones.smooth_dual(v, kappa)
    return _Point(x, v, y, s, *residual(operators, x, s, y), spectrum)


def _relative(step: Tensor, point: Tensor) -> Tensor:
    return step.abs().amax(1) / point.abs().amax(1).clamp(min=1e-3) if step.shape[1] else step.new_zeros(len(step))


def _settle(
    operators: Operators, point: _Point, kappa: Tensor, visible: Visible, units: Tensor | None, goal: float
) -> _Point:
    """Newton's method, row by row, each step so short that |F| falls; a row where none does stays where it is."""
    moving = torch.ones_like(point.size, dtype=torch.bool)
    for _ in range(STEPS):
        rows = torch.nonzero(moving & ~(point.size <= goal)).flatten()
        if not len(rows):
            break
        part, now = operators.rows(rows), point.rows(rows)
        system = factorise(part, now.spectrum, visible, _units_of(units, rows))
        steps = _newton(part, now.spectrum, system, now.F1, now.F2)
        new, moving[rows] = _shortened(part, now, *steps, kappa[rows])
        point = point.put(rows, new)
    return point


def _shortened(operators: Operators, now: _Point, dx: Tensor, dv: Tensor, kappa: Tensor) -> tuple[_Point, Tensor]:
    """The first of the halved steps that keeps its promise, and (B,) whether there was one."""
    length, before, new = torch.ones_like(now.size), _merit(now), now
    waiting = torch.arange(len(length), device=length.device)
    found = torch.zeros_like(length, dtype=torch.bool)
    for _ in range(HALVINGS):
        t = length[waiting].unsqueeze(1)
        moved = (part[waiting] + t * step[waiting] for part, step in ((now.x, dx), (now.v, dv)))
        trial = _at(operators.rows(waiting), *moved, kappa[waiting])
        good = _merit(trial) <= (1 - DESCENT * t.squeeze(1)) * before[waiting]
        if bool(good.any()):
            new = new.put(waiting[good], trial.rows(torch.nonzero(good).flatten()))
            found[waiting[good]] = True
        waiting = waiting[~good]
        if not len(waiting):
            break
        length[waiting] *= 0.5
    return new, found


def _merit(point: _Point) -> Tensor:
    return torch.hypot(torch.linalg.vector_norm(point.F1, dim=1), torch.linalg.vector_norm(point.F2, dim=1))


def _follow(
    operators: Operators, x: Tensor, v: Tensor, kappa: Tensor, visible: Visible, units: Tensor | None
) -> _Point:
    """Down the path from a kappa that is large enough for Newton's method to get there at once."""
    level = kappa.clamp(min=HIGH)
    point = _settle(operators, _at(operators, x, v, level), level, visible, units, ROUGH)
    for _ in range(TRIES - 1):
        rows = torch.nonzero(~(point.size <= ROUGH)).flatten()
        if not len(rows):
            break
        level[rows] *= 100
        part, part_units = operators.rows(rows), _units_of(units, rows)
        start = _at(part, x[rows], v[rows], level[rows])
        point = point.put(rows, _settle(part, start, level[rows], visible, part_units, ROUGH))
    share = torch.where(point.size <= ROUGH, SHRINK, 1.0)
    for _ in range(PATH):
        rows = torch.nonzero((level > kappa) & (share < SLOW)).flatten()
        if not len(rows):
            break
        part, part_units, aim = operators.rows(rows), _units_of(units, rows), torch.maximum(kappa, level * share)[rows]
        start = _at(part, point.x[rows], point.v[rows], aim)
        trial = _settle(part, start, aim, visible, part_units, ROUGH)
        good = trial.size <= ROUGH
        level[rows] = torch.where(good, aim, level[rows])
        share[rows] = torch.where(good, share[rows].square().clamp(min=SHRINK), share[rows].sqrt())
        point = point.put(rows[good], trial.rows(torch.nonzero(good).flatten()))
    return _at(operators, point.x, point.v, kappa)
