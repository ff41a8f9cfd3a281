"""The derivative of a root of the residual map, by the factor that polished it.

Cotangents (gx, gy) of x and y:

    J'(w, u) = (gx, D gy),  which is  K (w, eta) = (gx, D^1/2 gy),  u = D^1/2 eta,  and then
    dq = -w    db = u    dA = -(y w' + u x')    dP = -(w x' + x w')/2

Source: the implicit function theorem.
"""

from __future__ import annotations

import torch
from torch import Tensor

from convlayer.conic.polish import Root
from convlayer.conic.program import Program


def adjoint(root: Root, x_bar: Tensor, y_bar: Tensor) -> tuple[Tensor, Tensor]:
    """Cotangents of x (B, n) and y (B, m) -> (w (B, n), u (B, m)), from which those of the data
    follow (see `pull_back`).

    Of (-q, b) that is: a symmetric map, as (x, -y) is the gradient of the optimal value in (q, b).
    So it also takes a change of (-q, b) to that of (x, y).
    """
    w, e = root.system.solve(x_bar, root.spectrum.to_basis(y_bar))
    return w, root.spectrum.from_basis(e)


def pull_back(
    name: str, program: Program, moving: Tensor, x: Tensor, y: Tensor, w: Tensor, u: Tensor
) -> Tensor:
    """Cotangents of the stored entries `moving` of P or A from the adjoint (w, u): (B, entries)."""
    index = program.on(x.device)
    moving = moving.to(x.device)
    if name == "P":
        # -(w_i x_j + w_j x_i)/2; off the diagonal an entry of the stored triangle stands for two
        # of P
        i, j = index["P_rows"][moving], index["P_cols"][moving]
        return -(w[:, i] * x[:, j] + w[:, j] * x[:, i]) * torch.where(i == j, 0.5, 1.0).to(x.dtype)
    # -(y_i w_j + u_i x_j)
    row, col = index["A_rows"][moving], index["A_cols"][moving]
    return -(y[:, row] * w[:, col] + u[:, row] * x[:, col])


def pull_back_whole(name: str, x: Tensor, y: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """The same of all entries: (B, n * n) or (B, m * n)."""
    left, right = ((w, x), (x, w)) if name == "P" else ((y, u), (w, x))
    bar = torch.bmm(torch.stack(left, 2), torch.stack(right, 1)).neg_()
    return (bar.mul_(0.5) if name == "P" else bar).flatten(1)
