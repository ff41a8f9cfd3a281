"""What the kernels' own laws share."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def differences(f: Callable[..., Tensor], args: Sequence[Tensor], k: int, h: float) -> Tensor:
    """Central differences of order four, with step h, of a scalar function of the k-th tensor."""

    def at(i, step):
        moved = args[k].clone()
        moved.view(-1)[i] += step
        return f(*args[:k], moved, *args[k + 1 :])

    slopes = [
        (8 * (at(i, h) - at(i, -h)) - at(i, 2 * h) + at(i, -2 * h)) / (12 * h)
        for i in range(args[k].numel())
    ]
    return torch.stack(slopes).view_as(args[k])


def close(a: Tensor, b: Tensor, tol: float) -> None:
    """Equal to a tolerance relative to the largest entry."""
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tol * b.abs().max()
