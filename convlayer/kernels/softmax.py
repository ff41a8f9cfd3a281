"""Entropy on the simplex: softmax with a temperature and a radius."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from convlayer.autodiff.once import once_differentiable
from convlayer.autodiff.torch_internals import softmax_backward
from convlayer.kernels.answer import Answer
from convlayer.kernels.batches import sum_to
from convlayer.solution import Status

# The backward pass goes over blocks of so many numbers: fresh memory for a whole array costs more
# than the arithmetic.
CACHED = 262_144
# exp(-VANISHED) is zero in every precision.
VANISHED = 1000.0


def softmax(
    theta: Tensor,  # (b, n)
    tau: Tensor | None = None,  # (b,), temperature; None: one
    r: Tensor | None = None,  # (b,), radius; None: one
    multiplier: bool = True,  # whether nu is wanted
) -> Answer:
    """Linear objective with an entropy, on the simplex; each b is B or 1.

        maximise    theta'y + tau * sum_i entr(y_i)
        subject to  1'y = r,  y >= 0

    Solution:    y = r p with p = softmax(theta / tau), of relative accuracy in every entry above
                 underflow; the multiplier of 1'y = r is nu = tau (log sum_j exp(theta_j / tau) -
                 log r - 1), so that theta - tau (1 + log y) - nu = 0.
    Derivative:  with v, w the cotangents of y and nu:  r_bar = p'v - tau w / r,  theta_bar = y o (v - r_bar) / tau,
                 tau_bar = -theta_bar'(1 + log y).
    Second derivative: exact, of the solution written as an expression; at r = 0 too, of y.
    Shapes:      theta (b, n), tau (b,), r (b,)  ->  y (B, n), nu (B,) if it is wanted.
    Cost:        torch's own softmax forward and two passes for the temperature, two more for nu;
                 eight passes backward.
    At a kink:   r = 0 is the edge of the domain: y = 0, dy/dr = p, nu = +inf without a gradient;
                 flagged.
    Errors:      tau <= 0 or r < 0: BAD_INPUT, y = 0 and nu = 0.
    Source:      Boyd and Vandenberghe (2004), example 3.25 (the conjugate of log-sum-exp).
    """
    given = [t for t in (tau, r) if t is not None]
    if all(not t.numel() or t.amin().item() > 0 for t in given):
        outputs = _outputs(_Softmax.apply(theta, tau, r, multiplier, None, None))
        return Answer(
            outputs, local=partial(_expression, multiplier) if outputs[0].requires_grad else None
        )
    tau, r = (theta.new_ones(1) if t is None else t for t in (tau, r))
    rows = 0 if 0 in (len(theta), len(tau), len(r)) else max(len(theta), len(tau), len(r))
    bad = ((tau <= 0) | (r < 0)).expand(rows)
    edge = (r == 0).expand(rows) & ~bad
    status = torch.where(bad, int(Status.BAD_INPUT), int(Status.SOLVED))
    outputs = _outputs(_Softmax.apply(theta, tau, r, multiplier, bad, edge))
    local = partial(_expression, multiplier) if outputs[0].requires_grad else None
    return Answer(outputs, status=status, degenerate=edge, local=local)


def _outputs(both: tuple[Tensor, Tensor | None]) -> tuple[Tensor, ...]:
    """y, and nu if it was wanted."""
    return tuple(output for output in both if output is not None)


def _expression(
    multiplier: bool, theta: Tensor, tau: Tensor | None = None, r: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The outputs in differentiable operations; relative to the largest entry, so that nothing
    cancels near a vertex."""
    tau, r = (theta.new_ones(1) if t is None else t for t in (tau, r))
    bad, empty = (tau <= 0) | (r < 0), r <= 0
    top = theta.gather(-1, theta.argmax(-1, keepdim=True))
    gap, scale = theta - top, torch.where(tau <= 0, 1, tau).unsqueeze(-1)
    # the others are left out, since 0 * inf would be NaN where e underflows
    near = gap > -VANISHED * scale
    e = torch.where(near, (torch.where(near, gap, 0) / scale).exp(), 0)
    total = e.sum(-1, keepdim=True)
    y = torch.where(bad, 0, r).unsqueeze(-1) * (e / total)
    if not multiplier:
        return (y,)
    nu = top + scale * (total.log() - torch.where(empty, 1, r).log().unsqueeze(-1) - 1)
    return y, torch.where(bad, 0, torch.where(empty, torch.inf, nu.squeeze(-1)))


