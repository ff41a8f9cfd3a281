"""Clarabel: interior point, quadratic objectives, all cones; what cones other than linear ones
take, and rows that another solver does not settle.

Its conventions are ours: the psd cone is the upper triangle in column-major order, off-diagonals
                          times sqrt 2.
Source: Goulart and Chen (2024), Clarabel: an interior-point solver for conic programs with
        quadratic objectives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import clarabel
import numpy as np
import scipy.sparse as sp

from convlayer.cones import Exponential, Nonnegative, Power, Psd, SecondOrder, Zero
from convlayer.conic.pattern import kkt_pattern
from convlayer.conic.program import Program
from convlayer.progress import current
from convlayer.solution import Status
from convlayer.solvers.solver import SHORT, Iterate, Solver, Task, interrupted

STATUS = {
    "Solved": Status.SOLVED,
    "AlmostSolved": Status.INACCURATE,
    "PrimalInfeasible": Status.INFEASIBLE,
    "AlmostPrimalInfeasible": Status.INFEASIBLE,
    "DualInfeasible": Status.UNBOUNDED,
    "AlmostDualInfeasible": Status.UNBOUNDED,
}

# What Clarabel calls a block of each cone.
CONES = {
    Zero.name: lambda block: clarabel.ZeroConeT(block.size),
    Nonnegative.name: lambda block: clarabel.NonnegativeConeT(block.size),
    SecondOrder.name: lambda block: clarabel.SecondOrderConeT(block.size),
    Psd.name: lambda block: clarabel.PSDTriangleConeT(block.parameter),
    Exponential.name: lambda block: clarabel.ExponentialConeT(),
    Power.name: lambda block: clarabel.PowerConeT(block.parameter),
}
# A solve with its polish takes about so many factorisations.
FACTORISATIONS = 14
# A row takes so many seconds, and its flops at such a rate, on one core: fitted to measurements.
ROW, ROW_RATE = 5e-5, 1e9


class Clarabel(Solver):
    """Every cone, by a sparse interior point in compiled code, row by row."""

    name: ClassVar[str] = "clarabel"
    cones: ClassVar[frozenset[str] | None] = frozenset(CONES)
    finest: ClassVar[float | None] = 1e-13
    # Two thirds of the time.
    quick: ClassVar[Mapping[str, Any]] = {
        "iterative_refinement_enable": False,
        "equilibrate_enable": False,
    }

    def check(self, program: Program, options: Mapping[str, Any]) -> None:
        self.check_cones(program)
        # A program of one variable and one row, so that what only the solver itself can refuse is
        # refused here.
        one, settings = sp.csc_matrix(np.ones((1, 1))), self._settings(1e-8, options)
        try:
            clarabel.DefaultSolver(
                one, np.ones(1), one, np.ones(1), [clarabel.ZeroConeT(1)], settings
            )
        except Exception as error:  # a plain Exception is what Clarabel's binding raises
            raise TypeError(
                f"Clarabel does not take these options, {dict(options)}: {error}"
            ) from error

    def solve(self, task: Task) -> list[Iterate]:
        settings = self._settings(task.tolerance, task.options)
        cones = [CONES[block.name](block) for block in task.program.cones.blocks]
        solver, iterates = None, []
        for row in range(len(task)):
            if interrupted():
                return []  # nobody reads them
            solver = self._load(solver, task, row, cones, settings)
            iterates.append(_iterate(solver.solve(), settings.time_limit))
        return iterates

    def flops(self, program: Program) -> float:
        """Sparse factorisations."""
        return float(FACTORISATIONS * kkt_pattern(program).flops)

    def row_seconds(self, program: Program) -> float:
        return ROW + self.flops(program) / ROW_RATE

    def _settings(self, tolerance: float, options: Mapping[str, Any]) -> clarabel.DefaultSettings:
        settings = clarabel.DefaultSettings()
        settings.verbose = False
        # Without presolve and chordal decomposition a solver takes new values on the old pattern,
        # which saves its set-up.
        settings.presolve_enable = False
        settings.chordal_decomposition_enable = False
        settings.tol_feas = settings.tol_gap_abs = settings.tol_gap_rel = tolerance
        for option, value in options.items():
            if option.startswith("_") or option == "default" or not hasattr(settings, option):
                known = sorted(
                    name for name in dir(settings) if not name.startswith("_") and name != "default"
                )
                raise TypeError(
                    f"Clarabel has no option `{option}`. It has: tolerance, {', '.join(known)}."
                )
            try:
                setattr(settings, option, value)
            except (TypeError, ValueError, OverflowError) as error:
                raise TypeError(
                    f"Clarabel's option `{option}` cannot be {value!r}: {error}"
                ) from error
        return settings

    def _load(self, solver, task: Task, row: int, cones, settings):
        if solver is not None and solver.is_data_update_allowed():
            P, q, A, b = task.values(row)
            if task.vectors_only:
                solver.update(q=q, b=b)
            else:
                solver.update(P=P, q=q, A=A, b=b)
            return solver
        solver = clarabel.DefaultSolver(*task.matrices(row), cones, settings)
        if task.program.n + task.program.m > SHORT:
            solver.set_termination_callback(_seen)
        return solver


def _seen(info) -> bool:
    """Between two iterations: whether to end."""
    work = current()
    if work.watched:
        error = max(info.res_primal, info.res_dual, info.gap_rel)
        work.note(f"iteration {info.iterations}, error {error:.0e}")
    return interrupted()


def _iterate(result, time_limit: float) -> Iterate:
    status = STATUS.get(str(result.status), Status.NOT_CONVERGED)
    stopped = (
        status in (Status.INACCURATE, Status.NOT_CONVERGED) and result.solve_time >= time_limit
    )
    x, s, y = (np.array(part) for part in (result.x, result.s, result.z))
    return Iterate(
        x, s, y, Status.NOT_CONVERGED if stopped else status, int(result.iterations), stopped
    )
