"""The reduced problem's affine expressions as tables: what its parametrised cone program is made
of.

CVXPY's own stuffing keeps, for every parameter entry, a place for every entry of the program's
matrices: memory grows with their product. Here each coefficient is stored once, where it is:

    linear      q'x + d                     one row
    quadratic   1/2 x'P x                   row i, variable j: entry (i, j) of P, or two that add
    cones       s = A'x + b in K            rows as CVXPY stacks them before it formats them
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cvxpy as cp
import numpy as np
import scipy.sparse as sp

from convlayer.declaration.affine import (
    NONE,
    Reader,
    Table,
    UnsupportedError,
    add,
    composed,
    nothing,
    stack,
)
from convlayer.declaration.cvxpy_internals import CoeffExtractor, QuadForm, SymbolicQuadForm
from convlayer.declaration.graph import rewritten


@dataclass(frozen=True, eq=False)
class Coefficients:
    """See the module."""

    linear: Table
    quadratic: Table
    cones: Table
    stuffed: list[Any]  # what CVXPY's own matrices were made of, dense in variables and parameters


def read(
    objective: Any,
    constraints: Sequence[Any],
    variables: Sequence[cp.Variable],
    parameters: Sequence[cp.Parameter],
    tensors: Callable[[], CoeffExtractor],
) -> Coefficients:
    """Of an objective, affine but for quadratic forms, and of the arguments of constraints; what is
    not read is taken from CVXPY's own `tensors`."""
    n = sum(variable.size for variable in variables)
    reader, stuffed = Reader(variables, parameters), []
    try:
        linear, quadratic = _objective(objective, variables, parameters, n)
    except UnsupportedError:
        P, q = tensors().quad_form(objective.copy())
        linear, quadratic = _of_tensor(q, 1, n), _of_tensor(P, n, n).scaled(2.0)
        stuffed.append(objective)

    cones = [Table.zero(0)]
    for constraint in constraints:
        try:
            cones += [reader.table(argument) for argument in constraint.args]
        except UnsupportedError:
            size = sum(argument.size for argument in constraint.args)
            cones.append(_of_tensor(tensors().affine(list(constraint.args)), size, n))
            stuffed.append(constraint)
    return Coefficients(linear, quadratic, stack(cones), stuffed)


def _objective(
    objective: Any, variables: Sequence[cp.Variable], parameters: Sequence[cp.Parameter], n: int
) -> tuple[Table, Table]:
    """(linear, quadratic)"""
    affine, forms = _without_forms(objective)
    # Placeholders stand behind the variables.
    reader = Reader([*variables, *forms], parameters)
    head = reader.table(affine).normal
    first, quadratic = n, [Table.zero(n)]
    starts = {variable.id: start for variable, start in _starts(variables)}
    for place, form in forms.items():
        inside = (head.variable >= first) & (head.variable < first + place.size)
        part = head.take(np.flatnonzero(inside))
        rows = part.variable - first
        weights = Table(place.size, rows, nothing(len(rows)), part.parameter, part.coefficient)
        quadratic.append(_quadratic(form, weights, reader, starts[form.args[0].id], n))
        first += place.size
    own = head.variable < n  # so is NONE
    return head.take(np.flatnonzero(own)), add(quadratic).normal


def _starts(variables: Sequence[cp.Variable]) -> list[tuple[cp.Variable, int]]:
    ends = np.cumsum([0, *(variable.size for variable in variables)]).tolist()
    return list(zip(variables, ends[:-1], strict=True))


def _without_forms(objective: Any) -> tuple[Any, dict[cp.Variable, Any]]:
    """The objective with a variable in the place of each quadratic form, and these forms."""
    forms: dict[cp.Variable, Any] = {}

    def placed(part: Any, _: list[Any]) -> Any:
        if not isinstance(part, (SymbolicQuadForm, QuadForm)):
            return None
        place = cp.Variable(part.shape)
        forms[place] = part
        return place

    new = rewritten([objective], placed, lambda part: isinstance(part, cp.Expression))
    return new.get(id(objective), objective), forms


def _quadratic(form: Any, weights: Table, reader: Reader, start: int, n: int) -> Table:
    """Twice the sum of the form's entries, each times its weight: x'Q x = 1/2 x'(2 Q) x."""
    side = form.args[0].size
    matrix = reader.table(form.args[1])
    row, column = matrix.row % side, matrix.row // side
    if weights.size == 1:
        output, entry = np.zeros(len(row), np.int64), np.arange(len(row))
    else:
        output, entry = _outputs(form, row, column, side)
    # Entry e of Q in output k of the form: weight_k Q_e.
    pairs = Table(
        len(entry), np.arange(len(entry)), output, nothing(len(entry)), np.ones(len(entry))
    )
    weighted = composed(pairs, weights)
    parameter = matrix.parameter[entry][weighted.row]
    if ((parameter != NONE) & (weighted.parameter != NONE)).any():
        raise UnsupportedError("a product of parameters")
    e = entry[weighted.row]
    return Table(
        n,
        start + row[e],
        start + column[e],
        np.maximum(parameter, weighted.parameter),
        2.0 * weighted.coefficient * matrix.coefficient[e],
    )


def _outputs(form: Any, row: np.ndarray, column: np.ndarray, side: int) -> tuple[np.ndarray, ...]:
    """Of a form with many outputs: (output, entry) for each entry of its matrix in each output that
    it is in."""
    if form.block_indices is None:  # one variable each
        entry = np.flatnonzero(row == column)
        return row[entry], entry
    lengths = [len(block) for block in form.block_indices]
    block = np.repeat(np.arange(len(lengths)), lengths)
    inside = np.concatenate([np.asarray(one, np.int64).ravel() for one in form.block_indices])
    held = sp.csc_array((np.ones(len(block)), (block, inside)), shape=(len(lengths), side))
    both = sp.coo_array(held[:, row].multiply(held[:, column]))
    return both.row.astype(np.int64), both.col.astype(np.int64)


def _of_tensor(tensor: sp.csc_array, size: int, n: int) -> Table:
    part = sp.coo_array(tensor)
    place, parameter = part.row.astype(np.int64), part.col.astype(np.int64)
    variable = place // max(size, 1)
    return Table(
        size,
        place % max(size, 1),
        np.where(variable == n, NONE, variable),
        np.where(parameter == part.shape[1] - 1, NONE, parameter),
        part.data.astype(float),
    )
