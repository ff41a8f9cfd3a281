"""What is known of the rows of a batch, beside their solutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from convlayer.solution import Status, is_unsettled


@dataclass(frozen=True, eq=False)
class Verdict:
    """(B,) each, as `Solution` explains them."""

    status: Tensor  # int64, values of Status
    iterations: Tensor  # int64
    residual: Tensor  # float64
    degenerate: Tensor  # bool
    margin: Tensor  # float64

    @classmethod
    def unknown(cls, status: Tensor) -> Verdict:
        """Of rows that were not looked at, beyond their status."""
        nothing = torch.full(status.shape, torch.nan, dtype=torch.float64, device=status.device)
        no = torch.zeros_like(status, dtype=torch.bool)
        return cls(status, torch.zeros_like(status), nothing, no, nothing)

    @classmethod
    def cat(cls, parts: Sequence[Verdict]) -> Verdict:
        """Of batches one after the other."""
        return cls(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)))

    @property
    def failed(self) -> Tensor:
        """(B,) rows without a solution."""
        return self.status >= Status.INFEASIBLE

    @property
    def unsettled(self) -> Tensor:
        """(B,) rows that another way may yet solve."""
        return is_unsettled(self.status)

    def parts(self) -> tuple[Tensor, ...]:
        """Status, iterations, residual, degenerate and margin."""
        return tuple(getattr(self, f.name) for f in fields(self))

    def each(self, function: Callable[[Tensor], Tensor]) -> Verdict:
        """The function of every part."""
        return Verdict(*map(function, self.parts()))

    def take(self, rows: Tensor) -> Verdict:
        """Of these rows."""
        return self.each(lambda part: part[rows])

    def put(self, rows: Tensor, other: Verdict) -> Verdict:
        """With another verdict on these rows."""
        pairs = zip(self.parts(), other.parts(), strict=True)
        return Verdict(*(mine.index_copy(0, rows, theirs) for mine, theirs in pairs))

    def spread(self, rows: Tensor, status: Tensor) -> Verdict:
        """Of these rows of a larger batch, the others of which have a `status` and nothing else."""
        return Verdict.unknown(status).put(rows, self)

    def with_next(self, other: Verdict) -> Verdict:
        """Of rows that were solved twice, the second time from what the first found: the worse of
        both."""
        return Verdict(
            torch.maximum(self.status, other.status),
            self.iterations + other.iterations,
            torch.maximum(self.residual, other.residual),
            self.degenerate | other.degenerate,
            torch.minimum(self.margin, other.margin),
        )

    def cpu(self) -> Verdict:
        """On the host."""
        return self.each(Tensor.cpu)
