"""CVXPY problem -> weighted atoms of affine maps: what a structure is recognised on, however the
problem was spelt.

    minimise    sum over atoms f and their terms of  w'f(F x + g)  +  c'x + d
    subject to  rows of A x + b in the zero, nonnegative and psd cones

The atoms are those of `convlayer.declaration.atoms`. Weights, F, g, c, A and b are affine in the
parameters, sparse and exact (`Table`). Whatever has another form is named in `others`, so that a
structure can say what it does not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import cvxpy as cp
import numpy as np

from convlayer.declaration.affine import (
    Reader,
    Table,
    UnsupportedError,
    add,
    nothing,
    selected_rows,
    starts,
    weigh,
)
from convlayer.declaration.atoms import ATOMS
from convlayer.declaration.atoms.atom import NormalAtom, Terms, Weighted
from convlayer.declaration.cvxpy_internals import (
    PSD,
    AddExpression,
    Atom,
    Equality,
    Inequality,
    NegExpression,
    NonNeg,
    NonPos,
    Zero,
)
from convlayer.declaration.graph import arguments_first, is_affine, is_curved, uses_first
from convlayer.declaration.spelling import short

# By the type of a CVXPY constraint: the cone of its rows, and the sign with which they are in it.
CONE_OF: dict[type, tuple[str, float]] = {
    Equality: ("zero", 1.0),
    Zero: ("zero", 1.0),
    Inequality: ("nonnegative", -1.0),
    NonPos: ("nonnegative", -1.0),
    NonNeg: ("nonnegative", 1.0),
    PSD: ("psd", 1.0),
}
# By the attribute of a variable: the sign with which its entries are nonnegative.
SIGN_OF = {"nonneg": 1.0, "pos": 1.0, "nonpos": -1.0, "neg": -1.0}
# By the attribute of a variable that equals its transpose: the sign with which it is semidefinite,
# zero where it need not be.
DEFINITENESS_OF = {"symmetric": 0.0, "PSD": 1.0, "NSD": -1.0}


@dataclass(frozen=True, eq=False)
class Constraint:
    """The rows of `table` in a cone, column-major.

    With CVXPY's multiplier y of the constraint, the Lagrangian has y'table added to the objective
    (minimised) where the rows are zero, and taken off it in the other cones.
    """

    cone: str  # "zero", "nonnegative", "psd"
    table: Table
    origin: int | None  # the constraint's id; None: an attribute of a variable
    # The constraint, or what says which attribute: printed when words are wanted, which takes CVXPY
    # longer than the reading.
    source: Any

    @cached_property
    def text(self) -> str:
        """As the user wrote it, in short."""
        return short(self.source)


@dataclass(frozen=True, eq=False)
class NormalForm:
    """See the module. The objective is minimised; where the user maximises, it is the negative of
    theirs."""

    variables: list[cp.Variable]
    parameters: list[cp.Parameter]
    variable_starts: list[int]  # where each variable begins in x; its length at last
    parameter_starts: list[int]
    maximise: bool
    terms: dict[str, list[Weighted]]  # of every atom, by its name, as it gathers them
    linear: Table  # one row: c'x + d
    constraints: list[Constraint]
    tied: list[str]  # variables whose entries are tied to each other (symmetric, PSD)
    others: list[str]  # atoms and constraints of another form, as the user wrote them
    # Why the problem is no quadratic program by CVXPY's rules; None: it is one.
    not_quadratic: str | None

    @property
    def n(self) -> int:
        """The entries of x."""
        return self.variable_starts[-1]

    def all_of(self, atom: type[NormalAtom]) -> list[Weighted]:
        """The terms of an atom."""
        return self.terms[atom.name]

    def of(self, atom: type[NormalAtom]) -> Weighted:
        """The one term of an elementwise atom, of no rows where the objective has none."""
        (term,) = self.terms[atom.name]
        return term

    @property
    def present(self) -> list[tuple[NormalAtom, Weighted]]:
        """Every term of the objective but the linear one, with its atom."""
        return [
            (ATOMS[name], term) for name, terms in self.terms.items() for term in terms if term.size
        ]

    @property
    def tables(self) -> list[Table]:
        """All that is read of the parameters."""
        sides = [table for _, term in self.present for table in (term.weight, term.argument)]
        return [self.linear, *sides, *(constraint.table for constraint in self.constraints)]


def normal_form(problem: cp.Problem, parameters: Sequence[cp.Parameter]) -> NormalForm:
    """The normal form of a DCP problem; what cannot be read is among its `others`."""
    variables = problem.variables()
    reader, others = Reader(variables, parameters), list[str]()

    # The objective, minimised, as terms of atoms.
    maximise = isinstance(problem.objective, cp.Maximize)
    objective = _Objective(reader, others)
    objective.read(problem.objective.args[0], Table.of_constant([-1.0 if maximise else 1.0]))
    terms = objective.terms

    # The constraints, and what the variables' attributes say, as rows in cones.
    rules = _Rules(reader, others)
    for constraint in problem.constraints:
        rules.add(constraint)
    for variable in variables:
        rules.add_attributes(variable)

    return NormalForm(
        variables=variables,
        parameters=list(parameters),
        variable_starts=starts(variables),
        parameter_starts=starts(parameters),
        maximise=maximise,
        terms={name: atom.gathered(terms.by_atom.get(name, [])) for name, atom in ATOMS.items()},
        linear=add([Table.zero(1), *terms.linear]).normal,
        constraints=rules.constraints,
        tied=rules.tied,
        others=others,
        not_quadratic=_not_quadratic(problem),
    )


class _Objective:
    """The objective, taken apart from its root: an expression and the weights of its entries.

    A part is taken when all that use it have been, with the sum of the weights that they gave it.
    """

    def __init__(self, reader: Reader, others: list[str]) -> None:
        self._reader, self._others = reader, others
        self.terms = Terms(reader)
        self._given: dict[int, list[Table]] = {}

    def read(self, objective: Any, weight: Table) -> None:
        """Take sum_i weight_i objective_i. UnsupportedError never leaves: what is not read becomes
        one of the others."""
        self._give(objective, weight)
        for expression in uses_first(objective, is_curved):
            given = self._given.pop(id(expression), None)
            if given is None:
                continue
            try:
                self._take(expression, add(given).normal if len(given) > 1 else given[0])
            except UnsupportedError as reason:
                self._others.append(f"`{short(expression)}` ({reason})")

    def _give(self, expression: Any, weight: Table) -> None:
        """Have sum_i weight_i expression_i taken in its turn."""
        self._given.setdefault(id(expression), []).append(weight)

    def _take(self, expression: Any, weight: Table) -> None:
        """sum_i weight_i expression_i: to its arguments what is affine in them, to an atom of ours
        what it recognises."""
        if is_affine(expression):
            self.terms.keep_linear(weigh(weight, self._reader.table(expression)))
        elif _is_plain_sum(expression):
            for argument in expression.args:
                self._give(argument, weight)
        elif isinstance(expression, NegExpression):
            self._give(expression.args[0], weight.scaled(-1.0))
        elif isinstance(expression, Atom) and expression.is_atom_affine():
            self._pass_on(expression, weight)
        else:
            atom = _recognised(expression)
            if atom is None:
                self._others.append(f"`{short(expression)}`")
            else:
                atom.read(expression, weight, self.terms)

    def _pass_on(self, expression: Any, weight: Table) -> None:
        """weight'(M y + c) with the arguments y: weight'c is linear, and y has the weights
        M'weight."""
        table, arguments = self._reader.operator(expression)
        self.terms.keep_linear(weigh(weight, table.offset()))
        pulled = weigh(weight, table.linear())
        place = starts(arguments)
        for argument, start, stop in zip(arguments, place[:-1], place[1:], strict=True):
            mine = pulled.take((pulled.variable >= start) & (pulled.variable < stop))
            rows, none = mine.variable - start, nothing(len(mine.row))
            self._give(argument, Table(argument.size, rows, none, mine.parameter, mine.coefficient))


