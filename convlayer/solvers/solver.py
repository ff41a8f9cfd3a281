"""The interface of a solver of cone programs, and how a batch is handed to it.

A solver of one's own is a subclass with a `name` and `solve`; pass an instance as ConvexLayer(..., solver=MySolver()).
It must be picklable if the executor's workers are other processes or machines.
"""

from __future__ import annotations

import copy
import math
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, pairwise
from typing import Any, ClassVar, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from convlayer.autodiff.threads import cores, one_thread
from convlayer.conic.program import Data, Program
from convlayer.solution import Status

SHORT = 300  # unknowns and rows of a program up to which a solve is over before an interrupt could be heard
DENSE_BYTES = 2_000_000_000  # that the dense matrices of a batch may take
FEW = 32  # rows a worker, below which setting up a second task costs more than it balances


@dataclass(frozen=True, eq=False)
class Iterate:
    """A solver's answer for one row: a primal-dual point; where it failed the last one, or NaN.

    INFEASIBLE and UNBOUNDED are believed only with their certificate: y with A'y = 0 and b'y < 0, or x with Px = 0, q'x < 0
    and -Ax in K.
    """

    x: np.ndarray  # (n,)
    s: np.ndarray  # (m,) in K
    y: np.ndarray  # (m,) in K*
    status: Status
    iterations: int
    stopped: bool = False  # by a time limit: the row is not tried again


