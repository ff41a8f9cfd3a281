"""CVXPY problem -> weighted atoms of affine maps: what a structure is recognised on, however the problem was spelt.

    minimise    sum_i w_i (F x + g)_i^2 + sum_i w_i |(F x + g)_i| - sum_i w_i entr(F x + g)_i + sum_k 1/2 (F x + g)'P(F x + g) + c'x + d
    subject to  rows of A x + b in the zero, nonnegative and psd cones

Weights, F, g, P, c, A and b are affine in the parameters, sparse and exact (`Table`). Whatever has another form is named in `others`,
so that a structure can say what it does not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import cvxpy as cp
import numpy as np
from cvxpy.atoms.affine.add_expr import AddExpression
from cvxpy.atoms.affine.unary_operators import NegExpression
from cvxpy.atoms.atom import Atom
from cvxpy.atoms.elementwise.abs import abs as Absolute  # noqa: N812, a class
from cvxpy.atoms.elementwise.entr import entr
from cvxpy.atoms.elementwise.kl_div import kl_div
from cvxpy.atoms.elementwise.power import Power
from cvxpy.atoms.elementwise.rel_entr import rel_entr
from cvxpy.atoms.norm1 import norm1
from cvxpy.atoms.pnorm import Pnorm
from cvxpy.atoms.quad_form import QuadForm
from cvxpy.atoms.quad_over_lin import quad_over_lin
from cvxpy.constraints.nonpos import Inequality, NonNeg, NonPos
from cvxpy.constraints.psd import PSD
from cvxpy.constraints.zero import Equality, Zero

from convlayer.declaration.affine import (
    NONE,
    Reader,
    Table,
    UnsupportedError,
    add,
    chain,
    nothing,
    picked,
    rows_of,
    stack,
    starts,
    summed_into,
    weigh,
)
from convlayer.declaration.graph import arguments_first, is_affine, uses_first
from convlayer.declaration.spelling import short


@dataclass(frozen=True, eq=False)
class Weighted:
    """sum_i weight_i atom(argument_i): two tables with as many rows, the weight's without variables."""

    weight: Table
    argument: Table

    @property
    def size(self) -> int:
        return self.argument.size


@dataclass(frozen=True, eq=False)
class Quadratic:
    """1/2 argument' matrix argument; the matrix's rows are its entries, column-major."""

    matrix: Table
    argument: Table


@dataclass(frozen=True, eq=False)
class Constraint:
    """The rows of `table` in a cone, column-major.

    With CVXPY's multiplier y of the constraint, the Lagrangian has y'table added to the objective (minimised) where the rows are
    zero, and taken off it in the other cones.
    """

    cone: str  # "zero", "nonnegative", "psd"
    table: Table
    origin: int | None  # the constraint's id; None: an attribute of a variable
    source: Any  # it, or what says which attribute: printed when words are wanted, which takes CVXPY longer than the reading

    @cached_property
    def text(self) -> str:
        return short(self.source)


@dataclass(frozen=True, eq=False)
class NormalForm:
    """See the module. The objective is minimised; where the user maximises, it is the negative of theirs."""

    variables: list[cp.Variable]
    parameters: list[cp.Parameter]
    variable_starts: list[int]  # where each variable begins in x; its length at last
    parameter_starts: list[int]
    maximise: bool
    squares: Weighted
    absolutes: Weighted
    entropies: Weighted
    quadratics: list[Quadratic]
    linear: Table  # one row: c'x + d
    constraints: list[Constraint]
    tied: list[str]  # variables whose entries are tied to each other (symmetric, PSD)
    others: list[str]  # atoms and constraints of another form, as the user wrote them
    not_quadratic: str | None  # why the problem is no quadratic program by CVXPY's rules; None: it is one

    @property
    def n(self) -> int:
        return self.variable_starts[-1]


