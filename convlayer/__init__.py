"""convlayer: any CVXPY problem as a differentiable torch layer."""

from convlayer.canon import CanonicalisationError
from convlayer.check import Check
from convlayer.diagnose import ProblemError
from convlayer.layer import ConvexLayer
from convlayer.solution import (
    AccuracyWarning,
    Cause,
    GradientWarning,
    ParameterError,
    Solution,
    SolverError,
    Status,
)
from convlayer.solvers import Iterate, Solver, Task
from convlayer.verification import Verification

__version__ = "0.1.0"

__all__ = [
    "AccuracyWarning",
    "CanonicalisationError",
    "Cause",
    "Check",
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
    "Verification",
    "__version__",
]
