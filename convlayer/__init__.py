"""convlayer: any CVXPY problem as a differentiable torch layer."""

from convlayer.canon import CanonicalisationError
from convlayer.diagnose import ProblemError
from convlayer.layer import ConvexLayer
from convlayer.solution import AccuracyWarning, Cause, GradientWarning, ParameterError, Solution, SolverError, Status
from convlayer.solvers import Iterate, Solver, Task

__version__ = "0.1.0"

__all__ = [
    "AccuracyWarning",
    "CanonicalisationError",
    "Cause",
    "ConvexLayer",
    "GradientWarning",
    "Iterate",
    "ParameterError",
    "ProblemError",
    "Solution",
    "Solver",
    "SolverError",
    "Status",
    "Task",
    "__version__",
]
