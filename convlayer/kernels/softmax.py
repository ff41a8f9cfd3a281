"""Entropy on the simplex: softmax with a temperature and a radius."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from convlayer.kernels.answer import Answer
from convlayer.once import once_differentiable
from convlayer.solution import Status


def softmax(
    theta: Tensor,  # (b, n)
    tau: Tensor,  # (b,), temperature
    r: Tensor,  # (b,), radius
) -> Answer:
    """Linear objective with an entropy, on the simplex; each b is B or 1.

        maximise    theta'y + tau * sum_i entr(y_i)
        subject to  1'y = r,  y >= 0

    Solution:    y = r p with p = softmax(theta / tau), of relative accuracy in every entry above underflow;
                 the multiplier of 1'y = r is nu = tau (log sum_j exp(theta_j / tau) - log r - 1),
                 so that theta - tau (1 + log y) - nu = 0.
    Derivative:  with v, w the cotangents of y and nu:  r_bar = p'v - tau w / r,  theta_bar = y o (v - r_bar) / tau,
                 tau_bar = -theta_bar'(1 + log y).
    Shapes:      theta (b, n), tau (b,), r (b,)  ->  y (B, n), nu (B,).
    Cost:        one exponential and about 9 flops an entry forward, 8 backward (12 where tau has a gradient).
    At a kink:   r = 0 is the edge of the domain: y = 0, dy/dr = p, nu = +inf without a gradient; flagged.
    Errors:      tau <= 0 or r < 0: BAD_INPUT, y = 0 and nu = 0.
    Source:      Boyd and Vandenberghe (2004), example 3.25 (the conjugate of log-sum-exp).
    """
    lowest = torch.minimum(tau, r)
    if not lowest.numel() or lowest.amin().item() > 0:
        return Answer(_Softmax.apply(theta, tau, r, None, None))
    rows = torch.broadcast_shapes(theta.shape[:1], tau.shape, r.shape)
    bad = ((tau <= 0) | (r < 0)).expand(rows)
    edge = (r == 0).expand(rows) & ~bad
    status = torch.where(bad, int(Status.BAD_INPUT), int(Status.SOLVED))
    return Answer(_Softmax.apply(theta, tau, r, bad, edge), status=status, degenerate=edge)


class _Softmax(Function):
    @staticmethod
    def forward(
        ctx: Any, theta: Tensor, tau: Tensor, r: Tensor, bad: Tensor | None, edge: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.sizes = theta.shape[0], tau.shape[0], r.shape[0]
        if bad is not None:  # these rows are computed with tau = r = 1, which keeps p at hand, and emptied at the end
            tau, r = torch.where(tau <= 0, 1, tau), torch.where(r <= 0, 1, r)
        tau, r = tau.unsqueeze(-1), r.unsqueeze(-1)
        top = theta.amax(-1, keepdim=True)
        # the maximum is subtracted before the division: theta / tau would round the exponent by eps |theta| / tau
        exponent = theta - top
        exponent = exponent.div_(tau) if tau.shape[0] in (1, theta.shape[0]) else exponent / tau
        total = exponent.exp_().sum(-1, keepdim=True)
        largest = r / total
        y = exponent.mul_(largest) if largest.shape[0] == exponent.shape[0] else exponent * largest
        log_largest = largest.log()
        nu = torch.addcmul(top - tau, tau, log_largest, value=-1).squeeze(-1)  # the stationarity of the largest entry
        empty = bad | edge if bad is not None and edge is not None else None
        by_tau = (theta, top, log_largest) if ctx.needs_input_grad[1] else (None, None, None)
        ctx.save_for_backward(y, tau, r, empty, *by_tau)
        if bad is None or empty is None:
            return y, nu
        return y.masked_fill(empty.unsqueeze(-1), 0), nu.masked_fill(empty, torch.inf).masked_fill(bad, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor | None, w: Tensor | None) -> tuple[Tensor | None, ...]:
        y, tau, r, empty, theta, top, log_largest = ctx.saved_tensors
        by_theta, by_tau, by_r = ctx.needs_input_grad[:3]
        v = torch.zeros_like(y) if v is None else v
        slope = v * y
        mean = slope.sum(-1, keepdim=True).div_(r)
        # centred twice: near a vertex v - p'v cancels in the largest entry, (v - c) - p'(v - c) with c = p'v does not
        torch.sub(v, mean, out=slope)
        rest = (slope * y).sum(-1, keepdim=True).div_(r)
        if w is not None:
            w = w.unsqueeze(-1) if empty is None else w.masked_fill(empty, 0).unsqueeze(-1)
            rest = rest - w * (tau / r)
        r_bar = _sum_to(ctx.sizes[2], (mean + rest).squeeze(-1)) if by_r else None
        if not (by_theta or by_tau):
            return None, None, r_bar, None, None
        theta_bar = slope.sub_(rest).mul_(y).div_(tau)
        if empty is not None:
            theta_bar *= (~empty).unsqueeze(-1)
        tau_bar = None
        if by_tau:
            # log p up to a constant; bounded, since 0 * inf would be NaN where p underflows
            height = (theta - top).clamp_(min=torch.finfo(y.dtype).min)
            tau_bar = -(theta_bar * height).sum(-1, keepdim=True) / tau
            if w is not None:
                tau_bar = tau_bar - w * (1 + log_largest)
            tau_bar = _sum_to(ctx.sizes[1], tau_bar.squeeze(-1))
        return _sum_to(ctx.sizes[0], theta_bar) if by_theta else None, tau_bar, r_bar, None, None


def _sum_to(size: int, gradient: Tensor) -> Tensor:
    """The gradient of an input of batch size `size`: a shared one is summed over the rows."""
    return gradient if size == len(gradient) else gradient.sum(0, keepdim=True)
