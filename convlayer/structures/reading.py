"""Reading a normal form: the questions that several structures ask of it. Each answers, or says why
not (MismatchError)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from convlayer.declaration.affine import NONE, Table, UnsupportedError, add, composed, nothing
from convlayer.declaration.atoms.atom import NormalAtom
from convlayer.declaration.atoms.entropy import Entropy
from convlayer.declaration.atoms.square import Square
from convlayer.declaration.binding import Binding
from convlayer.declaration.normal_form import Constraint, NormalForm
from convlayer.structures.structure import Dual, MismatchError


def require(condition: bool, reason: str) -> None:
    """Ends a match, with the reason, unless the condition holds."""
    if not condition:
        raise MismatchError(reason)


def only(form: NormalForm, *atoms: type[NormalAtom], tied: bool = False) -> None:
    """The objective has no other atoms than these, and everything was read; variables are free of
    ties, unless `tied`."""
    require(
        not form.others,
        f"it has {form.others[0] if form.others else ''}, which this structure does not know",
    )
    for atom, _ in form.present:
        require(isinstance(atom, atoms), f"its objective has {atom.words}")
    require(tied or not form.tied, f"variable `{form.tied[0] if form.tied else ''}` is symmetric")


def linear_cost(form: NormalForm) -> Table:
    """c, one row an entry of x."""
    part = form.linear.linear()
    return Table(form.n, part.variable, nothing(len(part.row)), part.parameter, part.coefficient)


def moved(table: Table) -> np.ndarray:
    """The variables that a Parameter multiplies in a table."""
    return table.variable[(table.variable != NONE) & (table.parameter != NONE)]


def one_value(table: Table, size: int, reason: str) -> Table:
    """The single row that every one of `size` rows of a table without variables equals."""
    table = table.normal
    require(size > 0 and len(table.row) % size == 0, reason)
    width = len(table.row) // size
    require(width > 0 and bool((table.row == np.repeat(np.arange(size), width)).all()), reason)
    parameter, coefficient = (
        table.parameter.reshape(size, width),
        table.coefficient.reshape(size, width),
    )
    require(bool((parameter == parameter[0]).all()), reason)
    # Weights such as 0.1 and 1 / 10 differ in their last bit only.
    require(np.allclose(coefficient, coefficient[0], rtol=1e-12, atol=0.0), reason)
    return Table(1, np.zeros(width, dtype=np.int64), nothing(width), parameter[0], coefficient[0])


def is_whole_parameter(form: NormalForm, table: Table, size: int) -> bool:
    """Whether the rows of a table without variables, a square matrix, are one Parameter, or its
    transpose, times a number, and no other part of the problem reads that Parameter."""
    table = table.normal
    mirrored = np.arange(size * size).reshape(size, size).T.ravel()
    if (
        len(table.row) != size * size
        or (table.parameter == NONE).any()
        or (table.coefficient != table.coefficient[0]).any()
    ):
        return False
    first = int(table.parameter.min())
    entry = table.parameter - first
    if first not in form.parameter_starts or not (
        np.array_equal(entry, table.row) or np.array_equal(entry, mirrored[table.row])
    ):
        return False
    last = first + size * size
    reads = sum(int(((t.parameter >= first) & (t.parameter < last)).sum()) for t in form.tables)
    return reads == size * size


def is_one(row: Table) -> bool:
    """Whether a single row without variables is the number 1."""
    row = row.normal
    return len(row.row) == 1 and row.parameter[0] == NONE and row.coefficient[0] == 1.0


def alone(argument: Table, reason: str) -> tuple[np.ndarray, np.ndarray]:
    """(variable, coefficient) of each row, where each holds a single variable times a number."""
    part = argument.linear().normal
    require(
        len(part.row) == argument.size and bool((part.row == np.arange(argument.size)).all()),
        reason,
    )
    require(bool((part.parameter == NONE).all()), reason)
    return part.variable, part.coefficient


@dataclass(frozen=True, eq=False)
class Separable:
    """1/2 sum_j curvature_j x_j^2 + slope'x: two tables with a row an entry of x."""

    curvature: Table
    slope: Table


