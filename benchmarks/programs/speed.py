"""Our layers on quadratic, second-order, exponential and semidefinite programs, against every peer
that takes them."""

from __future__ import annotations

import re
import statistics
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.programs.cases import CASES, Variables, for_peers
from benchmarks.programs.rivals import BY_MATRIX, MATRICES, PROXQP, QPTH, names, peer
from benchmarks.structures.rivals import CVXPYLAYERS, MOREAU
from benchmarks.structures.timing import Run, Timed, alternating, cell, errors, reason
from benchmarks.table import Family, Options, Row
from convlayer import ConvexLayer
from convlayer.problems import Declared

OURS, FACTORED, GENERIC = "ours", "ours, factor", "by Clarabel"
THREADS = f"{QPTH}, threads"
TRIALS = 3
RATIO, SPELLING = "ratio", "factor / ours"
SOLVED = 0.1  # relative error of the solution above which a peer has solved another problem
SECONDS = 6.0
LONG = (
    8.0  # seconds of a first call that is the measurement: what is wanted is judged on warm calls
)


@dataclass(frozen=True)
class Task:
    """A batch of one program; `wanted` are ratios over peers."""

    problem: str
    batch: int
    sizes: tuple[int, ...]
    label: str
    wanted: Mapping[str, float] = field(default_factory=dict)
    peer_rows: int = 0  # rows that peers are measured on, scaled to the batch; 0: all

    @property
    def name(self) -> str:
        return f"{self.label} {self.batch} x {self.shape}"

    @property
    def shape(self) -> str:
        if self.quadratic:
            words = zip(self.sizes, ("variables", "inequalities", "equalities"), strict=True)
            return f"({', '.join(f'{size} {word}' for size, word in words if size)})"
        if self.problem == "second_order_program":
            return "({} variables, {} cones of {})".format(*self.sizes)
        return f"({self.sizes[0]} x {self.sizes[-1]})"

    @property
    def quadratic(self) -> bool:
        return self.problem == "dense_program"

    @property
    def declared(self) -> Declared:
        return CASES[self.problem](*self.sizes)

    def data(self) -> Variables:
        return CASES[self.problem].sample(self.batch, 0, *self.sizes)


SMALL = (20, 20, 5)
TASKS = [
    Task("dense_program", 64, (100, 100, 20), "QP", {MOREAU: 4.0, CVXPYLAYERS: 12.0, QPTH: 1.8}),
    Task("dense_program", 32, SMALL, "QP", {MOREAU: 1.5}),
    *(Task("dense_program", batch, SMALL, "QP") for batch in (1, 8, 512)),
    Task("second_order_program", 32, (10, 6, 4), "SOCP", {MOREAU: 1.5}),
    Task("logistic_regression", 16, (30, 5), "logistic regression", {MOREAU: 1.5}),
    Task("nearest_correlation", 16, (6,), "nearest correlation", {MOREAU: 1.5}),
]


def family(options: Options) -> Family:
    tasks = [task for task in TASKS if not (options.quick and task.batch == 512)]
    return Family(
        "speed",
        "Forward and the gradient of all parameters, milliseconds: medians and quartiles over calls that alternate, float64. "
        f"`over PEER` is that peer over ours, `{RATIO}` the fastest of them; a peer whose solution is off by more than {SOLVED:.0%} "
        "has solved another problem and does not count, and what is wanted over it is then wanted over the fastest. "
        "We take quad_form of a Parameter P, as do the layers of matrices, "
        f"{' and '.join(MATRICES)}; {CVXPYLAYERS} (its default solver) refuses it and gets L with P = L'L in sum_squares(L @ x), and "
        f"{MOREAU} is run with both: `{over(MOREAU)}` is its spelling with L, `{over(BY_MATRIX)}` that with P. "
        f"{QPTH} runs on all torch threads or on one, whichever is faster in {TRIALS} calls before. "
        f"`{FACTORED}` is ours in that spelling. `{GENERIC}` is ours with that solver, row by row. "
        "Errors are relative differences from ours, the worst row. Peers run on the host.",
        [(task.name, lambda task=task: [measure(task, options)]) for task in tasks],
        summary,
    )


