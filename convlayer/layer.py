"""The front door: a CVXPY problem as a torch module."""

from __future__ import annotations

import copy
import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from functools import partial, reduce
from typing import Any

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from convlayer import domain
from convlayer.canon import canonicalise
from convlayer.explain import explain_cone_program
from convlayer.generic import Call, Solve
from convlayer.solution import (
    AccuracyWarning,
    GradientWarning,
    ParameterError,
    Solution,
    SolverError,
    Status,
    rows_in_words,
)
from convlayer.solvers import SOLVERS, Solver

TOLERANCE = 1e-8
STRUCTURES = ("auto", "generic", "cone_program")
POLICIES = ("raise", "nan", "keep")


class ConvexLayer(torch.nn.Module):
    """A parametrised convex problem as a differentiable layer.

        x*(theta) = argmin over x of f(x, theta) subject to the constraints of `problem`

    Solution:    canonicalised once to a cone program, solved row by row, polished to rounding error by Newton on the KKT residual map.
    Derivative:  the implicit function theorem at that zero, exact; one-sided or least-norm, and flagged, where there is none.
    Shapes:      each parameter (*batch, *its shape) or (*its shape), shared by the batch, its gradient then the sum over rows;
                 variables (*batch, *their shape). Any number of batch dimensions, which broadcast against each other.
    dtype:       float64 inside; outputs have the parameters' dtype and device.
    Threads:     rows run in a pool of one thread a core; small tensor work runs on one torch thread, whatever the setting.

    Arguments:
        problem:     a DPP problem (DGP with gp=True).
        parameters:  all its parameters, in the order in which tensors will be given.
        variables:   variables of the problem, or dual variables of its constraints (constraint.dual_variables[0]), to return.
        structure:   "auto", or "generic" for the cone program.
        solver:      None (Clarabel), "clarabel", "scs", or a convlayer.Solver of your own.
        solver_args: `tolerance` (relative KKT residual, default 1e-8) and the solver's own options; unknown ones are an error.
        gp:          the problem is log-log convex.
        gradient:    "exact".
        on_failure:  "raise" a SolverError that names the rows; "nan" fills just those rows; "keep" returns the last iterate, flagged.
        validate:    check the declared domains of the parameters (sign, symmetry, PSD, bounds) at every call.
        executor:    a concurrent.futures.Executor for the rows, not the one that the call itself runs in; by default a pool of one
                     thread a core. It is not copied or pickled with the layer.

    Errors: ProblemError (a ValueError) at construction; at a call TypeError and ValueError for what no row can use,
    ParameterError and SolverError for rows.
    Source: Amos and Kolter (2017); Agrawal et al. (2019); Busseti, Moursi and Boyd (2019).
    """

    def __init__(
        self,
        problem: cp.Problem,
        parameters: Sequence[cp.Parameter],
        variables: Sequence[cp.Variable],
        *,
        structure: str = "auto",
        solver: str | Solver | None = None,
        solver_args: Mapping[str, Any] | None = None,
        gp: bool = False,
        gradient: str = "exact",
        on_failure: str = "raise",
        validate: bool = True,
        executor: Executor | None = None,
    ) -> None:
        super().__init__()
        _one_of("structure", structure, STRUCTURES)
        _one_of("gradient", gradient, ("exact",))
        _one_of("on_failure", on_failure, POLICIES)
        self.structure = "cone_program"
        self.on_failure, self.validate, self.executor = on_failure, validate, executor
        self._canonical = canonicalise(problem, parameters, variables, gp=gp)
        self._parameters_of_problem = list(parameters)
        self._names = [v.name() for v in variables]
        self._solver, self._chosen = _solver(solver), solver is not None
        self._tolerance, self._options = self._check_options(solver_args or {})
        self._warned: set[str] = set()

    @torch.compiler.disable
    def forward(self, *tensors: Tensor, solver_args: Mapping[str, Any] | None = None) -> tuple[Tensor, ...]:
        """The optimal variables for these parameter values, in the order of `variables`."""
        return self._run(tensors, solver_args, None).variables

    @torch.compiler.disable
    def solve(
        self, *tensors: Tensor, solver_args: Mapping[str, Any] | None = None, warm_start: Solution | None = None
    ) -> Solution:
        """As a call of the layer, with value, status, iterations and residual of every row.

        warm_start: a Solution of the same batch shape, for a solver that can start from it (SCS).
        """
        return self._run(tensors, solver_args, warm_start)

    def explain(self, batch: int = 1) -> str:
        """Which path runs and why, the sizes before and after canonicalisation, and what a forward and a backward cost."""
        return explain_cone_program(
            self._canonical, self._solver, self._chosen, self._tolerance, self.executor is not None, batch
        )

    def with_options(
        self,
        *,
        solver: str | Solver | None = None,
        solver_args: Mapping[str, Any] | None = None,
        on_failure: str | None = None,
        validate: bool | None = None,
        executor: Executor | None = None,
    ) -> ConvexLayer:
        """A layer of the same problem, sharing its canonical form, with some of the constructor's options changed.

        `solver_args` are added to those the layer has; with another `solver` only `tolerance` is kept.
        """
        sibling = copy.copy(self)
        # The hooks and submodules of a module stand in dictionaries, which a shallow copy would share.
        sibling.__dict__.update(
            {name: copy.copy(part) for name, part in self.__dict__.items() if isinstance(part, dict)}
        )
        sibling._warned = set()
        if on_failure is not None:
            _one_of("on_failure", on_failure, POLICIES)
            sibling.on_failure = on_failure
        if validate is not None:
            sibling.validate = validate
        if executor is not None:
            sibling.executor = executor
        if solver is not None:
            sibling._solver, sibling._chosen, sibling._options = _solver(solver), True, {}
        if solver is not None or solver_args is not None:
            sibling._tolerance, sibling._options = sibling._check_options(
                {"tolerance": self._tolerance, **sibling._options, **(solver_args or {})}
            )
        return sibling

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "executor": None}

    def extra_repr(self) -> str:
        parameters = ", ".join(f"{p.name()}{tuple(p.shape)}" for p in self._parameters_of_problem)
        variables = ", ".join(
            f"{name}{v.shape}" for name, v in zip(self._names, self._canonical.variables, strict=True)
        )
        return f"({parameters}) -> ({variables}), structure={self.structure}, solver={self._solver.name}, on_failure={self.on_failure}"

    def _check_options(self, solver_args: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
        options = dict(solver_args)
        tolerance = options.pop("tolerance", TOLERANCE)
        if not isinstance(tolerance, (int, float)) or not 0 < tolerance < 1:
            raise ValueError(f"`tolerance` must be a number between 0 and 1; got {tolerance!r}.")
        self._solver.check(self._canonical.program, options)
        return float(tolerance), options

    def _run(
        self, tensors: tuple[Tensor, ...], solver_args: Mapping[str, Any] | None, warm_start: Solution | None
    ) -> Solution:
        tolerance, options = (
            self._check_options({"tolerance": self._tolerance, **self._options, **solver_args})
            if solver_args
            else (self._tolerance, self._options)
        )
        dtype, device, batch = self._check_tensors(tensors)
        size = math.prod(batch)
        with torch.autocast("cpu", enabled=False), torch.autocast(device.type, enabled=False):
            values = [_flatten_batch(t, p, batch) for t, p in zip(tensors, self._canonical.parameters, strict=True)]
            bad, details = self._bad_rows(values, size)
            if self.on_failure == "raise" and bool(bad.any()):
                raise ParameterError.of(torch.where(bad, int(Status.BAD_INPUT), 0).view(batch), details)
            thetas = [
                p.entries(v.to("cpu", torch.float64)) for v, p in zip(values, self._canonical.parameters, strict=True)
            ]
            start = self._start(warm_start, batch)
            differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in thetas)
            warn = partial(self._warn_degenerate, batch)
            call = Call(
                self._canonical, self._solver, tolerance, options, self.executor, bad, start, differentiable, warn
            )
            x, y, value = Solve.apply(call, *thetas)
            failed = self._judge(call.status, batch, details)
            outputs = [recovery.value(x, y) for recovery in self._canonical.variables] + [
                self._canonical.objective(value)
            ]
            if failed is not None:
                fill = failed if self.on_failure == "nan" else call.blank
                outputs = [_Guard.apply(output, failed, fill) for output in outputs]
            *variables, objective = (
                output.to(device, dtype).reshape((*batch, *output.shape[1:])) for output in outputs
            )
        row = {name: getattr(call, name).reshape(batch) for name in ("status", "iterations", "residual", "degenerate")}
        return Solution(tuple(variables), objective, **row, iterate=call.iterate)

    def _check_tensors(self, tensors: tuple[Tensor, ...]) -> tuple[torch.dtype, torch.device, tuple[int, ...]]:
        """The outputs' dtype and device, and the batch shape."""
        parameters = self._parameters_of_problem
        if len(tensors) != len(parameters):
            names = ", ".join(f"`{p.name()}`" for p in parameters)
            raise ValueError(f"The layer takes {len(parameters)} tensors ({names}); got {len(tensors)}.")
        shapes = []
        for tensor, parameter in zip(tensors, parameters, strict=True):
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"Parameter `{parameter.name()}` was given a {type(tensor).__name__}; expected a torch.Tensor: write torch.as_tensor(value)."
                )
            if tensor.is_complex():
                raise TypeError(
                    f"Parameter `{parameter.name()}` was given a complex tensor; pass real and imaginary parts apart."
                )
            if not tensor.is_floating_point():
                raise TypeError(
                    f"Parameter `{parameter.name()}` was given a tensor of {tensor.dtype}; expected floating point: write {parameter.name()}.double()."
                )
            shapes.append(_batch_shape(tensor, parameter))
        try:
            batch = np.broadcast_shapes(*shapes)  # torch's own loads a symbolic algebra package at its first call
        except ValueError:
            listed = ", ".join(f"`{p.name()}` {shape}" for p, shape in zip(parameters, shapes, strict=True))
            raise ValueError(
                f"The batch dimensions do not agree: {listed}. Each parameter has the batch dimensions in front, or none if it is shared."
            ) from None
        devices = {str(t.device) for t in tensors}
        if len(devices) > 1:
            listed = ", ".join(f"`{p.name()}` on {t.device}" for p, t in zip(parameters, tensors, strict=True))
            raise ValueError(f"The parameters are on different devices: {listed}. Move them to one.")
        # As torch promotes: a tensor without dimensions has no say where there is one with.
        dtypes = [t.dtype for t in tensors if t.ndim] or [t.dtype for t in tensors] or [torch.get_default_dtype()]
        dtype = reduce(torch.promote_types, dtypes)
        return dtype, tensors[0].device if tensors else torch.device("cpu"), batch

    def _bad_rows(self, values: list[Tensor], size: int) -> tuple[Tensor, dict[int, str]]:
        """Rows whose parameters are NaN, infinite or outside their domain, and the first reason for each."""
        bad = torch.zeros(size, dtype=torch.bool)
        details: dict[int, str] = {}
        for value, parameter in zip(values, self._parameters_of_problem, strict=True):
            found = list(domain.violations(parameter, value)) if self.validate else []
            # A finite sum has finite terms: one pass over the values where all is well.
            if not math.isfinite(value.detach().sum().item()):
                finite = torch.isfinite(value.detach()).unsqueeze(-1).flatten(1).all(1)
                found = [(rows & finite, reason) for rows, reason in found]
                if not bool(finite.all()):
                    found.insert(0, (~finite, f"Parameter `{parameter.name()}` holds NaN or infinity."))
            for rows, reason in found:
                rows = rows.cpu().expand(size)
                bad = bad | rows
                for k in torch.nonzero(rows).flatten().tolist():
                    details.setdefault(k, reason)
        return bad, details

    def _start(self, warm_start: Solution | None, batch: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor] | None:
        if warm_start is None:
            return None
        if not self._solver.warm_starts:
            raise ValueError(
                f"Solver {self._solver.name} cannot start from a previous solution; use solver='scs', or leave warm_start out."
            )
        if not isinstance(warm_start, Solution):
            raise TypeError(f"warm_start must be a Solution that this layer returned; got {type(warm_start).__name__}.")
        if tuple(warm_start.status.shape) != batch:
            raise ValueError(
                f"warm_start has batch shape {tuple(warm_start.status.shape)}; the parameters have {batch}."
            )
        sizes = (self._canonical.program.n, self._canonical.program.m)
        if (warm_start.iterate[0].shape[1], warm_start.iterate[2].shape[1]) != sizes:
            raise ValueError("warm_start is the solution of another problem; pass one that this layer returned.")
        x, slack, y = (part.nan_to_num(0.0) for part in warm_start.iterate)
        return x, slack, y

    def _judge(self, status: Tensor, batch: tuple[int, ...], details: dict[int, str]) -> Tensor | None:
        """Apply the failure policy: raise, or return the failed rows (None where there are none)."""
        if bool((status == Status.INACCURATE).any()):
            rows = torch.nonzero(status == Status.INACCURATE).flatten()
            self._warn(AccuracyWarning, f"{rows_in_words(rows, batch).capitalize()}: {Status.INACCURATE.advice}")
        failed = status >= Status.INFEASIBLE
        if not bool(failed.any()):
            return None
        if self.on_failure == "raise":
            raise SolverError.of(status.view(batch), details)
        return failed

    def _warn_degenerate(self, batch: tuple[int, ...], rows: Tensor) -> None:
        self._warn(
            GradientWarning,
            f"{rows_in_words(rows, batch).capitalize()}: degenerate (a weakly active constraint, or a singular KKT system), so the derivative "
            "is one-sided, or the least-norm one. Solution.degenerate tells which rows; a small strongly convex term makes the solution unique.",
        )

    def _warn(self, category: type[Warning], message: str) -> None:
        """Once a layer and cause."""
        if category.__name__ not in self._warned:
            self._warned.add(category.__name__)
            # At the line of the user's that called, or called backward on a loss.
            depth, frame = 1, sys._getframe()
            while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in ("convlayer", "torch"):
                depth, frame = depth + 1, frame.f_back
            warnings.warn(message, category, stacklevel=depth)


