"""A cone program's maps as the compiled core takes them."""

from __future__ import annotations

from collections.abc import Sequence

import cvxpy as cp
import numpy as np
import scipy.sparse as sp

from convlayer.conic.lift import Lift
from convlayer.core.maps import Domain, Maps, Read, Ties, Written
from convlayer.declaration import domain
from convlayer.declaration.canonical import Canonical
from convlayer.declaration.maps import ONE, ParameterEntries, Recovery, row_of_each

# Coefficients of the maps, up to which they are the core's.
LARGEST = 5_000_000
PARTS = ("P", "q", "A", "b", "d")


def maps_of(
    canonical: Canonical, parameters: Sequence[cp.Parameter], lift: Lift | None = None
) -> Maps | None:
    """None: the program, or a way to read a parameter, is not the core's. lift: back to the whole
    program, of which this is a part."""
    if canonical.core is None or any(p.symmetric and p.log for p in canonical.parameters):
        return None
    stacked = sp.csr_array(sp.vstack([canonical.matrices[part] for part in PARTS]))
    stacked = sp.csr_array((stacked + stacked[:, canonical.mirrored]) / 2)  # both triangles alike
    stacked.sum_duplicates()
    if stacked.nnz > LARGEST:
        return None
    n, rows = canonical.program.n, row_of_each(stacked)
    constant, moving = np.zeros(stacked.shape[0]), stacked.indices > ONE
    fixed = stacked.indices == ONE
    constant[rows[fixed]] = stacked.data[fixed]
    columns, coefficients = stacked.indices[moving] - ONE - 1, stacked.data[moving]
    bounds, dependence = canonical.bounds, canonical.dependence
    return Maps(
        canonical.core,
        [
            _read(entries, parameter, limits)
            for entries, parameter, limits in zip(
                canonical.parameters, parameters, canonical.limits, strict=True
            )
        ],
        constant,
        (rows[moving], columns, coefficients),
        [_written(recovery, n) for recovery in canonical.variables],
        (canonical.sign, canonical.gp),
        (np.zeros(0),) * 3
        if bounds is None
        else (bounds.rows.numpy(), bounds.columns.numpy(), bounds.coefficients.numpy()),
        Ties(np.zeros(0), np.zeros(0), np.zeros((0, 0)), np.zeros(0))
        if dependence is None
        else Ties(
            dependence.rows.numpy(),
            dependence.group.numpy(),
            dependence.basis.numpy(),
            dependence.empty.numpy(),
        ),
        lift,
    )


def sees(properties: frozenset[str], parameter: cp.Parameter) -> bool:
    """Whether the core sees all of a parameter's declared properties."""
    matrix = bool(properties & domain.MATRICES)
    return properties <= domain.SIGNS | domain.MATRICES and (not matrix or parameter.ndim == 2)


def _read(entries: ParameterEntries, parameter: cp.Parameter, limits: np.ndarray) -> Read:
    properties = domain.declared(parameter)
    flags = Domain(0)
    if sees(properties, parameter):
        for name in properties:
            flags |= Domain[name.upper()]
    order = parameter.shape[0] if properties & domain.MATRICES and parameter.ndim == 2 else 0
    return Read(int(np.prod(entries.shape)), flags, order, entries.log, limits)


def _written(recovery: Recovery, n: int) -> Written:
    position = recovery.position.numpy() + (n if recovery.dual else 0)
    weight = recovery.coefficient
    return Written(
        position, np.ones(len(position)) if weight is None else weight.numpy(), recovery.exp
    )