@dataclass(frozen=True, eq=False)
class Task:
    """Some rows of a batch, for one call of a solver."""

    program: Program
    P: np.ndarray  # (rows or 1, nnz(P)) upper triangle, compressed columns; for a dense solver (rows or 1, n, n)
    q: np.ndarray  # (rows, n)
    A: np.ndarray  # (rows or 1, nnz(A)) compressed columns; for a dense solver (rows or 1, m, n)
    b: np.ndarray  # (rows, m)
    tolerance: float
    options: Mapping[str, Any] = field(default_factory=dict)
    start: list[Iterate | None] | None = None  # a warm start for each row that has one

    def __len__(self) -> int:
        return len(self.q)

    @property
    def vectors_only(self) -> bool:
        """P and A are the same for all rows: only q and b change."""
        return len(self.P) == 1 and len(self.A) == 1

    def values(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(P values, q, A values, b) of one row."""
        return self.P[row % len(self.P)], self.q[row], self.A[row % len(self.A)], self.b[row]

    def matrices(self, row: int) -> tuple[sp.csc_matrix, np.ndarray, sp.csc_matrix, np.ndarray]:
        """(upper triangle of P, q, A, b) of one row, as SciPy matrices."""
        P, q, A, b = self.values(row)
        empty_P, empty_A = self.program.empty_matrices
        return _filled(empty_P, P), q, _filled(empty_A, A), b


def _filled(empty: sp.csc_matrix, values: np.ndarray) -> sp.csc_matrix:
    """A matrix of this pattern. Its constructor would look at the pattern again, which takes longer than many a solve does."""
    matrix = copy.copy(empty)
    matrix.data, matrix.indices, matrix.indptr = values, empty.indices.copy(), empty.indptr.copy()
    return matrix


class ConeSolver(ABC):
    """What is said of a solver, whichever way it is handed a batch. `tolerance` is the relative size of the KKT residuals and of the
    gap to be reached."""

    name: ClassVar[str]
    cones: ClassVar[frozenset[str] | None] = None  # the kinds of cones it takes; None: it says so in `check` itself
    programs: ClassVar[str] = "some kinds of cones"  # those that it takes, in words
    manner: ClassVar[str] = ""  # how it works, in words, where it may be chosen for being the cheapest
    precise: ClassVar[bool] = True  # its points are close enough to verify others by
    warm_starts: ClassVar[bool] = False  # whether Task.start is made use of
    at_vertex: ClassVar[bool] = False  # of multipliers that are not unique it gives an extreme one, not a central one
    finest: ClassVar[float | None] = None  # a tolerance worth a second attempt where the polish did not settle
    quick: ClassVar[Mapping[str, Any]] = {}  # options for a first attempt at data in good units, whose answer will be polished

    def check(self, program: Program, options: Mapping[str, Any]) -> None:
        """Raise ValueError for a program the solver cannot take, TypeError for an option it does not have."""
        self.check_cones(program)
        if options:
            raise TypeError(f"Solver {self.name} takes no options; got {', '.join(options)}.")

    def check_cones(self, program: Program) -> None:
        """ValueError: the program has a cone of a kind that the solver does not take."""
        others = sorted({block.name for block in program.cones.blocks} - self.cones) if self.cones is not None else []
        if others:
            raise ValueError(
                f"Solver {self.name} takes {self.programs}, and this problem has a cone of the kind {', '.join(others)}; "
                f"use another solver, such as 'clarabel'."
            )

    def takes(self, program: Program) -> bool:
        """Whether `check` finds nothing against it."""
        try:
            self.check(program, {})
        except ValueError:
            return False
        return True

    def fits(self, program: Program, batch: int) -> bool:
        """Whether so many rows fit into memory."""
        return True

    def flops(self, program: Program) -> float | None:
        """Of a row; None: it takes as many iterations as it takes."""
        return None

    @abstractmethod
    def seconds(self, program: Program, batch: int) -> float:
        """A coarse estimate for a batch, for choosing between solvers and for nothing else; infinite where there is none."""

    def attempts(self, tolerance: float, options: Mapping[str, Any]) -> list[Attempt]:
        """With these settings, then, for rows that the polish did not settle, sharper."""
        first = Attempt(self, tolerance, options)
        return [first] if self.finest is None else [first, first._replace(tolerance=self.finest)]


class Solver(ConeSolver):
    """Solves the rows of a Task one by one; a batch is dealt to the cores as several tasks."""

    dense: ClassVar[bool] = False  # a Task may hold whole matrices for it

    @abstractmethod
    def solve(self, task: Task) -> list[Iterate]:
        """One Iterate for each row of the task, in order. Must be safe to call from several threads at once."""

    def is_brief(self, program: Program, rows: int) -> bool:
        """Whether so many rows are solved in less time than it takes to hand them to other threads."""
        return rows < 4

    def row_seconds(self, program: Program) -> float:
        """A coarse estimate for a row on one core; infinite where there is none."""
        return math.inf

    def seconds(self, program: Program, batch: int) -> float:
        return math.ceil(batch / cores()) * self.row_seconds(program)


class BatchSolver(ConeSolver):
    """Solves a batch as tensors, all rows at once, on the device where they are, in the calling thread."""

    @abstractmethod
    def solve_data(self, data: Data, tolerance: float, options: Mapping[str, Any]) -> Points:
        """The answers for every row."""


def fits_densely(program: Program, batch: int) -> bool:
    """Whether the dense matrices of so many rows fit into memory."""
    return 16.0 * batch * (program.n + program.m) ** 2 <= DENSE_BYTES


class Attempt(NamedTuple):
    """One way to solve a row; a row that it does not settle goes to the next."""

    solver: ConeSolver
    tolerance: float
    options: Mapping[str, Any]


@cache
def default_executor() -> ThreadPoolExecutor:
    """The threads of this process for rows that are solved one by one, one a core."""
    return ThreadPoolExecutor(max_workers=cores(), thread_name_prefix="convlayer")


class Inline(Executor):
    """Runs a task where it is submitted."""

    _max_workers = 1

    def map(self, function, *iterables, **_):  # type: ignore[override]
        return map(function, *iterables)


_own = threading.local()  # .interrupted: set where the caller of this thread's work no longer waits for it


def interrupted() -> bool:
    """Whether whoever waits for this thread's work has stopped to: a solver that is asked between iterations may end."""
    event = getattr(_own, "interrupted", None)
    return event is not None and event.is_set()


def _watched(event: threading.Event, function: Callable[[Any], Any], item: Any) -> Any:
    _own.interrupted = event
    try:
        return function(item)
    finally:
        _own.interrupted = None


def _in_pool(executor: ThreadPoolExecutor, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """The function of every item, by the pool's threads. The calling one waits, and so it hears Ctrl-C at once, where compiled code
    would keep it from that; the work is then told to stop, and a pool of ours that is still busy with it is left to itself."""
    event = threading.Event()
    futures = [executor.submit(_watched, event, function, item) for item in items]
    try:
        return [future.result() for future in futures]
    except BaseException as error:
        event.set()
        for future in futures:
            future.cancel()
        if isinstance(error, KeyboardInterrupt) and executor is default_executor():
            default_executor.cache_clear()
        raise


def in_threads(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """Small torch work on each item, one torch thread each, on all cores."""

    def alone(item: Any) -> Any:
        with torch.no_grad(), one_thread():
            return function(item)

    return list(map(alone, items)) if len(items) < 2 else _in_pool(default_executor(), alone, items)


def workers_of(executor: Executor) -> int:
    """How many tasks the executor runs at once; where it does not say, as many as there are cores here."""
    threads = getattr(getattr(executor, "_client", None), "nthreads", None)  # dask's: its cluster may grow and shrink
    count = sum(threads().values()) if threads else getattr(executor, "_max_workers", None)
    return count or cores()


def _dealt(executor: Executor, solver: Solver, tasks: Sequence[Task]) -> list[list[Iterate]]:
    """Every task solved by the executor's workers, in order."""
    try:
        if isinstance(executor, ThreadPoolExecutor):
            return _in_pool(executor, solver.solve, tasks)
        return list(executor.map(solver.solve, tasks))
    except BrokenExecutor as error:
        raise BrokenExecutor(
            f"A worker of the executor that you gave, a {type(executor).__name__}, died, and it takes no more work; none of the "
            f"{sum(map(len, tasks))} rows was tried again. Usually the worker ran out of memory or was killed; or, where processes "
            f'are spawned, the script has no `if __name__ == "__main__":`. Pass a new executor: layer.with_options(executor=...).'
        ) from error


if hasattr(os, "register_at_fork"):
    # A forked child inherits the pool without its threads, and would wait for them for ever.
    os.register_at_fork(after_in_child=default_executor.cache_clear)


class Points(NamedTuple):
    """The answers for a batch, row by row, on the data's device."""

    x: Tensor  # (B, n)
    s: Tensor  # (B, m)
    y: Tensor  # (B, m)
    status: Tensor  # (B,)
    iterations: Tensor  # (B,)
    stopped: Tensor | None = None  # (B,) by a time limit; None: no row

    @property
    def late(self) -> Tensor:
        """(B,) whether a time limit ended the row."""
        return torch.zeros_like(self.status, dtype=torch.bool) if self.stopped is None else self.stopped

    @classmethod
    def stacked(cls, iterates: list[Iterate], program: Program) -> Points:
        x, s, y = (
            torch.from_numpy(
                np.array([getattr(it, name) for it in iterates], dtype=np.float64).reshape(len(iterates), size)
            )
            for name, size in (("x", program.n), ("s", program.m), ("y", program.m))
        )
        status, iterations = (torch.tensor([int(getattr(it, k)) for it in iterates]) for k in ("status", "iterations"))
        stopped = [it.stopped for it in iterates]
        return cls(x, s, y, status, iterations, torch.tensor(stopped, dtype=torch.bool) if any(stopped) else None)


def solve_batch(
    solver: ConeSolver,
    tolerance: float,
    options: Mapping[str, Any],
    data: Data,
    start: Sequence[Tensor] | None,
    executor: Executor | None,
) -> Points:
    """Solve every row of `data`, from `start` (x, s, y) where the solver can; rows are dealt to the executor's workers in contiguous
    tasks."""
    if isinstance(solver, BatchSolver):
        return solver.solve_data(data, tolerance, options)
    assert isinstance(solver, Solver)
    batch, host = data.batch, data.host()
    executor = executor or default_executor()
    workers = workers_of(executor)
    # A task reuses its solver from row to row; of many rows two tasks a worker, for balance.
    threads, brief = isinstance(executor, ThreadPoolExecutor), solver.is_brief(data.program, batch)
    # The main thread hears no interrupt while compiled code holds it: what may take long is another's.
    long = data.program.n + data.program.m > SHORT and threading.current_thread() is threading.main_thread()
    inline = threads and brief and not long
    whole = inline or (batch < 4 and not (threads and long))
    pieces = 1 if whole else min(batch, workers if batch < FEW * workers else 2 * workers)
    bounds = [batch * k // pieces for k in range(pieces + 1)]
    P, A = (host.P, host.A) if solver.dense and host.dense else (host.P_entries, host.A_entries)
    tasks = [
        Task(
            data.program,
            _part(P, lo, hi),
            _part(host.q.expand(batch, -1), lo, hi),
            _part(A, lo, hi),
            _part(host.b.expand(batch, -1), lo, hi),
            tolerance,
            options,
            None if start is None else _iterates(start, lo, hi),
        )
        for lo, hi in pairwise(bounds)
    ]
    results = [solver.solve(tasks[0])] if inline else _dealt(executor, solver, tasks)
    iterates = list(chain.from_iterable(results))
    if len(iterates) != batch:
        raise RuntimeError(
            f"Solver {solver.name} returned {len(iterates)} iterates for {batch} rows; it must return one for each."
        )
    points = Points.stacked(iterates, data.program)
    if data.q.device.type == "cpu":
        return points
    return Points._make(None if part is None else part.to(data.q.device) for part in points)


def _iterates(start: Sequence[Tensor], lo: int, hi: int) -> list[Iterate | None]:
    rows = zip(*(part[lo:hi].cpu().numpy() for part in start), strict=True)
    return [Iterate(x, s, y, Status.SOLVED, 0) if np.isfinite(x).all() else None for x, s, y in rows]


def _part(values, lo: int, hi: int) -> np.ndarray:
    return np.ascontiguousarray((values if len(values) == 1 else values[lo:hi]).numpy())
