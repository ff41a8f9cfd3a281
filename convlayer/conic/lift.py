"""Back from a program without some variables, each of which one equality alone defines.

    a_i t_i + C_i x = b_i,   with p_i t_i^2 / 2 + r_i t_i in the costs and t_i in no other row

The multiplier of that row, and what the adjoint has there, follow from t's own stationarity.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from convlayer.conic.linear_map import LinearMap
from convlayer.conic.program import Data, take_rows
from convlayer.core.rows import Solved


@dataclass(frozen=True, eq=False)
class Lift:
    """What was left out of a program, by its own numbers."""

    t: Tensor  # (k,) variables
    rows: Tensor  # (k,)
    coefficient: Tensor  # (k,) a
    square: Tensor  # (k,) the entry of P that is p; -1: there is none
    x: Tensor  # (n',) the other variables
    y: Tensor  # (m',) and rows
    C: LinearMap  # (k, n')
    C_back: LinearMap  # (n', k)

    @classmethod
    def of(
        cls,
        t: np.ndarray,
        rows: np.ndarray,
        coefficient: np.ndarray,
        square: np.ndarray,
        x: np.ndarray,
        y: np.ndarray,
        C: sp.csr_array,
    ) -> Lift:
        return cls(
            torch.from_numpy(t),
            torch.from_numpy(rows),
            torch.from_numpy(coefficient),
            torch.from_numpy(square),
            torch.from_numpy(x),
            torch.from_numpy(y),
            LinearMap(C),
            LinearMap(sp.csr_array(C.T)),
        )

    def lifted(self, solved: Solved, data: Data) -> Lifted:
        """The solution of the smaller program as that of the whole one, with these values."""
        P, batch, curved = data.P_entries, len(solved.x), self.square >= 0
        p = P.new_zeros(len(P), len(self.t))
        p[:, curved] = P[:, self.square[curved]]
        x = solved.x.new_zeros(batch, data.program.n).index_copy_(1, self.x, solved.x)
        t = (data.b[:, self.rows] - self.C(solved.x)) / self.coefficient
        x = x.index_copy_(1, self.t, t)
        s = solved.s.new_zeros(batch, data.program.m).index_copy_(1, self.y, solved.s)
        own = -(p * t + data.q[:, self.t]) / self.coefficient
        y = solved.y.new_zeros(batch, data.program.m).index_copy_(1, self.y, solved.y)
        y = y.index_copy_(1, self.rows, own.expand(batch, -1))
        return Lifted(solved.plan, x, s, y, solved.report, solved.kept, self, p)


@dataclass(frozen=True, eq=False)
class Lifted(Solved):
    """Rows solved without what the lift puts back."""

    lift: Lift
    p: Tensor  # (B or 1, k)

    def adjoint(
        self, places: Tensor, x_bar: Tensor, y_bar: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        lift, p = self.lift, take_rows(self.p, places)
        # w = S w' + w0 with a w0 = y_bar there
        start = y_bar[:, lift.rows] / lift.coefficient
        own = (x_bar[:, lift.t] - p * start) / lift.coefficient
        w_left, u_left, good = super().adjoint(
            places, x_bar[:, lift.x] - lift.C_back(own), y_bar[:, lift.y]
        )
        t = start - lift.C(w_left) / lift.coefficient
        u_own = (x_bar[:, lift.t] - p * t) / lift.coefficient
        w = torch.zeros_like(x_bar).index_copy_(1, lift.x, w_left).index_copy_(1, lift.t, t)
        u = torch.zeros_like(y_bar).index_copy_(1, lift.y, u_left)
        return w, u.index_copy_(1, lift.rows, u_own), good
