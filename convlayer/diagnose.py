"""Refusals at construction: what cannot be a layer, which sub-expression is at fault, and what to write instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import cvxpy as cp
from cvxpy.atoms.affine.binary_operators import DivExpression, MulExpression, multiply
from cvxpy.utilities import scopes

RULES = {
    "dcp": "an inequality needs convex <= concave, an equality affine == affine, a cone affine arguments.",
    "log_log": "an inequality needs log-log convex <= log-log concave, an equality monomials on both sides.",
}


class ProblemError(ValueError):
    """The problem cannot be a layer; the message names the sub-expression and the remedy."""


def check_arguments(
    problem: cp.Problem, parameters: Sequence[cp.Parameter], variables: Sequence[cp.Variable]
) -> dict[int, Any]:
    """Parameters and variables must be the problem's own. Returns dual variable id -> the constraint it belongs to."""
    if not isinstance(problem, cp.Problem):
        raise TypeError(f"`problem` must be a cvxpy.Problem; got {type(problem).__name__}.")
    for name, given, kind in (("parameters", parameters, cp.Parameter), ("variables", variables, cp.Variable)):
        if not isinstance(given, (list, tuple)):
            raise TypeError(f"`{name}` must be a list or tuple of cvxpy.{kind.__name__}; got {type(given).__name__}.")
        for item in given:
            if isinstance(item, cp.constraints.constraint.Constraint):
                raise TypeError(
                    f"`variables` holds the constraint `{item}`; write constraint.dual_variables[0] for its dual variable."
                )
            if not isinstance(item, kind):
                raise TypeError(
                    f"`{name}` holds {item!r} of type {type(item).__name__}; expected cvxpy.{kind.__name__}."
                )
    if not problem.variables():
        raise ProblemError("The problem has no variables: there is nothing to solve for.")
    if not variables:
        raise ProblemError("`variables` is empty: name at least one variable whose solution the layer returns.")

    own = {p.id: p for p in problem.parameters()}
    given_ids = [p.id for p in parameters]
    missing = [p.name() for key, p in own.items() if key not in given_ids]
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

    owners = {dual.id: constraint for constraint in problem.constraints for dual in constraint.dual_variables}
    primal = {v.id for v in problem.variables()}
    strangers = [v.name() for v in variables if v.id not in primal and v.id not in owners]
    if strangers:
        raise ProblemError(
            f"`variables` holds {_quote(strangers)}, which is neither a variable of the problem nor a dual variable of one of its "
            "constraints (constraint.dual_variables[0])."
        )
    return owners


def check_convexity(problem: cp.Problem, gp: bool) -> None:
    """Refuse what is not a parametrised convex problem, naming the first sub-expression at fault."""
    for variable in problem.variables():
        if variable.attributes["boolean"] or variable.attributes["integer"]:
            raise ProblemError(
                f"Variable `{variable.name()}` is integer or boolean: the solution is piecewise constant in the parameters and has "
                "no useful derivative. Relax it, for instance to Variable(..., bounds=[0, 1])."
            )
    for leaf in (*problem.variables(), *problem.parameters()):
        if leaf.is_complex():
            raise ProblemError(f"`{leaf.name()}` is complex; write its real and imaginary parts as two real ones.")
    for k, constraint in enumerate(problem.constraints):
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
            raise ProblemError(f"The problem is log-log convex but not DPP: {_locate(problem, 'log_log', dpp=True)}")
        raise ProblemError(f"The problem is not log-log convex (DGP): {_locate(problem, 'log_log', dpp=False)}")
    if problem.is_dpp("dcp", quad_form_dpp="qp"):  # type: ignore[call-arg]
        return
    if problem.is_dcp():
        raise ProblemError(f"The problem is not DPP: {_locate(problem, 'dcp', dpp=True)}")
    if problem.is_dgp():
        raise ProblemError("The problem is not convex as written (DCP), but it is log-log convex: pass gp=True.")
    if problem.is_dqcp():
        raise ProblemError(
            "The problem is quasiconvex (DQCP) but not convex: it is solved by bisection and its solution is not differentiable by a "
            f"cone program: {_locate(problem, 'dcp', dpp=False)}"
        )
    raise ProblemError(f"The problem is not convex (DCP): {_locate(problem, 'dcp', dpp=False)}")


