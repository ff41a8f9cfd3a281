"""CVXPY problem -> Canonical: the affine map from parameters to (P, q, A, b), the cones, and the
way back.

CVXPY reduces the problem to cones of affine expressions, whose coefficients are read here
(`coefficients`) and kept sparse and split by parameter:

    (P, q, A, b, d) = constant + sum over parameters of map_p @ theta_p,

with theta_p the parameter's entries as CVXPY reduces them (upper triangle of a symmetric one,
logarithm in a log-log convex program). The maps back, from (x, y) to the user's variables, are read
off CVXPY by probing its own reductions. Both are checked against CVXPY on random data whenever a
layer is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import cvxpy as cp
import numpy as np
import scipy.sparse as sp
import torch

from convlayer.cones import Product
from convlayer.cones.kinds import cones_of, unknown_kinds
from convlayer.conic.bounds import NO_BOUND
from convlayer.conic.program import Program
from convlayer.declaration.affine import Table
from convlayer.declaration.canonical import Canonical
from convlayer.declaration.coefficients import Coefficients
from convlayer.declaration.diagnose import ProblemError, within_recursion_limit
from convlayer.declaration.domain import is_symmetric
from convlayer.declaration.maps import ONE, AffineMap, ParameterEntries, Recovery, row_of_each
from convlayer.declaration.reductions import (
    CanonicalisationError,
    Reduced,
    Reductions,
    positions,
)
from convlayer.declaration.rewriting import Prepared, prepared
from convlayer.declaration.spelling import short
from convlayer.notices import quiet_cvxpy

# The largest difference between our maps and CVXPY's matrices at random parameters, relative to
# their largest entry.
AGREEMENT_OF_MAPS = 1e-10
# Between a variable as it is gathered from a random point and as CVXPY recovers it: relative to the
# entry, and absolute.
AGREEMENT_OF_RECOVERIES, AGREEMENT_AT_ZERO = 1e-9, 1e-12


def canonicalise(
    problem: cp.Problem,
    parameters: Sequence[cp.Parameter],
    variables: Sequence[cp.Variable],
    *,
    gp: bool = False,
    checked: Prepared | None = None,
) -> Canonical:
    """Canonicalise `problem` once and for all values of its parameters; `checked`: what `prepared`
    has returned for it.

    Errors: ValueError or TypeError naming the argument or the sub-expression at fault, and the
    remedy; CanonicalisationError if this CVXPY's cone program is not the one our map gives.
    """
    # CVXPY's part: refusals, rewritings, and the chain of reductions; the expressions that it
    # leads to.
    with quiet_cvxpy(), within_recursion_limit():
        checked = checked or prepared(problem, parameters, variables, gp)
        reduced = Reductions(checked.problem, gp).apply()
        coefficients = reduced.coefficients()

    # Ours: the maps into the program, and those out of its solution.
    entries, target = _columns(parameters, reduced)
    sizes = [p.size for p in parameters]
    program, matrices = _maps(reduced, coefficients, target, ONE + 1 + sum(sizes))
    moving = {name: _moving_rows(matrices[name]) for name in ("P", "A")}
    canonical = Canonical(
        program=program,
        moving=moving,
        maps={
            name: AffineMap(matrix, sizes, moving.get(name)) for name, matrix in matrices.items()
        },
        parameters=entries,
        variables=_recoveries(variables, checked.owners, reduced, gp),
        sign=-1.0 if isinstance(problem.objective, cp.Maximize) else 1.0,
        gp=gp,
        sizes={
            "variables": sum(v.size for v in problem.variables()),
            "parameters": sum(sizes),
            "constraints": sum(int(np.prod(c.shape)) for c in problem.constraints),
        },
        matrices=matrices,
        stuffed=[short(part) for part in coefficients.stuffed],
    )
    _self_check(canonical, reduced, target)
    return canonical


# From coefficients to the program and the maps into it -----------------------------------------


def _maps(
    reduced: Reduced, coefficients: Coefficients, target: np.ndarray, width: int
) -> tuple[Program, dict[str, sp.csr_array]]:
    """The program, and for each of P, q, A, b, d the matrix (values, width) of its map.

    target: of each parameter entry of the coefficients, and of none, at last, the column.
    """
    cone_program = reduced.cone_program
    n, m = cone_program.x.size, coefficients.cones.size
    cones = _cones(cone_program.cone_dims, m)

    def matrix(part: Table, rows: np.ndarray, height: int) -> sp.csr_array:
        columns = target[part.parameter]
        made = sp.csr_array((part.coefficient, (rows, columns)), shape=(height, width))
        made.sum_duplicates()
        made.eliminate_zeros()
        return made

    # Ours is s = b - A x.
    place, sign = reduced.formatting
    inside = coefficients.cones.scaled(sign)
    inside = replace(inside, row=place[inside.row])
    linear, offset = inside.linear(), inside.offset()
    key, entry = np.unique(linear.variable * max(m, 1) + linear.row, return_inverse=True)
    A_cols, A_rows = np.divmod(key, max(m, 1))
    A = matrix(linear.scaled(-1.0), entry, len(key))
    b = matrix(offset, offset.row, m)

    costs = coefficients.linear
    linear, offset = costs.linear(), costs.offset()
    q, d = matrix(linear, linear.variable, n), matrix(offset, offset.row, 1)

    # An entry and its mirror image, half of each, make the symmetric part.
    i, j = coefficients.quadratic.row, coefficients.quadratic.variable
    key, entry = np.unique(np.maximum(i, j) * n + np.minimum(i, j), return_inverse=True)
    P_cols, P_rows = np.divmod(key, max(n, 1))
    half = np.where(i == j, 1.0, 0.5) * coefficients.quadratic.coefficient
    P = matrix(replace(coefficients.quadratic, coefficient=half), entry, len(key))

    # Infinity is the absence of a bound, in the constant part of an inequality, and nothing
    # elsewhere.
    dims, row = cone_program.cone_dims, row_of_each(b)
    inequality = (row >= dims.zero) & (row < dims.zero + dims.nonneg)
    unlimited = np.isinf(b.data) & inequality & (b.indices == ONE)
    b.data[unlimited] = np.sign(b.data[unlimited]) * NO_BOUND
    matrices = {"P": P, "q": q, "A": A, "b": b, "d": d}
    if not all(np.isfinite(made.data).all() for made in matrices.values()):
        raise ProblemError(
            "A constant of the problem holds NaN or infinity. Infinity means `no bound` on the large "
            "side of an inequality, as in x <= np.inf, and nothing elsewhere."
        )
    return Program(n, m, cones, P_rows, P_cols, A_rows, A_cols), matrices


def _cones(dims, m: int) -> Product:
    """In the order in which CVXPY stacks their rows."""
    cones = cones_of(dims)
    if cones.size != m:
        others = ", ".join(unknown_kinds(dims))
        others = f", and others that it calls {others}" if others else ""
        raise CanonicalisationError(
            f"CVXPY's cones have {cones.size} rows{others}, and its matrix {m}; "
            "this version is not supported."
        )
    return cones


def _columns(
    parameters: Sequence[cp.Parameter], reduced: Reduced
) -> tuple[list[ParameterEntries], np.ndarray]:
    """How each parameter is read; and of each entry of the reduced problem's parameters, and of
    none, at last, the column in our maps."""
    starts, end = {}, 0
    for standing in reduced.values:
        starts[standing.id], end = end, end + standing.size
    target, entries, first = np.full(end + 1, ONE), [], ONE + 1
    for parameter, (entering, standing) in zip(
        parameters, reduced.parameters(parameters), strict=True
    ):
        log = entering is not parameter
        if log and parameter.id in starts:
            raise ValueError(
                f"Parameter `{parameter.name()}` stands both as a factor and as an exponent of the "
                "log-log convex program; use two parameters and pass the same tensor twice."
            )
        entries.append(ParameterEntries(tuple(parameter.shape), is_symmetric(parameter), log=log))
        if standing.id in starts:
            read = positions(entering, standing)
            start = starts[standing.id]
            target[start : start + len(read)] = first + read
        first += parameter.size
    return entries, target


def _moving_rows(matrix: sp.csr_array) -> np.ndarray:
    """The values of a map that some parameter moves."""
    moving = np.zeros(matrix.shape[0], dtype=bool)
    moving[row_of_each(matrix)[matrix.indices > ONE]] = True
    return np.flatnonzero(moving)


# From the program's solution to the user's variables --------------------------------------------


def _recoveries(
    variables: Sequence[cp.Variable], owners: dict[int, Any], reduced: Reduced, gp: bool
) -> list[Recovery]:
    """Of each variable, by CVXPY's own inverse: a few evaluations of it, which give all variables
    at once."""
    # By the constraint whose multipliers they are; None: of x.
    probes: dict[Any, tuple[np.ndarray, list[dict[int, np.ndarray]]]] = {}
    recoveries = []
    for variable in variables:
        owner = owners.get(variable.id)
        key = None if owner is None else owner.id
        if key not in probes:
            probes[key] = _probed(owner, reduced)
        recoveries.append(_recovery(variable, owner is not None, gp, *probes[key]))
    return recoveries


def _probed(owner: Any, reduced: Reduced) -> tuple[np.ndarray, list[dict[int, np.ndarray]]]:
    """A random point, and CVXPY's variables from i + 1, from its square and from that point, i the
    place in x.

    With an owner its dual variables, and y for x.
    """
    cone_program = reduced.cone_program
    size = cone_program.x.size if owner is None else int(cone_program.constr_size)
    random = np.random.default_rng(0).standard_normal(size)
    number = np.arange(1, size + 1, dtype=float)
    points = [number, number**2, random]
    if owner is None:
        return random, [reduced.primal(point) for point in points]
    return random, [reduced.dual(point, owner) for point in points]


def _recovery(
    variable: cp.Variable,
    dual: bool,
    gp: bool,
    random: np.ndarray,
    values: list[dict[int, np.ndarray]],
) -> Recovery:
    """From the variable's values at i + 1, at its square, and at a random point: two tell the map,
    the third checks it."""
    once, squared, there = (
        np.asarray(value[variable.id].reshape(variable.shape), dtype=float).ravel()
        for value in values
    )
    position, coefficient = _gathered(once, squared, len(random))
    expected = coefficient * (random[position] if len(random) else 0.0)
    allowed = AGREEMENT_AT_ZERO + AGREEMENT_OF_RECOVERIES * np.abs(expected)
    if not (np.abs(there - expected) <= allowed).all():
        raise CanonicalisationError(
            f"The map to variable `{variable.name()}` does not reproduce CVXPY's."
        )
    exact = bool(np.all(coefficient == 1.0))
    return Recovery(
        tuple(variable.shape),
        dual,
        torch.from_numpy(position),
        None if exact else torch.from_numpy(coefficient),
        exp=gp and not dual,
    )


def _gathered(once: np.ndarray, squared: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Read off a map that gathers entries and scales each: (positions, coefficients) from two
    evaluations.

    With input i + 1 an output is c (i + 1), with (i + 1)^2 it is c (i + 1)^2: their ratio tells the
    position.
    """
    used = once != 0
    position = np.zeros(len(once), dtype=np.int64)
    position[used] = np.rint(squared[used] / once[used]).astype(np.int64) - 1
    if used.any() and not (position.min() >= 0 and position.max() < size):
        raise CanonicalisationError(
            "CVXPY recovers a variable by more than a gather; this version is not supported."
        )
    return position, np.where(used, once / (position + 1), 0.0)


