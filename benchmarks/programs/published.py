"""The dense quadratic program of the paper on differentiable convex optimisation layers, beside its
published times.

128 instances of 128 variables and 128 inequalities, forward and backward. Source: Agrawal, Amos,
Barratt, Boyd, Diamond and Kolter (2019), Differentiable convex optimization layers, section 7;
their six-core machine of that year.
"""

from __future__ import annotations

from benchmarks.programs.rivals import QPTH
from benchmarks.programs.speed import Task, measure
from benchmarks.structures.rivals import CVXPYLAYERS
from benchmarks.table import Family, Options, Row

AS_PUBLISHED = {CVXPYLAYERS: 2000.0, QPTH: 1220.0}  # milliseconds
FULL = Task("dense_program", 128, (128, 128, 0), "dense QP")
QUICK = Task("dense_program", 8, (128, 128, 0), "dense QP")
SECONDS = 8.0


def family(options: Options) -> Family:
    task = QUICK if options.quick else FULL
    return Family(
        "published",
        "The dense quadratic program of Agrawal et al. (2019), columns as above. `as published` are milliseconds from that paper, for "
        "CVXPY's layers (diffcp) and for OptNet (qpth), on a machine of 2019: not comparable but in order of magnitude; the same peers, in "
        "today's releases on this machine, stand beside them.",
        [(task.name, lambda: [compared(task, options)])],
    )


def compared(task: Task, options: Options) -> Row:
    row = measure(task, options, SECONDS)
    if task is FULL:
        row.figures |= {f"{name}, as published": figure for name, figure in AS_PUBLISHED.items()}
    return row
