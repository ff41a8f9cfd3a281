"""What the laws compare with, written without convlayer: CVXPY's own cone program, cones by their
definitions, QP derivatives."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cvxpy as cp
import numpy as np
from cases import Case, Declared, set_values
from cvxpy.constraints import PowConeND
from cvxpy.reductions.solvers.conic_solvers.clarabel_conif import CLARABEL
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ConeProgram:
    """minimise 1/2 x'Px + q'x subject to Ax + s = b, s in the product of `blocks` (name, size,
    parameter), all dense."""

    P: np.ndarray
    q: np.ndarray
    A: np.ndarray
    b: np.ndarray
    blocks: list[tuple[str, int, Any]]


def cone_program(case: Case, declared: Declared, tensors: Sequence[Tensor]) -> ConeProgram:
    """What CVXPY itself hands to Clarabel for these values of the parameters."""
    set_values(declared, tensors)
    data, _, _ = cp.Problem(
        declared.problem.objective, declared.problem.constraints
    ).get_problem_data(ThreeDimensionalPowers(), gp=case.gp)
    dims, n = data["dims"], len(data["c"])
    blocks = [("zero", dims.zero, None), ("nonnegative", dims.nonneg, None)]
    blocks += [("second_order", size, None) for size in dims.soc]
    blocks += [("psd", k * (k + 1) // 2, k) for k in dims.psd]
    blocks += [("exponential", 3, None)] * dims.exp + [("power", 3, alpha) for alpha in dims.p3d]
    P = data["P"].toarray() if data.get("P") is not None else np.zeros((n, n))
    P = np.triu(P) + np.triu(P, 1).T
    A = data["A"].toarray() if data["A"] is not None else np.zeros((0, n))
    return ConeProgram(
        P, np.asarray(data["c"]), A, np.asarray(data["b"]), [b for b in blocks if b[1]]
    )


class ThreeDimensionalPowers(CLARABEL):
    """CVXPY's interface to Clarabel without generalised power cones, so that there is one form of
    each program."""

    SUPPORTED_CONSTRAINTS = [
        cone for cone in CLARABEL.SUPPORTED_CONSTRAINTS if cone is not PowConeND
    ]

    def name(self) -> str:
        return "ORACLE"


def solve_with_cvxpy(
    case: Case, declared: Declared, tensors: Sequence[Tensor]
) -> tuple[list[np.ndarray], float, float]:
    """Values of the outputs and of the objective, by CVXPY's own solve, and the tolerance that
    Clarabel reached."""
    set_values(declared, tensors)
    # With power cones Clarabel may stop short of 1e-8 too, by a last digit of the data: then by
    # shorter steps.
    for tolerance, step in ((1e-12, 0.99), (1e-10, 0.99), (1e-8, 0.99), (1e-8, 0.9), (1e-8, 0.8)):
        tight = {name: tolerance for name in ("tol_gap_abs", "tol_gap_rel", "tol_feas")} | {
            "max_step_fraction": step
        }
        with contextlib.suppress(cp.SolverError):
            value = declared.problem.solve(solver=cp.CLARABEL, gp=case.gp, **tight)
            if declared.problem.status == cp.OPTIMAL:
                break
    assert declared.problem.status == cp.OPTIMAL
    values = [
        out.value_sparse.toarray() if out.sparse_idx is not None else out.value
        for out in declared.outputs
    ]
    values = [np.asarray(v.toarray() if hasattr(v, "toarray") else v, dtype=float) for v in values]
    return (
        [v.reshape(out.shape) for v, out in zip(values, declared.outputs, strict=True)],
        float(value),
        tolerance,
    )


def smat(v: np.ndarray, n: int) -> np.ndarray:
    """The symmetric matrix whose upper triangle, column by column and off-diagonals times sqrt 2,
    is v."""
    X, k = np.zeros((n, n)), 0
    for j in range(n):
        for i in range(j + 1):
            X[i, j] = X[j, i] = v[k] / (1.0 if i == j else np.sqrt(2.0))
            k += 1
    return X


def outside(name: str, parameter: Any, s: np.ndarray, dual: bool) -> float:
    """How far s is outside the cone (or its dual), by the inequality that defines it; at most
    rounding inside."""
    if name == "zero":
        return 0.0 if dual else float(np.abs(s).max(initial=0.0))
    if name == "nonnegative":
        return float(-s.min(initial=0.0))
    if name == "second_order":
        return float(np.linalg.norm(s[1:]) - s[0])
    if name == "psd":
        return float(-np.linalg.eigvalsh(smat(s, parameter))[0])
    x, y, z = s
    if name == "exponential":
        if dual:  # -x exp(y/x) <= e z, x < 0
            return float(-x * np.exp(y / x - 1) - z) if x < 0 else max(x, -y, -z)
        return float(y * np.exp(x / y) - z) if y > 0 else max(x, -y, -z)
    if dual:
        x, y = x / parameter, y / (1 - parameter)
    return max(-x, -y, abs(z) - max(x, 0.0) ** parameter * max(y, 0.0) ** (1 - parameter))


def kkt_violation(program: ConeProgram, x: np.ndarray, s: np.ndarray, y: np.ndarray) -> float:
    """The largest violation of the optimality conditions, relative to the size of what is
    compared."""
    size_x, size_s, size_y = (1 + np.abs(v).max(initial=0.0) for v in (x, s, y))
    size_b, size_q = 1 + np.abs(program.b).max(initial=0.0), 1 + np.abs(program.q).max(initial=0.0)
    worst = [
        np.abs(program.P @ x + program.q + program.A.T @ y).max(initial=0.0)
        / (size_q * size_x * size_y),
        np.abs(program.A @ x + s - program.b).max(initial=0.0) / (size_b * size_x),
        abs(float(s @ y)) / (size_s * size_y),
    ]
    start = 0
    for name, size, parameter in program.blocks:
        part = slice(start, start + size)
        worst += [
            outside(name, parameter, s[part], False) / size_s,
            outside(name, parameter, y[part], True) / size_y,
        ]
        start += size
    return max(worst)


def qp_adjoint(
    P: np.ndarray,
    q: np.ndarray,
    G: np.ndarray,
    h: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    x_bar: np.ndarray,
    y_bar: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Cotangents of (P, q, G, h) of   minimise 1/2 x'Px + q'x  subject to  Gx <= h   by its active set, y its multipliers."""
    active = np.flatnonzero(y > h - G @ x)
    n, k = len(q), len(active)
    B = G[active]
    K = np.block([[P, B.T], [B, np.zeros((k, k))]])
    w = np.linalg.solve(K, np.concatenate([x_bar, y_bar[active]]))
    w, u = w[:n], w[n:]
    P_bar, G_bar, h_bar = -(np.outer(w, x) + np.outer(x, w)) / 2, np.zeros_like(G), np.zeros_like(h)
    G_bar[active] = -(np.outer(y[active], w) + np.outer(u, x))
    h_bar[active] = u
    return P_bar, -w, G_bar, h_bar
