"""Logistic regression."""

import cvxpy as cp
import numpy as np
from scipy.optimize import root
from scipy.special import expit

from ._prebuilt import DeclaredProblem, prebuilt


@prebuilt()
def logistic_regression(m: int = 8, n: int = 3) -> DeclaredProblem:
    """Logistic regression with a quadratic penalty.

        minimise    sum_i log(1 + exp(-a_i'x)) + lam/2 |x|^2

    The rows a_i of A are feature vectors times their label, +1 or -1.

    Solution:    lam x = A'p  with  p_i = 1 / (1 + exp(a_i'x)), the probability the model gives to the wrong label.
    Derivative:  (A'D A + lam I) dx = dA'p - A'D dA x - dlam x,  D = diag(p (1 - p)).
    Shapes:      A (*batch, m, n), lam (*batch,) nonnegative  ->  x (*batch, n).
    Cost:        some 10 Newton steps, m n^2 + n^3/3 flops each; one factorisation backward.
    At a kink:   none for lam > 0.
    Source:      Hastie, Tibshirani and Friedman (2009), section 4.4.
    """
    A, lam, x = (
        cp.Parameter((m, n), name="A"),
        cp.Parameter(nonneg=True, name="lam"),
        cp.Variable(n, name="x"),
    )
    loss = cp.sum(cp.logistic(-A @ x)) + 0.5 * lam * cp.sum_squares(x)
    return cp.Problem(cp.Minimize(loss)), [A, lam], [x]


@logistic_regression.sampled_by
def _sample(draw, m, n):
    return draw.normal(m, n), draw.uniform(0.5, 2.0)


@logistic_regression.solved_by
def _oracle(A, lam):
    """Powell's hybrid method on the gradient."""

    def gradient(x):
        return lam * x - A.T @ expit(-A @ x)

    def hessian(x):
        p = expit(-A @ x)
        return lam * np.eye(len(x)) + A.T @ (A * (p * (1 - p))[:, None])

    return root(gradient, np.zeros(A.shape[1]), jac=hessian, tol=1e-14).x