class _Guard(torch.autograd.Function):
    """Failed rows of an output: NaN where `fill`; their cotangent is NaN where the loss uses them and zero where it does not."""

    @staticmethod
    def forward(ctx, output: Tensor, failed: Tensor, fill: Tensor):
        ctx.failed = failed
        output = output.clone()
        output[fill] = torch.nan
        return output

    @staticmethod
    def backward(ctx, output_bar: Tensor):
        guarded = output_bar.clone()
        rows = guarded[ctx.failed]
        guarded[ctx.failed] = torch.zeros_like(rows).masked_fill_(rows != 0, torch.nan)
        return guarded, None, None


def _solver(solver: str | Solver | None) -> Solver:
    if solver is None:
        return SOLVERS["clarabel"]
    if isinstance(solver, Solver):
        return solver
    if isinstance(solver, str) and solver.lower() in SOLVERS:
        return SOLVERS[solver.lower()]
    raise ValueError(f"`solver` must be one of {', '.join(map(repr, SOLVERS))}, or a convlayer.Solver; got {solver!r}.")


def _one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}; got {value!r}.")


def _batch_shape(tensor: Tensor, parameter: cp.Parameter) -> tuple[int, ...]:
    shape, expected = tuple(tensor.shape), tuple(parameter.shape)
    lead = len(shape) - len(expected)
    if lead < 0 or shape[lead:] != expected:
        wanted = ", ".join(map(str, expected))
        message = f"Parameter `{parameter.name()}` was given a tensor of shape {shape}; expected ({wanted}) or (*batch{', ' * bool(wanted)}{wanted})."
        if len(expected) == 2 and expected[0] == expected[1] == shape[-1] and lead < 1:
            message += f"\nEach row needs its own {expected[0]} x {expected[1]} matrix: did you mean torch.diag_embed({parameter.name()})?"
        elif math.prod(shape) == math.prod(expected):
            message += f"\nIt has the right number of entries: did you mean {parameter.name()}.reshape({wanted})?"
        elif expected and shape[:-1] == expected:
            message += f"\nThe batch comes first: did you mean {parameter.name()}.movedim(-1, 0)?"
        raise ValueError(message)
    return shape[:lead]


def _flatten_batch(tensor: Tensor, parameter, batch: tuple[int, ...]) -> Tensor:
    """(*own batch, *shape) -> (B, *shape), or (1, *shape) for a parameter that the whole batch shares."""
    lead = tensor.ndim - len(parameter.shape)
    own = tuple(tensor.shape[:lead])
    if math.prod(own) == 1 and math.prod(batch) != 0:
        return tensor.reshape(1, *parameter.shape)
    return tensor.expand(*batch, *parameter.shape).reshape(math.prod(batch), *parameter.shape)
