"""Projection onto the simplex."""

import cvxpy as cp
import numpy as np

from ._prebuilt import DeclaredProblem, prebuilt


@prebuilt()
def simplex_projection(n: int = 5) -> DeclaredProblem:
    """Projection onto the simplex; sparsemax where r = 1.

        minimise    |x - y|^2
        subject to  x >= 0,  1'x = r

    Solution:    x = max(y - tau, 0), with tau such that 1'x = r.
    Derivative:  on the support S = {i : x_i > 0},  dx_S = dy_S - mean(dy_S) + dr/|S|;  0 off S.
    Shapes:      y (*batch, n), r (*batch,) positive  ->  x (*batch, n).
    Cost:        a sort, or a few passes over y.
    At a kink:   where y_i = tau, x_i = 0 and i is outside S.
    Source:      Held, Wolfe and Crowder (1974); Martins and Astudillo (2016).
    """
    y, r, x = cp.Parameter(n, name="y"), cp.Parameter(pos=True, name="r"), cp.Variable(n, name="x")
    return cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [x >= 0, cp.sum(x) == r]), [y, r], [x]


@simplex_projection.sampled_by
def _sample(draw, n):
    return draw.normal(n), draw.uniform(0.5, 2.0)


@simplex_projection.solved_by
def _oracle(y, r):
    """By sort: tau is the largest over k of (the sum of the k largest entries - r) / k."""
    tau = np.max((np.sort(y)[::-1].cumsum() - r) / np.arange(1, len(y) + 1))
    return np.maximum(y - tau, 0)
