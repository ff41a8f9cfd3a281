"""Solvers of cone programs, by name. One a file; a new one is a subclass of Solver."""

from convlayer.solvers.clarabel import Clarabel
from convlayer.solvers.daqp import Daqp
from convlayer.solvers.interior_point import InteriorPoint
from convlayer.solvers.scs import SCS
from convlayer.solvers.solver import Attempt, Iterate, Solver, Task

SOLVERS: dict[str, Solver] = {solver.name: solver for solver in (Clarabel(), Daqp(), InteriorPoint(), SCS())}

__all__ = ["SCS", "SOLVERS", "Attempt", "Clarabel", "Daqp", "InteriorPoint", "Iterate", "Solver", "Task"]
