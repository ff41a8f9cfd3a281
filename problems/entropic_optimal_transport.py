"""Optimal transport with an entropy."""

import cvxpy as cp
import numpy as np
from scipy.special import logsumexp

from ._prebuilt import DeclaredProblem, prebuilt


@prebuilt()
def entropic_optimal_transport(m: int = 4, n: int = 3) -> DeclaredProblem:
    """Optimal transport between two marginals, smoothed by an entropy.

        minimise    <M, P> + eps sum_ij P_ij log P_ij
        subject to  P 1 = r,  P'1 = c

    Solution:    P_ij = exp((f_i + g_j - M_ij) / eps), with the potentials f and g that give the
                 marginals.
    Derivative:  dP = P o (df 1' + 1 dg' - dM - deps log P) / eps, with df and dg such that dP 1 =
                 dr and dP'1 = dc.
    Shapes:      M (*batch, m, n), r (*batch, m) and c (*batch, n) nonnegative and of the same sum, eps (*batch,)
                 positive  ->  P (*batch, m, n).
    Cost:        sweeps of about 10 m n flops, and some Newton steps of min(m, n)^3 / 3; one of
                 these backward.
    At a kink:   none for positive marginals. The sums of r and c must move together: their
                 gradients are determined up to a constant added to one and taken from the other.
    Source:      Cuturi (2013); Peyre and Cuturi (2019), chapter 4.
    """
    M, eps = cp.Parameter((m, n), name="M"), cp.Parameter(nonneg=True, name="eps")
    r, c = cp.Parameter(m, nonneg=True, name="r"), cp.Parameter(n, nonneg=True, name="c")
    P = cp.Variable((m, n), name="P")
    cost = cp.sum(cp.multiply(M, P)) - eps * cp.sum(cp.entr(P))
    return (
        cp.Problem(cp.Minimize(cost), [cp.sum(P, axis=1) == r, cp.sum(P, axis=0) == c]),
        [M, r, c, eps],
        [P],
    )


@entropic_optimal_transport.sampled_by
def _sample(draw, m, n):
    """Marginals of one mass, also on the way from one sample to another."""
    mass = draw.uniform(0.5, 2.0, 1)
    r, c = (mass * draw.normal(size).softmax(-1) for size in (m, n))
    return draw.uniform(0, 1, m, n), r, c, draw.uniform(0.2, 0.6)


@entropic_optimal_transport.solved_by
def _oracle(M, r, c, eps):
    """Sinkhorn's iteration on the potentials over eps, until a sweep moves them by rounding error
    alone."""
    kernel, g = -M / eps, np.zeros(len(c))
    for _ in range(10000):
        f = np.log(r) - logsumexp(kernel + g, axis=1)
        before, g = g, np.log(c) - logsumexp(kernel + f[:, None], axis=0)
        if np.abs(g - before).max() < 1e-14:
            break
    return np.exp(f[:, None] + g + kernel)
