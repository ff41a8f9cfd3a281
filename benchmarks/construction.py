"""Building a layer: seconds and memory with a large dense parameter, and milliseconds of the
library's problems with their first call, beside CVXPY's canonicalisation of the same.

Each large one runs in a process of its own, `python -m benchmarks.construction PROBLEM SIZE`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
import warnings
from itertools import pairwise
from typing import Any

import cvxpy as cp
import numpy as np

from benchmarks.measure import PeakMemory, clock
from benchmarks.peer import CvxpyLayer, peer_layer
from benchmarks.subprocesses import alone
from benchmarks.table import Family, Options, Row
from convlayer import ConvexLayer
from convlayer.problems import PROBLEMS, Declared

TASKS = (("least squares", 500), ("least squares", 1000), ("quad_form", 500))
PATIENCE = 20  # seconds for the peer
SECONDS, MEMORY = ("<=", 10.0), ("<=", 2000.0)  # a dense map of 500 x 500 entries would take 500 GB
REPEATS = 5
MILLISECONDS = ("<=", 25.0)


def family(options: Options) -> Family:
    tasks = [("least squares", 100)] if options.quick else TASKS
    return Family(
        "construction",
        "Building a layer with one dense square parameter: seconds and peak megabytes.",
        [(f"{name} {n}", lambda name=name, n=n: [measure(name, n)]) for name, n in tasks]
        + [("library", library)],
    )


def library() -> list[Row]:
    """The cone programs of all library problems, built and called for the first time: CPU
    milliseconds, the least of a few."""
    warnings.simplefilter("ignore")
    figures = [
        [min(parts) for parts in zip(*(first_call(name) for _ in range(REPEATS)), strict=True)]
        for name in PROBLEMS
    ]
    build, call, canonicalised = (
        statistics.median(column) for column in zip(*figures, strict=True)
    )
    total = statistics.median(build + call for build, call, _ in figures)
    share = statistics.median(theirs / (build + call) for build, call, theirs in figures)
    values = {
        "build ms": build,
        "first call ms": call,
        "both ms": total,
        "CVXPY ms": canonicalised,
        "CVXPY share": share,
    }
    return [Row(f"median of {len(figures)} library problems", values, {"both ms": MILLISECONDS})]


def first_call(name: str) -> tuple[float, float, float]:
    """Milliseconds of building, of the first call, and of CVXPY's canonicalisation."""
    problem = PROBLEMS[name]
    inputs, declared = problem.sample(4), problem()
    for parameter, value in zip(declared.parameters, problem.sample(), strict=True):
        parameter.value = value.numpy()
    gp = declared.problem.is_dgp() and not declared.problem.is_dcp()
    marks = [time.process_time()]
    layer = problem.layer(structure="generic", on_failure="keep")
    marks.append(time.process_time())
    layer(*inputs)
    marks.append(time.process_time())
    declared.problem.get_problem_data(cp.CLARABEL, gp=gp)
    marks.append(time.process_time())
    build, call, canonicalised = (1e3 * (after - before) for before, after in pairwise(marks))
    return build, call, canonicalised


def measure(name: str, n: int) -> Row:
    figures = alone("benchmarks.construction", name, n, "ours", timeout=100)
    figures |= alone("benchmarks.construction", name, n, "CVXPY", timeout=100)
    if CvxpyLayer is not None:
        try:
            figures |= alone("benchmarks.construction", name, n, "peer", timeout=PATIENCE)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            figures["peer seconds"] = (
                f"over {PATIENCE}"
                if isinstance(error, subprocess.TimeoutExpired)
                else str(error)[:60]
            )
    return Row(
        f"{name}, {n} x {n}",
        {**figures, "seconds / CVXPY": figures["ours seconds"] / figures["CVXPY seconds"]},
        {"ours seconds": SECONDS, "ours MB": MEMORY},
    )


def declare(name: str, n: int) -> Declared:
    x = cp.Variable(n, name="x")
    if name == "quad_form":
        P, q = cp.Parameter((n, n), PSD=True, name="P"), cp.Parameter(n, name="q")
        P.value, q.value = np.eye(n), np.ones(n)
        return Declared(
            name, cp.Problem(cp.Minimize(cp.quad_form(x, P) + q @ x), [x >= 0]), (P, q), (x,)
        )
    A, b = cp.Parameter((n, n), name="A"), cp.Parameter(n, name="b")
    A.value, b.value = np.eye(n), np.ones(n)
    return Declared(
        name, cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b)), [x >= 0]), (A, b), (x,)
    )


def build(who: str, declared: Declared, **options: Any) -> None:
    """options: of our layer."""
    if who == "ours":
        ConvexLayer(declared.problem, declared.parameters, declared.variables, **options)
    elif who == "CVXPY":
        declared.problem.get_problem_data(cp.CLARABEL)
    else:
        peer_layer(declared)


def main(name: str, n: int, who: str) -> dict[str, float]:
    warnings.simplefilter("ignore")
    build(who, declare(name, 3))
    declared = declare(name, n)
    with PeakMemory() as peak:
        start = clock()
        build(who, declared)
        seconds = clock() - start
    return {f"{who} seconds": seconds, f"{who} MB": peak.megabytes}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), sys.argv[3])))
