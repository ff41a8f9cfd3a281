"""Safety filters, predictive control and robots."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import torch

from convlayer.problems import prebuilt


def _dot(a, x):
    return (a * x).sum(-1)


@prebuilt()
def cruise_control():
    wanted, a, b, u = cp.Parameter(), cp.Parameter(nonneg=True), cp.Parameter(), cp.Variable()
    limits = [a * u <= b, u >= -1, u <= 1]
    return cp.Problem(cp.Minimize(cp.square(u - wanted)), limits), [wanted, a, b], [u]


@prebuilt()
def barrier_filter(m=2):
    wanted, a, b, u = cp.Parameter(m), cp.Parameter(m), cp.Parameter(), cp.Variable(m)
    safe = [a @ u >= b, cp.abs(u) <= 1]
    return cp.Problem(cp.Minimize(cp.sum_squares(u - wanted)), safe), [wanted, a, b], [u]


@prebuilt()
def barrier_with_slack(m=2):
    wanted, a, b = cp.Parameter(m), cp.Parameter(m), cp.Parameter()
    v, w, u, slack = cp.Parameter(m), cp.Parameter(), cp.Variable(m), cp.Variable()
    limits = [a @ u >= b, v @ u + w <= slack, slack >= 0, u >= -1, u <= 1]
    cost = cp.sum_squares(u - wanted) + 20 * cp.square(slack)
    return cp.Problem(cp.Minimize(cost), limits), [wanted, a, b, v, w], [u, slack]


@prebuilt()
def predictive_control(states=3, inputs=1, horizon=10):
    A, B = cp.Parameter((states, states)), cp.Parameter((states, inputs))
    start, X = cp.Parameter(states), cp.Variable((states, horizon + 1))
    U = cp.Variable((inputs, horizon))
    moves = [X[:, 0] == start, X[:, 1:] == A @ X[:, :-1] + B @ U, cp.abs(U) <= 0.5]
    cost = cp.sum_squares(X) + 0.1 * cp.sum_squares(U)
    return cp.Problem(cp.Minimize(cost), moves), [A, B, start], [U]


@prebuilt()
def control_with_learned_weights(horizon=10, step=0.1):
    q, r, start, goal = cp.Parameter(2), cp.Parameter(1), cp.Parameter(2), cp.Parameter(2)
    x, u = cp.Variable((horizon + 1, 2)), cp.Variable((horizon, 1))
    A, B = np.array([[1, step], [0, 1]]), np.array([[step**2 / 2], [step]])
    cost, limits = 0, [x[0] == start]
    for t in range(horizon):
        cost += cp.sum_squares(cp.multiply(q, x[t + 1]) - goal) + cp.sum_squares(r @ u[t : t + 1])
        limits += [x[t + 1] == A @ x[t] + B @ u[t], cp.norm_inf(u[t]) <= 2, x[t + 1, 1] <= 1]
    return cp.Problem(cp.Minimize(cost), limits), [q, r, start, goal], [u]


@prebuilt()
def inverse_kinematics(n=7, m=6):
    J, velocity, low, high = (cp.Parameter(shape) for shape in ((m, n), m, n, n))
    dq = cp.Variable(n)
    cost = cp.sum_squares(J @ dq - velocity) + 0.01 * cp.sum_squares(dq)
    return cp.Problem(cp.Minimize(cost), [dq >= low, dq <= high]), [J, velocity, low, high], [dq]


@prebuilt()
def contact_forces(legs=4, friction=0.6):
    G, wrench, F = cp.Parameter((6, 3 * legs)), cp.Parameter(6), cp.Variable((3, legs))
    cost = cp.sum_squares(G @ cp.vec(F, order="F") - wrench) + 0.01 * cp.sum_squares(F)
    limits = [cp.norm(F[:2], axis=0) <= friction * F[2], F[2] <= 2]
    return cp.Problem(cp.Minimize(cost), limits), [G, wrench], [F]


@prebuilt()
def path_in_a_corridor(n=20):
    low, high, ends, p = cp.Parameter(n), cp.Parameter(n), cp.Parameter(2), cp.Variable(n)
    limits = [p >= low, p <= high, p[0] == ends[0], p[-1] == ends[1]]
    return cp.Problem(cp.Minimize(cp.sum_squares(cp.diff(p, 2))), limits), [low, high, ends], [p]


@prebuilt()
def powered_descent(horizon=6, step=0.5):
    place, speed, thrust_limit = cp.Parameter(2), cp.Parameter(2), cp.Parameter(nonneg=True)
    p, v = cp.Variable((horizon + 1, 2)), cp.Variable((horizon + 1, 2))
    f, gravity = cp.Variable((horizon, 2)), np.array([[0, 1.0]])
    moves = [p[1:] == p[:-1] + step * v[:-1], v[1:] == v[:-1] + step * (f - gravity)]
    ends = [p[0] == place, v[0] == speed, p[-1] == 0, v[-1] == 0]
    limits = [cp.norm(f, axis=1) <= thrust_limit]
    cost = cp.Minimize(cp.sum_squares(f))
    return cp.Problem(cost, moves + ends + limits), [place, speed, thrust_limit], [f]


cruise_control.sampled_by(lambda draw: (draw.normal(), draw.uniform(0.5, 2), draw.uniform(-0.4, 1)))


@barrier_filter.sampled_by
def _half_space(draw, m):
    a, inside = draw.normal(m), draw.uniform(-0.7, 0.7, m)
    return 1.5 * draw.normal(m), a, _dot(a, inside) - draw.uniform(0, 0.2)


barrier_with_slack.sampled_by(
    lambda draw, m: (*_half_space(draw, m), draw.normal(m), draw.uniform(-0.5, 1.5))
)


@predictive_control.sampled_by
def _systems(draw, states, inputs, horizon):
    A = torch.eye(states, dtype=torch.float64) + 0.1 * draw.normal(states, states)
    return A, 0.5 * draw.normal(states, inputs), draw.normal(states)


control_with_learned_weights.sampled_by(
    lambda draw, horizon, step: (
        draw.uniform(0.5, 2, 2),
        draw.uniform(0.1, 0.5, 1),
        draw.uniform(-0.8, 0.8, 2),
        draw.normal(2),
    )
)
inverse_kinematics.sampled_by(
    lambda draw, n, m: (
        draw.normal(m, n),
        draw.normal(m),
        -draw.uniform(0.2, 0.6, n),
        draw.uniform(0.2, 0.6, n),
    )
)
contact_forces.sampled_by(
    lambda draw, legs, friction: (draw.normal(6, 3 * legs), 2 * draw.normal(6))
)


@path_in_a_corridor.sampled_by
def _corridor(draw, n):
    middle = 0.3 * draw.normal(n).cumsum(-1)
    low, high = middle - draw.uniform(0.1, 0.6, n), middle + draw.uniform(0.1, 0.6, n)
    return low, high, middle[..., [0, -1]]


powered_descent.sampled_by(
    lambda draw, horizon, step: (
        torch.stack([draw.uniform(-1, 1), draw.uniform(1, 2)], -1),
        torch.stack([draw.uniform(-0.5, 0.5), draw.uniform(-1, -0.3)], -1),
        draw.uniform(2.5, 3),
    )
)
