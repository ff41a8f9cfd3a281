"""Leading eigenspace of a symmetric matrix: a linear objective on the Fantope."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from convlayer.autodiff.once import once_differentiable
from convlayer.kernels.answer import Answer
from convlayer.kernels.batches import movement

# Rounding alone can part equal eigenvalues by this, in units of eps n |X|.
TIE = 8.0
# Rounding mixes the vectors of eigenvalues this near in the last half of their digits, in units of
# sqrt(eps) n |X|.
NEAR = 0.5


def leading_eigenspace(
    X: Tensor,  # (B, n, n), symmetrised
    k: int,
    largest: bool = True,
) -> Answer:
    """Projector on the k leading eigenvectors; with largest=False the trailing ones, of the
    minimum.

        maximise    <X, Z>
        subject to  tr Z = k,  0 <= Z <= I

    Solution:    Z = U_k U_k' for the eigenvectors of l_1 >= ... >= l_n, and l_k, the eigenvalue at
                 the cut inside the block (for k = 1 the multiplier of the trace).
    Derivative:  only pairs that straddle the cut count: X_bar = sum_{i <= k < j} (u_j'Gu_i) / (l_i
                 - l_j) (u_i u_j' + u_j u_i') with G the symmetrised cotangent of Z; that of l_k
                 adds u_k u_k', averaged over the eigenvalues equal to l_k.
    Second derivative: exact; NaN for Z in rows with a tie at the cut, for l_k where it is repeated.
    Shapes:      X (B, n, n)  ->  Z (B, n, n), l_k (B,).
    Cost:        one eigendecomposition, about 9 n^3 flops, and 2 n^2 k; backward 2 n^2 (5 k) flops.
    At a kink:   l_k - l_{k+1} <= 8 eps n |X|: a face solves. Z is its point of least norm, the
                 projector above the tie plus (k - above) / tied times that of the tied; the pairs
                 that are not tied are differentiated; flagged. So is a gap of up to sqrt(eps) n |X|
                 / 2, where Z is known to half of its digits and less. Eigenvalues repeated inside
                 the block are harmless.
    Errors:      ValueError unless 1 <= k <= n; k = n gives Z = I, of derivative zero.
    Source:      Overton and Womersley (1992); Daleckii and Krein (1965).
    """
    n = X.shape[-1]
    if not 1 <= k <= n:
        raise ValueError(
            f"The number of eigenvectors is k = {k}; expected 1 <= k <= {n} for a {n} x {n} matrix."
        )
    kept: list[Any] = []
    Z, eigenvalue, near, tied = _Eigenspace.apply(X, k, largest, kept)
    local = partial(_perturbed, k, largest, Z, eigenvalue, tied, *kept) if Z.requires_grad else None
    return Answer((Z, eigenvalue), degenerate=near, local=local)


def eigenvector(
    Z: Tensor,  # (*batch, n, n)
) -> Tensor:
    """The unit vector v with Z = v v' and its entry of largest magnitude (the first of equals)
    positive.

    Solution:    v = Z_j / sqrt(Z_jj), with j the largest diagonal entry; differentiable by torch,
                 as often as Z is.
    Shapes:      Z (*batch, n, n)  ->  v (*batch, n).
    At a kink:   where the largest magnitude changes place, v may change sign.
    """
    diagonal = Z.diagonal(dim1=-2, dim2=-1)
    j = diagonal.argmax(-1, keepdim=True)
    column = Z.gather(-1, j.unsqueeze(-2).expand(*Z.shape[:-1], 1)).squeeze(-1)
    return column / diagonal.gather(-1, j).sqrt()


def _perturbed(
    k: int,
    largest: bool,
    Z: Tensor,
    eigenvalue: Tensor,
    tied: Tensor | None,
    l: Tensor,
    U: Tensor,
    weight: Tensor | None,
    X: Tensor,
) -> tuple[Tensor, Tensor]:
    """The outputs Z, l_k in differentiable operations: perturbation theory to second order in what
    moves X.

    With E = U' dX U the block moves to the span of U_a + U_b Y, L_b Y - Y L_a + E_ba + E_bb Y - Y
    E_aa = Y E_ab Y, which two steps by the gaps solve: Y E_ab Y is of third order. In the basis U
    its projector is [I; Y] (I + Y'Y)^-1 [I, Y'].
    """
    block, rest, cut = _sides(X.shape[-1], k, largest)
    half = 0.5 * X
    dX = movement(half + half.mT)
    Ua, Ub = U[..., block], U[..., rest]
    inverse = 1 / (l[:, None, block] - l[:, rest, None])
    if tied is not None:
        inverse = inverse.masked_fill(tied[:, None, None], 0)
    # Y = E_ba / (l_a - l_b),  then  Y + (E_bb Y - Y E_aa) / (l_a - l_b)
    Y = inverse * (Ub.mT @ (dX @ Ua))
    Y = Y + inverse * (Ub.mT @ (dX @ (Ub @ Y)) - Y @ (Ua.mT @ (dX @ Ua)))
    # Z + U_b Y U_a' + U_a Y'U_b' + U_b Y Y'U_b' - U_a Y'Y U_a', the projector to second order in Y
    V = Ub @ Y
    Z = Z.detach() + V @ Ua.mT + Ua @ V.mT + V @ V.mT - Ua @ (V.mT @ V) @ Ua.mT
    if tied is not None and weight is not None:  # the untied pairs of these rows, to first order
        step, gap = (a.unsqueeze(-2) - a.unsqueeze(-1) for a in (weight, l))
        slope = torch.where((step == 0) | ~tied[:, None, None], 0, step / gap)
        Z = Z + U @ (slope * (U.mT @ dX @ U)) @ U.mT + _bent(dX, tied)[:, None, None]
    # dl_k = u_k'dX u_k + sum_j (u_j'dX u_k)^2 / (l_k - l_j), the first averaged over equals
    l_k = l[:, cut, None]
    equal = (l - l_k).abs() <= _tie(l).unsqueeze(-1)
    count = equal.sum(-1, keepdim=True, dtype=l.dtype)
    mean = (U * (equal / count).unsqueeze(-2)) @ U.mT
    coupling = torch.where(equal, 0, 1 / (l_k - l))
    toward = (U.mT @ (dX @ U[..., cut, None])).squeeze(-1)
    eigenvalue = (
        eigenvalue.detach() + (mean * dX).sum((-2, -1)) + (coupling * toward.square()).sum(-1)
    )
    repeated = count.squeeze(-1) > 1
    if repeated.any():
        eigenvalue = eigenvalue + _bent(dX, repeated)
    return Z, eigenvalue


def _bent(zero: Tensor, rows: Tensor) -> Tensor:
    """Zero, with a first derivative of zero; the second, by the `zero` given, is NaN in these rows
    and zero in the others."""
    return 0 * torch.where(rows[:, None, None], zero, 1).pow(1.5).sum((-2, -1))


class _Eigenspace(Function):
    """Z and l_k with their first derivative, and where they have none."""

    @staticmethod
    def forward(
        ctx: Any, X: Tensor, k: int, largest: bool, kept: list[Any]
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        n = X.shape[-1]
        half = 0.5 * X  # halved first: the sum of two huge entries would overflow
        l, U = torch.linalg.eigh(half + half.mT)
        ctx.block, ctx.rest, ctx.cut = _sides(n, k, largest)
        at_cut = l.select(1, ctx.cut).clone()
        weight = tied = near = None
        if k == n:
            Z = torch.eye(n, dtype=X.dtype, device=X.device).repeat(len(X), 1, 1)
        else:
            below = n - k - 1 if largest else k - 1
            gap, tie = l.select(1, below + 1) - l.select(1, below), _tie(l)
            near = gap <= tie * (NEAR / (TIE * torch.finfo(l.dtype).eps ** 0.5))
            if near.any():
                tied = gap <= tie
                ctx.mark_non_differentiable(near, tied)
            else:
                near = None
            if tied is not None and tied.any():
                weight = _weights(l, at_cut, k, largest)
                Z = torch.bmm(U * weight.unsqueeze(-2), U.mT)
            else:
                tied = None
                Uk = U[..., ctx.block]
                Z = Uk * Uk.mT if k == 1 else torch.bmm(Uk, Uk.mT)
        kept += l, U, weight
        ctx.save_for_backward(l, U, weight)
        return Z, at_cut, near, tied

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, Z_bar: Tensor | None, l_bar: Tensor | None, *_: None
    ) -> tuple[Tensor | None, None, None, None]:
        l, U, weight = ctx.saved_tensors
        # X_bar = left U_a' + U_a left', with a the block, or everything where some row has a tie at
        # the cut
        block, rest = (ctx.block, ctx.rest) if weight is None else (slice(None), slice(None))
        Ua, Ub = U[..., block], U[..., rest]
        # left = U_b ((U_b'G U_a) / (l_a - l_b)),  and u_k l_bar / 2 for l_k
        left = None
        if Z_bar is not None and Ub.shape[-1]:
            slope = torch.bmm(
                Ub.mT, torch.bmm(Z_bar, Ua).baddbmm_(Z_bar.mT, Ua, beta=0.5, alpha=0.5)
            )
            gap = l[:, None, block] - l[:, rest, None]
            if weight is None:
                left = torch.bmm(Ub, slope.div_(gap))
            else:  # every pair stands there twice
                step = weight.unsqueeze(-2) - weight.unsqueeze(-1)
                left = torch.bmm(Ub, torch.where(step == 0, 0 * slope, slope * step / gap.mul_(2)))
        if l_bar is not None:
            equal = ((l - l[:, ctx.cut, None]).abs() <= _tie(l).unsqueeze(-1)).to(l.dtype)
            share = equal * (0.5 * l_bar / equal.sum(-1)).unsqueeze(-1)
            by_eigenvalue = Ua * share[:, None, block]
            left = by_eigenvalue if left is None else left.add_(by_eigenvalue)
        if left is None:
            return torch.zeros_like(U), None, None, None
        X_bar = torch.bmm(left, Ua.mT)
        return X_bar + X_bar.mT, None, None, None


def _sides(n: int, k: int, largest: bool) -> tuple[slice, slice, int]:
    """Where in the ascending l the block is, where the rest, and where l_k: the block begins at n -
    k, or ends at k."""
    return (
        (slice(n - k, n), slice(0, n - k), n - k) if largest else (slice(0, k), slice(k, n), k - 1)
    )


def _tie(l: Tensor) -> Tensor:
    """The gap below which eigenvalues count as equal."""
    return l.abs().amax(-1).mul_(TIE * l.shape[-1] * torch.finfo(l.dtype).eps)


def _weights(l: Tensor, at_cut: Tensor, k: int, largest: bool) -> Tensor:
    """Eigenvalues of the point of least norm: 1 above the tie, 0 below it, what is left shared by
    the tied."""
    distance, tie = (
        l - at_cut.unsqueeze(-1) if largest else at_cut.unsqueeze(-1) - l,
        _tie(l).unsqueeze(-1),
    )
    above, equal = (distance > tie).to(l.dtype), (distance.abs() <= tie).to(l.dtype)
    return above + equal * ((k - above.sum(-1, keepdim=True)) / equal.sum(-1, keepdim=True))
