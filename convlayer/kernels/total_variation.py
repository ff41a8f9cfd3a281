"""Total-variation denoising on a line: exact taut string by divide and conquer, batched."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from convlayer.autodiff.once import once_differentiable
from convlayer.kernels.answer import Answer
from convlayer.kernels.batches import movement
from convlayer.solution import Status

# The rounding of float64.
EPS = 2.0**-52
# `_certain_knots` looks in windows whose lengths have this ratio; 8 to 32 measure alike.
WINDOW = 16
# A residual is divided by no less than this, where all data are zero.
TINY = 2.0**-1000
# A row is SOLVED up to this residual; rounding leaves some 1e-17.
ACCURATE = 1e-12
# Knots that rounding placed are dropped in so many rounds; one is common with ties.
REPAIRS = 8


def total_variation(
    x: Tensor,  # (B or 1, n)
    lam: Tensor,  # (B or 1,)
) -> Answer:
    """Total-variation denoising on a line (the one-dimensional fused lasso).

        minimise    1/2 |u - x|^2 + lam sum_i |u_{i+1} - u_i|

    Solution:    u is the slope of the taut string: the shortest path through the tube of half-width
                 lam about the running sums of x. Its knots cut u into constant segments; with z_i =
                 sum_{j<=i} (x_j - u_j) the dual, |z_i| <= lam everywhere and z_i = -lam
                 sign(u_{i+1} - u_i) at the knots.
    Derivative:  Pi = the average over each segment, s = the sign of u's step at each knot (0 at the
                 ends): du = Pi dx + dlam (s_right - s_left) / length, the segments being those
                 between the knots.
    Second derivative: zero, for the solution is linear on its segments; at a kink too, on those
                       between the knots.
    Shapes:      x (B or 1, n), lam (B or 1,)  ->  u (B, n). Everything is computed in float64.
    Cost:        a pass is some fifteen sweeps over (B, n); noise takes 3 to 10 passes, the worst
                 case seen (smooth data, n = 1e6) 16. The backward pass is one sum over segments and
                 two sweeps.
    At a kink:   where |z_i| = lam without a step, i is no knot; the row is flagged. "Equal" means
                 to within 4 eps |sum of x over the segment| + eps (32 + 2 sqrt(n)) lam; a step of
                 some roundings of u is flagged too. At lam = 0, u = x and du = dx + dlam times the
                 right derivative; equal neighbours are flagged.
    Errors:      lam < 0 is BAD_INPUT, u = 0.
    Source:      Davies and Kovac (2001) for the taut string; Condat (2013) for its dual conditions.

    Why the passes are exact. Between two knots of the solution stretch a chord. Where the tube
    leaves the chord's one side, then the other's, the string leaves it too, and on each such run
    its greatest distance from the chord is that of the tube: the farthest point of every run is a
    knot. So each pass adds knots of the solution only, one for each run, and ends when every chord
    is inside the tube; rounding alone may add a false one, which has the wrong sign.
    """
    kept: list[Any] = []
    u, status, iterations, residual, degenerate = _TotalVariation.apply(x, lam, kept)
    local = partial(_on_segments, u, *kept) if u.requires_grad else None
    return Answer((u,), status, iterations, residual, degenerate, local=local)


def _on_segments(
    u: Tensor,
    ids: Tensor,
    length: Tensor,
    step: Tensor,
    special: Tensor | None,
    x: Tensor,
    lam: Tensor,
) -> tuple[Tensor]:
    """The output u in differentiable operations: what the inputs move it by, on its segments."""
    moves = movement(x), movement(lam).unsqueeze(1)
    dx, dlam = torch.broadcast_tensors(*(d.double() for d in moves))
    flat = ids.view(-1)
    # a row solved alone may now stand for many
    stacked = dx.reshape(len(dx) // max(1, len(ids)), len(flat))
    # du = the mean of dx over the segment + dlam (s_right - s_left) / length
    sums = dx.new_zeros(len(stacked), len(length)).index_add(1, flat, stacked)
    du = (sums / length).index_select(1, flat).view_as(dx)
    if special is not None:
        du = torch.where(special == 0, dx, du)
    du = du + dlam * (step / length).index_select(0, flat).view_as(ids)
    return (u.detach() + du.to(u.dtype),)


class _TotalVariation(torch.autograd.Function):
    """u with its first derivative, and what is known of its rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lam: Tensor, kept: list[Any]) -> tuple[Tensor, ...]:
        rows, n = 0 if 0 in (len(x), len(lam)) else max(len(x), len(lam)), x.shape[1]
        ctx.shapes, ctx.dtypes = (x.shape[0], lam.shape[0]), (x.dtype, lam.dtype)
        X, lam = x.double().expand(rows, n), lam.double().expand(rows)[:, None]
        ctx.special = bool((lam <= 0).any())  # the one look at the data outside the passes
        if ctx.special:
            X = X.masked_fill(lam < 0, 0.0)
        u, ids, length, step, passes, residual, degenerate = _taut_string(X, lam.clamp(min=0))
        status = (residual > ACCURATE) * int(Status.INACCURATE)
        if ctx.special:
            u = torch.where(lam == 0, X, u)
            bad = lam[:, 0] < 0
            status.masked_fill_(bad, int(Status.BAD_INPUT))
            degenerate &= ~bad
        kept += ids, length, step, lam if ctx.special else None
        ctx.save_for_backward(*kept)
        ctx.mark_non_differentiable(status, passes, residual, degenerate)
        return u.to(torch.promote_types(*ctx.dtypes)), status, passes, residual, degenerate

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u_bar: Tensor, *_: Any) -> tuple[Tensor | None, Tensor | None, None]:
        ids, length, step, lam = ctx.saved_tensors
        v = u_bar.double()
        if ctx.special:
            v = v * (lam >= 0)
        x_bar = lam_bar = None
        flat = ids.view(-1)
        if ctx.needs_input_grad[0]:
            # x_bar = the mean of v over the segment
            sums = v.new_zeros(length.shape).index_add_(0, flat, v.reshape(-1))
            x_bar = (sums / length).index_select(0, flat).view(v.shape)
            if ctx.special:
                x_bar = torch.where(lam == 0, v, x_bar)
            x_bar = x_bar.sum_to_size(ctx.shapes[0], v.shape[1]).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            # lam_bar = sum_i v_i (s_right - s_left) / length
            lam_bar = (step / length).index_select(0, flat).view(v.shape).mul_(v).sum(1)
            lam_bar = lam_bar.sum_to_size(ctx.shapes[1]).to(ctx.dtypes[1])
        return x_bar, lam_bar, None


