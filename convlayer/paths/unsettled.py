"""Rows that no attempt settled: proofs that they have no solution, or that their infimum is not
attained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from convlayer.conic.certificates import infeasible, unbounded
from convlayer.conic.polish import NEWTON
from convlayer.conic.program import Data
from convlayer.conic.residual import normalise
from convlayer.paths.attempted import Attempted
from convlayer.paths.phase_one import nearest
from convlayer.paths.recession import recedes, steepest
from convlayer.paths.refined import TRUST
from convlayer.solution import Status, is_unsettled


def claims_checked(data: Data, status: Tensor, x: Tensor, y: Tensor, precision: float) -> Tensor:
    """A solver's claim that there is no solution stands if its certificate does; otherwise the row
    has merely not converged."""
    claimed = torch.nonzero((status == Status.INFEASIBLE) | (status == Status.UNBOUNDED)).flatten()
    if not len(claimed):
        return status
    part = data.rows(claimed).widen(len(claimed))
    proven = torch.where(
        unbounded(part, x[claimed]), int(Status.UNBOUNDED), int(Status.NOT_CONVERGED)
    )
    proven = torch.where(status[claimed] == Status.UNBOUNDED, proven, int(Status.NOT_CONVERGED))
    proven = torch.where(infeasible(part, y[claimed], precision), int(Status.INFEASIBLE), proven)
    return status.index_copy(0, claimed, proven.to(status.dtype))


def refuted(
    data: Data,
    status: Tensor,
    candidates: Sequence[Tensor],  # (rows, m) multipliers that may prove it, in the data's units
    precision: float,
    stopped: Tensor | None = None,
) -> Tensor:
    """Rows that did not settle, INFEASIBLE where the multipliers that they ran off with prove
    it."""
    for candidate in candidates:
        unsettled = is_unsettled(status) if stopped is None else is_unsettled(status) & ~stopped
        rows = torch.nonzero(unsettled).flatten()
        if not len(rows):
            break
        proven = infeasible(data.rows(rows).widen(len(rows)), candidate[rows], precision)
        status = status.index_fill(0, rows[proven], int(Status.INFEASIBLE))
    return status


def with_a_feasible_point(data: Data, found: Attempted, precision: float) -> Attempted:
    """Rows without a solution, looked at without their costs: they may have no feasible point.

    Only with one is a row unbounded, along whose directions the objective falls; and costs hide a
    proof of infeasibility.
    """
    rows = torch.nonzero(found.unsettled | (found.verdict.status == Status.UNBOUNDED)).flatten()
    if not len(rows):
        return found
    part, _ = normalise(data.rows(rows).widen(len(rows)))
    gap, y = nearest(part)
    doubted = (found.verdict.status[rows] == Status.UNBOUNDED) & ~(gap <= TRUST.inaccurate)
    status = torch.where(doubted, int(Status.NOT_CONVERGED), found.verdict.status[rows])
    status = torch.where(infeasible(part, y, precision), int(Status.INFEASIBLE), status)
    # A solver's direction may be too rough a proof.
    open_yet = (found.verdict.status[rows] == Status.NOT_CONVERGED) & (
        status == Status.NOT_CONVERGED
    )
    left = torch.nonzero(open_yet & (gap <= TRUST.inaccurate)).flatten()
    if len(left):
        one = part.rows(left).widen(len(left))
        falls = unbounded(one, steepest(one))
        status = status.index_fill(0, left[falls], int(Status.UNBOUNDED))
    return found.with_status(
        found.verdict.status.index_copy(0, rows, status.to(found.verdict.status.dtype))
    )


def running_off(data: Data, found: Attempted) -> Attempted:
    """Rows whose infimum is not attained, of those that the polish did not bring to rest."""
    restless = found.verdict.residual > NEWTON.settled
    rows = torch.nonzero(
        found.unsettled | ((found.verdict.status == Status.SOLVED) & restless)
    ).flatten()
    if not len(rows):
        return found
    part, scaling = normalise(data.rows(rows).widen(len(rows)))
    off = recedes(part, scaling.enter(found.x[rows], found.s[rows], found.y[rows])[0])
    return found.with_status(found.verdict.status.index_fill(0, rows[off], int(Status.UNATTAINED)))
