"""The drop-in: `from convlayer.compat import CvxpyLayer` where `from cvxpylayers.torch import
CvxpyLayer` stood.

Signature, call, outputs, exception types and the key phrases of messages are those of cvxpylayers
1.2; options of 0.1 are understood too. Where the two differ on purpose:

    dtype     outputs have the parameters' dtype, as in 0.1; version 1.2 returns float64 whatever it is given.
              Integers become float64.
    accuracy  a solve is polished and its gradient is exact, or there is an error or a warning. An infeasible or
              unbounded problem is an error with every solver, and so is a parameter outside its
              declared domain.
    options   an unknown one is a TypeError at construction already; one without effect here is accepted, and named
              in a UserWarning, once.
    gradients of a symmetric (or PSD, NSD) Parameter are symmetric, half of the derivative in each
    of two mirrored entries; version
              1.2 reads the upper triangle alone, and its gradient stands there. A tensor that is
              not symmetric, as gradcheck gives it, is symmetrised, with a warning, once.
    lpgd      mode="lpgd", "lpgd_left", "lpgd_right" with derivative_kwargs={"tau": ..., "rho": ...} run ours, in their units, on our
              cone program, where a quadratic objective stays quadratic; of two perturbed problems
              one may fail.
    scope     accepted here and refused there: quad_form(x, P) with a PSD Parameter P, parameters with diag or
              sparsity attributes, an empty batch, solver="SCS" and "CLARABEL", copy.deepcopy.

Use convlayer.ConvexLayer in new code: any number of batch dimensions, statuses by row, failure
                                       policies, explain().
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import cvxpy as cp
import diffcp
import torch
from torch import Tensor

from convlayer import solution
from convlayer.autodiff.torch_internals import is_transformed
from convlayer.declaration.diagnose import ProblemError
from convlayer.declaration.domain import is_symmetric
from convlayer.layer import ConvexLayer
from convlayer.notices import tell
from convlayer.paths.gradients import Exact, Gradient, Lpgd
from convlayer.solvers import Solver

FINEST = 1e-10  # the tightest tolerance asked of a solver; polishing goes beyond it anyway
ACCELERATED = ("MOREAU", "CUCLARABEL", "MPAX")
SOLVER_NAMES = {
    "DIFFCP": "clarabel",
    "CLARABEL": "clarabel",
    "SCS": "scs",
    **dict.fromkeys(ACCELERATED, "clarabel"),
}
SOLVE_METHODS = {"SCS": "scs", "Clarabel": "clarabel", "CLARABEL": "clarabel", "ECOS": "clarabel"}
MODES = ("lsqr", "lsmr", "dense")
SIDES = {"lpgd": "both", "lpgd_right": "right", "lpgd_left": "left"}
TOLERANCES = ("tolerance", "tol", "eps", "eps_abs", "eps_rel", "abstol", "reltol", "feastol")
FOR_CLARABEL = {"max_iters": "max_iter", "time_limit_secs": "time_limit"}
WITHOUT_EFFECT = {
    **dict.fromkeys(("mode", "derivative_kwargs"), "the gradient is exact, from a factorisation"),
    "n_jobs_backward": "the backward pass takes all rows at once",
    **dict.fromkeys(("warm_start", "warm_starts"), "solves start cold"),
    **dict.fromkeys(
        ("use_indirect", "gpu", "cg_rate"), "SCS of today chooses by its option `linear_solver`"
    ),
    **dict.fromkeys(
        ("device", "ipm_settings", "algorithm"),
        "it belongs to an accelerated solver, and none runs here",
    ),
}
TUNES_SCS = (
    "acceleration_lookback",
    "acceleration_interval",
    "adaptive_scale",
    "alpha",
    "eps_infeas",
    "linear_solver",
    "log_csv_filename",
    "normalize",
    "rho_x",
    "scale",
    "write_data_filename",
)
SCS_SLEEPS = "it tunes SCS, and Clarabel runs here"
POLICY = "In CvxpyLayer, on_failure='nan' is solver_args={'raise_on_error': False}; 'keep' needs convlayer.ConvexLayer."


class SolverError(solution.SolverError, diffcp.SolverError):
    """Rows that could not be solved: caught as diffcp.SolverError and as convlayer.SolverError."""


class ParameterError(solution.ParameterError, SolverError):
    """A parameter's value is NaN, infinite or outside its declared domain."""


