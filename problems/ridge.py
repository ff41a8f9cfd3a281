"""Ridge regression."""

import cvxpy as cp
import numpy as np

from ._prebuilt import DeclaredProblem, prebuilt


@prebuilt()
def ridge(m: int = 8, n: int = 4) -> DeclaredProblem:
    """Ridge regression.

        minimise    |A x - b|^2 + lam |x|^2

    Solution:    x = inv(H) A'b  with  H = A'A + lam I.
    Derivative:  dx = inv(H) (dA' (b - A x) + A' (db - dA x) - dlam x).
    Shapes:      A (*batch, m, n), b (*batch, m), lam (*batch,) nonnegative  ->  x (*batch, n).
    Cost:        one Cholesky of H, m n^2 + n^3/3 flops; its factor serves the backward pass.
    At a kink:   none for lam > 0.
    Source:      Hoerl and Kennard (1970).
    """
    A, b, lam = (
        cp.Parameter((m, n), name="A"),
        cp.Parameter(m, name="b"),
        cp.Parameter(nonneg=True, name="lam"),
    )
    x = cp.Variable(n, name="x")
    return (
        cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b) + lam * cp.sum_squares(x))),
        [A, b, lam],
        [x],
    )


@ridge.sampled_by
def _sample(draw, m, n):
    return draw.normal(m, n), draw.normal(m), draw.uniform(0.1, 2.0)


@ridge.solved_by
def _oracle(A, b, lam):
    """Least squares with n more rows, sqrt(lam) I."""
    n = A.shape[1]
    return np.linalg.lstsq(
        np.vstack([A, np.sqrt(lam) * np.eye(n)]), np.concatenate([b, np.zeros(n)])
    )[0]
