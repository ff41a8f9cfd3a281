"""Gradients of ill-conditioned quadratic programs against the exact derivative of their active set.

    minimise 1/2 x'P x + q'x  subject to  G x <= h,     P = Q diag(1 .. 1/cond) Q',  n = 20

Built backwards from a solution with five constraints strictly active and fifteen strictly inactive:
the active set a is known and

    K (dx, dy) = (-dP x - dq - dG_a'y, dh_a - dG_a x),    K = [P G_a'; G_a 0]

is solved in NumPy with residuals in extended precision. The peer takes no quad_form of a parameter:
it is given |L'x|^2 / 2 with P = L L', and so are we in the columns `factor`. Error: |g - g*| / |g*|
over all parameters, of w'x for a random w.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from benchmarks.peer import MISSING, peer_layer
from benchmarks.table import Family, Options, Row
from convlayer import ConvexLayer
from convlayer.problems import Declared

N, ACTIVE, CONSTRAINTS, ROWS = 20, 5, 20, 8


def family(options: Options) -> Family:
    powers = (0, 4) if options.quick else range(7)
    return Family(
        "conditioning",
        "Error of the gradient of quadratic programs by cond(P): eight instances each.",
        [(f"cond 1e{power}", lambda power=power: [measure(power, options)]) for power in powers],
    )


def measure(power: int, options: Options) -> Row:
    instances = [instance(10.0**power, seed) for seed in range(ROWS)]
    row = Row(f"cond 1e{power}", wanted={"worst": ("<=", 1e-6), "factor, worst": ("<=", 1e-6)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, declared, factor in (
            ("", declare(factor=False), False),
            ("factor, ", declare(factor=True), True),
        ):
            ours = ConvexLayer(declared.problem, declared.parameters, declared.variables)
            solution, gradient = errors(ours, instances, factor, options.device)
            row.figures |= {
                f"{name}solution": max(solution),
                f"{name}median": statistics.median(gradient),
                f"{name}worst": max(gradient),
            }
        peer = peer_layer(declare(factor=True))
        if peer is None:
            row.figures["peer median"] = MISSING
        else:
            solution, gradient = errors(peer, instances, True, torch.device("cpu"))
            row.figures |= {
                "peer solution": max(solution),
                "peer median": statistics.median(gradient),
                "peer worst": max(gradient),
            }
    return row


def declare(factor: bool) -> Declared:
    P = cp.Parameter((N, N), name="L") if factor else cp.Parameter((N, N), PSD=True, name="P")
    q, G, h = (
        cp.Parameter(N, name="q"),
        cp.Parameter((CONSTRAINTS, N), name="G"),
        cp.Parameter(CONSTRAINTS, name="h"),
    )
    x = cp.Variable(N, name="x")
    cost = cp.sum_squares(P.T @ x) / 2 if factor else cp.quad_form(x, P) / 2
    return Declared(
        "quadratic program", cp.Problem(cp.Minimize(cost + q @ x), [G @ x <= h]), (P, q, G, h), (x,)
    )


def instance(condition: float, seed: int) -> dict[str, np.ndarray]:
    """The data of one program, its solution x, the weights w and the exact gradient of w'x."""
    random = np.random.default_rng(seed)
    Q, _ = np.linalg.qr(random.standard_normal((N, N)))
    L = Q * np.sqrt(np.logspace(0, -np.log10(condition), N))
    P = L @ L.T
    P = (P + P.T) / 2
    G, w = random.standard_normal((CONSTRAINTS, N)), random.standard_normal(N)
    x, multipliers = random.standard_normal(N), random.uniform(0.5, 2, ACTIVE)
    q = -P @ x - G[:ACTIVE].T @ multipliers
    h = G @ x + np.where(np.arange(CONSTRAINTS) < ACTIVE, 0, random.uniform(0.5, 2, CONSTRAINTS))
    K = np.block([[P, G[:ACTIVE].T], [G[:ACTIVE], np.zeros((ACTIVE, ACTIVE))]])
    # The solution of the data as rounded, then its adjoint.
    z = extended_solve(K, np.concatenate([-q, h[:ACTIVE]]))
    u = extended_solve(K, np.concatenate([w, np.zeros(ACTIVE)]))
    (x, y), (u, v) = np.split(z, [N]), np.split(u, [N])
    P_bar, G_bar, h_bar = (
        -(np.outer(u, x) + np.outer(x, u)) / 2,
        np.zeros_like(G),
        np.zeros(CONSTRAINTS),
    )
    G_bar[:ACTIVE], h_bar[:ACTIVE] = -np.outer(y, u) - np.outer(v, x), v
    return {
        "P": P,
        "L": L,
        "q": q,
        "G": G,
        "h": h,
        "x": x,
        "w": w,
        "P_bar": P_bar,
        "L_bar": 2 * P_bar @ L,
        "q_bar": -u,
        "G_bar": G_bar,
        "h_bar": h_bar,
    }


def extended_solve(K: np.ndarray, right: np.ndarray) -> np.ndarray:
    """K^-1 right to the last bits: refinement with residuals in long double."""
    K, right = K.astype(np.longdouble), right.astype(np.longdouble)
    inverse, solution = np.linalg.inv(K.astype(float)), np.zeros_like(right)
    for _ in range(10):
        solution = solution + inverse @ (right - K @ solution).astype(float)
    return solution.astype(float)


def errors(
    layer: Callable[..., tuple[Tensor, ...]],
    instances: list[dict[str, np.ndarray]],
    factor: bool,
    device: torch.device,
) -> tuple[list[float], list[float]]:
    """Relative errors of x and of the gradient, a row each."""

    def stacked(name: str) -> Tensor:
        return torch.from_numpy(np.stack([data[name] for data in instances])).to(device)

    names = ("L" if factor else "P", "q", "G", "h")
    leaves = [stacked(name).requires_grad_() for name in names]
    (x,) = layer(*leaves)
    gradients = torch.cat([g.flatten(1) for g in torch.autograd.grad(x, leaves, stacked("w"))], 1)
    exact = torch.cat([stacked(f"{name}_bar").flatten(1) for name in names], 1)
    return _relative(x.detach(), stacked("x")), _relative(gradients, exact)


def _relative(got: Tensor, exact: Tensor) -> list[float]:
    return ((got - exact).norm(dim=1) / exact.norm(dim=1)).tolist()
