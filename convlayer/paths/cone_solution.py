"""The solution of a batch of a cone program: parameters -> Data -> attempts -> (x, y, optimal
value), and the way back.

Everything here is float64, on the host, or on the parameters' device where the solver is a batched
one. Rows that failed are left out of all batched work and never reach the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from convlayer.autodiff.threads import one_thread
from convlayer.conic.bounds import impossible
from convlayer.conic.costs import prefers_dense
from convlayer.conic.kkt import Visible
from convlayer.conic.program import Data, Operators
from convlayer.conic.residual import normalise, recentre
from convlayer.conic.smoothing import smoothed
from convlayer.paths.attempted import Attempted
from convlayer.paths.by_core import settled
from convlayer.paths.cone_call import ConeFound, ConeRequest
from convlayer.paths.cone_derivative import WHOLE_ENTRIES, ConeDerivative
from convlayer.paths.evaluation import Agreement, agreed, agreement, evaluate, evaluated, objective
from convlayer.paths.pieces import Piece, RootPiece, Telling, adjoint_of, rows_at_once
from convlayer.paths.verdict import Verdict
from convlayer.solution import Cause, Status

UNSMOOTHED = 1e-9  # relative residual above which a point is not on the central path


def solve(request: ConeRequest, thetas: Sequence[Tensor]) -> ConeFound:
    """For the cone program's parameters, (B or 1, *shape) each, without a graph."""
    with torch.no_grad():
        return _solve(request, [theta.detach() for theta in thetas])


