"""First derivatives that refuse to be differentiated, where a second one would come out as silent zeros."""

from __future__ import annotations

import torch
from torch import Tensor


class Once(torch.autograd.Function):
    """A first derivative that refuses to be differentiated again."""

    @staticmethod
    def forward(ctx, bar: Tensor, *sources: Tensor) -> Tensor:
        return bar.clone()

    @staticmethod
    def backward(ctx, bar: Tensor):
        raise RuntimeError(
            "ConvexLayer can be differentiated once, not twice: second derivatives are not implemented, and would be zeros."
        )
