"""Robust pooling."""

import cvxpy as cp
import numpy as np
from scipy.optimize import brentq

from ._prebuilt import Declaration, prebuilt


@prebuilt()
def robust_pooling(m: int = 7, n: int = 3, threshold: float = 1.0) -> Declaration:
    """Robust pooling: the mean of m points, with a bounded pull of the outliers.

        minimise    sum_ij h(y_j - p_ij),  h(z) = z^2 for |z| <= M, and M (2 |z| - M) beyond

    M is the threshold, a constant.

    Solution:    y_j = (sum_{i in I} p_ij + M (above - below)) / |I|, where I = {i : |y_j - p_ij| < M}, and above and below
                 count the points farther off on each side.
    Derivative:  dy_j = mean of dp_ij over I.
    Shapes:      points p (*batch, m, n)  ->  y (*batch, n).
    Cost:        an interior point method, some 10 factorisations of n rows and 2 m n bounds; one more backward.
    At a kink:   where |y_j - p_ij| = M, the derivative is one-sided and the row is flagged. With m odd, I is never empty and
                 y is unique.
    Source:      Huber (1964); Gould, Hartley and Campbell (2021).
    """
    points, y = cp.Parameter((m, n), name="points"), cp.Variable(n, name="y")
    return cp.Problem(cp.Minimize(cp.sum(cp.huber(y - points, threshold)))), [points], [y]


@robust_pooling.sampled_by
def _sample(draw, m, n, threshold):
    """Of which about a third are out of the threshold."""
    return (threshold * draw.normal(m, n),)


@robust_pooling.solved_by
def _oracle(points, *, threshold):
    """Brent's method on the derivative, which rises through its root, a coordinate at a time."""

    def centre(p):
        return brentq(lambda y: np.clip(y - p, -threshold, threshold).sum(), p.min(), p.max(), xtol=1e-15, rtol=1e-15)

    return np.array([centre(p) for p in points.T])
