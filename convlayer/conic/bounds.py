"""Bounds: those on single variables hold exactly in the solution, and infinite ones, or those that
a cone implies, are none.

A row  a x_j + s = b_i,  s >= 0,  with a fixed coefficient a says x_j <= b_i / a or x_j >= b_i / a. A solver, and Newton's method
after it, meet it to rounding; a logarithm or a root of x_j wants it to the last bit. The derivative is that of the solution: moving
x_j by a rounding onto its bound has none of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from convlayer.conic.program import Data, Program
from convlayer.memo import once_for_each

# What stands for an infinite right-hand side of an inequality: beyond `residual.INFINITE` in all
# units.
NO_BOUND = 1e100


@dataclass(frozen=True, eq=False)
class Bounds:
    """The rows of a program that bound a single variable each."""

    rows: Tensor  # (k,)
    columns: Tensor  # (k,)
    coefficients: Tensor  # (k,)

    @classmethod
    def of(
        cls, program: Program, fixed: np.ndarray, values: np.ndarray, shown: np.ndarray
    ) -> Bounds | None:
        """fixed (nnz(A),): entries that no parameter moves, with their values; shown (n,): the
        variables that matter."""
        scalar = program.inequalities.numpy().copy()
        for block in program.cones.blocks:
            if not block.elementwise and block.size == 1:  # a ray, which is the nonnegative one
                scalar[block.start] = True
        alone = np.bincount(program.A_rows, minlength=program.m) == 1
        mine = np.flatnonzero(
            fixed & (values != 0) & (scalar & alone)[program.A_rows] & shown[program.A_cols]
        )
        if not len(mine):
            return None
        return cls(
            *(
                torch.from_numpy(part[mine].copy())
                for part in (program.A_rows, program.A_cols, values)
            )
        )

    def hold(self, x: Tensor, b: Tensor) -> Tensor:
        """x (B, n), where it is outside them moved onto its bounds; b (B or 1, m)."""
        for sign, rows, columns, coefficients in self._sides(x.device):
            # A bound that is NaN, as in rows that are left out, says nothing.
            limits = (b.index_select(1, rows) / coefficients).nan_to_num(
                sign * torch.inf, torch.inf, -torch.inf
            )
            index, limits = (part.expand(len(x), -1) for part in (columns, limits))
            x = x.scatter_reduce(1, index, limits, "amin" if sign > 0 else "amax")
        return x

    @once_for_each
    def _sides(self, device: torch.device) -> list[tuple[float, Tensor, Tensor, Tensor]]:
        """(1 or -1, rows, columns, coefficients) of the bounds from above and from below, where
        there are some."""
        sides = [
            (sign, torch.nonzero(sign * self.coefficients > 0).flatten()) for sign in (1.0, -1.0)
        ]
        rows, columns, coefficients = self.rows, self.columns, self.coefficients
        return [
            (
                sign,
                rows[which].to(device),
                columns[which].to(device),
                coefficients[which].to(device),
            )
            for sign, which in sides
            if len(which)
        ]


def implied(
    program: Program, fixed: np.ndarray, values: np.ndarray, b: np.ndarray, told: np.ndarray
) -> Tensor | None:
    """The inequalities that a coordinate of some cone, one which is never negative, implies; None:
    there are none.

    fixed (nnz(A),): entries that no parameter moves, with their values; b (m,): right-hand sides,
    NaN where a parameter moves them; told (m,): rows whose multipliers matter.
    """
    alone = (np.bincount(program.A_rows, minlength=program.m) == 1) & ~np.isnan(b)
    mine = np.flatnonzero(fixed & (values < 0) & alone[program.A_rows])
    row, column = program.A_rows[mine], program.A_cols[mine]
    limit, held = b[row] / values[mine], np.zeros(program.m, dtype=bool)
    for block in program.cones.blocks:
        if not block.elementwise:
            held[block.start + np.array(block.cone.signed, dtype=np.int64)] = True
    least = np.full(program.n, -np.inf)
    np.maximum.at(least, column[held[row]], limit[held[row]])
    found = row[program.inequalities.numpy()[row] & ~told[row] & (limit <= least[column])]
    return torch.from_numpy(found) if len(found) else None


def without_infinity(program: Program, b: Tensor) -> Tensor:
    """b (B or 1, m) with a number in place of infinity where it stands in an inequality."""
    if math.isfinite(b.sum().item()):
        return b
    infinite = torch.isinf(b) & program.on(b.device)["inequalities"]
    return torch.where(infinite, b.sign() * NO_BOUND, b)


def unlimited(data: Data, implied: Tensor | None = None) -> Data:
    """The data without the rows that are no bound, or `implied`: empty, so that a direction along
    them is seen. Itself where there are none."""
    if implied is not None:
        data = replace(data, b=data.b.index_fill(1, implied.to(data.b.device), NO_BOUND))
    if not data.b.numel() or data.b.amax().item() < NO_BOUND:
        return data
    index = data.program.on(data.b.device)
    none = (data.b >= NO_BOUND) & index["inequalities"]
    if not bool(none.any()):
        return data
    kept = (~none).to(data.A.dtype)
    return replace(data, A=data.A * (kept.unsqueeze(2) if data.dense else kept[:, index["A_rows"]]))


def impossible(program: Program, b: Tensor) -> Tensor | None:
    """(B or 1,) where an inequality asks for less than minus infinity; None: nowhere."""
    if not b.numel() or b.amin().item() > -NO_BOUND:
        return None
    return ((b <= -NO_BOUND) & program.on(b.device)["inequalities"]).any(1)
