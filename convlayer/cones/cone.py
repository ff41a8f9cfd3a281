"""What a cone knows: its projection, the first two derivatives of that projection, and how far the
next kink is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spectrum:
    """The derivative of a projection, DPi(v) = basis @ diag(values) @ basis.T.

    The projection onto a closed convex cone is nonexpansive and the gradient of a convex function,
    so DPi is symmetric with 0 <= DPi <= I, and its roots and complements cost nothing once it is
    diagonal.
    """

    values: Tensor  # (*batch, k), in [0, 1]
    basis: (
        Tensor | None
        # (*batch, k, k), orthogonal, or what stands for it, (*batch, k, 2), see `from_basis`; None: the
        # identity
    )


class Cone(ABC):
    """One block of rows and the cone it lies in.

    Shapes:      v (*batch, size), float64, to whose range and precision roots are solved. A block
                 with a NaN gives NaN, and only there; its spectrum is that of a finite stand-in, so
                 that no factorisation downstream meets a NaN of our making.
    At a kink:   within `tolerance` of a point where the projection is not differentiable,
                 `linearise` takes the branch with the larger derivative, the one that leaves more
                 directions of K free; with a negative tolerance that with the smaller one, in the
                 same basis, where the cone is `two_branched`.
    """

    name: ClassVar[str]
    # What CVXPY's summary of a program's cones calls them, and where their rows stand among the
    # others'.
    dims: ClassVar[str]
    place: ClassVar[int]
    # The branches of the derivative at a kink have a common basis.
    two_branched: ClassVar[bool] = True
    # Each row is a cone for itself, and may be scaled alone; adjacent blocks are one. Such a cone
    # is polyhedral.
    elementwise: ClassVar[bool] = False
    # Away from the first two columns of its basis the derivative is one number.
    two_axes: ClassVar[bool] = False
    # K = {(t, z) : |z| <= t}
    of_norm: ClassVar[bool] = False
    size: int

    @abstractmethod
    def project(self, v: Tensor) -> Tensor:
        """The Euclidean projection of v onto the cone, (*batch, size)."""

    @abstractmethod
    def linearise(self, v: Tensor, tolerance: float = 0.0) -> tuple[Tensor, Spectrum]:
        """The projection of v and its derivative there."""

    @abstractmethod
    def curvature(self, v: Tensor, h: Tensor, g: Tensor) -> Tensor:
        """The second derivative of the projection, Pi''(v)[h, g] (*batch, size): symmetric in h and
        g, of degree -1 in v.

        h and g (*batch, size). On a kink, where there is none, it is finite all the same.
        """

    @abstractmethod
    def smooth(self, v: Tensor, kappa: Tensor) -> tuple[Tensor, Tensor, Spectrum]:
        """The smoothed projection p of v, with p - r = v and p inside K, r inside K*:  r = -kappa grad f(p).

        f is the cone's logarithmic barrier, so p minimises kappa f(p) + |p - v|^2/2, and tends to
        Pi(v) with kappa; in a symmetric cone p o r = kappa e. kappa (*batch,), positive. Returns p,
        r and dr/d(-v) = I - dp/dv, whose values are between 0 and 1 and accurate where they are
        small.
        """

    @abstractmethod
    def margin(self, v: Tensor, p: Tensor) -> Tensor:
        """The distance from v to the nearest kink of the projection, (*batch,); infinite where
        there is none. p = project(v)."""

    @property
    def parameter(self) -> float | int | None:
        """What tells this cone from others of its name and size, where something does."""
        return None

    @property
    def curved(self) -> bool:
        """Its boundary is not made of flat faces: in the plane every cone is an angle."""
        return not self.elementwise and self.size > 2

    @property
    def signed(self) -> Sequence[int]:
        """The rows that are never negative in the cone."""
        return ()

    def half_spaces(self, weak: Tensor, step: Tensor) -> list[Tensor]:
        """The directions (size, k), in the spectrum's basis, as numbers (., k) of which none may be
        negative.

        weak (size,): the directions in which y and s may both begin to move. Of a cone of several
        the half-spaces along its axes, which hold it.
        """
        return [step[weak]]

    def inside(self) -> Tensor:
        """(size,) a point inside."""
        return torch.ones(self.size, dtype=torch.float64)

    @classmethod
    @abstractmethod
    def read(cls, count: Any) -> Sequence[Cone]:
        """The cones that CVXPY's summary counts: a number of rows or of cones, or for each cone
        what tells it from others."""

    @classmethod
    def describe(cls, cones: Sequence[Cone]) -> str:
        """Some cones of this kind, in words."""
        return f"{len(cones)} {cls.name}"

    @property
    def group(self) -> object:
        """Blocks with equal groups are served by one call."""
        return self.name, self.size

    @classmethod
    def merge(cls, cones: Sequence[Cone]) -> tuple[Cone, int]:
        """One cone object that serves `count` blocks of a group stacked as (*batch, count, size),
        and that count."""
        return cones[0], len(cones)

    def apart(self) -> Sequence[Cone]:
        """The single cones that it serves."""
        return [self]


def distinct(values: Iterable[float | int | None]) -> str:
    """The values that occur, in words."""
    return ", ".join(f"{value:g}" for value in dict.fromkeys(values))


def finite_rows(v: Tensor) -> tuple[Tensor, Tensor]:
    """v with every row that is not finite set to zero, and what to add to a result so that those
    rows become NaN."""
    blot = (v - v).sum(-1, keepdim=True)
    return torch.where(blot == 0, v, 0.0), blot


def spectral_weight(left: Tensor, right: Tensor) -> Tensor:
    """The divided difference of max(., 0), (left+ - right+) / (left - right), without a gap in the
    denominator.

    1/2 (1 + (left + right) / (|left| + |right|)),   and 1 where both are 0
    """
    total = left.abs() + right.abs()
    return torch.where((total > 0) & (total < torch.inf), 0.5 * (left + right) / total + 0.5, 1.0)


def bend(
    h: Tensor, g: Tensor, radial: Tensor, normal: Tensor, geodesic: Tensor | float = 0.0
) -> Tensor:
    """Pi''[h, g] on a curved boundary, all in the eigenbasis of DPi: along p, along v - p, and the
    rest, of eigenvalue c.

    Pi'' is the third derivative of |Pi|^2/2, and so symmetric in three arguments. Moving v in the
    plane of p and v - p keeps the eigenbasis and changes c alone, which gives all of it but the
    rest in its three arguments:

        Pi''[e1, ei] = (dc/d|p|) ei,   Pi''[e2, ei] = (dc/d|v - p|) ei,        (radial, normal)
        Pi''[e3, e3]'e3 = dc along e3 = -(c^3 |v - p|/|p|^2) dk/dsigma         (geodesic)

    The last is of the cones of three rows, whose rays p/|p| draw a curve on the sphere: with sigma
    its arc length in the direction of e3 and k its geodesic curvature, c = |p|/(|p| + |v - p| k).
    """
    h_ray, h_normal, h_rest = h[..., :1], h[..., 1:2], h[..., 2:]
    g_ray, g_normal, g_rest = g[..., :1], g[..., 1:2], g[..., 2:]
    both = (h_rest * g_rest).sum(-1, keepdim=True)
    rest = (radial * h_ray + normal * h_normal) * g_rest + (
        radial * g_ray + normal * g_normal
    ) * h_rest
    return torch.cat((radial * both, normal * both, rest + geodesic * h_rest * g_rest), -1)


def from_basis(basis: Tensor, x: Tensor) -> Tensor:
    """U x for x (*batch, k, c).

    The basis of a second-order cone is its unit vector's, (1, u)/sqrt 2, (1, -u)/sqrt 2 and the
    other columns of the Householder reflection that takes u to an axis. Of a large cone only two
    vectors are held, (0, u) and (0, f), f = (u + sign(u_1) e_1)/(1 + |u_1|): those columns are e_j
    - u_j f.
    """
    if basis.shape[-1] == basis.shape[-2]:
        return basis @ x
    u, towards = basis[..., 1:, :1], basis[..., 1:, 1:]
    rest = x[..., 2:, :]
    z = u * ((x[..., :1, :] - x[..., 1:2, :]) * sqrt(0.5)) - towards * (u[..., 1:, :].mT @ rest)
    z[..., 1:, :] += rest
    t = (x[..., :1, :] + x[..., 1:2, :]) * sqrt(0.5)
    return torch.cat((t.expand(*z.shape[:-2], 1, -1), z), -2)


def to_basis(basis: Tensor, y: Tensor) -> Tensor:
    """U'y for y (*batch, k, c)."""
    if basis.shape[-1] == basis.shape[-2]:
        return basis.mT @ y
    t, z = y[..., :1, :], y[..., 1:, :]
    along, reflected = (basis[..., 1:, :].mT @ z).split(1, -2)
    rest = z[..., 1:, :] - basis[..., 2:, :1] * reflected
    return torch.cat(((t + along) * sqrt(0.5), (t - along) * sqrt(0.5), rest), -2)


