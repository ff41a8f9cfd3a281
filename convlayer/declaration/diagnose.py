"""Refusals at construction: what cannot be a layer, which sub-expression is at fault, and what to
write instead."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import cvxpy as cp

from convlayer.declaration.blame import DCP, DGP, Fault, faults
from convlayer.declaration.remedies import remedy
from convlayer.declaration.spelling import spelled


class ProblemError(ValueError):
    """The problem cannot be a layer; the message names the sub-expression and the remedy."""


@contextmanager
def within_recursion_limit() -> Iterator[None]:
    """CVXPY walks expressions by recursion: ProblemError for one that is deeper than Python
    follows."""
    try:
        yield
    except RecursionError:
        raise ProblemError(
            "An expression of the problem has more operations within each other than CVXPY can follow (Python's recursion limit is "
            f"{sys.getrecursionlimit()}). Give what is computed step by step a variable of its own, as in x[t + 1] == A @ x[t] + B @ u[t], "
            "or raise the limit by sys.setrecursionlimit."
        ) from None


def check_arguments(
    problem: cp.Problem, parameters: Sequence[cp.Parameter], variables: Sequence[cp.Variable]
) -> dict[int, Any]:
    """Parameters and variables must be the problem's own. Returns dual variable id -> the
    constraint it belongs to."""
    if not isinstance(problem, cp.Problem):
        raise TypeError(f"`problem` must be a cvxpy.Problem; got {type(problem).__name__}.")
    _check_lists(parameters, variables)
    if not problem.variables():
        raise ProblemError("The problem has no variables: there is nothing to solve for.")
    if not variables:
        raise ProblemError(
            "`variables` is empty: name at least one variable whose solution the layer returns."
        )
    _check_parameters(problem, parameters)

    owners = {
        dual.id: constraint
        for constraint in problem.constraints
        for dual in constraint.dual_variables
    }
    primal = {v.id for v in problem.variables()}
    strangers = [v.name() for v in variables if v.id not in primal and v.id not in owners]
    if strangers:
        raise ProblemError(
            f"`variables` holds {_quote(strangers)}, which is neither a variable of the problem nor a dual variable of one of its "
            "constraints (constraint.dual_variables[0])."
        )
    return owners


def _check_lists(parameters: Any, variables: Any) -> None:
    """Lists of leaves of the right kind."""
    for name, given, kind in (
        ("parameters", parameters, cp.Parameter),
        ("variables", variables, cp.Variable),
    ):
        if not isinstance(given, (list, tuple)):
            raise TypeError(
                f"`{name}` must be a list or tuple of cvxpy.{kind.__name__}; got {type(given).__name__}."
            )
        for item in given:
            if isinstance(item, cp.constraints.constraint.Constraint):
                raise TypeError(
                    f"`variables` holds the constraint `{spelled(item)}`; write constraint.dual_variables[0] for its dual variable."
                )
            if not isinstance(item, kind):
                raise TypeError(
                    f"`{name}` holds {item!r} of type {type(item).__name__}; expected cvxpy.{kind.__name__}."
                )


def _check_parameters(problem: cp.Problem, parameters: Sequence[cp.Parameter]) -> None:
    """All of the problem's, each once, and no others."""
    own = {p.id: p for p in problem.parameters()}
    given_ids = [p.id for p in parameters]
    missing = [p.name() for key, p in own.items() if key not in given_ids]
    for key, parameter in own.items():
        if isinstance(parameter, cp.CallbackParam) and key not in given_ids:
            name, shape = parameter.name(), tuple(parameter.shape)
            raise ProblemError(
                f"`{name}` is a CallbackParam: its value comes from a Python function of other Parameters, through which no gradient passes. "
                f"Put {name} = cp.Parameter({shape}, name={name!r}) in its place, compute the same product in torch before the layer, and list "
                f"`{name}` in `parameters`."
            )
    foreign = [p.name() for p in parameters if p.id not in own]
    twice = sorted({p.name() for p in parameters if given_ids.count(p.id) > 1})
    if missing:
        raise ProblemError(
            f"`parameters` lacks {_quote(missing)}, which the problem uses. List every Parameter of the problem."
        )
    if foreign:
        raise ProblemError(
            f"`parameters` holds {_quote(foreign)}, which the problem does not use. Remove it, or check that the problem "
            "was built with this very Parameter object."
        )
    if twice:
        raise ProblemError(f"`parameters` holds {_quote(twice)} more than once.")


