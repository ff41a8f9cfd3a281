"""Our layers against cvxpylayers by its default solver and by Moreau, and against our own cone
program."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Iterable

from benchmarks.structures.rivals import CVXPYLAYERS, INCUMBENTS, MOREAU, incumbent
from benchmarks.structures.tasks import Task
from benchmarks.structures.timing import Run, Timed, alternating, cell, errors, reason
from benchmarks.table import Family, Options, Row

OURS, SINGLE, GENERIC = "ours", "ours, one thread", "generic"
RATIO, ALONE, OVER_GENERIC = "ratio", "ratio, one thread", "generic / ours"
SOLVED = 0.1  # relative error of the solution above which a peer has solved another problem
SECONDS = 5.0
TASKS = {
    Task("least_squares", "least_squares", 32, (100, 50)): 50,
    Task("least_squares", "least_squares", 256, (20, 10)): 30,
    Task("equality_constrained_qp", "equality_constrained_qp", 32, (50, 20)): 20,
    Task("entropic_optimal_transport", "entropic_optimal_transport", 4, (25, 25), 0.1): 20,
    Task("entropic_optimal_transport", "entropic_optimal_transport", 16, (100, 100), 0.01, 2): 20,
    Task("total_variation", "total_variation", 8, (500,)): 15,
    Task("total_variation", "total_variation", 64, (10_000,), None, 2): 15,
    Task("leading_eigenvector", "leading_eigenspace", 8, (8,)): 10,
    Task("softmax", "softmax", 2048, (1000,), None, 4): None,
    Task("sparsemax", "sparsemax", 2048, (1000,), None, 4): None,
}


def family(options: Options) -> Family:
    tasks = [task for task in TASKS if not (options.quick and task.peer_rows)]
    return Family(
        "incumbents",
        "Forward and the gradient of all parameters, milliseconds: medians and quartiles over calls that alternate. "
        f"`{RATIO}` is the faster of {CVXPYLAYERS} (its default solver) and {MOREAU} over ours, as it is and with ours on one torch thread; "
        f"a peer whose solution is off by more than {SOLVED:.0%} has solved another problem and does not count. Where `peer rows` is less than the batch, the "
        "peers and our generic path are timed on so many rows, at least one a core, and scaled to the batch. The peers' "
        "errors are relative differences from ours, the worst row; they run on the host. They take no quad_form of a "
        "Parameter: for the quadratic program they get its Cholesky factor.",
        [(task.name, lambda task=task: [measure(task, TASKS[task], options)]) for task in tasks],
        summary,
    )


def measure(task: Task, wanted: float | None, options: Options) -> Row:
    data = task.data(options)
    declared, given = task.for_peers(data)
    scale = task.batch / task.fewer
    fewer, given = tuple(t[: task.fewer] for t in data), tuple(t[: task.fewer].cpu() for t in given)
    ours = Run(task.layer(), data)
    runs = {OURS: ours, SINGLE: ours.on_one_thread(), GENERIC: Run(task.generic(), fewer, scale)}
    refused: dict[str, Timed | str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in INCUMBENTS:
            try:
                runs[name] = Run(incumbent(name, declared), given, scale)
            except Exception as error:  # the peer's failure is a finding
                refused[name] = reason(error)
        found = refused | alternating(runs, SECONDS / 4 if options.quick else SECONDS)
    mine = found[OURS]
    if isinstance(mine, str):
        raise RuntimeError(mine)
    figures = {
        "peer rows": task.fewer,
        OURS: mine.total,
        "quartiles": mine.quartiles,
        RATIO: None,
        SINGLE: None,
        ALONE: None,
    }
    figures |= {name: cell(found[name]) for name in (SINGLE, GENERIC)}
    if isinstance(figures[GENERIC], float):
        figures[OVER_GENERIC] = figures[GENERIC] / mine.total
    rivals = []
    for name in INCUMBENTS:
        timed = found[name]
        figures[name] = cell(timed)
        if name in runs:
            solution, gradient = errors(ours, runs[name], task.declared, declared)
            figures |= {f"{name} solution": solution, f"{name} gradient": gradient}
            if isinstance(timed, Timed):
                figures[f"{name} quartiles"] = timed.quartiles
                rivals += [timed.total] if solution is not None and solution <= SOLVED else []
    if rivals:
        figures[RATIO] = min(rivals) / mine.total
        figures[ALONE] = (
            min(rivals) / single if isinstance(single := figures[SINGLE], float) else None
        )
    return Row(task.name, figures, {} if wanted is None else {RATIO: (">=", wanted)})


def summary(rows: list[Row]) -> Iterable[Row]:
    """Geometric means over the rows."""
    yield Row(
        "geometric mean",
        {
            column: statistics.geometric_mean(values)
            for column in (RATIO, ALONE, OVER_GENERIC)
            if (
                values := [
                    row.figures[column]
                    for row in rows
                    if isinstance(row.figures.get(column), float)
                ]
            )
        },
    )
