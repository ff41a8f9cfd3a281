"""Products and sums of batches in which one row may stand for all; several kernels compute with
them.

Vectors are rows, (F, k, n): F matrices, and k right-hand sides for each. Products with rows are the
faster ones.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mm(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, without the price of broadcasting where there is none."""
    return torch.bmm(left, right) if len(left) == len(right) else left @ right


def sum_to(size: int, gradient: Tensor) -> Tensor:
    """The gradient of an input of batch size `size`: a shared one is summed over the rows."""
    return gradient if size == len(gradient) else gradient.sum(0, keepdim=True)


def outer(size: int, lefts: tuple[Tensor, ...], rights: tuple[Tensor, ...]) -> Tensor:
    """sum_k left_k right_k', (F, n, n): the gradient of a batch of `size` matrices.

    Where one matrix stands for the batch the sum runs over the batch too.
    """
    left, right = torch.cat(lefts, 1), torch.cat(rights, 1)
    if size == 1:
        left, right = left.flatten(0, 1).unsqueeze(0), right.flatten(0, 1).unsqueeze(0)
    return mm(left.mT, right)


def add_rows(whole: Tensor, index: Tensor, part: Tensor) -> Tensor:
    """`whole` with `part` added at these rows, or to the one that stands for all."""
    return whole + part if len(whole) == 1 else whole.index_add(0, index, part)


def regrouped(rows: Tensor, factors: int) -> Tensor:
    """(F, k, n) -> (factors, F k / factors, n): the same rows as right-hand sides of so many
    matrices."""
    if len(rows) == factors:
        return rows
    k = len(rows) * rows.shape[1] // factors if factors else 0
    return rows.reshape(factors, k, rows.shape[2])


def the_others(index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The rows of `count` that are not in `index`, and where each row stands in these followed by
    `index`."""
    mask = torch.ones(count, dtype=torch.bool, device=index.device).index_fill_(0, index, False)
    others = mask.nonzero().flatten()
    return others, torch.cat((others, index)).argsort()


def or_one(size: Tensor) -> Tensor:
    """A size to divide by: one where there is none."""
    return torch.where(size > 0, size, 1.0)


def movement(t: Tensor) -> Tensor:
    """Zero, with the derivatives of t: no rounding of t reaches what it is added to."""
    return t - t.detach()