def attached(found: ConeFound, thetas: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, n), y (B, m) and the value (B,), differentiable once in the parameters.

    Where a second derivative is wanted the layer takes another way, and nothing arrives here.
    """
    return (
        Attached.apply(found, *thetas)
        if found.exact is not None
        else (found.x, found.y, found.value)
    )


class Attached(torch.autograd.Function):
    """(found, *parameters) -> what was found."""

    @staticmethod
    def forward(ctx, found: ConeFound, *thetas: Tensor):
        ctx.found = found
        ctx.save_for_backward(*thetas)
        ctx.set_materialize_grads(False)
        # Detached: an output held in `found` would hold its own graph, and neither would ever be
        # freed.
        return found.x.detach(), found.y.detach(), found.value.detach()

    @staticmethod
    def backward(ctx, *given: Tensor | None):
        thetas, found = ctx.saved_tensors, ctx.found
        if all(bar is None for bar in given):
            return None, *(None for _ in thetas)
        with torch.no_grad(), one_thread():
            pairs = zip(given, found.exact.solution, strict=True)
            bars = [torch.zeros_like(value) if bar is None else bar for bar, value in pairs]
            hopeless, failed = found.verdict.failed, None
            if bool(hopeless.any()):
                # A failed row that the loss does use has no derivative: NaN, not zero.
                used = (bars[0] != 0).any(1) | (bars[1] != 0).any(1) | (bars[2] != 0)
                failed = hopeless.to(used.device) & used
            needed = ctx.needs_input_grad[1:]
            entries_bar = found.derivative.cotangent(thetas, bars, needed, failed)
            wanted = [k for k, need in enumerate(needed) if need]
            result: list[Tensor | None] = [None] * len(thetas)
            readers = found.request.canonical.parameters
            for k, bar in zip(wanted, entries_bar, strict=True):
                result[k] = readers[k].pull_back(bar, thetas[k])
            return None, *result


def _solve(request: ConeRequest, thetas: Sequence[Tensor]) -> ConeFound:
    canonical, batch = request.canonical, len(request.bad)
    program = canonical.program
    # Evaluate the data.
    entries = [
        reader.read(theta) for reader, theta in zip(canonical.parameters, thetas, strict=True)
    ]
    affordable = batch * (program.n + program.m) * program.n <= WHOLE_ENTRIES
    dense = (
        request.core is None
        and request.elimination is None
        and prefers_dense(program)
        and affordable
    )
    data, d = evaluate(
        canonical, entries, dense, torch.zeros((), dtype=torch.float64, device=request.device)
    )
    equalities = agreement(canonical, entries, data.b, batch, request.precision)
    data = agreed(canonical, data)
    # Solve the rows that can be.
    found, blank = _solved(request, data, d, batch, equalities)
    x, s, y = found.x, found.s, found.y
    if canonical.bounds is not None:
        x = canonical.bounds.hold(x, data.b)
    value = objective(Operators(data), x, d)
    # A failed row's iterate may hold anything; behind the outputs its zero cotangents must stay
    # zeros.
    if not math.isfinite((x.sum() + y.sum() + value.sum()).item()):
        blank = blank | ~(
            torch.isfinite(x).all(1) & torch.isfinite(y).all(1) & torch.isfinite(value)
        )
    if bool(blank.any()):
        x[blank], y[blank], value[blank] = 0.0, 0.0, 0.0
    if equalities is not None:
        y = torch.where(equalities.refuted.to(y.device).unsqueeze(1), equalities.y.to(y.device), y)
    verdict, exact = found.verdict.cpu(), None
    if request.differentiable:
        tell = Telling(
            canonical, request.selected, verdict.degenerate, request.tell, found.pieces, data.q, x
        )
        make_data = partial(evaluated, canonical, entries, dense, request.device)
        exact = ConeDerivative(
            canonical, make_data, (x, y, value), (x, s, y), partial(adjoint_of, found.pieces), tell
        )
    stopped = found.stopped.cpu() if bool(found.stopped.any()) else None
    attempt = found.attempt.cpu()
    return ConeFound(request, x, s, y, value, verdict, attempt, blank, stopped, equalities, exact)


def _solved(
    request: ConeRequest, data: Data, d: Tensor, batch: int, equalities: Agreement | None
) -> tuple[Attempted, Tensor]:
    """All rows, of which those that are not to be solved are blank, and (B,) which these are."""
    program, device = data.program, request.device
    good, refuted = _solvable(request, data, d, batch, equalities)
    everything = len(good) == batch
    blank = torch.zeros(batch, dtype=torch.bool, device=device)
    if not everything:
        blank = (~blank).index_fill(0, good, False)
    if not len(good):
        x, s, y = (data.q.new_zeros(batch, k) for k in (program.n, program.m, program.m))
        verdict = Verdict.unknown(_left_out(request, refuted, batch))
        return Attempted(
            x, s, y, verdict, torch.zeros_like(verdict.status), torch.zeros_like(blank), []
        ), blank
    chosen = (data if everything else data.rows(good)).widen(len(good))
    start = (
        None if request.start is None else tuple(part.to(device)[good] for part in request.start)
    )
    called = request.called
    if called is not None and not everything:
        request = replace(request, called=called.of_rows(good))
    found = settled(request, chosen, start)
    if not everything:
        found = _spread(found, good, _left_out(request, refuted, batch))
    implied = request.canonical.implied
    if implied is not None:  # they were not in the program
        implied = implied.to(device)
        found.s[:, implied] = (data.b - Operators(data).A(found.x))[:, implied].clamp(min=0)
    return found, blank


def _solvable(
    request: ConeRequest, data: Data, d: Tensor, batch: int, equalities: Agreement | None
) -> tuple[Tensor, Tensor | None]:
    """The rows whose values are numbers and whose right-hand sides do not exclude a solution, and
    (B,) the others of these."""
    good = torch.arange(batch, device=request.device)
    parts = (data.P, data.q, data.A, data.b, d)
    if not math.isfinite(torch.stack([part.sum() for part in parts]).sum().item()) or bool(
        request.bad.any()
    ):
        finite = ~request.bad.to(request.device)
        for part in parts:
            finite = finite & torch.isfinite(part.flatten(1)).all(1)
        good = torch.nonzero(finite).flatten()
    refuted = None if equalities is None else equalities.refuted.to(request.device)
    nowhere = impossible(data.program, data.b)
    if nowhere is not None:
        refuted = nowhere.expand(batch) if refuted is None else refuted | nowhere
    return (good if refuted is None else good[~refuted[good]]), refuted


def _left_out(request: ConeRequest, refuted: Tensor | None, batch: int) -> Tensor:
    """(B,) the status of rows that are not solved."""
    status = torch.full((batch,), int(Status.BAD_INPUT), device=request.device)
    if refuted is not None:
        status[refuted & ~request.bad.to(request.device)] = int(Status.INFEASIBLE)
    return status


def _spread(found: Attempted, rows: Tensor, status: Tensor) -> Attempted:
    """What was found for some rows of a batch whose others have this status (B,)."""

    def whole(part: Tensor) -> Tensor:
        return part.new_zeros(len(status), *part.shape[1:]).index_copy_(0, rows, part)

    return Attempted(
        whole(found.x),
        whole(found.s),
        whole(found.y),
        found.verdict.spread(rows, status),
        whole(found.attempt),
        whole(found.stopped),
        [replace(piece, rows=rows[piece.rows]) for piece in found.pieces],
    )


def resolved(request: ConeRequest) -> Callable[[Data], tuple[Tensor, Tensor, Tensor]]:
    """Other data, solved as the request's were: (x, y, failed (B,))."""

    def solve(data: Data) -> tuple[Tensor, Tensor, Tensor]:
        batch = data.batch
        bad = torch.zeros(batch, dtype=torch.bool)
        plain = replace(
            request,
            elimination=None,
            called=None,
            bad=bad,
            start=None,
            differentiable=False,
            judged=False,
        )
        found, _ = _solved(plain, data, data.q.new_zeros(1, 1), batch, None)
        return found.x, found.y, found.verdict.failed

    return solve


