"""The generic path: the problem's cone program, solved row by row or batched, polished, and
differentiated by the conic adjoint."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import torch
from torch import Tensor

from convlayer.autodiff.derivative import known
from convlayer.autodiff.threads import one_thread
from convlayer.core.rows import Plan
from convlayer.declaration import domain
from convlayer.declaration.declaration import Declaration
from convlayer.paths.cone_call import ConeFound, ConeRequest
from convlayer.paths.cone_solution import attached, solve
from convlayer.paths.dispatch import cheaper_core
from convlayer.paths.evaluation import Agreement, least_norm_weight
from convlayer.paths.gradients import Gradient
from convlayer.paths.notes import Note, another_way, made_to_agree
from convlayer.paths.path import Found, Request
from convlayer.paths.settings import Solving
from convlayer.paths.starts import Starts
from convlayer.solution import Status
from convlayer.solvers import Attempt, BatchSolver, ConeSolver

# the tolerance is at least so many roundings of the parameters, up to this
ROUNDINGS, COARSEST = 8, 1e-6
HOST = torch.device("cpu")
STOPPED = "The solver's time limit ended it before it had converged; it was not tried again, and its last point was not improved."


@dataclass(frozen=True, eq=False)
class ConeProgram:
    """parameters -> entries -> (x, y, value) -> the user's variables; see
    `convlayer.paths.cone_solution`."""

    declared: Declaration
    solving: Solving
    gradient: Gradient
    executor: Executor | None
    starts: Starts  # the last solutions of samples that have names

    def __call__(self, request: Request) -> Found:
        with one_thread():
            return self._found(request)

    def _found(self, request: Request) -> Found:
        canonical, solving = self.declared.canonical, self.solving.with_args(request.solver_args)
        if request.solver_args:
            solving.check(canonical)
        coarsest = coarsest_of(request.values)
        device = request.values[0].device if request.values else HOST
        attempts = solving.attempts(canonical, request.size, device)
        if not isinstance(attempts[0].solver, BatchSolver):
            device = HOST
        thetas = thetas_of(self.declared, request.values, device)
        differentiable = torch.is_grad_enabled() and any(theta.requires_grad for theta in thetas)
        bad = (
            torch.zeros(request.size, dtype=torch.bool)
            if request.bad.which is None
            else request.bad.which
        )
        asked = ConeRequest(
            canonical=canonical,
            attempts=attempts,
            tolerance=tolerance_of(solving, request.values),
            executor=self.executor,
            elimination=None if solving.alone else canonical.elimination,
            core=self._core(solving, device, attempts[0].solver, request.size),
            called=None if request.called is None else request.called.solved,
            lift=None if request.called is None else request.called.calls.maps.whole,
            device=device,
            bad=bad,
            start=self._start(request),
            differentiable=differentiable,
            judged=request.everything or (differentiable and self.gradient.name == "exact"),
            selected=self.declared.weight is not None,
            parameters_precision=domain.relative(coarsest),
            gradient=self.gradient,
            tell=request.tell,
        )
        found = solve(asked, thetas)
        x, y, value = attached(found, thetas)
        if request.samples is not None:
            self.starts.put(request.samples, found.point, found.verdict.status == Status.SOLVED)

        def recovered(x: Tensor, y: Tensor, value: Tensor) -> list[Tensor]:
            outputs = [recovery.value(x, y) for recovery in canonical.variables]
            return [*outputs, canonical.objective(value)] if request.everything else outputs

        def outputs_at(values: list[Tensor]) -> list[Tensor]:
            given = [*(value.to(device, torch.float64) for value in values), *thetas[len(values) :]]
            entries = [
                reader.read(value)
                for reader, value in zip(canonical.parameters, given, strict=True)
            ]
            return recovered(*known(found.derivative.solution, lambda: found.derivative, entries))

        return Found(
            recovered(x, y, value),
            outputs_at,
            found.verdict,
            blank=found.blank,
            stopped=found.stopped,
            iterate=found.point,
            notes=(
                *_ways(attempts, found.attempt, found.verdict.status),
                *_agreed(found.agreement),
            ),
            details={**_disagreeing(found.agreement, coarsest), **_stopped(found)},
        )

    def _core(
        self, solving: Solving, device: torch.device, solver: ConeSolver, batch: int
    ) -> Plan | None:
        """The compiled core is for the host, where nothing says who is to solve the rows, and
        where it is not the slower way."""
        if solving.alone or device.type != "cpu" or self.declared.weight is not None:
            return None
        return cheaper_core(self.declared.canonical, solver, batch)

    def _start(self, request: Request) -> tuple[Tensor, ...] | None:
        """Where the rows' solutions were last, or where the request says."""
        if request.samples is None:
            return request.start
        program = self.declared.canonical.program
        return self.starts.get(request.samples, (program.n, program.m, program.m))