def axes(basis: Tensor) -> Tensor:
    """The first two columns of U, (*batch, k, 2)."""
    if basis.shape[-1] == basis.shape[-2]:
        return basis[..., :2]
    half = torch.full_like(basis[..., :1, :], sqrt(0.5))
    u = basis[..., 1:, :1] * sqrt(0.5)
    return torch.cat((half, torch.cat((u, -u), -1)), -2)


def rotate(basis: Tensor, x: Tensor) -> Tensor:
    """basis @ x for x (*batch, k)."""
    return (basis @ x.unsqueeze(-1)).squeeze(-1)


def split(values: Tensor, kappa: Tensor) -> tuple[Tensor, Tensor]:
    """The two positive numbers of difference `values` and product kappa."""
    larger = (torch.hypot(values, 2 * kappa.sqrt()) + values.abs()) * 0.5
    smaller = kappa / larger
    return torch.where(values >= 0, larger, smaller), torch.where(values >= 0, smaller, larger)


def lift(eigenvalues: Tensor, tolerance: float) -> Tensor:
    """Eigenvalues with those in [-tolerance, 0) reflected: the branch with the larger derivative at
    a kink. With a negative tolerance those in [0, -tolerance) are, and none stays zero: the branch
    with the smaller derivative."""
    if tolerance >= 0:
        return (
            torch.where(eigenvalues >= -tolerance, eigenvalues.abs(), eigenvalues)
            if tolerance
            else eigenvalues
        )
    below = -eigenvalues.abs().clamp(min=torch.finfo(eigenvalues.dtype).tiny)
    return torch.where(eigenvalues < -tolerance, below, eigenvalues)
