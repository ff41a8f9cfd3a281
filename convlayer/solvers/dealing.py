"""A batch is dealt to those who solve its rows: tasks, pools of threads, executors, interrupts.

A solver of batches gets it whole. One that goes row by row gets contiguous tasks, several at once,
by the threads of this process or by the workers of an executor that the user gave.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor, as_completed
from contextvars import copy_context
from functools import cache
from itertools import chain, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convlayer.autodiff.threads import cores, one_thread
from convlayer.conic.program import Data, Program
from convlayer.progress import SILENT, Silent, track
from convlayer.solution import Status
from convlayer.solvers.solver import (
    ABANDONED,
    SHORT,
    BatchSolver,
    ConeSolver,
    Iterate,
    Points,
    Solver,
    Task,
)

# With fewer rows than this for each worker, a second task costs more to set up than it balances.
FEW = 32
# Where rows are watched, each worker has at least so many tasks, one after the other, to be seen.
STAGES = 50


def solve_batch(
    solver: ConeSolver,
    tolerance: float,
    options: Mapping[str, Any],
    data: Data,
    start: Sequence[Tensor] | None,  # (x, s, y), for a solver that can make use of it
    executor: Executor | None,  # None: the threads of this process
) -> Points:
    """Solve every row of `data`."""
    with track(solver.name, data.batch) as work:
        if isinstance(solver, BatchSolver):
            return solver.solve_data(data, tolerance, options)
        assert isinstance(solver, Solver)
        executor = executor or default_executor()
        pieces, inline = _pieces(solver, data.program, data.batch, executor, work.watched)
        tasks = _tasks(solver, tolerance, options, data, start, pieces)
        results = [solver.solve(tasks[0])] if inline else _dealt(executor, solver, tasks, work)
    iterates = list(chain.from_iterable(results))
    if len(iterates) != data.batch:
        raise RuntimeError(
            f"Solver {solver.name} returned {len(iterates)} iterates for {data.batch} rows; "
            f"it must return one for each."
        )
    points = Points.stacked(iterates, data.program)
    if data.q.device.type == "cpu":
        return points
    return Points._make(None if part is None else part.to(data.q.device) for part in points)


def _pieces(
    solver: Solver, program: Program, batch: int, executor: Executor, watched: bool
) -> tuple[int, bool]:
    """In how many tasks a batch is dealt, and whether its only one is solved by the calling thread.

    A task reuses its solver from row to row; of many rows two tasks a worker, for balance.
    """
    threads, workers = isinstance(executor, ThreadPoolExecutor), workers_of(executor)
    # The main thread hears no interrupt while compiled code holds it: what takes long is another's.
    in_main = threading.current_thread() is threading.main_thread()
    long = program.n + program.m > SHORT and in_main
    inline = threads and solver.is_brief(program, batch) and not long
    if inline or (batch < 4 and not (threads and long)):
        return 1, inline
    each = STAGES if watched else 1 if batch < FEW * workers else 2
    return min(batch, each * workers), False


def _tasks(
    solver: Solver,
    tolerance: float,
    options: Mapping[str, Any],
    data: Data,
    start: Sequence[Tensor] | None,
    pieces: int,
) -> list[Task]:
    """The batch in so many contiguous tasks of about the same size."""
    batch, host = data.batch, data.host()
    whole_matrices = solver.dense and host.dense
    P, A = (host.P, host.A) if whole_matrices else (host.P_entries, host.A_entries)
    q, b = (vector.expand(batch, -1) for vector in (host.q, host.b))
    bounds = [batch * k // pieces for k in range(pieces + 1)]
    return [
        Task(
            data.program,
            P=_part(P, lo, hi),
            q=_part(q, lo, hi),
            A=_part(A, lo, hi),
            b=_part(b, lo, hi),
            tolerance=tolerance,
            options=options,
            start=None if start is None else _iterates(start, lo, hi),
        )
        for lo, hi in pairwise(bounds)
    ]


def _part(values: Tensor, lo: int, hi: int) -> np.ndarray:
    return np.ascontiguousarray((values if len(values) == 1 else values[lo:hi]).numpy())


def _iterates(start: Sequence[Tensor], lo: int, hi: int) -> list[Iterate | None]:
    rows = zip(*(part[lo:hi].cpu().numpy() for part in start), strict=True)
    return [
        Iterate(x, s, y, Status.SOLVED, 0) if np.isfinite(x).all() else None for x, s, y in rows
    ]


def _dealt(
    executor: Executor, solver: Solver, tasks: Sequence[Task], work: Silent
) -> list[list[Iterate]]:
    """Every task solved by the executor's workers, in order."""
    try:
        if isinstance(executor, ThreadPoolExecutor):
            return _in_pool(executor, solver.solve, tasks, work, [len(task) for task in tasks])
        results = []
        for task, found in zip(tasks, executor.map(solver.solve, tasks), strict=True):
            results.append(found)
            work.advance(len(task))
        return results
    except BrokenExecutor as error:
        raise BrokenExecutor(
            f"A worker of the executor that you gave, a {type(executor).__name__}, died, and it "
            f"takes no more work; none of the {sum(map(len, tasks))} rows was tried again. Usually "
            f"the worker ran out of memory or was killed; or, where processes are spawned, the "
            f'script has no `if __name__ == "__main__":`. Pass a new executor: '
            f"layer.with_options(executor=...)."
        ) from error


