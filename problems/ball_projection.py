"""Projection onto a Euclidean ball."""

import cvxpy as cp
import numpy as np

from ._prebuilt import DeclaredProblem, prebuilt


@prebuilt()
def ball_projection(n: int = 4) -> DeclaredProblem:
    """Projection onto a Euclidean ball, the clipping of a norm.

        minimise    |x - y|^2
        subject to  |x| <= r

    Solution:    x = y min(1, r/|y|).
    Derivative:  for |y| > r, with u = y/|y|:  dx = r/|y| (dy - u u'dy) + u dr;  for |y| < r:  dx = dy.
    Shapes:      y (*batch, n), r (*batch,) positive  ->  x (*batch, n).
    Cost:        two passes over y.
    At a kink:   where |y| = r the derivative is one of these two, and the row is flagged.
    Source:      Parikh and Boyd (2014), section 6.
    """
    y, r, x = cp.Parameter(n, name="y"), cp.Parameter(pos=True, name="r"), cp.Variable(n, name="x")
    return cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [cp.norm2(x) <= r]), [y, r], [x]


@ball_projection.sampled_by
def _sample(draw, n):
    return draw.normal(n), draw.uniform(0.5, 2.5)


@ball_projection.solved_by
def _oracle(y, r):
    return y * min(1.0, r / np.linalg.norm(y))
