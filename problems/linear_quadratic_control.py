"""Linear-quadratic control over a finite horizon."""

import cvxpy as cp
import numpy as np
import torch

from ._prebuilt import DeclaredProblem, prebuilt


@prebuilt()
def linear_quadratic_control(
    n_states: int = 3, n_inputs: int = 2, horizon: int = 4
) -> DeclaredProblem:
    """Linear-quadratic control over a finite horizon, T.

        minimise    sum_{t=0..T} |L'x_t|^2 + sum_{t=0..T-1} |N'u_t|^2
        subject to  x_0 = start,  x_{t+1} = A x_t + B u_t

    The weights are given by factors, Q = L L' and R = N N': one sum of squares then stands for all
    steps, and any factors will do.

    Solution:    u_t = -K_t x_t  with  K_t = inv(R + B'P_{t+1} B) B'P_{t+1} A,
                 P_T = Q  and  P_t = Q + A'P_{t+1} (A - B K_t).
    Derivative:  with the costates y_t = P_t x_t, one more such problem, affine, with the same gains:
                 dx_{t+1} = A dx_t + B du_t + dA x_t + dB u_t,  R du_t + B'dy_{t+1} + dR u_t + dB'y_{t+1} = 0,
                 dy_t = Q dx_t + A'dy_{t+1} + dQ x_t + dA'y_{t+1}.
    Shapes:      A (*batch, n_states, n_states), B (*batch, n_states, n_inputs), L (*batch, n_states, n_states),
                 N (*batch, n_inputs, n_inputs), start (*batch, n_states)
                 ->  x (*batch, horizon + 1, n_states), u (*batch, horizon, n_inputs).
    Cost:        linear in the horizon where it is long, by the sparse cone program; where it is
                 short, one dense factorisation, which serves the backward pass.
    At a kink:   none while N is invertible.
    Source:      Kalman (1960); Bertsekas (2017), section 3.1.
    """
    A, B = (
        cp.Parameter((n_states, n_states), name="A"),
        cp.Parameter((n_states, n_inputs), name="B"),
    )
    L, N = (
        cp.Parameter((n_states, n_states), name="L"),
        cp.Parameter((n_inputs, n_inputs), name="N"),
    )
    start = cp.Parameter(n_states, name="start")
    x, u = (
        cp.Variable((horizon + 1, n_states), name="x"),
        cp.Variable((horizon, n_inputs), name="u"),
    )
    cost = cp.sum_squares(x @ L) + cp.sum_squares(u @ N)
    return (
        cp.Problem(cp.Minimize(cost), [x[0] == start, x[1:] == x[:-1] @ A.T + u @ B.T]),
        [A, B, L, N, start],
        [x, u],
    )


@linear_quadratic_control.sampled_by
def _sample(draw, n_states, n_inputs, horizon):
    """Dynamics that grow by about a tenth a step if left alone, and weights near the identity."""
    A, B = 1.1 * draw.normal(n_states, n_states) / n_states**0.5, draw.normal(n_states, n_inputs)
    L, N = (
        torch.eye(n, dtype=torch.float64) + 0.3 * draw.normal(n, n) / n**0.5
        for n in (n_states, n_inputs)
    )
    return A, B, L, N, draw.normal(n_states)


@linear_quadratic_control.solved_by
def _oracle(A, B, L, N, start, *, horizon):
    """Riccati's recursion backwards, then the closed loop forwards."""
    Q, R = L @ L.T, N @ N.T
    gains, P = [], Q
    for _ in range(horizon):
        gains.append(np.linalg.solve(R + B.T @ P @ B, B.T @ P @ A))
        P = Q + A.T @ P @ (A - B @ gains[-1])
    states, inputs = [start], []
    for gain in reversed(gains):
        inputs.append(-gain @ states[-1])
        states.append(A @ states[-1] + B @ inputs[-1])
    return np.array(states), np.array(inputs)
