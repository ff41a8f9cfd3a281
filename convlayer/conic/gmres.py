"""GMRES with an approximate inverse as right preconditioner, for one sparse system in NumPy.

Source: Saad and Schultz (1986).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.sparse as sp

# Restarts, and steps between two of them.
CYCLES, STEPS = 3, 20
# Relative residual at which nothing is left to gain.
EXACT = 1e-15
# A new direction below this share of the last ones is rounding: the space holds the solution.
EXHAUSTED = 1e-14


def gmres(
    K: sp.csr_array, inverse: Callable[[np.ndarray], np.ndarray], right: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(x, right - K x) of least residual.

    Where a few eigenvalues of K are below the shift of its factor, refinement stalls on them; each
    costs a Krylov method one step.
    """
    x, size = np.zeros_like(right), np.abs(right).max(initial=0.0)
    for _ in range(CYCLES):
        residual = right - K @ x
        length = np.linalg.norm(residual)
        if np.abs(residual).max(initial=0.0) <= EXACT * size or not np.isfinite(length):
            break
        images, H = _krylov(K, inverse, residual / length)
        if not np.isfinite(H).all():
            break
        # x + Z c with c of least |length e_1 - H c|
        goal = np.zeros(len(H))
        goal[0] = length
        weights = np.linalg.lstsq(H, goal, rcond=None)[0]
        better = x + sum(weight * image for weight, image in zip(weights, images, strict=True))
        if not np.linalg.norm(right - K @ better) < length:
            break
        x = better
    return x, right - K @ x


def _krylov(
    K: sp.csr_array, inverse: Callable[[np.ndarray], np.ndarray], first: np.ndarray
) -> tuple[list[np.ndarray], np.ndarray]:
    """Arnoldi's  K Z = V H,  V orthonormal from the `first` vector, Z = inverse V:  (columns of Z,
    H)."""
    basis, images, H = [first], [], np.zeros((STEPS + 1, STEPS))
    for k in range(STEPS):
        images.append(inverse(basis[k]))
        new = K @ images[k]
        for _ in range(2):  # orthogonal to rounding
            for i, vector in enumerate(basis):
                part = vector @ new
                H[i, k] += part
                new = new - part * vector
        H[k + 1, k] = np.linalg.norm(new)
        if not H[k + 1, k] > EXHAUSTED * np.abs(H[: k + 1, k]).max():
            break
        basis.append(new / H[k + 1, k])
    steps = len(images)
    return images, H[: steps + 1, :steps]
