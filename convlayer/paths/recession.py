"""Whether an objective may fall, or stay as it is, for ever along a direction from any feasible
point.

    R = { d :  Pd = 0,  -Ad in K,  q'd <= 0 }

Where R = {0} a feasible row has a solution. Where a row that does not settle runs off along R its
infimum is approached, and not attained (Rockafellar, Convex Analysis, theorem 27.1). What is looked
for is the d of R within |d| <= 1 that goes farthest the way the row's last point lies; or along
which the objective falls most: where it does, and there is a feasible point, it has no bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from convlayer.cones import Nonnegative, Product, Zero
from convlayer.conic.program import Data, Program
from convlayer.solution import Status
from convlayer.solvers.clarabel import Clarabel
from convlayer.solvers.solver import Task


@dataclass(frozen=True)
class RecessionShares:
    """What is told from rounding of a direction d in which a row's points run off."""

    # The accuracy to which the program of the directions is solved.
    tolerance: float = 1e-9
    # A sum q'd below this share of its terms is rounding, and so is an entry of d below this share
    # of it.
    flat: float = 1e-6
    # Costs along d below this are a matter of the tolerance.
    blurred: float = 1e-7
    # Where multipliers are larger than this, how far d goes is a matter of the tolerance.
    strained: float = 1e5
    # Where the last point lies this share of the way or nearer, d is rounding.
    far: float = 1e-2


SHARES = RecessionShares()


def recedes(data: Data, x: Tensor) -> Tensor:
    """(B,) whether R holds more than zero, as seen from x (B, n). data: normalised."""
    host, points = data.host(), x.nan_to_num(0.0, 0.0, 0.0).cpu().numpy()
    P, q, A = host.P_entries.numpy(), host.q.numpy(), host.A_entries.numpy()
    rows = range(len(points))
    found = [
        _recedes(data.program, P[k % len(P)], q[k % len(q)], A[k % len(A)], points[k]) for k in rows
    ]
    return torch.tensor(found, dtype=torch.bool, device=x.device)


def steepest(data: Data) -> Tensor:
    """(B, n) the d of R along which the objective falls most. data: normalised."""
    host = data.host()
    P, q, A = host.P_entries.numpy(), host.q.numpy(), host.A_entries.numpy()
    rows = range(data.batch)
    found = [
        _farthest(data.program, P[k % len(P)], q[k % len(q)], A[k % len(A)], q[k % len(q)])[0]
        for k in rows
    ]
    return torch.from_numpy(np.array(found)).to(data.q.device)


def _recedes(program: Program, P: np.ndarray, q: np.ndarray, A: np.ndarray, x: np.ndarray) -> bool:
    if not np.abs(x).max(initial=0.0) > 0:
        return False
    wanted = x / np.linalg.norm(x)
    d, usable = _farthest(program, P, q, A, -wanted)
    d = np.where(np.abs(d) > SHARES.flat, d, 0.0)
    # A cost that is small beside the others is none the less one.
    terms = np.abs(q) @ np.abs(d)
    rises = q @ d > SHARES.flat * terms
    blurred = 0 < terms <= SHARES.blurred * max(np.abs(q).max(), 1.0)
    return usable and bool(wanted @ d > SHARES.far) and not rises and not blurred


def _farthest(
    program: Program, P: np.ndarray, q: np.ndarray, A: np.ndarray, costs: np.ndarray
) -> tuple[np.ndarray, bool]:
    """The d of R, |d| <= 1, of least costs'd; whether it was found, and goes on where R is rounded
    off."""
    n, m = program.n, program.m
    zeros = int(program.equalities.sum())
    upper = sp.csr_array((P, (program.P_rows, program.P_cols)), shape=(n, n))
    curved = upper + sp.triu(upper, 1).T
    largest = abs(curved).max(axis=1).toarray().ravel() if n else np.zeros(0)
    # A curvature that is small beside the rest of the program is none the less one: every row of P
    # in units of its own.
    curved = (sp.diags_array(1 / largest[largest > 0]) @ curved[largest > 0]).tocsr()
    matrix, one = sp.csr_array((A, (program.A_rows, program.A_cols)), shape=(m, n)), sp.eye_array(n)
    lines = [
        curved,
        matrix[:zeros],
        sp.csr_array(q[None] / max(np.abs(q).max(), 1.0)),
        one,
        -one,
        matrix[zeros:],
    ]
    stacked = sp.csc_array(sp.vstack(lines))
    stacked.sort_indices()
    cones = [c for c in program.cones.cones if not isinstance(c, Zero)]
    form = Program(
        n,
        stacked.shape[0],
        Product([Zero(curved.shape[0] + zeros), Nonnegative(1 + 2 * n), *cones]),
        P_rows=np.zeros(0, dtype=np.int64),
        P_cols=np.zeros(0, dtype=np.int64),
        A_rows=stacked.indices.astype(np.int64),
        A_cols=np.repeat(np.arange(n), np.diff(stacked.indptr)),
    )
    right = np.zeros(form.m)
    right[curved.shape[0] + zeros + 1 :][: 2 * n] = 1.0
    task = Task(
        form, np.zeros((1, 0)), costs[None], stacked.data[None], right[None], SHARES.tolerance
    )
    (iterate,) = Clarabel().solve(task)
    held = np.abs(
        np.delete(
            iterate.y, slice(curved.shape[0] + zeros + 1, curved.shape[0] + zeros + 1 + 2 * n)
        )
    )
    return iterate.x, iterate.status <= Status.INACCURATE and held.max(
        initial=0.0
    ) <= SHARES.strained
