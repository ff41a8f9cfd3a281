"""What a solve returns: Status, Solution, and the errors of rows that failed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from html import escape

import numpy as np
import torch
from torch import Tensor

from convlayer.display import SHOWN, counted, html_table, rows_of, spanned
from convlayer.shifts import Shifts


class Status(IntEnum):
    """Outcome of one row. `advice` says what it usually means and what to do."""

    SOLVED = 0
    INACCURATE = 1
    INFEASIBLE = 2
    UNBOUNDED = 3
    NOT_CONVERGED = 4
    BAD_INPUT = 5
    UNATTAINED = 6

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
    Status.NOT_CONVERGED: "the solver stopped early; raise its iteration limit, rescale the parameters, or try another solver.",
    Status.UNATTAINED: "the infimum is not attained: the objective keeps falling, ever more slowly, while the variables run off to infinity; regularise "
    "(regularise=1e-6, or a small sum_squares of the variables), or bound them.",
    Status.BAD_INPUT: "a parameter holds NaN or infinity, or lies outside its declared domain.",
}


def is_unsettled(status: Tensor) -> Tensor:
    """The rows that another way may yet solve."""
    return (status == Status.INACCURATE) | (status == Status.NOT_CONVERGED)


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
        """The error for a (*batch) tensor of statuses; `details` maps a flat row to what is wrong
        with it."""
        batch, flat = tuple(status.shape), status.flatten()
        failed = torch.nonzero(flat >= Status.INFEASIBLE).flatten()
        lines = [f"{len(failed)} of {len(flat)} rows failed." if batch else "The instance failed."]
        for kind in sorted(set(flat[failed].tolist())):
            members = failed[flat[failed] == kind]
            lines.append(
                f"{rows_in_words(members, batch)}: {Status(kind).name}, {Status(kind).advice}"
            )
            reasons = dict.fromkeys(
                details[i] for i in members.tolist() if details and i in details
            )
            lines += [f"  {reason}" for reason in list(reasons)[:3]]
        closest = ", 'closest' shifts the constraints of infeasible ones by as little as it must"
        lines.append(
            "on_failure='nan' fills just the failed rows, 'keep' returns the solver's last iterate, flagged"
            f"{closest if bool((flat == Status.INFEASIBLE).any()) else ''}."
        )
        rows = [batch_index(row, batch) for row in failed.tolist()]
        return cls("\n".join(lines), rows, [Status(s) for s in flat[failed].tolist()])


def batch_index(row: int, batch: tuple[int, ...]) -> tuple[int, ...]:
    """The index into the batch of a flat row."""
    return tuple(int(k) for k in np.unravel_index(row, batch)) if batch else ()


def rows_in_words(rows: Tensor, batch: tuple[int, ...]) -> str:
    """Flat rows by their indices into the batch: `rows 1, 3`, `row (2, 1)`, `the problem`."""
    if not batch:
        return "the problem"
    shown = [batch_index(row, batch) for row in rows[:10].tolist()]
    words = ", ".join(str(index[0] if len(index) == 1 else index) for index in shown)
    more = f" and {len(rows) - 10} more" if len(rows) > 10 else ""
    return f"row{'s' if len(rows) > 1 else ''} {words}{more}"


class ParameterError(SolverError, ValueError):
    """A parameter's value is outside its declared domain; nothing was solved."""


class AccuracyWarning(UserWarning):
    """Some rows were solved to less than the tolerance."""

    @classmethod
    def of(cls, rows: Tensor, batch: tuple[int, ...]) -> AccuracyWarning:
        """Of flat rows."""
        return cls(f"{rows_in_words(rows, batch).capitalize()}: {Status.INACCURATE.advice}")


class Cause(Enum):
    """Why a gradient is not to be trusted blindly. `advice` says what it means and what to do."""

    ONE_SIDED = "weakly active"
    SINGULAR = "not unique"
    ILL_CONDITIONED = "ill-conditioned"
    ZERO = "structurally zero"
    NO_PATH = "no central path"
    LOSS = "not finite"

    @property
    def advice(self) -> str:
        return _CAUSES[self]


_CAUSES = {
    Cause.ONE_SIDED: "a constraint is weakly active (at its bound with a multiplier of zero), so the derivative is one-sided; gradient='smoothed' "
    "averages the two sides, and layer.check(...) names the constraint.",
    Cause.SINGULAR: "the solution or a multiplier is not unique (a singular KKT system), so the derivative is the least-norm one; a small strongly "
    "convex term makes it unique (regularise=), and layer.check(...) names what is redundant.",
    Cause.ILL_CONDITIONED: "the adjoint system is so ill-conditioned that its solution could not be certified; rescale the parameters, or add a small "
    "strongly convex term (regularise=).",
    Cause.ZERO: "the solution of a linear program stays at its vertex when costs change a little, so their gradient is zero; "
    "gradient='smoothed', 'lpgd', 'perturbed' or 'blackbox' give one that learning can use.",
    Cause.NO_PATH: "the feasible set has no interior or the solutions are not bounded, so there is nothing to smooth, and the gradient is NaN; "
    "gradient='lpgd' needs neither.",
    Cause.LOSS: "a NaN or infinity arrived in backward from the loss, or from what stands between it and the layer, whose solution is finite "
    "there; so the gradient is NaN. Usual are the log, the root or the quotient of a number at zero; torch.autograd.detect_anomaly() finds it.",
}


