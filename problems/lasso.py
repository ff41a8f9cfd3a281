"""Lasso."""

from itertools import product

import cvxpy as cp
import numpy as np

from ._prebuilt import DeclaredProblem, prebuilt


@prebuilt()
def lasso(m: int = 8, n: int = 4) -> DeclaredProblem:
    """Lasso.

        minimise    1/2 |A x - b|^2 + lam |x|_1

    Solution:    on the support S, with signs s:  x_S = inv(A_S'A_S) (A_S'b - lam s);  0 off S;
                 |A'(b - A x)| <= lam off S certifies it.
    Derivative:  dx_S = inv(A_S'A_S) (dA_S'(b - A x) + A_S'(db - dA_S x_S) - dlam s);  0 off S.
    Shapes:      A (*batch, m, n), b (*batch, m), lam (*batch,) nonnegative  ->  x (*batch, n).
    Cost:        an interior point method, some 10 factorisations of an n by n matrix; one more
                 backward.
    At a kink:   where x_i = 0 and |A_i'(b - A x)| = lam, the derivative is one-sided and the row is
                 flagged.
    Source:      Tibshirani (1996); Osborne, Presnell and Turlach (2000).
    """
    A, b, lam = (
        cp.Parameter((m, n), name="A"),
        cp.Parameter(m, name="b"),
        cp.Parameter(nonneg=True, name="lam"),
    )
    x = cp.Variable(n, name="x")
    return (
        cp.Problem(cp.Minimize(0.5 * cp.sum_squares(A @ x - b) + lam * cp.norm1(x))),
        [A, b, lam],
        [x],
    )


@lasso.sampled_by
def _sample(draw, m, n):
    return draw.normal(m, n), draw.normal(m), draw.uniform(0.2, 1.5)


@lasso.solved_by
def _oracle(A, b, lam):
    """The best point over all 3^n patterns of signs."""

    def candidate(signs):
        x, S = np.zeros(A.shape[1]), signs != 0
        x[S] = np.linalg.solve(A[:, S].T @ A[:, S], A[:, S].T @ b - lam * signs[S])
        return x

    candidates = [candidate(np.array(signs)) for signs in product((-1, 0, 1), repeat=A.shape[1])]
    return min(candidates, key=lambda x: np.sum((A @ x - b) ** 2) / 2 + lam * np.abs(x).sum())
