"""The front door: a CVXPY problem as a torch module."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from typing import Any

import cvxpy as cp
import torch
from torch import Tensor

from convlayer.autodiff import compiled
from convlayer.autodiff.torch_internals import made_at_home
from convlayer.declaration.canonical import Canonical
from convlayer.declaration.declaration import Declaration, with_proximal_term
from convlayer.display import Words
from convlayer.notices import OnceEach
from convlayer.paths.choice import Choice, choose
from convlayer.paths.front import Call, Front
from convlayer.paths.gradients import Gradient
from convlayer.paths.policy import check_policy
from convlayer.paths.settings import Settings
from convlayer.paths.short import ShortWay
from convlayer.paths.starts import Starts
from convlayer.report.check import Check
from convlayer.report.examine import checked
from convlayer.report.explain import described, explained
from convlayer.report.verification import Verification, verified
from convlayer.solution import Solution
from convlayer.solvers import ConeSolver


class ConvexLayer(torch.nn.Module):
    """A parametrised convex problem as a differentiable layer.

        x*(theta) = argmin over x of f(x, theta) subject to the constraints of `problem`

    Solution:    by the kernel of the structure that the problem has, whatever its spelling,
                 batched, on the parameters' own device; where it has none, canonicalised once to a
                 cone program, solved by the cheapest solver and polished to rounding error.
    Derivative:  the implicit function theorem with the forward's own factor, exact, to second
                 order, in reverse and forward mode; one-sided or least-norm, and flagged, where
                 there is none. See `gradient` for what else there is then.
    Shapes:      each parameter (*batch, *its shape) or (*its shape), shared by the batch, its
                 gradient then the sum over rows; variables (*batch, *their shape). Any number of
                 batch dimensions, which broadcast against each other.
    dtype:       outputs have the parameters' dtype and device; kernels compute in float32 only
                 where that loses nothing, the cone program in float64.
    torch:       torch.func and vmap, torch.compile(fullgraph=True), copies and pickles (of the
                 declaration), several threads at once.
    Bounds:      those on single variables hold exactly; an infinite one is none. Equalities that
                 depend on each other may differ by the parameters' own rounding.
    More:        docs/layers.md, on each argument.

    Arguments:
        problem:     a DPP problem (DGP with gp=True).
        parameters:  all its parameters, in the order in which tensors will be given.
        variables:   variables of the problem, or dual variables of its constraints
                     (constraint.dual_variables[0]), to return.
        structure:   "auto": the most special structure that matches, if it is cheaper than the cone
                     program; "generic": the cone program; or a structure's name: that one, or a
                     ProblemError that says why it does not apply.
        solver:      for the cone program: None, the cheapest at each batch, with Clarabel behind it
                     for rows that it does not settle; or by name "clarabel", "daqp",
                     "interior_point", "scs", or a convlayer.Solver of your own, and that one alone.
        solver_args: `tolerance` (KKT residual, each entry relative to its own terms, default 1e-8)
                     and the solver's own options; unknown ones are an error.
        gp:          the problem is log-log convex.
        gradient:    how solutions are differentiated: "exact"; where that is zero or jumps
                     "smoothed", "lpgd" and, for linear objectives, "perturbed" and "blackbox" (see
                     convlayer.paths.gradients).
        gradient_args: of that gradient: kappa; tau and rho; sigma, samples and seed; lam.
        regularise:  what makes a solution unique: the weight rho of a term rho/2 |x|^2 over all
                     variables, part of the objective; or "least_norm", for linear and quadratic
                     programs: of all solutions the one of least norm.
        on_failure:  "raise" a SolverError that names the rows; "nan" fills just those rows; "keep"
                     returns the last iterate, flagged; "closest": an infeasible row is solved with
                     its constraints shifted by as little as possible, and Solution.shift says by
                     how much; "closest_few": the same with few of them shifted. A failed row that a
                     loss uses has NaN for its gradient; see `solve` for training.
        validate:    check the declared domains of the parameters (sign, symmetry, PSD, bounds) at
                     every call.
        executor:    a concurrent.futures.Executor for rows that compiled code does not settle:
                     processes, a dask cluster's; by default one thread a core. It is not copied.
        squeeze:     a call returns the only variable itself, not a tuple of one.
        verbose:     rows that take long are shown as they are done; see convlayer.progress.

    Errors: ProblemError (a ValueError) at construction; at a call TypeError and ValueError for what
    no row can use, ParameterError and SolverError for rows.
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
        verbose: bool = False,
    ) -> None:
        """See the class."""
        super().__init__()
        settings = Settings.of(
            structure, solver, solver_args, gradient, gradient_args, regularise, gp
        )
        if isinstance(settings.regularise, float):
            problem = with_proximal_term(problem, settings.regularise)
        if squeeze and len(variables) != 1:
            raise ValueError(f"squeeze=True is for one variable; {len(variables)} are returned.")
        self.on_failure, self.validate, self.executor = on_failure, validate, executor
        self.squeeze, self.verbose = squeeze, verbose
        self._settle(Declaration.checked(problem, parameters, variables, gp), settings)
        check_policy(on_failure, lambda: self._canonical)
        self._fresh()

    @made_at_home
    def _settle(self, declared: Declaration, settings: Settings) -> None:
        """Choose the path, and check that the options are of that path."""
        choice = choose(declared, settings)
        if choice.kernel is None:
            settings.solving.check(choice.declared.canonical)
            settings.gradient.check(choice.declared.canonical)
        self._take(choice, settings)

    def _take(self, choice: Choice, settings: Settings) -> None:
        self._choice, self._settings, self.structure = choice, settings, choice.structure
        self._short = ShortWay.of(choice, settings)

    def _fresh(self) -> None:
        """What a layer does not share with its copies."""
        self._told = OnceEach()
        self._starts = Starts()
        self._names: dict[Any, str] = {}  # in graphs, by options that may change
        self._number = compiled.registered(self)

    @property
    def _front(self) -> Front:
        """The layer as a call sees it; some of its attributes may be set at any time."""
        options = self.on_failure, self.validate, self.verbose, self.executor
        own = self._short, self._starts, self._told, self._names
        return Front(self._choice, self._settings, *options, *own)

    @property
    def _declared(self) -> Declaration:
        return self._choice.declared

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
        """The optimal variables for these parameter values, in the order of `variables`.

        tensors: one for each parameter, in the order of `parameters`; numpy arrays will do, and
             numbers for scalars. Or by name, layer(price=p), or as a dictionary by the CVXPY
             objects, layer({price: p}).
        ids: one for each row of the batch; a sample that was seen before starts where it ended
             then, kernels start cold. The last solutions are kept (`forget` drops them).
        """
        given = self._front.given(tensors, named)
        if torch.compiler.is_compiling():
            if solver_args is not None or not (ids is None or isinstance(ids, Tensor)) or not given:
                raise TypeError(compiled.PLAIN_IN_GRAPHS)
            name = compiled.name(self._number, self.on_failure, self.validate)
            outputs = compiled.outputs(given, ids, name)
        elif torch.jit.is_tracing():
            raise RuntimeError(compiled.NO_SCRIPT)
        else:
            outputs = self._front.run(given, Call(solver_args, ids=ids))[0]
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

        warm_start: a Solution of the same batch shape, to start from; it takes the cone program.
                    SCS starts there itself; for the others Newton's method starts there, and rows
                    that it does not settle start cold.
        ids:        as in a call of the layer.

        Training where rows may fail (on_failure="nan"): take the rows that have a solution before
        anything is computed of them,

            solution = layer.solve(net(inputs))
            (x,), solved = solution.variables, solution.solved
            loss = (x[solved] - target[solved]).square().mean()

        as nanmean and where compute on NaN first, and the gradient of that is NaN.
        """
        call = Call(solver_args, warm_start, ids, everything=True)
        return self._front.solution(self._front.given(tensors, named), call)

    def forget(self) -> None:
        """Drop the solutions kept by `ids`."""
        self._starts.clear()

    @made_at_home
    def verify(
        self, *tensors: Any, seed: int = 0, against: str | None = None, **named: Any
    ) -> Verification:
        """Solve again another way, and compare values, feasibility and gradients, row by row.

        A kernel is compared with the cone program by Clarabel, the cone program with itself by a
        solver that has no part in the layer's answer; where there is none, the result says so. With
        against="diffcp" either is compared with CVXPY and diffcp, which share no code with it and
        go row by row; the problem's parameters are then given the rows' values. diffcp's derivative
        of power cones is wrong: gradients are not compared there. The gradients are those of one
        random linear functional of the variables, drawn from `seed`. Nothing is raised: look at
        `.agrees`, or print it. Rows whose constraints contradict each other by rounding alone agree
        to that rounding.
        """
        front, mine = self._front, self.with_options(on_failure="nan")
        by_solver = partial(_solve_by, mine)
        return verified(front, front.given(tensors, named), mine.solve, by_solver, seed, against)

    @made_at_home
    def check(self, *tensors: Any, **named: Any) -> Check:
        """How far each row is from where the solution map is not differentiable, or not well: by
        constraint, as tensors; print it for words.

        It solves the rows as a cone program, whatever the layer's path, and raises nothing for rows
        that fail. Meant for a look, not for training: the active system's eigenvalues are worked
        out.
        """
        front, kernel = self._front, self._choice.kernel
        given = front.given(tensors, named)
        # Of multipliers that are not unique the central ones: an extreme one looks weakly active.
        solver = None if self._settings.solving.alone else "clarabel"
        solve = self._on_cone_program().with_options(on_failure="keep", solver=solver).solve
        values = front.values(given, front.shapes(given)[2])
        gap = None if kernel is None else kernel.gap
        return checked(self._declared, values, partial(solve, *given), gap)

    @made_at_home
    def explain(self, batch: int = 1) -> str:
        """Which path runs and why, why the others do not, the sizes, and what a forward and a
        backward cost."""
        return Words(explained(self._choice, self._settings, self.executor is not None, batch))

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
        verbose: bool | None = None,
    ) -> ConvexLayer:
        """A layer of the same problem, sharing its canonical form, with some of the constructor's
        options changed.

        `solver_args` are added to those the layer has; with another `solver` only `tolerance` is
        kept. `gradient_args` alone are of the gradient that the layer has.
        """
        before = self._settings
        settings = before.changed(structure, solver, solver_args, gradient, gradient_args)
        sibling = self._copy()
        if structure is not None or settings.gradient != before.gradient:
            sibling._settle(self._declared, settings)
        elif solver is not None or solver_args is not None:
            alone = settings.solving.alone
            choice = self._choice.cone_program(settings) if alone else self._choice
            if choice.kernel is None:
                settings.solving.check(self._canonical)
            sibling._take(choice, settings)
        if on_failure is not None:
            check_policy(on_failure, lambda: self._canonical)
            sibling.on_failure = on_failure
        changed = {"validate": validate, "executor": executor, "verbose": verbose}
        for name, value in changed.items():
            if value is not None:
                setattr(sibling, name, value)
        return sibling

    def _copy(self) -> ConvexLayer:
        sibling = object.__new__(type(self))
        sibling.__dict__.update(self.__dict__)
        # The hooks and submodules of a module stand in dictionaries, which a shallow copy would
        # share.
        own = ((name, part) for name, part in self.__dict__.items() if isinstance(part, dict))
        sibling.__dict__.update((name, copy.copy(part)) for name, part in own)
        sibling._fresh()
        return sibling

    def _on_cone_program(self) -> ConvexLayer:
        sibling, settings = self._copy(), replace(self._settings, structure="generic")
        sibling._take(self._choice.cone_program(self._settings), settings)
        return sibling

    def __getstate__(self) -> dict[str, Any]:
        """The declaration and the options: the rest is made from them anew."""
        made = ("_choice", "_told", "_starts", "_names", "_number", "_short")
        kept = {name: part for name, part in self.__dict__.items() if name not in made}
        return {**kept, "executor": None, "_declaration": self._declared}

    @made_at_home
    def __setstate__(self, state: dict[str, Any]) -> None:
        declared = state.pop("_declaration")
        super().__setstate__(state)
        self._take(choose(declared, self._settings), self._settings)
        self._fresh()

    def __prepare_scriptable__(self) -> None:
        """What torch.jit.script asks first."""
        raise RuntimeError(compiled.NO_SCRIPT)

    def extra_repr(self) -> str:
        return f"{described(self._choice, self._settings)}, on_failure={self.on_failure}"


def _solve_by(layer: ConvexLayer, solver: str) -> Callable[..., Solution]:
    return layer.with_options(solver=solver).solve
