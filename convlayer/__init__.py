"""convlayer: any CVXPY problem as a differentiable torch layer."""

from convlayer.declaration.diagnose import ProblemError
from convlayer.declaration.reductions import CanonicalisationError
from convlayer.layer import ConvexLayer
from convlayer.report.check import Check
from convlayer.report.verification import Verification
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
