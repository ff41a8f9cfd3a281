"""Solvers of cone programs, by name. One a file, found by being there: a subclass of Solver, or of
BatchSolver."""

from __future__ import annotations

import inspect
from importlib import import_module
from pkgutil import iter_modules

from convlayer.solvers.solver import Attempt, BatchSolver, ConeSolver, Iterate, Solver, Task

DEFAULT = "clarabel"  # takes every cone there is, and what other solvers do not settle


def _found() -> dict[str, ConeSolver]:
    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    kinds = {
        kind
        for module in modules
        for kind in vars(module).values()
        if inspect.isclass(kind) and issubclass(kind, ConeSolver) and not inspect.isabstract(kind)
    }
    return {kind.name: kind() for kind in sorted(kinds, key=lambda kind: kind.name)}


SOLVERS: dict[str, ConeSolver] = _found()

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
