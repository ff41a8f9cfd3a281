"""What the interior point iterates on: the program itself, or its dual, and what the embedding's
equations leave at a point.

    minimise 1/2 x'Px + q'x  subject to  Ax + s = b,  s >= 0 or in its cones,  Ex = e,   v = (x, u)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convlayer.conic.program import take_rows
from convlayer.solvers.product import Cones, Pairs, Weight


@dataclass(frozen=True, eq=False)
class Form(ABC):
    """minimise 1/2 x'Px + q'x subject to Ax + s = b, s >= 0, Ex = e, with v = (x, u): matrices
    shared by all rows have B = 1."""

    base: Tensor  # (B or 1, N, N) [ P  E' ; E  0 ]
    c: Tensor  # (B, N) (q, -e)
    b: Tensor  # (B, l)
    gradient: Tensor  # (B, N) (q, e)
    c_size: Tensor  # (B, N) against which residuals are measured
    b_size: Tensor  # (B, l)
    n: int  # of x
    curved: bool  # P is not zero
    cones: Cones  # that the first rows of s lie in; the others are nonnegative

    def rows(self, index: Tensor):
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        chosen: dict[str, Any] = {
            name: take_rows(v, index) for name, v in parts.items() if isinstance(v, Tensor)
        }
        return replace(self, **chosen)

    @property
    def degree(self) -> int:
        """Of the barrier of s and kappa."""
        return self.cones.degree + self.b.shape[1] - self.cones.rows + 1

    def P_times(self, x: Tensor) -> Tensor:
        """(B, n) -> (B, n)"""
        return row_products(x.unsqueeze(1), self.base[:, : self.n, : self.n]).squeeze(1)

    @abstractmethod
    def A_times(self, v: Tensor) -> Tensor:
        """(B, k, N) -> (B, k, l)"""

    @abstractmethod
    def At_times(self, y: Tensor) -> Tensor:
        """(B, k, l) -> (B, k, N), zero beyond x"""

    @abstractmethod
    def add_weighted(self, K: Tensor, weight: Weight) -> None:
        """K (B, N, N) += A'H^-1 A"""

    @abstractmethod
    def ray_error(self, v: Tensor) -> Tensor:
        """(B, 1) error of a ray as a certificate, beyond Px = 0 and Ax <= 0."""


@dataclass(frozen=True, eq=False)
class PrimalForm(Form):
    """The program itself."""

    A: Tensor  # (B or 1, l, n)
    # (B or 1, n, l) contiguous: a row times a matrix runs at twice the speed of a matrix times a
    # column
    At: Tensor
    entries: Tensor  # (B or 1, nnz) of A, where `pairs` is there
    terms: Tensor  # (B or 1, terms) A[left] A[right]
    pairs: Pairs | None

    @classmethod
    def of(
        cls, P: Tensor, q: Tensor, C: Tensor, b: Tensor, p: int, cones: Cones, pairs: Pairs | None
    ) -> PrimalForm:
        n, E, A, e = P.shape[1], C[:, :p], C[:, p:], b[:, :p]
        base, c, gradient = P, q, q
        if p:
            base = P.new_zeros(max(len(P), len(C)), n + p, n + p)
            base[:, :n, :n], base[:, n:, :n], base[:, :n, n:] = P, E, E.mT
            c, gradient = torch.cat([q, -e], 1), torch.cat([q, e], 1)
        curved, terms, entries = bool((P != 0).any()), C[:, :0, 0], C[:, :0, 0]
        if pairs is not None:
            entries, flat = A[:, pairs.rows, pairs.columns], C.flatten(1)
            terms = flat.index_select(1, pairs.left) * flat.index_select(1, pairs.right)
        At = A.mT.contiguous()
        return cls(
            base,
            c,
            b[:, p:],
            gradient,
            c.abs(),
            b[:, p:].abs(),
            n,
            curved,
            cones,
            A,
            At,
            entries,
            terms,
            pairs,
        )

    def A_times(self, v: Tensor) -> Tensor:
        if self.pairs is not None:
            into = v.new_zeros(*v.shape[:2], self.A.shape[1])
            return into.index_add_(
                2,
                self.pairs.rows,
                v.index_select(2, self.pairs.columns) * self.entries.unsqueeze(1),
            )
        return row_products(v[..., : self.n] if v.shape[2] > self.n else v, self.At)

    def At_times(self, y: Tensor) -> Tensor:
        if self.pairs is not None:
            into = y.new_zeros(*y.shape[:2], self.c.shape[1])
            return into.index_add_(
                2,
                self.pairs.columns,
                y.index_select(2, self.pairs.rows) * self.entries.unsqueeze(1),
            )
        found, p = row_products(y, self.A), self.c.shape[1] - self.n
        return torch.constant_pad_nd(found, (0, p)) if p else found

    def add_weighted(self, K: Tensor, weight: Weight) -> None:
        if self.pairs is not None:
            self._add_terms(K, weight)
            return
        block, weighted = K[:, : self.n, : self.n], weight(self.At)
        if len(self.A) == 1:
            block += weighted @ self.A[0]
        else:
            block.baddbmm_(weighted, self.A)

    def _add_terms(self, K: Tensor, weight: Weight) -> None:
        pairs, n = self.pairs, self.n
        assert pairs is not None
        values = weight.flat().index_select(1, pairs.source) * self.terms
        if K.shape[1] == n:
            K.view(len(K), -1).index_add_(1, pairs.target, values)
            return
        block = K.new_zeros(len(K), n * n).index_add_(1, pairs.target, values)
        K[:, :n, :n] += block.view(-1, n, n)

    def ray_error(self, v: Tensor) -> Tensor:
        return v.new_zeros(len(v), 1)


