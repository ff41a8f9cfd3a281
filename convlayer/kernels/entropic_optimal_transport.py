"""Entropic optimal transport: a plan between two marginals, by temperature continuation and a
semi-dual Newton method.

Vectors along a side are (B, 1, m) or (B, 1, n) throughout: a row vector times a matrix is several
times faster in a batched product than a matrix times a column.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, log
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convlayer.autodiff.once import once_differentiable
from convlayer.kernels.accuracy import ACCURACY
from convlayer.kernels.answer import Answer
from convlayer.kernels.batches import movement, sum_to
from convlayer.solution import Status

# The totals of the two marginals may differ by this share.
MASSES = {torch.float32: 1e-5, torch.float64: 1e-9}
# A zero marginal is this share of the total: small enough not to be seen in any other sum.
ABSENT = 1e-100
# The Schur complement is factorised up to this length of the shorter side; above, conjugate
# gradients serve.
DENSE = 512


@dataclass(frozen=True)
class _Continuation:
    """The way from a high temperature, where the problem is easy, to that of the problem."""

    # Costs / temperature in a range of at most this need no higher temperature.
    spread: float = 30.0
    # The ratio of successive temperatures.
    cooling: float = 4.0
    # Sweeps of Sinkhorn at each temperature: Newton takes fewer than five steps from there.
    sweeps: int = 10
    # Newton ends with a step of at most this in log u, at every temperature but the last.
    basin: float = 0.1


@dataclass(frozen=True)
class _Newton:
    """Steps in log u, which is the potential / temperature."""

    # No more steps are taken at one temperature.
    steps: int = 60
    # A row is given up when steps longer than 1 have led it further than this at one temperature.
    far: float = 200.0
    # A factor serves while log u has moved by at most this since it was made. A step of less that
    # is not half as long as the one before is rounding.
    reuse: float = 0.02
    # Up to this size a new factor costs less than the steps it saves: it serves for less far.
    small: int = 50
    renew: float = 1e-4
    # At the last temperature Newton ends where the error of log u is predicted to be at most this.
    exact: float = 1e-14
    # A pivot of the scaled Schur complement, whose diagonal is at most 2, is no pivot below this:
    # the row is flagged, and `shift` added to the diagonal, so that steps along links that rounding
    # hides stay bounded.
    singular: float = 1e-10
    shift: float = 1e-12


@dataclass(frozen=True)
class _Conjugate:
    """Conjugate gradients, where the Schur complement is not factorised; residuals are relative."""

    # They end at this residual in a step of Newton's method.
    inexact: float = 1e-4
    # They end at this residual in a derivative.
    adjoint: float = 1e-14
    # No more steps are taken.
    steps: int = 3000
    # The preconditioner divides by the diagonal, or by this where that is smaller.
    diagonal: float = 1e-11


@dataclass(frozen=True)
class _Verdict:
    """What makes a row what it is, beside the relative errors of `ACCURACY`."""

    # A row is SOLVED up to this relative residual of the marginals, and INACCURATE up to the other.
    solved: float = 1e-10
    inaccurate: float = 1e-6
    # Costs / eps up to this are rounded by too little to move an entry of a plan by
    # `ACCURACY.sensitive`.
    sharp: float = 1e8
    # Sweeps that look for rows whose mass has nowhere to go.
    trials: int = 200


CONTINUATION, NEWTON, CONJUGATE, VERDICT = _Continuation(), _Newton(), _Conjugate(), _Verdict()
# A derivative smaller than this share of the terms that it is the difference of is worked out to
# its own digits.
CANCELLED = 1e-3


def entropic_optimal_transport(
    M: Tensor,  # (B or 1, m, n) costs; +inf forbids a pair
    r: Tensor,  # (B or 1, m) >= 0
    c: Tensor,  # (B or 1, n) >= 0
    eps: Tensor,  # (B or 1,) > 0
) -> Answer:
    """Entropy-regularised optimal transport.

        minimise    <M, P> + eps sum_ij P_ij log P_ij
        subject to  P 1 = r,  P'1 = c,  P >= 0

    Solution:    P_ij = exp((f_i + g_j - M_ij) / eps - 1).
    Duals:       (-f, -g) are the multipliers of L = objective + lambda'(P 1 - r) + mu'(P'1 - c), so
                 (f, g) is the gradient of the optimal value in (r, c). A constant may move between
                 f and g: they are the pair of least norm, sum f = sum g (in each connected
                 component of the allowed pairs, where some are forbidden).
    Derivative:  V = dL/dP, q1 = (P o V)1 + eps f_bar, q2 = (P o V)'1 + eps g_bar, both cotangents balanced as f and g are,
                 S = diag(r) - P diag(1/c) P',  a = S^+ (q1 - P(q2/c)),  b = (q2 - P'a)/c;  then
                 dM -> -(P o (V - a 1' - 1 b'))/eps,  dr -> a,  dc -> b,  deps -> <dM, log P + 1>.
                 (r, c) moves on sum r = sum c only: (a, b) is the orthogonal projection on its tangent space,
                 sum a = sum b (in each component).
    Shapes:      M (B, m, n), r (B, m), c (B, n), eps (B,)  ->  P (B, m, n), f (B, m), g (B, n).
    Cost:        k = min(m, n), l = max(m, n): ten sweeps of 4kl flops at each of 1 +
                 log_4(range(M)/(30 eps)) temperatures, then three to fifteen factorisations of k^2
                 l + k^3/6 multiplications; backward, no factorisation: 7 passes over P, and for
                 each of 1 to 12 corrections 2 passes and 2k^2 flops. Above k = 512, conjugate
                 gradients instead of a factor. Always in float64 inside. Kept for backward: P, the
                 factor (k, k), the marginals.
    Second derivative: by two steps of the chord method on the potentials with S above, r and c
                 projected as above; from the right in a zero marginal.
    Zero mass:   P is 0 in that row or column and its f_i or g_j is reported as 0 (it is -inf); the
                 derivative in its marginal is the one from the right, flagged where that derivative
                 is asked for.
    Forbidden:   P = 0 and no gradient; where the other pairs cannot carry the masses, INFEASIBLE.
                 Where they can only with some allowed P_ij = 0, the duals do not exist: P is right,
                 f and g are finite, the row is flagged.
    At a kink:   there is none; but where a plan falls apart into blocks whose links carry less than
                 1e-10 of their mass (a permutation, at small eps), the links are below rounding: P
                 and dM are right in absolute terms, f, g, dr and dc only inside each block, and the
                 row is flagged. So is one whose costs / eps are so large that their rounding moves
                 P by more than 3e-8 of itself.
    Errors:      eps <= 0, a negative or infinite marginal, a cost of -inf: BAD_INPUT; sum r and sum
                 c further apart than 1e-9 of the total (float32: 1e-5): INFEASIBLE, nearer ones are
                 made equal by scaling c.
    Source:      Cuturi (2013); Schmitzer (2019) for the stabilised kernel; Brauer, Clason, Lorenz
                 and Wirth (2017) for Newton; Sun and Tran-Dinh (2019) for its damping; Eisenberger
                 et al. (2022) for the derivative.
    """
    if 0 in (len(M), len(r), len(c), len(eps)):
        outputs = _nothing(M, r, c, eps)
        return Answer(outputs, local=_nothing if outputs[0].requires_grad else None)
    held: list[_Held] = []
    P, f, g, status, iterations, residual, degenerate = _Transport.apply(held, M, r, c, eps)
    local = partial(_by_chord_steps, held[0], f, g) if P.requires_grad else None
    return Answer(
        (P, f, g),
        status,
        iterations,
        residual,
        degenerate,
        local=local,
        apart=partial(_apart, r, c, len(P)),
    )


def _apart(r: Tensor, c: Tensor, batch: int) -> Tensor:
    """(B,) the difference of the two masses, relative to the larger."""
    total, other = r.detach().double().sum(1), c.detach().double().sum(1)
    return ((total - other).abs() / torch.maximum(total, other)).nan_to_num(0.0).expand(batch)


def _nothing(M: Tensor, r: Tensor, c: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs of an empty batch."""
    P = M * r.unsqueeze(2) * c.unsqueeze(1) * eps.view(-1, 1, 1)
    return P, P.sum(2), P.sum(1)


