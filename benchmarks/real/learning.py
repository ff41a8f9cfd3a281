"""Regressions, classifiers and fits of signals."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import torch

from convlayer.problems import prebuilt


def _regression(m, n):
    return cp.Parameter((m, n)), cp.Parameter(m), cp.Variable(n)


def _labels(m):
    return np.where(np.arange(m) % 2, 1.0, -1.0)


@prebuilt()
def svm_dual(m=20, n=5):
    K, a = cp.Parameter((m, n)), cp.Variable(m)  # the rows are points times their labels
    gain = cp.sum(a) - 0.5 * cp.sum_squares(K.T @ a) - 0.05 * cp.sum_squares(a)
    return cp.Problem(cp.Maximize(gain), [_labels(m) @ a == 0, a >= 0, a <= 1]), [K], [a]


@prebuilt()
def soft_margin_svm(m=30, n=4):
    X, w, b = cp.Parameter((m, n)), cp.Variable(n), cp.Variable()
    hinge = cp.sum(cp.pos(1 - cp.multiply(_labels(m), X @ w + b))) / m
    return cp.Problem(cp.Minimize(hinge + 0.05 * cp.sum_squares(w))), [X], [w, b]


@prebuilt()
def multiclass_hinge(m=15, n=3, classes=3):
    X, W, right = cp.Parameter((m, n)), cp.Variable((n, classes)), np.arange(m) % classes
    one_hot = np.eye(classes)[right]
    scores = X @ W
    worst = cp.max(scores + 1 - one_hot, axis=1)
    loss = cp.sum(worst - cp.sum(cp.multiply(one_hot, scores), axis=1)) / m
    return cp.Problem(cp.Minimize(loss + 0.1 * cp.sum_squares(W))), [X], [W]


@prebuilt()
def logistic_regression(m=30, n=5):
    X, w, b = cp.Parameter((m, n)), cp.Variable(n), cp.Variable()
    loss = cp.sum(cp.logistic(-cp.multiply(_labels(m), X @ w + b))) / m
    return cp.Problem(cp.Minimize(loss + 0.05 * cp.sum_squares(w))), [X], [w, b]


@prebuilt()
def ridge_head(m=20, n=10):
    X, y, w = _regression(m, n)
    return cp.Problem(cp.Minimize(cp.sum_squares(X @ w - y) + cp.sum_squares(w))), [X, y], [w]


@prebuilt()
def lasso(m=20, n=8):
    A, b, x = _regression(m, n)
    weight = cp.Parameter(nonneg=True)
    cost = 0.5 * cp.sum_squares(A @ x - b) + weight * cp.norm1(x)
    return cp.Problem(cp.Minimize(cost)), [A, b, weight], [x]


@prebuilt()
def elastic_net(m=20, n=8):
    A, b, x = _regression(m, n)
    first, second = cp.Parameter(nonneg=True), cp.Parameter(nonneg=True)
    cost = cp.sum_squares(A @ x - b) + first * cp.norm1(x) + second * cp.sum_squares(x)
    return cp.Problem(cp.Minimize(cost)), [A, b, first, second], [x]


@prebuilt()
def group_lasso(m=20, groups=4, n=3):
    A, b, x = _regression(m, groups * n)
    sizes = cp.norm(cp.reshape(x, (groups, n), order="C"), 2, axis=1)
    cost = 0.5 * cp.sum_squares(A @ x - b) + 3 * cp.sum(sizes)
    return cp.Problem(cp.Minimize(cost)), [A, b], [x]


@prebuilt()
def basis_pursuit_denoising(m=8, n=12):
    A, b, x = _regression(m, n)
    noise = cp.Parameter(nonneg=True)
    problem = cp.Problem(cp.Minimize(cp.norm1(x)), [cp.norm(A @ x - b, 2) <= noise])
    return problem, [A, b, noise], [x]


@prebuilt()
def huber_regression(m=20, n=5):
    X, y, w = _regression(m, n)
    return cp.Problem(cp.Minimize(cp.sum(cp.huber(X @ w - y, 0.5)))), [X, y], [w]


@prebuilt()
def quantile_regression(m=20, n=3, level=0.9):
    X, y, w = _regression(m, n)
    r = y - X @ w
    loss = cp.sum(0.5 * cp.abs(r) + (level - 0.5) * r)
    return cp.Problem(cp.Minimize(loss)), [X, y], [w]


@prebuilt()
def robust_least_squares(m=15, n=5):
    A, b, x = _regression(m, n)
    return cp.Problem(cp.Minimize(cp.norm(A @ x - b, 2) + 0.5 * cp.norm(x, 2))), [A, b], [x]


@prebuilt()
def cubic_regression(m=10, n=4):
    A, b, x = _regression(m, n)
    return cp.Problem(cp.Minimize(cp.pnorm(A @ x - b, 3) + 0.1 * cp.sum_squares(x))), [A, b], [x]


@prebuilt()
def monotone_fit(n=20):
    y, x = cp.Parameter(n), cp.Variable(n)
    return cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [x[1:] >= x[:-1], x >= 0]), [y], [x]


@prebuilt()
def total_variation(n=60):
    y, weight, x = cp.Parameter(n), cp.Parameter(nonneg=True), cp.Variable(n)
    return cp.Problem(cp.Minimize(cp.sum_squares(x - y) + weight * cp.tv(x))), [y, weight], [x]


@prebuilt()
def trend_filter(n=30):
    y, x = cp.Parameter(n), cp.Variable(n)
    cost = 0.5 * cp.sum_squares(y - x) + cp.norm1(cp.diff(x, 2))
    return cp.Problem(cp.Minimize(cost)), [y], [x]


def _noisy(draw, m, n):
    """A few coefficients seen through noise."""
    A, x = draw.normal(m, n), draw.normal(n, 1)
    return A, (A @ x).squeeze(-1) + draw.normal(m)


for _problem in (
    ridge_head,
    huber_regression,
    robust_least_squares,
    cubic_regression,
):
    _problem.sampled_by(_noisy)


def _classes(draw, m, n):
    """Two clouds of points, the labels in turn."""
    return draw.normal(m, n) + 0.5 * torch.as_tensor(_labels(m))[:, None]


svm_dual.sampled_by(
    lambda draw, m, n: (torch.as_tensor(_labels(m))[:, None] * _classes(draw, m, n),)
)
for _problem in (soft_margin_svm, logistic_regression):
    _problem.sampled_by(lambda draw, m, n: (_classes(draw, m, n),))


@multiclass_hinge.sampled_by
def _three_clouds(draw, m, n, classes):
    centres = torch.eye(classes, n, dtype=torch.float64)[torch.arange(m) % classes]
    return (draw.normal(m, n) + centres,)


lasso.sampled_by(lambda draw, m, n: (*_noisy(draw, m, n), draw.uniform(2, 8)))
elastic_net.sampled_by(
    lambda draw, m, n: (*_noisy(draw, m, n), draw.uniform(4, 16), draw.uniform(0.5, 2))
)
group_lasso.sampled_by(lambda draw, m, groups, n: _noisy(draw, m, groups * n))
quantile_regression.sampled_by(lambda draw, m, n, level: _noisy(draw, m, n))


@basis_pursuit_denoising.sampled_by
def _sensed(draw, m, n):
    A, b = _noisy(draw, m, n)
    return A, b, 0.2 * b.norm(dim=-1)


monotone_fit.sampled_by(
    lambda draw, n: (torch.linspace(-0.5, 2, n, dtype=torch.float64) + 0.5 * draw.normal(n),)
)
total_variation.sampled_by(lambda draw, n: (_steps(draw, n), draw.uniform(0.5, 2)))
trend_filter.sampled_by(lambda draw, n: (_steps(draw, n).cumsum(-1) / 4,))


def _steps(draw, n):
    """A signal of four levels in noise."""
    return draw.normal(4).repeat_interleave(n // 4 + 1, -1)[..., :n] + 0.3 * draw.normal(n)