def _taut_string(x: Tensor, lam: Tensor) -> tuple[Tensor, ...]:
    """Solution, segment of each element, segments' lengths and jumps of sign, passes, residual,
    degenerate.

    Node j of a row lies before element j, 0 <= j <= n; arrays over nodes are (B, n + 1), and the
    element that ends at node j stands at j. So a segment holds the nodes after its left knot up to
    its right knot; the one that leads from a row's last node to the next row's first is a dummy, as
    is segment 0.
    """
    B, n = x.shape
    exponent = x.abs().amax(1, keepdim=True).frexp()[1].clamp(-1000, 1022)
    scale = torch.ldexp(torch.ones_like(lam), exponent)
    # |x| <= 1 (4 at the end of the range), by a power of two: exact
    x = pad(x * scale.reciprocal(), (1, 0))
    lam = (lam / scale).clamp(max=8.0 * n)  # |z| <= 2 n max |x|: beyond that nothing changes
    sums = _running_sums(x)
    knot = torch.zeros(B, n + 1, dtype=torch.bool, device=x.device)
    knot[:, 0] = knot[:, n] = True
    anchor = torch.zeros_like(x)  # the dual at the knots: +-lam, 0 at both ends
    _certain_knots(x, lam, knot, anchor)

    loose, tight = lam * (1 + 1e-9) + 8 * EPS * n, lam * (1 + EPS * (32 + 2 * math.sqrt(n)))
    knots, anchors, half = knot.view(-1), anchor.view(-1), lam.view(-1)
    ids = torch.zeros(B, n + 1, dtype=torch.int32, device=x.device)
    flat, zero = ids.view(-1), torch.zeros(min(B, 1), dtype=torch.int64, device=x.device)
    passes = torch.ones(B, dtype=torch.int64, device=x.device)
    repairs = count = 0
    while True:
        count += 1
        # The slopes between the knots:  u = (the segment's sum of x - the rise of the dual) /
        # length.
        # the knots; q[k], q[k + 1] bound segment k
        q = torch.cat([zero, knots.nonzero().squeeze(1)])
        a, length = anchors[q], torch.diff(q)
        mass = torch.diff(sums.index_select(1, q)).sum(0)
        u = (mass - torch.diff(a)) / length
        torch.cumsum(knots[:-1], 0, dtype=torch.int32, out=flat[1:])
        # The dual z = sum (x - u), and where it leaves the tube.
        r = x - u.index_select(0, flat).view(B, n + 1)
        r[:, 0] = 0
        z = r.cumsum(1)
        c = (z.abs() > loose).gt(knot).view(-1).nonzero().squeeze(1)
        local = z.view(-1)
        if not len(c):
            # The small violations are measured from the segment's own left knot, for z drifts by
            # rounding.
            tol = (4 * EPS) * mass.abs()
            local = local - (local[q] - a).index_select(0, flat)
            height, slack = local.abs().view(B, n + 1), tol.index_select(0, flat).view(B, n + 1)
            c = (height - slack > tight).gt(knot).view(-1).nonzero().squeeze(1)
        # More knots, the farthest point of every run outside;
        if len(c):
            j, side = _farthest(c, local[c], flat[c])
            row = j // (n + 1)
            knots[j], anchors[j], passes[row] = True, torch.copysign(half[row], side), count + 1
            continue
        # or none: those that rounding placed have steps of the dual's sign, and go.
        rise, a = torch.diff(u[1:]), a[2:-1]
        false = ((rise * a >= 0) & (a != 0)).nonzero().squeeze(1)
        if not len(false) or repairs >= REPAIRS:
            break
        repairs += 1
        knots[q[2:-1][false]] = False
        anchors[q[2:-1][false]] = 0.0

    # The verdict: jumps of sign at the knots, kinks within the rounding of a slope, the residual.
    end = q % (n + 1)
    sign = torch.copysign(torch.ones_like(u[:1]), -anchors[q]).masked_fill(
        (end == 0) | (end == n), 0.0
    )
    error = 4 * EPS * (mass.abs() + torch.diff(anchors[q]).abs()) / length
    barely = (rise * sign[2:-1] <= error[1:-1] + error[2:]) & (a != 0)
    degenerate = (height + slack >= 2 * lam - tight).gt(knot).any(1)
    degenerate[q[2:-1][barely] // (n + 1)] = True
    residual = (z.abs().amax(1, keepdim=True) - lam).clamp(min=0) / (
        lam + x.abs().sum(1, keepdim=True) + TINY
    )
    if len(false):  # the repairs ran out: steps against the dual's sign, in units of |x|
        residual[:, 0].scatter_reduce_(0, q[2:-1][false] // (n + 1), rise[false].abs(), "amax")
    solution = (u.index_select(0, flat).view(B, n + 1) * scale)[:, 1:].contiguous()
    return (
        solution,
        ids[:, 1:].contiguous(),
        length,
        torch.diff(sign),
        passes,
        residual[:, 0],
        degenerate,
    )


def _certain_knots(x: Tensor, lam: Tensor, knot: Tensor, anchor: Tensor) -> None:
    """Mark the knots seen without knowing their neighbours, which saves most passes when lam is
    small.

    In any window the string runs at most lam above the tube's axis at both ends. Where the axis
    rises farthest above its own chord, by more than 2 lam, the tube still leaves the chord of the
    highest string there, farthest: a knot. Windows of two elements (a step of more than 4 lam),
    then disjoint ones of WINDOW, WINDOW^2, ...
    """
    n = x.shape[1] - 1
    step = torch.diff(x[:, 1:])
    sharp = step.abs() > 4 * lam
    knot[:, 1:n] |= sharp
    anchor[:, 1:n] = torch.copysign(lam, -step) * sharp
    width = WINDOW
    while 4 * width <= n:
        inside = x[:, 1 : n // width * width + 1].unflatten(1, (-1, width))
        rise = (inside - inside.mean(2, keepdim=True)).cumsum(2)
        far, at = rise.abs().max(2)
        row, window = (far > 2 * lam + 8 * EPS * (lam + width)).nonzero(as_tuple=True)
        at = at[row, window]
        node = window * width + at + 1
        knot[row, node] = True
        anchor[row, node] = torch.copysign(lam[row, 0], rise[row, window, at])
        width *= WINDOW


def _farthest(nodes: Tensor, dual: Tensor, segment: Tensor) -> tuple[Tensor, Tensor]:
    """Of nodes outside the tube, the farthest of each run on one side within one segment; and the
    dual there."""
    key = torch.copysign(segment, dual)
    starts = torch.zeros_like(nodes, dtype=torch.bool)
    torch.ne(key[1:], key[:-1], out=starts[1:])
    run, height = starts.cumsum(0), dual.abs()
    top = torch.zeros_like(height).scatter_reduce_(0, run, height, "amax")
    best = (top[run] == height).nonzero().squeeze(1)
    return nodes[best], dual[best]


def _running_sums(x: Tensor) -> Tensor:
    """Running sums of the rows of (B, n + 1), as (2, B (n + 1)): rounded sums, and what rounding
    left out of them."""
    high = x.cumsum(1)
    before, after = high[:, :-1], high[:, 1:]
    rise = after - before
    back = rise - after
    # after - before = rise + error exactly (Knuth's two-difference)
    error = (after - (rise - back)) - (before + back)
    low = pad((x[:, 1:] - rise) - error, (1, 0)).cumsum(1)
    return torch.stack([high, low]).view(2, -1)
