"""Our layers against what one writes in torch for one structure alone."""

from __future__ import annotations

import warnings
from functools import partial

from benchmarks.structures.memory import peak
from benchmarks.structures.rivals import (
    iterations_to,
    lstsq,
    pot,
    projector,
    sinkhorn,
    softmax,
    sparsemax,
    sparsemax_of_entmax,
)
from benchmarks.structures.tasks import Layer, Task
from benchmarks.structures.timing import Run, Timed, alternating, cell, errors
from benchmarks.table import Family, Options, Row

RATIO, SINGLE, MEMORY = "rival / ours", "rival / ours, one thread", "memory / ours"
SECONDS = 3.0
# iterations of Sinkhorn that are timed; time and memory are those times the share of the rest
UNROLLED = 400
TOLERANCE = 1e-9
NO_SLOWER, SOFT = 1.0, 1 / 1.5
ROWS: list[tuple[Task, str, Layer, float | None]] = [
    (Task("least_squares", "least_squares", 32, (100, 50)), "torch.linalg.lstsq", lstsq, 5.0),
    (Task("least_squares", "least_squares", 256, (20, 10)), "torch.linalg.lstsq", lstsq, 5.0),
    *(
        (
            Task("leading_eigenvector", "leading_eigenspace", batch, (n,)),
            "torch.linalg.eigh",
            projector,
            NO_SLOWER,
        )
        for batch, n in ((4096, 4), (8, 8), (32, 32), (1, 200))
    ),
    (Task("softmax", "softmax", 2048, (1000,)), "torch.softmax", softmax, SOFT),
    (Task("sparsemax", "sparsemax", 2048, (1000,)), "a sort in torch", sparsemax, SOFT),
    (Task("sparsemax", "sparsemax", 2048, (1000,)), "entmax.sparsemax", sparsemax_of_entmax, SOFT),
]
TRANSPORTS = {
    Task("entropic_optimal_transport", "entropic_optimal_transport", 4, (25, 25), 0.1): None,
    Task("entropic_optimal_transport", "entropic_optimal_transport", 16, (100, 100), 0.01): 10.0,
}


def family(options: Options) -> Family:
    tasks = [
        (f"{task.name}, {rival}", lambda row=(task, rival, layer, wanted): [measure(*row, options)])
        for task, rival, layer, wanted in ROWS
    ]
    for task, wanted in TRANSPORTS.items():
        if not (options.quick and wanted):
            tasks.append(
                (
                    f"{task.name}, Sinkhorn",
                    lambda task=task, wanted=wanted: [unrolled(task, wanted, options)],
                )
            )
            tasks.append(
                (
                    f"{task.name}, POT",
                    lambda task=task: [measure(task, "ot.batch.solve_batch", pot, None, options)],
                )
            )
    return Family(
        "specialists",
        "Forward and the gradient of all parameters, milliseconds, as above. Softmax and sparsemax are wanted within 1.5 of the "
        f"function written by hand. Sinkhorn is unrolled in the log domain for the iterations that meet the marginals to {TOLERANCE:g}; "
        f"at most {UNROLLED} of them are timed, time and memory scaled to all. POT runs with its defaults (1e-5 or 1000 "
        "iterations) and has no gradient of eps. Errors: relative differences from ours, the worst row. Megabytes: what the resident "
        "set of a fresh process rises by.",
        tasks,
    )


def measure(
    task: Task, name: str, layer: Layer, wanted: float | None, options: Options, scale: float = 1.0
) -> Row:
    data = task.data(options)
    ours, rival = Run(task.layer(), data), Run(layer, data, scale)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = alternating(
            {
                "ours": ours,
                "rival": rival,
                "ours alone": ours.on_one_thread(),
                "rival alone": rival.on_one_thread(),
            },
            SECONDS / 4 if options.quick else SECONDS,
        )
        solution, gradient = errors(ours, rival, task.declared, task.declared)
    mine, theirs = found["ours"], found["rival"]
    figures = {"ours": cell(mine), "rival": cell(theirs), RATIO: None, SINGLE: None}
    figures |= {
        RATIO: _ratio(theirs, mine),
        SINGLE: _ratio(found["rival alone"], found["ours alone"]),
    }
    for who, timed in (("ours", mine), ("rival", theirs)):
        if isinstance(timed, Timed):
            figures[f"{who} quartiles"] = timed.quartiles
    figures |= {"rival solution": solution, "rival gradient": gradient}
    return Row(f"{task.name}: {name}", figures, {} if wanted is None else {RATIO: (">=", wanted)})


def unrolled(task: Task, wanted: float | None, options: Options) -> Row:
    """Against Sinkhorn's iteration, differentiated through."""
    count = iterations_to(TOLERANCE, *task.data(options))
    timed = min(count, UNROLLED)
    row = measure(
        task,
        f"{count} iterations of Sinkhorn",
        partial(sinkhorn, iterations=timed),
        wanted,
        options,
        count / timed,
    )
    if options.device.type == "cpu":
        ours, rival = peak(task, 0), peak(task, timed) * count / timed
        row.figures |= {"ours MB": ours, "rival MB": rival, MEMORY: rival / ours}
        row.wanted |= {} if wanted is None else {MEMORY: (">=", 10.0)}
    if timed < count:  # their errors are those of the iteration cut short
        row.figures |= {"rival solution": TOLERANCE, "rival gradient": None}
    return row


def _ratio(theirs: Timed | str, mine: Timed | str) -> float | None:
    return (
        theirs.total / mine.total if isinstance(theirs, Timed) and isinstance(mine, Timed) else None
    )
