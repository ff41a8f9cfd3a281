"""The KKT residual map, zero exactly at solutions, and the scaling in which it is measured.

With z = (x, v), v = y - s, y = Pi_K*(v), s = Pi_K(-v):

    F(z) = [ Px + q + A'y ;  Ax + s - b ]

y and s lie in their cones and are complementary by construction, so |F| alone certifies a solution.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convlayer.program import Data, Operators, take_rows

INFINITE = 1e15  # an inequality's right-hand side beyond this (A having size one) is no bound
BALANCED = 1e3  # columns of the row-normalised matrix within this factor of each other need no scaling


@dataclass(frozen=True, eq=False)
class Scaling:
    """A change of units, row by row of the batch: x' = rho x / c, s' = rho e s, y' = tau y / e, so A' = e A c."""

    c: Tensor | None  # (B or 1, n) one for each column of A, None for ones
    e: Tensor  # (B or 1, m) one for each row of A; equal within a cone that is not elementwise
    rho: Tensor  # (B, 1)
    tau: Tensor  # (B, 1)
    unbounded: Tensor | None  # (B, m) inequalities whose right-hand side was as good as infinite, and was cut

    def rows(self, index: Tensor) -> Scaling:
        return Scaling(
            None if self.c is None else take_rows(self.c, index),
            take_rows(self.e, index),
            self.rho[index],
            self.tau[index],
            None if self.unbounded is None else self.unbounded[index],
        )

    def enter(self, x: Tensor, s: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (x if self.c is None else x / self.c) * self.rho, s * (self.rho * self.e), y * (self.tau / self.e)

    def leave(self, x: Tensor, s: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (x if self.c is None else x * self.c) / self.rho, s / (self.rho * self.e), y * (self.e / self.tau)

    def enter_cotangents(self, x_bar: Tensor, y_bar: Tensor) -> tuple[Tensor, Tensor]:
        return (x_bar if self.c is None else x_bar * self.c) / self.rho, y_bar * (self.e / self.tau)

    def leave_adjoint(self, w: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """The adjoint (w, u) of `pull_back` in the original units."""
        return self.tau * (w if self.c is None else w * self.c), self.rho * self.e * u


def normalise(data: Data) -> tuple[Data, Scaling]:
    """Units in which rows of A, the objective and the right-hand side have size one, so that every tolerance is relative."""
    index, group, batch = data.program.indices, data.program.scale_group, data.batch
    P_size = _reciprocal(_largest(data.P))
    c, e = _equilibrate(data, data.P.abs() * P_size, group)
    scaled = replace(data, A=data.A * e[:, index["A_rows"]], b=data.b * e)
    if c is not None:
        scaled = replace(
            scaled,
            A=scaled.A * c[:, index["A_cols"]],
            q=data.q * c,
            P=data.P * c[:, index["P_rows"]] * c[:, index["P_cols"]],
        )
    beyond = (scaled.b >= INFINITE) & data.program.inequalities
    unbounded = beyond if bool(beyond.any()) else None
    b = scaled.b.abs() if unbounded is None else torch.where(unbounded, 0.0, scaled.b.abs())
    rho = _reciprocal(_typical(b))
    q, P = _largest(scaled.q), _largest(scaled.P)
    # Without a right-hand side the size of x is set by the objective: x ~ q / P.
    rho = torch.where(
        _largest(b) > 0, rho, torch.where((P > 0) & (q > 0), P / q.clamp(min=torch.finfo(q.dtype).tiny), 1.0)
    )
    tau = _reciprocal(torch.maximum(q, P / rho))
    if unbounded is not None:
        scaled = replace(scaled, b=torch.where(unbounded, 1e8 / rho, scaled.b))
    scaling = Scaling(c, e, rho.expand(batch, 1), tau.expand(batch, 1), unbounded)
    return rescale(scaled, scaling.rho, scaling.tau), scaling


def _equilibrate(data: Data, P: Tensor, group: Tensor) -> tuple[Tensor | None, Tensor]:
    """Column and row scales (c, e): rows of size one and, where columns differ much, Ruiz's iteration on both.

    A column is measured by its constraints, and by P only if it has none: an auxiliary variable t == Ax - b with a small
    coefficient is then brought to the size of Ax, whatever its weight in the objective.
    """
    program, index = data.program, data.program.indices
    A, size = data.A.abs(), max(len(data.A), len(P))
    rows, i, j = group[index["A_rows"]], index["P_rows"], index["P_cols"]

    def row_sizes(values: Tensor) -> Tensor:
        return values.new_zeros(len(values), program.m).scatter_reduce_(
            1, rows.expand(len(values), -1), values, "amax"
        )[:, group]

    def column_sizes(A: Tensor, P: Tensor) -> Tensor:
        largest = A.new_zeros(len(A), program.n).scatter_reduce_(1, index["A_cols"].expand(len(A), -1), A, "amax")
        if not P.shape[1]:
            return largest
        for k in (i, j):
            largest = torch.maximum(
                largest, P.new_zeros(len(P), program.n).scatter_reduce_(1, k.expand(len(P), -1), P, "amax")
            )
        return largest

    e = _reciprocal(row_sizes(A))
    # A row with one entry, a bound, takes any scale: it says nothing about its column's.
    entries = A.new_zeros(len(A), program.m).index_add_(1, index["A_rows"], (A > 0).to(A.dtype))
    joint = torch.where(((entries == 1) & program.elementwise)[:, index["A_rows"]], 0.0, A)
    columns = column_sizes(joint * e[:, index["A_rows"]], P[:, :0])
    if not columns.shape[1] or bool(
        (_largest(columns) <= BALANCED * torch.where(columns > 0, columns, torch.inf).amin(1, keepdim=True)).all()
    ):
        return None, e
    c, e = A.new_ones(size, program.n), A.new_ones(len(A), program.m)
    for _ in range(20):
        now = joint * e[:, index["A_rows"]] * c[:, index["A_cols"]]
        columns = column_sizes(now, P[:, :0])
        columns = torch.where(columns > 0, columns, column_sizes(now, P * c[:, i] * c[:, j]))
        e = e * _reciprocal(row_sizes(now)).sqrt()
        c = c * _reciprocal(columns).sqrt()
    return c, e * _reciprocal(row_sizes(A * e[:, index["A_rows"]] * c[:, index["A_cols"]]))


def rescale(data: Data, rho: Tensor, tau: Tensor) -> Data:
    """x' = rho x, y' = tau y: the same program in other units."""
    return replace(data, P=data.P * (tau / rho) if data.P.shape[1] else data.P, q=data.q * tau, b=data.b * rho)


def recentre(data: Data, scaling: Scaling, x: Tensor, y: Tensor) -> tuple[Data, Scaling]:
    """Units in which a point found in `data`'s units has |x| and |y| near one: there v = y - s tells active from inactive best.

    Where x or y is all but zero, the right-hand side or the objective sets the unit, so that noise does not become of size one;
    where it is absurdly large, it stays so.
    """
    q, P = _largest(data.q), _largest(data.P)
    # What x would be by the objective alone, if that is less than the right-hand side's 1.
    least = torch.where((q > 0) & (P > 0), (q / P.clamp(min=torch.finfo(P.dtype).tiny)).clamp(1e-6, 1.0), 1e-2)
    size = torch.maximum(_largest(x).clamp(max=1e8), least)
    rho = 1 / size
    natural = torch.maximum(q, P * size)
    tau = _reciprocal(torch.maximum(_largest(y).clamp(max=1e8), natural))
    return rescale(data, rho, tau), replace(scaling, rho=scaling.rho * rho, tau=scaling.tau * tau)


def residual(operators: Operators, x: Tensor, s: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(F1 (B, n), F2 (B, m), relative size (B,)).

    Each entry is measured against its right-hand side and the size of x or y (A having entries of size one), so that a large
    cost or bound hides no other row's error. In `recentre`'s units x and y are of size one: an iterate that is larger is far
    off any scale of the problem, and gains nothing by it.
    """
    data = operators.data
    F1, F2 = operators.P(x) + data.q + operators.At(y), operators.A(x) + s - data.b
    dual = F1.abs() / (data.q.abs() + _largest(y).clamp(1e-6, 1.0))
    primal = F2.abs() / (data.b.abs() + _largest(x).clamp(1e-6, 1.0))
    return F1, F2, torch.maximum(_largest(dual), _largest(primal)).squeeze(1)


def _largest(values: Tensor) -> Tensor:
    """(B, k) -> (B, 1), zero where k is zero."""
    return values.abs().amax(1, keepdim=True) if values.shape[1] else values.new_zeros(len(values), 1)


def _typical(sizes: Tensor) -> Tensor:
    """(B, k) -> (B, 1), the geometric mean of the entries that are not zero; zero where all are."""
    present = sizes > 1e-14 * _largest(sizes)
    count = present.sum(1, keepdim=True)
    mean = torch.where(present, sizes, 1.0).log().sum(1, keepdim=True) / count.clamp(min=1)
    return torch.where(count > 0, mean.exp(), 0.0)


def _reciprocal(values: Tensor) -> Tensor:
    return torch.where(values > 0, 1 / values, 1.0)
