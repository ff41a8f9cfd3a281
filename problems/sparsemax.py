"""Sparsemax."""

import cvxpy as cp
import numpy as np

from ._prebuilt import DeclaredProblem, prebuilt


@prebuilt()
def sparsemax(n: int = 5) -> DeclaredProblem:
    """Sparsemax, a softmax that gives zeros: the choice that trades score for spread.

        maximise    y'x - 1/2 |x|^2
        subject to  x >= 0,  1'x = 1

    Solution:    x = max(y - tau, 0), with tau such that 1'x = 1.
    Derivative:  on the support S = {i : x_i > 0},  dx_S = dy_S - mean(dy_S);  0 off S.
    Shapes:      y (*batch, n)  ->  x (*batch, n).
    Cost:        a sort, or a few passes over y.
    At a kink:   where y_i = tau, x_i = 0 and i is outside S.
    Source:      Martins and Astudillo (2016).
    """
    y, x = cp.Parameter(n, name="y"), cp.Variable(n, name="x")
    return (
        cp.Problem(cp.Maximize(y @ x - 0.5 * cp.sum_squares(x)), [x >= 0, cp.sum(x) == 1]),
        [y],
        [x],
    )


@sparsemax.sampled_by
def _sample(draw, n):
    return (draw.normal(n),)


@sparsemax.solved_by
def _oracle(y):
    """By sort: the support is the largest k with 1 + k z_k > z_1 + ... + z_k, z the entries in
    descending order."""
    z = np.sort(y)[::-1]
    k = np.flatnonzero(1 + np.arange(1, len(y) + 1) * z > z.cumsum())[-1] + 1
    return np.maximum(y - (z[:k].sum() - 1) / k, 0)
