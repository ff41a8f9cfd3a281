"""What a solve returns: Status, Solution, and the errors of rows that failed."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor


class Status(IntEnum):
    """Outcome of one row. `advice` says what it usually means and what to do."""

    SOLVED = 0
    INACCURATE = 1
    INFEASIBLE = 2
    UNBOUNDED = 3
    NOT_CONVERGED = 4
    BAD_INPUT = 5

    @property
    def failed(self) -> bool:
        return self not in (Status.SOLVED, Status.INACCURATE)

    @property
    def advice(self) -> str:
        return _ADVICE[self]


_ADVICE = {
    Status.SOLVED: "solved to the tolerance.",
    Status.INACCURATE: "solved to less than the tolerance; look at Solution.residual and at the scaling of the parameters.",
    Status.INFEASIBLE: "no point satisfies the constraints for these parameters; check the bounds, or relax a constraint with a penalised slack.",
    Status.UNBOUNDED: "the objective can be improved without limit for these parameters; add a bound or a regulariser.",
    Status.NOT_CONVERGED: "the solver stopped early; raise its iteration limit, rescale the parameters, or try the other solver.",
    Status.BAD_INPUT: "a parameter holds NaN or infinity, or lies outside its declared domain.",
}


class SolverError(RuntimeError):
    """Rows that could not be solved. `.rows` are their batch indices, `.status` their statuses."""

    def __init__(self, message: str, rows: list[tuple[int, ...]], status: list[Status]):
        super().__init__(message)
        self.rows = rows
        self.status = status

    def __reduce__(self):
        return type(self), (str(self), self.rows, self.status)

    @classmethod
    def of(cls, status: Tensor, details: dict[int, str] | None = None) -> SolverError:
        """The error for a (*batch) tensor of statuses; `details` maps a flat row to what is wrong with it."""
        failed = [(i, Status(int(s))) for i, s in enumerate(status.flatten().tolist()) if Status(int(s)).failed]
        shape = tuple(status.shape)
        rows = [tuple(int(k) for k in torch.unravel_index(torch.tensor(i), shape)) if shape else () for i, _ in failed]
        lines = []
        for kind in sorted({s for _, s in failed}):
            members = [(row, i) for row, (i, s) in zip(rows, failed, strict=True) if s == kind]
            shown = ", ".join(str(row[0] if len(row) == 1 else row) for row, _ in members[:10]) if shape else ""
            more = f" and {len(members) - 10} more" if len(members) > 10 else ""
            where = f"row{'s' if len(members) > 1 else ''} {shown}{more}" if shape else "the problem"
            lines.append(f"{where}: {kind.name}, {kind.advice}")
            reasons = dict.fromkeys(details[i] for _, i in members if details and i in details)
            lines += [f"  {reason}" for reason in list(reasons)[:3]]
        message = "\n".join(
            [
                f"{len(failed)} of {status.numel()} rows failed." if shape else "The solve failed.",
                *lines,
                "on_failure='nan' fills just the failed rows, 'keep' returns the solver's last iterate, flagged.",
            ]
        )
        return cls(message, rows, [s for _, s in failed])


class ParameterError(SolverError, ValueError):
    """A parameter's value is outside its declared domain; nothing was solved."""


class AccuracyWarning(UserWarning):
    """Some rows were solved to less than the tolerance."""


class GradientWarning(UserWarning):
    """Some rows were differentiated where the solution map is not differentiable, by the stated rule."""


@dataclass(frozen=True, eq=False)
class Solution:
    """The solution of a batch, row by row. Every field but `variables` has shape (*batch)."""

    variables: tuple[Tensor, ...]  # (*batch, *shape) each, in the order the layer was given; differentiable
    objective: Tensor  # optimal value, in the user's sense; differentiable
    status: Tensor  # int64, values of Status
    iterations: Tensor  # int64, of the solver
    residual: Tensor  # float64, relative KKT residual after polishing; NaN where there is no iterate
    degenerate: (
        Tensor  # bool, the derivative is one-sided or least-norm there (weakly active constraint, singular system)
    )
    iterate: Any = field(default=None, repr=False)  # canonical (x, s, y) for a warm start
