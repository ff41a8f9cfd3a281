"""Quadratic programs with equality constraints only."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import cvxpy as cp
import numpy as np
import torch
from scipy.linalg import qr
from torch import Tensor

from convlayer.declaration.affine import NONE, Table, selected_rows, stack
from convlayer.declaration.atoms.atom import Weighted
from convlayer.declaration.atoms.quadratic_form import QuadraticForm
from convlayer.declaration.atoms.square import Square
from convlayer.declaration.binding import Kept
from convlayer.declaration.normal_form import NormalForm
from convlayer.kernels.answer import answered
from convlayer.kernels.equality_constrained_qp import equality_constrained_qp
from convlayer.structures.reading import (
    Placement,
    alone,
    binding,
    in_cone,
    is_whole_parameter,
    linear_cost,
    moved,
    no_cones,
    only,
    require,
    rows_binding,
    words,
)
from convlayer.structures.structure import (
    Cost,
    DeclaredProblem,
    Dual,
    Match,
    MismatchError,
    Structure,
    Wanted,
    normal,
)

# Up to so many constant rows are looked through, when the layer is built, for those that follow
# from others.
MOST_ROWS_COMPARED = 2000


class EqualityConstrainedQP(Structure):
    """minimise 1/2 x'Px + q'x subject to Ax = b; the quadratic may be given by squares too."""

    name = "equality_constrained_qp"
    compiled = True
    least_norm = True
    refines = "quadratic_program"

    def declare(self) -> DeclaredProblem:
        P, q, A, b = (
            cp.Parameter((5, 5), PSD=True),
            cp.Parameter(5),
            cp.Parameter((2, 5)),
            cp.Parameter(2),
        )
        x = cp.Variable(5)
        objective = cp.Minimize(cp.quad_form(x, P) / 2 + q @ x)
        return cp.Problem(objective, [A @ x == b]), [P, q, A, b], [x]

    def sample(self, batch: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
        L, eye = normal(generator, *batch, 5, 5), torch.eye(5, dtype=torch.float64)
        return (
            eye + L @ L.mT / 5,
            normal(generator, *batch, 5),
            normal(generator, *batch, 2, 5),
            normal(generator, *batch, 2),
        )

    def near_misses(self) -> dict[str, DeclaredProblem]:
        P, q, A, b = (
            cp.Parameter((5, 5), PSD=True),
            cp.Parameter(5),
            cp.Parameter((2, 5)),
            cp.Parameter(2),
        )
        x, y = cp.Variable(5), cp.Variable(5, nonneg=True)
        cost = cp.quad_form(x, P) / 2 + q @ x
        problems = {
            "an inequality": (cost, [A @ x <= b], [P, q, A, b], x),
            "one bound more": (cost, [A @ x == b, x[0] <= 1], [P, q, A, b], x),
            "a signed variable": (cp.quad_form(y, P) + q @ y, [A @ y == b], [P, q, A, b], y),
            "an absolute value": (cost + cp.norm1(x), [A @ x == b], [P, q, A, b], x),
            "the norm itself": (cost + cp.norm(x), [A @ x == b], [P, q, A, b], x),
            "a cone": (cost, [A @ x == b, cp.norm(x) <= 1], [P, q, A, b], x),
            "entropy": (cost - cp.sum(cp.entr(x)), [A @ x == b], [P, q, A, b], x),
        }
        return {
            k: (cp.Problem(cp.Minimize(f), rules), leaves, [v])
            for k, (f, rules, leaves, v) in problems.items()
        }

    def match(self, form: NormalForm) -> Match:
        # Is it this problem, with every coefficient?
        only(form, Square, QuadraticForm)
        no_cones(form, "zero")
        squares, quadratics = form.of(Square), form.all_of(QuadraticForm)
        require(squares.size > 0 or len(quadratics) > 0, "its objective has no quadratic part")
        placement = Placement.of(form)
        n, rules = form.n, in_cone(form, "zero")
        for _, rule in rules:
            moving = np.bincount(rule.table.linear().row, minlength=rule.table.size)
            require(bool(moving.all()), f"`{rule.text}` constrains no variable")
        table = stack([rule.table for _, rule in rules]).normal

        # The kernel, bound to the parameters once the structure is chosen.
        def build(wanted: Wanted):
            return bound(wanted, table if wanted.duals else _independent(table, n))

        def bound(wanted: Wanted, table: Table):
            terms = [_quadratic_term(form, quadratic, placement) for quadratic in quadratics]
            if squares.size:
                terms.append(_squares_term(form, placement))
            slope = placement.binding(form, linear_cost(form))
            linear, offset = table.linear(), table.offset()
            target = linear.row * n + placement.position[linear.variable]
            A = binding(form, (table.size, n), target, linear.parameter, linear.coefficient)
            b = rows_binding(form, replace(offset, coefficient=-offset.coefficient))
            seen, kept = _seen(form, wanted, table, placement, duals), Kept()
            everything = bool(seen.all())

            def run(values, like, at=None):
                P, q = None, slope(values, like)
                for term in terms:
                    more, slant = term(values, like)
                    P = more if P is None else P + more
                    q = q if slant is None else q + slant
                visible = None if everything else kept.tensor("seen", seen, like)
                kernel = partial(equality_constrained_qp, visible=visible)
                return answered(at, kernel, P, q, A(values, like), b(values, like))

            return run

        # Where the multipliers stand in its answer.
        p = table.size
        duals, start = {}, 0
        for k, rule in rules:
            rows = start + np.arange(rule.table.size)
            duals[k] = Dual(1, rows, np.ones(len(rows)))
            start += rule.table.size
        return Match(
            words(
                form,
                P=[
                    squares.weight,
                    squares.argument.linear(),
                    *(quadratic.weight for quadratic in quadratics),
                ],
                q=form.linear.linear(),
                A=table.linear(),
                b=table.offset(),
            ),
            build,
            placement.position,
            Cost(
                flops=n**3 / 3
                + 2.0 * n * n * p
                + p**3 / 3
                + 2.0 * squares.size * n * n
                + 40.0 * n * (n + p),
                bytes=40.0 * n * (n + p),
                fixed=9e-4,
                rate=1.5e10,
            ),
            duals=duals,
            vouches=_vouches(form),
            symmetrises=_symmetrises(form),
        )


def _seen(
    form: NormalForm, wanted: Wanted, table: Table, placement: Placement, duals: dict[int, Dual]
) -> np.ndarray:
    """(n + p,) one where an output reads an entry of the kernel's (x, nu) or a Parameter moves what
    it enters, else zero.

    A quadratic form of an argument or a weighted square of it does not change along what is not
    unique, nor does its weight's gradient. Rows whose coefficients no parameter moves are
    differentiated along right-hand sides that agree, as in the cone program.
    """
    x = np.ones(form.n, dtype=bool) if wanted.x is None else wanted.x.copy()
    nu = np.zeros(table.size, dtype=bool)
    x[moved(form.linear)] = x[moved(table)] = True
    linear = table.linear()
    nu[linear.row[linear.parameter != NONE]] = True
    quadratics = form.all_of(QuadraticForm)
    for term in (form.of(Square), *quadratics):
        x[moved(term.argument)] = True
    for quadratic in quadratics:
        P = quadratic.weight
        entry = P.row[P.parameter != NONE]
        size, argument = quadratic.argument.size, quadratic.argument.linear()
        read = np.zeros(size, dtype=bool)
        read[entry % size] = read[entry // size] = True
        x[argument.variable[read[argument.row]]] = True
    if wanted.duals:
        for k, dual in duals.items():
            if wanted.constraints is None or k in wanted.constraints:
                nu[dual.position] = True
    seen = np.zeros(form.n + table.size)
    seen[placement.position] = x
    seen[form.n :] = nu
    return seen


def _vouches(form: NormalForm) -> frozenset[int]:
    """The Parameter that is P, if P is one and nothing else."""
    quadratics = form.all_of(QuadraticForm)
    if len(quadratics) != 1 or form.of(Square).size:
        return frozenset()
    (quadratic,) = quadratics
    matrix = quadratic.weight.normal
    if not is_whole_parameter(form, matrix, quadratic.argument.size) or matrix.coefficient[0] <= 0:
        return frozenset()
    return frozenset((form.parameter_starts.index(int(matrix.parameter.min())),))


def _symmetrises(form: NormalForm) -> bool:
    """Symmetric parameters are whole matrices of quadratic forms, which the kernel symmetrises."""
    quadratics = form.all_of(QuadraticForm)
    whole = sum(is_whole_parameter(form, q.weight, q.argument.size) for q in quadratics)
    return whole == sum(1 for p in form.parameters if p.is_symmetric() and p.size > 1)


def _independent(table: Table, n: int) -> Table:
    """Without the rows that follow from others, where no parameter moves any: they change nothing
    but their own multipliers."""
    if not 1 < table.size <= MOST_ROWS_COMPARED or (table.parameter != NONE).any():
        return table
    rows = np.zeros((table.size, n + 1))
    np.add.at(rows, (table.row, table.variable), table.coefficient)  # the offset stands last
    rows /= np.linalg.norm(rows[:, :n], axis=1, keepdims=True)
    _, upper, order = qr(rows.T, mode="economic", pivoting=True)
    rank = int((np.abs(np.diagonal(upper)) > 1e-12 * table.size).sum())
    if rank == table.size or np.linalg.matrix_rank(rows[:, :n], tol=1e-12 * table.size) < rank:
        return table  # as they are: independent, or inconsistent
    kept = np.zeros(table.size, dtype=bool)
    kept[order[:rank]] = True
    return selected_rows(table, kept)


def _quadratic_term(form: NormalForm, quadratic: Weighted, placement: Placement):
    """(values, like) -> its part of (P, q)."""
    size, n, argument = quadratic.argument.size, form.n, quadratic.argument.normal
    matrix = quadratic.weight
    try:
        variable, factor = alone(argument, "")
        plain = not len(argument.offset().row) and len(np.unique(variable)) == size
    except MismatchError:
        plain = False
    if plain:
        i, j = matrix.row % size, matrix.row // size
        target = placement.position[variable[i]] * n + placement.position[variable[j]]
        P = binding(
            form, (n, n), target, matrix.parameter, matrix.coefficient * factor[i] * factor[j]
        )
        return lambda values, like: (P(values, like), None)
    inner = binding(form, (size, size), matrix.row, matrix.parameter, matrix.coefficient)
    F, g = _affine(form, argument, placement)

    def term(values, like):
        half = inner(values, like)
        half = (half + half.mT) / 2
        map_ = F(values, like)
        weighted = half @ map_
        return map_.mT @ weighted, (weighted.mT @ g(values, like).unsqueeze(-1)).squeeze(-1)

    return term


def _squares_term(form: NormalForm, placement: Placement):
    """sum_i w_i (F x + g)_i^2 as 1/2 x'(2 F'W F)x + (2 F'W g)'x."""
    squares = form.of(Square)
    F, g = _affine(form, squares.argument, placement)
    w = rows_binding(form, squares.weight)

    def term(values, like):
        map_ = F(values, like)
        weighted = 2 * w(values, like).unsqueeze(-1) * map_
        return map_.mT @ weighted, (weighted.mT @ g(values, like).unsqueeze(-1)).squeeze(-1)

    return term


def _affine(form: NormalForm, argument: Table, placement: Placement):
    """Bindings of F (rows, n) and g (rows,)."""
    linear = argument.linear()
    target = linear.row * form.n + placement.position[linear.variable]
    F = binding(form, (argument.size, form.n), target, linear.parameter, linear.coefficient)
    return F, rows_binding(form, argument.offset())
