"""The KKT residual of a canonical point, recomputed from CVXPY's own matrices without any of our
code.

minimise 1/2 x'Px + q'x  subject to  Ax + s = b, s in K:   Px + q + A'y = 0,  s in K,  y in K*,  s'y = 0
"""

from __future__ import annotations

import cvxpy as cp
import numpy as np

from convlayer.problems import Declared


def kkt_residual(
    declared: Declared, values: list[np.ndarray], x: np.ndarray, s: np.ndarray, y: np.ndarray
) -> float:
    """The largest violation, each relative to the terms it is a sum of."""
    for parameter, value in zip(declared.parameters, values, strict=True):
        parameter.value = value
    gp = not declared.problem.is_dcp()
    data, _, _ = declared.problem.get_problem_data(
        cp.CLARABEL, gp=gp, solver_opts={"use_quad_obj": True}
    )
    q, A, b = data["c"], data["A"], data["b"]
    P = data.get("P")
    Px, Ay = (P @ x if P is not None else np.zeros_like(x)), A.T @ y
    # Where every multiplier is zero, so are all these terms, to rounding: the objective's own size
    # keeps noise from noise.
    natural = (
        np.array([1e-8 * abs(P).max() * np.abs(x).max()])
        if P is not None and P.nnz
        else np.zeros(1)
    )
    stationarity = _size(Px + q + Ay) / _scale(Px, q, abs(A.T) @ abs(y), natural)
    feasibility = _size(A @ x + s - b) / _scale(abs(A) @ abs(x), s, b)
    complementarity = abs(s @ y) / _scale(
        np.abs(s) @ np.abs(y), np.linalg.norm(s) * np.linalg.norm(y)
    )
    return max(
        stationarity,
        feasibility,
        complementarity,
        _outside(data["dims"], s, False),
        _outside(data["dims"], y, True),
    )


def _outside(dims, v: np.ndarray, dual: bool) -> float:
    """How far v is outside the cone (its dual), relative to |v|."""
    if dims.zero + dims.nonneg + sum(dims.soc) + sum(k * (k + 1) // 2 for k in dims.psd) + 3 * (
        dims.exp + len(dims.p3d)
    ) != len(v):
        raise ValueError("CVXPY's cones have another size than the point")
    parts, start = [0.0], 0

    def take(size: int) -> np.ndarray:
        nonlocal start
        start += size
        return v[start - size : start]

    zero = take(dims.zero)
    parts += [] if dual else list(np.abs(zero))
    parts += list(-take(dims.nonneg))
    for block in map(take, dims.soc):
        parts.append(np.linalg.norm(block[1:]) - block[0])
    parts += [-np.linalg.eigvalsh(_matrix(take(k * (k + 1) // 2), k))[0] for k in dims.psd]
    parts += [_exponential(take(3), dual) for _ in range(dims.exp)]
    parts += [_power(take(3), float(a), dual) for a in dims.p3d]
    return max(parts) / _scale(v)


def _matrix(svec: np.ndarray, k: int) -> np.ndarray:
    """Upper triangle by columns, off-diagonals times sqrt 2."""
    X = np.zeros((k, k))
    columns, rows = np.tril_indices(k)
    X[rows, columns] = X[columns, rows] = np.where(rows == columns, svec, svec / np.sqrt(2))
    return X


def _exponential(v: np.ndarray, dual: bool) -> float:
    """K: y exp(x/y) <= z;  K*: -u exp(v/u) <= e w."""
    x, y, z = v
    if dual:
        return max(-y, -z) if x >= 0 else -x * np.exp(y / x - 1) - z
    return max(x, -z) if y <= 0 else y * np.exp(x / y) - z


def _power(v: np.ndarray, a: float, dual: bool) -> float:
    """K: |z| <= x^a y^(1-a);  K*: the same of (x/a, y/(1-a), z)."""
    x, y, z = v / np.array([a, 1 - a, 1]) if dual else v
    return max(-x, -y, abs(z) - max(x, 0) ** a * max(y, 0) ** (1 - a))


def _size(v: np.ndarray) -> float:
    return float(np.abs(v).max(initial=0))


def _scale(*parts) -> float:
    return max(max(_size(part) for part in parts), 1e-12)
