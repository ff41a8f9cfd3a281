"""What one attempt found for some rows, and how it is put together with what others found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convlayer.conic.elimination import Eliminated
from convlayer.paths.evaluation import ROUNDING
from convlayer.paths.pieces import Piece
from convlayer.paths.verdict import Verdict
from convlayer.solution import Status

# The more is known, the earlier: a proof that there is no solution is worth more than a point that
# is not quite one.
ORDER = (
    Status.SOLVED,
    Status.INFEASIBLE,
    Status.UNBOUNDED,
    Status.INACCURATE,
    Status.UNATTAINED,
    Status.NOT_CONVERGED,
    Status.BAD_INPUT,
)


@dataclass(frozen=True, eq=False)
class Attempted:
    """Row by row, in the original units."""

    x: Tensor  # (rows, n)
    s: Tensor  # (rows, m)
    y: Tensor  # (rows, m)
    verdict: Verdict
    attempt: Tensor  # (rows,) its place
    stopped: Tensor  # (rows,) by a time limit
    pieces: Sequence[Piece]

    @property
    def unsettled(self) -> Tensor:
        """(rows,) what another way may yet solve."""
        return self.verdict.unsettled & ~self.stopped

    def with_status(self, status: Tensor) -> Attempted:
        """Judged otherwise."""
        return replace(self, verdict=replace(self.verdict, status=status))

    @classmethod
    def joined(cls, parts: Sequence[Attempted], firsts: Sequence[int]) -> Attempted:
        """What was found for consecutive rows, beginning at `firsts`."""
        pieces = [
            replace(piece, rows=piece.rows + first)
            for part, first in zip(parts, firsts, strict=True)
            for piece in part.pieces
        ]
        names = ("x", "s", "y", "attempt", "stopped")
        x, s, y, attempt, stopped = (
            torch.cat([getattr(part, name) for part in parts]) for name in names
        )
        return cls(x, s, y, Verdict.cat([part.verdict for part in parts]), attempt, stopped, pieces)

    def lifted(self, eliminated: Eliminated) -> Attempted:
        """The same for the program before the elimination."""
        x, s, y = eliminated.leave(self.x, self.s, self.y)
        pieces = [piece.lifted(eliminated) for piece in self.pieces]
        return replace(self, x=x, s=s, y=y, pieces=pieces)

    def improved(self, rows: Tensor, other: Attempted) -> Attempted:
        """With another attempt at some rows, where it did better."""
        rank, other_rank = _rank(self.verdict.take(rows)), _rank(other.verdict)
        # Of two that are solved the later one, which is no vertex, and not by a toss between their
        # rounding errors.
        closer = other.verdict.residual <= self.verdict.residual[rows].clamp(min=ROUNDING)
        better = (other_rank < rank) | ((other_rank == rank) & closer)
        won, mine = rows[better], torch.ones_like(self.stopped)
        mine[won] = False
        pieces = [piece.only(mine) for piece in self.pieces]
        pieces += [replace(piece.only(better), rows=rows[piece.rows]) for piece in other.pieces]
        verdict = self.verdict.put(won, other.verdict.take(better))
        spent = self.verdict.iterations.index_add(0, rows, other.verdict.iterations)
        x, s, y, attempt = (
            getattr(self, name).index_copy(0, won, getattr(other, name)[better])
            for name in ("x", "s", "y", "attempt")
        )
        return Attempted(
            x,
            s,
            y,
            replace(verdict, iterations=spent),
            attempt,
            self.stopped.index_put((rows,), other.stopped),
            [piece for piece in pieces if len(piece.keep)],
        )


def _rank(verdict: Verdict) -> Tensor:
    """(rows,) the lower, the more is known."""
    places = torch.tensor([ORDER.index(one) for one in Status], device=verdict.status.device)
    return 2 * places[verdict.status] + verdict.degenerate
