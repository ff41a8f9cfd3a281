"""Nonnegative least squares."""

import cvxpy as cp
from scipy.optimize import nnls

from ._prebuilt import DeclaredProblem, prebuilt


@prebuilt()
def nonnegative_least_squares(m: int = 8, n: int = 5) -> DeclaredProblem:
    """Nonnegative least squares.

        minimise    |A x - b|^2
        subject to  x >= 0

    Solution:    x_S = pinv(A_S) b on the support S, 0 elsewhere; A'(A x - b) >= 0 off S certifies
                 it.
    Derivative:  that of least squares with the columns S alone; 0 off S.
    Shapes:      A (*batch, m, n), b (*batch, m)  ->  x (*batch, n).
    Cost:        an interior point method, some 10 factorisations of an n by n matrix; one more
                 factorisation backward.
    At a kink:   where x_i and its multiplier are both 0, the derivative is one-sided and the row is
                 flagged.
    Source:      Lawson and Hanson (1974).
    """
    A, b, x = cp.Parameter((m, n), name="A"), cp.Parameter(m, name="b"), cp.Variable(n, name="x")
    return cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b)), [x >= 0]), [A, b], [x]


@nonnegative_least_squares.sampled_by
def _sample(draw, m, n):
    return draw.normal(m, n), draw.normal(m)


@nonnegative_least_squares.solved_by
def _oracle(A, b):
    return nnls(A, b)[0]
