"""What factorising the system of the residual map costs, in seconds and flops: what the choice
between its forms is made by.

The models are of flops and fixed costs; their constants are fitted to measurements on two cores
(`python -m benchmarks --suite crossover`, which also says how often the choices they lead to are
the best). Each solver's own cost stands in its file.
"""

from __future__ import annotations

import math

from convlayer.conic.pattern import kkt_pattern
from convlayer.conic.program import DENSE_ENTRIES, Program

# Flops a second of batched dense LU, and the seconds that a row takes beside them.
DENSE_RATE, DENSE_CALL = 5e9, 1e-5
# The same of sparse LDL'.
SPARSE_RATE, SPARSE_CALL = 1e9, 4e-5
# Stored entries of a sparse matrix that are assembled, scaled and multiplied by in a second.
ENTRY_RATE = 3e7


def dense_seconds(program: Program) -> float:
    """Of a row by batched LU, with about as many active rows as variables; infinite if it is too
    large."""
    if (program.n + program.m) * program.n > DENSE_ENTRIES:
        return math.inf
    size = _dense_size(program)
    return DENSE_CALL + (2 / 3 * size**3 + 40 * size**2) / DENSE_RATE


def sparse_seconds(program: Program) -> float:
    """Of a row by sparse LDL'."""
    pattern = kkt_pattern(program)
    return SPARSE_CALL + pattern.flops / SPARSE_RATE + pattern.nnz / ENTRY_RATE


def prefers_dense(program: Program) -> bool:
    """Whether dense batched LU is expected to cost less than sparse LDL'."""
    dense = dense_seconds(program)
    return dense <= SPARSE_CALL or (dense < math.inf and dense <= sparse_seconds(program))


def system_seconds(program: Program) -> float:
    """Of a row by the cheaper of the two."""
    dense = dense_seconds(program)
    return dense if dense <= SPARSE_CALL else min(dense, sparse_seconds(program))


def system_flops(program: Program) -> tuple[float, float]:
    """(a factorisation, a solve) of a row, in the form that polish and adjoint take."""
    if prefers_dense(program):
        size = _dense_size(program)
        return 2 / 3 * size**3, 2.0 * size**2
    pattern = kkt_pattern(program)
    return float(pattern.flops), 4.0 * pattern.fill


def _dense_size(program: Program) -> int:
    """Unknowns of a row: inactive rows have left the system, and few more stay than there are
    variables."""
    return program.n + min(program.m, program.n)
