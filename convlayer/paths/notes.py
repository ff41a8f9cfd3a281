"""Notes on rows that took another way than the first, or were changed to have a solution:
`Solution.notes`."""

from __future__ import annotations

import torch
from torch import Tensor

from convlayer.paths.evaluation import ROUNDING
from convlayer.solution import Status

Note = tuple[Tensor, str]  # rows, and what is to be said of them
AGREED = "equalities that depend on each other differed by rounding; solved with right-hand sides that agree"


def another_way(rows: Tensor, status: Tensor, why: str, way: str) -> list[Note]:
    """By what came of them; status (R,) is that of these rows."""
    ends = {
        Status.INFEASIBLE: f"{why}; proved infeasible {way}",
        Status.UNBOUNDED: f"{why}; proved unbounded {way}",
        Status.UNATTAINED: f"{why}; their infimum found not to be attained {way}",
        Status.NOT_CONVERGED: f"{why}, nor {way}",
    }
    words = [ends.get(Status(kind), f"{why}; solved {way}") for kind in status.tolist()]
    return [(rows[[word == one for word in words]], one) for one in dict.fromkeys(words)]


def made_to_agree(apart: Tensor, refuted: Tensor) -> list[Note]:
    """apart (B,): by how much equalities that depend on each other differ, relative to their
    right-hand sides; refuted (B,): by more than rounding."""
    rows = torch.nonzero((apart > ROUNDING) & ~refuted).flatten()
    return [(rows, AGREED)] if len(rows) else []
