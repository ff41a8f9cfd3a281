"""Linear support vector machine."""

from itertools import product

import cvxpy as cp
import numpy as np

from ._prebuilt import DeclaredProblem, prebuilt


@prebuilt()
def support_vector_machine(m: int = 6, n: int = 2) -> DeclaredProblem:
    """Linear support vector machine with a soft margin.

        minimise    lam/2 |w|^2 + sum_i max(0, 1 - a_i'w)

    The rows a_i of A are feature vectors times their label, +1 or -1; a feature that is 1
    everywhere makes an offset.

    Solution:    with V the points inside the margin and M those on it:  lam w = A_V'1 + A_M'alpha,  A_M w = 1;
                 0 <= alpha <= 1 certifies it.
    Derivative:  lam dw - A_M'dalpha = dA_V'1 + dA_M'alpha - dlam w,  A_M dw = -dA_M w;  nothing from the other points.
    Shapes:      A (*batch, m, n), lam (*batch,) nonnegative  ->  w (*batch, n).
    Cost:        an interior point method, some 10 factorisations of about (2 m + n)^3 / 3 flops if
                 dense; one more backward.
    At a kink:   where a point has just reached the margin, the derivative is one-sided and the row
                 is flagged.
    Source:      Cortes and Vapnik (1995).
    """
    A, lam, w = (
        cp.Parameter((m, n), name="A"),
        cp.Parameter(nonneg=True, name="lam"),
        cp.Variable(n, name="w"),
    )
    return (
        cp.Problem(cp.Minimize(0.5 * lam * cp.sum_squares(w) + cp.sum(cp.pos(1 - A @ w)))),
        [A, lam],
        [w],
    )


@support_vector_machine.sampled_by
def _sample(draw, m, n):
    """Classes whose centres are one standard deviation apart."""
    return 0.5 + draw.normal(m, n), draw.uniform(1.0, 3.0)


@support_vector_machine.solved_by
def _oracle(A, lam):
    """The best point over all patterns of points inside, on and beyond the margin, at most n of
    them on it."""

    def candidate(pattern):
        M, pushed = A[pattern == 0], A[pattern == 1].sum(0)
        return (pushed + M.T @ np.linalg.solve(M @ M.T, lam - M @ pushed)) / lam

    def loss(w):
        return lam * w @ w / 2 + np.maximum(0, 1 - A @ w).sum()

    m, n = A.shape
    patterns = (np.array(pattern) for pattern in product((-1, 0, 1), repeat=m))
    return min((candidate(pattern) for pattern in patterns if np.sum(pattern == 0) <= n), key=loss)
