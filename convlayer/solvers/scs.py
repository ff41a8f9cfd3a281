"""SCS: first order, low memory, warm start, one factorisation while only q and b change.

It stores the psd cone as the lower triangle in column-major order; ours is the upper one, so those
rows are permuted here. Source: O'Donoghue (2021), Operator splitting for a homogeneous embedding of
the linear complementarity problem.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import scipy.sparse as sp
import scs

from convlayer.cones import (
    Block,
    Exponential,
    Nonnegative,
    Power,
    Psd,
    SecondOrder,
    Zero,
)
from convlayer.conic.program import Program
from convlayer.solution import Status
from convlayer.solvers.solver import Iterate, Solver, Task, interrupted

STATUS = {
    scs.SOLVED: Status.SOLVED,
    scs.SOLVED_INACCURATE: Status.INACCURATE,
    scs.INFEASIBLE: Status.INFEASIBLE,
    scs.INFEASIBLE_INACCURATE: Status.INFEASIBLE,
    scs.UNBOUNDED: Status.UNBOUNDED,
    scs.UNBOUNDED_INACCURATE: Status.UNBOUNDED,
}


def _rows(blocks: Sequence[Block]) -> int:
    return sum(block.size for block in blocks)


def _sizes(blocks: Sequence[Block]) -> list[int]:
    return [block.size for block in blocks]


def _parameters(blocks: Sequence[Block]) -> list[Any]:
    return [block.parameter for block in blocks]


# By cone, its name in SCS's description of a program and what SCS is told of its blocks.
KINDS: dict[str, tuple[str, Callable[[Sequence[Block]], Any]]] = {
    Zero.name: ("z", _rows),
    Nonnegative.name: ("l", _rows),
    SecondOrder.name: ("q", _sizes),
    Psd.name: ("s", _parameters),
    Exponential.name: ("ep", len),
    Power.name: ("p", _parameters),
}


class SCS(Solver):
    """Every cone, by operator splitting in compiled code, row by row; a start shortens it."""

    name: ClassVar[str] = "scs"
    cones: ClassVar[frozenset[str] | None] = frozenset(KINDS)
    precise: ClassVar[bool] = False
    warm_starts: ClassVar[bool] = True

    def check(self, program: Program, options: Mapping[str, Any]) -> None:
        self.check_cones(program)
        if not program.m:
            raise ValueError(
                "SCS needs at least one constraint, and this problem has none; use solver='clarabel'."
            )
        probe = {"A": sp.csc_matrix(np.ones((1, 1))), "b": np.ones(1), "c": np.ones(1)}
        for option, value in options.items():
            if option in ("write_data_filename", "log_csv_filename"):
                continue  # the probe would write to the user's file
            try:
                scs.SCS(probe, {"l": 1}, **{"verbose": False, option: value})
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"SCS does not take the option `{option}` = {value!r}: {error}. Its options are those of scs.SCS, and tolerance."
                ) from error

    def solve(self, task: Task) -> list[Iterate]:
        settings = {
            "verbose": False,
            "eps_abs": task.tolerance,
            "eps_rel": task.tolerance,
            **task.options,
        }
        order = svec_order(task.program)
        cone = _cone(task.program)
        solver, iterates = None, []
        for row in range(len(task)):
            if interrupted():
                return []  # nobody reads them
            if solver is not None and task.vectors_only:
                _, q, _, b = task.values(row)
                solver.update(b[order], q)
            else:
                P, q, A, b = task.matrices(row)
                solver = scs.SCS(
                    {"P": P, "A": A[order].tocsc(), "b": b[order], "c": q}, cone, **settings
                )
            iterates.append(_iterate(_run(solver, task, row, order), order))
        return iterates


def svec_order(program: Program) -> np.ndarray:
    """(m,) for each of SCS's rows, ours: the lower triangle by columns is the upper triangle with
    its entries reordered."""
    order = np.arange(program.m)
    for block in program.cones.blocks:
        if block.name == Psd.name:
            k = int(block.parameter or 0)
            column, row = np.triu_indices(k)  # SCS's order: column by column, downwards
            order[block.start : block.start + block.size] = (
                block.start + row * (row + 1) // 2 + column
            )
    return order


def _cone(program: Program) -> dict[str, Any]:
    blocks: dict[str, list[Block]] = {name: [] for name in KINDS}
    for block in program.cones.blocks:
        blocks[block.name].append(block)
    return {key: told(blocks[name]) for name, (key, told) in KINDS.items()}


def _run(solver, task: Task, row: int, order: np.ndarray) -> dict[str, Any]:
    start = None if task.start is None else task.start[row]
    if start is None:
        return solver.solve(warm_start=False)
    return solver.solve(warm_start=True, x=start.x, y=start.y[order], s=start.s[order])


def _iterate(result: dict[str, Any], order: np.ndarray) -> Iterate:
    s, y = np.empty_like(result["s"]), np.empty_like(result["y"])
    s[order], y[order] = result["s"], result["y"]
    info = result["info"]
    if info["status_val"] == scs.SIGINT:  # it hears Ctrl-C itself, and Python does not
        raise KeyboardInterrupt
    status, stopped = (
        STATUS.get(info["status_val"], Status.NOT_CONVERGED),
        "time_limit" in info["status"],
    )
    return Iterate(
        result["x"], s, y, Status.NOT_CONVERGED if stopped else status, int(info["iter"]), stopped
    )
