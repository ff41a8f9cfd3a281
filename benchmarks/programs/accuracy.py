"""Errors with default settings: of the optimality conditions, recomputed, of solutions, and of
gradients."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Iterable
from inspect import signature

from torch import Tensor

from benchmarks.accuracy import gradient_error, solution_error
from benchmarks.certificate import kkt_residual
from benchmarks.programs.cases import CASES, Variables
from benchmarks.structures.accuracy import differences
from benchmarks.structures.tasks import weights_of
from benchmarks.table import Family, Options, Row
from convlayer import ConvexLayer, Status

ROWS = 4
KKT, SOLUTION, GRADIENT = "KKT", "solution", "gradient"
WANTED = {KKT: ("<=", 1e-10), GRADIENT: ("<=", 1e-8)}
TASKS: list[tuple[str, tuple[int, ...]]] = [
    ("dense_program", (20, 20, 5)),
    ("dense_program", (50, 50, 10)),
    ("factored_program", (20, 20, 5)),
    ("second_order_program", (10, 6, 4)),
    ("logistic_regression", (30, 5)),
    ("nearest_correlation", (6,)),
    ("portfolio", (4,)),
    ("factor_portfolio", (5, 2)),
    ("lasso", (20, 5)),
    ("huber_regression", (6, 2)),
    ("support_vector_machine", (6, 2)),
    ("constrained_control", (4, 2, 5)),
]


def family(options: Options) -> Family:
    return Family(
        "accuracy",
        f"Errors at default settings, the worst of {ROWS} rows. `{KKT}`: the optimality conditions of our canonical point in CVXPY's own "
        "matrices, in NumPy, each relative to its terms. Solution and gradient: relative, against an oracle that is not ours and "
        "solves to rounding error, the gradient along random directions by 5-point differences of it; `kinks` counts pairs of "
        "row and direction where two steps disagree, left out. `solved`: rows that say so.",
        [
            (f"{name} {sizes}", lambda name=name, sizes=sizes: [measure(name, sizes, options)])
            for name, sizes in (TASKS[::3] if options.quick else TASKS)
        ],
        summary,
    )


def measure(name: str, sizes: tuple[int, ...], options: Options) -> Row:
    case = CASES[name]
    declared, tensors = case(*sizes), case.sample(ROWS, 0, *sizes)
    layer = ConvexLayer(declared.problem, declared.parameters, declared.variables)
    hidden = dict(zip(signature(case).parameters, sizes, strict=True))

    def ours(*leaves: Tensor) -> Variables:
        return tuple(
            x.cpu() for x in layer(*(leaf.to(options.device, options.dtype) for leaf in leaves))
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exact = case.oracle(*tensors, **hidden)
        expected, solution = differences(case, tensors, hidden), layer.solve(*tensors)
        assert solution.iterate is not None
        figures = {
            KKT: max(
                kkt_residual(
                    declared,
                    [t[k].numpy() for t in tensors],
                    *(v[k].numpy() for v in solution.iterate),
                )
                for k in range(ROWS)
            ),
            SOLUTION: solution_error(ours, tensors, exact),
            GRADIENT: gradient_error(ours, tensors, weights_of(exact), expected),
            "solved": int((solution.status == Status.SOLVED).sum()),
            "kinks": int((~expected[2]).sum()),
        }
    shape = ", ".join(f"{key} {size}" for key, size in hidden.items())
    return Row(
        f"{name} ({shape})", {column: _plain(figure) for column, figure in figures.items()}, WANTED
    )


def _plain(figure: float | int) -> float | int:
    return figure if isinstance(figure, int) else float(figure)


def summary(rows: list[Row]) -> Iterable[Row]:
    """Median and worst."""
    measured = [row for row in rows if not row.error]
    for name, reduce in (("median", statistics.median), ("worst", max)):
        figures = {
            c: reduce([row.figures[c] for row in measured]) for c in (KKT, SOLUTION, GRADIENT)
        }
        yield Row(name, figures, WANTED)