def separable(form: NormalForm) -> Separable:
    """The squares and the linear part, where no square couples two variables."""
    squares = form.of(Square)
    weight, argument = squares.weight, squares.argument
    moving = np.zeros(argument.size, dtype=bool)
    moving[argument.row[argument.variable != NONE]] = True
    weight = weight.take(moving[weight.row])
    part = argument.linear().normal
    require(len(np.unique(part.row)) == len(part.row), "a square couples two variables")
    require(bool((part.parameter == NONE).all()), "a Parameter multiplies a variable in a square")
    variable, factor = np.zeros(argument.size, dtype=np.int64), np.zeros(argument.size)
    variable[part.row], factor[part.row] = part.variable, part.coefficient
    curvature = Table(
        form.n,
        variable[weight.row],
        nothing(len(weight.row)),
        weight.parameter,
        2 * weight.coefficient * factor[weight.row] ** 2,
    )
    cross = Table(
        form.n,
        variable[weight.row],
        weight.row,
        weight.parameter,
        2 * weight.coefficient * factor[weight.row],
    )
    try:
        slope = add([linear_cost(form), composed(cross, argument.offset())]).normal
    except UnsupportedError:
        raise MismatchError("a weight that is a Parameter multiplies another Parameter") from None
    return Separable(curvature.normal, slope)


def over(
    form: NormalForm, curvature: Table, bind: Callable[[Table], Binding], table: Table
) -> Callable[[Sequence[Tensor], Tensor], tuple[Tensor, Tensor | None]]:
    """A table over the one row `curvature`: (values, like) -> the quotient, and the rows (b,) where
    there is nothing to divide by, the objective being linear there, or nearly; None where the
    curvature is a number."""
    if (curvature.parameter == NONE).all():
        scaled = bind(table.scaled(1.0 / float(curvature.coefficient.sum())))
        return lambda values, like: (scaled(values, like), None)
    numerator, denominator = bind(table), rows_binding(form, curvature)
    return lambda values, like: _divided(numerator(values, like), denominator(values, like))


def _divided(value: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor]:
    quotient = value / curvature
    flat = ~((curvature[:, 0] > 0) & torch.isfinite(quotient.sum(1)))
    if bool(flat.any()):
        # Not by the quotient times zero: its gradient would be NaN.
        quotient = value / torch.where(flat[:, None], 1.0, curvature)
        quotient = torch.where(flat[:, None], 0.0, quotient)
    return quotient, flat


@dataclass(frozen=True, eq=False)
class Equality:
    """One row: sum_j coefficient_j x_j = right side, the coefficients numbers; `right` is a table
    with one row."""

    constraint: int  # among the normal form's
    row: int  # of the constraint's table
    variable: np.ndarray
    coefficient: np.ndarray
    offset: Table  # the row's own, without variables: right = -offset


def equalities(form: NormalForm) -> list[Equality]:
    """The rows of the equality constraints, with numbers for coefficients."""
    rows = []
    for k, constraint in enumerate(form.constraints):
        if constraint.cone != "zero":
            continue
        table = constraint.table
        order, pointer = table.by_row
        for row in range(table.size):
            part = table.take(order[pointer[row] : pointer[row + 1]])
            moving, rest = part.linear(), part.offset()
            require(
                bool((moving.parameter == NONE).all()),
                f"a Parameter multiplies a variable in `{constraint.text}`",
            )
            require(len(moving.row) > 0, f"`{constraint.text}` constrains no variable")
            offset = replace(rest, size=1, row=np.zeros(len(rest.row), dtype=np.int64))
            rows.append(Equality(k, row, moving.variable, moving.coefficient, offset))
    return rows


@dataclass(frozen=True, eq=False)
class Signs:
    """The rows x_j >= 0."""

    nonnegative: np.ndarray  # (n,) bool
    # by constraint: (variable, positive coefficient) of each row
    rows: dict[int, tuple[np.ndarray, np.ndarray]]
    repeated: bool  # some x_j is said nonnegative twice: its multiplier is not unique


def signs(form: NormalForm) -> Signs:
    """The inequality constraints, where all of them say x_j >= 0."""
    count = np.zeros(form.n, dtype=np.int64)
    rows = {}
    for k, constraint in enumerate(form.constraints):
        if constraint.cone != "nonnegative":
            continue
        reason = f"`{constraint.text}` is more than a sign"
        variable, coefficient = alone(constraint.table, reason)
        require(not len(constraint.table.offset().row) and bool((coefficient > 0).all()), reason)
        np.add.at(count, variable, 1)
        rows[k] = (variable, coefficient)
    return Signs(count > 0, rows, bool((count > 1).any()))


