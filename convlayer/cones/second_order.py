"""The second-order cone, with an explicit eigenbasis of its projection's derivative."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor

from convlayer.cones.cone import (
    Cone,
    Spectrum,
    bend,
    distinct,
    from_basis,
    lift,
    spectral_weight,
    split,
    to_basis,
)
from convlayer.memo import constants

# Rows from which on u stands for the basis.
COMPACT = 48


@dataclass(frozen=True)
class SecondOrder(Cone):
    """K = {(t, z) : |z| <= t}, of `size` rows; size 1 is the nonnegative ray.

    Spectrum of a point:  l1 = t + |z|, l2 = t - |z| along (1, u)/sqrt 2 and (1, -u)/sqrt 2, with u
                          = z/|z|.
    Solution:    v if l2 >= 0, else max(l1, 0)/2 (1, u).
    Derivative:  1[l1 > 0], 1[l2 > 0] along these two, and 1/2 (1 + (l1 + l2)/(|l1| + |l2|)) on the
                 complement of u, whose basis are the other columns of the Householder reflection
                 that takes u to an axis.
    Curvature:   between the two, `bend` with c = l1/(l1 - l2), |p| = l1/sqrt 2 and |v - p| =
                 -l2/sqrt 2.
    Smoothed:    p and r of the eigenvalues p_i - r_i = l_i with p_i r_i = kappa; on the complement
                 of u the derivative is (p1 + p2)/(p1 + p2 + r1 + r2).
    At a kink:   l1 = 0 or l2 = 0; an eigenvalue in [-sqrt 2 tolerance, 0) counts as positive.
    """

    size: int
    name: ClassVar[str] = "second_order"
    dims: ClassVar[str] = "soc"
    place: ClassVar[int] = 2
    two_axes: ClassVar[bool] = True
    of_norm: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"A second-order cone was given {self.size} rows; expected 1 or more.")

    def inside(self) -> Tensor:
        point = torch.zeros(self.size, dtype=torch.float64)
        point[0] = 1.0
        return point

    @property
    def signed(self) -> Sequence[int]:
        """t."""
        return (0,)

    def half_spaces(self, weak: Tensor, step: Tensor) -> list[Tensor]:
        if self.size == 1 or not bool(weak.all()):
            return super().half_spaces(weak, step)
        # t >= |z| in the basis (1, u)/sqrt 2, (1, -u)/sqrt 2 and the complement of u, as t >= |z_i|
        t, along = (step[0] + step[1]) / sqrt(2), (step[0] - step[1]) / sqrt(2)
        z = torch.cat([along.unsqueeze(0), step[2:]])
        return [t + z, t - z]

    @classmethod
    def read(cls, count: Sequence[int]) -> Sequence[Cone]:
        return [cls(size) for size in count]

    @classmethod
    def describe(cls, cones: Sequence[Cone]) -> str:
        sizes = distinct(cone.size for cone in cones)
        return f"{len(cones)} second-order (size{'s' if ',' in sizes else ''} {sizes})"

    def project(self, v: Tensor) -> Tensor:
        if self.size == 1:
            return v.clamp(min=0)
        return self._split(v)[0]

    def linearise(self, v: Tensor, tolerance: float = 0.0) -> tuple[Tensor, Spectrum]:
        if self.size == 1:
            return v.clamp(min=0), Spectrum((v >= -tolerance).to(v.dtype), None)
        p, eigenvalues, u = self._split(v)
        eigenvalues = lift(eigenvalues, sqrt(2) * tolerance)
        values = (eigenvalues >= 0).to(v.dtype)
        if self.size > 2:
            across = spectral_weight(eigenvalues.narrow(-1, 0, 1), eigenvalues.narrow(-1, 1, 1))
            values = torch.cat((values, across.expand(*across.shape[:-1], self.size - 2)), -1)
        return p, Spectrum(values, self._basis(u))

    def curvature(self, v: Tensor, h: Tensor, g: Tensor) -> Tensor:
        if self.size <= 2:
            return (v - v) * h * g
        p, eigenvalues, u = self._split(v)
        first, second = eigenvalues[..., :1], eigenvalues[..., 1:]
        curved = (first > 0) & (second < 0)
        gap = torch.where(curved, first - second, 1.0)
        radial, inward = (
            torch.where(curved, part / gap / gap * sqrt(2), 0.0) for part in (-second, first)
        )
        basis = self._basis(u)
        h, g = (to_basis(basis, part.unsqueeze(-1)).squeeze(-1) for part in (h, g))
        return from_basis(basis, bend(h, g, radial, inward).unsqueeze(-1)).squeeze(-1) + (p - p)

    def smooth(self, v: Tensor, kappa: Tensor) -> tuple[Tensor, Tensor, Spectrum]:
        kappa = kappa.unsqueeze(-1)
        if self.size == 1:
            p, r = split(v, kappa)
            return p, r, Spectrum(r / (p + r), None)
        _, eigenvalues, u = self._split(v)
        p, r = split(eigenvalues, kappa)
        across = r.sum(-1, keepdim=True) / (p + r).sum(-1, keepdim=True)
        values = torch.cat((r / (p + r), across.expand(*across.shape[:-1], self.size - 2)), -1)
        return self._join(p, u), self._join(r, u), Spectrum(values, self._basis(u))

    def margin(self, v: Tensor, p: Tensor) -> Tensor:
        if self.size == 1:
            return v[..., 0].abs()
        t, length = v[..., 0], torch.linalg.vector_norm(v[..., 1:], dim=-1)
        return (t.abs() - length).abs() / sqrt(2)

    def _split(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Projection, the eigenvalues (l1, l2) of v, and the unit vector u (an axis where z =
        0)."""
        t, z = v.narrow(-1, 0, 1), v.narrow(-1, 1, self.size - 1)
        length = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
        axis, signs = _constants(self.size, v.dtype, v.device)
        u = torch.where((length > 0) & (length < torch.inf), z / length, axis)
        eigenvalues = torch.addcmul(t, length, signs)
        half = eigenvalues.narrow(-1, 0, 1).clamp(min=0) * 0.5
        p = torch.where(eigenvalues.narrow(-1, 1, 1) >= 0, v, torch.cat((half, half * u), -1))
        return p, eigenvalues, u

    def _join(self, eigenvalues: Tensor, u: Tensor) -> Tensor:
        """The vector of the eigenvalues (l1, l2) along (1, u)/sqrt 2 and (1, -u)/sqrt 2."""
        first, second = eigenvalues[..., :1], eigenvalues[..., 1:]
        return torch.cat((first + second, (first - second) * u), -1) * 0.5

    def _basis(self, u: Tensor) -> Tensor:
        """Columns (1, u)/sqrt 2, (1, -u)/sqrt 2, (0, h_j), h_j = e_j - u_j w/(1 + |u_1|), w = u +
        sign(u_1) e_1; or what stands for it."""
        if self.size >= COMPACT:
            return torch.nn.functional.pad(torch.stack((u, _towards(u)), -1), (0, 0, 1, 0))
        fixed = _fixed_basis(self.size, u.dtype, u.device)
        basis = fixed.expand(*u.shape[:-1], -1, -1).clone()
        below = basis.narrow(-2, 1, self.size - 1)
        below.narrow(-1, 0, 2).mul_(u.unsqueeze(-1))
        if self.size > 2:
            rest = u.narrow(-1, 1, self.size - 2)
            below.narrow(-1, 2, self.size - 2).addcmul_(
                _towards(u).unsqueeze(-1), rest.unsqueeze(-2), value=-1
            )
        return basis


def _towards(u: Tensor) -> Tensor:
    """w/(1 + |u_1|)."""
    first = u.narrow(-1, 0, 1)
    f = u / (first.abs() + 1)
    f.narrow(-1, 0, 1).copy_(torch.ones_like(first).copysign_(first))  # (u_1 + sign)/(1 + |u_1|)
    return f


@constants
def _constants(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The axis e_1 of R^(size - 1), and the signs (1, -1)."""
    axis = torch.zeros(size - 1, dtype=dtype, device=device)
    axis[0] = 1
    return axis, torch.tensor([1.0, -1.0], dtype=dtype).to(device)


@constants
def _fixed_basis(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(size, size) the basis where it does not depend on u."""
    basis = torch.zeros(size, size, dtype=dtype, device=device)
    basis[:, 0] = sqrt(0.5)
    basis[1:, 1] = -sqrt(0.5)
    basis[0, 1] = sqrt(0.5)
    basis[2:, 2:] = torch.eye(size - 2, dtype=dtype, device=device)
    return basis
