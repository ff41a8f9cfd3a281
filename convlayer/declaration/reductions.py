"""CVXPY's reductions of a problem to a parametrised cone program, and the way back through them.

All that is CVXPY's own about it stands here, so that our maps can be read off by probing: what a
parameter becomes, which variables a primal point x gives, which multipliers a dual point y.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import cvxpy as cp
import numpy as np
import scipy.sparse as sp

from convlayer.declaration.cvxpy_internals import (
    CLARABEL,
    Atom,
    Canonicalization,
    CvxAttr2Constr,
    Dgp2Dcp,
    PowConeND,
    SolverInverseData,
    build_solving_chain,
    lower_value,
    make_problem_form,
)
from convlayer.declaration.diagnose import ProblemError
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
        with _in_the_users_terms():
            data, inverse = self._chain.apply(self._problem)
        inverse[-1] = SolverInverseData(inverse[-1], self._chain.solver, {})
        cone_program = data[cp.settings.PARAM_PROB]
        if (
            getattr(cone_program, "dir_cones", None)
            or cone_program.lower_bounds is not None
            or cone_program.upper_bounds is not None
        ):
            raise CanonicalisationError(
                "CVXPY left bounds or cones outside the constraint matrix; "
                "this version is not supported."
            )
        return Reduced(cone_program, list(zip(self.steps, inverse, strict=True)))


@dataclass(frozen=True, eq=False)
class Reduced:
    """A problem that has been reduced."""

    cone_program: Any  # CVXPY's, its matrices affine in the parameters
    steps: list[tuple[Any, Any]]  # each reduction, and what it kept for the way back

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
