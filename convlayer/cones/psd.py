"""The cone of positive semidefinite matrices, in scaled upper-triangle coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor

from convlayer.cones.cone import Cone, Spectrum, distinct, finite_rows, lift, spectral_weight, split
from convlayer.memo import constants


def svec(matrix: Tensor) -> Tensor:
    """The upper triangle by columns, (0,0), (0,1), (1,1), (0,2), ..., with off-diagonal entries
    times sqrt 2.

    Shapes:      symmetric (*batch, n, n)  ->  (*batch, n (n + 1)/2); the inner products agree.
    """
    layout = _layout(matrix.shape[-1], matrix.dtype, matrix.device)
    return matrix.flatten(-2)[..., layout.upper] * layout.scale


def smat(vector: Tensor) -> Tensor:
    """The symmetric matrix whose `svec` is the vector, (*batch, n (n + 1)/2) -> (*batch, n, n)."""
    n = round((sqrt(8 * vector.shape[-1] + 1) - 1) / 2)
    layout = _layout(n, vector.dtype, vector.device)
    return (vector / layout.scale)[..., layout.place].unflatten(-1, (n, n))


@dataclass(frozen=True)
class Psd(Cone):
    """K = {svec(X) : X an n x n positive semidefinite matrix}, of n (n + 1)/2 rows.

    Solution:    X = Q diag(l) Q'  ->  Q diag(max(l, 0)) Q'.
    Derivative:  H -> Q (W o (Q' H Q)) Q',  W_ij = 1/2 (1 + (l_i + l_j)/(|l_i| + |l_j|)); the basis is H -> Q H Q'.
    Curvature:   differentiating p r + r p = 0 twice, p - r = v:  (|v| K + K |v|)/2 = -(H- o G+ + H+ o G-) in Q's
                 coordinates, H+ = W o H and H- = H+ - H, and A o B = (AB + BA)/2.
    Smoothed:    P and R of the eigenvalues p_i - r_i = l_i with p_i r_i = kappa; W becomes (p_i +
                 p_j)/(p_i + p_j + r_i + r_j).
    Cost:        one eigendecomposition (closed for n <= 2), and (n (n + 1)/2)^2 entries of basis.
    At a kink:   l_i = 0; an eigenvalue in [-tolerance, 0) counts as positive, and W = 1 where l_i =
                 l_j = 0.
    """

    n: int
    name: ClassVar[str] = "psd"
    dims: ClassVar[str] = "psd"
    place: ClassVar[int] = 3

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"A psd cone was given n = {self.n}; expected 1 or more.")

    @property
    def size(self) -> int:  # type: ignore[override]
        return self.n * (self.n + 1) // 2

    def inside(self) -> Tensor:
        """The identity."""
        point = torch.zeros(self.size, dtype=torch.float64)
        point[self.signed] = 1.0
        return point

    @property
    def signed(self) -> list[int]:
        """The diagonal."""
        return [k * (k + 3) // 2 for k in range(self.n)]

    def half_spaces(self, weak: Tensor, step: Tensor) -> list[Tensor]:
        """(e_i +- e_j)'X(e_i +- e_j) >= 0 of the eigenvectors e."""
        layout = _layout(self.n, step.dtype, step.device)
        diagonal = step[layout.row == layout.column]
        i, j = layout.row[weak], layout.column[weak]
        # 2 X_ij, of which a coordinate is sqrt 2 X_ij; X_ii stands on the diagonal already
        off = step[weak] * torch.where(i == j, 0.0, sqrt(2)).to(step).unsqueeze(1)
        return [diagonal[i] + diagonal[j] + off, diagonal[i] + diagonal[j] - off]

    @classmethod
    def read(cls, count: Sequence[int]) -> Sequence[Cone]:
        return [cls(n) for n in count]

    @classmethod
    def describe(cls, cones: Sequence[Cone]) -> str:
        return f"{len(cones)} psd (n = {distinct(cone.parameter for cone in cones)})"

    def project(self, v: Tensor) -> Tensor:
        if self.n == 1:
            return v.clamp(min=0)
        safe, blot = finite_rows(v)
        return self._truncate(v, *_eigh(smat(safe))) + blot

    def linearise(self, v: Tensor, tolerance: float = 0.0) -> tuple[Tensor, Spectrum]:
        if self.n == 1:
            return v.clamp(min=0), Spectrum((v >= -tolerance).to(v.dtype), None)
        safe, blot = finite_rows(v)
        eigenvalues, q = _eigh(smat(safe))
        p = self._truncate(v, eigenvalues, q) + blot
        layout = _layout(self.n, v.dtype, v.device)
        lifted = lift(eigenvalues, tolerance)
        values = spectral_weight(lifted[..., layout.row], lifted[..., layout.column])
        return p, Spectrum(values, _basis(q, layout))

    def curvature(self, v: Tensor, h: Tensor, g: Tensor) -> Tensor:
        if self.n == 1:
            return (v - v) * h * g
        safe, blot = finite_rows(v)
        eigenvalues, q = _eigh(smat(safe))
        # W, 1 - W and 1/(|l_i| + |l_j|) from parts of one sign, which keeps the small ones.
        above, below = eigenvalues.clamp(min=0), (-eigenvalues).clamp(min=0)
        total = _sums(above + below)
        inverse = torch.where(total > 0, 1 / total, 0.0)
        weight, rest = _sums(above) * inverse, _sums(below) * inverse
        h, g = q.mT @ smat(h) @ q, q.mT @ smat(g) @ q
        half = (rest * h) @ (weight * g) + (rest * g) @ (weight * h)
        return svec(q @ ((half + half.mT) * inverse) @ q.mT) + blot

    def smooth(self, v: Tensor, kappa: Tensor) -> tuple[Tensor, Tensor, Spectrum]:
        if self.n == 1:
            p, r = split(v, kappa.unsqueeze(-1))
            return p, r, Spectrum(r / (p + r), None)
        safe, blot = finite_rows(v)
        eigenvalues, q = _eigh(smat(safe))
        p, r = split(eigenvalues, kappa.unsqueeze(-1))
        layout = _layout(self.n, v.dtype, v.device)
        row, column = layout.row, layout.column
        below = r[..., row] + r[..., column]
        spectrum = Spectrum(below / (p[..., row] + p[..., column] + below), _basis(q, layout))
        return _matrix(p, q) + blot, _matrix(r, q) + blot, spectrum

    def margin(self, v: Tensor, p: Tensor) -> Tensor:
        safe, blot = finite_rows(v)
        return _eigh(smat(safe))[0].abs().amin(-1) + blot.squeeze(-1)

    @property
    def parameter(self) -> int:
        return self.n

    def _truncate(self, v: Tensor, eigenvalues: Tensor, q: Tensor) -> Tensor:
        p = _matrix(eigenvalues.clamp(min=0), q)
        return torch.where(eigenvalues.amin(-1, keepdim=True) >= 0, v, p)


def _matrix(eigenvalues: Tensor, q: Tensor) -> Tensor:
    return svec((q * eigenvalues.unsqueeze(-2)) @ q.mT)


def _sums(x: Tensor) -> Tensor:
    """x_i + x_j"""
    return x.unsqueeze(-1) + x.unsqueeze(-2)


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    if matrix.shape[-1] == 1:
        return matrix[..., 0], torch.ones_like(matrix)
    if matrix.shape[-1] > 2:
        return torch.linalg.eigh(matrix)
    a, b, c = matrix[..., 0, 0], matrix[..., 0, 1], matrix[..., 1, 1]
    half = torch.atan2(2 * b, a - c) / 2
    cos, sin = half.cos(), half.sin()
    centre, radius = (a + c) / 2, torch.hypot((a - c) / 2, b)
    q = torch.stack((sin, cos, -cos, sin), -1).unflatten(-1, (2, 2))
    return torch.stack((centre - radius, centre + radius), -1), q


@dataclass(frozen=True)
class _Layout:
    row: Tensor  # (k,), i of the k-th coordinate
    column: Tensor  # (k,), j >= i
    upper: Tensor  # (k,), where it lies in the flat matrix
    place: Tensor  # (n * n,), which coordinate an entry of the flat matrix reads
    scale: Tensor  # (k,), 1 on the diagonal, sqrt 2 off it
    pair: Tensor  # (k, k), scale_i scale_j / 2


def _basis(q: Tensor, layout: _Layout) -> Tensor:
    """H -> Q H Q' in coordinates: entry (k, l) of q_i q_j' is Q_ki Q_lj."""
    rows, columns = q[..., layout.row, :], q[..., layout.column, :]
    basis = rows[..., layout.row] * columns[..., layout.column]
    return basis.addcmul_(rows[..., layout.column], columns[..., layout.row]).mul_(layout.pair)


@constants
def _layout(n: int, dtype: torch.dtype, device: torch.device) -> _Layout:
    column, row = torch.tril_indices(n, n, device=device)
    index = torch.arange(n, device=device)
    low, high = torch.minimum(index[:, None], index), torch.maximum(index[:, None], index)
    scale = torch.where(row == column, 1.0, 2.0).to(dtype).sqrt()
    place = (high * (high + 1) // 2 + low).flatten()
    return _Layout(row, column, row * n + column, place, scale, scale[:, None] * scale / 2)
