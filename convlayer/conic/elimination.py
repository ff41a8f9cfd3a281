"""Variables that an equality defines and only the objective uses, taken out: t of  E t + L x = r,  E constant and diagonal.

CVXPY writes sum_squares(F x - g) as t't with t == F x - g. Put back, with P_tt diagonal and D =
P_tt / E^2,

    P' = P_xx + L'DL,   q' = q_x - L'(q_t / E + D r),   t = (r - L x) / E,   y_r = -(P_tt t + q_t) / E,

and the adjoint of the smaller program's KKT system gives the larger one's: with cotangents g, and c
of y_r,

    g' = g_x - L'(g_t / E - D c),   w_t = (c - L w_x) / E,   u_r = (g_t - P_tt w_t) / E.

P' squares the condition of L. Where that could be felt, by the pivots of the KKT matrix, the row is
solved as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from convlayer.cones import Block, Cone, Product, Zero
from convlayer.conic.kkt import Visible
from convlayer.conic.linear_map import LinearMap
from convlayer.conic.program import DENSE_ENTRIES, Data, Program, product, take_rows
from convlayer.memo import once_for_each


@dataclass(frozen=True, eq=False)
class Elimination:
    """Which variables and rows of a program go, and the program that is left."""

    program: Program  # what is left
    before: Program
    t: np.ndarray  # (k,) variables that go
    r: np.ndarray  # (k,) the rows that define them
    E: np.ndarray  # (k,)
    visible: Visible  # of the program that is left

    @classmethod
    def of(
        cls,
        program: Program,
        fixed: np.ndarray,
        values: np.ndarray,
        visible: Visible,
        seconds: Callable[[Program, bool], float],
    ) -> Elimination | None:
        """None: nothing to eliminate, or nothing gained.

        fixed:    (nnz(A),) entries that no parameter moves, with their values.
        seconds:  what a row costs, solved and differentiated; densely, or as is cheaper.
        """
        entry = _defining(program, fixed & (values != 0))
        t, r = program.A_cols[entry], program.A_rows[entry]
        n, m = program.n - len(t), program.m - len(r)
        if not len(entry) or not n:
            return None  # or equalities give every variable: there is nothing left to solve
        if n * (n + m) > DENSE_ENTRIES:
            return None  # L'L could have more entries than there is room for
        left = _left(program, t, r)
        if seconds(left, True) >= seconds(program, False):
            return None
        return cls(left, program, t, r, values[entry], _still_visible(program, t, r, visible))

    @cached_property
    def x(self) -> np.ndarray:
        return np.flatnonzero(places(self.before.n, self.t) >= 0)

    @cached_property
    def rows(self) -> np.ndarray:
        return np.flatnonzero(places(self.before.m, self.r) >= 0)

    @cached_property
    def maps(self) -> dict[str, LinearMap]:
        """From the stored entries before to L, and to A, P and the diagonal of P_tt, flat."""
        before, n, k = self.before, len(self.x), len(self.t)
        place_r, place_row = np.full(before.m, -1), np.full(before.m, -1)
        place_t, place_x = np.full(before.n, -1), np.full(before.n, -1)
        for place, index in (
            (place_r, self.r),
            (place_row, self.rows),
            (place_t, self.t),
            (place_x, self.x),
        ):
            place[index] = np.arange(len(index))
        i, j = before.A_rows, before.A_cols
        in_L = np.flatnonzero((place_r[i] >= 0) & (place_x[j] >= 0))
        in_A = np.flatnonzero((place_row[i] >= 0) & (place_x[j] >= 0))
        row, column = before.P_rows, before.P_cols
        own = np.flatnonzero((place_x[row] >= 0) & (place_x[column] >= 0))
        off = own[row[own] != column[own]]
        across = [
            place_x[row[own]] * n + place_x[column[own]],
            place_x[column[off]] * n + place_x[row[off]],
        ]
        gone = np.flatnonzero(place_t[row] >= 0)  # of which only the diagonal is there
        return {
            "L": _placed(in_L, place_r[i[in_L]] * n + place_x[j[in_L]], len(i), k * n),
            "A": _placed(
                in_A, place_row[i[in_A]] * n + place_x[j[in_A]], len(i), len(self.rows) * n
            ),
            "P": _placed(np.concatenate([own, off]), np.concatenate(across), len(row), n * n),
            "P_tt": _placed(gone, place_t[row[gone]], len(row), k),
        }

    @once_for_each
    def index(self, device: torch.device) -> dict[str, Tensor]:
        """Where they stand, and E, on a device."""
        arrays = {"t": self.t, "r": self.r, "x": self.x, "rows": self.rows, "E": self.E}
        return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}

    def enter(self, data: Data) -> Eliminated:
        """The values that are left, dense; `data` by entries."""
        index, n, k = self.index(data.q.device), len(self.x), len(self.t)
        E, q_t, right = index["E"], data.q[:, index["t"]], data.b[:, index["r"]]
        L = self.maps["L"](data.A).view(len(data.A), k, n)
        A = self.maps["A"](data.A).view(len(data.A), len(self.rows), n)
        # D = P_tt / E^2
        P_tt = self.maps["P_tt"](data.P)
        D = P_tt / E.square()
        # P' = P_xx + L'DL
        P = L.mT @ (L * D.unsqueeze(2))
        if len(self.maps["P"].read):
            P = P + self.maps["P"](data.P).view(len(data.P), n, n)
        # q' = q_x - L'(q_t / E + D r)
        q = data.q[:, index["x"]] - product(L.mT, q_t / E + D * right)
        left = Data(self.program, P, q, A, data.b[:, index["rows"]])
        return Eliminated(self, left, L, D, P_tt, q_t, right)


@dataclass(frozen=True, eq=False)
class Eliminated:
    """The smaller program's data, and what leads back."""

    elimination: Elimination
    data: Data | None
    L: Tensor  # (B or 1, k, n')
    D: Tensor  # (B or 1, k)
    P_tt: Tensor  # (B or 1, k)
    q_t: Tensor  # (B or 1, k)
    right: Tensor  # (B or 1, k) r

    def only(self, index: Tensor) -> Eliminated:
        """Some rows, for the way back alone."""
        parts = (
            take_rows(part, index) for part in (self.L, self.D, self.P_tt, self.q_t, self.right)
        )
        return Eliminated(self.elimination, None, *parts)

    def _index(self, like: Tensor) -> dict[str, Tensor]:
        return self.elimination.index(like.device)

    def enter_point(self, x: Tensor, s: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Without t, and the rows that define it."""
        index = self._index(x)
        return x[:, index["x"]], s[:, index["rows"]], y[:, index["rows"]]

    def leave(self, x: Tensor, s: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """With them again; their slack is zero."""
        E = self._index(x)["E"]
        # t = (r - L x) / E
        t = (self.right - product(self.L, x)) / E
        # y_r = -(P_tt t + q_t) / E
        y_r = -(self.P_tt * t + self.q_t) / E
        return (
            self._joined(x, t, "n"),
            self._joined(s, torch.zeros_like(y_r), "m"),
            self._joined(y, y_r, "m"),
        )

    def enter_cotangents(self, x_bar: Tensor, y_bar: Tensor) -> tuple[Tensor, Tensor]:
        """Those of (x, y) as those of the smaller program's."""
        index = self._index(x_bar)
        g_t, c = x_bar[:, index["t"]], y_bar[:, index["r"]]
        # g' = g_x - L'(g_t / E - D c)
        g = x_bar[:, index["x"]] - product(self.L.mT, g_t / index["E"] - self.D * c)
        return g, y_bar[:, index["rows"]]

    def leave_adjoint(
        self, w: Tensor, u: Tensor, x_bar: Tensor, y_bar: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The adjoint of the smaller program as that of the larger, whose cotangents are given,
        too."""
        index = self._index(w)
        g_t, c, E = x_bar[:, index["t"]], y_bar[:, index["r"]], index["E"]
        # w_t = (c - L w_x) / E
        w_t = (c - product(self.L, w)) / E
        # u_r = (g_t - P_tt w_t) / E
        u_r = (g_t - self.P_tt * w_t) / E
        return self._joined(w, w_t, "n"), self._joined(u, u_r, "m")

    def _joined(self, left: Tensor, gone: Tensor, side: str) -> Tensor:
        """What is left and what was gone, of the variables or of the rows, in their places."""
        before, index = self.elimination.before, self._index(left)
        size, kept, taken = (before.n, "x", "t") if side == "n" else (before.m, "rows", "r")
        whole = left.new_empty(len(left), size)
        whole[:, index[kept]], whole[:, index[taken]] = left, gone
        return whole


def _defining(program: Program, usable: np.ndarray) -> np.ndarray:
    """The entries E of A, `usable` those of them that are constant and not zero: each the only one
    of its variable, in an equality of its own, and its variable in no product with another."""
    alone = np.bincount(program.A_cols, minlength=program.n) == 1
    coupled = np.zeros(program.n, dtype=bool)
    off = program.P_rows != program.P_cols
    coupled[program.P_rows[off]] = coupled[program.P_cols[off]] = True
    equal = program.equalities.numpy()
    entry = np.flatnonzero(usable & equal[program.A_rows] & (alone & ~coupled)[program.A_cols])
    _, first = np.unique(program.A_rows[entry], return_index=True)
    return entry[first]


def _placed(source: np.ndarray, target: np.ndarray, stored: int, size: int) -> LinearMap:
    """Stored entries at places of a flat matrix, zero elsewhere."""
    return LinearMap(sp.csr_array((np.ones(len(source)), (target, source)), shape=(size, stored)))


def _left(program: Program, t: np.ndarray, r: np.ndarray) -> Program:
    """The program without these variables and rows; P with the products that L'DL brings."""
    n, m = program.n - len(t), program.m - len(r)
    x, row = places(program.n, t), places(program.m, r)
    A_rows, A_cols = row[program.A_rows], x[program.A_cols]
    kept = (A_rows >= 0) & (A_cols >= 0)
    # The rows of L that D does not zero, and the places of L'DL.
    curved = np.isin(t, program.P_rows[program.P_rows == program.P_cols])
    equation = np.full(program.m, -1)
    equation[r[curved]] = np.arange(int(curved.sum()))
    in_L = (equation[program.A_rows] >= 0) & (A_cols >= 0)
    indices, place = A_cols[in_L], equation[program.A_rows[in_L]]
    L = sp.csr_array((np.ones(len(place)), (place, indices)), shape=(int(curved.sum()), n))
    square = sp.coo_array(L.T @ L)
    own = (x[program.P_rows] >= 0) & (x[program.P_cols] >= 0)
    upper = square.row <= square.col
    of_square = square.col[upper].astype(np.int64) * n + square.row[upper]
    of_P = x[program.P_cols[own]] * n + x[program.P_rows[own]]
    P_cols, P_rows = np.divmod(np.unique(np.concatenate([of_square, of_P])), n)
    cones = Product([shortened(block, r) for block in program.cones.blocks])
    return Program(n, m, cones, P_rows, P_cols, A_rows[kept], A_cols[kept])


def shortened(block: Block, r: np.ndarray) -> Cone:
    """Without the rows that go, which are all of the zero cone's."""
    gone = int(np.count_nonzero((r >= block.start) & (r < block.start + block.size)))
    return Zero(block.size - gone) if gone else block.cone


def places(size: int, gone: np.ndarray) -> np.ndarray:
    """(size,) where each stands among those that stay, in order; -1 for those that go."""
    stays = np.ones(size, dtype=bool)
    stays[gone] = False
    return np.where(stays, np.cumsum(stays) - 1, -1)


def _still_visible(program: Program, t: np.ndarray, r: np.ndarray, visible: Visible) -> Visible:
    """A variable whose change would be seen in a t counts as seen itself."""
    seen, defining = visible.x.clone(), np.zeros(program.m, dtype=bool)
    shown = torch.zeros(program.m, dtype=torch.bool)
    shown[torch.from_numpy(r)] = visible.x[torch.from_numpy(t)] | visible.y[torch.from_numpy(r)]
    defining[r] = True
    mine = defining[program.A_rows] & shown.numpy()[program.A_rows]
    seen[torch.from_numpy(program.A_cols[mine])] = True
    x, rows = (torch.from_numpy(places(*sides) >= 0) for sides in ((program.n, t), (program.m, r)))
    return Visible(seen[x], visible.y[rows])