def coarsest_of(values: Sequence[Tensor]) -> torch.dtype:
    """The dtype of least precision."""
    return max((v.dtype for v in values), key=domain.relative, default=torch.float64)


def tolerance_of(solving: Solving, values: Sequence[Tensor]) -> float:
    """No answer is wanted beyond the rounding of what it is made of."""
    rounding = ROUNDINGS * torch.finfo(coarsest_of(values)).eps
    return max(solving.tolerance, min(rounding, COARSEST))


def thetas_of(
    declared: Declaration, values: Sequence[Tensor], device: torch.device
) -> list[Tensor]:
    """The cone program's parameters from the user's, (B or 1, *shape) each."""
    thetas = [value.to(device, torch.float64) for value in values]
    if declared.weight is not None:
        thetas.append(least_norm_weight(declared.canonical, thetas, device))
    return thetas


def entries_of(declared: Declaration, values: Sequence[Tensor]) -> list[Tensor]:
    """What the cone program reads of the user's parameters, (B or 1, size) each, on the host."""
    thetas = thetas_of(declared, values, HOST)
    return [
        reader.read(theta)
        for reader, theta in zip(declared.canonical.parameters, thetas, strict=True)
    ]


def _ways(attempts: Sequence[Attempt], taken: Tensor, status: Tensor) -> list[Note]:
    """Rows that were not settled by the first solver but by another."""
    first, notes = attempts[0].solver.name, list[Note]()
    if bool(taken.any()):
        for name in dict.fromkeys(attempt.solver.name for attempt in attempts[1:]):
            mine = [
                place
                for place, attempt in enumerate(attempts)
                if place and attempt.solver.name == name
            ]
            rows = torch.nonzero(torch.isin(taken, torch.tensor(mine))).flatten()
            if len(rows):
                why = "sharper" if name == first else f"not settled by {first}"
                notes += another_way(rows, status[rows], why, f"by {name}")
    return notes


def _agreed(agreement: Agreement | None) -> list[Note]:
    return [] if agreement is None else made_to_agree(agreement.apart, agreement.refuted)


def _stopped(found: ConeFound) -> dict[int, str]:
    """Why rows have not converged that were not given the time."""
    if found.stopped is None:
        return {}
    rows = torch.nonzero(found.stopped & (found.verdict.status == Status.NOT_CONVERGED)).flatten()
    return dict.fromkeys(rows.tolist(), STOPPED)


def _disagreeing(agreement: Agreement | None, dtype: torch.dtype) -> dict[int, str]:
    """Why rows are infeasible whose equalities do not agree."""
    if agreement is None:
        return {}
    precision = str(dtype).removeprefix("torch.")
    return {
        row: f"Constraints that depend on each other disagree by {agreement.apart[row]:.1g}, relative to their right-hand "
        f"sides: more than rounding in {precision} explains. If it is rounding all the same, say so by "
        "solver_args={'tolerance': ...}, or make them agree before the layer, as in b / b.sum() * a.sum()."
        for row in torch.nonzero(agreement.refuted).flatten().tolist()
    }