def in_threads(
    function: Callable[[Any], Any], items: Sequence[Any], rows: Sequence[int] = ()
) -> list[Any]:
    """Small torch work on each item, one torch thread each, on all cores; of so many rows, each
    item's, where they are to be shown."""

    def alone(item: Any) -> Any:
        with torch.no_grad(), one_thread():
            return function(item)

    if len(items) < 2:
        return list(map(alone, items))
    if not rows:
        return _in_pool(default_executor(), alone, items)
    with track("solved and polished", sum(rows)) as work:
        return _in_pool(default_executor(), alone, items, work, rows)


def _in_pool(
    executor: ThreadPoolExecutor,
    function: Callable[[Any], Any],
    items: Sequence[Any],
    work: Silent = SILENT,
    rows: Sequence[int] = (),  # each item's
) -> list[Any]:
    """The function of every item, by the pool's threads.

    The calling thread waits, and so it hears Ctrl-C at once, where compiled code would keep it from
    that; the work is then told to stop, and a pool of ours that is still busy is left to itself.
    """
    event = threading.Event()

    def watched(item: Any) -> Any:
        ABANDONED.set(event)  # in this item's own copy of the context
        return function(item)

    futures: list[Future[Any]] = []
    try:  # from the first on: an interrupt may come while they are being handed over
        for item in items:
            futures.append(executor.submit(copy_context().run, watched, item))
        if work.watched:
            count = dict(zip(futures, rows, strict=True))
            for future in as_completed(futures):
                future.result()  # its error, if there was one, as soon as it is there
                work.advance(count[future])
        return [future.result() for future in futures]
    except BaseException as error:
        event.set()
        for future in futures:
            future.cancel()
        if isinstance(error, KeyboardInterrupt) and executor is default_executor():
            default_executor.cache_clear()
        raise


@cache
def default_executor() -> ThreadPoolExecutor:
    """The threads of this process for rows that are solved one by one, one a core."""
    return ThreadPoolExecutor(max_workers=cores(), thread_name_prefix="convlayer")


if hasattr(os, "register_at_fork"):
    # A forked child inherits the pool without its threads, and would wait for them for ever.
    os.register_at_fork(after_in_child=default_executor.cache_clear)


class Inline(Executor):
    """Runs a task where it is submitted."""

    _max_workers = 1

    def map(self, function, *iterables, **_):  # type: ignore[override]
        return map(function, *iterables)


def workers_of(executor: Executor) -> int:
    """How many tasks the executor runs at once; where it does not say, as many as there are cores
    here."""
    # dask's: its cluster may grow and shrink
    threads = getattr(getattr(executor, "_client", None), "nthreads", None)
    count = sum(threads().values()) if threads else getattr(executor, "_max_workers", None)
    return count or cores()
