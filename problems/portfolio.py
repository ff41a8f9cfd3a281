"""Mean-variance portfolio with trading costs."""

from itertools import product

import cvxpy as cp
import numpy as np

from ._prebuilt import DeclaredProblem, prebuilt


@prebuilt()
def portfolio(n: int = 4) -> DeclaredProblem:
    """Long-only mean-variance portfolio, with a cost proportional to turnover.

        maximise    mu'w - 1/2 |L'w|^2 - kappa |w - w0|_1
        subject to  w >= 0,  1'w = 1

    Solution:    every holding is 0, kept at w0, bought (s = 1) or sold (s = -1); those traded, F, satisfy, V = L L',
                 V_FF w_F + V_FC w_C - mu_F + kappa s + nu 1 = 0  and  1'w = 1,  C being the others.
    Derivative:  that of these equations, the pattern of trades held fixed.
    Shapes:      mu (*batch, n) return, L (*batch, n, n) factor of the covariance times the aversion to risk,
                 w0 (*batch, n) holdings today, kappa (*batch,) cost of a unit traded, nonnegative  ->  w (*batch, n),
                 fractions of the wealth.
    Cost:        an interior point method, some 10 factorisations of about (4 n)^3 / 3 flops at
                 most; one more backward.
    At a kink:   where a trade just stops to pay, the derivative is one-sided and the row is
                 flagged.
    Source:      Markowitz (1952); Lobo, Fazel and Boyd (2007).
    """
    mu, L, w0 = (
        cp.Parameter(n, name="mu"),
        cp.Parameter((n, n), name="L"),
        cp.Parameter(n, name="w0"),
    )
    kappa, w = cp.Parameter(nonneg=True, name="kappa"), cp.Variable(n, name="w")
    trade = cp.Variable(n, name="trade")  # kappa times a function of w0 would not be DPP
    utility = mu @ w - 0.5 * cp.sum_squares(L.T @ w) - kappa * cp.norm1(trade)
    return (
        cp.Problem(cp.Maximize(utility), [trade == w - w0, w >= 0, cp.sum(w) == 1]),
        [mu, L, w0, kappa],
        [w],
    )


@portfolio.sampled_by
def _sample(draw, n):
    """Holdings that leave some cash to invest, so that some asset is always traded."""
    w0 = 0.9 * draw.normal(n).softmax(-1)
    return 0.3 * draw.normal(n), 0.5 * draw.normal(n, n), w0, draw.uniform(0.05, 0.2)


@portfolio.solved_by
def _oracle(mu, L, w0, kappa):
    """The best feasible point over all 4^n patterns."""
    V = L @ L.T

    def candidate(pattern):
        w, F = np.where(pattern == 2, w0, 0.0), abs(pattern) == 1
        k = F.sum()
        K = np.block([[V[np.ix_(F, F)], np.ones((k, 1))], [np.ones((1, k)), np.zeros((1, 1))]])
        w[F] = np.linalg.solve(K, np.append(mu[F] - kappa * pattern[F] - V[F] @ w, 1 - w.sum()))[:k]
        return w

    def utility(w):
        return mu @ w - w @ V @ w / 2 - kappa * np.abs(w - w0).sum()

    patterns = (np.array(pattern) for pattern in product((-1, 0, 1, 2), repeat=len(mu)))
    candidates = [candidate(pattern) for pattern in patterns if np.any(abs(pattern) == 1)]
    return max((w for w in candidates if np.all(w >= -1e-12)), key=utility)