def check_attributes(problem: cp.Problem) -> None:
    """Refuse attributes that were set on a variable or a parameter after it was made: CVXPY reads
    them then, and drops these."""
    for leaf in (*problem.variables(), *problem.parameters()):
        kind = "Variable" if isinstance(leaf, cp.Variable) else "Parameter"
        late = [name for name in leaf.attributes if name != "bounds" and name in vars(leaf)]
        if leaf.bounds is not leaf.attributes["bounds"]:
            late.append("bounds")
        if late:
            name = late[0]
            raise ProblemError(
                f"`{name}` of {kind} `{leaf.name()}` was set after it was made, where CVXPY drops it without a word. Give it at once, as in "
                f"{kind}({tuple(leaf.shape)}, {name}=...), or write constraints."
            )


def check_convexity(problem: cp.Problem, gp: bool) -> None:
    """Refuse what is not a parametrised convex problem, naming the first sub-expression at
    fault."""
    for variable in problem.variables():
        if variable.attributes["boolean"] or variable.attributes["integer"]:
            raise ProblemError(
                f"Variable `{variable.name()}` is integer or boolean: the solution is piecewise constant in the parameters and has "
                "no useful derivative. Relax it, for instance to Variable(..., bounds=[0, 1])."
            )
    for leaf in (*problem.variables(), *problem.parameters()):
        if leaf.is_complex():
            raise ProblemError(
                f"`{leaf.name()}` is complex; write its real and imaginary parts as two real ones."
            )
    for k, constraint in enumerate(problem.constraints):
        if isinstance(constraint, cp.FiniteSet):
            raise ProblemError(
                f"constraints[{k}], `{spelled(constraint)}`, is a choice from a finite set: the solution is piecewise constant in the parameters and has "
                "no useful derivative. Relax it to the interval between the least and the greatest value."
            )
        alpha = getattr(constraint, "alpha", None)
        if isinstance(alpha, cp.Expression) and alpha.parameters():
            raise ProblemError(
                f"In constraints[{k}] the exponent of a power cone is a Parameter: the cone itself would change. "
                "Make the exponent a constant, one layer for each value."
            )

    if gp:
        if problem.is_dgp(dpp=True):  # type: ignore[call-arg]
            return
        if problem.is_dgp():
            raise ProblemError(
                f"The problem is log-log convex but not DPP: {_located(problem, DGP, dpp=True)}"
            )
        raise ProblemError(
            f"The problem is not log-log convex (DGP): {_located(problem, DGP, dpp=False)}"
        )
    if problem.is_dpp("dcp", quad_form_dpp="qp"):  # type: ignore[call-arg]
        return
    if problem.is_dcp():
        raise ProblemError(f"The problem is not DPP: {_located(problem, DCP, dpp=True)}")
    if problem.is_dgp():
        raise ProblemError(
            "The problem is not convex as written (DCP), but it is log-log convex: pass gp=True."
        )
    otherwise = (
        "it is quasiconvex (DQCP), which is solved by bisection, and its solution is not differentiable by a cone program: "
        if problem.is_dqcp()
        else ""
    )
    raise ProblemError(
        f"The problem is not convex (DCP): {_located(problem, DCP, False, otherwise)}"
    )


def _quote(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _located(problem: cp.Problem, rules: str, dpp: bool, otherwise: str = "") -> str:
    """Where, what and what to write instead, of the first part at fault; `otherwise` goes before
    words that are of rules in general."""
    for fault in faults(problem, rules, dpp):
        if not isinstance(fault, Fault):
            place, item = fault
            return f"in {place}, `{spelled(item)}`: CVXPY refuses it as a whole{_rule(item)}."
        with fault.scope():
            said, of_this_case = remedy(fault)
        return f"{'' if of_this_case else otherwise}in {fault.place}, {said}"
    return "CVXPY refuses the problem as a whole; see problem.is_dcp(dpp=True)."


def _rule(item: Any) -> str:
    if isinstance(item, (cp.Minimize, cp.Maximize)):
        return ""
    return ": an inequality needs convex <= concave, an equality affine == affine, a cone affine arguments"
