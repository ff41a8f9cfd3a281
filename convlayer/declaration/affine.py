"""CVXPY expression -> Table: an affine map of the variables whose coefficients are affine in the
parameters, kept sparse and exact.

    row i:   sum over entries e with row_e = i of  coefficient_e * theta[parameter_e] * x[variable_e]

Entries are numbered as CVXPY stacks them, column-major, variables and parameters each in one long
vector; NONE stands for 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import cvxpy as cp
import numpy as np
import scipy.sparse as sp

from convlayer.declaration.cvxpy_internals import (
    AddExpression,
    Atom,
    Concatenate,
    DivExpression,
    Hstack,
    MulExpression,
    NegExpression,
    Power,
    Promote,
    Sum,
    Vstack,
    broadcast_to,
    cumsum,
    diag_mat,
    diag_vec,
    index,
    multiply,
    reshape,
    special_index,
    transpose,
    upper_tri,
)
from convlayer.declaration.graph import Contents, arguments_first

# In the place of a variable or a parameter, where an entry has none: an index that finds the 1
# behind a long vector.
NONE = -1
# The longest running sum that is read: its matrix is a full triangle.
LONGEST_RUNNING_SUM = 2000
# A reader gives up when its tables, or the terms of one product, hold more entries than these and
# so many for each entry of what they are made of: the problem then goes the generic way, whose map
# CVXPY makes.
ENTRIES_AT_LEAST, ENTRIES_A_LEAF = 10_000_000, 8
# Tables of at most so many entries may keep duplicates until they are asked for: adding them up
# would cost more.
FEW_ENTRIES = 64


class UnsupportedError(Exception):
    """An expression whose affine map is not read; the problem goes the generic way."""


@dataclass(frozen=True, eq=False)
class Table:
    """An affine map with `size` rows; see the module."""

    size: int
    row: np.ndarray  # int64, as variable and parameter
    variable: np.ndarray
    parameter: np.ndarray
    coefficient: np.ndarray

    @classmethod
    def of_constant(cls, value: Any) -> Table:
        """An array of numbers, dense or sparse, column-major."""
        if sp.issparse(value):
            part = sp.coo_array(value)
            row = part.row.astype(np.int64) + part.shape[0] * part.col.astype(np.int64)
            return cls(
                int(np.prod(part.shape)),
                row,
                nothing(len(row)),
                nothing(len(row)),
                part.data.astype(float),
            )
        flat = np.asarray(value, dtype=float).ravel(order="F")
        row = np.flatnonzero(flat)
        return cls(len(flat), row, nothing(len(row)), nothing(len(row)), flat[row])

    @classmethod
    def zero(cls, size: int) -> Table:
        """Rows of zeros."""
        return cls.of_constant(np.zeros(size))

    def take(self, which: np.ndarray) -> Table:
        """The entries `which`, with the same rows."""
        return Table(
            self.size,
            *(part[which] for part in (self.row, self.variable, self.parameter, self.coefficient)),
        )

    def scaled(self, factor: float | np.ndarray) -> Table:
        """Times a number, or one number a row."""
        scale = factor[self.row] if isinstance(factor, np.ndarray) else factor
        return replace(self, coefficient=self.coefficient * scale)

    @cached_property
    def normal(self) -> Table:
        """Sorted by row, variable, parameter, with duplicates added and zeros dropped."""
        part = self
        keys = (self.row, self.variable, self.parameter)
        if not _ascending(keys):
            part = self.take(_sorting(keys))
            keys = (part.row, part.variable, part.parameter)
        new = np.ones(len(part.row), dtype=bool)
        if len(new) > 1:
            new[1:] = (np.diff(keys[0]) != 0) | (np.diff(keys[1]) != 0) | (np.diff(keys[2]) != 0)
        if not new.all():
            total = np.add.reduceat(part.coefficient, np.flatnonzero(new))
            # What cancels to rounding cancels.
            noise = np.add.reduceat(np.abs(part.coefficient), np.flatnonzero(new)) * 1e-15
            part = replace(part.take(new), coefficient=np.where(np.abs(total) < noise, 0.0, total))
        return part if part.coefficient.all() else part.take(part.coefficient != 0)

    @cached_property
    def by_row(self) -> tuple[np.ndarray, np.ndarray]:
        """(order, pointer): the entries of row i are order[pointer[i]:pointer[i + 1]]."""
        return _groups(self.row, self.size)

    def linear(self) -> Table:
        """Without the entries that have no variable."""
        return self._parts[0]

    def offset(self) -> Table:
        """The entries that have no variable."""
        return self._parts[1]

    @cached_property
    def _parts(self) -> tuple[Table, Table]:
        moving = self.variable != NONE
        if moving.all():
            return self, Table.zero(self.size)
        return self.take(np.flatnonzero(moving)), self.take(np.flatnonzero(~moving))

    def __getstate__(self) -> dict:
        # Neither copies nor pickles carry what can be worked out again.
        return {
            name: self.__dict__[name]
            for name in ("size", "row", "variable", "parameter", "coefficient")
        }

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)


def _ascending(keys: Sequence[np.ndarray]) -> bool:
    tied = np.ones(max(len(keys[0]) - 1, 0), dtype=bool)
    for key in keys:
        step = np.diff(key)
        if (step[tied] < 0).any():
            return False
        tied = tied & (step == 0)
    return True


def _sorting(keys: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
    """The order by row, then variable, then parameter."""
    row, variable, parameter = keys
    variables, parameters = int(variable.max()) + 2, int(parameter.max()) + 2  # NONE counts
    if (int(row.max()) + 1) * variables * parameters >= 2**62:
        return np.lexsort(keys[::-1])
    # One key for three; what is sorted in runs already takes little time.
    return np.argsort((row * variables + variable + 1) * parameters + parameter + 1, kind="stable")


def _groups(key: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(key, kind="stable")
    return order, np.concatenate([[0], np.cumsum(np.bincount(key, minlength=size))]).astype(
        np.int64
    )


def nothing(count: int) -> np.ndarray:
    """The variables, or the parameters, of so many entries that have none."""
    return np.full(count, NONE, dtype=np.int64)


def picked(table: Table, which: np.ndarray) -> Table:
    """The rows `which` of a table, in that order; NONE picks a row of zeros."""
    row = np.flatnonzero(which != NONE)
    return composed(Table(len(which), row, which[row], nothing(len(row)), np.ones(len(row))), table)


def stack(tables: Sequence[Table]) -> Table:
    """Rows below each other."""
    starts = np.concatenate([[0], np.cumsum([t.size for t in tables])]).astype(np.int64)
    if len(tables) == 1:
        return tables[0]
    rows = [t.row + start for t, start in zip(tables, starts[:-1], strict=True)]
    return Table(int(starts[-1]), *_joined(tables, rows))


def selected_rows(table: Table, kept: np.ndarray) -> Table:
    """Only the rows `kept` (bool), in order."""
    if kept.all():
        return table
    part = table.take(kept[table.row])
    return replace(part, size=int(kept.sum()), row=(np.cumsum(kept) - 1)[part.row])


def add(tables: Sequence[Table]) -> Table:
    """The sum of maps with as many rows."""
    return (
        tables[0]
        if len(tables) == 1
        else Table(tables[0].size, *_joined(tables, [t.row for t in tables]))
    )


def _joined(tables: Sequence[Table], rows: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    if not tables:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    parts = (
        [t.variable for t in tables],
        [t.parameter for t in tables],
        [t.coefficient for t in tables],
    )
    return (np.concatenate(rows), *(np.concatenate(part) for part in parts))


def composed(first: Table, second: Table) -> Table:
    """first(y) with y = second(x): the variables of `first` are the rows of `second`."""
    inner = first.take(first.variable != NONE)
    ours, theirs = _pairs(inner.variable, second.by_row)
    outer = first.offset()
    return Table(
        first.size,
        np.concatenate([outer.row, inner.row[ours]]),
        np.concatenate([outer.variable, second.variable[theirs]]),
        np.concatenate(
            [outer.parameter, _one_of_two(inner.parameter[ours], second.parameter[theirs])]
        ),
        np.concatenate([outer.coefficient, inner.coefficient[ours] * second.coefficient[theirs]]),
    )


def _pairs(key: np.ndarray, groups: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Each position in `key` with every member of the group that it names: (positions, members)."""
    order, pointer = groups
    count = np.diff(pointer)[key]
    if int(count.sum()) > ENTRIES_AT_LEAST + ENTRIES_A_LEAF * (len(key) + len(order)):
        raise UnsupportedError("its map has too many terms")
    positions = np.repeat(np.arange(len(key)), count)
    within = np.arange(len(positions)) - np.repeat(np.cumsum(count) - count, count)
    return positions, order[within + np.repeat(pointer[key], count)]


