"""Peak memory of one forward and backward of a transport, in a process of its own:
`python -m benchmarks.structures.memory BATCH M N EPS ITERATIONS`, 0 iterations being ours."""

from __future__ import annotations

import json
import sys

import torch

from benchmarks.measure import PeakMemory
from benchmarks.structures.rivals import sinkhorn
from benchmarks.structures.tasks import Task
from benchmarks.structures.timing import Run
from benchmarks.subprocesses import alone
from benchmarks.table import Options


def peak(task: Task, iterations: int) -> float:
    """Megabytes."""
    return alone(
        "benchmarks.structures.memory", task.batch, *task.sizes, task.eps, iterations, timeout=100
    )["MB"]


def main(batch: int, m: int, n: int, eps: float, iterations: int) -> dict[str, float]:
    def run(batch: int, m: int, n: int) -> Run:
        task = Task("entropic_optimal_transport", "entropic_optimal_transport", batch, (m, n), eps)
        layer = (
            (lambda *leaves: sinkhorn(*leaves, iterations=iterations))
            if iterations
            else task.layer()
        )
        return Run(layer, task.data(Options(quick=False, device=torch.device("cpu"))))

    run(2, 5, 5)()  # libraries are loaded before memory is counted
    measured = run(batch, m, n)
    with PeakMemory() as used:
        measured()
    return {"MB": used.megabytes}


if __name__ == "__main__":
    sizes = map(int, sys.argv[1:4])
    print(json.dumps(main(*sizes, float(sys.argv[4]), int(sys.argv[5]))))
