"""Portfolios: mean and variance, turnover, factors, risk measures, growth."""

from __future__ import annotations

import cvxpy as cp
import torch

from convlayer.problems import prebuilt


def _covariance_root(draw, n):
    """Of a year's returns, times an aversion to risk."""
    return 0.4 * torch.eye(n, dtype=torch.float64) + 0.3 * draw.normal(n, n) / n**0.5


def _weights(draw, n):
    return torch.softmax(draw.normal(n), -1)


@prebuilt()
def long_only_portfolio(n=10):
    mu, root, w = cp.Parameter(n), cp.Parameter((n, n)), cp.Variable(n)
    gain = mu @ w - cp.sum_squares(root @ w)
    return cp.Problem(cp.Maximize(gain), [cp.sum(w) == 1, w >= 0]), [mu, root], [w]


@prebuilt()
def turnover_portfolio(n=12):
    mu, root, held = cp.Parameter(n), cp.Parameter((n, n)), cp.Parameter(n)
    w, trade = cp.Variable(n), cp.Variable(n)
    gain = mu @ w - cp.sum_squares(root @ w) - 0.02 * cp.norm1(trade)
    limits = [trade == w - held, cp.sum(w) == 1, w >= 0, w <= 0.3]
    return cp.Problem(cp.Maximize(gain), limits), [mu, root, held], [w]


@prebuilt()
def factor_portfolio(n=20, k=4):
    mu, F, sd, limit = cp.Parameter(n), cp.Parameter((n, k)), cp.Parameter(n), cp.Parameter()
    w, f = cp.Variable(n), cp.Variable(k)
    risk = cp.norm(cp.hstack([f, cp.multiply(sd, w)]))
    limits = [f == F.T @ w, risk <= limit, cp.norm1(w) <= 1.6, cp.sum(w) == 1]
    return cp.Problem(cp.Maximize(mu @ w), limits), [mu, F, sd, limit], [w]


@prebuilt()
def minimum_variance(n=8):
    root, mu, target = cp.Parameter((n, n)), cp.Parameter(n), cp.Parameter()
    w = cp.Variable(n)
    limits = [mu @ w >= target, cp.sum(w) == 1, w >= 0]
    return cp.Problem(cp.Minimize(cp.sum_squares(root @ w)), limits), [root, mu, target], [w]


@prebuilt()
def robust_portfolio(n=10):
    mu, root, w = cp.Parameter(n), cp.Parameter((n, n)), cp.Variable(n)
    gain = mu @ w - 0.5 * cp.norm(root @ w, 2)
    return cp.Problem(cp.Maximize(gain), [cp.sum(w) == 1, w >= 0]), [mu, root], [w]


@prebuilt()
def risk_parity(n=8):
    root, budget, x = cp.Parameter((n, n)), cp.Parameter(n, nonneg=True), cp.Variable(n)
    cost = 0.5 * cp.sum_squares(root @ x) - budget @ cp.log(x)
    return cp.Problem(cp.Minimize(cost)), [root, budget], [x]


@prebuilt()
def conditional_value_at_risk(n=6, m=20):
    R, w, level = cp.Parameter((m, n)), cp.Variable(n), cp.Variable()
    tail = level + cp.sum(cp.pos(-R @ w - level)) / (0.2 * m)
    cost = tail - cp.sum(R @ w) / m + 0.05 * cp.sum_squares(w)
    return cp.Problem(cp.Minimize(cost), [cp.sum(w) == 1, w >= 0]), [R], [w]


@prebuilt()
def kelly_betting(n=5, m=20):
    R, b = cp.Parameter((m, n)), cp.Variable(n)
    growth = cp.sum(cp.log(R @ b)) / m
    return cp.Problem(cp.Maximize(growth), [cp.sum(b) == 1, b >= 0]), [R], [b]


for _problem in (long_only_portfolio, robust_portfolio):
    _problem.sampled_by(lambda draw, n: (0.3 * draw.normal(n), _covariance_root(draw, n)))

turnover_portfolio.sampled_by(
    lambda draw, n: (0.3 * draw.normal(n), _covariance_root(draw, n), _weights(draw, n))
)
risk_parity.sampled_by(lambda draw, n: (_covariance_root(draw, n), _weights(draw, n)))
conditional_value_at_risk.sampled_by(lambda draw, n, m: (0.05 + 0.2 * draw.normal(m, n),))
kelly_betting.sampled_by(lambda draw, n, m: (torch.exp(0.05 + 0.3 * draw.normal(m, n)),))


@factor_portfolio.sampled_by
def _factors(draw, n, k):
    F, sd = 0.2 * draw.normal(n, k), draw.uniform(0.1, 0.3, n)
    equal = torch.cat([F.mean(-2), sd / n], -1).norm(dim=-1)
    return 0.1 * draw.normal(n), F, sd, 1.3 * equal


@minimum_variance.sampled_by
def _target(draw, n):
    mu = 0.3 * draw.normal(n)
    return _covariance_root(draw, n), mu, 0.7 * mu.mean(-1) + 0.3 * mu.amax(-1)
