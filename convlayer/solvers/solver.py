"""The interface of a solver of cone programs.

A solver of one's own is a subclass with a `name` and `solve`; pass an instance as ConvexLayer(...,
solver=MySolver()). It must be picklable if the executor's workers are other processes or machines.
"""

from __future__ import annotations

import copy
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from convlayer.autodiff.threads import cores
from convlayer.conic.program import Data, Program
from convlayer.solution import Status

# A program of no more unknowns and rows than this is solved before an interrupt could be heard.
SHORT = 300
# The dense matrices of a batch take no more bytes than this.
DENSE_BYTES = 2_000_000_000
# The event by which whoever waits for this thread's work tells that it no longer does.
ABANDONED: ContextVar[threading.Event | None] = ContextVar("abandoned", default=None)


def interrupted() -> bool:
    """Whether nobody waits for this thread's work any more: a solver that asks between its
    iterations may end."""
    event = ABANDONED.get()
    return event is not None and event.is_set()


@dataclass(frozen=True, eq=False)
class Iterate:
    """A solver's answer for one row: a primal-dual point; where it failed the last one, or NaN.

    INFEASIBLE and UNBOUNDED are believed only with their certificate: y with A'y = 0 and b'y < 0,
    or x with Px = 0, q'x < 0 and -Ax in K.
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
    # (rows or 1, nnz(P)) upper triangle, compressed columns; for a dense solver (rows or 1, n, n)
    P: np.ndarray
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
    """A matrix of this pattern. Its constructor would look at the pattern again, which takes longer
    than many a solve does."""
    matrix = copy.copy(empty)
    matrix.data, matrix.indices, matrix.indptr = values, empty.indices.copy(), empty.indptr.copy()
    return matrix


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
        return (
            torch.zeros_like(self.status, dtype=torch.bool)
            if self.stopped is None
            else self.stopped
        )

    @classmethod
    def stacked(cls, iterates: list[Iterate], program: Program) -> Points:
        x, s, y = (
            torch.from_numpy(
                np.array([getattr(it, name) for it in iterates], dtype=np.float64).reshape(
                    len(iterates), size
                )
            )
            for name, size in (("x", program.n), ("s", program.m), ("y", program.m))
        )
        status, iterations = (
            torch.tensor([int(getattr(it, k)) for it in iterates]) for k in ("status", "iterations")
        )
        stopped = [it.stopped for it in iterates]
        return cls(
            x,
            s,
            y,
            status,
            iterations,
            torch.tensor(stopped, dtype=torch.bool) if any(stopped) else None,
        )


class ConeSolver(ABC):
    """What is said of a solver, whichever way it is handed a batch. `tolerance` is the relative
    size of the KKT residuals and of the gap to be reached."""

    name: ClassVar[str]
    cones: ClassVar[frozenset[str] | None] = (
        None  # the kinds of cones it takes; None: it says so in `check` itself
    )
    programs: ClassVar[str] = "some kinds of cones"  # those that it takes, in words
    manner: ClassVar[str] = (
        ""  # how it works, in words, where it may be chosen for being the cheapest
    )
    precise: ClassVar[bool] = True  # its points are close enough to verify others by
    warm_starts: ClassVar[bool] = False  # whether Task.start is made use of
    at_vertex: ClassVar[bool] = (
        False  # of multipliers that are not unique it gives an extreme one, not a central one
    )
    finest: ClassVar[float | None] = (
        None  # a tolerance worth a second attempt where the polish did not settle
    )
    # options for a first attempt at data in good units, whose answer will be polished
    quick: ClassVar[Mapping[str, Any]] = {}

    def check(self, program: Program, options: Mapping[str, Any]) -> None:
        """Raise ValueError for a program the solver cannot take, TypeError for an option it does
        not have."""
        self.check_cones(program)
        if options:
            raise TypeError(f"Solver {self.name} takes no options; got {', '.join(options)}.")

    def check_cones(self, program: Program) -> None:
        """ValueError: the program has a cone of a kind that the solver does not take."""
        others = (
            sorted({block.name for block in program.cones.blocks} - self.cones)
            if self.cones is not None
            else []
        )
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
        """A coarse estimate for a batch, for choosing between solvers and for nothing else;
        infinite where there is none."""

    def attempts(self, tolerance: float, options: Mapping[str, Any]) -> list[Attempt]:
        """With these settings, then, for rows that the polish did not settle, sharper."""
        first = Attempt(self, tolerance, options)
        return [first] if self.finest is None else [first, first._replace(tolerance=self.finest)]


class Solver(ConeSolver):
    """Solves the rows of a Task one by one; a batch is dealt to the cores as several tasks."""

    dense: ClassVar[bool] = False  # a Task may hold whole matrices for it

    @abstractmethod
    def solve(self, task: Task) -> list[Iterate]:
        """One Iterate for each row of the task, in order. Must be safe to call from several threads
        at once."""

    def is_brief(self, program: Program, rows: int) -> bool:
        """Whether so many rows are solved in less time than it takes to hand them to other
        threads."""
        return rows < 4

    def row_seconds(self, program: Program) -> float:
        """A coarse estimate for a row on one core; infinite where there is none."""
        return math.inf

    def seconds(self, program: Program, batch: int) -> float:
        return math.ceil(batch / cores()) * self.row_seconds(program)


class BatchSolver(ConeSolver):
    """Solves a batch as tensors, all rows at once, on the device where they are, in the calling
    thread."""

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
