"""Whose rows: what each row of a cone program comes from, in the user's own names."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import cvxpy as cp
import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from convlayer.declaration.canonical import Canonical
from convlayer.declaration.cvxpy_internals import CvxAttr2Constr, Dcp2Cone, SvecPSD
from convlayer.declaration.declaration import Declaration
from convlayer.declaration.reductions import CanonicalisationError, Reductions
from convlayer.declaration.rewriting import prepared
from convlayer.declaration.spelling import short
from convlayer.memo import once_for_each

AUXILIARY = "an auxiliary constraint of CVXPY"


class Source(NamedTuple):
    """What some rows of the cone program come from."""

    name: str
    rows: Tensor  # (k,)
    own: Tensor  # (k,) bool, of the user's constraint itself rather than of an atom in it
    entries: Tensor  # (k,) row-major index of the constraint's entry; -1 in cones and atoms


@once_for_each
def sources_of(declared: Declaration) -> list[Source]:
    """Every row that may have a kink under one name: the user's constraints in order, the
    variables' attributes, the rest."""
    canonical = declared.canonical
    names = {
        c.id: f"constraint {k}, `{short(c)}`" for k, c in enumerate(declared.problem.constraints)
    }
    nothing = torch.zeros(0, dtype=torch.int64)
    # Listed even without rows, as a constraint on nothing is.
    sources = {name: Source(name, nothing, nothing.bool(), nothing) for name in names.values()}
    start = 0
    for constraint, name, own in _named(canonical, declared, names):
        rows = torch.arange(start, start := start + constraint.size)
        if name not in sources and not own and isinstance(constraint, cp.constraints.Zero):
            continue  # the definition of an auxiliary variable: no kink, and no choice
        entries = torch.full_like(rows, -1)
        if own and isinstance(constraint, (cp.constraints.NonNeg, cp.constraints.Zero)):
            # Rows are in column-major order.
            entries = torch.from_numpy(
                np.arange(len(rows)).reshape(constraint.shape).flatten(order="F")
            )
        new = (rows, torch.full((len(rows),), own), entries)
        old = sources.get(name, Source(name, nothing, nothing.bool(), nothing))
        sources[name] = Source(name, *(torch.cat(pair) for pair in zip(old[1:], new, strict=True)))
    users = set(names.values())
    return sorted(
        sources.values(), key=lambda source: (source.name not in users, not bool(source.own.any()))
    )


def _named(
    canonical: Canonical, declared: Declaration, names: dict[int, str]
) -> Iterator[tuple[Any, str, bool]]:
    """(constraint of the cone program in row order, the name of its source, whether it is the
    source itself)."""
    # The reductions once more, watched: for what does CVXPY make each auxiliary constraint?
    problem = prepared(
        declared.problem, declared.parameters, declared.variables, declared.gp
    ).problem
    reductions = Reductions(problem, declared.gp)
    atoms: dict[int, tuple[Any, Any]] = {}
    for reduction in reductions.steps:
        if isinstance(reduction, Dcp2Cone):
            atoms = _traced(reduction)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reduced = reductions.apply()
    constraints = reduced.cone_program.constraints
    if sum(c.size for c in constraints) != canonical.program.m:
        raise CanonicalisationError(
            f"CVXPY {cp.__version__} orders its constraints otherwise; "
            "this version is not supported."
        )

    # Each reduction gives its constraints new ids: names follow.
    owned, attributes = dict(names), dict[int, dict[str, list[str]]]()
    entering = owned  # names by the ids that Dcp2Cone saw
    for reduction, kept in reduced.steps:
        entering = owned if isinstance(reduction, Dcp2Cone) else entering
        owned = {reduction.cons_id_map.get(key, key): name for key, name in owned.items()}
        atoms = {reduction.cons_id_map.get(key, key): origin for key, origin in atoms.items()}
        if isinstance(reduction, CvxAttr2Constr) and kept:
            new, old, _ = kept
            attributes = {variable.id: _attributes(old[key]) for key, variable in new.items()}

    # A constraint of the user's, one for an atom of theirs, one of a variable's attribute, or
    # CVXPY's own.
    for constraint in constraints:
        if constraint.id in owned:
            yield constraint, owned[constraint.id], True
        elif constraint.id in atoms:
            top, atom = atoms[constraint.id]
            term = (
                f"the term `{short(atom)}` of the objective" if not declared.gp else "the objective"
            )
            yield (
                constraint,
                term if isinstance(top, cp.Minimize) else entering.get(top.id, AUXILIARY),
                False,
            )
        else:
            of = [variable.id for variable in constraint.variables()]
            kind = "psd" if isinstance(constraint, (cp.constraints.PSD, SvecPSD)) else "bound"
            words = attributes.get(of[0], {}).get(kind) if len(of) == 1 else None
            yield (constraint, words.pop(0), True) if words else (constraint, AUXILIARY, False)


def _traced(reduction: Dcp2Cone) -> dict[int, tuple[Any, Any]]:
    """Id of each auxiliary constraint that the reduction is going to make -> (the objective or
    constraint, the atom) it is for."""
    origins: dict[int, tuple[Any, Any]] = {}
    tree, step = reduction.canonicalize_tree, reduction.canonicalize_expr
    top: Any = None

    def follow(expression, *rest, **options):
        nonlocal top
        if isinstance(expression, (cp.Minimize, cp.constraints.constraint.Constraint)):
            top = expression
        return tree(expression, *rest, **options)

    def note(expression, *rest, **options):
        new, constraints = step(expression, *rest, **options)
        origins.update({constraint.id: (top, expression) for constraint in constraints})
        return new, constraints

    vars(reduction).update(canonicalize_tree=follow, canonicalize_expr=note)
    return origins


def _attributes(variable: cp.Variable) -> dict[str, list[str]]:
    """The constraints that CVXPY makes of a variable's attributes, in its order."""
    has, name = variable.attributes, variable.name()
    bounds = [f"`{name} >= 0`, declared"] if has["nonneg"] or has["pos"] else []
    bounds += [f"`{name} <= 0`, declared"] if has["nonpos"] or has["neg"] else []
    limits: Any = has["bounds"] or ()
    for which, bound in zip(("lower", "upper"), limits, strict=False):
        if isinstance(bound, cp.Expression) or sp.issparse(bound) or bool(np.isfinite(bound).any()):
            bounds.append(f"the {which} bound of `{name}`")
    return {"bound": bounds, "psd": [f"`{name} {'<<' if has['NSD'] else '>>'} 0`, declared"]}