def _is_plain_sum(expression: Any) -> bool:
    """Of arguments that are not broadcast."""
    return isinstance(expression, AddExpression) and all(
        argument.shape == expression.shape for argument in expression.args
    )


def _recognised(expression: Any) -> NormalAtom | None:
    return next((atom for atom in ATOMS.values() if atom.recognises(expression)), None)


class _Rules:
    """The constraints, and what the variables' attributes say."""

    def __init__(self, reader: Reader, others: list[str]) -> None:
        self.reader, self.others = reader, others
        self.constraints: list[Constraint] = []
        self.tied: list[str] = []

    def add(self, constraint: Any) -> None:
        """The rows of a constraint; one that is not affine, or in no cone of ours, is among the
        others."""
        cone, sign = CONE_OF.get(type(constraint), (None, 1.0))
        try:
            if cone is None or (cone == "psd" and any(len(a.shape) > 2 for a in constraint.args)):
                raise UnsupportedError("no cone of ours")
            expression = constraint.args[0] if cone == "psd" else constraint.expr
            if not is_affine(expression):
                raise UnsupportedError("not affine")
            table = self.reader.table(expression).normal.scaled(sign)
        except UnsupportedError:
            self.others.append(f"`{short(constraint)}`")
            return
        if cone != "nonnegative" or not _is_unlimited(table):
            self.constraints.append(Constraint(cone, table, constraint.id, constraint))

    def add_attributes(self, variable: cp.Variable) -> None:
        """Signs, bounds and semidefiniteness as rows; what is tied or unknown by its name."""
        table = self._attribute_table(variable)
        if table is None:
            return
        for name, value in variable.attributes.items():
            if value is None or value is False or name in ("diag", "sparsity"):
                continue
            text = f"Variable `{variable.name()}` {name}"
            if name in SIGN_OF:
                self._attribute("nonnegative", table.scaled(SIGN_OF[name]), text)
            elif name in DEFINITENESS_OF:
                if variable.size > 1:
                    self.tied.append(variable.name())
                if DEFINITENESS_OF[name]:
                    self._attribute("psd", table.scaled(DEFINITENESS_OF[name]), text)
            elif name == "bounds":
                self._bounds(value, variable, table, text)
            else:
                self.others.append(text)

    def _attribute(self, cone: str, table: Table, text: str) -> None:
        self.constraints.append(Constraint(cone, table, None, text))

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
            value = np.broadcast_to(
                np.asarray(getattr(bound, "value", bound), dtype=float), variable.shape
            )
            flat = value.ravel(order="F")
            finite = np.isfinite(flat)
            if finite.any():
                shifted = add(
                    [table.scaled(sign), Table.of_constant(np.where(finite, -sign * flat, 0.0))]
                )
                self._attribute("nonnegative", selected_rows(shifted, finite), text)


