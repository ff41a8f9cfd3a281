"""First derivatives that refuse to be differentiated, where a second one would come out as silent
zeros."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from convlayer.autodiff.threads import few_threads_to_differentiate


class Once(torch.autograd.Function):
    """A first derivative that refuses to be differentiated again, with respect to any of its
    sources."""

    @staticmethod
    def forward(ctx, bar: Tensor, *sources: Tensor) -> Tensor:
        return bar.clone()

    @staticmethod
    def backward(ctx, bar: Tensor):
        raise RuntimeError(
            "This derivative of a kernel can be differentiated once, not twice: a second one here would be zeros. The layer has it."
        )


class _Read:
    """A context whose saved tensors are unpacked once: a checkpoint allows no more."""

    def __init__(self, ctx: Any) -> None:
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For an autograd function's `backward`: its results refuse to be differentiated with respect
    to its cotangents.

    With respect to the inputs they must be made to refuse where these enter. torch's decorator of
    the same name gives zeros here. Small work runs on one thread.
    """

    @wraps(backward)
    def guarded(ctx: Any, *bars: Tensor | None) -> Any:
        ctx = _Read(ctx)
        with torch.no_grad(), few_threads_to_differentiate(ctx.saved_tensors):
            results = backward(ctx, *bars)
        sources = [bar for bar in bars if bar is not None and bar.requires_grad]
        if not torch.is_grad_enabled() or not sources:
            return results
        return tuple(None if result is None else Once.apply(result, *sources) for result in results)

    return guarded
