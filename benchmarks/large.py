"""Large sparse quadratic programs: time, and peak memory against the number of nonzeros.

    minimise    |x|^2 / 2 + q'x
    subject to  A x <= b,  -1 <= x <= 1      A (n, n) with five nonzeros a row

with parameters q, b and all nonzeros of A, written as a vector `a` with A x = R (a * (C x)): a sparse Parameter would want a
dense tensor. Each size runs in a process of its own, `python -m benchmarks.large NONZEROS`. Memory is what the resident
set rises by at its highest.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable

import cvxpy as cp
import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from benchmarks.measure import PeakMemory, clock, medians
from benchmarks.speed import BACKWARD, BARE, bare_clock, timed
from benchmarks.subprocesses import alone
from benchmarks.table import Family, Options, Row
from convlayer import ConvexLayer

PER_ROW, LARGEST, REPEATS = 5, 100_000, 3
BUILD, CALL = "peak MB, build", "peak MB, call"


def family(options: Options) -> Family:
    sizes = (5_000, 10_000) if options.quick else (25_000, 50_000, LARGEST)
    return Family("large", "A sparse quadratic program, one instance: seconds, and peak megabytes above what was there before.",
                  [(f"{nonzeros} nonzeros", lambda nonzeros=nonzeros: [measure(nonzeros)]) for nonzeros in sizes], slopes)


def measure(nonzeros: int) -> Row:
    return Row(f"{nonzeros} nonzeros", alone("benchmarks.large", nonzeros, timeout=200), {BACKWARD: ("<=", 0.5), BARE: ("<=", 1.5)})


def slopes(rows: list[Row]) -> Iterable[Row]:
    """Exponent of growth with the nonzeros, by least squares in logarithms."""
    rows = [row for row in rows if not row.error]
    figures = {}
    for name in ("build", "forward", "backward", BUILD, CALL):
        figures[name] = float(np.polyfit(*(np.log([row.figures[c] for row in rows]) for c in ("nonzeros", name)), 1)[0])
    yield Row("exponent of growth", figures, {BUILD: ("<=", 1.1), CALL: ("<=", 1.1)})


def main(nonzeros: int) -> dict[str, float]:
    torch.linalg.lu_factor(torch.eye(3))  # libraries are loaded before memory is counted
    with PeakMemory() as build:
        start = clock()
        layer, tensors = declare(nonzeros)
        built = clock() - start
    with PeakMemory() as call:
        with bare_clock() as bare:
            times = [timed(layer, tensors, bare) for _ in range(REPEATS)]
    forward, backward, solver = (1e-3 * figure for figure in medians(times))
    return {"n": len(tensors[1]), "nonzeros": nonzeros, "build": built, "forward": forward, "bare": solver, "backward": backward,
            BACKWARD: backward / forward, BARE: forward / solver, BUILD: build.megabytes, CALL: call.megabytes}


def declare(nonzeros: int) -> tuple[ConvexLayer, tuple[Tensor, ...]]:
    n, random = nonzeros // PER_ROW, np.random.default_rng(0)
    columns = ((np.arange(n)[:, None] + np.cumsum(random.integers(1, n // PER_ROW, (n, PER_ROW)), axis=1)) % n).ravel()
    rows, entries = np.repeat(np.arange(n), PER_ROW), np.arange(nonzeros)
    R, C = sp.csr_array((np.ones(nonzeros), (rows, entries))), sp.csr_array((np.ones(nonzeros), (entries, columns)), shape=(nonzeros, n))
    a, q, b, x = cp.Parameter(nonzeros, name="a"), cp.Parameter(n, name="q"), cp.Parameter(n, name="b"), cp.Variable(n, name="x")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x) / 2 + q @ x), [R @ cp.multiply(a, C @ x) <= b, x >= -1, x <= 1])
    tensors = tuple(map(torch.from_numpy, (random.standard_normal(nonzeros), random.standard_normal(n), random.uniform(0, 1, n))))
    return ConvexLayer(problem, [a, q, b], [x]), tensors


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]))))
