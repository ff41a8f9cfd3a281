"""Nesterov-Todd scalings of the symmetric cones that are not the orthant: second order and psd.

For s and y inside a cone there is one scaling point, with a matrix W such that

    W y = W^-T s = lambda,   H = W'W,   H y = s,

and Newton's equations for s o y = mu e are, in scaled terms d_s = W^-T ds and d_y = W dy,

    d_s + d_y = -lambda                                               (predictor)
    d_s + d_y = -(lambda + lambda \\ (d_s^a o d_y^a - sigma mu e))      (corrector, after Mehrotra)

with o the product of the cone's Jordan algebra and \\ its inverse. The longest step is read off the eigenvalues of a direction
seen from lambda. A `Kind` is a run of equal cones, its `at` gives the `ConeScaling` of a point; everything is (B, count, size).

Cost:     second order: some passes over the rows, H^-1 being diagonal plus rank one. psd: a Cholesky factor, an eigendecomposition
          and two of eigenvalues for each matrix, and two matrices of size^2.

Sources:  Nesterov and Todd (1997); Vandenberghe, The CVXOPT linear and quadratic cone program solvers (2010).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from convlayer.cones import Block, Cone, Psd, SecondOrder, smat, svec
from convlayer.memo import constants

# A matrix with a larger entry than this is not decomposed: its eigenvalues' squares overflow.
LARGEST = 1e150


class ConeScaling(ABC):
    """A point (s, y) inside a cone and its dual, and Newton's equations there. x is (B or 1, k,
    count, size)."""

    scaled: Tensor  # (B, count, size) lambda

    @abstractmethod
    def weigh(self, x: Tensor) -> Tensor:
        """H^-1 x, (B, k, count, size)."""

    @abstractmethod
    def inverse(self) -> Tensor:
        """H^-1, (B, count, size, size)."""

    @abstractmethod
    def reduce(self, x: Tensor) -> Tensor:
        """W^-T x, (B, k, count, size)."""

    @abstractmethod
    def enlarge(self, x: Tensor) -> Tensor:
        """W^-1 x, (B, count, size)."""

    @abstractmethod
    def correction(
        self, d_s: Tensor, d_y: Tensor, ds: Tensor | None, dy: Tensor | None, sigma_mu: Tensor
    ) -> Tensor:
        """What the corrector's d_s + d_y = -(lambda + correction) adds, of the predictor; sigma_mu
        is (B, 1, 1)."""

    @abstractmethod
    def worst(self, d_s: Tensor, d_y: Tensor) -> Tensor | None:
        """-1 / (longest step), (B, 1), where that has a closed form."""

    def shorten(self, length: Tensor, ds: Tensor, dy: Tensor) -> Tensor:
        """The part of a step, (B, 1), that stays inside the cones; for those whose boundary has no
        closed form."""
        return length


class Kind(ABC):
    """`count` cones of one kind and size. One that says its `cone` is what the interior point takes
    that cone by."""

    cone: ClassVar[type[Cone]]
    symmetric: ClassVar[bool] = True

    def __init__(self, count: int, size: int, degree: int) -> None:
        self.count, self.size, self.degree = count, size, degree

    @classmethod
    @abstractmethod
    def of(cls, blocks: Sequence[Block]) -> Kind:
        """The kind of these blocks, which are of one size."""

    @abstractmethod
    def unit(self, like: Tensor) -> Tensor:
        """The point (count, size) at which s = y is on the central path."""

    @abstractmethod
    def inside(self, v: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Eigenvalues (B, .) of v, and the map from new ones to a point: for the start; of
        symmetric cones."""

    @abstractmethod
    def at(self, s: Tensor, y: Tensor) -> ConeScaling:
        """The scaling of a point inside."""


