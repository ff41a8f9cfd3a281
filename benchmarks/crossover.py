"""Seconds of the bare solvers over sizes, batches, densities and cones, and the constants of the
layer's choice fitted to them.

SCS is left out: a first-order method is not chosen but asked for.

The layer is told which solver to take; what is counted is the time inside solve_batch in that
forward, other attempts at rows that the first one leaves included. The models are those of the
solvers' own files, with k cores, n variables, p equalities, l other rows:

    interior_point  STEPS (STEP + B (ROW_STEP + dense / BATCHED_RATE)),   dense = 2 l n^2 + 2/3 (n + p)^3
    clarabel        ceil(B / k) (ROW + TYPICAL sparse / ROW_RATE),         sparse = flops of one sparse factorisation
    daqp            ceil(B / k) (ROW + sets / RATE),                       sets = n^3/3 + m n^2 + min(n, m)/2 (n + m) n

fitted by least squares in the logarithm of seconds, over the linear and quadratic programs.
"""

from __future__ import annotations

import math
import os
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cvxpy as cp
import numpy as np
import scipy.sparse as sp
import torch
from scipy.optimize import least_squares

from benchmarks.cases import CASES as SMALL_CASES
from benchmarks.measure import clock, medians
from benchmarks.programs.cases import CASES, ROOM, Variables
from benchmarks.programs.speed import layer
from benchmarks.speed import bare_clock
from benchmarks.structures.timing import reason
from benchmarks.table import Family, Options, Row
from convlayer import ConvexLayer, Status
from convlayer.conic.pattern import kkt_pattern
from convlayer.paths import dispatch
from convlayer.problems import Prebuilt, prebuilt
from convlayer.solvers import SOLVERS, clarabel, interior_point

PACKAGES = ("daqp",)
NAMES = tuple(name for name in SOLVERS if name != "scs")
BATCHES = (1, 8, 32, 128, 1024)
LONGEST, REPEATS = 2.0, 5  # seconds that a point may take by one solver, and its calls
NEAR = 0.1  # share by which a pick may be slower and still count as near
QUADRATIC = {"zero", "nonnegative"}
FASTEST, PICKED, LOSS = "fastest", "picked", "loss"
FITTED_PICK, FITTED_LOSS = "picked, fitted", "loss, fitted"


@prebuilt()
def sparse_program(n: int = 50, density: float = 0.1):
    """minimise |x|^2 / 2 + q'x  subject to  d * (A x) <= b, -1 <= x <= 1, A (n, n) of this density: every entry moves."""
    random = np.random.default_rng(0)
    A = sp.csc_array(
        sp.random_array((n, n), density=density, rng=random, data_sampler=random.standard_normal)
    )
    q, b, d = cp.Parameter(n, name="q"), cp.Parameter(n, name="b"), cp.Parameter(n, name="d")
    x = cp.Variable(n, name="x")
    constraints = [cp.multiply(d, A @ x) <= b, x >= -1, x <= 1]
    return cp.Problem(cp.Minimize(cp.sum_squares(x) / 2 + q @ x), constraints), [q, b, d], [x]


@sparse_program.sampled_by
def _scaled(draw, n, density):
    return draw.normal(n), draw.uniform(*ROOM, n), draw.uniform(0.5, 1.5, n)


@dataclass(frozen=True)
class Point:
    """A program at one size."""

    kind: str
    case: Prebuilt
    sizes: tuple[Any, ...]

    @property
    def name(self) -> str:
        return f"{self.kind} {' x '.join(map(str, self.sizes))}"