def _is_unlimited(table: Table) -> bool:
    """An infinite constant makes every row nonnegative: x <= inf is no constraint."""
    return table.size > 0 and len(np.unique(table.row[table.coefficient == np.inf])) == table.size


def _not_quadratic(problem: cp.Problem) -> str | None:
    if not _without_affine_parts(problem.objective.args[0]).is_qpwa():
        return "its objective is not quadratic or piecewise affine"
    for constraint in problem.constraints:
        if type(constraint) not in (Equality, Zero) and not (
            type(constraint) in (Inequality, NonPos, NonNeg)
            and _without_affine_parts(constraint.expr).is_pwl()
        ):
            return f"`{short(constraint)}` is not a linear constraint"
    if any(
        variable.attributes[name]
        for variable in problem.variables()
        for name in ("PSD", "NSD", "hermitian")
    ):
        return "a variable is semidefinite"
    return None


def _without_affine_parts(expression: Any) -> Any:
    """The same with a variable in place of each affine part: CVXPY looks for squares in those too,
    and as a tree."""
    new: dict[int, Any] = {}
    opened: set[int] = set()

    def is_open(part: Any) -> bool:
        """Neither affine, Parameters taken for numbers, nor a constraint that an indicator
        holds."""
        if isinstance(part, cp.Expression) and not part.is_affine():
            opened.add(id(part))
        return id(part) in opened

    for part in arguments_first([expression], is_open):
        if id(part) not in opened:
            stays = not part.args or not isinstance(part, cp.Expression) or part.is_constant()
            new[id(part)] = part if stays else cp.Variable(part.shape)
            continue
        inner = [new[id(argument)] for argument in part.args]
        same = all(now is before for now, before in zip(inner, part.args, strict=True))
        new[id(part)] = part if same else part.copy(inner)
    return new[id(expression)]