class SecondOrderKind(Kind):
    """{(t, z) : |z| <= t}, of two rows or more."""

    cone: ClassVar[type[Cone]] = SecondOrder

    def __init__(self, count: int, size: int) -> None:
        super().__init__(count, size, 1)

    @classmethod
    def of(cls, blocks: Sequence[Block]) -> SecondOrderKind:
        return cls(len(blocks), blocks[0].size)

    def unit(self, like: Tensor) -> Tensor:
        point = like.new_zeros(self.count, self.size)
        point[:, 0] = 1
        return point

    def inside(self, v: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        t, z = v[..., 0], v[..., 1:]
        length = torch.linalg.vector_norm(z, dim=-1)
        direction = z / length.clamp(min=1e-300).unsqueeze(-1)

        def back(values: Tensor) -> Tensor:
            low, high = values.unflatten(1, (2, self.count)).unbind(1)
            half = ((high - low) / 2).unsqueeze(-1)
            return torch.cat([((high + low) / 2).unsqueeze(-1), half * direction], -1)

        return torch.cat([t - length, t + length], 1), back

    def at(self, s: Tensor, y: Tensor) -> ConeScaling:
        return SecondOrderScaling(s, y)


class SecondOrderScaling(ConeScaling):
    """W = eta [ w_0  w_1' ; w_1  I + w_1 w_1'/(1 + w_0) ],  H = eta^2 (2 w w' - J),  J = diag(1, -1, ..., -1),

    with w of hyperbolic length one: w = (s + J y)/(2 gamma), s and y brought to that length,
                                     gamma^2 = (1 + s'y)/2.
    """

    def __init__(self, s: Tensor, y: Tensor) -> None:
        both = torch.stack([s, y])
        head, tail = both[..., :1], both[..., 1:]
        size = _hyperbolic(head, tail)  # (2, B, count, 1)
        heads, tails = head / size, tail / size
        (s0, y0), (s1, y1) = heads.unbind(), tails.unbind()
        inner = s0 * y0 + (s1 * y1).sum(-1, keepdim=True)
        gamma = ((1 + inner) / 2).sqrt()
        self.w1 = (s1 - y1) / (2 * gamma)
        self.w0 = (1 + self.w1.square().sum(-1, keepdim=True)).sqrt()
        self.eta = (size[0] / size[1]).sqrt()
        self.near = 1 / (1 + self.w0)
        self.size = (size[0] * size[1]).sqrt()
        self.unit_tail = torch.addcmul((gamma + y0) * s1, gamma + s0, y1) / (s0 + y0 + 2 * gamma)
        # lambda's tail and head, in units of its hyperbolic length: the head from the tail, for a
        # length of one
        self.unit_head = (1 + self.unit_tail.square().sum(-1, keepdim=True)).sqrt()
        self.scaled = self.size * torch.cat([self.unit_head, self.unit_tail], -1)

    def weigh(self, x: Tensor) -> Tensor:
        u, scale = self._dual_axis()
        u, scale = u.unsqueeze(1), scale.unsqueeze(1)
        found = 2 * (x * u).sum(-1, keepdim=True) * u
        found[..., :1] -= x[..., :1]
        found[..., 1:] += x[..., 1:]
        return found.mul_(scale)

    def inverse(self) -> Tensor:
        u, scale = self._dual_axis()
        found = 2 * u.unsqueeze(-1) * u.unsqueeze(-2)
        diagonal = found.diagonal(dim1=-2, dim2=-1)
        diagonal[..., :1] -= 1
        diagonal[..., 1:] += 1
        return found * scale.unsqueeze(-1)

    def _dual_axis(self) -> tuple[Tensor, Tensor]:
        """Jw and eta^-2: H^-1 = eta^-2 (2 Jw (Jw)' - J)."""
        return torch.cat([self.w0, -self.w1], -1), self.eta.square().reciprocal()

    def reduce(self, x: Tensor) -> Tensor:
        return self._stretch(
            x, -self.w1.unsqueeze(1), self.w0.unsqueeze(1), self.near.unsqueeze(1)
        ) / self.eta.unsqueeze(1)

    def enlarge(self, x: Tensor) -> Tensor:
        return self._stretch(x, -self.w1, self.w0, self.near) / self.eta

    def _stretch(self, x: Tensor, w1: Tensor, w0: Tensor, near: Tensor) -> Tensor:
        head, tail = x[..., :1], x[..., 1:]
        inner = (w1 * tail).sum(-1, keepdim=True)
        first = torch.addcmul(inner, w0, head)
        return torch.cat([first, torch.addcmul(tail, torch.addcmul(head, inner, near), w1)], -1)

    def correction(
        self, a: Tensor, b: Tensor, ds: Tensor | None, dy: Tensor | None, sigma_mu: Tensor
    ) -> Tensor:
        a0, a1, b0, b1 = a[..., :1], a[..., 1:], b[..., :1], b[..., 1:]
        c0 = (a * b).sum(-1, keepdim=True) - sigma_mu
        c1 = torch.addcmul(a0 * b1, b0, a1)
        h, t = self.unit_head, self.unit_tail
        first = (h * c0 - (t * c1).sum(-1, keepdim=True)) / self.size
        return torch.cat([first, (c1 / self.size - first * t) / h], -1)

    def worst(self, d_s: Tensor, d_y: Tensor) -> Tensor:
        both = torch.stack([d_y, d_s], 1)
        head, tail, h, t = (
            both[..., :1],
            both[..., 1:],
            self.unit_head.unsqueeze(1),
            self.unit_tail.unsqueeze(1),
        )
        first = h * head - (t * tail).sum(-1, keepdim=True)
        rest = tail - (first + head) / (h + 1) * t
        least = (
            first - torch.linalg.vector_norm(rest, dim=-1, keepdim=True)
        ) / self.size.unsqueeze(1)
        return least.flatten(1).amin(1, keepdim=True)


def _hyperbolic(head: Tensor, tail: Tensor) -> Tensor:
    """sqrt(t^2 - |z|^2), as a product; never zero, for a point that rounding has put on the
    boundary."""
    length = torch.linalg.vector_norm(tail, dim=-1, keepdim=True)
    return ((head - length).clamp(min=1e-16 * head.abs()) * (head + length)).sqrt()


class PsdKind(Kind):
    """svec of the psd matrices of n rows, n >= 2."""

    cone: ClassVar[type[Cone]] = Psd

    def __init__(self, count: int, n: int) -> None:
        super().__init__(count, n * (n + 1) // 2, n)
        self.n = n

    @classmethod
    def of(cls, blocks: Sequence[Block]) -> PsdKind:
        return cls(len(blocks), int(blocks[0].parameter or 0))

    def unit(self, like: Tensor) -> Tensor:
        return svec(torch.eye(self.n, dtype=like.dtype, device=like.device)).expand(self.count, -1)

    def inside(self, v: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        values, vectors = _eigh(smat(v))

        def back(values: Tensor) -> Tensor:
            return svec(
                (vectors * values.unflatten(1, (self.count, self.n)).unsqueeze(-2)) @ vectors.mT
            )

        return values.flatten(1), back

    def at(self, s: Tensor, y: Tensor) -> ConeScaling:
        return PsdScaling(s, y, self.n)


class PsdScaling(ConeScaling):
    """W X = R' X R,  with S = LL', L'YL = V Lambda^2 V', R = L V Lambda^-1/2, so that R'YR = R^-1 S R^-T = Lambda.

    Near the central path L'YL is mu I: its eigenvalues are as accurate as the singular values of a
    product of two factors. W and H^-1 are matrices in svec's coordinates; the scaled point is
    diagonal.
    """

    def __init__(self, s: Tensor, y: Tensor, n: int) -> None:
        self.n = n
        both = smat(torch.stack([s, y]))
        S, Y = both.unbind()
        factor, info = torch.linalg.cholesky_ex(S)
        factor = torch.where((info > 0)[..., None, None], torch.nan, factor)
        squares, V = _eigh(factor.mT @ Y @ factor)
        root = squares.clamp(min=1e-16 * squares[..., -1:]).sqrt()  # (B, count, n) lambda
        half = root.sqrt()
        R = (factor @ V) / half.unsqueeze(-2)
        self.R_inverse = (R.mT @ Y) / root.unsqueeze(-1)
        self.values, self.half = root, half
        self.layout = _layout(n, s.dtype, s.device)
        self.back = _congruence(self.R_inverse.mT, self.layout)
        row, column = self.layout.row, self.layout.column
        self.scaled = torch.where(row == column, root[..., row], 0.0)
        self.share = 2 / (root[..., row] + root[..., column])

    def weigh(self, x: Tensor) -> Tensor:
        found = self.inverse()
        if found.shape[1] == 1:
            return torch.matmul(x.squeeze(2), found.squeeze(1)).unsqueeze(2)
        return torch.matmul(x.transpose(1, 2), found).transpose(1, 2)

    def inverse(self) -> Tensor:
        if not hasattr(self, "_inverse"):
            G = self.R_inverse.mT @ self.R_inverse
            self._inverse = _congruence(G, self.layout)
        return self._inverse

    def reduce(self, x: Tensor) -> Tensor:
        return torch.matmul(x.transpose(1, 2), self.back.mT).transpose(1, 2)

    def enlarge(self, x: Tensor) -> Tensor:
        return torch.matmul(x.unsqueeze(-2), self.back).squeeze(-2)

    def correction(
        self, a: Tensor, b: Tensor, ds: Tensor | None, dy: Tensor | None, sigma_mu: Tensor
    ) -> Tensor:
        product = smat(a) @ smat(b)
        product = (product + product.mT) / 2
        product.diagonal(dim1=-2, dim2=-1).sub_(sigma_mu)
        return svec(product) * self.share

    def worst(self, d_s: Tensor, d_y: Tensor) -> Tensor:
        both, half = smat(torch.stack([d_y, d_s], 1)), self.half.unsqueeze(1)
        seen = both / (half.unsqueeze(-1) * half.unsqueeze(-2))
        return _eigvalsh(seen)[..., 0].flatten(1).amin(1, keepdim=True)


def _congruence(R: Tensor, layout: _Layout) -> Tensor:
    """(*, n, n) -> (*, k, k): svec(R' X R) = matrix @ svec(X)."""
    # entry ((i, j), (p, q)) of X -> R'XR is (R_pi R_qj + R_qi R_pj) times scale_ij scale_pq / 2
    columns = R.mT
    left, right = columns[..., layout.row, :], columns[..., layout.column, :]
    found = left[..., layout.row] * right[..., layout.column]
    return found.addcmul_(left[..., layout.column], right[..., layout.row]).mul_(layout.pair)


def _sound(matrix: Tensor) -> Tensor:
    """The identity where a matrix is not finite or too large: LAPACK raises for the whole batch."""
    size = matrix.abs().amax((-2, -1), keepdim=True)
    return torch.where(
        size < LARGEST,
        matrix,
        torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device),
    )


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    return torch.linalg.eigh(_sound(matrix))


def _eigvalsh(matrix: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(_sound(matrix))


@dataclass(frozen=True)
class _Layout:
    row: Tensor  # (k,), i of the k-th coordinate
    column: Tensor  # (k,), j >= i
    pair: Tensor  # (k, k), scale_i scale_j / 2


@constants
def _layout(n: int, dtype: torch.dtype, device: torch.device) -> _Layout:
    column, row = torch.tril_indices(n, n, device=device)
    scale = torch.where(row == column, 1.0, 2.0).to(dtype).sqrt()
    return _Layout(row, column, scale[:, None] * scale / 2)