class _Held(NamedTuple):
    """What `_by_chord_steps` reads, all of it kept for backward too; m <= n."""

    P: Tensor
    factor: Tensor
    rho: Tensor
    c: Tensor  # (B, 1, n) column sums of P
    refinements: int
    absent: tuple[Tensor, Tensor] | None
    blocks: tuple[Tensor, Tensor] | None
    failed: Tensor | None  # (B, 1, 1) bool
    flipped: bool


class _Transport(torch.autograd.Function):
    """The plan and the potentials, with the first derivative by the factor of the last Newton
    step."""

    @staticmethod
    def forward(
        ctx: Any, held: list[_Held], M: Tensor, r: Tensor, c: Tensor, eps: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.sizes, ctx.dtype = (len(M), len(r), len(c), len(eps)), M.dtype
        ctx.flipped = M.shape[1] > M.shape[2]
        if ctx.flipped:
            M, r, c = M.mT, c, r
        task = _posed(M, r, c, eps)
        plan, status = _judged(task, _solved(task))
        P, (f, g), degenerate = plan.P, _potentials(task, plan, status), plan.degenerate
        if task.absent is not None:
            no_row, no_column = task.absent
            P = P.masked_fill(no_row.mT, 0.0).masked_fill_(no_column, 0.0)
            if any(ctx.needs_input_grad[2:4]):
                degenerate = degenerate | (no_row.any(2) | no_column.any(2)).view(-1) & (
                    status < Status.INFEASIBLE
                )
        ctx.refinements, ctx.absent, ctx.blocks = plan.refinements, task.absent, task.blocks
        rest = (status, plan.iterations, plan.residual, degenerate)
        ctx.mark_non_differentiable(*rest)
        kept = plan.P
        if ctx.flipped:
            P, f, g, kept = P.mT, g, f, kept.mT
        outputs = P.to(ctx.dtype), f.squeeze(1).to(ctx.dtype), g.squeeze(1).to(ctx.dtype)
        # the output itself is saved where it is the plan: saving a view of it would count as a
        # second tensor
        kept = outputs[0] if task.absent is None and ctx.dtype == kept.dtype else kept
        c = task.c * task.total
        ctx.save_for_backward(kept, plan.factor, plan.rho, c, task.eps)
        failed = None if task.status is None else status.view(-1, 1, 1) >= Status.INFEASIBLE
        held.append(
            _Held(
                plan.P,
                plan.factor,
                plan.rho,
                c,
                plan.refinements,
                task.absent,
                task.blocks,
                failed,
                ctx.flipped,
            )
        )
        return (*outputs, *rest)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, P_bar: Tensor | None, f_bar: Tensor | None, g_bar: Tensor | None, *_: Any
    ):
        if P_bar is None and f_bar is None and g_bar is None:
            return None, None, None, None, None
        P, factor, rho, c, eps = ctx.saved_tensors
        if ctx.flipped:
            P, P_bar, f_bar, g_bar = P.mT, None if P_bar is None else P_bar.mT, g_bar, f_bar

        # q1 = (P o V) 1 + eps f_bar,  q2 = (P o V)'1 + eps g_bar
        PV, q1, q2 = None, torch.zeros_like(rho), torch.zeros_like(c)
        if P_bar is not None:
            PV = P * P_bar
            q1, q2 = PV.sum(2).unsqueeze(1), PV.sum(1, keepdim=True)
        if f_bar is not None or g_bar is not None:
            df = q1.new_zeros(q1.shape) if f_bar is None else f_bar.to(q1.dtype).unsqueeze(1)
            dg = q2.new_zeros(q2.shape) if g_bar is None else g_bar.to(q2.dtype).unsqueeze(1)
            df, dg = _balanced(df, dg, ctx.blocks, ctx.absent)
            q1, q2 = torch.addcmul(q1, eps, df), torch.addcmul(q2, eps, dg)

        # dr = a,  dc = b
        a, b = _eliminated(P, factor, rho, c, q1, q2, ctx.refinements, ctx.blocks)
        a, b = _balanced(a, b, ctx.blocks, None)

        # dM = -P o (V - a 1' - 1 b') / eps,  deps = <dM, log P + 1>
        dM = deps = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[4]:
            if P_bar is None or PV is None or f_bar is not None or g_bar is not None:
                dM = (a.mT + b).mul_(P)
                dM = (dM if PV is None else dM.sub_(PV)).div_(eps)
            else:
                dM = _centred(P, P_bar, PV, a, b, factor, rho, c, ctx).div_(-eps)
            if ctx.absent is not None:
                dM = dM.masked_fill_(ctx.absent[0].mT | ctx.absent[1], 0.0)
            if ctx.needs_input_grad[4]:
                log_P = P.clamp_min(torch.finfo(P.dtype).tiny).log_()
                deps = log_P.add_(1.0).mul_(dM).sum((1, 2))

        if ctx.flipped:
            dM, a, b = None if dM is None else dM.mT, b, a
        gradients = (dM, a.squeeze(1), b.squeeze(1), deps)
        needed = zip(gradients, ctx.sizes, ctx.needs_input_grad[1:], strict=True)
        bars = (
            sum_to(size, t).to(ctx.dtype) if t is not None and need else None
            for t, size, need in needed
        )
        return None, *bars


