"""A transport between two marginals, and the gradient of a linear functional of its plan, in 40
digits.

Newton's method on the dual, F(u, v) = (P 1 - r, P'1 - c) with P_ij = exp(u_i + v_j - M_ij / eps), whose Jacobian is
J = [diag(P 1) P; P' diag(P'1)], v_n = 0. For L = <V, P>:  J (a, b) = ((P o V) 1, (P o V)'1),  M_bar = P o (a 1' + 1 b' - V) / eps,
r_bar = a, c_bar = b up to a constant from one to the other, here with equal sums,  eps_bar = <M_bar, log P>.
"""

from __future__ import annotations

import mpmath as mp
import numpy as np

DIGITS, STEPS = 40, 200
Gradient = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def transport(
    M: np.ndarray, r: np.ndarray, c: np.ndarray, eps: float, V: np.ndarray
) -> tuple[np.ndarray, Gradient]:
    """The plan, and the gradient in (M, r, c, eps)."""
    m, n = M.shape
    with mp.workdps(DIGITS):
        e = mp.mpf(float(eps))
        K = mp.matrix([[-mp.mpf(float(entry)) / e for entry in row] for row in M])
        r_, c_ = [mp.mpf(float(entry)) for entry in r], [mp.mpf(float(entry)) for entry in c]
        share = mp.fsum(r_) / mp.fsum(c_)  # the totals differ by rounding
        z, goal = _start(M / float(eps), r, c), r_ + [share * entry for entry in c_]
        for _ in range(STEPS):
            P, J = _plan(K, z, m, n)
            F = [mp.fsum(P[i, :]) - goal[i] for i in range(m)] + [
                mp.fsum(P[:, j]) - goal[m + j] for j in range(n - 1)
            ]
            step = mp.lu_solve(J, -mp.matrix(F))
            size = max(abs(entry) for entry in step)
            damping = 1 if size < 0.5 else mp.mpf(0.5) / size
            z = [
                entry + damping * change
                for entry, change in zip(z, [*step, mp.mpf(0)], strict=True)
            ]
            if size < mp.mpf(10) ** (10 - DIGITS):
                break
        else:
            raise ArithmeticError(f"Newton's method has not ended in {STEPS} steps")
        P, J = _plan(K, z, m, n)
        PV = mp.matrix([[P[i, j] * mp.mpf(float(V[i, j])) for j in range(n)] for i in range(m)])
        q = [mp.fsum(PV[i, :]) for i in range(m)] + [mp.fsum(PV[:, j]) for j in range(n - 1)]
        ab = [*mp.lu_solve(J, mp.matrix(q)), mp.mpf(0)]
        shift = (mp.fsum(ab[m:]) - mp.fsum(ab[:m])) / (m + n)
        a, b = [entry + shift for entry in ab[:m]], [entry - shift for entry in ab[m:]]
        M_bar = [[(P[i, j] * (a[i] + b[j]) - PV[i, j]) / e for j in range(n)] for i in range(m)]
        eps_bar = mp.fsum(
            M_bar[i][j] * (z[i] + z[m + j] + K[i, j]) for i in range(m) for j in range(n)
        )
        plan = np.array([[float(P[i, j]) for j in range(n)] for i in range(m)])
        return plan, (
            np.array(M_bar, dtype=float),
            np.array(a, dtype=float),
            np.array(b, dtype=float),
            np.array(float(eps_bar)),
        )


def _start(C: np.ndarray, r: np.ndarray, c: np.ndarray) -> list[mp.mpf]:
    """By sweeps of Sinkhorn; the last potential is zero."""
    v = np.zeros(len(c))
    for _ in range(2000):
        u = np.log(r) - np.logaddexp.reduce(v - C, axis=1)
        v = np.log(c) - np.logaddexp.reduce(u[:, None] - C, axis=0)
    return [mp.mpf(entry) for entry in np.concatenate([u + v[-1], v - v[-1]])]


def _plan(K: mp.matrix, z: list[mp.mpf], m: int, n: int) -> tuple[mp.matrix, mp.matrix]:
    P = mp.matrix([[mp.exp(z[i] + z[m + j] + K[i, j]) for j in range(n)] for i in range(m)])
    J = mp.zeros(m + n - 1)
    for i in range(m):
        J[i, i] = mp.fsum(P[i, :])
        for j in range(n - 1):
            J[i, m + j] = J[m + j, i] = P[i, j]
    for j in range(n - 1):
        J[m + j, m + j] = mp.fsum(P[:, j])
    return P, J
