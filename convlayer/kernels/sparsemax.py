"""Projection onto the simplex."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from convlayer.autodiff.once import once_differentiable
from convlayer.kernels.answer import Answer
from convlayer.kernels.batches import movement, sum_to
from convlayer.solution import Status

# Entries this near the threshold count as on it, in units of eps (|t| + r / |S|): that is the
# rounding of t = tau - max y.
TIE = 8.0
# Rounding alone can ask for a step of this size, in the same units.
SLACK = 4.0
# A first threshold of long rows is that of the maxima of blocks of so many entries.
BLOCK = 8
# Up to so many entries one sort costs less than the passes it saves.
SORTED = 2048


def sparsemax(
    y: Tensor,  # (b, n)
    r: Tensor,  # (b,)
) -> Answer:
    """Projection onto the simplex; each b is B or 1.

        minimise    1/2 |x - y|^2
        subject to  x >= 0,  1'x = r

    Solution:    x = max(y - tau, 0), with tau such that 1'x = r.
    Derivative:  on the support S = {i : x_i > 0}, with v, w the cotangents of x and tau:
                 r_bar = mean_S v - w / |S|,  y_bar = 1_S (v - r_bar).
    Second derivative: zero, for the solution is linear on its support; at a kink too, on S.
    Shapes:      y (b, n), r (b,)  ->  x (B, n), tau (B,).
    Cost:        5 flops an entry and pass, at most about seven passes, and 7 more; backward 5. No
                 sort of large rows.
    At a kink:   where |y_i - tau| <= 8 eps (max y - tau + r / |S|), i counts as outside S and the
                 row is flagged. So is r = 0, where x = 0, tau = max y, S is empty and the
                 derivative zero.
    Errors:      r < 0: INFEASIBLE, x = 0 and tau = 0.
    Source:      Michelot (1986); Held, Wolfe and Crowder (1974); Martins and Astudillo (2016).
    """
    x, tau, infeasible, kink, tie = _Sparsemax.apply(y, r)
    local = partial(_on_support, x, tau, tie) if x.requires_grad else None
    if infeasible is None:
        return Answer((x, tau), local=local)
    status = torch.where(infeasible, int(Status.INFEASIBLE), int(Status.SOLVED))
    return Answer((x, tau), status=status, degenerate=kink, local=local)


def _on_support(
    x: Tensor, tau: Tensor, tie: Tensor | None, y: Tensor, r: Tensor
) -> tuple[Tensor, Tensor]:
    """The outputs x, tau in differentiable operations: what the inputs move them by, on their
    support."""
    x, tau = x.detach(), tau.detach()
    support = x > (0 if tie is None else tie)
    size = support.sum(-1, keepdim=True, dtype=x.dtype)
    size = size.masked_fill(size == 0, torch.inf)
    dy, dr = movement(y), movement(r)
    # dtau = (sum_S dy - dr) / |S|,  dx = 1_S (dy - dtau)
    shift = (torch.where(support, dy, 0).sum(-1, keepdim=True) - dr.unsqueeze(-1)) / size
    return x + torch.where(support, dy - shift, 0), tau + shift.squeeze(-1)


class _Sparsemax(Function):
    """x and tau with their first derivative, and where they have none."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, r: Tensor
    ) -> tuple[Tensor, Tensor, *tuple[Tensor | None, ...]]:
        ctx.set_materialize_grads(False)
        ctx.sizes = y.shape[0], r.shape[0]
        top = y.amax(-1, keepdim=True)
        d = y - top  # exact near the maximum, so an offset of y costs nothing
        radius = r.unsqueeze(-1).relu()
        x, threshold, size = _newton(d, radius, _start(d, radius))
        tie = (radius / size - threshold).mul_(TIE * torch.finfo(y.dtype).eps)
        gap = d.sub_(threshold) if d.shape[0] == threshold.shape[0] else d - threshold
        tied = gap.abs_().amin(-1, keepdim=True) <= tie
        tau = top + threshold
        support, infeasible, kink = x, None, None  # the support is where `support` is positive
        if tied.any():  # r <= 0 is among them
            support = x.masked_fill(x <= tie, 0)
            size = support.sign().sum(-1, keepdim=True)
            size.masked_fill_(size == 0, torch.inf)
            infeasible = (r < 0).expand(x.shape[0])
            kink = tied.squeeze(-1) & ~infeasible
            tau = tau.masked_fill(infeasible.unsqueeze(-1), 0)
            ctx.mark_non_differentiable(infeasible, kink, tie)
        ctx.save_for_backward(support, size, infeasible)
        return x, tau.squeeze(-1), infeasible, kink, tie if kink is not None else None

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, v: Tensor | None, w: Tensor | None, *_: None
    ) -> tuple[Tensor | None, Tensor | None]:
        support, size, infeasible = ctx.saved_tensors
        by_y, by_r = ctx.needs_input_grad
        v = torch.zeros_like(support) if v is None else v
        # r_bar = mean_S v - w / |S|
        on_support = torch.ops.aten.threshold_backward(v, support, 0)
        shift = on_support.sum(-1, keepdim=True)
        shift = (shift if w is None else shift - w.unsqueeze(-1)).div_(size)
        r_bar = sum_to(ctx.sizes[1], shift.squeeze(-1)) if by_r else None
        if not by_y:
            return None, r_bar
        # y_bar = 1_S (v - r_bar)
        y_bar = on_support.sub_(shift)
        torch.ops.aten.threshold_backward.grad_input(y_bar, support, 0, grad_input=y_bar)
        if infeasible is not None:
            y_bar = torch.where(infeasible.unsqueeze(-1), 0 * v, y_bar)
        return sum_to(ctx.sizes[0], y_bar), r_bar


