"""A cone program without the variables that CVXPY adds for the arguments of quadratic terms.

    t = C x + e,   e affine in the parameters,   for  p/2 t^2 + r t

stands in an equality of its own, a_t t + a'x = b. Where C is constant and has few entries, and p and
e are not both moved by parameters, the term is written on x itself: P grows by p c c', q by
c (r + p e). Half of the unknowns of a controller's, or a projection's, program go so.

The optimal value is that of the program up to p/2 e^2 + r e, which is not affine: who asks for it
takes the program as it was.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import scipy.sparse as sp
import torch

from convlayer.cones import Product
from convlayer.conic.elimination import places, shortened
from convlayer.conic.lift import Lift
from convlayer.conic.program import Program
from convlayer.declaration.canonical import Canonical
from convlayer.declaration.maps import ONE, AffineMap, Recovery, fixed_values, row_of_each

# Variables by which one is written, at most: their products are entries of P.
FEW = 3


def lean(canonical: Canonical) -> tuple[Canonical, Lift] | None:
    """The smaller program, and the way back. None: there is no such variable."""
    found = _written(canonical)
    if not found:
        return None
    program, matrices = canonical.program, canonical.matrices
    n, m = program.n, program.m
    gone, own_rows = (np.array([one[k] for one in found]) for k in (0, 1))
    place_x, place_y = places(n, gone), places(m, own_rows)

    # P' = R P of the stored entries
    row, column = program.P_rows, program.P_cols
    diagonal = dict(zip(row[row == column].tolist(), np.flatnonzero(row == column), strict=True))
    own = np.flatnonzero((place_x[row] >= 0) & (place_x[column] >= 0))
    keys, sources = [place_x[column[own]] * n + place_x[row[own]]], [own]
    weights = [np.ones(len(own))]
    # q' = q_x + c r + c p e: of q, of b where p is constant, of P where e is
    by: dict[str, tuple[list, list, list]] = {name: ([], [], []) for name in ("q", "P", "b")}

    def add(name: str, target: int, source: int, weight: float) -> None:
        for part, value in zip(by[name], (target, source, weight), strict=True):
            part.append(value)

    P_value, b_value = (fixed_values(matrices[name]) for name in ("P", "b"))
    for t, i, others, coefficients in found:
        entry = diagonal.get(t)
        # t = c'x + e,  e = b / a
        own_coefficient, c = coefficients[0], -coefficients[1:] / coefficients[0]
        for j, cj in zip(others, c, strict=True):
            add("q", place_x[j], t, cj)
            if entry is None:
                continue
            if np.isnan(P_value[entry]):
                add("P", place_x[j], entry, cj * b_value[i] / own_coefficient)
            else:
                add("b", place_x[j], i, cj * P_value[entry] / own_coefficient)
        if entry is not None:
            a, b = np.meshgrid(np.arange(len(c)), np.arange(len(c)), indexing="ij")
            upper = place_x[others[a]] <= place_x[others[b]]
            keys.append(place_x[others[b][upper]] * n + place_x[others[a][upper]])
            sources.append(np.full(int(upper.sum()), entry))
            weights.append((c[a] * c[b])[upper])
    key, target = np.unique(np.concatenate(keys), return_inverse=True)
    across = sp.csr_array(
        (np.concatenate(weights), (target, np.concatenate(sources))), shape=(len(key), len(row))
    )
    kept_x, kept_y = np.flatnonzero(place_x >= 0), np.flatnonzero(place_y >= 0)
    kept_A = np.flatnonzero(place_y[program.A_rows] >= 0)
    q = matrices["q"][kept_x]
    for name, (targets, origins, values) in by.items():
        if targets:
            shape = len(kept_x), matrices[name].shape[0]
            q = q + sp.csr_array((values, (targets, origins)), shape=shape) @ matrices[name]
    new = {
        "P": across @ matrices["P"],
        "q": q,
        "A": matrices["A"][kept_A],
        "b": matrices["b"][kept_y],
        "d": matrices["d"],
    }
    new = {name: _tidy(matrix) for name, matrix in new.items()}
    moving = {
        name: np.unique(row_of_each(new[name])[new[name].indices > ONE]) for name in ("P", "A")
    }
    sizes = [int(np.prod(parameter.shape)) for parameter in canonical.parameters]
    smaller = Program(
        len(kept_x),
        len(kept_y),
        Product([shortened(block, own_rows) for block in program.cones.blocks]),
        key % n,
        key // n,
        place_y[program.A_rows[kept_A]],
        place_x[program.A_cols[kept_A]],
    )
    left = replace(
        canonical,
        program=smaller,
        matrices=new,
        moving=moving,
        maps={name: AffineMap(matrix, sizes, moving.get(name)) for name, matrix in new.items()},
        variables=[
            _moved(recovery, place_y if recovery.dual else place_x)
            for recovery in canonical.variables
        ],
    )
    counts = [len(others) for _, _, others, _ in found]
    C = sp.csr_array(
        (
            np.concatenate([values[1:] for _, _, _, values in found]),
            place_x[np.concatenate([others for _, _, others, _ in found])],
            np.concatenate([[0], np.cumsum(counts)]),
        ),
        shape=(len(found), len(kept_x)),
    )
    coefficient = np.array([values[0] for _, _, _, values in found])
    square = np.array([diagonal.get(int(t), -1) for t in gone])
    return left, Lift.of(gone, own_rows, coefficient, square, kept_x, kept_y, C)


def _written(canonical: Canonical) -> list[tuple[int, int, np.ndarray, np.ndarray]]:
    """(t, its row, the other variables there, t's coefficient and theirs)."""
    program, matrices = canonical.program, canonical.matrices
    A, P, b = (fixed_values(matrices[name]) for name in ("A", "P", "b"))
    shown_x, shown_y = np.zeros(program.n, dtype=bool), np.zeros(program.m, dtype=bool)
    for recovery in canonical.variables:
        (shown_y if recovery.dual else shown_x)[recovery.position.numpy()] = True
    uses = np.bincount(program.A_cols, minlength=program.n)
    off = program.P_rows != program.P_cols
    coupled = np.zeros(program.n, dtype=bool)
    coupled[program.P_rows[off]] = coupled[program.P_cols[off]] = True
    moved_square = np.zeros(program.n, dtype=bool)
    moved_square[program.P_rows[~off]] = np.isnan(P[~off])
    alone = (uses == 1) & ~shown_x & ~coupled
    order, _, starts = program.A_by_row
    needed, found = np.zeros(program.n, dtype=bool), []
    for i in np.flatnonzero(program.equalities.numpy() & ~shown_y):
        entries = order[starts[i] : starts[i + 1]]
        if not 2 <= len(entries) <= FEW + 1 or np.isnan(A[entries]).any():
            continue
        variables, values = program.A_cols[entries], A[entries]
        for k, t in enumerate(variables):
            others = np.delete(variables, k)
            if not alone[t] or needed[t]:
                continue
            if values[k] == 0 or (moved_square[t] and np.isnan(b[i])):
                continue
            found.append((int(t), int(i), others, np.r_[values[k], np.delete(values, k)]))
            needed[others] = True
            alone[others] = False
            break
    return found


def _tidy(matrix: sp.sparray) -> sp.csr_array:
    tidy = sp.csr_array(matrix)
    tidy.sum_duplicates()
    tidy.sort_indices()
    return tidy


def _moved(recovery: Recovery, place: np.ndarray) -> Recovery:
    return replace(recovery, position=torch.from_numpy(place[recovery.position.numpy()]))
