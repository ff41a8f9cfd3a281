"""Quadratic program with equality constraints alone."""

import cvxpy as cp
import numpy as np

from ._prebuilt import DeclaredProblem, prebuilt


@prebuilt()
def equality_constrained_qp(n: int = 5, p: int = 2) -> DeclaredProblem:
    """Quadratic program with equality constraints alone.

        minimise    1/2 x'P x + q'x
        subject to  A x = b

    Solution:    K (x, nu) = (-q, b)  with the KKT matrix  K = [P A'; A 0].
    Derivative:  K (dx, dnu) = (-dP x - dq - dA' nu, db - dA x).
    Shapes:      P (*batch, n, n) positive semidefinite, q (*batch, n), A (*batch, p, n), b (*batch, p)
                 ->  x (*batch, n).
    Cost:        one factorisation of K, about (n + p)^3 / 3 flops; it serves the backward pass.
    At a kink:   none while A has full row rank and P is positive definite on its null space.
    Source:      Boyd and Vandenberghe (2004), section 10.1.
    """
    P, q = cp.Parameter((n, n), PSD=True, name="P"), cp.Parameter(n, name="q")
    A, b, x = cp.Parameter((p, n), name="A"), cp.Parameter(p, name="b"), cp.Variable(n, name="x")
    return (
        cp.Problem(cp.Minimize(0.5 * cp.quad_form(x, P) + q @ x), [A @ x == b]),
        [P, q, A, b],
        [x],
    )


@equality_constrained_qp.sampled_by
def _sample(draw, n, p):
    return draw.positive_definite(n), draw.normal(n), draw.normal(p, n), draw.normal(p)


@equality_constrained_qp.solved_by
def _oracle(P, q, A, b):
    p, n = A.shape
    return np.linalg.solve(np.block([[P, A.T], [A, np.zeros((p, p))]]), np.concatenate([-q, b]))[:n]
