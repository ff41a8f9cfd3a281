"""What is asked of a problem, and rewritten in it, before CVXPY canonicalises it.

Two rewritings, each to an equal problem whose cone program is the better one:

    quad_form(x - p, K)           ->  quad_form(y, K), y == x - p     p a Parameter, K constant
    f(|z|), f even;  |z|_2^2      ->  f(z);  z'z                      z real

The first keeps the objective affine in p. The second has no kink at z = 0, where CVXPY's t >= |z|
has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cvxpy as cp

from convlayer.declaration.cvxpy_internals import Pnorm, Power
from convlayer.declaration.diagnose import (
    check_arguments,
    check_attributes,
    check_convexity,
    within_recursion_limit,
)
from convlayer.declaration.graph import Contents, is_curved, rewritten

# Atoms of an even function, under which an absolute value says nothing: a power if its exponent is
# even.
MAYBE_EVEN = (Power, cp.quad_over_lin, cp.huber)


@dataclass(frozen=True, eq=False)
class Prepared:
    """What has been let in, as it will be canonicalised."""

    problem: cp.Problem
    # by the id of each dual variable, the user's constraint that it belongs to
    owners: dict[int, Any]


def prepared(
    problem: cp.Problem,
    parameters: Sequence[cp.Parameter],
    variables: Sequence[cp.Variable],
    gp: bool,
) -> Prepared:
    """Refuse what cannot be a layer (ProblemError or TypeError), and rewrite the rest."""
    with within_recursion_limit():
        owners = check_arguments(problem, parameters, variables)
        check_attributes(problem)
        if gp:
            check_convexity(problem, gp)
            return Prepared(problem, owners)
        affine_in_parameters = _without_parametrised_arguments(problem)
        check_convexity(affine_in_parameters, gp)
        return Prepared(_without_hidden_kinks(affine_in_parameters), owners)


def _without_parametrised_arguments(problem: cp.Problem) -> cp.Problem:
    """The problem with y in place of x - p in each quad_form(x - p, K) of the objective, K
    constant, and y == x - p.

    (x - p)'K(x - p) is DPP, but its constant is quadratic in p; with y the objective stays
    quadratic and affine in p.
    """
    contents, equalities = Contents(), list[cp.Constraint]()

    def named(part: Any, arguments: list[Any]) -> Any:
        if not isinstance(part, cp.QuadForm):
            return None
        argument, matrix = part.args
        if not contents.parameters(argument) or contents.parameters(matrix):
            return None
        y = cp.Variable(argument.shape)
        equalities.append(y == argument)
        return part.copy([y, matrix])

    objective = problem.objective.expr
    new = rewritten([objective], named, is_curved)
    if id(objective) not in new:
        return problem
    affine = type(problem.objective)(new[id(objective)])
    return cp.Problem(affine, [*problem.constraints, *equalities])


def _without_hidden_kinks(problem: cp.Problem) -> cp.Problem:
    """The problem with f(z) in place of f(|z|), f an even power, a sum of squares or a Huber
    function, and z'z in place of |z|^2.

    CVXPY writes them as f(t), t >= |z|, which has a kink at z = 0 where f(|z|) has none.
    """
    objective = problem.objective.expr
    arguments = [argument for constraint in problem.constraints for argument in constraint.args]
    new = rewritten([objective, *arguments], _smooth, is_curved)
    if not new:
        return problem
    constraints = [
        constraint.copy([new.get(id(argument), argument) for argument in constraint.args])
        if any(id(argument) in new for argument in constraint.args)
        else constraint
        for constraint in problem.constraints
    ]
    return cp.Problem(type(problem.objective)(new.get(id(objective), objective)), constraints)


def _smooth(part: Any, arguments: list[Any]) -> Any:
    """f(z) for a part f(|z|), z'z for |z|^2; None where it is neither."""
    if not isinstance(part, MAYBE_EVEN):
        return None
    is_square = isinstance(part, cp.quad_over_lin)
    if isinstance(part, Power):
        exponent = part.p.value if isinstance(part.p, cp.Expression) else part.p
        if exponent is None or exponent % 2 or exponent <= 0:
            return None
        is_square = exponent == 2
    inner, *rest = arguments
    if isinstance(inner, cp.abs) and not inner.args[0].is_complex():
        return part.copy([inner.args[0], *rest])
    if is_square and _is_euclidean(inner):
        (z,) = inner.args
        return cp.sum_squares(z) if isinstance(part, Power) else part.copy([z, *rest])
    return None


def _is_euclidean(part: Any) -> bool:
    """The 2-norm of all entries."""
    return isinstance(part, Pnorm) and part.p == 2 and part.axis is None and not part.keepdims
