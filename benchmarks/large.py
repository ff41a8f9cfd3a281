"""Large sparse quadratic programs: time, and peak memory against the number of nonzeros.

    minimise    |x|^2 / 2 + q'x
    subject to  d * (A x) <= b,  -1 <= x <= 1      A (n, n) with five nonzeros a row, in a band

with parameters q, b and d, so that every entry of the constraint matrix moves. (A sparse Parameter
would want a dense tensor.) Each size runs in processes of its own, `python -m benchmarks.large
NONZEROS ours` (or CVXPY). Memory is what the resident set rises by at its highest; CVXPY's is that
of its canonicalisation alone, on which building a layer rests.
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
from convlayer.problems import Declared

PER_ROW, WINDOW, LARGEST, REPEATS = 5, 40, 100_000, 3
BUILD, CALL, CVXPY = "peak MB, build", "peak MB, call", "peak MB, CVXPY alone"


def family(options: Options) -> Family:
    sizes = (5_000, 10_000) if options.quick else (25_000, 50_000, LARGEST)
    return Family(
        "large",
        "A sparse quadratic program, one instance: seconds, and peak megabytes.",
        [
            (f"{nonzeros} nonzeros", lambda nonzeros=nonzeros: [measure(nonzeros)])
            for nonzeros in sizes
        ],
        slopes,
    )


def measure(nonzeros: int) -> Row:
    figures = {
        **alone("benchmarks.large", nonzeros, "ours", timeout=200),
        **alone("benchmarks.large", nonzeros, "CVXPY"),
    }
    return Row(f"{nonzeros} nonzeros", figures, {BACKWARD: ("<=", 0.5), BARE: ("<=", 1.5)})


def slopes(rows: list[Row]) -> Iterable[Row]:
    """Exponent of growth with the nonzeros, by least squares in logarithms."""
    rows = [row for row in rows if not row.error]
    if len(rows) < 2:
        raise ValueError("growth needs two sizes")
    figures = {}
    for name in ("build", "forward", "bare", "backward", BUILD, CALL, CVXPY):
        figures[name] = float(
            np.polyfit(*(np.log([row.figures[c] for row in rows]) for c in ("nonzeros", name)), 1)[
                0
            ]
        )
    yield Row("exponent of growth", figures, {BUILD: ("<=", 1.1), CALL: ("<=", 1.1)})


def main(nonzeros: int, who: str) -> dict[str, float]:
    torch.linalg.lu_factor(torch.eye(3))  # libraries are loaded before memory is counted
    declared, tensors = declare(nonzeros)
    with PeakMemory() as build:
        start = clock()
        if who == "CVXPY":
            declared.problem.get_problem_data(cp.CLARABEL, enforce_dpp=True)
        else:
            layer = ConvexLayer(declared.problem, declared.parameters, declared.variables)
        built = clock() - start
    if who == "CVXPY":
        return {CVXPY: build.megabytes}
    with PeakMemory() as call, bare_clock() as bare:
        times = [timed(layer, tensors, bare) for _ in range(REPEATS)]
    forward, backward, solver = (1e-3 * figure for figure in medians(times))
    return {
        "n": len(tensors[0]),
        "nonzeros": nonzeros,
        "build": built,
        "forward": forward,
        "bare": solver,
        "backward": backward,
        BACKWARD: backward / forward,
        BARE: forward / solver,
        BUILD: build.megabytes,
        CALL: call.megabytes,
    }


def declare(nonzeros: int) -> tuple[Declared, tuple[Tensor, ...]]:
    n, random = nonzeros // PER_ROW, np.random.default_rng(0)
    columns = (
        (
            np.arange(n)[:, None]
            + np.cumsum(random.integers(1, WINDOW // PER_ROW, (n, PER_ROW)), axis=1)
        )
        % n
    ).ravel()
    A = sp.csr_array(
        (random.standard_normal(nonzeros), (np.repeat(np.arange(n), PER_ROW), columns)),
        shape=(n, n),
    )
    q, b, d, x = (*(cp.Parameter(n, name=name) for name in "qbd"), cp.Variable(n, name="x"))
    problem = cp.Problem(
        cp.Minimize(cp.sum_squares(x) / 2 + q @ x), [cp.multiply(d, A @ x) <= b, x >= -1, x <= 1]
    )
    q.value, b.value, d.value = (
        random.standard_normal(n),
        random.uniform(0, 1, n),
        random.uniform(0.5, 1.5, n),
    )
    tensors = tuple(torch.from_numpy(parameter.value) for parameter in (q, b, d))
    return Declared("large", problem, (q, b, d), (x,)), tensors


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), sys.argv[2])))
