"""Mean-variance portfolio with a factor model of risk."""

from itertools import product

import cvxpy as cp
import numpy as np

from ._prebuilt import DeclaredProblem, prebuilt


@prebuilt()
def factor_portfolio(n: int = 5, k: int = 2) -> DeclaredProblem:
    """Long-only mean-variance portfolio of n assets whose risk is that of k factors, and some of
    each asset's own.

        maximise    mu'w - 1/2 |F'w|^2 - 1/2 |d * w|^2
        subject to  w >= 0,  1'w = 1

    Solution:    on the support S, with V = F F' + Diag(d^2):  V_SS w_S - mu_S + nu 1 = 0,  1'w_S = 1;  0 off S.
    Derivative:  V_SS dw_S + dnu 1 = dmu_S - dV_SS w_S,  1'dw_S = 0;  0 off S.
    Shapes:      mu (*batch, n) return, F (*batch, n, k) exposure to the factors times the root of the aversion to risk,
                 d (*batch, n) nonnegative, standard deviation of each asset's own times the same  ->  w (*batch, n).
    Cost:        an interior point method; sparse, each of some 10 factorisations is about n k^2
                 flops, with the factors' positions F'w as variables; one more backward.
    At a kink:   where an asset just does not pay, the derivative is one-sided and the row is
                 flagged.
    Source:      Markowitz (1952); Perold (1984).
    """
    mu, F, d = (
        cp.Parameter(n, name="mu"),
        cp.Parameter((n, k), name="F"),
        cp.Parameter(n, nonneg=True, name="d"),
    )
    w, positions = cp.Variable(n, name="w"), cp.Variable(k, name="positions")
    utility = mu @ w - 0.5 * cp.sum_squares(positions) - 0.5 * cp.sum_squares(cp.multiply(d, w))
    constraints = [positions == F.T @ w, w >= 0, cp.sum(w) == 1]
    return cp.Problem(cp.Maximize(utility), constraints), [mu, F, d], [w]


@factor_portfolio.sampled_by
def _sample(draw, n, k):
    return 0.5 * draw.normal(n), draw.normal(n, k), draw.uniform(0.5, 1.5, n)


@factor_portfolio.solved_by
def _oracle(mu, F, d):
    """The best feasible point over all 2^n supports."""
    V = F @ F.T + np.diag(d**2)

    def candidate(S):
        w, ones = np.zeros(len(mu)), np.ones((S.sum(), 1))
        K = np.block([[V[np.ix_(S, S)], ones], [ones.T, np.zeros((1, 1))]])
        w[S] = np.linalg.solve(K, np.append(mu[S], 1))[:-1]
        return w

    supports = (np.array(S) for S in product((False, True), repeat=len(mu)) if any(S))
    return max(
        (w for w in map(candidate, supports) if np.all(w >= -1e-12)),
        key=lambda w: mu @ w - w @ V @ w / 2,
    )