def on_central_path(
    found: ConeFound, exact: ConeDerivative, kappa: float
) -> tuple[tuple[Tensor, Tensor, Tensor], Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """The rows' points (x, s, y) on the central path, and the adjoint there; NaN in rows that have
    none."""
    canonical, device = found.request.canonical, found.request.device
    program = canonical.program
    x, s, y = (part.clone() for part in exact.point)
    good = torch.nonzero(~found.verdict.failed).flatten().to(device)
    visible = Visible(*(part.to(device) for part in canonical.visible))
    dense = exact.data.dense or prefers_dense(program)
    pieces, lost = list[Piece](), torch.zeros(len(x), dtype=torch.bool, device=device)
    for rows in good.split(rows_at_once(program, dense)):
        data, scaling = normalise(exact.data.rows(rows).widen(len(rows)))
        start = scaling.enter(x[rows], s[rows], y[rows])
        data, inner = recentre(data, scaling, start[0], start[2])
        zero = smoothed(
            Operators(data, dense), *inner.enter(x[rows], s[rows], y[rows]), kappa, visible, inner.c
        )
        x[rows], s[rows], y[rows] = inner.leave(zero.x, zero.s, zero.y)
        pieces.append(RootPiece(rows, torch.arange(len(rows), device=device), zero, inner))
        lost[rows] = ~(zero.residual <= UNSMOOTHED)

    tell = found.request.tell

    def adjoint(x_bar: Tensor, y_bar: Tensor) -> tuple[Tensor, Tensor]:
        w, u = adjoint_of(pieces, x_bar, y_bar)
        used = lost & ((x_bar != 0).any(1) | (y_bar != 0).any(1))
        if bool(used.any()):
            tell(torch.nonzero(used).flatten().cpu(), Cause.NO_PATH, ())
        return w.masked_fill(used.unsqueeze(1), torch.nan), u.masked_fill(
            used.unsqueeze(1), torch.nan
        )

    return (x, s, y), adjoint