def no_cones(form: NormalForm, *cones: str) -> None:
    """No constraint is in another cone than these."""
    words = {
        "zero": "an equality",
        "nonnegative": "an inequality",
        "psd": "a semidefinite constraint",
    }
    for constraint in form.constraints:
        require(constraint.cone in cones, f"`{constraint.text}` is {words[constraint.cone]}")


def in_cone(form: NormalForm, cone: str) -> list[tuple[int, Constraint]]:
    """The constraints of one cone, each with its place among all."""
    return [(k, c) for k, c in enumerate(form.constraints) if c.cone == cone]


def rows_binding(form: NormalForm, table: Table) -> Binding:
    """The rows of a table without variables, (rows,)."""
    return Binding.of_rows(table.normal, form.parameters, form.parameter_starts)


def binding(
    form: NormalForm,
    shape: tuple[int, ...],
    target: np.ndarray,
    parameter: np.ndarray,
    coefficient: np.ndarray,
) -> Binding:
    """An input of a kernel, by place: coefficient times parameter, added up at the target."""
    return Binding(shape, target, parameter, coefficient, form.parameters, form.parameter_starts)


def words(form: NormalForm, **inputs: Sequence[Table] | Table | Binding) -> str:
    """What each input of a kernel was made of: the parameters' names, or `constant`."""
    said = []
    for name, made in inputs.items():
        if isinstance(made, Binding):
            numbers = made.names
        else:
            tables = [made] if isinstance(made, Table) else list(made)
            numbers = [
                k
                for k, (first, last) in enumerate(
                    zip(form.parameter_starts[:-1], form.parameter_starts[1:], strict=True)
                )
                if any(bool(((t.parameter >= first) & (t.parameter < last)).any()) for t in tables)
            ]
        said.append(
            f"{name} from {', '.join(f'`{form.parameters[k].name()}`' for k in numbers) or 'constants'}"
        )
    return "; ".join(said)


@dataclass(frozen=True, eq=False)
class Placement:
    """Where each entry of x stands in a kernel's array, row-major."""

    position: np.ndarray  # (n,)
    shape: tuple[int, ...]

    @classmethod
    def of(cls, form: NormalForm) -> Placement:
        """One long vector, each variable in torch's order: a whole Parameter of its shape is then
        passed as it is."""
        places = []
        for variable, start in zip(form.variables, form.variable_starts, strict=False):
            entry = np.arange(variable.size).reshape(variable.shape).ravel(order="F")
            places.append(start + entry)
        return cls(np.concatenate(places), (form.n,))

    @classmethod
    def along(cls, order: np.ndarray) -> Placement:
        """A vector of the entries of x in this order."""
        position = np.empty(len(order), dtype=np.int64)
        position[order] = np.arange(len(order))
        return cls(position, (len(order),))

    def binding(self, form: NormalForm, table: Table) -> Binding:
        """A table with a row an entry of x, in this placement."""
        return binding(
            form, self.shape, self.position[table.row], table.parameter, table.coefficient
        )


def plain_entropy(form: NormalForm) -> None:
    """The entropy is that of each entry of x, once."""
    reason = "its entropies are not those of the variables' entries, once each"
    argument = form.of(Entropy).argument
    variable, coefficient = alone(argument, reason)
    require(len(variable) == form.n and len(np.unique(variable)) == form.n, reason)
    require(bool((coefficient == 1.0).all()) and not len(argument.offset().row), reason)


@dataclass(frozen=True, eq=False)
class Total:
    """scale * sum of all entries of x = scale * right."""

    constraint: int
    scale: float
    right: Table


def simplex(form: NormalForm) -> Total:
    """The one equality, if it says what all entries of x sum to."""
    count = sum(constraint.table.size for _, constraint in in_cone(form, "zero"))
    require(count == 1, "it has more than one equality" if count else "it has no equality")
    (row,) = equalities(form)
    require(len(row.variable) == form.n, "its equality does not sum all variables")
    require(bool((row.coefficient == row.coefficient[0]).all()), "its equality is a weighted sum")
    scale = float(row.coefficient[0])
    return Total(row.constraint, scale, row.offset.scaled(-1.0 / scale))


def zero_duals(signed: Signs) -> dict[int, Dual]:
    """Signs that the objective keeps strictly: their multipliers are zero."""
    return {k: Dual(None, v, np.zeros(len(v))) for k, (v, _) in signed.rows.items()}