def normal_form(problem: cp.Problem, parameters: Sequence[cp.Parameter]) -> NormalForm:
    """The normal form of a DCP problem; what cannot be read is among its `others`."""
    variables = problem.variables()
    maximise = isinstance(problem.objective, cp.Maximize)
    terms = _Terms(Reader(variables, parameters))
    terms.read(problem.objective.args[0], Table.of_constant([-1.0 if maximise else 1.0]))
    rules = _Rules(terms.reader, terms.others)
    for constraint in problem.constraints:
        rules.add(constraint)
    for variable in variables:
        rules.add_attributes(variable)
    return NormalForm(
        variables,
        list(parameters),
        starts(variables),
        starts(parameters),
        maximise,
        terms.weighted("square"),
        terms.weighted("absolute"),
        terms.weighted("entropy"),
        terms.quadratics,
        add([Table.zero(1), *terms.linear]).normal,
        rules.found,
        rules.tied,
        terms.others,
        _not_quadratic(problem),
    )


def _not_quadratic(problem: cp.Problem) -> str | None:
    if not _without_affine_parts(problem.objective.args[0]).is_qpwa():
        return "its objective is not quadratic or piecewise affine"
    for constraint in problem.constraints:
        if type(constraint) not in (Equality, Zero) and not (
            type(constraint) in (Inequality, NonPos, NonNeg) and _without_affine_parts(constraint.expr).is_pwl()
        ):
            return f"`{short(constraint)}` is not a linear constraint"
    if any(variable.attributes[name] for variable in problem.variables() for name in ("PSD", "NSD", "hermitian")):
        return "a variable is semidefinite"
    return None


def _without_affine_parts(expression: Any) -> Any:
    """The same with a variable in place of each affine part: CVXPY looks for squares in those too, and as a tree."""
    new: dict[int, Any] = {}
    for part in arguments_first([expression], lambda part: not part.is_affine()):
        if part.is_affine():
            new[id(part)] = part if part.is_constant() or not part.args else cp.Variable(part.shape)
            continue
        inner = [new[id(argument)] for argument in part.args]
        same = all(now is before for now, before in zip(inner, part.args, strict=True))
        new[id(part)] = part if same else part.copy(inner)
    return new[id(expression)]


