"""Nearest correlation matrix."""

import cvxpy as cp
import numpy as np
from scipy.optimize import root

from ._prebuilt import DeclaredProblem, prebuilt


@prebuilt()
def nearest_correlation(n: int = 3) -> DeclaredProblem:
    """The correlation matrix nearest to a symmetric one.

        minimise    |X - C|_F^2
        subject to  X positive semidefinite,  diag(X) = 1

    Solution:    X = (C + Diag(y))_+, the projection onto the psd cone, with y such that diag(X) =
                 1.
    Derivative:  dX = D (dC + Diag(dy)), D the derivative of that projection, with dy such that
                 diag(dX) = 0.
    Shapes:      C (*batch, n, n) symmetric  ->  X (*batch, n, n).
    Cost:        some 10 factorisations of n (n + 1)/2 unknowns, about n^6/24 flops each; one more
                 backward.
    At a kink:   where C + Diag(y) is singular, the derivative is one-sided and the row is flagged.
    Source:      Higham (2002); Qi and Sun (2006).
    """
    C, X = cp.Parameter((n, n), symmetric=True, name="C"), cp.Variable((n, n), PSD=True, name="X")
    return cp.Problem(cp.Minimize(cp.sum_squares(X - C)), [cp.diag(X) == 1]), [C], [X]


@nearest_correlation.sampled_by
def _sample(draw, n):
    W = draw.normal(n, n)
    return (W + W.mT,)


@nearest_correlation.solved_by
def _oracle(C):
    """Powell's hybrid method on the n equations diag(X) = 1."""

    def nearest(y):
        values, vectors = np.linalg.eigh(C + np.diag(y))
        return (vectors * np.maximum(values, 0)) @ vectors.T

    return nearest(root(lambda y: np.diag(nearest(y)) - 1, 1 - np.diag(C), tol=1e-14).x)