class _Softmax(Function):
    """y and nu with their first derivative, in as few passes as they take."""

    @staticmethod
    def forward(
        ctx: Any,
        theta: Tensor,
        tau: Tensor | None,
        r: Tensor | None,
        multiplier: bool,
        bad: Tensor | None,
        edge: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.sizes = tuple(1 if t is None else t.shape[0] for t in (theta, tau, r))
        if (
            bad is not None
            # these rows are computed with tau = r = 1, which keeps p at hand, and emptied at the end
        ):
            tau, r = (None if t is None else torch.where(t <= 0, 1, t) for t in (tau, r))
        tau, r = (None if t is None else t.unsqueeze(-1) for t in (tau, r))
        by_tau = ctx.needs_input_grad[1]
        top = theta.amax(-1, keepdim=True) if tau is not None or multiplier else None
        exponent = theta
        if tau is not None and top is not None:
            # the maximum is subtracted before the division: theta / tau would round the exponent by
            # eps |theta| / tau
            exponent = theta - top
            exponent = exponent.div_(tau) if tau.shape[0] in (1, theta.shape[0]) else exponent / tau
        # p = softmax(theta / tau),  y = r p
        p = torch.softmax(exponent, -1)
        y = p if r is None else p * r
        nu = log_largest = None
        if (multiplier or by_tau) and top is not None:
            # the stationarity of the largest entry:  nu = theta_i - tau (1 + log y_i)
            log_largest = y.amax(-1, keepdim=True).log()
            if tau is None:
                nu = top - 1 - log_largest
            else:
                nu = torch.addcmul(top - tau, tau, log_largest, value=-1)
            nu = nu.squeeze(-1)
        empty = bad | edge if bad is not None and edge is not None else None
        ctx.save_for_backward(
            p, tau, r, empty, *((theta, top, log_largest) if by_tau else (None, None, None))
        )
        if empty is not None and bad is not None:
            y = y.masked_fill(empty.unsqueeze(-1), 0)
            nu = None if nu is None else nu.masked_fill(empty, torch.inf).masked_fill(bad, 0)
        return y, nu if multiplier else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor | None, w: Tensor | None) -> tuple[Tensor | None, ...]:
        p, tau, r, empty, theta, top, log_largest = ctx.saved_tensors
        by_theta, by_tau, by_r = ctx.needs_input_grad[:3]
        v = torch.zeros_like(p) if v is None else v
        mean, theta_bar = _pulled_back(p.expand_as(v), v)
        if w is not None:
            w = w.unsqueeze(-1) if empty is None else w.masked_fill(empty, 0).unsqueeze(-1)
        # r_bar = p'v - tau w / r
        r_bar = None
        if by_r:
            r_bar = mean if w is None else mean - w * (1 if tau is None else tau) / r
            r_bar = sum_to(ctx.sizes[2], r_bar.squeeze(-1))
        if not (by_theta or by_tau):
            return None, None, r_bar, None, None, None
        # theta_bar = y o (v - r_bar) / tau = p o (v - p'v) r / tau + p w
        if r is not None:
            theta_bar = theta_bar * r if r.shape[0] > theta_bar.shape[0] else theta_bar.mul_(r)
        if tau is not None:
            theta_bar = (
                theta_bar / tau if tau.shape[0] > theta_bar.shape[0] else theta_bar.div_(tau)
            )
        if w is not None:
            theta_bar = theta_bar + p * w
        if empty is not None:
            theta_bar = theta_bar * (~empty).unsqueeze(-1)
        # tau_bar = -theta_bar'(1 + log y), with log y = (theta - top) / tau + log max y
        tau_bar = None
        if by_tau:
            # bounded, since 0 * inf would be NaN where p underflows
            height = (theta - top).clamp_(min=torch.finfo(p.dtype).min)
            tau_bar = -(theta_bar * height).sum(-1, keepdim=True) / tau
            if w is not None:
                tau_bar = tau_bar - w * (1 + log_largest)
            tau_bar = sum_to(ctx.sizes[1], tau_bar.squeeze(-1))
        return (
            sum_to(ctx.sizes[0], theta_bar) if by_theta else None,
            tau_bar,
            r_bar,
            None,
            None,
            None,
        )


def _pulled_back(p: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(p'v, p o (s - p's)) with s = v - p'v; on the CPU by blocks of rows that the cache holds.

    Near a vertex v - p'v cancels in the largest entry, and centring what is left once more makes
    that exact.
    """
    rows = max(1, CACHED // max(1, v.shape[1]))
    if v.is_cuda or v.shape[0] <= rows:
        mean = torch.linalg.vecdot(v, p).unsqueeze(-1)
        return mean, softmax_backward(v - mean, p)
    bars, means, spare = (
        torch.empty_like(v, memory_format=torch.contiguous_format),
        v.new_empty(len(v), 1),
        v.new_empty(rows, v.shape[1]),
    )
    for one, other, mean, bar in zip(*(t.split(rows) for t in (v, p, means, bars)), strict=True):
        product = torch.mul(one, other, out=spare[: len(one)])
        torch.sum(product, -1, keepdim=True, out=mean)
        softmax_backward(torch.sub(one, mean, out=product), other, out=bar)
    return means, bars
