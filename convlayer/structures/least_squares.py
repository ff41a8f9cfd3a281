"""Least squares: weighted, with ridge or Tikhonov terms, one or many right-hand sides."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from convlayer.declaration.affine import NONE, Table, composed, nothing, selected_rows, stack
from convlayer.declaration.atoms.atom import Weighted
from convlayer.declaration.atoms.quadratic_form import QuadraticForm
from convlayer.declaration.atoms.square import Square
from convlayer.declaration.binding import Kept
from convlayer.declaration.normal_form import NormalForm
from convlayer.kernels.answer import answered
from convlayer.kernels.least_squares import least_squares
from convlayer.structures.reading import (
    binding,
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
    Match,
    MismatchError,
    Structure,
    Wanted,
    normal,
    uniform,
)

# A constant quadratic form of up to so many variables is factored when the layer is built.
LARGEST_FACTORED = 2000


class LeastSquares(Structure):
    """minimise sum_i w_i (A x - b)_i^2 + sum_j ridge_j x_j^2; of minimum norm where it is not
    unique."""

    name = "least_squares"
    compiled = True
    least_norm = True
    refines = "equality_constrained_qp"

    def declare(self) -> DeclaredProblem:
        A, b, lam, x = (
            cp.Parameter((7, 4)),
            cp.Parameter(7),
            cp.Parameter(nonneg=True),
            cp.Variable(4),
        )
        objective = cp.Minimize(cp.sum_squares(A @ x - b) + lam * cp.sum_squares(x))
        return cp.Problem(objective), [A, b, lam], [x]

    def sample(self, batch: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
        return (
            normal(generator, *batch, 7, 4),
            normal(generator, *batch, 7),
            uniform(generator, 0.1, 1, *batch),
        )

    def near_misses(self) -> dict[str, DeclaredProblem]:
        A, b, x, lam = (
            cp.Parameter((7, 4)),
            cp.Parameter(7),
            cp.Variable(4),
            cp.Parameter(nonneg=True),
        )
        fit = cp.sum_squares(A @ x - b)
        problems = {
            "a sign": (fit, [x >= 0], [A, b]),
            "an equality": (fit, [cp.sum(x) == 1], [A, b]),
            "the l1 norm": (fit + lam * cp.norm1(x), [], [A, b, lam]),
            "the norm itself": (cp.norm(A @ x - b), [], [A, b]),
            "a linear term": (fit + lam * cp.sum(x), [], [A, b, lam]),
            "a fourth power": (fit + cp.sum(cp.power(x, 4)), [], [A, b]),
            "huber": (cp.sum(cp.huber(A @ x - b)), [], [A, b]),
            "positive part": (cp.sum_squares(cp.pos(A @ x - b)), [], [A, b]),
            "the norm of a matrix": (
                fit + cp.square(cp.norm(cp.reshape(x, (2, 2), order="C"), 2)),
                [],
                [A, b],
            ),
        }
        declared = {
            k: (cp.Problem(cp.Minimize(f), rules), leaves, [x])
            for k, (f, rules, leaves) in problems.items()
        }
        y = cp.Variable(4, nonneg=True)
        return {
            **declared,
            "a signed variable": (cp.Problem(cp.Minimize(cp.sum_squares(A @ y - b))), [A, b], [y]),
        }

    def match(self, form: NormalForm) -> Match:
        # Is it this problem, with every coefficient?
        only(form, Square, QuadraticForm)
        no_cones(form)
        require(not (form.linear.variable != NONE).any(), "its objective has a linear term")
        squares = _squares(form)
        require(squares.size > 0, "its objective has no squares")
        require(
            _is_nonnegative(form, squares.weight),
            "a square has a weight that is not nonnegative for itself",
        )

        # Ridge, and the rows of one problem or of many equal ones.
        ridge, rows = _split(squares, form.n)
        blocks = _blocks(form, rows, ridge) or _Blocks(rows, ridge, np.arange(form.n), form.n, 1)
        m, n, k = blocks.rows.size // blocks.k, blocks.n, blocks.k
        level = _level(blocks.rows.weight, blocks.rows.size)

        # The kernel, bound to the parameters once the structure is chosen.
        def build(wanted: Wanted):
            argument = blocks.rows.argument
            linear, offset = argument.linear(), argument.offset()
            own = linear.row < m
            linear = linear.take(own)
            A = binding(
                form, (m, n), linear.row * n + linear.variable, linear.parameter, linear.coefficient
            )
            place = (offset.row % m) * k + offset.row // m if m else offset.row
            b = binding(form, (m, k), place, offset.parameter, -offset.coefficient)
            weight = blocks.rows.weight
            w = (
                None
                if level is not None
                else rows_binding(form, replace(weight.take(weight.row < m), size=m))
            )
            penalty = (
                rows_binding(form, blocks.ridge.scaled(1.0 / (level or 1.0)))
                if len(blocks.ridge.row)
                else None
            )
            x = np.ones(form.n, dtype=bool) if wanted.x is None else wanted.x.copy()
            x[moved(rows.argument)] = x[ridge.row[ridge.parameter != NONE]] = True
            seen, kept = np.zeros((n, k)), Kept()
            seen.ravel()[blocks.position] = x
            everything = bool(seen.all())

            def run(values, like, at=None):
                visible = None if everything else kept.tensor("seen", seen, like)
                return answered(
                    at,
                    partial(least_squares, visible=visible),
                    A(values, like),
                    b(values, like),
                    # Declared nonnegative, but let pass with a rounding below zero.
                    None if w is None else _up_to_zero(w(values, like)),
                    None if penalty is None else _up_to_zero(penalty(values, like)),
                )

            return run

        small = min(m, n)
        return Match(
            words(
                form,
                A=blocks.rows.argument.linear(),
                b=blocks.rows.argument.offset(),
                weights=rows.weight,
                ridge=ridge,
            )
            + (f"; {k} right-hand sides" if k > 1 else ""),
            build,
            blocks.position,
            Cost(
                flops=m * n * small + small**3 / 3 + 16.0 * m * n * k,
                bytes=40.0 * m * n,
                fixed=6e-4,
                rate=1.5e10,
            ),
        )


@dataclass(frozen=True, eq=False)
class _Blocks:
    """k equal problems side by side: the rows and the ridge of all of them (of one, in local
    numbers), and where x stands."""

    rows: Weighted  # grouped by right-hand side; variables of the first group only are used
    ridge: Table  # (n,)
    position: np.ndarray  # (form.n,) in the (n, k) array
    n: int
    k: int


def _up_to_zero(weight: Tensor) -> Tensor:
    """Without what is below zero by rounding, and with the gradient that it has."""
    return weight + (-weight.detach()).clamp(min=0.0)


def _is_nonnegative(form: NormalForm, weight: Table) -> bool:
    """Every entry is a positive number, or one times a nonnegative Parameter."""
    signs = [bool(p.is_nonneg()) for p in form.parameters]
    used = weight.parameter != NONE
    owner = np.searchsorted(form.parameter_starts, weight.parameter[used], side="right") - 1
    return bool((weight.coefficient >= 0).all()) and all(signs[k] for k in np.unique(owner))


def _squares(form: NormalForm) -> Weighted:
    """All squares, constant quadratic forms among them."""
    squares = form.of(Square)
    parts = [squares] if squares.size else []
    parts += [_factored(quadratic) for quadratic in form.all_of(QuadraticForm)]
    weight, argument = stack([p.weight for p in parts]), stack([p.argument for p in parts])
    return Weighted(weight.normal, argument.normal)


def _factored(quadratic: Weighted) -> Weighted:
    """1/2 y'P y with a constant P = V diag(l) V' as squares of V'y."""
    size, matrix = quadratic.argument.size, quadratic.weight
    require(
        bool((matrix.parameter == NONE).all()),
        "its objective has a quadratic form with a Parameter",
    )
    require(
        size <= LARGEST_FACTORED,
        f"its objective has a quadratic form of more than {LARGEST_FACTORED} variables",
    )
    entries = np.zeros(size * size)
    np.add.at(entries, matrix.row, matrix.coefficient)
    P = entries.reshape(size, size)
    values, vectors = np.linalg.eigh((P + P.T) / 2)
    noise = 1e-14 * size * np.abs(values).max(initial=0.0)
    require(
        not size or values[0] >= -noise,
        "its objective has a quadratic form that is not positive semidefinite",
    )
    kept = np.flatnonzero(values > noise)
    row, column = np.divmod(np.arange(len(kept) * size), size)
    first = Table(len(kept), row, column, nothing(len(row)), vectors[:, kept].T.ravel())
    return Weighted(Table.of_constant(values[kept] / 2), composed(first, quadratic.argument))


