"""Total variation against the length of the signal: linear time."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from benchmarks.structures.tasks import Task
from benchmarks.structures.timing import Run, Timed, alternating
from benchmarks.table import Family, Options, Row

SIZES = (1_000, 10_000, 100_000, 1_000_000)
TOTAL = "forward + backward"


def family(options: Options) -> Family:
    sizes = SIZES[:2] if options.quick else SIZES
    return Family(
        "growth",
        "Total variation of one signal of Gaussian noise by its length: milliseconds, and the exponent fitted to them.",
        [(f"total_variation 1 x {n}", lambda n=n: [measure(n, options)]) for n in sizes],
        slope,
    )


def measure(n: int, options: Options) -> Row:
    task = Task("total_variation", "total_variation", 1, (n,))
    timed = alternating({"ours": Run(task.layer(), task.data(options))}, 1.0)["ours"]
    if not isinstance(timed, Timed):
        raise RuntimeError(timed)
    figures = {
        "points": n,
        "forward": timed.forward,
        TOTAL: timed.total,
        "quartiles": timed.quartiles,
    }
    return Row(task.name, {**figures, "ns a point": 1e6 * timed.total / n})


def slope(rows: list[Row]) -> Iterable[Row]:
    """By least squares in logarithms."""
    columns = [
        np.log([row.figures[name] for row in rows if not row.error]) for name in ("points", TOTAL)
    ]
    yield Row(
        "exponent of growth", {TOTAL: float(np.polyfit(*columns, 1)[0])}, {TOTAL: ("<=", 1.1)}
    )
