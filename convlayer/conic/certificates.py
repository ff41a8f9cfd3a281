"""Proofs that a row has no solution, checked whoever claims them.

    infeasible   y in K*,  A'y = 0,  b'y < 0          no x satisfies Ax + s = b, s in K
    unbounded    Px = 0,  -Ax in K,  q'x < 0          the objective falls along x for ever, from any feasible point

As computed A'y is not zero, and excludes only x with x'A'y > b'y. It is therefore made zero as far
as rounding lets it, by the least change of y on its support, and what is left is weighed entry by
entry against the terms that it is the sum of.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from convlayer.conic.program import Data, Operators
from convlayer.conic.residual import INFINITE

# What A'y, or Px and the infeasible part of Ax, may still be: this share of the gain, in units of
# size one.
CERTIFICATE = 1e-4


@dataclass(frozen=True)
class _Proof:
    """What counts as nothing in a proof."""

    vanishing: float  # an entry of A'y, as a share of its terms: it is rounding
    nearly: float  # all of A'y, as a share of its terms: y may be made a proof
    flat: float  # an entry of Px, |x| <= 1, as a share of its row of |P|


@dataclass(frozen=True)
class _Sharpening:
    """How A'y is made zero."""

    support: float  # share of the largest multiplier below which one is none
    largest: int  # unknowns or rows of the support beyond which y is taken as it is
    turns: int  # of making A'y zero and of going back into the cone
    rank: float  # a singular value of A' on the support below this share of the largest is none


PROOF = _Proof(vanishing=1e-11, nearly=1e-2, flat=1e-5)
SHARPENING = _Sharpening(support=1e-7, largest=2000, turns=3, rank=1e-12)


def infeasible(data: Data, y: Tensor, precision: float) -> Tensor:
    """(B,) whether y (B, m) proves that the row has no feasible point, by more than its data's
    relative `precision`."""
    y = data.program.cones.project_dual(y.nan_to_num(0.0, 0.0, 0.0))
    proven, nearly = _proves(data, y, precision)
    left = torch.nonzero(~proven & nearly).flatten()
    if len(left):
        part = data.rows(left).widen(len(left))
        proven[left], _ = _proves(part, _sharpened(part, y[left]), precision)
    return proven


def _proves(data: Data, y: Tensor, precision: float) -> tuple[Tensor, Tensor]:
    """(B,) whether y is a proof, and whether it is nearly one."""
    operators = Operators(data)
    # -b'y > 0, by more than what its terms are rounded by
    bounds = torch.where(data.b.abs() < INFINITE, data.b.abs(), 0.0)
    gain, terms = -(data.b * y).sum(1), (bounds * y.abs()).sum(1)
    # A'y = 0: beside the gain, or entry by entry beside its terms
    image = operators.At(y).abs()
    size = bounds.sum(1).clamp(min=1.0)
    small = image.sum(1) * size <= CERTIFICATE * gain
    terms_of_image = operators.absolute.At(y.abs())
    nothing = (image <= PROOF.vanishing * terms_of_image).all(1)
    gains = (gain > precision * terms) & (gain > 0)
    return gains & (small | nothing), gains & (image.sum(1) <= PROOF.nearly * terms_of_image.sum(1))


def _sharpened(data: Data, y: Tensor) -> Tensor:
    """y with A'y as near zero as the least change on its support makes it, row by row."""
    cones, dense = data.program.cones, data.to_dense().host()
    found = y.clone()
    for row in range(len(y)):
        vector = y[row].cpu().numpy()
        support = np.flatnonzero(np.abs(vector) > SHARPENING.support * np.abs(vector).max())
        if max(len(support), data.program.n) > SHARPENING.largest:
            continue
        matrix = dense.A[row % len(dense.A)].numpy()[support]
        matrix = matrix[:, (matrix != 0).any(0)]
        for _ in range(SHARPENING.turns):
            # y - (A')^+ A'y on the support, and Pi_K* of that
            change = np.linalg.lstsq(matrix.T, matrix.T @ vector[support], rcond=SHARPENING.rank)[0]
            part = vector[support] - change
            vector = np.zeros_like(vector)
            vector[support] = part
            vector = cones.project_dual(torch.from_numpy(vector).unsqueeze(0))[0].numpy()
        found[row] = torch.from_numpy(vector)
    return found


def unbounded(data: Data, x: Tensor) -> Tensor:
    """(B,) whether x (B, n) is a direction along which the objective falls without end."""
    x = x.nan_to_num(0.0, 0.0, 0.0)
    operators = Operators(data)
    # Px = 0 and Ax + s = 0 with s in K, beside the gain -q'x
    image = operators.A(x)
    s = data.program.cones.project(-image)
    gain = -(data.q * x).sum(1)
    error = torch.cat([operators.P(x), image + s], 1).abs().amax(1)
    # A curvature that is small beside the rest of the program is none the less one: each row of P
    # in units of its own.
    rows = operators.absolute.P(torch.ones_like(x))
    curved = (
        (operators.P(x).abs() > PROOF.flat * rows * x.abs().amax(1, keepdim=True)).any(1)
        if x.shape[1]
        else gain > 0
    )
    return (gain > 0) & (error <= CERTIFICATE * gain) & ~curved
