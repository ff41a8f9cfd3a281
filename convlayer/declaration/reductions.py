"""CVXPY's reductions of a problem to a parametrised cone program, and the way back through them.

All that is CVXPY's own about it stands here, so that our maps can be read off by probing: what a
parameter becomes, which variables a primal point x gives, which multipliers a dual point y.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import cvxpy as cp
import numpy as np
import scipy.sparse as sp

from convlayer.declaration.coefficients import Coefficients, read
from convlayer.declaration.cvxpy_internals import (
    CLARABEL,
    Atom,
    Canonicalization,
    CoeffExtractor,
    ConeMatrixStuffing,
    CvxAttr2Constr,
    Dgp2Dcp,
    Equality,
    Inequality,
    InverseData,
    PowConeND,
    SolverInverseData,
    build_solving_chain,
    get_canon_backend,
    lower_equality,
    lower_ineq_to_nonneg,
    lower_value,
    make_problem_form,
)
from convlayer.declaration.diagnose import ProblemError
from convlayer.declaration.graph import Contents, arguments, rewritten
from convlayer.declaration.spelling import short


class CanonicalisationError(RuntimeError):
    """The installed CVXPY canonicalises in a way that our map does not reproduce."""


class _StandardForm(CLARABEL):
    """The cone program we ask CVXPY for: quadratic objective, all six cones, psd by its upper
    triangle, values not applied."""

    SUPPORTED_CONSTRAINTS = [
        cone for cone in CLARABEL.SUPPORTED_CONSTRAINTS if cone is not PowConeND
    ]

    def apply(self, problem):
        problem, data, inverse_data = self._prepare_data_and_inv_data(problem)
        inverse_data[cp.settings.OFFSET] = 0.0
        return data, inverse_data


class Reductions:
    """The chain that CVXPY would send a problem through: made, then applied."""

    def __init__(self, problem: cp.Problem, gp: bool) -> None:
        # A Problem of its own: what CVXPY remembers of its chain is not left with the user's.
        self._problem = cp.Problem(problem.objective, problem.constraints)
        with _in_the_users_terms():
            form = make_problem_form(self._problem, gp, False)
            self._chain = build_solving_chain(
                self._problem, _StandardForm(), form, gp, enforce_dpp=True
            )

    @property
    def steps(self) -> list[Any]:
        """From the first to the last."""
        return self._chain.reductions

    def apply(self) -> Reduced:
        """ProblemError: an atom that CVXPY cannot turn into cones."""
        problem: Any = self._problem
        inverses = []
        with _in_the_users_terms():
            for step in self.steps:
                if isinstance(step, ConeMatrixStuffing):
                    parametrised, values = problem, _drawn(problem.parameters())
                    problem, inverse = step.apply(_with_values(problem, values))
                    stuffed, backend = problem, step.canon_backend
                else:
                    problem, inverse = step.apply(problem)
                inverses.append(inverse)
        inverses[-1] = SolverInverseData(inverses[-1], self._chain.solver, {})
        cone_program = problem[cp.settings.PARAM_PROB]
        if (
            getattr(cone_program, "dir_cones", None)
            or cone_program.lower_bounds is not None
            or cone_program.upper_bounds is not None
        ):
            raise CanonicalisationError(
                "CVXPY left bounds or cones outside the constraint matrix; "
                "this version is not supported."
            )
        return Reduced(
            parametrised,
            values,
            cone_program,
            _formatting(stuffed),
            backend,
            list(zip(self.steps, inverses, strict=True)),
        )


def _drawn(parameters: Sequence[cp.Parameter]) -> dict[cp.Parameter, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        parameter: random.standard_normal(parameter.size).reshape(parameter.shape, order="F")
        for parameter in parameters
    }


def _with_values(problem: cp.Problem, values: dict[cp.Parameter, np.ndarray]) -> cp.Problem:
    """The problem with constants in the places of its parameters; constraints keep their
    numbers."""

    def constant(part: Any, _: list[Any]) -> Any:
        return cp.Constant(values[part]) if isinstance(part, cp.Parameter) else None

    contents, objective = Contents(), problem.objective.expr
    roots = [objective, *(inner for c in problem.constraints for inner in arguments(c))]
    new = rewritten(roots, constant, contents.parameters)
    constraints = []
    for constraint in problem.constraints:
        inner = [new.get(id(argument), argument) for argument in constraint.args]
        moved = any(now is not was for now, was in zip(inner, constraint.args, strict=True))
        valued = type(constraint)(*inner, *constraint.get_data()) if moved else constraint
        if valued.id != constraint.id:
            raise CanonicalisationError(
                "CVXPY's constraints are not copied as they were; this version is not supported."
            )
        constraints.append(valued)
    return cp.Problem(cp.Minimize(new.get(id(objective), objective)), constraints)


def _formatting(stuffed: Any) -> tuple[np.ndarray, np.ndarray]:
    """Where CVXPY's formatting puts each row of the constraints' arguments, and with which sign:
    read off rows that hold their numbers."""
    n = stuffed.x.size
    rows = stuffed.A.shape[0] // (n + 1)
    number = np.arange(rows, dtype=np.int64)
    labelled = copy(stuffed)
    labelled.A = sp.csc_array(
        (number + 1.0, (rows * n + number, np.zeros_like(number))), shape=(rows * (n + 1), 1)
    )
    formatted = _StandardForm.format_constraints(labelled, _StandardForm.EXP_CONE_ORDER)
    found = sp.coo_array(formatted.A)
    source, place = np.abs(found.data).astype(np.int64) - 1, found.row.astype(np.int64) - rows * n
    for order in (source, place):
        if not np.array_equal(np.sort(order), number):
            raise CanonicalisationError(
                "CVXPY formats cones by more than an order; this version is not supported."
            )
    back = np.argsort(source)
    return place[back], np.sign(found.data[back])


@dataclass(frozen=True, eq=False)
class Reduced:
    """A problem that has been reduced."""

    parametrised: cp.Problem  # a quadratic objective, cones of affine arguments, and parameters
    # of the parameters, for which the cone program was made
    values: dict[cp.Parameter, np.ndarray]
    cone_program: Any  # CVXPY's, at these values
    # Of each row of its constraints' arguments, the row of its cones, and the sign with which.
    formatting: tuple[np.ndarray, np.ndarray]
    backend: Any  # by which CVXPY makes its matrices
    steps: list[tuple[Any, Any]]  # each reduction, and what it kept for the way back

    def coefficients(self) -> Coefficients:
        """Of the parametrised problem, its constraints in the cone program's order."""
        constraints = {c.id: _lowered(c) for c in self.parametrised.constraints}
        return read(
            self.parametrised.objective.expr,
            [constraints[c.id] for c in self.cone_program.constraints],
            self.cone_program.variables,
            list(self.values),
            lambda: self._tensors,
        )

    @cached_property
    def _tensors(self) -> CoeffExtractor:
        """CVXPY's own matrices, dense in variables and parameter entries."""
        problem = self.parametrised
        return CoeffExtractor(InverseData(problem), get_canon_backend(problem, self.backend))

    def parameters(self, users: Sequence[cp.Parameter]) -> list[tuple[cp.Parameter, cp.Parameter]]:
        """For each of the user's: (it or its logarithm, the reduced one that stands in the cone
        program)."""
        logarithms: dict = {}
        lowered: dict = {}
        for reduction, _ in self.steps:
            if isinstance(reduction, Dgp2Dcp):
                logarithms = reduction.canon_methods._parameters
            elif isinstance(reduction, CvxAttr2Constr):
                lowered.update({p.id: q for p, q in reduction._parameters.items()})
        entering = [logarithms.get(p, p) for p in users]
        return [(p, lowered.get(p.id, p)) for p in entering]

    def primal(self, x: np.ndarray) -> dict[int, np.ndarray]:
        """By id, the user's variables (their logarithms in a log-log program), without
        projecting."""
        values = self.cone_program.split_solution(x)
        for reduction, _ in reversed(self.steps):
            if isinstance(reduction, Dgp2Dcp):
                variables = reduction.canon_methods._variables
                origin = {new.id: old.id for old, new in variables.items()}
                values = {origin.get(key, key): value for key, value in values.items()}
            else:
                values = reduction.var_forward(values)
        return {key: _dense(value) for key, value in values.items()}

    def dual(self, y: np.ndarray, constraint: Any) -> dict[int, np.ndarray]:
        """By id, the dual variables of one of the user's constraints, whose own values stay as they
        are."""
        x = np.zeros(self.cone_program.x.size)
        solution = SimpleNamespace(
            status="Solved", x=x, z=y, obj_val=0.0, solve_time=0.0, iterations=0
        )
        for reduction, inverse in reversed(self.steps):
            if isinstance(reduction, Dgp2Dcp):
                solution = Canonicalization.invert(reduction, solution, inverse)
            else:
                solution = reduction.invert(solution, inverse)
        if constraint.id not in solution.dual_vars:
            raise ValueError(f"CVXPY gives no dual variable for constraint `{short(constraint)}`.")
        # CVXPY shapes multipliers only where it saves them.
        before = [dual.value for dual in constraint.dual_variables]
        constraint.save_dual_value(solution.dual_vars[constraint.id])
        values = {dual.id: _dense(dual.value) for dual in constraint.dual_variables}
        for dual, value in zip(constraint.dual_variables, before, strict=True):
            dual.save_value(value)
        return values