POINTS = [
    *(Point("QP", CASES["dense_program"], (n, n, n // 4)) for n in (5, 10, 20, 50, 100, 200)),
    *(Point("QP, factor", CASES["factored_program"], (n, n, n // 4)) for n in (5, 20, 50)),
    *(
        Point("QP, density", sparse_program, (n, d))
        for n, d in ((50, 0.1), (200, 0.1), (200, 0.02), (500, 0.005))
    ),
    *(Point("LP", SMALL_CASES["linear_program_dual"], (n, 2 * n)) for n in (5, 20, 60)),
    *(Point("lasso", CASES["lasso"], (2 * n, n)) for n in (5, 25)),
    *(
        Point("SOCP", CASES["second_order_program"], sizes)
        for sizes in ((5, 3, 3), (10, 6, 4), (30, 10, 6))
    ),
    *(
        Point("exponential", CASES["logistic_regression"], sizes)
        for sizes in ((10, 3), (30, 5), (100, 10))
    ),
    *(Point("psd", CASES["nearest_correlation"], (n,)) for n in (3, 6, 10)),
]
QUICK = [POINTS[k] for k in (0, 2, 3, 9, 13, 18, 21)]


def family(options: Options) -> Family:
    points, batches = (QUICK, BATCHES[1:4:2]) if options.quick else (POINTS, BATCHES)
    return Family(
        "crossover",
        "Milliseconds inside the solvers in one forward, medians, calls in turn: batches of programs with n variables, p equalities and l other "
        f"rows, `flops` being those of one sparse factorisation. `{PICKED}` is the layer's choice, and `{LOSS}` how much slower it is than the fastest; "
        f"`{FITTED_PICK}` that of the same model with the constants fitted here. `forward` is the whole forward with that solver, with polish and "
        "all, in milliseconds. Where a solver refuses, fails, or would take more "
        f"than {LONGEST:g} s, its cell says so.",
        [(point.name, lambda point=point: measure(point, batches)) for point in points],
        summary,
    )


def measure(point: Point, batches: tuple[int, ...]) -> Iterable[Row]:
    declared = point.case(*point.sizes)
    ours = layer(declared, on_failure="keep")
    program = ours._canonical.program
    figures: dict[str, Any] = {
        "n": program.n,
        "p": (p := sum(block.size for block in program.cones.blocks if block.name == "zero")),
        "l": program.m - p,
        "flops": float(kkt_pattern(program).flops),
        "cones": ", ".join(sorted({block.name for block in program.cones.blocks})),
        "curved": len(np.unique(program.P_rows[program.P_rows == program.P_cols])) == program.n,
    }
    took: dict[str, float] = {}  # milliseconds of the last batch, to see which would be too long
    before = 1
    for batch in batches:
        data = point.case.sample(batch, 0, *point.sizes)
        able: dict[str, Callable[[], tuple[float, float]]] = {}
        found: dict[str, Any] = {}
        for name in NAMES:
            if took.get(name, 0.0) * batch / before > 1e3 * LONGEST:
                found[name] = f"over {LONGEST:g} s"
                continue
            run = _run(ours, name, data)
            try:
                SOLVERS[name].check(program, {})
                run()
                able[name] = run
            except Exception as error:  # that a solver refuses is a finding
                found[name] = reason(error)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in able}
        start = clock()
        for _ in range(REPEATS):
            for name, run in able.items():
                times[name].append(run())
            if clock() - start > LONGEST:
                break
        late = {name: math.inf for name, words in found.items() if words.startswith("over")}
        figure = {name: medians(pairs) for name, pairs in times.items()}
        took, before = {name: whole for name, (_, whole) in figure.items()} | late, batch
        found |= {name: bare for name, (bare, _) in figure.items()}
        picked = dispatch.cheapest_solver(program, batch)
        row = Row(
            f"{point.name}, batch {batch}",
            {**figures, "batch": batch, **{name: found[name] for name in NAMES}},
        )
        _judge(row, picked, PICKED, LOSS)
        row.figures |= {f"forward by {name}": whole for name, (_, whole) in figure.items()}
        yield row


def _run(ours: ConvexLayer, name: str, data: Variables) -> Callable[[], tuple[float, float]]:
    """Milliseconds inside the solvers, and of the forward, when this one is asked first."""

    def run() -> tuple[float, float]:
        with warnings.catch_warnings(), torch.no_grad(), forced(name), bare_clock() as spent:
            warnings.simplefilter("ignore")
            start = clock()
            solution = ours.solve(*data)
            whole = clock() - start
        if int((solution.status > Status.INACCURATE).sum()):
            raise ArithmeticError("some rows failed")
        return 1e3 * sum(spent), 1e3 * whole

    return run


@contextmanager
def forced(name: str) -> Iterator[None]:
    """The layer's pick is this solver, with the settings that the layer gives it."""
    pick = dispatch.cheapest_solver
    dispatch.cheapest_solver = lambda program, batch: name
    try:
        yield
    finally:
        dispatch.cheapest_solver = pick


def _judge(row: Row, picked: str, column: str, loss: str) -> None:
    seconds = {name: ms for name in NAMES if isinstance(ms := row.figures[name], float)}
    if len(seconds) < 2 or picked not in seconds:
        return
    row.figures[FASTEST] = min(seconds, key=seconds.__getitem__)
    row.figures |= {column: picked, loss: seconds[picked] / min(seconds.values()) - 1}


def summary(rows: list[Row]) -> Iterable[Row]:
    """The fitted constants; then how often the pick is right."""
    rows = [row for row in rows if not row.error]
    quadratic = [row for row in rows if set(row.figures["cones"].split(", ")) <= QUADRATIC]
    cores, models = os.cpu_count() or 1, {}
    for name in NAMES:
        measured = [row.figures for row in quadratic if isinstance(row.figures[name], float)]
        if not measured or name not in MODELS:
            continue
        seconds = np.array([1e-3 * figures[name] for figures in measured])
        terms = np.array([MODELS[name](figures, cores) for figures in measured])
        weights, error = _fit(terms, seconds)
        models[name] = weights
        words = ", ".join(
            f"{symbol} = {value:.3g}" for symbol, value in constants(name, weights).items()
        )
        yield Row(
            f"fitted: {name}", {"constants": words, "typical factor of error": math.exp(error)}
        )
    for row in quadratic:
        seconds = {
            name: float(np.dot(MODELS[name](row.figures, cores), weights))
            for name, weights in models.items()
            if isinstance(row.figures[name], float)
        }
        if seconds:
            _judge(row, min(seconds, key=seconds.__getitem__), FITTED_PICK, FITTED_LOSS)
    for what, chosen in (("linear and quadratic", quadratic), ("all", rows)):
        for title, column, loss in (
            ("as it is", PICKED, LOSS),
            ("as fitted", FITTED_PICK, FITTED_LOSS),
        ):
            judged = [row.figures for row in chosen if column in row.figures]
            if not judged or (what == "all" and column == FITTED_PICK):
                continue
            wrong = [figures[loss] for figures in judged if figures[loss] > 0]
            yield Row(
                f"the model {title}, {what}",
                {
                    "points": len(judged),
                    "share right": 1 - len(wrong) / len(judged),
                    "share within 10 %": sum(figures[loss] <= NEAR for figures in judged)
                    / len(judged),
                    "mean loss where wrong": statistics.mean(wrong) if wrong else 0.0,
                    "mean loss": sum(wrong) / len(judged),
                },
            )


def _batched(figures: dict[str, Any], cores: int) -> list[float]:
    n, p, l, batch = (figures[c] for c in ("n", "p", "l", "batch"))
    return [
        interior_point.STEPS,
        interior_point.STEPS * batch,
        interior_point.STEPS * batch * (2.0 * l * n**2 + (n + p) ** 3 / 1.5),
    ]


def _by_rows(figures: dict[str, Any], cores: int) -> list[float]:
    turns = math.ceil(figures["batch"] / cores)
    return [turns, turns * clarabel.FACTORISATIONS * figures["flops"]]


def _by_sets(figures: dict[str, Any], cores: int) -> list[float]:
    n, m, turns = figures["n"], figures["p"] + figures["l"], math.ceil(figures["batch"] / cores)
    return [turns, turns * (n**3 / 3 + m * n**2 + min(n, m) / 2 * (n + m) * n)]


# Terms that seconds are a sum of, each times a constant.
MODELS: dict[str, Callable[[dict[str, Any], int], list[float]]] = {
    "interior_point": _batched,
    "clarabel": _by_rows,
    "daqp": _by_sets,
}
SYMBOLS = {
    "interior_point": ("STEP", "ROW_STEP", "RATE"),
    "clarabel": ("ROW", "ROW_RATE"),
    "daqp": ("ROW", "ROW_RATE"),
}


def constants(name: str, weights: np.ndarray) -> dict[str, float]:
    """As the solvers' own files write them: seconds, and flops a second for the last."""
    values = [*weights[:-1].tolist(), 1 / max(float(weights[-1]), 1e-300)]
    return dict(zip(SYMBOLS[name], values, strict=True))


def _fit(terms: np.ndarray, seconds: np.ndarray) -> tuple[np.ndarray, float]:
    """Positive weights, by least squares in logarithms, and the root mean square error there."""
    start = np.log([np.median(seconds / column) / terms.shape[1] for column in terms.T])
    found = least_squares(
        lambda w: np.log(terms @ np.exp(w)) - np.log(seconds), start, loss="soft_l1"
    )
    return np.exp(found.x), float(
        np.sqrt(np.mean(np.square(np.log(terms @ np.exp(found.x)) - np.log(seconds))))
    )
