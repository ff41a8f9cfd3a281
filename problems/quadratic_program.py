"""Quadratic program."""

from itertools import chain, combinations

import cvxpy as cp
import numpy as np

from ._prebuilt import DeclaredProblem, prebuilt


@prebuilt()
def quadratic_program(n: int = 4, m: int = 5, p: int = 1) -> DeclaredProblem:
    """Quadratic program, with every coefficient a parameter.

        minimise    1/2 x'P x + q'x
        subject to  G x <= h,  A x = b

    Solution:    with a the set of active inequalities, B = [G_a; A] and c = (h_a, b):  P x + q + B'nu = 0,  B x = c.
    Derivative:  [P B'; B 0] (dx, dnu) = (-dP x - dq - dB' nu, dc - dB x);  nothing from the inactive rows of G and h.
    Shapes:      P (*batch, n, n) positive semidefinite, q (*batch, n), G (*batch, m, n), h (*batch, m),
                 A (*batch, p, n), b (*batch, p)  ->  x (*batch, n).
    Cost:        an interior point method, some 10 factorisations of about (n + m + p)^3 / 3 flops;
                 one more backward.
    At a kink:   where an active inequality has multiplier 0, the derivative is one-sided and the
                 row is flagged.
    Source:      Amos and Kolter (2017), OptNet.
    """
    P, q = cp.Parameter((n, n), PSD=True, name="P"), cp.Parameter(n, name="q")
    G, h = cp.Parameter((m, n), name="G"), cp.Parameter(m, name="h")
    A, b, x = cp.Parameter((p, n), name="A"), cp.Parameter(p, name="b"), cp.Variable(n, name="x")
    problem = cp.Problem(cp.Minimize(0.5 * cp.quad_form(x, P) + q @ x), [G @ x <= h, A @ x == b])
    return problem, [P, q, G, h, A, b], [x]


@quadratic_program.sampled_by
def _sample(draw, n, m, p):
    """Feasible with room at a random point, and with a minimiser that the inequalities usually cut
    off."""
    inside, G, A = draw.normal(n, 1), draw.normal(m, n), draw.normal(p, n)
    h, b = (G @ inside).squeeze(-1) + draw.uniform(0.1, 1.0, m), (A @ inside).squeeze(-1)
    return draw.positive_definite(n), 3 * draw.normal(n), G, h, A, b


@quadratic_program.solved_by
def _oracle(P, q, G, h, A, b):
    """The best feasible point over all active sets: the solution is one of them, and nothing
    feasible beats it."""
    n, m, p = len(q), len(h), len(b)
    best, lowest = np.full(n, np.nan), np.inf
    for active in map(
        list, chain.from_iterable(combinations(range(m), k) for k in range(n - p + 1))
    ):
        B, c = np.vstack([G[active], A]), np.concatenate([h[active], b])
        K = np.block([[P, B.T], [B, np.zeros((len(c), len(c)))]])
        x = np.linalg.solve(K, np.concatenate([-q, c]))[:n]
        value = x @ P @ x / 2 + q @ x
        if value < lowest and np.all(G @ x <= h + 1e-10):
            best, lowest = x, value
    return best
