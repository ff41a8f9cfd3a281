"""Solvers of cone programs, by name. One a file, found by being there: a subclass of Solver, or of
BatchSolver."""

from __future__ import annotations

from convlayer.registry import found_in
from convlayer.solvers.solver import Attempt, BatchSolver, ConeSolver, Iterate, Solver, Task

DEFAULT = "clarabel"  # takes every cone there is, and what other solvers do not settle


SOLVERS: dict[str, ConeSolver] = {
    kind.name: kind() for kind in sorted(found_in(__name__, ConeSolver), key=lambda kind: kind.name)
}

__all__ = [
    "DEFAULT",
    "SOLVERS",
    "Attempt",
    "BatchSolver",
    "ConeSolver",
    "Iterate",
    "Solver",
    "Task",
]
