"""Total variation denoising of a signal."""

import cvxpy as cp
import numpy as np
from scipy.optimize import lsq_linear

from ._prebuilt import DeclaredProblem, prebuilt


@prebuilt()
def total_variation(n: int = 6) -> DeclaredProblem:
    """Total variation denoising of a signal, the fused lasso without its sparsity.

        minimise    1/2 |x - y|^2 + lam sum_i |x_{i+1} - x_i|

    Solution:    piecewise constant; on a segment of length k, x = mean(y) + lam (up - down) / k,
                 where up and down count the ends of the segment whose neighbour lies above and
                 below.
    Derivative:  on each segment, dx = mean(dy) + dlam (up - down) / k.
    Shapes:      y (*batch, n), lam (*batch,) nonnegative  ->  x (*batch, n).
    Cost:        about linear in n by the taut string; the derivative is one pass over the segments.
    At a kink:   where a segment is about to split or two are about to merge, it is one-sided and
                 the row is flagged.
    Source:      Rudin, Osher and Fatemi (1992); Condat (2013).
    """
    y, lam, x = (
        cp.Parameter(n, name="y"),
        cp.Parameter(nonneg=True, name="lam"),
        cp.Variable(n, name="x"),
    )
    return cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x - y) + lam * cp.tv(x))), [y, lam], [x]


@total_variation.sampled_by
def _sample(draw, n):
    return 2 * draw.normal(n), draw.uniform(0.2, 1.0)


@total_variation.solved_by
def _oracle(y, lam):
    """Stark and Parker's active-set method on the dual: x = y - D'u, with u minimising |y - D'u|^2
    over |u| <= lam."""
    D = np.diff(np.eye(len(y)), axis=0)
    return y - D.T @ lsq_linear(D.T, y, (-lam, lam), method="bvls", tol=1e-15).x