def _eliminated(
    P: Tensor,
    factor: Tensor,
    rho: Tensor,
    c: Tensor,
    q1: Tensor,
    q2: Tensor,
    refinements: int,
    blocks: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """(a, b) with diag(rho) a + P b = q1 and P'a + diag(c) b = q2:  S a = q1 - P (q2 / c),  b = (q2 - P'a) / c."""
    right = q1 - torch.bmm(q2 / c, P.mT)
    a = _adjoint(P, factor, rho, c, right, refinements, blocks)
    return a, (q2 - torch.bmm(a, P)) / c


def _centred(
    P: Tensor,
    V: Tensor,
    PV: Tensor,
    a: Tensor,
    b: Tensor,
    factor: Tensor,
    rho: Tensor,
    c: Tensor,
    ctx: Any,
) -> Tensor:
    """P o (V - a 1' - 1 b'). Where it nearly cancels, as it does for a plan near a vertex, it is
    centred once more: the operator that takes V there is as small as its result, and so is what it
    makes of the rounding in V - a 1' - 1 b'."""
    W = V - a.mT - b
    PW = P * W
    if bool((PW.abs().amax((1, 2)) < CANCELLED * PV.abs().amax((1, 2))).any()):
        q1, q2 = PW.sum(2).unsqueeze(1), PW.sum(1, keepdim=True)
        more, beside = _eliminated(P, factor, rho, c, q1, q2, ctx.refinements, ctx.blocks)
        PW.sub_((more.mT + beside).mul_(P))
    return PW


@dataclass(frozen=True, eq=False)
class _Task:
    """The problem in units of its mass and of eps, m <= n; rows that are not to be solved hold
    something harmless."""

    # (B or 1, m, n) >= 0: the costs / eps less `low` and `base`; a zero in every row and column;
    # +inf forbids
    C: Tensor
    low: Tensor  # (B or 1, 1, m) taken off M
    base: Tensor  # (B or 1, 1, n) taken off M
    r: Tensor  # (B, 1, m) > 0, sum 1
    c: Tensor  # (B, 1, n) > 0, sum 1
    total: Tensor  # (B, 1, 1) the mass
    eps: Tensor  # (B, 1, 1)
    spread: Tensor  # (B or 1, 1, 1) the largest finite entry of C
    widest: float  # over the batch
    status: Tensor | None  # (B,) of what is known before solving; None: nothing
    # (B, 1, m) and (B, 1, n) bool, zero marginals; None: there are none
    absent: tuple[Tensor, Tensor] | None
    # (B, 1, m) and (B, 1, n) int64, connected components; None: everything is one
    blocks: tuple[Tensor, Tensor] | None


def _posed(M: Tensor, r: Tensor, c: Tensor, eps: Tensor) -> _Task:
    """The task, by a short way where every row is plain: positive marginals of one mass, finite
    costs."""
    dtype = M.dtype
    B = max(len(M), len(r), len(c), len(eps))
    M, eps = M.double(), eps.double().view(-1, 1, 1)
    masses = r, c = r.double().unsqueeze(1), c.double().unsqueeze(1)
    total, other = r.sum(2, keepdim=True), c.sum(2, keepdim=True)
    C, low, base = _reduced(M, eps)
    spread = C.amax((1, 2), keepdim=True)
    r, c = r / total, c / other
    # one number tells the plain case: the widest range of costs, or NaN for anything else
    plain = (r.amin(2, True) > ABSENT) & (c.amin(2, True) > ABSENT) & (eps > 0)
    plain = plain & ((total - other).abs_() < MASSES[dtype] * total)
    widest = torch.where(plain, spread, torch.nan).max().item()
    if widest < torch.inf:
        total, eps, none = total.expand(B, 1, 1), eps.expand(B, 1, 1), (None, None, None)
        return _Task(
            C,
            low,
            eps * base,
            r.expand(B, -1, -1),
            c.expand(B, -1, -1),
            total,
            eps,
            spread,
            widest,
            *none,
        )
    M, r, c, eps = (t.expand(B, -1, -1) for t in (M, *masses, eps))
    return _special(M, r, c, eps, MASSES[dtype])


def _reduced(M: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(M - low) / eps - base with a zero in every row and column, `low` of the rows and `base` of
    the columns."""
    low = M.amin(2).unsqueeze(1)
    C = (M - low.mT) / eps
    base = C.amin(1, keepdim=True)
    return C.sub_(base), low, base


def _special(M: Tensor, r: Tensor, c: Tensor, eps: Tensor, tolerance: float) -> _Task:
    """The same where some row is wrong, infeasible, holds zero marginals or forbidden pairs."""
    # Rows that are wrong or cannot be: they hold ones and zeros from here on.
    total, other = r.sum(2, keepdim=True), c.sum(2, keepdim=True)
    bad = ~(
        (r >= 0).all(2, True)
        & (c >= 0).all(2, True)
        & (eps > 0)
        & (eps < torch.inf)
        & (total + other < torch.inf)
    )
    bad |= ~(M.amin((1, 2), keepdim=True) > -torch.inf)
    infeasible = ~((total - other).abs() <= tolerance * torch.maximum(total, other))
    status = torch.where(infeasible, int(Status.INFEASIBLE), int(Status.SOLVED))
    status = torch.where(bad, int(Status.BAD_INPUT), status)
    failed = status != Status.SOLVED
    M, r, c = M.masked_fill(failed, 0.0), r.masked_fill(failed, 1.0), c.masked_fill(failed, 1.0)
    eps, total, other = eps.masked_fill(failed, 1.0), r.sum(2, keepdim=True), c.sum(2, keepdim=True)

    # Zero marginals: next to nothing instead, and known.
    absent = r <= ABSENT * total, c <= ABSENT * other
    empty = total == 0
    total, other = total.masked_fill(empty, 1.0), other.masked_fill(empty, 1.0)
    r, c = (r / total).clamp_min(ABSENT), (c / other).clamp_min(ABSENT)

    # Forbidden pairs: each connected component of the others has a mass of its own.
    blocks = None
    if bool(M.isposinf().any()):
        M = _attached(_attached(M, absent[0], c).mT, absent[1], r).mT
        blocks = _components(~M.isposinf(), *absent)
        c, unequal = _rescaled(r, c, blocks, absent, tolerance)
        status = torch.where(unequal & ~failed, int(Status.INFEASIBLE), status)
        failed = status != Status.SOLVED
        M = M.masked_fill(failed, 0.0)

    C, low, base = _reduced(M, eps)
    spread = torch.where(C.isposinf(), 0.0, C).amax((1, 2), keepdim=True)
    known = absent if bool(absent[0].any() | absent[1].any()) else None
    return _Task(
        C,
        low,
        eps * base,
        r,
        c,
        total,
        eps,
        spread,
        spread.max().item(),
        status.view(-1),
        known,
        blocks,
    )


def _attached(M: Tensor, absent: Tensor, c: Tensor) -> Tensor:
    """Costs in which every absent row may reach one column at least."""
    alone = absent.mT & M.isposinf().all(2, True)
    first = torch.zeros_like(M, dtype=torch.bool).scatter_(
        2, c.argmax(2, keepdim=True).expand(-1, M.shape[1], 1), True
    )
    return M.masked_fill(alone & first, 0.0)


def _components(allowed: Tensor, no_row: Tensor, no_column: Tensor) -> tuple[Tensor, Tensor]:
    """The connected components of the allowed pairs by the largest row in each; absent rows and
    columns join, not link."""
    B, m, _ = allowed.shape
    rows = torch.arange(1, m + 1, device=allowed.device).view(1, 1, m).expand(B, 1, m)
    links = allowed & ~no_row.mT & ~no_column
    while True:
        columns = (links * rows.mT).amax(1, keepdim=True)
        reached = torch.maximum(rows, (links * columns).amax(2).unsqueeze(1))
        reached = torch.maximum(reached, reached.gather(2, (reached - 1)))
        if torch.equal(reached, rows):
            break
        rows = reached
    live = allowed & ~no_row.mT
    columns = torch.where(no_column, (live * rows.mT).amax(1, keepdim=True), columns)
    joined = (allowed * columns).amax(2).unsqueeze(1)
    return torch.where(no_row & (joined > 0), joined, rows), columns


def _sums(f: Tensor, labels: Tensor, rows: int) -> Tensor:
    """The sum of f over each component, at its label."""
    return f.new_zeros(len(f), 1, rows + 1).scatter_add(2, labels, f)


def _rescaled(
    r: Tensor,
    c: Tensor,
    blocks: tuple[Tensor, Tensor],
    absent: tuple[Tensor, Tensor],
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """c with the mass of r in each component, and (B, 1, 1) where they differ by too much."""
    m = r.shape[2]
    given, taken = (
        _sums(r.masked_fill(absent[0], 0.0), blocks[0], m),
        _sums(c.masked_fill(absent[1], 0.0), blocks[1], m),
    )
    unequal = ((given - taken).abs() > tolerance * torch.maximum(given, taken)).any(2, True)
    ratio = torch.where((taken > 0) & ~unequal, given / taken, 1.0)
    return torch.where(absent[1], c, c * ratio.gather(2, blocks[1])), unequal


def _balanced(
    f: Tensor, g: Tensor, blocks: tuple[Tensor, Tensor] | None, absent: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """The orthogonal projection of (f, g) on sum f = sum g in every component; what is absent is 0
    and not counted."""
    if absent is None and blocks is None:
        shift = (g.sum(2, keepdim=True) - f.sum(2, keepdim=True)) / (f.shape[2] + g.shape[2])
        return f + shift, g - shift
    if blocks is None:
        blocks = torch.zeros_like(f, dtype=torch.int64), torch.zeros_like(g, dtype=torch.int64)
    if absent is None:
        absent = torch.zeros_like(f, dtype=torch.bool), torch.zeros_like(g, dtype=torch.bool)
    f, g = f.masked_fill(absent[0], 0.0), g.masked_fill(absent[1], 0.0)
    m = f.shape[2]
    count = _sums((~absent[0]).to(f.dtype), blocks[0], m) + _sums(
        (~absent[1]).to(f.dtype), blocks[1], m
    )
    shift = (_sums(g, blocks[1], m) - _sums(f, blocks[0], m)) / count.clamp_min(1.0)
    f, g = f + shift.gather(2, blocks[0]), g - shift.gather(2, blocks[1])
    return f.masked_fill(absent[0], 0.0), g.masked_fill(absent[1], 0.0)


@dataclass(frozen=True, eq=False)
class _Plan:
    """A solution in the units of its task."""

    P: Tensor  # (B, m, n) with the mass, absent marginals at ABSENT
    phi: Tensor  # (B, 1, m) and
    gamma: Tensor  # (B, 1, n): P = r c exp(phi + gamma - C), all in units of the mass and of eps
    rho: Tensor  # (B, 1, m) row sums of P; its column sums are c
    # (B, m, m) Cholesky factor of the scaled Schur complement near P; (B, 0, 0): m > DENSE
    factor: Tensor
    refinements: int  # that make up for the way from there to P
    iterations: Tensor  # (B,)
    residual: Tensor  # (B,)
    degenerate: Tensor  # (B,)


def _solved(task: _Task) -> _Plan:
    """Sweeps and Newton steps at falling temperatures; each starts where the line through the last
    two points leads.

    Source: Schmitzer (2019), the kernel with the potentials absorbed.
    """
    C, r, c = task.C, task.r, task.c
    # Temperatures in units of eps: hot, hot^((levels - 1) / levels), .., 1.
    hot = (task.spread / CONTINUATION.spread).clamp_min(1.0)
    widest = max(task.widest, 1.0) / CONTINUATION.spread
    levels = max(0, ceil(log(widest) / log(CONTINUATION.cooling)))
    phi, gamma = torch.zeros_like(r), torch.zeros_like(c)
    iterations = torch.zeros(r.shape[0], dtype=torch.int64, device=r.device)
    before: tuple[Tensor, Tensor, Tensor] | None = None
    tau = hot
    for level in range(levels, -1, -1):
        cooler = hot ** (level / levels) if level else torch.ones_like(hot)

        # K = exp((phi + gamma - C) / tau), the potentials where the last two temperatures point.
        if level == levels:
            K = torch.exp(C / -cooler).expand(r.shape[0], -1, -1).contiguous()
        else:
            here = phi, gamma, tau
            if before is not None:
                # rows that need fewer temperatures stand still: 0 / 0
                ahead = 1.0 + ((cooler - tau) / (tau - before[2])).nan_to_num_(0.0, 0.0, 0.0)
                phi = torch.lerp(before[0], phi, ahead)
                gamma = torch.lerp(before[1], gamma, ahead)
            before = here
            K, phi, gamma = _kernel(phi, gamma, C, cooler)
        tau, Kt = cooler, K.mT

        # Sinkhorn:  u = r / K v,  v = c / K'u.
        v = c
        for _ in range(CONTINUATION.sweeps):
            u = r / torch.bmm(v, Kt)
            v = c / torch.bmm(u, K)

        # Newton, and what it finds goes into the potentials:  P = diag(u) K diag(v).
        end, drift = _newton(K, u, v, r, c, task.blocks, level == 0)
        iterations += end.steps + CONTINUATION.sweeps
        phi, gamma = phi + tau * (end.u / r).log_(), gamma + tau * (end.v / c).log_()

    rho = end.u * torch.bmm(end.v, Kt)
    residual = (r / rho - 1.0).abs_().amax((1, 2))
    P = K.mul_((task.total * end.u).mT).mul_(end.v)
    return _Plan(
        P,
        phi,
        gamma,
        task.total * rho,
        end.factor,
        _refinements(drift),
        iterations,
        residual,
        end.pivot < NEWTON.singular,
    )


def _refinements(drift: float) -> int:
    """Of a solve with a factor that errs by 4 drift: so many that the error is that of an exact
    step."""
    rate = min(max(4.0 * drift, 1e-9), 0.1)
    return max(1, ceil(log(NEWTON.exact) / log(rate)) - 1)


def _kernel(phi: Tensor, gamma: Tensor, C: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp((phi + gamma - C) / tau) with a 1 in every row and column and no entry above, and the
    potentials that give it."""
    E = (phi.mT + gamma).sub_(C).div_(tau)
    high = E.amax(2, keepdim=True)
    top = E.sub_(high).amax(1, keepdim=True)
    return E.sub_(top).exp_(), phi - tau * high.mT, gamma - tau * top


@dataclass(frozen=True, eq=False)
class _End:
    """Where Newton's method left each row."""

    u: Tensor  # (B, 1, m)
    v: Tensor  # (B, 1, n), with c = v o (u K)
    factor: Tensor  # (B, m, m); (B, 0, 0) above DENSE
    pivot: Tensor  # (B,) the factor's smallest; 0 where conjugate gradients failed
    far: Tensor  # (B,) how far log u went in steps longer than 1
    steps: Tensor  # (B,) int64

    def updated(self, which: Tensor, rows: _End) -> _End:
        """With these rows in the place of some."""
        return _End(
            *(getattr(self, name).index_copy(0, which, getattr(rows, name)) for name in _FIELDS)
        )


_FIELDS = tuple(_End.__dataclass_fields__)


def _newton(
    K: Tensor,
    u: Tensor,
    v: Tensor,
    r: Tensor,
    c: Tensor,
    blocks: tuple[Tensor, Tensor] | None,
    last: bool,
) -> tuple[_End, float]:
    """Damped Newton on the semi-dual, the transport's dual with the columns' potentials eliminated:

        maximise    D(log u) = r'log u - c'log(K'u)

    Columns:     v = c / K'u, so that P = diag(u) K diag(v) has the column sums c.
    Gradient:    r - rho, with rho = u o K v the row sums of P.
    Hessian:     -S, with S = diag(rho) - P diag(1/c) P', the Laplacian of a graph whose links are
                 P's.
    Factor:      stretching every link by at most e^h stretches S by at most e^h, whatever its
                 condition. So a factor made when log u was d away errs by 4 d at most, relatively,
                 in every direction.

    Also returned: the largest d of a row at its end.
    """
    dense = K.shape[1] <= DENSE
    reuse = NEWTON.reuse if K.shape[1] > NEWTON.small else NEWTON.renew
    Kt, drift, drifted = K.mT, torch.inf, 0.0
    factor, pivot = K.new_empty(len(K), 0, 0), r[:, 0, 0]
    far, previous = r.new_zeros(len(r)), r.new_full((len(r),), torch.inf)
    live: Tensor | None = None  # of all rows those that are still here; None: every one
    ends: _End | None = None
    for step in range(1, NEWTON.steps + 1):
        # The direction:  S x = r - rho, in units of w = rho^-1/2 on both sides.
        rho = u * torch.bmm(v, Kt)
        w = rho.rsqrt()
        if dense:
            if not drift <= reuse:
                factor, pivot = _factorised(K, u * w, v * c.rsqrt(), rho.sqrt(), blocks)
                drift = 0.0
            x = _solve(factor, (r - rho) * w) * w
        else:
            x, reached = _conjugate(
                K, u * w, v * v / c, rho.sqrt(), (r - rho) * w, CONJUGATE.inexact, blocks
            )
            x, pivot = x * w, torch.where(reached, torch.inf, 0.0)
            drift = CONJUGATE.inexact / 4

        # Damping:  a step longer than 1 goes log(1 + |x|) far.
        size = x.abs().amax((1, 2))
        low, top = torch.stack(torch.aminmax(size)).tolist()
        if not top <= 1.0:
            length = torch.where(size > 1.0, size.log1p(), 0.0)
            far = far + length
            x = x * torch.where(size > 1.0, length / size, 1.0).view(-1, 1, 1)

        # The step:  log u <- log u + x,  v = c / K'u.
        u = u * x.exp_()
        v = c / torch.bmm(u, K)

        # Rows that end here: all of them, or those that have arrived, or are rounding, or lost.
        ended, done = 0, None
        if step == NEWTON.steps or _has_arrived(top, drift, last):
            ended = len(size)
        elif not low > (NEWTON.reuse if last else CONTINUATION.basin) or top == torch.inf:
            # below `reuse` a step is at most a tenth of the one before, unless rounding made it
            stuck = (size < NEWTON.reuse) & (size > 0.5 * previous)
            lost = ~((far < NEWTON.far) & (size < torch.inf))
            done = _has_arrived(size, drift, last) | stuck | lost
            ended = int(done.sum())
        if ended:
            drifted = max(drifted, drift + (top if done is None else size[done].max().item()))
        if dense:
            drift += top if top <= 1.0 else torch.inf
        previous = size
        if not ended:
            continue
        kept = factor if last else factor[:, :0, :0]
        steps = torch.full_like(size, step, dtype=torch.int64)
        end = _End(u, v, kept, pivot, far, steps)
        ends = end if ends is None or live is None else ends.updated(live, end)
        if done is None or ended == len(size):
            break

        # The others go on.
        stay = torch.nonzero(~done).view(-1)
        live = stay if live is None else live[stay]
        K, u, v, r, c, factor, pivot, far, previous = (
            t[stay] for t in (K, u, v, r, c, factor, pivot, far, previous)
        )
        Kt, blocks = K.mT, blocks and (blocks[0][stay], blocks[1][stay])
    assert ends is not None  # the last step ends every row
    return ends, drifted


def _has_arrived(size: Any, drift: float, last: bool) -> Any:
    """Whether a step of this size (a number, or one for each row) needs none after it.

    The next one would be about size^2 long by Newton's method, and 4 drift size by the factor's
    age.
    """
    if not last:
        return size <= CONTINUATION.basin
    return size * (size + 4.0 * drift) <= NEWTON.exact


def _factorised(
    K: Tensor, a: Tensor, b: Tensor, s: Tensor, blocks: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """The Cholesky factor of I - Q Q' + s s', Q = diag(a) K diag(b): S scaled by its row sums, its
    null vector s filled in."""
    Q = (K * a.mT).mul_(b)
    N = s.mT * s
    if blocks is not None:
        same = (blocks[0].mT == blocks[0]).to(K.dtype)
        N = N * same / torch.bmm(s * s, same).mT
    S = torch.baddbmm(N, Q, Q.mT, alpha=-1.0)
    S.diagonal(dim1=1, dim2=2).add_(1.0)
    factor, info = torch.linalg.cholesky_ex(S)
    pivot = torch.where(info > 0, 0.0, factor.diagonal(dim1=1, dim2=2).amin(1).square())
    singular = ~(pivot >= NEWTON.singular)
    if bool(singular.any()):
        S.diagonal(dim1=1, dim2=2).add_(NEWTON.shift * singular.unsqueeze(1))
        shifted, _ = torch.linalg.cholesky_ex(S)
        factor = torch.where(singular.view(-1, 1, 1), shifted, factor)
    return factor, pivot


def _solve(factor: Tensor, h: Tensor) -> Tensor:
    """x with x L L' = h; two triangular solves copy less than one with the factor."""
    half = torch.linalg.solve_triangular(factor.mT, h, upper=True, left=False)
    return torch.linalg.solve_triangular(factor, half, upper=False, left=False)


def _conjugate(
    P: Tensor,
    a: Tensor,
    b: Tensor,
    s: Tensor,
    h: Tensor,
    tolerance: float,
    blocks: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """x with (I - Q Q') x = h, Q Q' = diag(a) P diag(b) P' diag(a), by conjugate gradients; and
    which rows got there.

    The scaled Schur complement as in `_factorised`, with null vector s in each component: h loses
    what it has of that.
    """
    scale = (1.0 - a * a * torch.bmm(b, (P * P).mT)).clamp_min_(CONJUGATE.diagonal)
    labels = torch.zeros_like(h, dtype=torch.int64) if blocks is None else blocks[0]
    share = _sums(h * s, labels, h.shape[2]) / _sums(s * s, labels, h.shape[2]).clamp_min(ABSENT)
    h = h - s * share.gather(2, labels)
    x, residual = torch.zeros_like(h), h
    z = residual / scale
    p, fall = z, (residual * z).sum(2, keepdim=True)
    goal = fall * tolerance**2
    for step in range(CONJUGATE.steps):
        if step % 10 == 0 and not bool((fall > goal).any()):
            break
        Sp = p - a * torch.bmm(torch.bmm(p * a, P) * b, P.mT)
        # rows that have arrived stand still
        length = torch.where(fall > goal, fall / (p * Sp).sum(2, keepdim=True), 0.0)
        x, residual = x + length * p, residual - length * Sp
        z = residual / scale
        before, fall = fall, (residual * z).sum(2, keepdim=True)
        p = z + torch.where(before > 0, fall / before, 0.0) * p
    return x, (fall <= goal).view(-1)


def _adjoint(
    P: Tensor,
    factor: Tensor,
    rho: Tensor,
    c: Tensor,
    h: Tensor,
    refinements: int,
    blocks: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """a with (diag(rho) - P diag(1/c) P') a = h."""
    w = rho.rsqrt()
    if factor.shape[1] == 0:
        return (
            _conjugate(
                P,
                w,
                1.0 / c,
                (rho / rho.sum(2, keepdim=True)).sqrt(),
                h * w,
                CONJUGATE.adjoint,
                blocks,
            )[0]
            * w
        )
    a = _solve(factor, h * w) * w
    for _ in range(refinements):
        left = h - (rho * a - torch.bmm(torch.bmm(a, P) / c, P.mT))
        a = a + _solve(factor, left * w) * w
    return a


def _judged(task: _Task, plan: _Plan) -> tuple[_Plan, Tensor]:
    """The status of each row, and the plan with zeros where it failed."""
    status = torch.where(
        plan.residual <= VERDICT.inaccurate, int(Status.INACCURATE), int(Status.NOT_CONVERGED)
    )
    status = torch.where(plan.residual <= VERDICT.solved, int(Status.SOLVED), status)
    base = task.base.abs() / task.eps
    if float((task.spread + base.amax(2, keepdim=True)).max()) > VERDICT.sharp:
        # costs / eps are rounded by this; it moves the logarithm of an entry as much
        seen = plan.P.gt(ACCURACY.rounding * task.total)
        error = ACCURACY.rounding * torch.where(seen, task.C + base, 0.0).amax((1, 2))
        plan = replace(plan, degenerate=plan.degenerate | (error > ACCURACY.sensitive))
        status = torch.where(error > ACCURACY.meaningless, int(Status.NOT_CONVERGED), status)
    if task.status is not None:
        status = torch.where(task.status == Status.SOLVED, status, task.status)
    failed = status >= Status.INFEASIBLE
    if not bool(failed.any()):
        return plan, status
    if task.blocks is not None:
        lost = (status == Status.NOT_CONVERGED) & _starved(task.C, task.r, task.c)
        status = torch.where(lost, int(Status.INFEASIBLE), status)
    wide = failed.view(-1, 1, 1)
    eye = torch.eye(plan.factor.shape[1], dtype=plan.P.dtype, device=plan.P.device)
    inert = _Plan(
        plan.P.masked_fill(wide, 0.0),
        plan.phi.masked_fill(wide, 0.0),
        plan.gamma.masked_fill(wide, 0.0),
        plan.rho.masked_fill(wide, 1.0),
        torch.where(wide, eye, plan.factor),
        plan.refinements,
        plan.iterations,
        plan.residual.masked_fill(failed & (status != Status.NOT_CONVERGED), torch.nan),
        plan.degenerate & ~failed,
    )
    return inert, status


def _potentials(task: _Task, plan: _Plan, status: Tensor) -> tuple[Tensor, Tensor]:
    """f and g in the units of the costs, balanced."""
    f = task.eps * (plan.phi + (task.r * task.total).log_() + 1.0) + task.low
    f, g = _balanced(
        f, task.eps * (plan.gamma + task.c.log()) + task.base, task.blocks, task.absent
    )
    if task.status is None:
        return f, g
    failed = (status >= Status.INFEASIBLE).view(-1, 1, 1)
    return f.masked_fill(failed, 0.0), g.masked_fill(failed, 0.0)


def _starved(C: Tensor, r: Tensor, c: Tensor) -> Tensor:
    """Whether some rows hold more than all the columns that they may reach.

    Sweeps over the allowed pairs, all at cost 0, tend to a limit in which such rows fall short by
    the largest factor: it is enough to look at the rows in that order. What is found is a
    certificate, whether the sweeps have converged or not. Source: Hall (1935); Gietl and Reffel
    (2017) for the limit.
    """
    allowed = (~C.isposinf()).to(r.dtype)
    v = c
    for _ in range(VERDICT.trials):
        u = r / torch.bmm(v, allowed.mT)
        v = c / torch.bmm(u, allowed)
    order = (u * torch.bmm(v, allowed.mT) / r).argsort(2)
    place = order.argsort(2).to(r.dtype)
    n = r.shape[2]
    first = torch.where(allowed > 0, place.mT, n).amin(1, keepdim=True).long().clamp_max(n - 1)
    reached = torch.zeros_like(r).scatter_add_(2, first, c).cumsum(2)
    return (r.gather(2, order).cumsum(2) > reached * (1 + MASSES[torch.float64])).any(2).view(-1)


def _by_chord_steps(
    held: _Held, f: Tensor, g: Tensor, M: Tensor, r: Tensor, c: Tensor, eps: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs as a function of the inputs in plain torch operations: exact to second order.

    Relative to the solution, r = rho o up, c = c o down, and P_ij is

        up_i Q_ij down_j   with   Q_ij = P_ij exp(phi_i + gamma_j - dC_ij),  dC what M / eps moves by.

    Row i says Q_i down = rho_i and does not know up_i, column j says up'Q_j = c_j and does not know
    down_j: so a marginal may be next to nothing, and leave it. Two chord steps, with S the Schur
    complement of the solution:

        S a = rho - Q down - P q2,  q2 = (c - Q'up) / c;   phi <- phi + a,  gamma <- gamma + q2 - P'a / c.
    """
    P, _, rho, kept, _, absent, blocks, failed, flipped = held
    dtype, P = M.dtype, P.detach()
    if flipped:
        M, r, c, f, g = M.mT, c, r, g, f
    M, eps = M.double(), eps.double().view(-1, 1, 1)
    r, c = (t.double().unsqueeze(1).expand(len(P), -1, -1) for t in (r, c))
    still = M.isposinf()
    if failed is not None:
        r, c, eps = (t.masked_fill(failed, 1.0) for t in (r, c, eps))
        still = still | failed

    # What the inputs move by; the marginals on sum r = sum c only.
    dC = movement(M.masked_fill(still, 0.0) / eps)
    dr, dc = _balanced(movement(r), movement(c), blocks, None)
    up, down = 1.0 + dr / rho, 1.0 + dc / kept

    phi, gamma = torch.zeros_like(rho), torch.zeros_like(kept)
    for _ in range(2):
        Q = P * torch.exp(phi.mT + gamma - dC)
        # at the solution the equations hold: what they are off by is what moves
        q1 = -movement(torch.bmm(down, Q.mT))
        q2 = -movement(torch.bmm(up, Q)) / kept
        a = _SelfAdjoint.apply(partial(_potential, held), q1 - torch.bmm(q2, P.mT))
        phi, gamma = phi + a, gamma + q2 - torch.bmm(a, P) / kept

    # P = diag(up) Q diag(down),  f = eps (f / eps + phi + log up),  and g likewise.
    P = P * up.mT * down * torch.exp(phi.mT + gamma - dC)
    if absent is not None:
        P = torch.where(absent[0].mT | absent[1], movement(P), P)
    f, g = ((t.detach().double().unsqueeze(1) / eps.detach()) for t in (f, g))
    f, g = eps * (f + phi + up.log()), eps * (g + gamma + down.log())
    f, g = _balanced(f, g, blocks, absent)
    P, f, g = P.to(dtype), f.squeeze(1).to(dtype), g.squeeze(1).to(dtype)
    return (P.mT, g, f) if flipped else (P, f, g)


def _potential(held: _Held, h: Tensor) -> Tensor:
    """S^+ h at the solution."""
    return _adjoint(
        held.P.detach(), held.factor, held.rho, held.c, h, held.refinements, held.blocks
    )


class _SelfAdjoint(torch.autograd.Function):
    """solve(h), for a symmetric solve by no torch operation: its own derivative, in either
    direction."""

    @staticmethod
    def forward(solve: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
        return solve(h)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.solve = inputs[0]

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> tuple[None, Tensor]:
        return None, _SelfAdjoint.apply(ctx.solve, bar)

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor) -> Tensor:
        return _SelfAdjoint.apply(ctx.solve, tangent)

    @staticmethod
    def vmap(
        _: Any, dims: tuple[None, int], solve: Callable[[Tensor], Tensor], h: Tensor
    ) -> tuple[Tensor, int]:
        return torch.stack([_SelfAdjoint.apply(solve, part) for part in h.unbind(dims[1])]), 0
