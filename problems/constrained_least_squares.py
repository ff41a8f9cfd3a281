"""Least squares with equality constraints."""

import cvxpy as cp
import numpy as np
from scipy.linalg import null_space

from ._prebuilt import DeclaredProblem, prebuilt


@prebuilt()
def constrained_least_squares(m: int = 8, n: int = 5, p: int = 2) -> DeclaredProblem:
    """Least squares with equality constraints.

        minimise    |A x - b|^2
        subject to  C x = d

    Solution:    K (x, nu) = (A'b, d)  with the KKT matrix  K = [A'A C'; C 0].
    Derivative:  K (dx, dnu) = (A'(db - dA x) + dA'(b - A x) - dC' nu, dd - dC x).
    Shapes:      A (*batch, m, n), b (*batch, m), C (*batch, p, n), d (*batch, p)  ->  x (*batch, n).
    Cost:        A'A, m n^2 flops, and one factorisation of K, about (n + p)^3 / 3; it serves the
                 backward pass.
    At a kink:   none while C has full row rank and (A; C) full column rank.
    Source:      Golub and Van Loan (2013), section 6.2.
    """
    A, b = cp.Parameter((m, n), name="A"), cp.Parameter(m, name="b")
    C, d, x = cp.Parameter((p, n), name="C"), cp.Parameter(p, name="d"), cp.Variable(n, name="x")
    return cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b)), [C @ x == d]), [A, b, C, d], [x]


@constrained_least_squares.sampled_by
def _sample(draw, m, n, p):
    return draw.normal(m, n), draw.normal(m), draw.normal(p, n), draw.normal(p)


@constrained_least_squares.solved_by
def _oracle(A, b, C, d):
    """The null-space method: a point with C x = d, and least squares over the directions that keep
    it so."""
    point, N = np.linalg.lstsq(C, d)[0], null_space(C)
    return point + N @ np.linalg.lstsq(A @ N, b - A @ point)[0]
