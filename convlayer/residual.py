"""The KKT residual map, zero exactly at solutions, and the scaling in which it is measured.

With z = (x, v), v = y - s, y = Pi_K*(v), s = Pi_K(-v):

    F(z) = [ Px + q + A'y ;  Ax + s - b ]

y and s lie in their cones and are complementary by construction, so |F| alone certifies a solution.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convlayer.program import Data, Operators


@dataclass(frozen=True, eq=False)
class Scaling:
    """A change of units, row by row of the batch: A' = eA, x' = rho x, s' = rho e s, y' = tau y / e."""

    e: Tensor  # (B or 1, m) one for each row of A; equal within a cone that is not elementwise
    rho: Tensor  # (B, 1)
    tau: Tensor  # (B, 1)

    def rows(self, index: Tensor) -> Scaling:
        return Scaling(self.e if len(self.e) == 1 else self.e[index], self.rho[index], self.tau[index])

    def enter(self, x: Tensor, s: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x * self.rho, s * (self.rho * self.e), y * (self.tau / self.e)

    def leave(self, x: Tensor, s: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x / self.rho, s / (self.rho * self.e), y * (self.e / self.tau)


def normalise(data: Data) -> tuple[Data, Scaling]:
    """Units in which rows of A, the objective and the right-hand side have size one, so that every tolerance is relative."""
    A, group = data.A.abs(), data.program.scale_group
    size = A.new_zeros(len(A), data.program.m)
    if A.shape[1]:
        size.scatter_reduce_(1, group[data.program.indices["A_rows"]].expand(len(A), -1), A, "amax")
        size = size[:, group]
    e = torch.where(size > 0, 1 / size, 1.0)
    b = (data.b * e).abs()
    rho = _reciprocal(_typical(b), 1.0)
    q, P = _largest(data.q), _largest(data.P)
    # Without a right-hand side the size of x is set by the objective: x ~ q / P.
    rho = torch.where(b.amax(1, keepdim=True) > 0 if b.shape[1] else torch.zeros_like(rho, dtype=torch.bool), rho,
                      torch.where((P > 0) & (q > 0), P / q.clamp(min=torch.finfo(q.dtype).tiny), 1.0))
    tau = _reciprocal(torch.maximum(q, P / rho), 1.0)
    batch = data.batch
    scaling = Scaling(e, rho.expand(batch, 1), tau.expand(batch, 1))
    moved = replace(data, A=data.A * e[:, data.program.indices["A_rows"]], b=data.b * e)
    return rescale(moved, scaling.rho, scaling.tau), scaling


def rescale(data: Data, rho: Tensor, tau: Tensor) -> Data:
    """x' = rho x, y' = tau y: the same program in other units."""
    return replace(data, P=data.P * (tau / rho) if data.P.shape[1] else data.P, q=data.q * tau, b=data.b * rho)


def recentre(data: Data, scaling: Scaling, x: Tensor, s: Tensor, y: Tensor) -> tuple[Data, Scaling]:
    """Units in which a point found in `data`'s units has |s|, |y| near one: there v = y - s tells active from inactive best.

    A factor is kept within 1e-6 .. 1e6, so that noise around zero is not magnified to size one.
    """
    rho = _reciprocal(torch.maximum(_largest(s), _largest(x)), 1.0).clamp(1e-6, 1e6)
    tau = _reciprocal(_largest(y), 1.0).clamp(1e-6, 1e6)
    return rescale(data, rho, tau), Scaling(scaling.e, scaling.rho * rho, scaling.tau * tau)


def residual(operators: Operators, x: Tensor, s: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(F1 (B, n), F2 (B, m), relative size (B,)): each part is measured against the largest term in it."""
    data = operators.data
    Px, Aty, Ax = operators.P(x), operators.At(y), operators.A(x)
    F1, F2 = Px + data.q + Aty, Ax + s - data.b
    dual = _largest(F1) / (torch.stack([_largest(Px), _largest(Aty), _largest(data.q).expand(len(x), 1), _largest(y)]).amax(0) + 1e-6)
    primal = _largest(F2) / (torch.stack([_largest(Ax), _largest(s), _largest(data.b).expand(len(x), 1)]).amax(0) + 1e-6)
    return F1, F2, torch.maximum(dual, primal).squeeze(1)


def _largest(values: Tensor) -> Tensor:
    """(B, k) -> (B, 1), zero where k is zero."""
    return values.abs().amax(1, keepdim=True) if values.shape[1] else values.new_zeros(len(values), 1)


def _typical(sizes: Tensor) -> Tensor:
    """(B, k) -> (B, 1), the median of the entries that are not zero; zero where all are."""
    if not sizes.shape[1]:
        return sizes.new_zeros(len(sizes), 1)
    significant = torch.where(sizes > 1e-14 * _largest(sizes), sizes, torch.nan)
    return significant.nanmedian(1, keepdim=True).values.nan_to_num(0.0)


def _reciprocal(values: Tensor, otherwise: float) -> Tensor:
    return torch.where(values > 0, 1 / values, otherwise)
