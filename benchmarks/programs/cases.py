"""The programs that are measured: declarations, strictly feasible samples, and solutions to
rounding error that are not ours."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from benchmarks.programs.exact import quadratic_solution
from convlayer.problems import PROBLEMS, Declared, Prebuilt, prebuilt

ROOM = (0.1, 1.0)  # slack of the inequalities at the point from which the data are made
ACTIVE = 1e-5  # multiplier above which a cone is active
NEWTON_STEPS = 8
LIMIT, EFFORT = 0.5, 0.2  # of the inputs of a controlled system
Variables = tuple[Tensor, ...]


@prebuilt()
def dense_program(n: int = 6, m: int = 6, p: int = 2):
    """minimise 1/2 x'Px + q'x  subject to  Gx <= h, Ax = b (where p is not 0), everything a Parameter."""
    P, q = cp.Parameter((n, n), PSD=True, name="P"), cp.Parameter(n, name="q")
    return _program(cp.Variable(n, name="x"), [P, q], cp.quad_form, m, p)


@dense_program.sampled_by
def _feasible(draw, n, m, p):
    inside, G, A = draw.normal(n, 1), draw.normal(m, n), draw.normal(p, n)
    h, b = (G @ inside).squeeze(-1) + draw.uniform(*ROOM, m), (A @ inside).squeeze(-1)
    data = draw.positive_definite(n), 3 * draw.normal(n), G, h, A, b
    return data if p else data[:4]


@dense_program.solved_by
def _exact(P, q, G, h, A, b):
    return quadratic_solution(P, q, G, h, A, b)


@prebuilt()
def factored_program(n: int = 6, m: int = 6, p: int = 2):
    """The same with |L x|^2 / 2 for x'Px / 2, P = L'L: for peers, which take no quad_form of a
    Parameter."""
    L, q = cp.Parameter((n, n), name="L"), cp.Parameter(n, name="q")
    return _program(cp.Variable(n, name="x"), [L, q], lambda x, L: cp.sum_squares(L @ x), m, p)


@factored_program.sampled_by
def _factored(draw, n, m, p):
    P, *rest = _feasible(draw, n, m, p)
    return factor(P), *rest


@factored_program.solved_by
def _exact_factored(L, *rest):
    return quadratic_solution(L.T @ L, *rest)


def _program(x, objective, square, m, p):
    first, q = objective
    G, h = cp.Parameter((m, x.size), name="G"), cp.Parameter(m, name="h")
    constraints, parameters = [G @ x <= h], [*objective, G, h]
    if p:
        A, b = cp.Parameter((p, x.size), name="A"), cp.Parameter(p, name="b")
        constraints, parameters = [*constraints, A @ x == b], [*parameters, A, b]
    return cp.Problem(cp.Minimize(square(x, first) / 2 + q @ x), constraints), parameters, [x]


def factor(P: Tensor) -> Tensor:
    """L with P = L'L"""
    return torch.linalg.cholesky(P).mT.contiguous()


@prebuilt()
def second_order_program(n: int = 4, cones: int = 2, size: int = 3):
    """minimise 1/2 |x|^2 + q'x  subject to  |F_i x + g_i| <= d_i'x + e_i  for each cone, of `size` rows together."""
    k = size - 1
    q, F, g = (
        cp.Parameter(n, name="q"),
        cp.Parameter((cones * k, n), name="F"),
        cp.Parameter(cones * k, name="g"),
    )
    D, e, x = (
        cp.Parameter((cones, n), name="D"),
        cp.Parameter(cones, name="e"),
        cp.Variable(n, name="x"),
    )
    norms = cp.norm(cp.reshape(F @ x + g, (cones, k), order="C"), 2, axis=1)
    return (
        cp.Problem(cp.Minimize(cp.sum_squares(x) / 2 + q @ x), [norms <= D @ x + e]),
        [q, F, g, D, e],
        [x],
    )


@second_order_program.sampled_by
def _inside_the_cones(draw, n, cones, size):
    inside, F, g = (
        draw.normal(n, 1),
        draw.normal(cones * (size - 1), n),
        draw.normal(cones * (size - 1)),
    )
    D = 0.3 * draw.normal(cones, n)
    norms = ((F @ inside).squeeze(-1) + g).unflatten(-1, (cones, size - 1)).norm(dim=-1)
    return (
        3 * draw.normal(n),
        F,
        g,
        D,
        norms - (D @ inside).squeeze(-1) + draw.uniform(*ROOM, cones),
    )