def _lowered(constraint: Any) -> Any:
    """As CVXPY stacks it."""
    if isinstance(constraint, Equality):
        return lower_equality(constraint)
    if isinstance(constraint, Inequality):
        return lower_ineq_to_nonneg(constraint)
    if isinstance(constraint, cp.SOC) and constraint.axis == 1:
        t, X = constraint.args
        return cp.SOC(t, X.T, axis=0)
    return constraint


def positions(parameter: cp.Parameter, reduced: cp.Parameter) -> np.ndarray:
    """The row-major positions in a parameter of the entries that stand in the cone program, in
    CVXPY's order."""
    places = np.arange(parameter.size).reshape(parameter.shape)
    read = places if reduced is parameter else np.asarray(lower_value(parameter, places))
    return read.flatten(order="F").astype(np.int64)


def _dense(value: Any) -> np.ndarray:
    return value.toarray() if sp.issparse(value) else np.asarray(value)


@contextmanager
def _in_the_users_terms() -> Iterator[None]:
    try:
        yield
    except RecursionError:
        raise
    except Exception as error:
        raise _not_canonicalised(error) from error


def _not_canonicalised(error: Exception) -> ProblemError:
    """What CVXPY could not turn into cones, in the user's terms: the innermost atom that it was at
    when the error was raised."""
    atoms = []
    for frame, _ in traceback.walk_tb(error.__traceback__):
        atom = frame.f_locals.get("expr")
        if isinstance(atom, Atom) and frame.f_code.co_name.startswith("canonicalize"):
            atoms.append(atom)
    if isinstance(error, NotImplementedError):
        reason = "it has an atom inside another that takes no such argument"
    else:
        reason = f"its own code fails with {type(error).__name__}: {error}".rstrip(".")
    if not atoms:
        return ProblemError(f"CVXPY cannot canonicalise this problem: {reason}.")
    atom = short(atoms[-1])
    return ProblemError(f"CVXPY cannot canonicalise `{atom}`: {reason}. Write it with other atoms.")
