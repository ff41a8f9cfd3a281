"""The solution of a small quadratic program to the last bits, without any of our code.

    minimise 1/2 x'Px + q'x  subject to  Gx <= h, Ax = b

Clarabel, called directly, says which inequalities are active, a: multiplier above slack. Then  [P B'; B 0] (x, y) = (-q, c)
with B = [A; G_a], c = (b, h_a), in extended precision; checked, as Clarabel's word would not do: y_a >= 0 and G x <= h.
"""

from __future__ import annotations

import clarabel
import numpy as np
import scipy.sparse as sp

from benchmarks.conditioning import extended_solve

# violation of an inequality, or sign of a multiplier, up to which the active set is believed
CHECK = 1e-9


def quadratic_solution(P, q, G, h, A, b) -> np.ndarray:
    n, m = len(q), len(h)
    active = _active(P, q, G, h, A, b)
    B, c = np.vstack([A, G[active]]), np.concatenate([b, h[active]])
    K = np.block([[P, B.T], [B, np.zeros((len(c), len(c)))]])
    z = extended_solve(K, np.concatenate([-q, c]))
    x, multipliers = z[:n], z[n + len(b) :]
    if np.any(G @ x > h + CHECK * (1 + abs(h))) or np.any(
        multipliers < -CHECK * (1 + abs(multipliers).max(initial=0))
    ):
        raise ArithmeticError(f"the active set of {len(active)} of {m} inequalities is not optimal")
    return x


def _active(P, q, G, h, A, b) -> np.ndarray:
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_feas = settings.tol_gap_abs = settings.tol_gap_rel = 1e-11
    cones = [clarabel.ZeroConeT(len(b)), clarabel.NonnegativeConeT(len(h))]
    matrices = (
        sp.csc_matrix(np.triu(P)),
        q,
        sp.csc_matrix(np.vstack([A, G])),
        np.concatenate([b, h]),
    )
    found = clarabel.DefaultSolver(*matrices, cones, settings).solve()
    z, s = (np.array(v)[len(b) :] for v in (found.z, found.s))
    return np.flatnonzero(z > s)
