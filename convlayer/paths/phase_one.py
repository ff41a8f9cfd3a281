"""How far a row is from having a feasible point, whatever its costs.

    minimise  t   subject to   Ax + s = b + t e,  s in K,  t >= -1,      -t <= Ex - f <= t for the equalities,

with e inside K. It always has an interior and a solution; t is not positive where the row is
feasible, and where it is positive the multipliers, which are of size one however small t is, are a
proof: A'y = 0, b'y = -t.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from convlayer.cones import Nonnegative, Product
from convlayer.conic.program import Data, Program
from convlayer.memo import once_for_each
from convlayer.solution import Status
from convlayer.solvers.clarabel import Clarabel
from convlayer.solvers.dealing import solve_batch

TOLERANCE = 1e-10


def nearest(data: Data) -> tuple[Tensor, Tensor]:
    """(t (B,), y (B, m)) by Clarabel; NaN where it fails. data: normalised."""
    form = _form(data.program)
    host, batch = data.host(), data.batch
    A, b = host.A_entries, host.b.expand(batch, -1)
    entries = torch.cat([A, A.new_ones(len(A), 1)], 1)[:, form.source] * form.coefficient
    q = b.new_zeros(batch, form.program.n)
    q[:, -1] = 1.0
    ends = b.new_ones(batch, 1)
    right = torch.cat([b, ends], 1)[:, form.right] * form.sign
    part = Data(form.program, b.new_zeros(1, 0), q, entries, right)
    point = solve_batch(Clarabel(), TOLERANCE, {}, part, None, None)
    usable = point.status <= int(Status.INACCURATE)
    t = torch.where(usable, point.x[:, -1], torch.nan)
    # The two sides of an equality have one multiplier.
    y = torch.zeros(batch, data.program.m + 1, dtype=b.dtype).index_add(
        1, form.right, point.y * form.sign
    )[:, :-1]
    return t.to(data.b.device), y.to(data.b.device)


@dataclass(frozen=True, eq=False)
class _Form:
    """The program of the module's docstring, and where its values come from."""

    program: Program
    source: Tensor  # of A's entries: which of the program's own, or the one after them, which is 1
    coefficient: Tensor
    right: Tensor  # of b's entries: which of the program's own, or the one after them, which is 1
    sign: Tensor


@once_for_each
def _form(program: Program) -> _Form:
    m, inside = program.m, program.cones.inside.numpy()
    equal, elementwise = program.equalities.numpy(), program.inequalities.numpy()
    others = [cone for cone in program.cones.cones if not cone.elementwise]
    first, rest = np.flatnonzero(equal), np.flatnonzero(~equal & ~elementwise)
    # Rows: E x - t <= f, -E x - t <= -f, the inequalities, -t <= 1, the other cones.
    right = np.concatenate([first, first, np.flatnonzero(elementwise), [m], rest])
    sign = np.concatenate(
        [np.ones(len(first)), -np.ones(len(first)), np.ones(len(right) - 2 * len(first))]
    )
    by_t = np.concatenate([np.ones(2 * len(first)), inside[elementwise], [1.0], inside[rest]])
    places = [np.full(m + 1, -1), np.full(m + 1, -1)]
    places[0][right[len(first) :]] = np.arange(len(first), len(right))
    places[1][first] = np.arange(len(first))
    row, column, source, coefficient = [], [], [], []
    for place in places:
        mine = np.flatnonzero(place[program.A_rows] >= 0)
        row.append(place[program.A_rows[mine]])
        column.append(program.A_cols[mine])
        source.append(mine)
        coefficient.append(sign[row[-1]])
    moved = np.flatnonzero(by_t)
    row.append(moved)
    column.append(np.full(len(moved), program.n))
    source.append(np.full(len(moved), len(program.A_rows)))
    coefficient.append(-by_t[moved])
    i, j, k, c = (np.concatenate(parts) for parts in (row, column, source, coefficient))
    order = np.lexsort((i, j))
    nothing = np.zeros(0, dtype=np.int64)
    cones = Product([Nonnegative(len(right) - len(rest)), *others])
    grown = Program(program.n + 1, len(right), cones, nothing, nothing, i[order], j[order])
    return _Form(grown, *(torch.from_numpy(part) for part in (k[order], c[order], right, sign)))
