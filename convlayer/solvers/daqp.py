"""DAQP: dual active set for dense, strictly convex quadratic programs, in compiled code;
microseconds for small ones.

It ends on an active set, so that its answer is exact to rounding. Programs whose P is singular it
regularises; where that fails, or the program has no solution (of which it gives no proof), the row
is left to another solver. Source: Arnstrom, Bemporad and Axehill (2022), A dual active-set solver
for embedded quadratic programming.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import daqp
import numpy as np

from convlayer.cones import Nonnegative, Zero
from convlayer.conic.program import Program
from convlayer.solution import Status
from convlayer.solvers.solver import Iterate, Solver, Task, fits_densely, interrupted

# DAQP's code for a constraint that is always active.
EQUALITY = 5
# Its lower bound where there is none.
FREE = -1e30
# Its codes for a solution and for the end of its time, and ours for a system without one.
OPTIMAL, LATE, FAILED = 1, -7, 0
# A batch is solved before a thread has taken it up where rows times cubed unknowns are fewer.
BRIEF = 5e6
SETTINGS = {"primal_tol": 1e-9}
# Linear programs take proximal steps, which degenerate ones survive, until they stand still.
LINEAR = {"eps_prox": 0.1, "eta_prox": 1e-12}
# A row takes so many seconds, and its flops at such a rate, on one core: fitted to measurements.
ROW, ROW_RATE = 2e-5, 3e9
# A row ends after so many steps for each variable and row: another solver is the faster one then.
STEPS = 20


class Daqp(Solver):
    """Linear and quadratic programs, by dense active sets in compiled code, row by row."""

    name: ClassVar[str] = "daqp"
    cones: ClassVar[frozenset[str] | None] = frozenset({Zero.name, Nonnegative.name})
    programs: ClassVar[str] = "linear and quadratic programs"
    manner: ClassVar[str] = "dense active sets, compiled, row by row"
    dense: ClassVar[bool] = True
    at_vertex: ClassVar[bool] = True

    def check(self, program: Program, options: Mapping[str, Any]) -> None:
        self.check_cones(program)
        known = daqp.Model().settings
        for option, value in options.items():
            if option not in known:
                raise TypeError(
                    f"DAQP has no option `{option}`. It has: tolerance, {', '.join(sorted(known))}."
                )
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"DAQP's option `{option}` cannot be {value!r}: it is a number.")

    def solve(self, task: Task) -> list[Iterate]:
        program = task.program
        proximal = {} if len(program.P_rows) else LINEAR
        settings = {
            **SETTINGS,
            **proximal,
            "iter_limit": 1000 + STEPS * (program.n + program.m),
            **task.options,
        }
        equal = ~program.inequalities.numpy()
        sense = np.where(equal, EQUALITY, 0).astype(np.int32)
        P, A = _dense(task)
        lower = np.where(equal, task.b, FREE)
        model = None
        if task.vectors_only and program.m:
            model = daqp.Model()
            model.settings = settings
            if model.setup(P[0], task.q[0], A[0], task.b[0], lower[0], sense)[0] < 0:
                model = None
        found = []
        for row in range(len(task)):
            if interrupted():
                return []  # nobody reads them
            q, b = task.q[row], task.b[row]
            if not program.m:
                found.append(_unconstrained(P[row % len(P)], q))
                continue
            if model is None:
                x, _, code, info = daqp.solve(
                    P[row % len(P)], q, A[row % len(A)], b, lower[row], sense, **settings
                )
            else:
                if row:
                    model.update(f=q, bupper=b, blower=lower[row], sense=sense)
                x, _, code, info = model.solve()
            found.append((x, info["lam"], code, info["iterations"]))
        return _iterates(found, A, task.b, equal)

    def fits(self, program: Program, batch: int) -> bool:
        return fits_densely(program, batch)

    def flops(self, program: Program) -> float:
        """A dense set-up, then steps that exchange about every second constraint."""
        n, m = program.n, program.m
        return n**3 / 3 + m * n**2 + min(n, m) / 2 * (n + m) * n

    def row_seconds(self, program: Program) -> float:
        return ROW + self.flops(program) / ROW_RATE if program.is_polyhedral else math.inf

    def is_brief(self, program: Program, rows: int) -> bool:
        return rows * (program.n + program.m) ** 3 <= BRIEF


def _dense(task: Task) -> tuple[np.ndarray, np.ndarray]:
    """P (rows or 1, n, n) and A (rows or 1, m, n)."""
    program = task.program
    if task.A.ndim == 3:
        return task.P, task.A
    P = np.zeros((len(task.P), program.n, program.n))
    P[:, program.P_rows, program.P_cols] = task.P
    P[:, program.P_cols, program.P_rows] = task.P
    A = np.zeros((len(task.A), program.m, program.n))
    A[:, program.A_rows, program.A_cols] = task.A
    return P, A


def _unconstrained(P: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray, int, int]:
    try:
        return np.linalg.solve(P, -q), np.zeros(0), OPTIMAL, 0
    except np.linalg.LinAlgError:
        return np.full(len(q), np.nan), np.zeros(0), FAILED, 0


def _iterates(found: list[tuple], A: np.ndarray, b: np.ndarray, equal: np.ndarray) -> list[Iterate]:
    """From (x, y, DAQP's code, iterations) of each row."""
    if not found:
        return []
    x, y = (np.array([row[k] for row in found]) for k in (0, 1))
    y = np.where(equal, y, np.maximum(y, 0.0))
    slack = b - (A @ x[:, :, None])[:, :, 0]
    s = np.where(equal | (y > 0), 0.0, np.maximum(slack, 0.0))
    statuses = (Status.SOLVED if row[2] == OPTIMAL else Status.NOT_CONVERGED for row in found)
    counts, stopped = (int(row[3]) for row in found), (row[2] == LATE for row in found)
    return [Iterate(*row) for row in zip(x, s, y, statuses, counts, stopped, strict=True)]