@dataclass(frozen=True, eq=False)
class DualForm(Form):
    """minimise 1/2 z'Gz + h'z  subject to  z >= 0 but for the first k: the dual, with G = C P^-1 C', h = b + C P^-1 q.

    Its A is minus the last rows of the identity, its slack is z, and its multiplier is the primal's
    slack.
    """

    free: int
    # (B or 1, m, n) for the primal's certificate C'z = 0, which Gz = 0 says with half the digits
    C: Tensor
    size: Tensor  # (B, 1) of b

    def A_times(self, v: Tensor) -> Tensor:
        return -v[..., self.free :]

    def At_times(self, y: Tensor) -> Tensor:
        return torch.constant_pad_nd(-y, (self.free, 0)) if self.free else -y

    def add_weighted(self, K: Tensor, weight: Weight) -> None:
        weight.add_to(K[:, self.free :, self.free :])

    def ray_error(self, v: Tensor) -> Tensor:
        return (
            row_products(v.unsqueeze(1), self.C).squeeze(1).abs().sum(1, keepdim=True) * self.size
        )


def row_products(rows: Tensor, matrix: Tensor) -> Tensor:
    """(B, k, i) and (B or 1, i, j) -> (B, k, j)."""
    return torch.matmul(rows, matrix[0]) if len(matrix) == 1 else torch.bmm(rows, matrix)


class EmbeddingResidual(NamedTuple):
    """What the embedding's equations leave, and what the tests of a row's end need beside it."""

    v: Tensor  # (B, N)
    s: Tensor  # (B, l)
    tau: Tensor  # (B, 1)
    gap: Tensor  # (B, 1) relative
    Px: Tensor | None  # (B, n), None for zero
    homogeneous: Tensor  # (B, N) (Px + E'u + A'y, Ex)
    Ax_s: Tensor  # (B, l)
    cv: Tensor  # (B, 1) q'x + e'u
    by: Tensor  # (B, 1)


def embedding_residual(form: Form, v: Tensor, Y: Tensor, S: Tensor) -> EmbeddingResidual:
    """Of the embedding's equations at v (B, N), Y = (y, tau) and S = (s, kappa) (B, l + 1):

    r_v    =  base v + A'y + c tau
    r_s    =  A v + s - b tau
    r_tau  =  q'x + e'u + b'y + x'Px / tau + kappa
    """
    n, l = form.n, form.b.shape[1]
    (y, tau), (s, kappa) = Y.split_with_sizes((l, 1), 1), S.split_with_sizes((l, 1), 1)
    total = form.At_times(y.unsqueeze(1)).squeeze(1)
    Px = None
    if form.c.shape[1] > n:
        x = v[:, :n]
        total = total + row_products(v.unsqueeze(1), form.base).squeeze(1)
        if form.curved:
            Px = form.P_times(x)
    elif form.curved:
        x, Px = v, form.P_times(v)
        total = total + Px
    xPx = dot(x, Px) if Px is not None else torch.zeros_like(tau)
    Ax_s = form.A_times(v.unsqueeze(1)).squeeze(1) + s
    cv, by, curve = dot(form.gradient, v), dot(form.b, y), xPx / tau
    r_tau = cv + by + curve
    gap = r_tau.abs() / torch.maximum((curve / 2 + by).abs(), tau)
    r_v, r_s = torch.addcmul(total, form.c, tau), torch.addcmul(Ax_s, form.b, tau, value=-1)
    return EmbeddingResidual(r_v, r_s, r_tau + kappa, gap, Px, total, Ax_s, cv, by)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """(B, k) and (B, k) -> (B, 1)"""
    return (a * b).sum(1, keepdim=True)


def largest_entry(values: Tensor) -> Tensor:
    """(B, k) -> (B, 1), of its absolute values; zero of none."""
    if not values.shape[1]:
        return values.new_zeros(len(values), 1)
    return values.abs().amax(1, keepdim=True)
