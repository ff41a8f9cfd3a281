"""Building a layer of dense least squares: seconds and peak memory, in a process of its own.

`python -m benchmarks.structures.construction M N`
"""

from __future__ import annotations

import json
import sys

from benchmarks.measure import MEGABYTE, PeakMemory, clock
from benchmarks.structures.tasks import Task
from benchmarks.subprocesses import alone
from benchmarks.table import Family, Options, Row

SIZES, REPEATS = ((500, 250), (2000, 1000)), 3


def family(options: Options) -> Family:
    sizes = SIZES[:1] if options.quick else SIZES
    return Family(
        "construction",
        f"Building a layer of least squares with a dense A: seconds (the median of {REPEATS} processes), peak megabytes, and those in multiples of A.",
        [(f"least_squares {m} x {n}", lambda m=m, n=n: [measure(m, n)]) for m, n in sizes],
    )


def measure(m: int, n: int) -> Row:
    runs = sorted(
        (alone("benchmarks.structures.construction", m, n) for _ in range(REPEATS)),
        key=lambda run: run["seconds"],
    )
    figures = runs[REPEATS // 2]
    figures["multiples of A"] = figures["MB"] * MEGABYTE / (8 * m * n)
    return Row(f"least_squares {m} x {n}", figures, {"seconds": ("<=", 1.0)})


def main(m: int, n: int) -> dict[str, float]:
    Task("least_squares", "least_squares", 1, (8, 4)).layer()
    task = Task("least_squares", "least_squares", 1, (m, n))
    with PeakMemory() as peak:
        start = clock()
        task.layer()
        seconds = clock() - start
    return {"seconds": seconds, "MB": peak.megabytes}


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]))))
