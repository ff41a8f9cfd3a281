"""The root of the smoothed residual map: the point of the central path at kappa, and with it a
smooth derivative.

    minimise 1/2 x'Px + q'x + kappa f(s)  subject to Ax + s = b,     f the barrier of K, rows of the zero cone at s = 0

With v = y - s, y = y_kappa(v) inside K* and s = s_kappa(v) inside K satisfy y = -kappa grad f(s) by
construction, so that this is

    F_kappa(x, v) = [ Px + q + A'y ;  Ax + s - b ] = 0,     J = [ P  A'D ;  A  D - I ],  D = dy/dv, between 0 and I:

the residual map of `polish` with other y, s and D, and hence its systems, its Newton step and its
adjoint. The path exists where primal and dual have strictly feasible points; elsewhere the root is
at infinity.

Source: Chen and Mangasarian (1996) for smoothing a projection; Nesterov and Nemirovskii (1994) for
        the path.
"""

from __future__ import annotations

import torch
from torch import Tensor

from convlayer.conic.kkt import DenseSystem, Visible, factorise
from convlayer.conic.polish import NEWTON, SMALLEST_X, ResidualPoint, Root, newton, units_of
from convlayer.conic.program import Operators
from convlayer.conic.residual import residual

# Steps of Newton, at most; fewer than ten are usual.
STEPS = 50
# Halvings of a step, at most.
HALVINGS = 30
# Share of the promised descent that a step must keep.
DESCENT = 1e-4
# A Newton step longer than this share of the point says that the root is elsewhere, whatever the
# residual.
AWAY = 1e-3


def smoothed(
    operators: Operators,
    x: Tensor,
    s: Tensor,
    y: Tensor,
    kappa: float,
    visible: Visible,
    units: Tensor | None,
) -> Root:
    """The root of F_kappa, from solutions (x, s, y) of the program itself, with what its derivative
    needs.

    A row where it was not found has a residual above 1e-12. Where there is none, the residual falls
    for ever as the points run away, and each Newton step is as long as the point: its length counts
    as residual where it is not short.

    kappa: positive, in the units of the operators' data.
    visible, units: as in `polish`.
    """
    point = _at(operators, x, y - s, kappa)
    running, steps = (
        torch.ones_like(point.size, dtype=torch.bool),
        torch.zeros_like(point.size, dtype=torch.int64),
    )
    for _ in range(STEPS):
        rows = torch.nonzero(running & ~(point.size <= NEWTON.target)).flatten()
        if not len(rows):
            break
        steps[rows] += 1
        part, now = operators.rows(rows), point.rows(rows)
        system = factorise(part, now.spectrum, visible, units_of(units, rows))
        dx, dv = newton(part, now.spectrum, system, now.F1, now.F2)
        new, running[rows] = _shortened(part, now, dx, dv, kappa)
        point = point.put(rows, new)
    # One more Newton step says how far away the root still is, and whether there is one.
    system = factorise(operators, point.spectrum, visible, units)
    dx, dv = newton(operators, point.spectrum, system, point.F1, point.F2)
    alone = _alone(operators, point)
    away = torch.stack([_share(dx, x, point.x), _share(dv, point.v), _share(alone, point.v)]).amax(
        0
    )
    return Root(
        operators,
        point.x,
        point.s,
        point.y,
        residual=torch.where(away <= AWAY, point.size, away.clamp(min=AWAY).nan_to_num(torch.inf)),
        judged=point.size,
        spectrum=point.spectrum,
        error=(dx * visible.x).abs().amax(1) / point.x.abs().amax(1).clamp(min=SMALLEST_X),
        margin=torch.full_like(point.size, torch.inf),
        flagged=system.singular | system.poor,
        turning=torch.zeros_like(system.singular),
        near=torch.zeros_like(system.singular),
        unfelt=torch.zeros_like(system.singular),
        steps=steps,
        pivot=system.smallest if isinstance(system, DenseSystem) else None,
        visible=visible,
        units=units,
        last=system,
    )


def _at(operators: Operators, x: Tensor, v: Tensor, kappa: float) -> ResidualPoint:
    y, s, spectrum = operators.data.program.cones.smooth_dual(v, v.new_tensor(kappa))
    F1, F2, size = residual(operators, x, s, y)
    # Where kappa is large or the feasible set thin, x and y are larger than the units say.
    return ResidualPoint(x, v, y, s, F1, F2, size / _largest(x, y).clamp(min=1), spectrum, None)


def _shortened(
    operators: Operators, now: ResidualPoint, dx: Tensor, dv: Tensor, kappa: float
) -> tuple[ResidualPoint, Tensor]:
    """The first of the halved steps by which |F| falls enough, row by row, and (B,) whether there
    was one."""
    length, before, new = torch.ones_like(now.size), _merit(now), now
    waiting = torch.arange(len(length), device=length.device)
    for _ in range(HALVINGS):
        t = length[waiting].unsqueeze(1)
        x, v = (part[waiting] + t * step[waiting] for part, step in ((now.x, dx), (now.v, dv)))
        trial = _at(operators.rows(waiting), x, v, kappa)
        # |F(z + t dz)| <= (1 - DESCENT t) |F(z)|
        good = _merit(trial) <= (1 - DESCENT * t.squeeze(1)) * before[waiting]
        if bool(good.any()):
            new = new.put(waiting[good], trial.rows(torch.nonzero(good).flatten()))
        waiting = waiting[~good]
        if not len(waiting):
            break
        length[waiting] *= 0.5
    found = torch.ones_like(length, dtype=torch.bool)
    found[waiting] = False
    return new, found


def _merit(point: ResidualPoint) -> Tensor:
    return torch.linalg.vector_norm(torch.cat([point.F1, point.F2], 1), dim=1)


def _alone(operators: Operators, point: ResidualPoint) -> Tensor:
    """The step (I - D)^-1 F2 that v would take without x, (B, m): where I - D is lost to rounding J
    is singular, and its own step, orthogonal to the null space, says nothing."""
    free = (1 - point.spectrum.values).clamp(min=torch.finfo(point.v.dtype).eps)
    return torch.where(
        operators.data.program.equalities.to(free.device),
        0.0,
        point.spectrum.to_basis(point.F2) / free,
    )


def _largest(*parts: Tensor) -> Tensor:
    """(B,)"""
    return torch.cat(parts, 1).abs().amax(1)


def _share(step: Tensor, *of: Tensor) -> Tensor:
    """(B,) |step| relative to the vectors it is added to, or to one, where they are smaller."""
    return (
        _largest(step) / _largest(*of).clamp(min=1) if step.shape[1] else step.new_zeros(len(step))
    )
