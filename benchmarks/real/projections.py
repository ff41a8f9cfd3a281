"""Projections, and the soft choices that networks are given as activations."""

from __future__ import annotations

import cvxpy as cp
import numpy as np

from convlayer.problems import prebuilt


def _nearest(x, y):
    return cp.Minimize(cp.sum_squares(x - y))


@prebuilt()
def capped_simplex(n=20, cap=0.2):
    y, x = cp.Parameter(n), cp.Variable(n)
    return cp.Problem(_nearest(x, y), [cp.sum(x) == 1, x >= 0, x <= cap]), [y], [x]


@prebuilt()
def l1_ball(n=15):
    y, radius, x = cp.Parameter(n), cp.Parameter(nonneg=True), cp.Variable(n)
    return cp.Problem(_nearest(x, y), [cp.norm1(x) <= radius]), [y, radius], [x]


@prebuilt()
def l2_ball(n=10):
    y, x = cp.Parameter(n), cp.Variable(n)
    return cp.Problem(_nearest(x, y), [cp.norm(x, 2) <= 1]), [y], [x]


@prebuilt()
def box_and_half_space(n=10):
    y, a, b, x = cp.Parameter(n), cp.Parameter(n), cp.Parameter(), cp.Variable(n)
    return cp.Problem(_nearest(x, y), [a @ x <= b, x >= 0, x <= 1]), [y, a, b], [x]


@prebuilt()
def polytope(n=5, m=10):
    y, G, h, x = cp.Parameter(n), cp.Parameter((m, n)), cp.Parameter(m), cp.Variable(n)
    return cp.Problem(_nearest(x, y), [G @ x <= h]), [y, G, h], [x]


@prebuilt()
def second_order_cone(n=6):
    y, s, x, t = cp.Parameter(n), cp.Parameter(), cp.Variable(n), cp.Variable()
    cost = cp.sum_squares(x - y) + cp.square(t - s)
    return cp.Problem(cp.Minimize(cost), [cp.norm(x) <= t]), [y, s], [x, t]


@prebuilt()
def psd_cone(n=5):
    C, X = cp.Parameter((n, n), symmetric=True), cp.Variable((n, n), symmetric=True)
    return cp.Problem(_nearest(X, C), [X >> 0]), [C], [X]


@prebuilt()
def sparsemax(n=10):
    y, x = cp.Parameter(n), cp.Variable(n)
    return cp.Problem(_nearest(x, y), [cp.sum(x) == 1, x >= 0]), [y], [x]


@prebuilt()
def capped_softmax(n=10, cap=0.3):
    y, x = cp.Parameter(n), cp.Variable(n)
    gain = y @ x + cp.sum(cp.entr(x))
    return cp.Problem(cp.Maximize(gain), [cp.sum(x) == 1, x <= cap]), [y], [x]


@prebuilt()
def soft_top_k(n=10, k=3):
    y, x = cp.Parameter(n), cp.Variable(n)
    gain = y @ x + cp.sum(cp.entr(x) + cp.entr(1 - x))
    return cp.Problem(cp.Maximize(gain), [cp.sum(x) == k]), [y], [x]


@prebuilt()
def soft_ranks(n=6):
    y, P, ranks = cp.Parameter(n), cp.Variable((n, n)), np.arange(1, n + 1)
    cost = cp.Minimize(-(ranks @ (P @ y)) + 0.5 * cp.sum_squares(P))
    return cp.Problem(cost, [cp.sum(P, axis=0) == 1, cp.sum(P, axis=1) == 1, P >= 0]), [y], [P]


for _problem, _scale in (
    (capped_simplex, 0.2),
    (l2_ball, 1.0),
    (sparsemax, 1.0),
    (capped_softmax, 2.0),
    (soft_top_k, 2.0),
    (soft_ranks, 1.0),
):
    _problem.sampled_by(lambda draw, n, *rest, scale=_scale: (scale * draw.normal(n),))

l1_ball.sampled_by(lambda draw, n: (draw.normal(n), draw.uniform(1, 3)))
second_order_cone.sampled_by(lambda draw, n: (draw.normal(n), draw.normal()))


@box_and_half_space.sampled_by
def _cut(draw, n):
    a, inside = draw.normal(n), draw.uniform(0.2, 0.8, n)
    return 0.5 + draw.normal(n), a, (a * inside).sum(-1)


@polytope.sampled_by
def _facets(draw, n, m):
    G, inside = draw.normal(m, n), draw.normal(n, 1)
    return 2 * draw.normal(n), G, (G @ inside).squeeze(-1) + draw.uniform(0.1, 1, m)


@psd_cone.sampled_by
def _symmetric(draw, n):
    C = draw.normal(n, n)
    return ((C + C.mT) / 2,)
