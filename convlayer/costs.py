"""What solving and differentiating a cone program costs, in seconds: what the choices between solvers and forms are made by.

The models are of flops and fixed costs; their constants are fitted to measurements on two cores
(`python -m benchmarks --suite crossover`, which also says how often the choices they lead to are the best).
"""

from __future__ import annotations

import math

from convlayer.kkt import dense_seconds, system_seconds
from convlayer.pattern import kkt_pattern
from convlayer.program import Program

TYPICAL = 14  # factorisations of an interior-point solve with its polish
STEPS, STEP, ROW_STEP = 10, 4.5e-4, 8e-6  # the batched interior point: iterations, an iteration, a row in it
BATCHED_RATE = 1e10  # flops a second of it
ROW, ROW_RATE = 5e-5, 1e9  # Clarabel, on one core: a row, flops a second
DAQP_ROW, DAQP_RATE = 2e-5, 3e9  # DAQP, the same


def clarabel_row(program: Program) -> float:
    """A row: sparse factorisations."""
    return ROW + TYPICAL * kkt_pattern(program).flops / ROW_RATE


def daqp_row(program: Program) -> float:
    """A row of a linear or quadratic program: a dense set-up, then steps that exchange about every second constraint."""
    if not program.is_polyhedral:
        return math.inf
    n, m = program.n, program.m
    return DAQP_ROW + (n**3 / 3 + m * n**2 + min(n, m) / 2 * (n + m) * n) / DAQP_RATE


def batched_interior_point(program: Program, batch: int) -> float:
    """A batch of a linear or quadratic program: dense factorisations."""
    n, equalities = program.n, int((~program.inequalities).sum())
    dense = 2.0 * (program.m - equalities) * n**2 + (n + equalities) ** 3 / 1.5
    return STEPS * (STEP + batch * (ROW_STEP + dense / BATCHED_RATE))


def row_seconds(program: Program, dense: bool = False) -> float:
    """Of solving a row by the cheaper of the solvers that go row by row, its polish and its adjoint, `dense` or as is cheaper."""
    system = dense_seconds(program) if dense else system_seconds(program)
    return min(daqp_row(program), clarabel_row(program)) + 2 * system
