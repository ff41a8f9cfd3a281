"""Declarations that two processes build alike."""

import cvxpy as cp
import torch

from convlayer import ConvexLayer


def clipped(cap=1.0, n=3, **options):
    """x = min(y, cap)."""
    y, x = cp.Parameter(n), cp.Variable(n)
    return ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [x <= cap]),
        [y],
        [x],
        structure="generic",
        **options,
    )


def spread(n):
    """n numbers, each -y[0] / 2: the parameter has the same shape whatever n."""
    y, x = cp.Parameter(3), cp.Variable(n)
    return ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(x) + y[0] * cp.sum(x)), [x >= -9]),
        [y],
        [x],
        structure="generic",
    )


class Model(torch.nn.Module):
    """Nothing that inductor would have to compile by itself."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, y):
        return self.layer(y)[0]