class _Terms:
    """The objective, taken apart from its root: an expression and the weights of its entries.

    A part is taken when all that use it have been, with the sum of the weights that they gave it.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self._given: dict[int, list[Table]] = {}
        self.found: dict[str, list[Weighted]] = {"square": [], "absolute": [], "entropy": []}
        self.quadratics: list[Quadratic] = []
        self.linear: list[Table] = []
        self.others: list[str] = []

    def weighted(self, atom: str) -> Weighted:
        """All terms of one atom below each other, without those of weight zero."""
        parts = self.found[atom]
        weight, argument = stack([p.weight for p in parts]).normal, stack([p.argument for p in parts]).normal
        if atom == "entropy":
            return Weighted(weight, argument)  # with a weight of zero it still keeps its argument nonnegative
        used = np.zeros(argument.size, dtype=bool)
        used[weight.row] = True
        return Weighted(weight, argument) if used.all() else Weighted(rows_of(weight, used), rows_of(argument, used))

    def read(self, objective: Any, weight: Table) -> None:
        """Take sum_i weight_i objective_i. UnsupportedError never leaves: what is not read becomes one of the others."""
        self.add(objective, weight)
        for expression in uses_first(objective, lambda part: not is_affine(part)):
            given = self._given.pop(id(expression), None)
            if given is None:
                continue
            try:
                self._take(expression, add(given).normal if len(given) > 1 else given[0])
            except UnsupportedError as reason:
                self.others.append(f"`{short(expression)}` ({reason})")

    def add(self, expression: Any, weight: Table) -> None:
        """Have sum_i weight_i expression_i taken in its turn."""
        self._given.setdefault(id(expression), []).append(weight)

    def _take(self, expression: Any, weight: Table) -> None:
        if is_affine(expression):
            self.linear.append(weigh(weight, self.reader.table(expression)))
        elif isinstance(expression, AddExpression) and all(a.shape == expression.shape for a in expression.args):
            for argument in expression.args:
                self.add(argument, weight)
        elif isinstance(expression, NegExpression):
            self.add(expression.args[0], weight.scaled(-1.0))
        elif not isinstance(expression, Atom):
            self.others.append(f"`{short(expression)}`")
        elif expression.is_atom_affine():
            table, arguments = self.reader.operator(expression)
            self.linear.append(weigh(weight, table.offset()))
            place = starts(arguments)
            for argument, start, stop in zip(arguments, place[:-1], place[1:], strict=True):
                pulled = weigh(weight, table.linear())
                mine = pulled.take((pulled.variable >= start) & (pulled.variable < stop))
                rows = mine.variable - start
                self.add(argument, Table(argument.size, rows, nothing(len(rows)), mine.parameter, mine.coefficient))
        else:
            self._atom(expression, weight)

    def _atom(self, expression: Any, weight: Table) -> None:
        first = expression.args[0]
        power = _constant(expression.p) if isinstance(expression, Power) else None
        divisor = _constant(expression.args[1]) if isinstance(expression, quad_over_lin) else None
        if power is not None:
            self._power(first, power, weight, expression)
        elif divisor:
            self._square(first, _spread(weight, expression).scaled(1.0 / divisor))
        elif isinstance(expression, QuadForm):
            self._quad_form(expression, weight)
        elif isinstance(expression, Absolute):
            self._keep("absolute", weight, self.reader.table(first))
        elif isinstance(expression, norm1) or (isinstance(expression, Pnorm) and expression.p == 1):
            self._keep("absolute", _spread(weight, expression), self.reader.table(first))
        elif isinstance(expression, entr):
            self._entropy(self.reader.table(first), weight.scaled(-1.0))
        elif isinstance(expression, (rel_entr, kl_div)):
            self._divergence(expression, weight)
        else:
            self.others.append(f"`{short(expression)}`")

    def _power(self, argument: Any, p: float, weight: Table, expression: Any) -> None:
        if p == 1:
            self.add(argument, weight)
        elif p == 2 and isinstance(argument, Pnorm) and argument.p == 2:
            self._square(argument.args[0], _spread(weight, argument))
        elif p == 2:
            self._square(argument, weight)
        else:
            self.others.append(f"`{short(expression)}`")

    def _square(self, argument: Any, weight: Table) -> None:
        """sum_i weight_i argument_i^2; under a square an absolute value says nothing."""
        while isinstance(argument, (Absolute, NegExpression)):
            argument = argument.args[0]
        if isinstance(argument, norm1) and argument.args[0].size == 1:
            return self._square(argument.args[0], weight)
        if isinstance(argument, Pnorm) and argument.p == 2:
            return self._square(argument.args[0], _spread(weight, argument))
        self._keep("square", weight, self.reader.table(argument))
        return None

    def _quad_form(self, expression: Any, weight: Table) -> None:
        """weight argument'P argument: squares where P is a diagonal of numbers."""
        argument, matrix = (self.reader.table(a) for a in expression.args)
        matrix, size = matrix.normal, argument.size
        factor = replace(matrix, variable=np.zeros(len(matrix.row), dtype=np.int64))
        if (matrix.parameter == NONE).all() and (matrix.row % size == matrix.row // size).all():
            values = chain(factor, weight)
            self._keep("square", replace(values, size=size, row=values.row % size), argument)
        else:
            self.quadratics.append(Quadratic(chain(factor, weight.scaled(2.0)).normal, argument))

    def _entropy(self, argument: Table, weight: Table) -> None:
        """Add -weight' entr(argument); entr(s z) = s entr(z) - s log(s) z for a positive number s."""
        argument = argument.normal
        alone = (np.bincount(argument.row, minlength=argument.size) == 1).all()
        if alone and (argument.variable != NONE).all() and (argument.parameter == NONE).all():
            scale = argument.coefficient
            if (scale > 0).all() and (scale != 1).any():
                plain = replace(argument, coefficient=np.ones(len(scale)))
                self.linear.append(weigh(weight.scaled(scale * np.log(scale)), plain))
                argument, weight = plain, weight.scaled(scale)
        self._keep("entropy", weight, argument)

    def _divergence(self, expression: Any, weight: Table) -> None:
        """x log(x / y), and - x + y in kl_div, with a positive number y: -entr(x) - x log y."""
        x, y = expression.args
        if not self.reader.contents.constant(y):
            raise UnsupportedError("its second argument is not a constant")
        value = np.broadcast_to(np.asarray(y.value, dtype=float), expression.shape).ravel(order="F")
        if (value <= 0).any():
            raise UnsupportedError("its second argument is not positive")
        # The first argument spans the expression: CVXPY promotes scalars only.
        table = self.reader.table(x)
        if table.size != expression.size:
            raise UnsupportedError("its first argument is repeated")
        self._entropy(table, weight)
        slope = -np.log(value) - (1.0 if isinstance(expression, kl_div) else 0.0)
        self.linear.append(weigh(weight.scaled(slope), table))
        if isinstance(expression, kl_div):
            self.linear.append(weigh(weight, Table.of_constant(value)))

    def _keep(self, atom: str, weight: Table, argument: Table) -> None:
        self.found[atom].append(Weighted(weight, argument))


class _Rules:
    """The constraints, and what the variables' attributes say."""

    def __init__(self, reader: Reader, others: list[str]) -> None:
        self.reader, self.others = reader, others
        self.found: list[Constraint] = []
        self.tied: list[str] = []

    def add(self, constraint: Any) -> None:
        kinds: dict[Any, tuple[str, float]] = {
            Equality: ("zero", 1.0),
            Zero: ("zero", 1.0),
            Inequality: ("nonnegative", -1.0),
        }
        kinds |= {NonPos: ("nonnegative", -1.0), NonNeg: ("nonnegative", 1.0), PSD: ("psd", 1.0)}
        kind = kinds.get(type(constraint))
        if kind is None or any(len(a.shape) > 2 for a in constraint.args if kind[0] == "psd"):
            self.others.append(f"`{short(constraint)}`")
            return
        cone, sign = kind
        expression = constraint.args[0] if cone == "psd" else constraint.expr
        try:
            if not is_affine(expression):
                raise UnsupportedError("not affine")
            table = self.reader.table(expression).normal.scaled(sign)
        except UnsupportedError:
            self.others.append(f"`{short(constraint)}`")
            return
        if cone != "nonnegative" or not _is_unlimited(table):
            self.found.append(Constraint(cone, table, constraint.id, constraint))

    def add_attributes(self, variable: cp.Variable) -> None:
        table = self._attribute_table(variable)
        if table is None:
            return
        known = {"nonneg": 1.0, "pos": 1.0, "nonpos": -1.0, "neg": -1.0}
        for name, value in variable.attributes.items():
            if value is None or value is False or name in ("diag", "sparsity"):
                continue
            text = f"Variable `{variable.name()}` {name}"
            if name in known:
                self.found.append(Constraint("nonnegative", table.scaled(known[name]), None, text))
            elif name in ("symmetric", "PSD", "NSD"):
                if variable.size > 1:
                    self.tied.append(variable.name())
                if name != "symmetric":
                    self.found.append(Constraint("psd", table.scaled(1.0 if name == "PSD" else -1.0), None, text))
            elif name == "bounds":
                self._bounds(value, variable, table, text)
            else:
                self.others.append(text)

    def _attribute_table(self, variable: cp.Variable) -> Table | None:
        try:
            return self.reader.table(variable)
        except UnsupportedError as reason:
            self.others.append(str(reason))
            return None

    def _bounds(self, bounds: Any, variable: cp.Variable, table: Table, text: str) -> None:
        for bound, sign in zip(bounds, (1.0, -1.0), strict=True):
            if isinstance(bound, cp.Expression) and (bound.parameters() or bound.variables()):
                self.others.append(text)
                continue
            value = np.broadcast_to(np.asarray(getattr(bound, "value", bound), dtype=float), variable.shape)
            flat = value.ravel(order="F")
            finite = np.isfinite(flat)
            if finite.any():
                shifted = add([table.scaled(sign), Table.of_constant(np.where(finite, -sign * flat, 0.0))])
                self.found.append(Constraint("nonnegative", rows_of(shifted, finite), None, text))


def _is_unlimited(table: Table) -> bool:
    """An infinite constant makes every row nonnegative: x <= inf is no constraint."""
    return table.size > 0 and len(np.unique(table.row[table.coefficient == np.inf])) == table.size


def _constant(p: Any) -> float | None:
    """The value of a scalar constant expression or number, None if it is neither."""
    if isinstance(p, cp.Expression):
        if p.variables() or p.parameters() or p.size != 1:
            return None
        p = p.value
    return float(np.asarray(p, dtype=float).reshape(()))


def _spread(weight: Table, expression: Any) -> Table:
    """The weights of an atom's entries, as weights of what it sums over along its axis."""
    return picked(weight, summed_into(expression))