# Whether the maps are CVXPY's -------------------------------------------------------------------


def _self_check(canonical: Canonical, reduced: Reduced, target: np.ndarray) -> None:
    """Compare our map with CVXPY's own matrices, where its parameters are random constants."""
    # Theirs.
    cone_program = reduced.cone_program
    quadratic = cone_program.P is not None
    applied = cone_program.apply_parameters(quad_obj=quadratic)
    P, q, d, A, b = applied if quadratic else (None, *applied)
    A = sp.coo_array(A)

    # Ours, at the same.
    inputs = np.zeros(canonical.matrices["A"].shape[1])
    theta = [value.ravel(order="F") for value in reduced.values.values()]
    inputs[target] = np.concatenate([*theta, [1.0]])
    ours = {name: matrix @ inputs for name, matrix in canonical.matrices.items()}

    # The difference of each.
    program = canonical.program
    our_A, our_P = (program.A_rows, program.A_cols), (program.P_rows, program.P_cols)
    differences = {
        "A": _apart(ours["A"], our_A, -A.data, (A.row, A.col), program.m),
        "q": np.abs(ours["q"] - q).max(initial=0.0),
        "offset": np.abs(ours["d"] - d).max(initial=0.0),
    }
    if program.m:
        finite = np.where(np.isinf(b), np.sign(b) * NO_BOUND, b)
        differences["b"] = np.abs(ours["b"] - finite).max()
    if quadratic:
        P = sp.coo_array(P)
        upper = np.minimum(P.row, P.col), np.maximum(P.row, P.col)
        half = np.where(P.row == P.col, 1.0, 0.5) * P.data
        differences["P"] = _apart(ours["P"], our_P, half, upper, program.n)
    scale = 1.0 + max(np.abs(part).max(initial=0.0) for part in (A.data, q, b[np.isfinite(b)]))
    for name, difference in differences.items():
        if not difference <= AGREEMENT_OF_MAPS * scale:
            raise CanonicalisationError(
                f"Our {name} differs from the one of CVXPY {cp.__version__}; "
                "this version is not supported."
            )


def _apart(
    ours: np.ndarray,
    places: tuple[np.ndarray, np.ndarray],
    theirs: np.ndarray,
    their_places: tuple[np.ndarray, np.ndarray],
    rows: int,
) -> float:
    """The largest entry of the difference of two matrices, each given by values and (rows,
    columns)."""
    height = max(rows, 1)
    keys = [
        row.astype(np.int64) + height * column.astype(np.int64)
        for row, column in (places, their_places)
    ]
    _, entry = np.unique(np.concatenate(keys), return_inverse=True)
    return float(np.abs(np.bincount(entry, np.concatenate([ours, -theirs]))).max(initial=0.0))
