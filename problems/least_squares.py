"""Least squares."""

import cvxpy as cp
import numpy as np

from ._prebuilt import DeclaredProblem, prebuilt


@prebuilt()
def least_squares(m: int = 8, n: int = 4) -> DeclaredProblem:
    """Least squares.

        minimise    |A x - b|^2

    Solution:    x = pinv(A) b, for A of full column rank.
    Derivative:  dx = pinv(A) (db - dA x) + inv(A'A) dA' (b - A x).
    Shapes:      A (*batch, m, n), b (*batch, m)  ->  x (*batch, n).
    Cost:        one QR of A, 2 m n^2 flops; its factor serves the backward pass.
    At a kink:   none while A keeps full column rank.
    Source:      Golub and Pereyra (1973).
    """
    A, b, x = cp.Parameter((m, n), name="A"), cp.Parameter(m, name="b"), cp.Variable(n, name="x")
    return cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b))), [A, b], [x]


@least_squares.sampled_by
def _sample(draw, m, n):
    return draw.normal(m, n), draw.normal(m)


@least_squares.solved_by
def _oracle(A, b):
    return np.linalg.lstsq(A, b)[0]
