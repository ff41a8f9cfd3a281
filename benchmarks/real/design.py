"""Geometry, matrices, distributions and geometric programs."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import torch

from convlayer.problems import prebuilt


@prebuilt()
def enclosing_ball(m=8, n=3):
    points, centre, radius = cp.Parameter((m, n)), cp.Variable((1, n)), cp.Variable()
    away = cp.norm(points - np.ones((m, 1)) @ centre, 2, axis=1)
    return cp.Problem(cp.Minimize(radius), [away <= radius]), [points], [centre, radius]


@prebuilt()
def chebyshev_centre(m=12, n=3):
    A, lengths, b = cp.Parameter((m, n)), cp.Parameter(m), cp.Parameter(m)
    x, radius = cp.Variable(n), cp.Variable()
    problem = cp.Problem(cp.Maximize(radius), [A @ x + lengths * radius <= b, radius >= 0])
    return problem, [A, lengths, b], [x, radius]


@prebuilt()
def geometric_median(m=7, n=2):
    points, x = cp.Parameter((m, n)), cp.Variable(n)
    return cp.Problem(cp.Minimize(sum(cp.norm(points[i] - x) for i in range(m)))), [points], [x]


@prebuilt()
def quadratic_budget(n=6):
    gain, root, x = cp.Parameter(n), cp.Parameter((n, n)), cp.Variable(n)
    problem = cp.Problem(cp.Maximize(gain @ x), [cp.sum_squares(root @ x) <= 1, x >= -0.3])
    return problem, [gain, root], [x]


@prebuilt(gp=True)
def box_design():
    h, w, d = (cp.Variable(pos=True) for _ in range(3))
    wall, floor, low, high = (cp.Parameter(pos=True) for _ in range(4))
    limits = [2 * (h * w + h * d) <= wall, w * d <= floor]
    limits += [low <= h / w, h / w <= high, low <= d / w, d / w <= high]
    return cp.Problem(cp.Maximize(h * w * d), limits), [wall, floor, low, high], [h, w, d]


@prebuilt(gp=True)
def power_control(n=4, ratio=2.0):
    G, noise, p = (
        cp.Parameter((n, n), pos=True),
        cp.Parameter(n, pos=True),
        cp.Variable(n, pos=True),
    )
    limits = [p >= 0.1]
    for i in range(n):
        others = sum(G[i, j] * p[j] for j in range(n) if j != i)
        limits.append(ratio * (noise[i] + others) / (G[i, i] * p[i]) <= 1)
    return cp.Problem(cp.Minimize(cp.sum(p)), limits), [G, noise], [p]


@prebuilt(gp=True)
def floor_plan(n=4):
    area, slim = cp.Parameter(n, pos=True), cp.Parameter(pos=True)
    w, h, W, H = (cp.Variable(shape, pos=True) for shape in (n, n, (), ()))
    limits = [w[0] + w[1] <= W, w[2] + w[3] <= W, h[0] + h[2] <= H, h[1] + h[3] <= H]
    for i in range(n):
        limits += [w[i] * h[i] == area[i], h[i] / w[i] <= slim, w[i] / h[i] <= slim]
    return cp.Problem(cp.Minimize(W * H * cp.sqrt(W + H)), limits), [area, slim], [W, H]


@prebuilt()
def nearest_correlation(n=4):
    C, X = cp.Parameter((n, n), symmetric=True), cp.Variable((n, n), PSD=True)
    return cp.Problem(cp.Minimize(cp.sum_squares(X - C)), [cp.diag(X) == 1]), [C], [X]


@prebuilt()
def low_rank_denoising(m=4, n=3):
    C, weight, X = cp.Parameter((m, n)), cp.Parameter(nonneg=True), cp.Variable((m, n))
    cost = 0.5 * cp.sum_squares(X - C) + weight * cp.normNuc(X)
    return cp.Problem(cp.Minimize(cost)), [C, weight], [X]


@prebuilt()
def graphical_lasso(n=4):
    S, X = cp.Parameter((n, n), symmetric=True), cp.Variable((n, n), PSD=True)
    gain = cp.log_det(X) - cp.trace(S @ X) - 0.1 * cp.sum(cp.abs(X))
    return cp.Problem(cp.Maximize(gain)), [S], [X]


@prebuilt()
def maximum_entropy(n=20):
    moments, p, x = cp.Parameter(2), cp.Variable(n), np.linspace(-1, 1, n)
    limits = [cp.sum(p) == 1, np.stack([x, x**2]) @ p == moments]
    return cp.Problem(cp.Maximize(cp.sum(cp.entr(p))), limits), [moments], [p]


@prebuilt()
def linear_fractional(n=4, m=6):
    c, e, A, b = cp.Parameter(n), cp.Parameter(n), cp.Parameter((m, n)), cp.Parameter(m)
    y, t = cp.Variable(n), cp.Variable()  # x = y / t by Charnes and Cooper
    limits = [A @ y <= t * b, e @ y + t == 1, t >= 0, y >= 0]
    cost = c @ y + 0.1 * cp.sum_squares(y)
    return cp.Problem(cp.Minimize(cost), limits), [c, e, A, b], [y, t]


@prebuilt()
def log_sum_exp_in_a_box(m=8, n=5):
    A, b, x = cp.Parameter((m, n)), cp.Parameter(m), cp.Variable(n)
    problem = cp.Problem(cp.Minimize(cp.log_sum_exp(A @ x + b)), [x >= -0.5, x <= 0.5])
    return problem, [A, b], [x]


enclosing_ball.sampled_by(lambda draw, m, n: (draw.normal(m, n),))
geometric_median.sampled_by(lambda draw, m, n: (draw.normal(m, n),))
box_design.sampled_by(
    lambda draw: (
        draw.uniform(20, 40),
        draw.uniform(5, 15),
        draw.uniform(0.4, 0.6),
        draw.uniform(1.8, 2.5),
    )
)
floor_plan.sampled_by(lambda draw, n: (draw.uniform(0.5, 2, n), draw.uniform(1.5, 3)))
low_rank_denoising.sampled_by(lambda draw, m, n: (draw.normal(m, n), draw.uniform(0.5, 1.2)))
log_sum_exp_in_a_box.sampled_by(lambda draw, m, n: (draw.normal(m, n), draw.normal(m)))
quadratic_budget.sampled_by(
    lambda draw, n: (
        draw.normal(n),
        torch.eye(n, dtype=torch.float64) + 0.5 * draw.normal(n, n) / n**0.5,
    )
)


@chebyshev_centre.sampled_by
def _walls(draw, m, n):
    A = draw.normal(m, n)
    return A, A.norm(dim=-1), draw.uniform(0.5, 2, m)


@power_control.sampled_by
def _gains(draw, n, ratio):
    own = draw.uniform(0.8, 1.5, n)
    return draw.uniform(0.02, 0.1, n, n) + torch.diag_embed(own), draw.uniform(0.1, 0.4, n)


@nearest_correlation.sampled_by
def _symmetric(draw, n):
    C = draw.normal(n, n)
    return ((C + C.mT) / 2,)


graphical_lasso.sampled_by(lambda draw, n: (draw.positive_definite(n),))


@maximum_entropy.sampled_by
def _moments(draw, n):
    p, x = torch.softmax(draw.normal(n), -1), torch.linspace(-1, 1, n, dtype=torch.float64)
    return (torch.stack([(p * x).sum(-1), (p * x**2).sum(-1)], -1),)


@linear_fractional.sampled_by
def _polytope(draw, n, m):
    c, e = draw.uniform(-2, 1, n), draw.uniform(0.1, 1, n)
    return c, e, draw.uniform(0.1, 1, m, n), draw.uniform(1, 2, m)
