"""Polish a solver's answer to a zero of the residual map, and differentiate that zero: one factorisation for both.

Newton:   J (dx, dv) = -F,    J = [ P  A'D ;  A  D - I ],  D = DPi_K*(v)
Adjoint:  cotangents (gx, gy, gs):  r = D(gy + gs) - gs,  J'(w, u) = (gx, r),  and then
          dq = -w    db = u    dA = -(y w' + u x')    dP = -(w x' + x w')/2

Source: the implicit function theorem; Busseti, Moursi and Boyd (2019) for refinement at regular points.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from convlayer.cones import ProductSpectrum
from convlayer.kkt import DenseSystem, SparseSystem, Visible, factorise
from convlayer.program import Data, Operators
from convlayer.residual import residual

TARGET = 1e-13  # relative residual at which polish has nothing left to do
REUSE = 1e-3
STEPS = 20
PATIENCE = 4
SETTLED = 1e-11  # below this residual, a step that gains less than a digit was the last
KINK = 1e-11  # |v| below this counts as weakly active: treated as inactive
MARGIN = 1e-7  # distance from a kink below which a row is flagged


@dataclass(eq=False)
class Zero:
    """A zero of the residual map, in the data's units, with what its derivative needs."""

    operators: Operators
    x: Tensor  # (B, n)
    s: Tensor  # (B, m)
    y: Tensor  # (B, m)
    residual: Tensor  # (B,) relative
    spectrum: ProductSpectrum  # of DPi_K* at v = y - s
    error: Tensor  # (B,) estimated relative error of what the user sees of x: the size of one more Newton step
    degenerate: Tensor  # (B,) weakly active or singular
    visible: Visible
    units: Tensor | None
    last: DenseSystem | SparseSystem | None  # the polish's last factor, if it belongs to this very point

    @cached_property
    def system(self) -> DenseSystem | SparseSystem:
        """The factored system here: the polish's last one, or where curved cones have moved since, a new one."""
        return self.last or factorise(self.operators, self.spectrum, self.visible, self.units)


@dataclass(eq=False)
class _Point:
    """A point of the polish, row by row."""

    x: Tensor  # (B, n)
    v: Tensor  # (B, m)
    y: Tensor
    s: Tensor
    spectrum: ProductSpectrum
    F1: Tensor
    F2: Tensor
    size: Tensor  # (B,) relative residual

    @classmethod
    def at(cls, operators: Operators, x: Tensor, v: Tensor) -> _Point:
        y, s, spectrum = operators.data.program.cones.linearise_dual(v, KINK)
        return cls(x, v, y, s, spectrum, *residual(operators, x, s, y))


def polish(operators: Operators, x: Tensor, s: Tensor, y: Tensor, visible: Visible, units: Tensor | None) -> Zero:
    """Semismooth Newton on the residual map from (x, y - s), row by row, keeping the best point of each.

    Steps are full and need not descend: while the active set settles the residual may rise. A row gives up after PATIENCE
    steps without a new best. A factor is kept while its steps still gain REUSE each.

    visible: where a solution or multiplier that is not unique is flagged.
    units:   (B or 1, n) of x, in which norms of null vectors are taken; None for ones.
    """
    point = best = _Point.at(operators, x, y - s)
    x, v = point.x, point.v
    patience = torch.full((len(x),), PATIENCE)
    factor: tuple[DenseSystem | SparseSystem, _Point] | None = None  # of all rows, and where
    singular, gains = torch.zeros(len(x), dtype=torch.bool), False
    for _ in range(STEPS):
        rows = torch.nonzero((best.size > TARGET) & (patience > 0)).flatten()
        if not len(rows):
            break
        if len(rows) == len(x):
            if factor is None or not (gains or _same(factor[1], point)):
                factor = factorise(operators, point.spectrum, visible, units), point
            part, system = operators, factor[0]
        else:
            part = operators.rows(rows)
            point = _Point.at(part, x[rows], v[rows])
            system = factorise(
                part, point.spectrum, visible, units if units is None or len(units) == 1 else units[rows]
            )
        dx, dv = _newton(part, point.spectrum, system, point.F1, point.F2)
        point = _Point.at(part, point.x + dx, point.v + dv)
        old = best.size[rows]
        better, settled = point.size < old, (old < SETTLED) & (point.size > 0.1 * old)
        gains = bool((point.size <= torch.clamp(REUSE * old, min=TARGET)).all())
        patience[rows] = torch.where(settled, 0, torch.where(better, PATIENCE, patience[rows] - 1))
        x, v = (
            (point.x, point.v)
            if len(rows) == len(x)
            else (x.index_copy(0, rows, point.x), v.index_copy(0, rows, point.v))
        )
        if len(rows) == len(x) and bool(better.all()):
            best = point
        elif bool(better.any()):
            rows = rows[better]
            best = _Point.at(operators, best.x.index_copy(0, rows, x[rows]), best.v.index_copy(0, rows, v[rows]))
    error = torch.zeros(len(x), dtype=x.dtype)
    if factor is not None:
        singular = factor[0].singular
        if factor[0].stiff:
            dx, _ = _newton(operators, best.spectrum, factor[0], best.F1, best.F2)
            error = (dx * visible.x).abs().amax(1) / best.x.abs().amax(1).clamp(min=1e-3)
    last = factor[0] if factor is not None and _same(factor[1], best) else None
    degenerate = singular | (operators.data.program.cones.margin(best.v) < MARGIN)
    return Zero(operators, best.x, best.s, best.y, best.size, best.spectrum, error, degenerate, visible, units, last)


def _same(old: _Point, new: _Point) -> bool:
    """The factor of the old point is that of the new one. Curved cones must not have moved at all: where a slack is tiny, so
    is the step that changes their derivative."""
    return old is new or (old.spectrum.is_diagonal and bool((old.spectrum.values == new.spectrum.values).all()))


def _newton(operators: Operators, spectrum: ProductSpectrum, system, F1: Tensor, F2: Tensor) -> tuple[Tensor, Tensor]:
    dx, e = system.solve(-F1, -spectrum.to_basis(F2), refine=False)
    return dx, operators.A(dx) + F2 + spectrum.from_basis(e)


def adjoint(zero: Zero, x_bar: Tensor, y_bar: Tensor) -> tuple[Tensor, Tensor]:
    """Cotangents of x (B, n) and y (B, m) -> (w (B, n), u (B, m)), from which those of the data follow (see `pull_back`)."""
    spectrum = zero.spectrum
    r_basis = spectrum.values * spectrum.to_basis(y_bar)
    r = spectrum.from_basis(r_basis)
    w, e = zero.system.solve(x_bar + zero.operators.At(r), r_basis)
    return w, spectrum.from_basis(e) - r


def pull_back(data: Data, moving: dict[str, Tensor], x: Tensor, y: Tensor, w: Tensor, u: Tensor) -> dict[str, Tensor]:
    """Cotangents of the data's values from the adjoint (w, u): P and A only at the stored entries named by `moving`. All (B, .)."""
    index = data.program.indices
    i, j = index["P_rows"][moving["P"]], index["P_cols"][moving["P"]]
    row, col = index["A_rows"][moving["A"]], index["A_cols"][moving["A"]]
    # An off-diagonal entry of the stored triangle stands for two entries of P.
    P_bar = -(w[:, i] * x[:, j] + w[:, j] * x[:, i]) * torch.where(i == j, 0.5, 1.0).to(x.dtype)
    return {"P": P_bar, "q": -w, "A": -(y[:, row] * w[:, col] + u[:, row] * x[:, col]), "b": u}