def measure(task: Task, options: Options, seconds: float = SECONDS) -> Row:
    declared, host = task.declared, task.data()
    data = tuple(t.to(options.device, options.dtype) for t in host)
    fewer = task.peer_rows or task.batch
    peers, given = for_peers(task.problem, task.sizes, tuple(t[:fewer] for t in host))
    scale = task.batch / fewer
    ours = Run(layer(declared), data)
    runs = {OURS: ours, GENERIC: Run(layer(declared, solver="clarabel"), data)}
    if task.quadratic:
        runs[FACTORED] = Run(layer(peers), for_peers(task.problem, task.sizes, data)[1])
    refused: dict[str, Timed | str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names(task.quadratic):
            try:
                matrices = name in (BY_MATRIX, *MATRICES)
                runs[name] = Run(
                    peer(name, declared, peers),
                    tuple(t[:fewer] for t in host) if matrices else given,
                    scale,
                )
            except Exception as error:  # the peer's failure is a finding
                refused[name] = reason(error)
        if QPTH in runs:
            runs[QPTH] = faster(runs[QPTH], runs[QPTH].on_one_thread())
        found = refused | alternating(runs, seconds / 4 if options.quick else seconds, LONG)
    mine = found[OURS]
    if isinstance(mine, str):
        raise RuntimeError(mine)
    figures: dict[str, Any] = {
        "solver": solver(runs[OURS].layer, task.batch),
        "forward": mine.forward,
        OURS: mine.total,
        "quartiles": mine.quartiles,
        RATIO: None,
    }
    rivals: dict[str, float] = {}
    columns: dict[str, Any] = {}
    for name in names(task.quadratic):
        columns[name] = cell(found[name])
        if name not in runs:
            continue
        given_to = declared if name in (BY_MATRIX, *MATRICES) else peers
        solution, gradient = errors(ours, runs[name], declared, given_to)
        if isinstance(timed := found[name], Timed):
            columns[f"{name} quartiles"] = timed.quartiles
            if solution is not None and solution <= SOLVED:
                rivals[name] = timed.total / mine.total
        if name == QPTH:
            columns[THREADS] = "one" if runs[name].alone else "all"
        columns |= {f"{name} solution": solution, f"{name} gradient": gradient}
    if rivals:
        figures[RATIO] = min(rivals.values())
    figures |= {over(name): rivals.get(name) for name in names(task.quadratic)}
    figures |= {name: cell(found[name]) for name in (FACTORED, GENERIC) if name in found}
    if isinstance(figures.get(FACTORED), float):
        figures[SPELLING] = figures[FACTORED] / mine.total
    wanted = {
        over(name) if name in rivals else RATIO: (">=", bound)
        for name, bound in task.wanted.items()
    }
    return Row(task.name, figures | columns, wanted)


def faster(*runs: Run) -> Run:
    """Whose best call is the shortest; the threads of the other would be in the way of everyone
    else in the rounds to come."""
    try:
        return min(runs, key=lambda run: min(sum(run()) for _ in range(TRIALS)))
    except Exception:  # which the rounds will state
        return runs[0]


def layer(declared: Declared, **options: Any) -> ConvexLayer:
    return ConvexLayer(declared.problem, declared.parameters, declared.variables, **options)


def solver(ours: ConvexLayer, batch: int) -> str:
    """The one that the layer takes at this batch, in its own words."""
    said = re.search(r"^Solver: +(\w+)", ours.explain(batch), re.MULTILINE)
    return said[1] if said else ours.structure


def over(name: str) -> str:
    return f"over {name}"


def summary(rows: list[Row]) -> Iterable[Row]:
    """Geometric means over the rows."""
    columns = (RATIO, *map(over, (CVXPYLAYERS, MOREAU, BY_MATRIX, QPTH, PROXQP)), SPELLING)
    figures = {
        c: [row.figures[c] for row in rows if isinstance(row.figures.get(c), float)]
        for c in columns
    }
    yield Row(
        "geometric mean",
        {c: statistics.geometric_mean(values) for c, values in figures.items() if values},
    )
