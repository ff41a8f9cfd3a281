"""What solving and differentiating a cone program costs, in seconds: what choices between forms are made by. Each solver's own cost
stands in its file.

The models are of flops and fixed costs; their constants are fitted to measurements on two cores
(`python -m benchmarks --suite crossover`, which also says how often the choices they lead to are the best).
"""

from __future__ import annotations

from convlayer.conic.kkt import prefers_dense
from convlayer.conic.pattern import kkt_pattern
from convlayer.conic.program import Program


def system_flops(program: Program) -> tuple[float, float]:
    """(a factorisation, a solve) of the KKT matrix of a row, in the form that polish and adjoint take."""
    if prefers_dense(program):
        size = program.n + min(program.m, program.n)
        return 2 / 3 * size**3, 2.0 * size**2
    pattern = kkt_pattern(program)
    return float(pattern.flops), 4.0 * pattern.fill