class NotATensorError(TypeError, AttributeError):
    """What was given for a parameter is no tensor. The incumbent asks it for its shape."""


class ArgumentError(ProblemError, TypeError):
    """`parameters` or `variables` is no list."""


class MixedIntegerError(ProblemError, cp.error.SolverError):
    """The problem has integer or boolean variables."""


class ComplexError(ProblemError, NotImplementedError):
    """The problem has complex variables or parameters."""


class UnknownSolverError(ValueError, RuntimeError, cp.error.SolverError):
    """No such solver. The incumbent raises cvxpy's SolverError for some names and RuntimeError for
    the others."""


class CallSettings(NamedTuple):
    """What of `solver_args` chooses the layer that runs, and what is passed to it."""

    solver: str | Solver
    on_failure: str
    jobs: int  # -1 for one a core
    gradient: Gradient
    options: dict[str, Any]


class CvxpyLayer(torch.nn.Module):
    """cvxpylayers.torch.CvxpyLayer over a ConvexLayer, which is the attribute `layer`.

    Shapes:   each parameter (*its shape) or (batch, *its shape), one batch size for all;
              variables (*their shape), or (batch, *their shape) where any parameter has a batch.

    Arguments:
        problem:       a DPP problem (DGP with gp=True).
        parameters:    all its parameters, in the order in which tensors will be given.
        variables:     variables of the problem, or dual variables of its constraints, to return.
        solver:        None or "DIFFCP" (Clarabel), "CLARABEL", "SCS", or a convlayer.Solver;
                       "MOREAU", "CUCLARABEL" and "MPAX" run Clarabel and warn.
        gp:            the problem is log-log convex.
        verbose:       the solver prints its log.
        canon_backend: one of CVXPY's; without effect.
        solver_args:   the solver's own options and diffcp's, below; those of a call override these,
                       one by one.

    Options:  `solve_method` chooses the solver; the smallest of `eps`, `eps_abs`, `eps_rel`,
              `abstol`, `reltol` and `feastol` above zero is the tolerance; `max_iters` and
              `time_limit_secs` limit a row; `n_jobs_forward` is the number of threads;
              `raise_on_error=False` fills failed rows with NaN; `mode` with `derivative_kwargs`
              chooses the gradient: one of those with lpgd, or else the exact one. Those of
              WITHOUT_EFFECT, and with Clarabel those of TUNES_SCS, are accepted with a warning.
    Errors:   at construction ProblemError (a ValueError), UnknownSolverError, and TypeError for
              unknown options; at a call ValueError for shapes and warm_start, SolverError (a
              diffcp.SolverError) for rows.
    """

    def __init__(
        self,
        problem: cp.Problem,
        parameters: Sequence[cp.Parameter],
        variables: Sequence[cp.Variable],
        solver: str | Solver | None = None,
        gp: bool = False,
        verbose: bool = False,
        canon_backend: str | None = None,
        solver_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._warned: set[str] = set()
        self._default_solver = self._choose_solver(solver)
        self._accelerated = isinstance(solver, str) and solver.upper() in ACCELERATED
        self._solver_args = {**({"verbose": True} if verbose else {}), **(solver_args or {})}
        self._settings = self._translate(self._solver_args)
        if canon_backend is not None:
            self._check_backend(canon_backend)
        solver_of_layer, on_failure, jobs, gradient, options = self._settings
        try:
            self.layer = ConvexLayer(
                problem,
                parameters,
                variables,
                gp=gp,
                solver=solver_of_layer,
                solver_args=options,
                gradient=gradient,
                on_failure=on_failure,
                executor=threads(jobs),
            )
        except (ValueError, TypeError) as error:
            theirs = _in_their_words(error, problem, parameters, variables, gp)
            if theirs is None:
                raise
            raise theirs from error
        self._parameters_of_problem = list(parameters)
        self._others: dict[tuple, ConvexLayer] = {}

    def forward(
        self,
        *params: Tensor,
        solver_args: Mapping[str, Any] | None = None,
        warm_start: bool = False,
    ) -> tuple[Tensor, ...]:
        """The optimal variables for these parameter values, in the order of `variables`."""
        if warm_start:
            self._refuse_warm_start()
        self._check_shapes(params)
        tensors = [p if p.is_floating_point() or p.is_complex() else p.double() for p in params]
        tensors = [
            self._symmetric(p, of)
            for p, of in zip(tensors, self._parameters_of_problem, strict=True)
        ]
        settings = (
            self._translate({**self._solver_args, **solver_args}) if solver_args else self._settings
        )
        try:
            return self._layer_for(settings)(
                *tensors, solver_args=settings.options if solver_args else None
            )
        except solution.ParameterError as error:
            found = (
                "Found a NaN in a parameter.\n"
                if any(bool(t.isnan().any()) for t in tensors)
                else ""
            )
            raise ParameterError(f"{found}{error}\n{POLICY}", error.rows, error.status) from error
        except solution.SolverError as error:
            name = settings.solver if isinstance(settings.solver, str) else settings.solver.name
            status = ", ".join(sorted({s.name.lower().replace("_", " ") for s in error.status}))
            message = f"Solver {name} returned status {status}.\n{error}\n{POLICY}"
            raise SolverError(message, error.rows, error.status) from error

    def extra_repr(self) -> str:
        return self.layer.extra_repr()

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """A checkpoint saved with cvxpylayers holds its canonical matrices; ours come from the
        problem."""
        for name in ("P", "q", "A"):
            state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _layer_for(self, settings: CallSettings) -> ConvexLayer:
        """The layer, or a sibling with other settings that shares what was canonicalised.

        It is not built anew from the problem: CVXPY can abort the process on one that was copied or
        pickled.
        """
        key = solver, on_failure, jobs, gradient = settings[:-1]
        if key == self._settings[:-1]:
            return self.layer
        if key not in self._others:
            self._others[key] = self.layer.with_options(
                solver=solver, gradient=gradient, on_failure=on_failure, executor=threads(jobs)
            )
        return self._others[key]

    def _choose_solver(self, solver: Any) -> str | Solver:
        if solver is None:
            return SOLVER_NAMES["DIFFCP"]
        if isinstance(solver, Solver):
            return solver
        known = f"Expected one of {', '.join(SOLVER_NAMES)}, or an instance of a subclass of convlayer.Solver."
        if isinstance(solver, bool):
            raise UnknownSolverError(
                f"Unknown solver {solver}. If you mean a log-log convex program, write gp={solver}. {known}"
            )
        if not isinstance(solver, str):
            raise UnknownSolverError(f"Unknown solver {solver!r}. {known}")
        name = solver.upper()
        if name not in SOLVER_NAMES:
            raise UnknownSolverError(
                f"Unknown solver: {name} is not installed, or not one for a layer. {known}"
            )
        if name in ACCELERATED:
            self._without_effect("solver", f"{name} is not used here; Clarabel runs in its place")
        return SOLVER_NAMES[name]

    def _translate(self, solver_args: Mapping[str, Any]) -> CallSettings:
        """Their options in our terms."""
        given = dict(solver_args)
        solver = self._default_solver
        if "solve_method" in given:
            solver = self._solve_method(given.pop("solve_method"))
        on_failure = "raise" if given.pop("raise_on_error", True) else "nan"
        jobs = given.pop("n_jobs_forward", -1)
        if not isinstance(jobs, int) or (jobs < 1 and jobs != -1):
            raise ValueError(
                f"`n_jobs_forward` is the number of threads, at least 1, or -1 for one a core; got {jobs!r}."
            )
        gradient = _gradient(given)
        tolerances = {name: given.pop(name) for name in TOLERANCES if name in given}
        clarabel = solver == "clarabel"
        useless = {**WITHOUT_EFFECT, **dict.fromkeys(TUNES_SCS if clarabel else (), SCS_SLEEPS)}
        for name in [name for name in given if name in useless]:
            self._without_effect(name, useless[name])
            del given[name]
        options = {
            (FOR_CLARABEL.get(name, name) if clarabel else name): value
            for name, value in given.items()
        }
        if tolerances:
            options["tolerance"] = _tolerance(tolerances)
        return CallSettings(solver, on_failure, jobs, gradient, options)

    def _solve_method(self, method: Any) -> str:
        if method not in SOLVE_METHODS:
            raise ValueError(
                f"Solver {method} not supported: `solve_method` is one of {', '.join(SOLVE_METHODS)}."
            )
        if method == "ECOS":
            self._without_effect(
                "solve_method", "ECOS is not used here; Clarabel runs in its place"
            )
        return SOLVE_METHODS[method]

    def _check_backend(self, canon_backend: str) -> None:
        known = [
            value for name, value in vars(cp.settings).items() if name.endswith("_CANON_BACKEND")
        ]
        if canon_backend not in known:
            raise ValueError(
                f"Unknown backend: `canon_backend` is {canon_backend!r}, and CVXPY's are "
                f"{', '.join(sorted(set(known)))}. Leave it out: it has no effect here."
            )
        self._without_effect(
            "canon_backend", "it changes how long a construction takes, not its result"
        )

    def _refuse_warm_start(self) -> None:
        if not self._accelerated:
            raise ValueError(
                "warm_start=True is only supported with solver='MOREAU', and has no effect even there: "
                "leave it out. ConvexLayer(..., solver='scs').solve(..., warm_start=solution) has one."
            )
        self._without_effect("warm_start", WITHOUT_EFFECT["warm_start"])

    def _check_shapes(self, tensors: tuple[Tensor, ...]) -> None:
        """One batch dimension at most, and one batch size: theirs is the stricter rule."""
        parameters = self._parameters_of_problem
        if len(tensors) != len(parameters):
            names = ", ".join(f"`{p.name()}`" for p in parameters)
            raise ValueError(
                "A tensor must be provided for each CVXPY parameter; "
                f"received {len(tensors)} tensors, expected {len(parameters)}: {names}."
            )
        batches = {}
        for k, (tensor, parameter) in enumerate(zip(tensors, parameters, strict=True)):
            if not isinstance(tensor, Tensor):
                raise NotATensorError(
                    f"Parameter `{parameter.name()}` was given a {type(tensor).__name__}; "
                    "expected a torch.Tensor: write torch.as_tensor(value)."
                )
            complaint = _shape_complaint(tuple(tensor.shape), tuple(parameter.shape))
            if complaint is not None:
                wrong, expected = complaint
                raise ValueError(
                    f"Invalid parameter {wrong} for parameter {k}: `{parameter.name()}` was given a "
                    f"tensor of shape {tuple(tensor.shape)}. Expected {expected}"
                )
            if tensor.ndim > len(parameter.shape):
                batches[f"`{parameter.name()}`"] = tensor.shape[0]
        if len(set(batches.values())) > 1:
            listed = ", ".join(f"{name} {size}" for name, size in batches.items())
            raise ValueError(
                f"Inconsistent batch sizes: {listed}. All batched parameters need the same one; a "
                "parameter that the whole batch shares has no batch dimension: squeeze(0) a batch of one."
            )

    def _symmetric(self, tensor: Tensor, parameter: cp.Parameter) -> Tensor:
        """(X + X') / 2 where the parameter is declared symmetric; a warning where the tensor is not
        and can be looked at."""
        if not is_symmetric(parameter):
            return tensor
        hidden = torch.compiler.is_compiling() or is_transformed((tensor,))
        if (
            not hidden
            and parameter.name() not in self._warned
            and not torch.equal(tensor, tensor.mT)
        ):
            self._warned.add(parameter.name())
            message = f"Parameter `{parameter.name()}` is symmetric, and the tensor for it is not: (X + X.mT) / 2 is taken for it."
            tell(UserWarning(f"CvxpyLayer: {message}"))
        return (tensor + tensor.mT) / 2

    def _without_effect(self, name: str, reason: str) -> None:
        """Once a layer and option."""
        if name not in self._warned:
            self._warned.add(name)
            tell(UserWarning(f"CvxpyLayer: `{name}` has no effect: {reason}."))


def _shape_complaint(shape: tuple[int, ...], own: tuple[int, ...]) -> tuple[str, str] | None:
    """What is wrong with a tensor's shape, and what was expected."""
    lead = len(shape) - len(own)
    if lead in (0, 1) and shape[lead:] == own:
        return None
    forms = f"{own} or batched ({', '.join(map(str, ('batch_size', *own)))})"
    if lead in (0, 1):
        return "shape", f"{forms}."
    many = (
        " ConvexLayer takes any number of batch dimensions."
        if lead > 1 and shape[lead:] == own
        else ""
    )
    if not own and shape[1:] == (1,):
        many = " For one number a row write squeeze(-1)."
    return "dimensionality", f"{len(own)} or {len(own) + 1} dimensions: {forms}.{many}"


class Threads(ThreadPoolExecutor):
    """So many threads; a copied or unpickled layer finds the pool again by its number."""

    def __init__(self, number: int) -> None:
        super().__init__(number, thread_name_prefix=f"convlayer-{number}")
        self.number = number

    def __reduce__(self):
        return threads, (self.number,)


@cache
def threads(number: int) -> Threads | None:
    """One pool for each number; None, the default pool, for -1."""
    return None if number == -1 else Threads(number)


def _gradient(given: dict[str, Any]) -> Gradient:
    """What `mode` and `derivative_kwargs` ask for; both are taken out if they have an effect."""
    mode = given.get("mode", "lsqr")
    if mode not in SIDES:
        if mode not in MODES:
            raise ValueError(
                f"Unsupported mode {mode!r}; expected one of {', '.join(map(repr, (*MODES, *SIDES)))}."
            )
        return Exact()
    given.pop("mode")
    options = given.pop("derivative_kwargs", {})
    if set(options) != {"tau", "rho"}:
        raise TypeError(
            f"mode={mode!r} wants derivative_kwargs={{'tau': ..., 'rho': ...}}; got {options!r}."
        )
    tau, rho = options["tau"], options["rho"]
    if not tau or tau <= 0 or rho < 0:
        raise ValueError(f"LPGD mode requires tau > 0 and rho >= 0, got tau={tau}, rho={rho}.")
    # Their rho is a curvature, ours its reciprocal.
    return Lpgd(float(tau), 1.0 / rho if rho else math.inf, SIDES[mode], absolute=True)


def _tolerance(given: Mapping[str, Any]) -> float:
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise ValueError(f"`{name}` must be a number between 0 and 1; got {value!r}.")
    # SCS ignores a criterion that is zero, so eps_abs=0 leaves eps_rel alone in force.
    return max(FINEST, min((float(value) for value in given.values() if value > 0), default=FINEST))


def _in_their_words(
    error: Exception, problem: Any, parameters: Any, variables: Any, gp: bool
) -> Exception | None:
    """Our refusal, of their type and with their key phrase in front; None where they have none."""
    if not isinstance(problem, cp.Problem):
        return None
    dpp: Any = problem.is_dpp
    primal, own = problem.variables(), problem.parameters()
    kind: type[Exception] = ProblemError
    if not (dpp("dgp") if gp else dpp("dcp", quad_form_dpp="qp")):
        phrase = "Problem must be DPP for geometric programming." if gp else "Problem must be DPP."
    elif not isinstance(parameters, (list, tuple)):
        kind = ArgumentError
        phrase = "The layer's parameters must be provided as a list or tuple and must exactly match problem.parameters."
    elif {id(p) for p in parameters} != {id(p) for p in own}:
        phrase = "The layer's parameters must exactly match problem.parameters."
    elif not isinstance(variables, (list, tuple)):
        kind, phrase = ArgumentError, "The layer's variables must be provided as a list or tuple."
    elif not all(any(v is known for known in (*primal, *_duals(problem))) for v in variables):
        phrase = "The layer's variables must be a subset of problem.variables or a constraint dual variable."
    elif any(leaf.is_complex() for leaf in (*primal, *own)):
        kind, phrase = ComplexError, "Complex variables are not yet supported."
    elif any(v.attributes["boolean"] or v.attributes["integer"] for v in primal):
        kind, phrase = (
            MixedIntegerError,
            "A differentiable layer cannot solve this problem: it is mixed-integer.",
        )
    else:
        return None
    return kind(f"{phrase}\n{error}")


def _duals(problem: cp.Problem) -> list[cp.Variable]:
    return [dual for constraint in problem.constraints for dual in constraint.dual_variables]