def _quote(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _locate(problem: cp.Problem, kind: str, dpp: bool) -> str:
    def valid(item: Any) -> bool:
        return item.is_dcp(dpp=dpp) if kind == "dcp" else item.is_dgp(dpp=dpp)

    for place, item, expressions, rule in _requirements(problem, kind):
        with scopes.quad_form_dpp_scope() if dpp and place == "the objective" else nullcontext():
            if valid(item):
                continue
            culprits = [c for c in (_innermost(e, valid) for e in expressions) if c is not None]
        if culprits:
            return f"in {place}, {_explain(culprits[0], dpp)}"
        return f"in {place}, `{' and '.join(str(e) for e in expressions)}`: {rule}"
    return "CVXPY refuses the problem as a whole; see problem.is_dcp(dpp=True)."


def _requirements(problem: cp.Problem, kind: str) -> Iterator[tuple[str, Any, list[Any], str]]:
    """(where, the objective or constraint, its expressions, the rule it must follow) for each part of the problem."""
    objective = problem.objective
    sense, curvature = ("Maximize", "concave") if isinstance(objective, cp.Maximize) else ("Minimize", "convex")
    prefix = "log-log " if kind == "log_log" else ""
    yield "the objective", objective, [objective.expr], f"{sense} needs a {prefix}{curvature} expression."
    for k, constraint in enumerate(problem.constraints):
        yield f"constraints[{k}]", constraint, list(constraint.args), RULES[kind]


def _innermost(expression: Any, valid: Callable[[Any], bool]) -> Any:
    if valid(expression):
        return None
    for argument in expression.args:
        found = _innermost(argument, valid)
        if found is not None:
            return found
    return expression


def _explain(expression: Any, dpp: bool) -> str:
    text = f"`{expression}`"
    names = _quote([p.name() for p in expression.parameters()])
    if not dpp:
        unsigned = [p.name() for p in expression.parameters() if not (p.is_nonneg() or p.is_nonpos())]
        hint = f" If {_quote(unsigned)} has a sign, declare it, as in Parameter(nonneg=True)." if unsigned else ""
        return f"{text} follows no rule of disciplined convex programming (its arguments are valid, their composition is not).{hint}"
    if isinstance(expression, cp.QuadForm):
        return (
            f"{text} multiplies a Parameter by two variables. Write sum_squares(L.T @ x) with a Parameter L such that P = L L'; "
            "in a Minimize objective, quad_form(x, P) with a Parameter(..., PSD=True) works too."
        )
    if isinstance(expression, DivExpression):
        return f"{text} divides by a Parameter. Declare a Parameter for the reciprocal and compute it in torch before the layer."
    if isinstance(expression, (multiply, MulExpression)):
        if all(argument.parameters() for argument in expression.args):
            if expression.variables():
                return (
                    f"{text} multiplies two parametrised factors ({names}). Give the inner product a variable of its own, as in z == B @ x with A @ z, "
                    "or declare one Parameter for the product and compute it in torch before the layer."
                )
            return f"{text} multiplies Parameters with each other ({names}). Declare one Parameter for the product and compute it in torch before the layer."
        return (
            f"{text} multiplies a nonlinear function of a Parameter, or a Parameter of unknown sign ({names}), by a variable. Declare the sign, as in "
            "Parameter(nonneg=True), or declare one Parameter for the whole factor and compute it in torch before the layer."
        )
    if type(expression).__name__ in ("kron", "conv", "convolve"):
        return f"{text}: CVXPY takes only constants there, not {names}. Declare a Parameter for the whole matrix and build it in torch before the layer."
    if not expression.variables():
        return f"{text} is a nonlinear function of Parameters alone ({names}). Declare one Parameter for its value and compute it in torch before the layer."
    return (
        f"{text} is not affine in its Parameters ({names}), or the sign of one is unknown. Declare the sign, as in Parameter(nonneg=True), "
        "or declare a Parameter for the whole factor and compute it in torch before the layer."
    )
