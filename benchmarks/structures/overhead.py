"""What the layer adds to its kernel, at batch 1 and the library's smallest sizes."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial

from benchmarks.structures.tasks import Task
from benchmarks.table import Family, Options, Row
from convlayer.autodiff.threads import one_thread

PLAIN, TRACED = "overhead", "overhead, with gradient"
CALLS = 1000
TASKS = [
    Task("least_squares", "least_squares", 1, (8, 4)),
    Task("equality_constrained_qp", "equality_constrained_qp", 1, (5, 2)),
    Task("entropic_optimal_transport", "entropic_optimal_transport", 1, (4, 3)),
    Task("total_variation", "total_variation", 1, (6,)),
    Task("leading_eigenvector", "leading_eigenspace", 1, (4,)),
    Task("softmax", "softmax", 1, (4,)),
    Task("sparsemax", "sparsemax", 1, (5,)),
]


def family(options: Options) -> Family:
    return Family(
        "overhead",
        "Microseconds of a forward at batch 1: the layer, its kernel with its inputs bound, and what the layer adds; "
        "without and with parameters that require a gradient. Medians of calls that alternate, on one torch thread.",
        [(task.name, lambda task=task: [measure(task, options)]) for task in TASKS],
    )


def measure(task: Task, options: Options) -> Row:
    layer, values = task.layer(), list(task.data(options))
    specialised = layer._choice.kernel
    assert specialised is not None
    calls = CALLS // 5 if options.quick else CALLS
    figures = {}
    with warnings.catch_warnings(), one_thread():
        warnings.simplefilter("ignore")
        for column, traced in ((PLAIN, False), (TRACED, True)):
            leaves = [t.clone().requires_grad_(traced) for t in values]
            whole, kernel = medians(
                partial(layer, *leaves), partial(specialised._run, leaves, leaves[0]), calls=calls
            )
            if not traced:
                figures |= {"layer": whole, "kernel": kernel}
            figures[column] = whole - kernel
    return Row(task.name, figures, {PLAIN: ("<=", 150.0), TRACED: ("<=", 150.0)})


def medians(*runs: Callable[[], object], calls: int) -> list[float]:
    """Microseconds of each, in turn."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(calls):
        for spent, run in zip(times, runs, strict=True):
            start = time.perf_counter()
            run()
            spent.append(1e6 * (time.perf_counter() - start))
    return [statistics.median(spent[calls // 10 :]) for spent in times]