def _split(squares: Weighted, n: int) -> tuple[Table, Weighted]:
    """(ridge, the other rows): rows that hold one variable times a number, and nothing else, are
    ridge."""
    argument, weight = squares.argument, squares.weight
    count = np.bincount(argument.row, minlength=argument.size)
    fixed = (argument.parameter == NONE) & (argument.variable != NONE) & (count[argument.row] == 1)
    single = np.zeros(argument.size, dtype=bool)
    single[argument.row[fixed]] = True
    variable, factor = np.zeros(argument.size, dtype=np.int64), np.zeros(argument.size)
    variable[argument.row[fixed]], factor[argument.row[fixed]] = (
        argument.variable[fixed],
        argument.coefficient[fixed],
    )
    mine = weight.take(single[weight.row])
    ridge = replace(mine, size=n, row=variable[mine.row]).scaled(1.0)
    ridge = replace(ridge, coefficient=mine.coefficient * factor[mine.row] ** 2).normal
    # A row without any entry adds nothing, one without a variable a constant.
    moving = np.zeros(argument.size, dtype=bool)
    moving[argument.row[argument.variable != NONE]] = True
    kept = moving & ~single
    return ridge, Weighted(selected_rows(weight, kept), selected_rows(argument, kept))


def _level(weight: Table, size: int) -> float | None:
    """The number that all weights are, if they are one."""
    if not size:
        return 1.0
    same = (
        len(weight.row) == size
        and (weight.parameter == NONE).all()
        and (weight.coefficient == weight.coefficient[0]).all()
    )
    return float(weight.coefficient[0]) if same and weight.coefficient[0] > 0 else None