@second_order_program.solved_by
def _by_active_cones(q, F, g, D, e):
    """Clarabel says which cones are active; Newton's method on the optimality conditions of those
    does the rest."""
    cones, n = D.shape
    F, g = F.reshape(cones, -1, n), g.reshape(cones, -1)
    x = cp.Variable(n)
    limits = [cp.norm(F[i] @ x + g[i]) <= D[i] @ x + e[i] for i in range(cones)]
    cp.Problem(cp.Minimize(cp.sum_squares(x) / 2 + q @ x), limits).solve(cp.CLARABEL)
    active = [i for i in range(cones) if limits[i].dual_value > ACTIVE]
    x, multipliers = x.value, np.array([limits[i].dual_value for i in active])
    for _ in range(NEWTON_STEPS):
        lengths = np.array([np.linalg.norm(F[i] @ x + g[i]) for i in active])
        units = [(F[i] @ x + g[i]) / length for i, length in zip(active, lengths)]
        B = np.array([F[i].T @ u - D[i] for i, u in zip(active, units)]).reshape(-1, n)
        H = np.eye(n)
        for i, u, length, multiplier in zip(active, units, lengths, multipliers):
            H += multiplier / length * F[i].T @ (np.eye(len(u)) - np.outer(u, u)) @ F[i]
        value = np.append(
            x + q + B.T @ multipliers, [v - D[i] @ x - e[i] for i, v in zip(active, lengths)]
        )
        K = np.block([[H, B.T], [B, np.zeros((len(B), len(B)))]])
        step = np.linalg.solve(K, -value)
        x, multipliers = x + step[:n], multipliers + step[n:]
    return x


@prebuilt()
def constrained_control(states: int = 4, inputs: int = 2, horizon: int = 5):
    """minimise the squares of all states, and 0.2 times those of the inputs, which are at most 1/2
    in size."""
    A, B = cp.Parameter((states, states), name="A"), cp.Parameter((states, inputs), name="B")
    start, X = cp.Parameter(states, name="start"), cp.Variable((states, horizon + 1), name="X")
    U = cp.Variable((inputs, horizon), name="U")
    moves = [X[:, 0] == start, X[:, 1:] == A @ X[:, :-1] + B @ U, cp.abs(U) <= LIMIT]
    return (
        cp.Problem(cp.Minimize(cp.sum_squares(X) + EFFORT * cp.sum_squares(U)), moves),
        [A, B, start],
        [U],
    )


@constrained_control.sampled_by
def _systems(draw, states, inputs, horizon):
    A = torch.eye(states, dtype=torch.float64) + 0.1 * draw.normal(states, states)
    return A, 0.5 * draw.normal(states, inputs), draw.normal(states)


@constrained_control.solved_by
def _condensed(A, B, start, *, horizon):
    """The states are S u + T start: a program in the inputs alone."""
    states, inputs = B.shape
    T = np.vstack([np.linalg.matrix_power(A, t) for t in range(horizon + 1)])
    S = np.zeros(((horizon + 1) * states, horizon * inputs))
    for t in range(1, horizon + 1):
        for k in range(t):
            S[t * states : (t + 1) * states, k * inputs : (k + 1) * inputs] = (
                np.linalg.matrix_power(A, t - 1 - k) @ B
            )
    P, q = 2 * S.T @ S + 2 * EFFORT * np.eye(S.shape[1]), 2 * S.T @ T @ start
    box, none = np.vstack([np.eye(len(q)), -np.eye(len(q))]), np.zeros((0, len(q)))
    u = quadratic_solution(P, q, box, np.full(2 * len(q), LIMIT), none, np.zeros(0))
    return u.reshape(horizon, inputs).T


CASES: dict[str, Prebuilt] = {
    case.name: case
    for case in (
        *PROBLEMS.values(),
        dense_program,
        factored_program,
        second_order_program,
        constrained_control,
    )
}


def for_peers(name: str, sizes: tuple[int, ...], data: Variables) -> tuple[Declared, Variables]:
    """Declaration and data as cvxpylayers takes them: with a factor of P."""
    if name != "dense_program":
        return CASES[name](*sizes), data
    return factored_program(*sizes), (factor(data[0].cpu()).to(data[0]), *data[1:])