class GradientWarning(UserWarning):
    """Some rows were differentiated where the solution map has no derivative, or one that says
    nothing: once a layer and `cause`."""

    def __init__(self, message: str, cause: Cause) -> None:
        super().__init__(message)
        self.cause = cause

    def __reduce__(self):
        return type(self), (str(self), self.cause)

    @classmethod
    def of(
        cls, rows: Tensor, batch: tuple[int, ...], cause: Cause, parameters: Sequence[str] = ()
    ) -> GradientWarning:
        """Of flat rows; `parameters` are the names of those whose gradients are concerned."""
        message = f"{rows_in_words(rows, batch).capitalize()}: {cause.value}: {cause.advice}"
        if cause in (Cause.ONE_SIDED, Cause.SINGULAR, Cause.ILL_CONDITIONED):
            message += " Solution.degenerate tells which rows."
        elif cause is Cause.ZERO:
            message += f" Here: the gradient in {', '.join(f'`{name}`' for name in parameters)}."
        return cls(message, cause)


@dataclass(frozen=True, eq=False, repr=False)
class Solution:
    """The solution of a batch, row by row. Every field but `variables`, `notes`, `shift` and
    `iterate` has shape (*batch).

    variables:  (*batch, *shape) each, in the order the layer was given; differentiable.
    objective:  optimal value, in the user's sense; differentiable.
    status:     int64, values of Status; `statuses` are their names, `solved` is a mask.
    iterations: int64, of the solver.
    residual:   float64, relative KKT residual after polishing; NaN where there is no iterate.
    degenerate: bool, the derivative there is one-sided (weakly active constraint) or least-norm
                (singular system), for what parameters move and outputs read. Equalities with
                constant coefficients that depend on each other are differentiated along the
                parameters that leave the problem feasible, and flagged only where a multiplier of
                theirs is an output.
    margin:     float64, of strict complementarity: distance from the nearest kink, in units where
                the solution and its multipliers are of size one; infinite without inequalities, NaN
                where a kernel does not say (layer.check does).
    notes:      in words, which rows took another way than the layer's first choice, and which were
                changed to have a solution: equalities that differed by rounding, constraints that
                were shifted.
    shift:      on_failure="closest" or "closest_few", where some row was infeasible: by how much
                each of problem.constraints was shifted, (*batch, *its shape), as lhs <= rhs + shift
                or lhs == rhs + shift; a tuple of its arguments' for a cone constraint. None
                elsewhere.
    iterate:    canonical (x, s, y) for a warm start; None from a kernel.
    """

    variables: tuple[Tensor, ...]
    objective: Tensor
    status: Tensor
    iterations: Tensor
    residual: Tensor
    degenerate: Tensor
    margin: Tensor
    notes: tuple[str, ...]
    shift: Shifts | None
    iterate: tuple[Tensor, Tensor, Tensor] | None

    @property
    def solved(self) -> Tensor:
        """(*batch) bool, on the host: the rows that have a solution, be it INACCURATE. A loss that
        is made of `x[solution.solved]` alone has no NaN in its gradient from rows that failed."""
        return self.status < Status.INFEASIBLE

    @property
    def statuses(self) -> np.ndarray:
        """(*batch) the names of the statuses: `solution.statuses == "SOLVED"`."""
        names = [Status(value).name for value in self.status.flatten().tolist()]
        return np.array(names, dtype=str).reshape(tuple(self.status.shape))

    def __repr__(self) -> str:
        shapes = ", ".join(str(tuple(variable.shape)) for variable in self.variables)
        text = (
            f"Solution of {rows_of(self.status.shape)}: {counted(self.statuses.flatten().tolist())}"
        )
        text += f"; variables {shapes}; objective {spanned(self.objective)}; residual {spanned(self.residual)}"
        if bool(self.degenerate.any()):
            text += f"; {int(self.degenerate.sum())} degenerate"
        return "\n  ".join([text, *self.notes])

    def _repr_html_(self) -> str:
        batch, size = tuple(self.status.shape), self.status.numel()
        parts = (self.objective, self.residual, self.iterations, self.degenerate)
        status = self.statuses.reshape(-1)[:SHOWN].tolist()
        objective, residual, iterations, degenerate = (
            part.detach().flatten()[:SHOWN].tolist() for part in parts
        )
        rows = [
            [", ".join(map(str, batch_index(k, batch))), status[k], f"{objective[k]:.6g}", f"{residual[k]:.1e}", str(iterations[k]),
             "yes" if degenerate[k] else ""]
            for k in range(len(status))
        ]  # fmt: skip
        header = ("row", "status", "objective", "residual", "iterations", "degenerate")
        words = "<br>".join(escape(line) for line in repr(self).splitlines())
        return f"<p>{words}</p>{html_table(header, rows, size - len(rows))}"