def _blocks(form: NormalForm, rows: Weighted, ridge: Table) -> _Blocks | None:
    """One matrix variable whose columns (or rows) are fitted alike, each to its own right-hand
    side."""
    if (
        len(form.variables) != 1
        or len(form.variables[0].shape) != 2
        or min(form.variables[0].shape) < 1
    ):
        return None
    first, second = form.variables[0].shape
    entry = np.arange(form.n)
    for n, k, group, local in (
        (first, second, entry // first, entry % first),
        (second, first, entry % first, entry // first),
    ):
        if k > 1 and rows.size % k == 0:
            try:
                return _grouped(rows, ridge, n, k, group, local)
            except MismatchError:
                continue
    return None


def _grouped(
    rows: Weighted, ridge: Table, n: int, k: int, group: np.ndarray, local: np.ndarray
) -> _Blocks:
    reason = "its columns are not fitted alike"
    argument, size = rows.argument, rows.size
    linear = argument.linear()
    of_row = np.zeros(size, dtype=np.int64)
    of_row[linear.row] = group[linear.variable]
    require(bool((of_row[linear.row] == group[linear.variable]).all()), reason)
    m = size // k
    require(bool((np.bincount(of_row, minlength=k) == m).all()), reason)
    order = np.argsort(of_row, kind="stable")
    number = np.empty(size, dtype=np.int64)
    number[order] = np.arange(size)
    inside = replace(linear, row=number[linear.row], variable=local[linear.variable]).normal
    weight = replace(rows.weight, row=number[rows.weight.row]).normal
    penalty = replace(ridge, row=group[ridge.row] * n + local[ridge.row]).normal
    for table, height in ((inside, m), (weight, m), (penalty, n)):
        require(_repeats(table, height, k), reason)
    offset = argument.offset()
    moved = stack([inside, replace(offset, row=number[offset.row])])
    grouped = Weighted(
        weight,
        replace(
            moved, size=size, row=moved.row - size * (np.arange(len(moved.row)) >= len(inside.row))
        ),
    )
    one = penalty.take(penalty.row < n)
    return _Blocks(grouped, replace(one, size=n), local * k + group, n, k)


def _repeats(table: Table, height: int, k: int) -> bool:
    """Whether rows 0..height-1 come again k times, entry by entry."""
    if len(table.row) % k:
        return False
    width = len(table.row) // k
    row = table.row.reshape(k, width) - height * np.arange(k)[:, None]
    columns = [
        part.reshape(k, width) for part in (table.variable, table.parameter, table.coefficient)
    ]
    return all(bool((part == part[0]).all()) for part in (row, *columns)) and (
        not width or bool((row[0] < height).all())
    )
