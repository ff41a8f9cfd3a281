"""The front door: a CVXPY problem as a torch module."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import cvxpy as cp
import torch
from torch import Tensor

from convlayer.autodiff import compiled
from convlayer.autodiff.derivative import (
    Local,
    Point,
    Recorded,
    anew,
    is_transformed,
    known,
    solved,
)
from convlayer.autodiff.threads import few_threads, one_thread
from convlayer.conic.program import take_rows
from convlayer.declaration import arguments, domain
from convlayer.declaration.canonical import Canonical
from convlayer.declaration.declaration import Declaration, with_proximal_term
from convlayer.declaration.diagnose import ProblemError
from convlayer.declaration.hashing import digest
from convlayer.declaration.normal_form import normal_form
from convlayer.display import Words
from convlayer.notices import tell
from convlayer.paths.closest import Closest, Relaxation, applies, closest, relaxed
from convlayer.paths.conflict import conflicts
from convlayer.paths.dispatch import CHOICES, attempts, other_solver, recognise
from convlayer.paths.generic import ROUNDING, Call, Solve, least_norm_weight
from convlayer.paths.gradients import Gradient, gradient_of
from convlayer.paths.rows import Rows, flatten_batch, leaves_of, no_autocast, put, shaped, spread
from convlayer.paths.specialised import Specialised, without
from convlayer.paths.starts import Starts
from convlayer.report import incumbent
from convlayer.report.check import Check, checked
from convlayer.report.explain import explain_choice, explain_cone_program
from convlayer.report.verification import Verification, not_compared, verify
from convlayer.shifts import Shifts
from convlayer.solution import (
    AccuracyWarning,
    Cause,
    GradientWarning,
    ParameterError,
    Solution,
    SolverError,
    Status,
    is_unsettled,
    rows_in_words,
)
from convlayer.solvers import DEFAULT, SOLVERS, Attempt, BatchSolver, ConeSolver
from convlayer.structures import STRUCTURES

TOLERANCE = 1e-8
REAL = 1e-13  # a relative shift from which on constraints do contradict each other
ROUNDINGS, COARSEST = 8, 1e-6  # the tolerance is at least so many roundings of the parameters, up to this
_warning = threading.Lock()
BY_SOLVER = "you named a solver, or its options"
NO_SCRIPT = (
    "A ConvexLayer is no TorchScript: torch.jit.trace and torch.jit.script would freeze one solution into the graph. Use torch.compile, "
    "or torch.export to save the model."
)
CLOSEST = ("closest", "closest_few")
CHEAPEST = "the cheapest"  # where none is named, and `explain` tells which at a batch
POLICIES = ("raise", "nan", "keep", *CLOSEST)


class ConvexLayer(torch.nn.Module):
    """A parametrised convex problem as a differentiable layer.

        x*(theta) = argmin over x of f(x, theta) subject to the constraints of `problem`

    Solution:    by the kernel of the structure that the problem has, whatever its spelling, batched, on the parameters' own device;
                 where it has none, canonicalised once to a cone program, solved by the cheapest solver and polished to rounding error.
    Derivative:  the implicit function theorem with the forward's own factor, exact, to second order, in reverse and forward mode;
                 one-sided or least-norm, and flagged, where there is none. See `gradient` for what else there is then.
    Shapes:      each parameter (*batch, *its shape) or (*its shape), shared by the batch, its gradient then the sum over rows;
                 variables (*batch, *their shape). Any number of batch dimensions, which broadcast against each other.
    dtype:       outputs have the parameters' dtype and device; kernels compute in float32 only where that loses nothing, the cone program in float64.
    torch:       torch.func and vmap, torch.compile(fullgraph=True), copies and pickles (of the declaration), several threads at once.
    Bounds:      declared ones, and constraints on single variables, hold exactly, and an infinite right-hand side of an inequality is no
                 bound. Equalities that depend on each other may differ by the parameters' own rounding: the least change makes them agree.
    Threads:     rows run in a pool of one thread a core; small tensor work runs on one torch thread, whatever the setting.

    Arguments:
        problem:     a DPP problem (DGP with gp=True).
        parameters:  all its parameters, in the order in which tensors will be given.
        variables:   variables of the problem, or dual variables of its constraints (constraint.dual_variables[0]), to return.
        structure:   "auto": the most special structure that matches, if it is cheaper than the cone program; "generic": the cone program;
                     or a structure's name: that one, or a ProblemError that says why it does not apply.
        solver:      for the cone program: None, the cheapest at each batch (linear and quadratic programs DAQP, the batched interior point
                     or Clarabel, whatever has other cones Clarabel; off the host the interior point) with Clarabel behind it for rows that
                     it does not settle; or by name "clarabel", "daqp", "interior_point", "scs", or a convlayer.Solver of your own, and that
                     one alone. With "auto", naming one chooses the cone program.
        solver_args: `tolerance` (KKT residual, each entry relative to its own terms, default 1e-8; with parameters of lower precision at
                     least some roundings of theirs) and the solver's own options, such as `time_limit`, in seconds for a row
                     (interior_point: for a batch; SCS: `time_limit_secs`); unknown ones are an error.
        gp:          the problem is log-log convex.
        gradient:    how solutions are differentiated: "exact"; for problems whose exact derivative is zero or jumps "smoothed", "lpgd" and,
                     for linear objectives, "perturbed" and "blackbox" (see convlayer.paths.gradients). All but the first take the cone program.
        gradient_args: of that gradient: kappa; tau and rho; sigma, samples and seed; lam.
        regularise:  what makes a solution unique: the weight rho of a proximal term rho/2 |x|^2 over all variables, added to the problem
                     (and to the objective that is reported); or "least_norm", for linear and quadratic programs: of all solutions the
                     one of least norm, by a term so small (1e-6 in the row's own units) that a linear program's solutions stay optimal.
        on_failure:  "raise" a SolverError that names the rows; "nan" fills just those rows; "keep" returns the last iterate, flagged;
                     "closest": an infeasible row is solved with its constraints shifted by as little as possible (zero, nonnegative
                     and second-order cones), by Clarabel, with the exact gradient whatever `gradient` says, and Solution.shift says by
                     how much; other failures raise. "closest_few": the same by the least sum of shifts, not of their squares, which shifts
                     few constraints rather than all a little, those declared later first where others would do as well.
                     A row that a loss uses all the same gets NaN for its gradient; see `solve` for training where rows may fail.
        validate:    check the declared domains of the parameters (sign, symmetry, PSD, bounds) at every call.
        executor:    a concurrent.futures.Executor for the rows, not the one that the call itself runs in: threads, spawned processes, or a
                     dask cluster's, client.get_executor(pure=False), which solves again what a lost worker held; a process pool that
                     loses a worker raises BrokenExecutor. By default a pool of one thread a core. Kernels and the batched interior point
                     do not use it. It is not copied or pickled with the layer.
        squeeze:     a call returns the only variable itself, not a tuple of one, as torch.nn.Sequential wants it.

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
        solver: str | ConeSolver | None = None,
        solver_args: Mapping[str, Any] | None = None,
        gp: bool = False,
        gradient: str | Gradient = "exact",
        gradient_args: Mapping[str, Any] | None = None,
        regularise: float | str | None = None,
        on_failure: str = "raise",
        validate: bool = True,
        executor: Executor | None = None,
        squeeze: bool = False,
    ) -> None:
        """See the class."""
        super().__init__()
        _one_of("structure", structure, CHOICES)
        _one_of("on_failure", on_failure, POLICIES)
        self._gradient = gradient_of(gradient, gradient_args)
        self.on_failure, self.validate, self.executor, self.squeeze = on_failure, validate, executor, squeeze
        if regularise is not None and regularise != "least_norm":
            problem = with_proximal_term(problem, _proximal_weight(regularise, gp))
        self._regularise = regularise
        self._declared = Declaration.checked(problem, parameters, variables, gp)
        options = dict(solver_args or {})
        self._solver, self._chosen = _solver(solver), solver is not None or bool(options.keys() - {"tolerance"})
        self._tolerance, self._options = _tolerance(options), options
        self._asked = structure
        if squeeze and len(variables) != 1:
            raise ValueError(f"squeeze=True is for one variable; this layer returns {len(variables)}.")
        self._settle()
        self._fresh()

    def _settle(self) -> None:
        """Choose the path, and check that the options are of that path."""
        self._reason = BY_SOLVER if self._chosen else None
        if self._gradient.name != "exact":
            self._reason = f"gradient={self._gradient.name!r} is of the cone program"
        self._recognise()
        if self._specialised is not None and self._reason is not None:
            raise ValueError(
                f"structure={self._asked!r} runs a kernel, whose gradient is the exact one and which takes no solver and none of its options; "
                "leave them out."
            )
        if self._specialised is None:
            self._solver.check(self._canonical.program, self._options)
            self._gradient.check(self._canonical)
        self._check_policy()

    def _check_policy(self) -> None:
        """ProblemError: there is no closest feasible problem to be had."""
        reason = applies(self._canonical) if self.on_failure in CLOSEST else None
        if reason:
            raise ProblemError(
                f"on_failure={self.on_failure!r} takes zero, nonnegative and second-order cones; here {reason}."
            )

    def _recognise(self) -> None:
        """Choose the path, from the declaration and what was asked for."""
        declared = self._declared
        problem, parameters, gp = declared.problem, declared.parameters, declared.gp
        self._recognition = recognise(
            problem, parameters, declared.variables, declared.owners, gp=gp, structure=self._asked, reason=self._reason
        )
        chosen, form = self._recognition.chosen, self._recognition.form
        if self._regularise == "least_norm" and not (chosen is not None and STRUCTURES[chosen.name].least_norm):
            reason = "it is log-log convex" if gp else (form or normal_form(problem, parameters)).not_quadratic
            if reason:
                raise ProblemError(
                    f"regularise='least_norm' is for linear and quadratic programs, and this is none: {reason}. Give the weight of a proximal "
                    "term instead, such as regularise=1e-6."
                )
            chosen = None
        if self._regularise == "least_norm" and declared.weight is None:
            self._declared = declared.least_norm()
        self.structure = "cone_program" if chosen is None else chosen.name
        self._specialised: Specialised | None = None
        if chosen is not None and chosen.match is not None and chosen.match.build is not None:
            assert form is not None
            self._specialised = Specialised(form, chosen.name, chosen.match, declared.variables, declared.owners)
        self._domains = [domain.declared(p) for p in parameters]

    def _fresh(self) -> None:
        """What a layer does not share with its copies."""
        self._warned: set[tuple[type[Warning], Hashable]] = set()
        self._starts = Starts()
        self._named: tuple[Any, str] | None = None
        self._number = compiled.registered(self)

    @property
    def _canonical(self) -> Canonical:
        """The cone program, made when it is first needed."""
        return self._declared.canonical

    def forward(
        self,
        *tensors: Any,
        solver_args: Mapping[str, Any] | None = None,
        ids: Tensor | Sequence[Hashable] | None = None,
        **named: Any,
    ) -> tuple[Tensor, ...] | Tensor:
        """The optimal variables for these parameter values, in the order of `variables`; with squeeze=True the only one.

        tensors: one for each parameter, in the order of `parameters`; numpy arrays will do, and numbers for scalars. Or by name,
             layer(price=p), or as a dictionary by the CVXPY objects, layer({price: p}).
        ids: one for each row of the batch, telling a sample from others; a sample that was seen before starts where it ended then.
             Kernels and samples that are new start cold. The last solutions are kept by the layer (`forget` drops them).
        """
        given = self._taken(tensors, named)
        if torch.compiler.is_compiling():
            outputs = self._in_graph(given, solver_args, ids)
        else:
            if torch.jit.is_tracing():
                raise RuntimeError(NO_SCRIPT)
            outputs = self._run(given, _How(solver_args, ids=ids))[0]
        return outputs[0] if self.squeeze else outputs

    @compiled.outside_graphs
    def solve(
        self,
        *tensors: Any,
        solver_args: Mapping[str, Any] | None = None,
        warm_start: Solution | None = None,
        ids: Tensor | Sequence[Hashable] | None = None,
        **named: Any,
    ) -> Solution:
        """As a call of the layer, with value, status, iterations and residual of every row.

        warm_start: a Solution of the same batch shape, to start from; it takes the cone program. SCS starts there itself;
                    for the others Newton's method starts there, and rows that it does not settle start cold.
        ids:        as in a call of the layer.

        Training where rows may fail (on_failure="nan"): take the rows that have a solution before anything is computed of them,

            solution = layer.solve(net(inputs))
            (x,), solved = solution.variables, solution.solved
            loss = (x[solved] - target[solved]).square().mean()

        as nanmean and where compute on NaN first, and the gradient of that is NaN.
        """
        outputs, rest, rows = self._run(
            self._taken(tensors, named), _How(solver_args, warm_start, ids, everything=True)
        )
        status, iterations, residual, degenerate, margin = rest
        notes = tuple(f"{rows_in_words(which, rows.batch)}: {what}" for which, what in rows.notes)
        return Solution(
            outputs[:-1],
            outputs[-1],
            status,
            iterations,
            residual,
            degenerate,
            margin,
            notes=notes,
            shift=rows.shifts,
            iterate=rows.iterate,
        )

    def forget(self) -> None:
        """Drop the solutions kept by `ids`."""
        self._starts.clear()

    def verify(self, *tensors: Any, seed: int = 0, against: str | None = None, **named: Any) -> Verification:
        """Solve again another way, and compare values, feasibility and gradients, row by row.

        A kernel is compared with the cone program by Clarabel, the cone program with itself by a solver that has no part in the layer's
        answer; where there is none, the result says so. With against="diffcp" either is compared with CVXPY and diffcp, which share no
        code with it and go row by row; the problem's parameters are then given the rows' values. diffcp's derivative of power cones is
        wrong: gradients are not compared there.
        The gradients are those of one random linear functional of the variables, drawn from `seed`. Nothing is raised: look at
        `.agrees`, or print it. Rows whose constraints contradict each other by rounding alone agree to that rounding.
        """
        tensors = self._taken(tensors, named)
        dtype, _, batch = self._check_tensors(tensors)
        leaves = [
            t.detach().expand((*batch, *p.shape)) for t, p in zip(tensors, self._declared.parameters, strict=True)
        ]
        mine = self.with_options(on_failure="nan")
        infeasibility = None
        if self._specialised is not None:
            with torch.no_grad():
                values = [flatten_batch(t, p, batch) for t, p in zip(leaves, self._declared.parameters, strict=True)]
                bad, _ = mine._bad_rows(values, math.prod(batch))
                work = dtype if dtype in (torch.float32, torch.float64) else torch.float32
                infeasibility = self._specialised.infeasibility(values, bad, work).expand(math.prod(batch))
        if against is not None:
            return self._against_diffcp(against, mine.solve, leaves, len(batch), infeasibility, seed)
        other: str | None = "clarabel"
        if self._specialised is None:
            taken = self._attempts(math.prod(batch), self._tolerance, self._options, torch.device("cpu"))
            other = other_solver(self._canonical.program, math.prod(batch), taken)
        if other is None:
            return not_compared(self.structure, batch)
        theirs = mine.with_options(solver=other).solve
        return verify(
            self.structure, mine.solve, theirs, leaves, len(batch), infeasibility, seed, f"cone_program by {other}"
        )

    def _against_diffcp(
        self,
        against: str,
        mine: Callable[..., Solution],
        leaves: Sequence[Tensor],
        lead: int,
        infeasibility: Tensor | None,
        seed: int,
    ) -> Verification:
        _one_of("against", against, (incumbent.NAME,))
        incumbent.check(self._declared)
        told: list[str] = []
        found = verify(
            self.structure, mine, incumbent.solver(self._declared, lead, told), leaves, lead, infeasibility, seed, "CVXPY with diffcp"
        )
        remarks = [f"{why.rstrip('.')}." for why in dict.fromkeys(told)]
        if any(block.name == "power" for block in self._canonical.program.cones.blocks):
            remarks.append("Gradients are not compared: diffcp's derivative of power cones is wrong.")
            found = replace(found, gradient=torch.zeros_like(found.gradient))
        return replace(found, remark=" ".join(remarks))

    def check(self, *tensors: Any, **named: Any) -> Check:
        """How far each row is from where the solution map is not differentiable, or not well: by constraint, as tensors; print it for words.

        It solves the rows as a cone program, whatever the layer's path, and raises nothing for rows that fail. Meant for a look, not
        for training: the active system's eigenvalues are worked out.
        """
        return checked(self, self._taken(tensors, named))

    def explain(self, batch: int = 1) -> str:
        """Which path runs and why, why the others do not, the sizes, and what a forward and a backward cost."""
        why = self._reason or self._recognition.why
        kernel = self._specialised is not None
        text = explain_choice(self._recognition, self.structure, why, self._regularise, batch, kernel)
        if self._specialised is not None:
            return Words(text)
        attempts = self._attempts(batch, self._tolerance, self._options, torch.device("cpu"))
        own = self.executor is not None
        named = self._chosen or bool(self._options)
        rest = explain_cone_program(self._declared, attempts, named, self._tolerance, own, batch)
        return Words(f"{text}\n{rest}")

    def with_options(
        self,
        *,
        structure: str | None = None,
        solver: str | ConeSolver | None = None,
        solver_args: Mapping[str, Any] | None = None,
        gradient: str | Gradient | None = None,
        gradient_args: Mapping[str, Any] | None = None,
        on_failure: str | None = None,
        validate: bool | None = None,
        executor: Executor | None = None,
    ) -> ConvexLayer:
        """A layer of the same problem, sharing its canonical form, with some of the constructor's options changed.

        `solver_args` are added to those the layer has; with another `solver` only `tolerance` is kept. `gradient_args` alone are of the
        gradient that the layer has.
        """
        sibling = self._copy()
        if on_failure is not None:
            _one_of("on_failure", on_failure, POLICIES)
            sibling.on_failure = on_failure
            sibling._check_policy()
        if validate is not None:
            sibling.validate = validate
        if executor is not None:
            sibling.executor = executor
        options = dict(solver_args or {})
        if solver is not None:
            sibling._solver, sibling._chosen, sibling._options = _solver(solver), True, {}
        if solver is not None or solver_args is not None:
            merged = {"tolerance": self._tolerance, **sibling._options, **options}
            sibling._tolerance, sibling._options = _tolerance(merged), merged
            sibling._chosen = sibling._chosen or bool(options.keys() - {"tolerance"})
        if gradient is not None or gradient_args is not None:
            sibling._gradient = gradient_of(gradient or self._gradient.name, gradient_args)
        if structure is not None:
            _one_of("structure", structure, CHOICES)
            sibling._asked = structure
        if structure is not None or sibling._gradient != self._gradient:
            sibling._settle()
        elif solver is not None or solver_args is not None:
            if sibling._chosen:
                sibling = sibling._generic()
                sibling._reason = BY_SOLVER
            if sibling._specialised is None:
                sibling._solver.check(self._canonical.program, sibling._options)
        return sibling

    def _copy(self) -> ConvexLayer:
        sibling = object.__new__(type(self))
        sibling.__dict__.update(self.__dict__)
        # The hooks and submodules of a module stand in dictionaries, which a shallow copy would share.
        sibling.__dict__.update(
            {name: copy.copy(part) for name, part in self.__dict__.items() if isinstance(part, dict)}
        )
        sibling.executor = self.executor
        sibling._fresh()
        return sibling

    def _generic(self) -> ConvexLayer:
        """A sibling on the generic path."""
        sibling = self._copy()
        sibling._specialised, sibling.structure, sibling._asked = None, "cone_program", "generic"
        return sibling

    def __getstate__(self) -> dict[str, Any]:
        """The declaration and the options: the rest is made from them anew."""
        made = ("_recognition", "_specialised", "_domains", "_warned", "_starts", "_named", "_number")
        return {**{name: part for name, part in self.__dict__.items() if name not in made}, "executor": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._recognise()
        self._fresh()

    def __prepare_scriptable__(self) -> None:
        """What torch.jit.script asks first."""
        raise RuntimeError(NO_SCRIPT)

    def extra_repr(self) -> str:
        parameters = ", ".join(f"{p.name()}{tuple(p.shape)}" for p in self._declared.parameters)
        variables = ", ".join(f"{v.name()}{tuple(v.shape)}" for v in self._declared.variables)
        solver = ""
        if self._specialised is None:
            solver = f", solver={self._solver.name if self._chosen or self._options else CHEAPEST}"
        return f"({parameters}) -> ({variables}), structure={self.structure}{solver}, on_failure={self.on_failure}"

    def _in_graph(
        self, tensors: tuple[Tensor, ...], solver_args: Mapping[str, Any] | None, ids: Any
    ) -> tuple[Tensor, ...]:
        """A call inside torch.compile."""
        if solver_args is not None or not (ids is None or isinstance(ids, Tensor)) or not tensors:
            raise TypeError(
                "Inside torch.compile a layer takes tensors alone, one at least: give `solver_args` to with_options, and `ids` as a tensor."
            )
        return compiled.outputs(tensors, ids, compiled.name(self._number, self.on_failure, self.validate))

    @property
    def _graph_name(self) -> str:
        """See `compiled.Layer`."""
        changing = self.on_failure, self.validate
        if self._named is None or self._named[0] != changing:
            own = type(self._solver).__module__.startswith("convlayer.")
            solver = self._solver.name if own else self._solver
            gradient = type(self._gradient).__qualname__, vars(self._gradient)
            path = self.structure, self._chosen, solver, self._tolerance, self._options, gradient, self._regularise
            self._named = changing, digest(self._declared.digest, path, changing)
        return self._named[1]

    def _evaluate(
        self, thetas: Sequence[Tensor], ids: Tensor | None, differentiable: bool
    ) -> tuple[list[Tensor], Local]:
        """See `compiled.Layer`."""
        rows = self._evaluated(thetas, _How(ids=ids), differentiable)
        return rows.filled, rows.local

    def _blank(self, thetas: Sequence[Tensor]) -> list[Tensor]:
        """See `compiled.Layer`."""
        dtype, device, batch = self._check_tensors(thetas)
        return [torch.empty(*batch, *v.shape, dtype=dtype, device=device) for v in self._declared.variables]

    def _run(self, tensors: tuple[Tensor, ...], how: _How) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Rows]:
        """The outputs; with `everything` the objective too, and status, iterations, residual, degenerate and margin of the rows."""
        if not is_transformed(tensors):
            rows = self._solved(leaves_of(tensors), how)
            return rows.leave(tensors), rows.table() if how.everything else (), rows
        if how.ids is not None or how.warm_start is not None:
            raise RuntimeError(
                "A warm start, or `ids`, cannot be used inside a torch.func transform or with a tangent; leave it out."
            )
        found: list[Rows] = []

        def solve(thetas: Sequence[Tensor], differentiable: bool):
            rows = self._evaluated(thetas, how, differentiable)
            rows.iterate = None
            found.append(rows)
            return rows.filled, rows.table() if how.everything else (), rows.local

        parameters = self._declared.parameters
        point = Point([len(p.shape) for p in parameters], solve)
        self._check_tensors(tensors)
        outputs = solved(point, tensors)
        return outputs[: point.outputs], outputs[point.outputs :], found[0]

    def _evaluated(self, thetas: Sequence[Tensor], how: _How, differentiable: bool) -> Rows:
        """Solved on plain tensors apart from every graph, with what its derivatives need."""
        with torch.set_grad_enabled(differentiable):
            return self._solved(tuple(theta.detach().requires_grad_(differentiable) for theta in thetas), how)

    def _solved(self, tensors: tuple[Tensor, ...], how: _How) -> Rows:
        """Check, and solve on the chosen path."""
        dtype, device, batch = self._check_tensors(tensors)
        size = math.prod(batch)
        values = [flatten_batch(t, p, batch) for t, p in zip(tensors, self._declared.parameters, strict=True)]
        with no_autocast(device), few_threads(self._operations(values)):
            vouched = frozenset() if self._specialised is None else self._specialised.match.vouches
            bad, details = self._checked(values, size, batch, vouched)
            keys = None if how.ids is None else _keys(how.ids, batch)
            asked = how.solver_args is not None and bool(how.solver_args.keys() - {"tolerance"})
            if self._specialised is None or asked or how.warm_start is not None:
                start = self._start(how.warm_start, batch) if keys is None else self._kept(keys)
                with one_thread():
                    rows = self._solve_generic(values, size, bad, batch, how.solver_args, start, how.everything)
                if keys is not None and rows.iterate is not None and rows.status is not None:
                    self._starts.put(keys, rows.iterate, rows.status == Status.SOLVED)
            else:
                rows = self._solve_specialised(values, size, bad, batch, dtype, how, details)
                if rows.status is not None:
                    self._rescue(rows, values, size, how)
            if rows.status is not None and bool(rows.status.any()):
                self._reconcile(rows, values, size, how.everything)
                if self.on_failure in CLOSEST:
                    self._relax(rows, values, size, how.everything)
            rows.outputs = [shaped(o, dtype, device, batch, size) for o in rows.outputs]
            details = {**rows.details, **details}
            rows.batch, rows.dtype, rows.device = batch, dtype, device
            rows.leaves, rows.parameters = tensors, self._declared.parameters
            self._judge(rows, details)
            rows.fence(values)
            rows.versions = tuple(output._version for output in rows.outputs if output.requires_grad)
        return rows

    def _operations(self, values: list[Tensor]) -> float:
        """Of a call, but for what the cone program does on its own threads."""
        numbers = float(sum(value.numel() for value in values))
        rows = max((value.shape[0] for value in values), default=1)
        return numbers if self._specialised is None else numbers + self._specialised.operations(rows)

    def _solve_generic(
        self,
        values: list[Tensor],
        size: int,
        bad: Tensor | None,
        batch: tuple[int, ...],
        solver_args: Mapping[str, Any] | None,
        start: tuple[Tensor, ...] | None,
        everything: bool,
    ) -> Rows:
        canonical = self._canonical
        tolerance, options = self._tolerance, self._options
        if solver_args:
            merged = {"tolerance": tolerance, **options, **solver_args}
            tolerance, options = _tolerance(merged), merged
            self._solver.check(canonical.program, options)
        device = values[0].device if values else torch.device("cpu")
        attempts = self._attempts(size, tolerance, options, device)
        coarsest = _coarsest(values)
        precision = domain.relative(coarsest)
        # No answer is wanted beyond the rounding of what it is made of.
        tolerance = max(tolerance, min(ROUNDINGS * torch.finfo(coarsest).eps, COARSEST))
        elimination = None if self._chosen or options else canonical.elimination
        if not isinstance(attempts[0].solver, BatchSolver):
            device = torch.device("cpu")
        thetas = self._thetas(values, device)
        differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in thetas)
        excluded = torch.zeros(size, dtype=torch.bool) if bad is None else bad
        warn = partial(self._warn_degenerate, batch)
        call = Call(
            canonical,
            attempts,
            tolerance,
            self.executor,
            elimination,
            device,
            excluded,
            start,
            differentiable,
            everything or (differentiable and self._gradient.name == "exact"),
            self._declared.weight is not None,
            precision,
            self._gradient,
            warn,
        )
        x, y, value = Solve.apply(call, *thetas)

        def recovered(x: Tensor, y: Tensor, value: Tensor) -> list[Tensor]:
            outputs = [recovery.value(x, y) for recovery in canonical.variables]
            return [*outputs, canonical.objective(value)] if everything else outputs

        def again(values: list[Tensor]) -> list[Tensor]:
            given = [*(value.to(device, torch.float64) for value in values), *thetas[len(values) :]]
            entries = [reader.read(value) for reader, value in zip(canonical.parameters, given, strict=True)]
            return recovered(*known(call.exact.solution, lambda: call.derivative, entries))

        return Rows(
            recovered(x, y, value),
            again,
            call.status,
            call.iterations,
            call.residual,
            call.degenerate,
            call.margin,
            call.blank,
            call.iterate,
            [*_notes(attempts, call.attempt, call.status), *(() if call.agreement is None else _put_together(*call.agreement[:2]))],
            warned=True,
            details={**({} if call.agreement is None else _in_words(*call.agreement[:2], coarsest)), **_stopped(call)},
            stopped=call.stopped,
        )

    def _thetas(self, values: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        """The cone program's parameters from the user's, (B or 1, *shape) each."""
        thetas = [v.to(device, torch.float64) for v in values]
        if self._declared.weight is not None:
            thetas.append(least_norm_weight(self._canonical, thetas, device))
        return thetas

    def _kept(self, keys: Sequence[Hashable]) -> tuple[Tensor, ...] | None:
        program = self._canonical.program
        return self._starts.get(keys, (program.n, program.m, program.m))

    def _attempts(
        self, batch: int, tolerance: float, options: Mapping[str, Any], device: torch.device
    ) -> list[Attempt]:
        """By the solver asked for, or by the cheapest one at this batch, with others behind it."""
        if self._chosen or options:
            return self._solver.attempts(tolerance, options)
        elimination = self._canonical.elimination
        program = self._canonical.program if elimination is None else elimination.program
        return attempts(program, batch, tolerance, device)

    def _solve_specialised(
        self,
        values: list[Tensor],
        size: int,
        bad: Tensor | None,
        batch: tuple[int, ...],
        dtype: torch.dtype,
        how: _How,
        details: dict[int, str],
    ) -> Rows:
        path = self._specialised
        assert path is not None
        if how.solver_args:
            _tolerance(dict(how.solver_args))
        work = dtype if dtype in (torch.float32, torch.float64) else torch.float32
        answer, outputs, entered = path(values, bad, work)
        if path.match.vouches and not answer.definite:
            # What the kernel was to see for itself it did not: the look that was saved is taken.
            bad, found = self._checked(values, size, batch, frozenset())
            details.update(found)
            if bad is not None:
                answer, outputs, entered = path(values, bad, work)
        if how.everything:
            outputs.append(path.objective(entered, answer))

        def again(values: list[Tensor]) -> list[Tensor]:
            return path.again(values, answer, work, how.everything)

        rows = Rows.of_answer(answer, outputs, again, size, bad, how.everything)
        if answer.apart is not None and rows.status is not None:
            # A disagreement is weighed where the numbers are known that right-hand sides are made of.
            apart = answer.apart().cpu()
            refuted = (rows.status == Status.INFEASIBLE) & (apart > ROUNDING)
            rows.status = rows.status.masked_fill(refuted, int(Status.NOT_CONVERGED))
            rows.notes += _put_together(apart, refuted)
        return rows

    def _rescue(self, rows: Rows, values: list[Tensor], size: int, how: _How) -> None:
        """The cone program and its solver for the rows that the kernel could not settle, and for those alone."""
        assert rows.status is not None
        unsettled = is_unsettled(rows.status)
        if not bool(unsettled.any()):
            return
        which = torch.nonzero(unsettled).flatten()
        part = [take_rows(v, which.to(v.device)) for v in values]
        generic = self._generic()
        with one_thread():
            other = generic._solve_generic(part, len(which), None, (len(which),), how.solver_args, None, how.everything)
        rows.outputs = put(rows.outputs, which, other.outputs, size)
        for name in ("status", "iterations", "residual", "degenerate", "margin", "blank"):
            setattr(rows, name, getattr(rows, name).index_copy(0, which, getattr(other, name)))
        rows.iterate = None

        def solve(values: Sequence[Tensor], _: bool) -> tuple[list[Tensor], tuple, Local]:
            leaves = [value.detach().requires_grad_() for value in values]
            with torch.enable_grad(), one_thread():
                theirs = generic._solve_generic(
                    leaves, len(rescued), None, (len(rescued),), how.solver_args, None, how.everything
                )
            local = Recorded(leaves, theirs.outputs, lambda *values: theirs.again(list(values)), tuple, list)
            return [output.detach() for output in theirs.outputs], (), local

        before, outputs = rows.again, [output.detach() for output in rows.outputs]
        rescued = which[rows.status[which] < Status.INFEASIBLE]

        def again(values: list[Tensor]) -> list[Tensor]:
            # The kernel's own function knows nothing of these rows: it gets the values of others there.
            settled = outputs if bool(unsettled.all()) else before([without(value, unsettled) for value in values])
            if not len(rescued):
                return settled
            return put(settled, rescued, anew(solve, [take_rows(v, rescued.to(v.device)) for v in values]), size)

        rows.again = again
        told = _told(which, rows.status[which], "not settled by the kernel", "as a cone program")
        rows.notes = [*rows.notes, *told, *((which[part], what) for part, what in other.notes)]
        rows.details.update({int(which[row]): what for row, what in other.details.items()})

    def _reconcile(self, rows: Rows, values: list[Tensor], size: int, everything: bool) -> None:
        """Rows that did not settle because constraints contradict each other by rounding: with the least shift that ends it."""
        assert rows.status is not None
        unsettled = is_unsettled(rows.status)
        if rows.stopped is not None:
            unsettled &= ~rows.stopped
        which = torch.nonzero(unsettled).flatten()
        if not len(which) or self._gradient.name != "exact" or applies(self._canonical) is not None:
            return
        precision = max(domain.relative(_coarsest(values)), self._tolerance)
        relaxation, entries = self._relaxation(values, which)
        if not bool(relaxation.soft.any()):
            return
        with one_thread():
            found = closest(relaxation, entries(values), self._tolerance, least=REAL)
        sizes = self._canonical.sizes_of_b(entries(values))
        little = (found.shift.detach().abs() <= precision * sizes.amax(1, keepdim=True)).all(1)
        good = torch.nonzero((found.status == Status.SOLVED) & little).flatten()
        if len(good):
            self._answer(rows, which[good], relaxation, found, good, entries, size, everything)
            what = "constraints contradict each other by rounding alone; solved with the least shift that ends it"
            rows.notes.append((which[good], what))

    def _relax(self, rows: Rows, values: list[Tensor], size: int, everything: bool) -> None:
        """The closest feasible problem for the infeasible rows, and for those alone."""
        assert rows.status is not None
        which = torch.nonzero(rows.status == Status.INFEASIBLE).flatten()
        if not len(which):
            return
        relaxation, entries = self._relaxation(values, which)
        if not bool(relaxation.soft.any()):
            return
        with one_thread():
            found = closest(relaxation, entries(values), self._tolerance, self.on_failure == "closest_few")
        self._answer(rows, which, relaxation, found, torch.arange(len(which)), entries, size, everything)
        good = found.status < Status.INFEASIBLE
        parts = relaxation.by_constraint(found.shift.detach())
        if bool(good.any()):
            how = Shifts.of([_taken(part, good) for part in parts], relaxation.names)
            rows.notes.append((which[good], f"infeasible; solved as the closest feasible problem. {how}"))
        rows.shift = Shifts.of([spread(part, which, size) for part in parts], relaxation.names)

    def _relaxation(
        self, values: list[Tensor], which: Tensor
    ) -> tuple[Relaxation, Callable[[list[Tensor]], list[Tensor]]]:
        """The problem whose constraints may give way, and the entries of the parameters of these rows, as a function of all values."""

        def entries(values: list[Tensor]) -> list[Tensor]:
            part = [take_rows(v, which.to(v.device)) for v in values]
            thetas = self._thetas(part, torch.device("cpu"))
            return [reader.read(theta) for reader, theta in zip(self._canonical.parameters, thetas, strict=True)]

        return relaxed(self._declared), entries

    def _answer(
        self,
        rows: Rows,
        which: Tensor,
        relaxation: Relaxation,
        found: Closest,
        good: Tensor,  # of the rows that were found those that stand at `which`
        entries: Callable[[list[Tensor]], list[Tensor]],
        size: int,
        everything: bool,
    ) -> None:
        """Put the closest feasible problem's answer in the place of these rows'."""
        canonical, before = relaxation.canonical, rows.again

        def answered(outputs: list[Tensor], x: Tensor, y: Tensor, value: Tensor) -> list[Tensor]:
            x, y, value = (take_rows(part, good) for part in (x, y, value))
            theirs = [recovery.value(x, y) for recovery in canonical.variables]
            return put(outputs, which, [*theirs, canonical.objective(value)] if everything else theirs, size)

        rows.outputs = answered(rows.outputs, found.x, found.y, found.value)
        rows.again = lambda values: answered(before(values), *found.again(entries(values))[:3])
        for name in ("status", "iterations", "residual", "degenerate", "margin"):
            setattr(rows, name, getattr(rows, name).index_copy(0, which, getattr(found, name)[good]))
        if rows.blank is not None:
            rows.blank = rows.blank.index_fill(0, which.to(rows.blank.device), False)
        rows.iterate = None
        degenerate = found.degenerate[good]
        if bool(degenerate.any()):
            ruled = torch.zeros(size, dtype=torch.bool) if rows.ruled is None else rows.ruled
            rows.ruled = ruled.index_copy(0, which, degenerate)

    def _taken(self, given: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, ...]:
        """One value for each parameter, in order, as tensors where that is harmless."""
        if not named and all(isinstance(value, Tensor) for value in given):
            return given
        parameters = self._declared.parameters
        return arguments.tensors(parameters, arguments.ordered(parameters, given, named))

    def _check_tensors(self, tensors: Sequence[Any]) -> tuple[torch.dtype, torch.device, tuple[int, ...]]:
        """The outputs' dtype and device, and the batch shape."""
        parameters = self._declared.parameters
        batch = arguments.batch_shape(parameters, tensors)
        return *arguments.dtype_and_device(parameters, tensors), batch

    def _checked(
        self, values: list[Tensor], size: int, batch: tuple[int, ...], vouched: frozenset[int]
    ) -> tuple[Tensor | None, dict[int, str]]:
        """The bad rows, and why; ParameterError if that is the policy."""
        bad, details = self._bad_rows(values, size, vouched)
        if bad is not None and self.on_failure in ("raise", *CLOSEST):
            raise ParameterError.of(torch.where(bad, int(Status.BAD_INPUT), 0).view(batch), details)
        return bad, details

    def _bad_rows(
        self, values: list[Tensor], size: int, vouched: frozenset[int] = frozenset()
    ) -> tuple[Tensor | None, dict[int, str]]:
        """Rows whose parameters are NaN, infinite or outside their domain, None if there are none; the first reason for each.

        Of those `vouched` for, the kernel sees whether they are semidefinite.
        """
        found: list[tuple[Tensor, str]] = []
        with torch.no_grad(), few_threads(sum(value.numel() for value in values)):
            for k, (value, parameter) in enumerate(zip(values, self._declared.parameters, strict=True)):
                declared = self._domains[k]
                look = declared - {"PSD"} | {"symmetric"} if k in vouched else declared
                if domain.plainly_inside(look if self.validate else frozenset(), value):
                    continue
                flat = value.unsqueeze(-1).flatten(1)
                finite = torch.isfinite(flat).all(1)
                if not bool(finite.all()):
                    # As the right-hand side of an inequality infinity says that there is no bound.
                    limits = torch.from_numpy(self._canonical.limits[k]).to(value.device)
                    finite = (torch.isfinite(flat) | torch.isinf(flat) & limits).all(1)
                if not bool(finite.all()):
                    found.append((~finite, f"Parameter `{parameter.name()}` holds {_not_a_number(flat)}."))
                if declared and self.validate:
                    found += [(rows & finite, reason) for rows, reason in domain.violations(parameter, value)]
        if not found:
            return None, {}
        bad = torch.zeros(size, dtype=torch.bool)
        details: dict[int, str] = {}
        for rows, reason in found:
            rows = rows.cpu().expand(size)
            bad = bad | rows
            for k in torch.nonzero(rows).flatten().tolist():
                details.setdefault(k, reason)
        return bad, details

    def _start(self, warm_start: Solution | None, batch: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor] | None:
        if warm_start is None:
            return None
        if not isinstance(warm_start, Solution):
            raise TypeError(f"warm_start must be a Solution that this layer returned; got {type(warm_start).__name__}.")
        if tuple(warm_start.status.shape) != batch:
            raise ValueError(
                f"warm_start has batch shape {tuple(warm_start.status.shape)}; the parameters have {batch}."
            )
        sizes = (self._canonical.program.n, self._canonical.program.m)
        if warm_start.iterate is None:
            raise ValueError(
                "warm_start comes from a specialised path, which has no iterate of the cone program to start from."
            )
        if (warm_start.iterate[0].shape[1], warm_start.iterate[2].shape[1]) != sizes:
            raise ValueError("warm_start is the solution of another problem; pass one that this layer returned.")
        x, slack, y = (part.nan_to_num(0.0) for part in warm_start.iterate)
        return x, slack, y

    def _judge(self, rows: Rows, details: dict[int, str]) -> None:
        """Apply the failure policy: raise, or mark the rows that failed."""
        status, batch = rows.status, rows.batch
        failed = None
        if status is not None and bool(status.any()):
            which = torch.nonzero(status == Status.INACCURATE).flatten()
            if len(which):
                self._warn(AccuracyWarning(f"{rows_in_words(which, batch).capitalize()}: {Status.INACCURATE.advice}"))
            failed = status >= Status.INFEASIBLE
        if status is not None and failed is not None and bool(failed.any()):
            if self.on_failure in ("raise", *CLOSEST):
                infeasible = torch.nonzero(status == Status.INFEASIBLE).flatten().tolist()
                for row, conflict in conflicts(self, rows.leaves, batch, infeasible).items():
                    named = f"{rows_in_words(torch.tensor([row]), batch)}: {conflict}" if batch else str(conflict)
                    details[row] = f"{details[row]} {named}" if row in details else named
                raise SolverError.of(status.view(batch), details)
            rows.failed = failed.view(batch)
            assert rows.blank is not None
            rows.empty = rows.failed if self.on_failure == "nan" else rows.blank.view(batch)
        if not rows.warned and rows.degenerate is not None and bool(rows.degenerate.any()):
            rows.ruled = rows.degenerate
        if rows.ruled is not None:
            rows.cause = Cause.SINGULAR if rows.warned else STRUCTURES[self.structure].cause
        rows.warn = partial(self._warn_degenerate, batch)

    def _warn_degenerate(
        self, batch: tuple[int, ...], rows: Tensor, cause: Cause, parameters: Sequence[int] = ()
    ) -> None:
        message = f"{rows_in_words(rows, batch).capitalize()}: {cause.value}: {cause.advice}"
        if cause in (Cause.ONE_SIDED, Cause.SINGULAR, Cause.ILL_CONDITIONED):
            message += " Solution.degenerate tells which rows."
        elif cause is Cause.ZERO:
            names = [f"`{self._declared.parameters[k].name()}`" for k in parameters]
            message += f" Here: the gradient in {', '.join(names)}."
        self._warn(GradientWarning(message, cause), cause)

    def _warn(self, warning: Warning, cause: Hashable = None) -> None:
        """Once a layer and cause."""
        with _warning:
            if (type(warning), cause) in self._warned:
                return
            self._warned.add((type(warning), cause))
        tell(warning)


def _taken(part: Any, which: Tensor) -> Any:
    """Some rows of one constraint's shift."""
    return tuple(p[which] for p in part) if isinstance(part, tuple) else None if part is None else part[which]


@dataclass(frozen=True, eq=False)
class _How:
    """The options of a call."""

    solver_args: Mapping[str, Any] | None = None
    warm_start: Solution | None = None
    ids: Tensor | Sequence[Hashable] | None = None
    everything: bool = False  # the objective and a table of the rows too


def _keys(ids: Tensor | Sequence[Hashable], batch: tuple[int, ...]) -> list[Hashable]:
    keys = ids.flatten().tolist() if isinstance(ids, Tensor) else list(ids)
    if len(keys) != math.prod(batch):
        raise ValueError(
            f"`ids` names {len(keys)} samples; the batch {batch} has {math.prod(batch)}: one for each row."
        )
    return keys


def _told(rows: Tensor, status: Tensor, why: str, way: str) -> list[tuple[Tensor, str]]:
    """Notes of rows that went another way, by what came of them; status (R,) is theirs."""
    ends = {
        Status.INFEASIBLE: f"{why}; proved infeasible {way}",
        Status.UNBOUNDED: f"{why}; proved unbounded {way}",
        Status.UNATTAINED: f"{why}; their infimum found not to be attained {way}",
        Status.NOT_CONVERGED: f"{why}, nor {way}",
    }
    words = [ends.get(Status(kind), f"{why}; solved {way}") for kind in status.tolist()]
    return [(rows[[word == one for word in words]], one) for one in dict.fromkeys(words)]


def _notes(attempts: Sequence[Attempt], taken: Tensor, status: Tensor) -> list[tuple[Tensor, str]]:
    """Rows that were not settled by the first solver but by another."""
    first, notes = attempts[0].solver.name, []
    if bool(taken.any()):
        for name in dict.fromkeys(attempt.solver.name for attempt in attempts[1:]):
            mine = [place for place, attempt in enumerate(attempts) if place and attempt.solver.name == name]
            rows = torch.nonzero(torch.isin(taken, torch.tensor(mine))).flatten()
            if len(rows):
                why = "sharper" if name == first else f"not settled by {first}"
                notes += _told(rows, status[rows], why, f"by {name}")
    return notes


def _coarsest(values: Sequence[Tensor]) -> torch.dtype:
    """The dtype of least precision."""
    return max((v.dtype for v in values), key=domain.relative, default=torch.float64)


def _put_together(apart: Tensor, refuted: Tensor) -> list[tuple[Tensor, str]]:
    """Rows whose equalities were made to agree."""
    rows = torch.nonzero((apart > ROUNDING) & ~refuted).flatten()
    what = "equalities that depend on each other differed by rounding; solved with right-hand sides that agree"
    return [(rows, what)] if len(rows) else []


def _stopped(call: Call) -> dict[int, str]:
    """Why rows have not converged that were not given the time."""
    rows = [] if call.stopped is None else torch.nonzero(call.stopped & (call.status == Status.NOT_CONVERGED)).flatten().tolist()
    what = "The solver's time limit ended it before it had converged; it was not tried again, and its last point was not improved."
    return dict.fromkeys(rows, what)


def _in_words(apart: Tensor, refuted: Tensor, dtype: torch.dtype) -> dict[int, str]:
    """Why rows are infeasible whose equalities do not agree."""
    return {
        row: f"Constraints that depend on each other disagree by {apart[row]:.1g}, relative to their right-hand sides: more than "
        f"rounding in {str(dtype).removeprefix('torch.')} explains. If it is rounding all the same, say so by solver_args={{'tolerance': ...}}, or make "
        "them agree before the layer, as in b / b.sum() * a.sum()."
        for row in torch.nonzero(refuted).flatten().tolist()
    }


def _not_a_number(values: Tensor) -> str:
    if bool(torch.isnan(values).any()):
        return "NaN or infinity"
    return "infinity, which is `no bound` on the large side of an inequality and has no meaning elsewhere"


def _tolerance(options: dict[str, Any]) -> float:
    """Taken out of the options of a solver."""
    tolerance = options.pop("tolerance", TOLERANCE)
    if not isinstance(tolerance, (int, float)) or not 0 < tolerance < 1:
        raise ValueError(f"`tolerance` must be a number between 0 and 1; got {tolerance!r}.")
    return float(tolerance)


def _proximal_weight(weight: Any, gp: bool) -> float:
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
        raise ValueError(f"`regularise` must be a positive number or 'least_norm'; got {weight!r}.")
    if gp:
        raise ValueError(
            "`regularise` adds a square to the objective, which a log-log convex problem (gp=True) cannot have."
        )
    return float(weight)


def _solver(solver: str | ConeSolver | None) -> ConeSolver:
    if solver is None:
        return SOLVERS[DEFAULT]
    if isinstance(solver, ConeSolver):
        return solver
    if isinstance(solver, str) and solver.lower() in SOLVERS:
        return SOLVERS[solver.lower()]
    raise ValueError(f"`solver` must be one of {', '.join(map(repr, SOLVERS))}, or a convlayer.Solver; got {solver!r}.")


def _one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}; got {value!r}.")
