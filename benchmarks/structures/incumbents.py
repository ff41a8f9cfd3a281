"""Our layers against cvxpylayers by its default solver and by Moreau, and against our own cone program.

Milliseconds of a forward and of the gradient of all parameters, medians over calls that alternate in one run, with their
quartiles. `ratio` is to the faster of the two peers. A peer whose solution is off by more than 10 % has not solved the
problem and is no rival: its time and its error are there, its ratio is not. Where `peer rows` is less than the
batch, the peers and our generic path were timed on so many rows and their times scaled to the batch.
The errors of a peer are relative differences from ours, the worst row; `accuracy` certifies ours.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from benchmarks.structures.rivals import CVXPYLAYERS, INCUMBENTS, MOREAU, incumbent
from benchmarks.structures.tasks import Layer, Task, Variables
from benchmarks.structures.timing import Timed, alternating, answers, differences, once, one_thread, reason
from benchmarks.table import Family, Options, Row

RATIO, OURS, SINGLE, GENERIC = "ratio", "ours", "one thread", "generic"
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
        f"Forward and backward, milliseconds. Ratio: the faster of {CVXPYLAYERS} and {MOREAU} over ours; peers whose solution "
        f"is off by more than {SOLVED:.0%} do not count. Fewer `peer rows` than the batch are scaled to it. "
        "Errors of the peers: relative, the worst row.",
        [(task.name, lambda task=task: [measure(task, TASKS[task], options)]) for task in tasks],
        summary,
    )


def measure(task: Task, wanted: float | None, options: Options) -> Row:
    row = Row(task.name, wanted={} if wanted is None else {RATIO: (">=", wanted)})
    data, layer = task.data(options), task.layer()
    declared, given = task.for_peers(data)
    fewer, given = tuple(t[: task.fewer] for t in data), tuple(t[: task.fewer].cpu() for t in given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runs: dict[str, Callable[[], tuple[float, float]]] = {
            OURS: lambda: once(layer, data),
            SINGLE: one_thread(lambda: once(layer, data)),
        }
        generic = task.generic()
        runs[GENERIC] = lambda: once(generic, fewer)
        mine, errors, refused = answers(layer, fewer, task.declared), {}, {}
        for name in INCUMBENTS:
            try:
                peer = Remembering(incumbent(name, declared))
                runs[name] = lambda peer=peer: once(peer, given)
                errors[name] = peer
            except Exception as error:  # the peer's failure is a finding
                refused[name] = reason(error)
        found = refused | alternating(runs, SECONDS / 4 if options.quick else SECONDS)
        row.figures = {"peer rows": task.fewer, OURS: None, "quartiles": None, RATIO: None}
        ours = found[OURS]
        if isinstance(ours, str):
            raise RuntimeError(ours)
        row.figures |= {OURS: ours.total, "quartiles": ours.quartiles}
        for name in (SINGLE, GENERIC):
            row.figures[name] = _time(found[name], task if name == GENERIC else None)
        if isinstance(row.figures[GENERIC], float):
            row.figures["generic / ours"] = row.figures[GENERIC] / ours.total
        rivals = []
        for name in INCUMBENTS:
            timed = found[name]
            row.figures[name] = _time(timed, task)
            if isinstance(timed, Timed):
                row.figures[f"{name} quartiles"] = timed.quartiles
            if name in errors and errors[name].output is not None:
                error = differences(mine, (errors[name].output, _gradients(errors[name], given, declared, timed)))
                row.figures[f"{name} solution"], row.figures[f"{name} gradient"] = error
                if isinstance(timed, Timed) and error[0] <= SOLVED:
                    rivals.append(timed.total)
        if rivals:
            row.figures[RATIO] = min(rivals) / ours.total
    return row


class Remembering:
    """A layer and what it last returned, so that a slow one need not run again for its errors."""

    def __init__(self, layer: Layer) -> None:
        self.layer, self.output = layer, None

    def __call__(self, *leaves: Tensor) -> Variables:
        outputs = tuple(self.layer(*leaves))
        self.leaves, self.live, self.output = leaves, outputs, tuple(x.detach() for x in outputs)
        return outputs
