"""Quadratic programs that nobody here wrote, over two decades of size, and dense ones of bad
condition: solved, or honestly not."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from benchmarks.measure import clock
from benchmarks.programs.instances import (
    CONDITIONS,
    DENSE,
    INEQUALITIES,
    SPARSE,
    N,
    examine,
    instance,
)
from benchmarks.programs.instances import Family as Drawn
from benchmarks.programs.speed import solver
from benchmarks.table import Family, Options, Row
from convlayer import Status

ERROR, SOLVED, ROWS = "worst KKT of solved", "solved", "rows"
WITHIN = 1e-8
MODERATE = 1e4  # condition up to which every row is wanted solved
BATCH = 2
SIZES = {  # by family, so that there are about 10, 100 and 1000 variables
    "random_quadratic_program": (10, 100, 300),
    "equality_program": (10, 100, 1000),
    "predictive_control": (2, 8, 32),
    "portfolio": (1, 10, 90),
    "lasso": (1, 10, 80),
    "huber": (1, 5, 32),
    "support_vectors": (1, 10, 90),
}


def family(options: Options) -> Family:
    sizes = {name: sizes[:1] if options.quick else sizes for name, sizes in SIZES.items()}
    tasks = [(f"{name} {size}", SPARSE[name], size, 1.0) for name in sizes for size in sizes[name]]
    tasks += [
        (name, drawn, N, condition)
        for name, (drawn, condition) in DENSE.items()
        if not options.quick or condition == CONDITIONS[-1]
    ]
    return Family(
        "families",
        f"Quadratic programs drawn as by Stellato et al. (2020), {BATCH} instances each, by size, sparse; and dense ones with {N} variables and "
        f"{INEQUALITIES} inequalities whose objective (P, or its factor L), inequalities G or equalities A have that condition. Every row is "
        f"solved or says that it is not; `{ERROR}` is the largest violation of the optimality conditions on the user's problem, in NumPy, "
        "relative to their terms; `objective` is the relative difference from a second solver at 1e-10 (Clarabel or OSQP by CVXPY), of "
        "which `no second` rows have none. Seconds of the layer's construction and of a forward.",
        [
            (name, lambda task=(name, drawn, size, condition): [measure(*task)])
            for name, drawn, size, condition in tasks
        ],
        summary,
    )


def measure(name: str, drawn: Drawn, size: int, condition: float) -> Row:
    these = instance(drawn, size, BATCH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = clock()
        layer = these.layer()
        built = clock()
        solution = layer.solve(*these.tensors())
        solved = clock()
        findings = examine(these, solution)
    sure = [finding for finding in findings if finding.status is Status.SOLVED]
    differences = [finding.objective for finding in sure if finding.objective is not None]
    figures = {
        "variables": sum(v.size for v in these.variables),
        "constraints": sum(c.size for c in these.problem.constraints),
        "solver": solver(layer, BATCH),
        ROWS: len(findings),
        SOLVED: len(sure),
        "inaccurate": sum(finding.status is Status.INACCURATE for finding in findings),
        "failed": sum(finding.status.failed for finding in findings),
        ERROR: max((finding.error for finding in sure), default=None),
        "objective": max(differences, default=None),
        "no second": len(sure) - len(differences),
        "build": built - start,
        "forward": solved - built,
    }
    wanted = {ERROR: ("<=", WITHIN)} if sure else {}
    if condition <= MODERATE:
        wanted[SOLVED] = (">=", float(BATCH))
    return Row(name, figures, wanted)


def summary(rows: list[Row]) -> Iterable[Row]:
    """How many are solved, and the worst of them."""
    measured = [row for row in rows if not row.error]
    figures = {
        c: sum(row.figures[c] for row in measured)
        for c in (ROWS, SOLVED, "inaccurate", "failed", "no second")
    }
    worst = {
        c: max((v for row in measured if (v := row.figures[c]) is not None), default=None)
        for c in (ERROR, "objective")
    }
    yield Row("all", figures | worst, {ERROR: ("<=", WITHIN), "objective": ("<=", WITHIN)})
