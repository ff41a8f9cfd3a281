"""What a cone knows: its projection, the derivative of that projection as a spectrum, and how far the next kink is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spectrum:
    """The derivative of a projection, DPi(v) = basis @ diag(values) @ basis.T.

    The projection onto a closed convex cone is nonexpansive and the gradient of a convex function, so DPi is symmetric
    with 0 <= DPi <= I, and its roots and complements cost nothing once it is diagonal.
    """

    values: Tensor  # (*batch, k), in [0, 1]
    basis: Tensor | None  # (*batch, k, k), orthogonal; None: the identity


class Cone(ABC):
    """One block of rows and the cone it lies in.

    Shapes:      v (*batch, size), float64, to whose range and precision roots are solved. A block with a NaN gives
                 NaN, and only there; its spectrum is that of a finite stand-in, so that no factorisation downstream
                 meets a NaN of our making.
    At a kink:   within `tolerance` of a point where the projection is not differentiable, `linearise` takes the branch
                 with the larger derivative, the one that leaves more directions of K free.
    """

    name: ClassVar[str]
    size: int

    @abstractmethod
    def project(self, v: Tensor) -> Tensor:
        """The Euclidean projection of v onto the cone, (*batch, size)."""

    @abstractmethod
    def linearise(self, v: Tensor, tolerance: float = 0.0) -> tuple[Tensor, Spectrum]:
        """The projection of v and its derivative there."""

    @abstractmethod
    def margin(self, v: Tensor, p: Tensor) -> Tensor:
        """The distance from v to the nearest kink of the projection, (*batch,); infinite where there is none. p = project(v)."""

    @property
    def parameter(self) -> float | int | None:
        """What tells this cone from others of its name and size, where something does."""
        return None

    @property
    def group(self) -> object:
        """Blocks with equal groups are served by one call."""
        return self.name, self.size

    @classmethod
    def merge(cls, cones: Sequence[Cone]) -> tuple[Cone, int]:
        """One cone object that serves `count` blocks of a group stacked as (*batch, count, size), and that count."""
        return cones[0], len(cones)


def finite_rows(v: Tensor) -> tuple[Tensor, Tensor]:
    """v with every row that is not finite set to zero, and what to add to a result so that those rows become NaN."""
    blot = (v - v).sum(-1, keepdim=True)
    return torch.where(blot == 0, v, 0.0), blot


def spectral_weight(left: Tensor, right: Tensor) -> Tensor:
    """The divided difference of max(., 0), (left+ - right+) / (left - right), without a gap in the denominator.

    1/2 (1 + (left + right) / (|left| + |right|)),   and 1 where both are 0
    """
    total = left.abs() + right.abs()
    return torch.where((total > 0) & (total < torch.inf), 0.5 * (left + right) / total + 0.5, 1.0)


def lift(eigenvalues: Tensor, tolerance: float) -> Tensor:
    """Eigenvalues with those in [-tolerance, 0) reflected: the branch with the larger derivative at a kink."""
    return torch.where(eigenvalues >= -tolerance, eigenvalues.abs(), eigenvalues) if tolerance > 0 else eigenvalues
