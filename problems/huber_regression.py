"""Huber's robust regression."""

from itertools import product

import cvxpy as cp
import numpy as np

from ._prebuilt import DeclaredProblem, prebuilt


@prebuilt()
def huber_regression(m: int = 6, n: int = 2) -> DeclaredProblem:
    """Regression that counts a large error by its size, not by its square.

        minimise    sum_i phi(a_i'x - b_i),  phi(r) = r^2 where |r| <= 1,  2|r| - 1 elsewhere

    Solution:    with the errors split into small ones, I, and large ones, O, of signs s:
                 A_I'(A_I x - b_I) + A_O's = 0.
    Derivative:  A_I'A_I dx = A_I'(db_I - dA_I x) - dA_I'(A_I x - b_I) - dA_O's;  nothing from b_O.
    Shapes:      A (*batch, m, n), b (*batch, m)  ->  x (*batch, n).
    Cost:        an interior point method, some 10 factorisations of about (3 m + n)^3 / 3 flops if
                 dense; one more backward.
    At a kink:   where |a_i'x - b_i| = 1, the derivative is one-sided and the row is flagged.
    Source:      Huber (1964); Mangasarian and Musicant (2000).
    """
    A, b, x = cp.Parameter((m, n), name="A"), cp.Parameter(m, name="b"), cp.Variable(n, name="x")
    return cp.Problem(cp.Minimize(cp.sum(cp.huber(A @ x - b)))), [A, b], [x]


@huber_regression.sampled_by
def _sample(draw, m, n):
    """Noise that makes about a third of the errors large."""
    return draw.normal(m, n), 2 * draw.normal(m)


@huber_regression.solved_by
def _oracle(A, b):
    """The best point over all 3^m patterns of small and large errors."""

    def candidate(signs):
        I = signs == 0
        return np.linalg.lstsq(A[I].T @ A[I], A[I].T @ b[I] - A.T @ signs, rcond=None)[0]

    def loss(x):
        r = np.abs(A @ x - b)
        return np.where(r <= 1, r**2, 2 * r - 1).sum()

    patterns = (np.array(signs) for signs in product((-1, 0, 1), repeat=len(b)))
    return min((candidate(signs) for signs in patterns if np.any(signs == 0)), key=loss)
