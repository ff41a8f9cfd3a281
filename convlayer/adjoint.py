"""Polish a solver's answer to a zero of the residual map, and differentiate that zero: one factorisation for both.

Newton:   J (dx, dv) = -F,    J = [ P  A'D ;  A  D - I ],  D = DPi_K*(v)
Adjoint:  cotangents (gx, gy, gs):  r = D(gy + gs) - gs,  J'(w, u) = (gx, r),  and then
          dq = -w    db = u    dA = -(y w' + u x')    dP = -(w x' + x w')/2

Source: the implicit function theorem; Busseti, Moursi and Boyd (2019) for refinement at regular points.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from convlayer.cones import ProductSpectrum
from convlayer.kkt import DenseSystem, SparseSystem, Visible, factorise
from convlayer.program import Data, Operators
from convlayer.residual import residual

TARGET = 1e-14  # relative residual at which polish has nothing left to do
STEPS = 8
KINK = 1e-11  # |v| below this counts as weakly active: treated as inactive
MARGIN = 1e-7  # distance from a kink below which a row is flagged


@dataclass(frozen=True, eq=False)
class Zero:
    """A zero of the residual map, in the data's units, with what its derivative needs."""

    operators: Operators
    x: Tensor  # (B, n)
    s: Tensor  # (B, m)
    y: Tensor  # (B, m)
    residual: Tensor  # (B,) relative
    spectrum: ProductSpectrum  # of DPi_K* at v = y - s
    system: DenseSystem | SparseSystem | None  # None where no derivative is wanted
    degenerate: Tensor  # (B,) weakly active or singular


def polish(operators: Operators, x: Tensor, s: Tensor, y: Tensor, visible: Visible, units: Tensor | None, *,
           differentiable: bool) -> Zero:
    """Semismooth Newton on the residual map from (x, y - s); a row moves only if its residual falls.

    visible: where a solution or multiplier that is not unique is flagged.
    units:   (B or 1, n) of x, in which norms of null vectors are taken; None for ones.
    """
    cones = operators.data.program.cones
    v = y - s
    y, s, spectrum = cones.linearise_dual(v, KINK)
    F1, F2, size = residual(operators, x, s, y)
    system = None
    for _ in range(STEPS):
        if not bool((size > TARGET).any()):
            break
        system = system or factorise(operators, spectrum, visible, units)
        dx, dv = _newton(operators, spectrum, system, F1, F2)
        x_new, v_new = x + dx, v + dv
        y_new, s_new, spectrum_new = cones.linearise_dual(v_new, KINK)
        F1_new, F2_new, size_new = residual(operators, x_new, s_new, y_new)
        better = size_new < size
        if not bool(better.any()):
            break
        settled = bool((size_new[better] > 0.1 * size[better]).all())
        stays = _same(spectrum, spectrum_new, v, v_new)
        if bool(better.all()):
            x, v, y, s, spectrum_next, F1, F2, size = x_new, v_new, y_new, s_new, spectrum_new, F1_new, F2_new, size_new
        else:
            keep = better.unsqueeze(1)
            x, v = torch.where(keep, x_new, x), torch.where(keep, v_new, v)
            y, s, spectrum_next = cones.linearise_dual(v, KINK)
            F1, F2, size = residual(operators, x, s, y)
        if not stays:
            spectrum, system = spectrum_next, None
        if settled:
            break
    degenerate = cones.margin(v) < MARGIN
    if differentiable and system is None:
        system = factorise(operators, spectrum, visible, units)
    if system is not None:
        degenerate = degenerate | system.singular
    return Zero(operators, x, s, y, size, spectrum, system if differentiable else None, degenerate)


def _same(old: ProductSpectrum, new: ProductSpectrum, v: Tensor, v_new: Tensor) -> bool:
    """The factor of the old point serves the new one: no face has changed, and curved cones have hardly moved."""
    if old.is_diagonal and new.is_diagonal:
        return bool((old.values == new.values).all())
    return bool(((v_new - v).abs() <= 1e-12 * v.abs().amax(1, keepdim=True)).all()) and bool(((old.values > 0) == (new.values > 0)).all())


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
