"""Robust pooling."""

import cvxpy as cp
import numpy as np
import torch
from scipy.optimize import brentq

from ._prebuilt import DeclaredProblem, prebuilt


@prebuilt()
def robust_pooling(m: int = 7, n: int = 3, threshold: float = 1.0) -> DeclaredProblem:
    """Robust pooling: the mean of m points, with a bounded pull of the outliers.

        minimise    sum_ij h(y_j - p_ij),  h(z) = z^2 for |z| <= M, and M (2 |z| - M) beyond

    M is the threshold, a constant.

    Solution:    y_j = (sum_{i in I} p_ij + M (above - below)) / |I|, where I = {i : |y_j - p_ij| <
                 M}, and above and below count the points farther off on each side.
    Derivative:  dy_j = mean of dp_ij over I.
    Shapes:      points p (*batch, m, n)  ->  y (*batch, n).
    Cost:        an interior point method, some 10 factorisations of 3 m n inequalities at most; one
                 more backward.
    At a kink:   where |y_j - p_ij| = M, the derivative is one-sided and the row is flagged. With m
                 odd, I is never empty and y is unique.
    Source:      Huber (1964); Gould, Hartley and Campbell (2021).
    """
    points, y = cp.Parameter((m, n), name="points"), cp.Variable(n, name="y")
    gap = cp.reshape(y, (1, n), order="C") - points
    penalty = threshold**2 * cp.huber(gap / threshold)
    return cp.Problem(cp.Minimize(cp.sum(penalty))), [points], [y]


@robust_pooling.sampled_by
def _sample(draw, m, n, threshold):
    """Of which a third, rounded down, are far away, on either side; the others are so close that
    none is near the threshold."""
    far = m // 3
    close = draw.uniform(-0.2, 0.2, m - far, n)
    outliers = draw.uniform(2.0, 4.0, far, n) * draw.normal(far, n).sign()
    return (threshold * torch.cat([close, outliers], -2) + draw.normal(1, n),)


@robust_pooling.solved_by
def _oracle(points, *, threshold):
    """Brent's method on the derivative, which rises through its root, a coordinate at a time."""

    def centre(p):
        return brentq(
            lambda y: np.clip(y - p, -threshold, threshold).sum(),
            p.min(),
            p.max(),
            xtol=1e-15,
            rtol=1e-15,
        )

    return np.array([centre(p) for p in points.T])
