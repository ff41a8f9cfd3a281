"""The zeros of the residual map that a batch's rows were found at, in pieces, and the derivative
that each of them gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convlayer.conic.adjoint import adjoint
from convlayer.conic.elimination import Eliminated
from convlayer.conic.polish import Root
from convlayer.conic.program import DENSE_ENTRIES, Program
from convlayer.conic.residual import Scaling
from convlayer.core.rows import Solved
from convlayer.declaration.canonical import Canonical
from convlayer.paths.path import Tell
from convlayer.solution import Cause
from convlayer.solvers.dealing import in_threads

NOTHING = 1e-10  # a derivative below this, relative to solution and costs, is zero


@dataclass(frozen=True, eq=False)
class Piece(ABC):
    """Some rows of the batch with the zero found for them."""

    rows: Tensor
    keep: Tensor  # which of `rows`, by position, this is the answer for

    @abstractmethod
    def adjoint(self, x_bar: Tensor, y_bar: Tensor) -> tuple[Tensor, Tensor]:
        """Cotangents of these rows -> (w, u), in the original units."""

    @property
    @abstractmethod
    def by_rule(self) -> dict[Cause, Tensor]:
        """(rows,) those whose derivative is one by rule, or not a good one, by cause; none: {}."""

    def lifted(self, eliminated: Eliminated) -> Piece:
        """The same for the program before the elimination."""
        raise NotImplementedError

    def whole(self, batch: int) -> bool:
        """It is the answer for all rows of the batch, in order."""
        return len(self.keep) == len(self.rows) == batch

    def only(self, wanted: Tensor) -> Piece:
        """The piece as the answer for fewer rows, wanted (all rows,)."""
        return replace(self, keep=self.keep[wanted[self.rows[self.keep]]])


@dataclass(frozen=True, eq=False)
class RootPiece(Piece):
    """With a root of the residual map."""

    zero: Root
    scaling: Scaling
    eliminated: Eliminated | None = None  # the zero is of the program without these variables

    def adjoint(self, x_bar: Tensor, y_bar: Tensor) -> tuple[Tensor, Tensor]:
        """Cotangents of these rows -> (w, u), in the original units."""
        inner = (
            (x_bar, y_bar)
            if self.eliminated is None
            else self.eliminated.enter_cotangents(x_bar, y_bar)
        )
        w, u = self.scaling.leave_adjoint(
            *adjoint(self.zero, *self.scaling.enter_cotangents(*inner))
        )
        return (
            (w, u) if self.eliminated is None else self.eliminated.leave_adjoint(w, u, x_bar, y_bar)
        )

    @property
    def by_rule(self) -> dict[Cause, Tensor]:
        zero = self.zero
        poor, singular = zero.system.poor, zero.system.singular
        if not bool((zero.near | zero.flagged | singular | poor).any()):
            return {}
        return {
            Cause.ONE_SIDED: zero.weak,
            Cause.SINGULAR: (singular | (zero.flagged & ~poor)) & ~zero.unfelt,
            Cause.ILL_CONDITIONED: poor,
        }

    def lifted(self, eliminated: Eliminated) -> Piece:
        return replace(self, eliminated=eliminated.only(self.rows))


@dataclass(frozen=True, eq=False)
class CorePiece(Piece):
    """With what the compiled core keeps of the rows that it settled."""

    solved: Solved
    places: Tensor  # (rows,) int64, of the rows in what was solved
    poor: Tensor  # (rows,) a solve could not be certified

    def adjoint(self, x_bar: Tensor, y_bar: Tensor) -> tuple[Tensor, Tensor]:
        w, u, good = self.solved.adjoint(self.places, x_bar, y_bar)
        if not good.all():
            self.poor.logical_or_(~good)
        return w, u

    @property
    def by_rule(self) -> dict[Cause, Tensor]:
        return {Cause.ILL_CONDITIONED: self.poor} if self.poor.any() else {}


def adjoint_of(pieces: Sequence[Piece], x_bar: Tensor, y_bar: Tensor) -> tuple[Tensor, Tensor]:
    """(w (B, n), u (B, m)), zero in rows without a piece."""
    if len(pieces) == 1 and pieces[0].whole(len(x_bar)):
        return pieces[0].adjoint(x_bar, y_bar)
    w, u = torch.zeros_like(x_bar), torch.zeros_like(y_bar)

    def put(piece: Piece) -> None:
        rows, kept = piece.rows, piece.rows[piece.keep]
        w[kept], u[kept] = (part[piece.keep] for part in piece.adjoint(x_bar[rows], y_bar[rows]))

    if x_bar.device.type == "cpu":
        in_threads(put, pieces)
    else:
        for piece in pieces:
            put(piece)
    return w, u


def rows_at_once(program: Program, dense: bool) -> int:
    """So many rows that their matrices stay affordable."""
    a_row = (program.n + program.m) * program.n if dense else 4 * program.nnz
    return max(1, DENSE_ENTRIES // max(1, a_row))


@dataclass(frozen=True, eq=False)
class Telling:
    """What is to be told at backward of a batch's rows."""

    canonical: Canonical
    selected: bool  # the solution of least norm
    degenerate: Tensor  # (B,) on the host, of the verdict: a solve may flag more
    tell: Tell
    pieces: Sequence[Piece]
    q: Tensor  # (B or 1, n)
    x: Tensor  # (B, n)

    def __call__(self, x_bar: Tensor, used: Tensor, found: dict[int, Tensor]) -> None:
        """Tell of rows (`used`, (B,)) that were differentiated by rule, or whose gradients `found`
        say nothing."""
        causes = self._by_rule(used)
        costs = [k for k in self.canonical.costs if k in found]
        if costs and (self.canonical.program.is_linear or self.selected):
            unmoved = used & self._unmoved(x_bar, [found[k] for k in costs])
            if Cause.SINGULAR in causes:  # what that means is told already
                unmoved = unmoved & ~causes[Cause.SINGULAR]
            causes[Cause.ZERO] = unmoved
        for cause, mask in causes.items():
            if bool((mask & used).any()):
                self.tell(torch.nonzero(mask & used).flatten().cpu(), cause, costs)

    def _by_rule(self, used: Tensor) -> dict[Cause, Tensor]:
        """(B,) by cause."""
        causes: dict[Cause, Tensor] = {}
        for piece in self.pieces:
            rows, keep = piece.rows[piece.keep], piece.keep
            for cause, flag in piece.by_rule.items():
                causes.setdefault(cause, torch.zeros_like(used))[rows] = flag[keep]
                if cause is not Cause.ONE_SIDED:
                    self.degenerate[rows.cpu()] |= flag[keep].cpu()
        return causes

    def _unmoved(self, x_bar: Tensor, bars: Sequence[Tensor]) -> Tensor:
        """(B,) rows that have a cotangent, and no gradient in any of the costs."""
        size = x_bar.abs().amax(1) * self.x.abs().amax(1)
        unmoved = size > 0
        for bar in bars:
            unmoved = unmoved & (
                bar.flatten(1).abs().amax(1) * self.q.abs().amax(1) <= NOTHING * size
            )
        return unmoved
