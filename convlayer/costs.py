"""What solving and differentiating a cone program costs, in seconds: what the choices between solvers and forms are made by.

The models are of flops and fixed costs; their constants are fitted to measurements on two cores
(`python -m benchmarks --suite crossover`, which also says how often the choices they lead to are the best).
"""

from __future__ import annotations

import math

from convlayer.kkt import dense_seconds, prefers_dense, system_seconds
from convlayer.pattern import kkt_pattern
from convlayer.program import Program

TYPICAL = 14  # factorisations of an interior-point solve with its polish
STEPS, STEP, ROW_STEP = 10, 4.5e-4, 8e-6  # the batched interior point: iterations, an iteration, a row in it
BATCHED_RATE = 1e10  # flops a second of it
ROW, ROW_RATE = 5e-5, 1e9  # Clarabel, on one core: a row, flops a second
DAQP_ROW, DAQP_RATE = 2e-5, 3e9  # DAQP, the same


def clarabel_row(program: Program) -> float:
    """A row: sparse factorisations."""
    return ROW + clarabel_flops(program) / ROW_RATE


def clarabel_flops(program: Program) -> float:
    return float(TYPICAL * kkt_pattern(program).flops)


def daqp_row(program: Program) -> float:
    """A row of a linear or quadratic program: a dense set-up, then steps that exchange about every second constraint."""
    if not program.is_polyhedral:
        return math.inf
    return DAQP_ROW + daqp_flops(program) / DAQP_RATE


def daqp_flops(program: Program) -> float:
    n, m = program.n, program.m
    return n**3 / 3 + m * n**2 + min(n, m) / 2 * (n + m) * n


def batched_interior_point(program: Program, batch: int) -> float:
    """A batch of a linear or quadratic program: dense factorisations."""
    return STEPS * (STEP + batch * (ROW_STEP + step_flops(program) / BATCHED_RATE))


def step_flops(program: Program) -> float:
    """Of a step of the batched interior point, a row."""
    n, equalities = program.n, program.m - program.inequality_count
    return 2.0 * program.inequality_count * n**2 + (n + equalities) ** 3 / 1.5


def solve_flops(solver: str, program: Program) -> float | None:
    """Of a row by the solver of this name; None: it takes as many iterations as it takes."""
    known = {
        "clarabel": clarabel_flops,
        "daqp": daqp_flops,
        "interior_point": lambda program: STEPS * step_flops(program),
    }
    return known[solver](program) if solver in known else None


def system_flops(program: Program) -> tuple[float, float]:
    """(a factorisation, a solve) of the KKT matrix of a row, in the form that polish and adjoint take."""
    if prefers_dense(program):
        size = program.n + min(program.m, program.n)
        return 2 / 3 * size**3, 2.0 * size**2
    pattern = kkt_pattern(program)
    return float(pattern.flops), 4.0 * pattern.fill


def row_seconds(program: Program, dense: bool = False) -> float:
    """Of solving a row by the cheaper of the solvers that go row by row, its polish and its adjoint, `dense` or as is cheaper."""
    system = dense_seconds(program) if dense else system_seconds(program)
    return min(daqp_row(program), clarabel_row(program)) + 2 * system
