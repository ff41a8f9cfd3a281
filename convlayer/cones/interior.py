"""The smoothed projection onto a cone that has no eigenvalues: Newton's method on its barrier.

    minimise  f(p) + |p - v|^2/2,   f self-concordant,   p - r = v with r = -grad f(p)

Near the boundary p's own coordinates do not hold its distance from it, which is a coordinate of its
own here, and f'' is graded: its eigenvalues are like 1/distance^2, 1/distance and 1. A frame that
tells these directions apart, and f'' as a sum of squares in it, keep the small ones.

Source: Nesterov and Nemirovskii (1994) for the damping; Demmel and Veselic (1992) for Jacobi's
        method on graded matrices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from convlayer.cones.cone import rotate


@dataclass(frozen=True)
class _Descent:
    """When Newton's method has done."""

    steps: int  # at most; a dozen is usual
    settled: float  # length of a step from which on the method doubles the digits,
    rounding: float  # and of a step's rounding, relative to |v|
    # steps so short to be done: where |v| is large the first of them are no shorter than this
    calm: int
    damped: float  # a step longer than this is shortened


DESCENT = _Descent(steps=200, settled=1e-6, rounding=2e-15, calm=3, damped=0.25)
# Sweeps of Jacobi's method, at most; five are usual.
JACOBI_SWEEPS = 12
# Columns are orthogonal where the cosine of their angle is below this.
ORTHOGONAL = 1e-15
# |v| beyond which p is Pi(v) to rounding: kappa is then rounded up.
FAR = 1e14


class Interior(ABC):
    """A point inside a cone, and the barrier f there; coordinates of vectors in the frame are
    called c."""

    point: Tensor  # (*batch, 3)
    polar: Tensor  # (*batch, 3), -grad f
    frame: Tensor  # (*batch, 3, 3), orthonormal columns, those with the larger f'' first
    factor: Tensor  # (*batch, k, 3), f'' = frame factor' factor frame'

    @abstractmethod
    def moved(self, c: Tensor, curved: Tensor) -> Interior:
        """The point at p + frame c, |factor c| < 1. Its distance changes to first order only where
        not `curved`: in the end c along the surface is all rounding, and its square is not to enter
        the distance."""


def unit_scale(v: Tensor, kappa: Tensor) -> Tensor:
    """sqrt kappa, (*batch, 1): the smoothed projection of v at kappa is this times that of v over
    this at 1."""
    return torch.maximum(kappa.sqrt().unsqueeze(-1), v.abs().amax(-1, keepdim=True) / FAR)


def minimise(start: Interior, v: Tensor) -> Interior:
    """Damped Newton steps, 1/(1 + l) of the way where l, the step's length in f'', is not small:
    they stay inside."""
    now, calm = start, 0
    small = DESCENT.settled + DESCENT.rounding * v.norm(dim=-1, keepdim=True)
    for _ in range(DESCENT.steps):
        # (1 + f'') c = -grad f - p + v in the frame,  f'' = factor'factor
        matrix = now.factor.mT @ now.factor
        matrix.diagonal(dim1=-2, dim2=-1).add_(1)
        descent = rotate(now.frame.mT, now.polar - now.point + v).unsqueeze(-1)
        c = torch.cholesky_solve(descent, torch.linalg.cholesky_ex(matrix).L).squeeze(-1)
        length = rotate(now.factor, c).norm(dim=-1, keepdim=True)
        now = now.moved(
            torch.where(length > DESCENT.damped, c / (1 + length), c), (length > small).squeeze(-1)
        )
        calm += bool((length <= small).all())
        if calm == DESCENT.calm:
            break
    return now


def rest_of(now: Interior) -> tuple[Tensor, Tensor]:
    """The eigenvalues and eigenvectors of I - (I + f'')^-1.

    Jacobi's method from one side finds small eigenvalues of f'' as accurately as large ones.
    """
    rows = now.factor.shape[-2]
    columns = list(torch.cat((now.factor, now.frame), -2).unbind(-1))
    for _ in range(JACOBI_SWEEPS):
        worst = columns[0].new_zeros(())
        for i, j in ((0, 1), (0, 2), (1, 2)):
            first, second = columns[i], columns[j]
            a, b = (column[..., :rows].square().sum(-1) for column in (first, second))
            product = (first[..., :rows] * second[..., :rows]).sum(-1)
            worst = torch.maximum(
                worst, (product / (a * b).sqrt()).abs().amax() if product.numel() else worst
            )
            cotangent = (b - a) / (2 * product)
            tangent = torch.copysign(
                1 / (cotangent.abs() + torch.hypot(cotangent, torch.ones_like(a))), cotangent
            )
            tangent = torch.where(product == 0, 0.0, tangent).unsqueeze(-1)
            cosine = torch.rsqrt(1 + tangent * tangent)
            columns[i] = (first - tangent * second) * cosine
            columns[j] = (second + tangent * first) * cosine
        if not bool(worst > ORTHOGONAL):
            break
    both = torch.stack(columns, -1)
    squares = both[..., :rows, :].square().sum(-2)
    return squares / (1 + squares), both[..., rows:, :]
