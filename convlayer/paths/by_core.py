"""The compiled core before all attempts: it settles the rows that are plainly solved, the attempts
the others."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from convlayer.conic.program import Data
from convlayer.core.rows import Outcome, Plan, Solved, solve_rows
from convlayer.paths import attempts
from convlayer.paths.attempted import Attempted
from convlayer.paths.cone_call import ConeRequest
from convlayer.paths.pieces import CorePiece, Piece
from convlayer.paths.verdict import Verdict


def settled(request: ConeRequest, data: Data, start: tuple[Tensor, ...] | None) -> Attempted:
    """By the core where it is asked for, then one attempt after the other."""
    plan = request.core
    if plan is None or start is not None:
        return attempts.attempted(request, data, start)
    solved = request.called
    if solved is None:
        solved = _solved(plan, request, data)
    elif request.lift is not None:
        solved = request.lift.lifted(solved, data)
    done = solved.settled
    found = _attempted(request, solved)
    if bool(done.all()):
        return found
    left = torch.nonzero(~done).flatten()
    if request.called is not None and bool((solved.report[left, 0] == Outcome.UNREAD).any()):
        rest = settled(replace(request, called=None), data.rows(left), None)
    else:
        rest = attempts.attempted(request, data.rows(left), None)
    x, s, y, attempt, stopped = (
        getattr(found, name).index_copy(0, left, getattr(rest, name))
        for name in ("x", "s", "y", "attempt", "stopped")
    )
    pieces = [piece.only(done) for piece in found.pieces]
    pieces += [replace(piece, rows=left[piece.rows]) for piece in rest.pieces]
    verdict = found.verdict.put(left, rest.verdict)
    return Attempted(
        x, s, y, verdict, attempt, stopped, [piece for piece in pieces if len(piece.keep)]
    )


def _solved(plan: Plan, request: ConeRequest, data: Data) -> Solved:
    values = data.P_entries, data.q, data.A_entries, data.b
    return solve_rows(plan, data.batch, values, request.tolerance, keep=request.differentiable)


def _attempted(request: ConeRequest, solved: Solved) -> Attempted:
    """Of all rows; those that are not settled hold anything."""
    report, batch = solved.report, len(solved.x)
    _, residual, _, _, margin, _, iterations = report.unbind(1)
    zeros = torch.zeros(batch, dtype=torch.int64)
    no = torch.zeros(batch, dtype=torch.bool)
    verdict = Verdict(zeros, iterations.long(), residual, no, margin)
    pieces: list[Piece] = []
    if request.differentiable:
        rows = torch.arange(batch)
        pieces.append(CorePiece(rows, rows, solved, rows, no.clone()))
    return Attempted(solved.x, solved.s, solved.y, verdict, zeros, no, pieces)