def weigh(weight: Table, argument: Table) -> Table:
    """The one row sum_i weight_i argument_i."""
    first = Table(
        1, np.zeros(len(weight.row), np.int64), weight.row, weight.parameter, weight.coefficient
    )
    return composed(first, argument)


def _one_of_two(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    if ((left != NONE) & (right != NONE)).any():
        raise UnsupportedError("a product of parameters")
    return np.maximum(left, right)


class Reader:
    """Reads the tables of a problem's affine expressions: each part of them once, wherever it is
    used, arguments first."""

    def __init__(
        self, variables: Sequence[cp.Variable], parameters: Sequence[cp.Parameter]
    ) -> None:
        self._variables = {
            v.id: start for v, start in zip(variables, starts(variables), strict=False)
        }
        self._parameters = {
            p.id: start for p, start in zip(parameters, starts(parameters), strict=False)
        }
        self._memory: dict[int, tuple[Any, Table]] = {}
        self._leaves = self._made = 0  # entries of tables
        self.contents = Contents()

    def table(self, expression: Any) -> Table:
        """The rows of `expression` in column-major order. UnsupportedError: its map cannot be read,
        or not within reason."""
        if id(expression) not in self._memory:
            for part in arguments_first([expression], self._is_open):
                if id(part) not in self._memory:
                    # The expression is kept with its table: its address is its key.
                    self._memory[id(part)] = (part, self._counted(part, self._read(part)))
        return self._memory[id(expression)][1]

    def _is_open(self, part: Any) -> bool:
        """Whether its table is made of its arguments'."""
        if id(part) in self._memory or not part.args or self.contents.constant(part):
            return False
        if not isinstance(part, _READ) and not _is_identity(part):
            self._require_affine(part)
        return True

    def _counted(self, part: Any, table: Table) -> Table:
        if not part.args:
            self._leaves += len(table.row)
            return table
        if len(table.row) > FEW_ENTRIES and not isinstance(part, _MOVING):
            # Sums of sums would double at each step.
            table = table.normal
        self._made += len(table.row)
        if self._made > ENTRIES_AT_LEAST + ENTRIES_A_LEAF * self._leaves:
            raise UnsupportedError("its maps have too many terms")
        return table

    def _read(self, expression: Any) -> Table:
        """From the tables of its arguments."""
        if isinstance(expression, cp.Variable):
            if expression.attributes["diag"] or expression.sparse_idx is not None:
                raise UnsupportedError(f"Variable `{expression.name()}` has a sparsity pattern")
            return _leaf(self._variables[expression.id], expression.size, variable=True)
        if isinstance(expression, cp.Parameter):
            return _leaf(self._parameters[expression.id], expression.size, variable=False)
        if self.contents.constant(expression):
            value = expression.value
            if np.iscomplexobj(value):
                raise UnsupportedError("a complex expression")
            return Table.of_constant(value)
        tables = [self._memory[id(argument)][1] for argument in expression.args]
        if _is_identity(expression):
            return tables[0]
        for kinds, read in _READERS:
            if isinstance(expression, kinds):
                return read(expression, tables)
        return self._by_cvxpy(expression)

    def operator(self, expression: Any) -> tuple[Table, list[Any]]:
        """An affine atom as a map of its arguments: (table whose variables are their entries, the
        arguments that have variables)."""
        moving = [argument for argument in expression.args if self.contents.variables(argument)]
        moving = list({id(argument): argument for argument in moving}.values())
        standins = {id(argument): cp.Variable(argument.shape) for argument in moving}
        inner = Reader(list(standins.values()), [])
        inner._parameters = self._parameters
        return inner.table(
            expression.copy([standins.get(id(a), a) for a in expression.args])
        ), moving

    def _require_affine(self, expression: Any) -> None:
        """Of an atom that is read through CVXPY's own matrix of it."""
        bearing = [a for a in expression.args if not self.contents.constant(a)]
        if (
            not isinstance(expression, Atom)
            or not expression.is_atom_convex()
            or not expression.is_atom_concave()
        ):
            raise UnsupportedError(f"`{type(expression).__name__}` is not affine")
        if len(bearing) > 1 and any(not self.contents.variables(a) for a in bearing):
            raise UnsupportedError(f"`{type(expression).__name__}` of a Parameter and a variable")
        if isinstance(expression, cumsum) and expression.size > LONGEST_RUNNING_SUM:
            raise UnsupportedError("a running sum of many terms, whose matrix is dense")

    def _by_cvxpy(self, expression: Any) -> Table:
        """Through CVXPY's own matrix of the atom."""
        bearing = [a for a in expression.args if not self.contents.constant(a)]
        standins = {id(a): cp.Variable(a.shape) for a in bearing}
        copy = expression.copy([standins.get(id(a), a) for a in expression.args])
        random = np.random.default_rng(0)
        points = [
            [
                random.standard_normal(a.shape) if id(a) in standins else a.value
                for a in expression.args
            ]
            for _ in "ab"
        ]
        here, there = (
            np.asarray(copy.numeric(point), dtype=float).ravel(order="F") for point in points
        )
        gradients = [
            g
            for g, a in zip(copy._grad(points[0]), expression.args, strict=True)
            if id(a) in standins
        ]
        if any(g is None or np.ndim(g) != 2 for g in gradients):
            raise UnsupportedError(f"`{type(expression).__name__}` is not read")
        matrix = sp.coo_array(sp.vstack([sp.csc_array(g) for g in gradients]).T)
        vector, other = (
            np.concatenate(
                [
                    v.ravel(order="F")
                    for v, a in zip(point, expression.args, strict=True)
                    if id(a) in standins
                ]
            )
            for point in points
        )
        offset = here - matrix @ vector
        if not np.allclose(matrix @ other + offset, there, rtol=1e-10, atol=1e-10):
            raise UnsupportedError(f"`{type(expression).__name__}` is not read")
        row, column = matrix.row.astype(np.int64), matrix.col.astype(np.int64)
        linear = Table(expression.size, row, column, nothing(len(row)), matrix.data.astype(float))
        first = add(
            [
                linear,
                Table.of_constant(
                    np.where(np.abs(offset) <= 1e-13 * (1 + np.abs(here)), 0.0, offset)
                ),
            ]
        )
        return composed(first, stack([self._memory[id(a)][1] for a in bearing]))


def _is_identity(expression: Any) -> bool:
    return isinstance(expression, Power) and _is_one(expression.p)


def _is_one(p: Any) -> bool:
    return (not isinstance(p, cp.Expression) and p == 1) or (
        isinstance(p, cp.Constant) and p.value == 1
    )


def starts(leaves: Sequence[Any]) -> list[int]:
    """Where each leaf begins in the long vector, and its length at last."""
    return np.concatenate([[0], np.cumsum([leaf.size for leaf in leaves])]).astype(int).tolist()


def _leaf(start: int, size: int, variable: bool) -> Table:
    row = np.arange(size)
    here, nowhere = row + start, nothing(size)
    return Table(
        size, row, here if variable else nowhere, nowhere if variable else here, np.ones(size)
    )


def _gather(expression: Any, tables: list[Table]) -> Table:
    """An atom that moves entries about, read off by moving their numbers, 1, 2, ...; 0 is a
    zero."""
    sizes = np.concatenate([[0], np.cumsum([a.size for a in expression.args])]).astype(int)
    numbers = [
        np.arange(start + 1, stop + 1, dtype=float).reshape(argument.shape, order="F")
        for start, stop, argument in zip(sizes[:-1], sizes[1:], expression.args, strict=True)
    ]
    moved = np.asarray(expression.numeric(numbers)).ravel(order="F").astype(np.int64) - 1
    return picked(stack(tables), moved)


def _sum(expression: Any, tables: list[Table]) -> Table:
    return replace(tables[0], size=expression.size, row=summed_into(expression)[tables[0].row])


def summed_into(expression: Any) -> np.ndarray:
    """For each entry of an axis atom's argument, the entry of the atom that it goes into."""
    shape = expression.args[0].shape
    kept = np.sum(np.zeros(shape), axis=expression.axis, keepdims=True).shape
    return np.broadcast_to(np.arange(expression.size).reshape(kept, order="F"), shape).ravel(
        order="F"
    )


def _add(expression: Any, tables: list[Table]) -> Table:
    widened = [
        _widen(t, a.shape, expression.shape) for t, a in zip(tables, expression.args, strict=True)
    ]
    return add(widened)


def _widen(table: Table, shape: tuple[int, ...], wanted: tuple[int, ...]) -> Table:
    if tuple(shape) == tuple(wanted):
        return table
    moved = np.broadcast_to(np.arange(table.size).reshape(shape, order="F"), wanted).ravel(
        order="F"
    )
    return picked(table, moved)


def _product(left: Table, right: Table, expression: Any) -> Table:
    """left and right with as many rows: row by row, as a table of two factors of which one has no
    variable."""
    factor, argument = (left, right) if not (left.variable != NONE).any() else (right, left)
    if (factor.variable != NONE).any():
        raise UnsupportedError(f"`{type(expression).__name__}` of two variables")
    return composed(replace(factor, variable=factor.row), argument)


def _multiply(expression: Any, tables: list[Table]) -> Table:
    left, right = (
        _widen(t, a.shape, expression.shape) for t, a in zip(tables, expression.args, strict=True)
    )
    return _product(left, right, expression)


def _divide(expression: Any, tables: list[Table]) -> Table:
    left, right = (
        _widen(t, a.shape, expression.shape) for t, a in zip(tables, expression.args, strict=True)
    )
    if (right.variable != NONE).any() or (right.parameter != NONE).any():
        raise UnsupportedError("a division by a Parameter")
    divisor = np.zeros(right.size)
    divisor[right.row] = right.coefficient
    return left.scaled(1.0 / divisor)


def _matmul(expression: Any, tables: list[Table]) -> Table:
    """C @ X or X @ C with a C that has no variable: entry (i, k) = sum_j left_ij right_jk."""
    left, right = tables
    if max(len(a.shape) for a in expression.args) > 2:
        raise UnsupportedError("a product of more than two dimensions")
    rows = expression.args[0].shape[0] if len(expression.args[0].shape) == 2 else 1
    inner = expression.args[0].shape[-1] if expression.args[0].shape else 1
    columns = expression.args[1].shape[1] if len(expression.args[1].shape) == 2 else 1
    if (left.variable != NONE).any() and (right.variable != NONE).any():
        raise UnsupportedError("a product of two variables")
    # Pairs of entries with the same j: those of the right factor, each with the column j of the
    # left one.
    j, k = right.row % inner, right.row // inner
    theirs, ours = _pairs(j, _groups(left.row // rows, inner))
    return Table(
        rows * columns,
        left.row[ours] % rows + rows * k[theirs],
        np.maximum(left.variable[ours], right.variable[theirs]),
        _one_of_two(left.parameter[ours], right.parameter[theirs]),
        left.coefficient[ours] * right.coefficient[theirs],
    )


# Atoms that move entries about, and leave their values as they are.
_GATHERS = (index, special_index, reshape, transpose, Promote, broadcast_to, Vstack, Hstack, Concatenate, diag_vec, diag_mat, upper_tri)  # fmt: skip
# How the table of an atom is made of its arguments' tables; of every other atom through CVXPY's own
# matrix of it.
_READERS: list[tuple[Any, Callable[[Any, list[Table]], Table]]] = [
    (_GATHERS, _gather),
    (AddExpression, _add),
    (NegExpression, lambda _, tables: tables[0].scaled(-1.0)),
    (Sum, _sum),
    (multiply, _multiply),
    (DivExpression, _divide),
    (MulExpression, _matmul),
]
# The atoms that are read without CVXPY's matrix.
_READ = tuple(
    kind for kinds, _ in _READERS for kind in (kinds if isinstance(kinds, tuple) else (kinds,))
)
# Atoms in which no two entries meet in one, so that none is to be added to another.
_MOVING = (*_GATHERS, NegExpression)