def _newton(d: Tensor, r: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x = max(d - t, 0) of sum r, its t and the size of its support, by Newton's method from a t
    not above it.

    The sum is convex and piecewise linear in t, so the iterates rise to the solution and end in
    finitely many.
    """
    unit = SLACK * torch.finfo(d.dtype).eps
    t = t * (1 + 0.25 * unit)
    first = True
    while True:
        # sum_i max(d_i - t, 0) = r:  t <- t + (sum x - r) / |S|
        x = (d - t).relu_()
        support = x.sign()
        size = support.sum(-1, keepdim=True).clamp_(min=1)
        step = (x.sum(-1, keepdim=True) - r).div_(size)
        slack = (r / size - t).mul_(unit)
        moving = step > slack
        if first:  # rounding can put it above
            moving |= step < 0
        if not moving.any():
            break
        if d.numel() > SORTED and 2 * moving.sum() < x.shape[0]:
            # the passes that remain go over the rows that need them
            rows = moving.squeeze(-1).nonzero().squeeze(-1)
            late = _newton(*(part.expand(x.shape[0], -1)[rows] for part in (d, r, t + step)))
            x.addcmul_(support, step, value=-1).relu_()
            whole = x, t + step, size
            return tuple(a.index_copy_(0, rows, b) for a, b in zip(whole, late))  # type: ignore[return-value]
        # stopping short of it: above the solution, entries near it would lose their share
        t, first = t + (step - 0.25 * slack), False
    # the last step is of the size of the rounding of t: taken on x, it is not lost to it
    return x.addcmul_(support, step, value=-1).relu_(), t + step, size


def _start(d: Tensor, r: Tensor) -> Tensor:
    """A threshold not above the solution's, and equal to it where sorting is cheap; d <= 0."""
    n = d.shape[-1]
    if d.numel() <= SORTED:
        mean = (d.sort(-1, descending=True).values.cumsum(-1) - r).div_(
            torch.arange(1, n + 1, device=d.device)
        )
        return mean.amax(-1, keepdim=True)
    bound = torch.maximum((d.sum(-1, keepdim=True) - r).div_(n), -r)
    if n < 8 * BLOCK:
        return bound
    # the maxima of blocks are some of the entries: the threshold of a part is not above that of the
    # whole
    even = n // BLOCK * BLOCK
    maxima = d[:, :even].unflatten(-1, (BLOCK, n // BLOCK)).amax(1)
    if even < n:  # a part without the largest entry, 0, might have none in reach of it
        maxima = torch.cat([maxima, d[:, even:]], -1)
    return torch.maximum(bound, _newton(maxima, r, _start(maxima, r))[1])
