"""How far each row is from where the solution map is not differentiable, by constraint, in the
user's own names.

At a solution (x, s, y) of the cone program the derivative is that of the residual map, whose
Jacobian is the active system

    K = [ P  B' ;  B  -(I - D) ],   B = D^1/2 U'A on the rows with D > 0,   DPi_K*(y - s) = U D U'.

There is a derivative where y - s is on no kink of the projection (strict complementarity) and K is
regular, but for null vectors that neither an output nor a parameter meets. As K (z, e) = 0 splits
into P z = 0, B z = 0 (directions in which x is free) and B'e = 0, D e = e (active constraints that
depend on each other), its null space names the variables and constraints at fault.

Source: Robinson (1980) and Bonnans and Shapiro (2000) for the conditions; Bolte et al. (2021) for
        what is taken at a kink.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor

from convlayer.autodiff.threads import one_thread
from convlayer.cones import ProductSpectrum, smat
from convlayer.cones.cone import from_basis
from convlayer.conic.costs import prefers_dense
from convlayer.conic.kkt import factorise
from convlayer.conic.null_space import NULL
from convlayer.conic.polish import KINK, MARGIN
from convlayer.conic.program import DENSE_ENTRIES, Data, Operators
from convlayer.conic.residual import Scaling, normalise, recentre
from convlayer.declaration.canonical import Canonical
from convlayer.declaration.declaration import Declaration
from convlayer.declaration.sources import Source, sources_of
from convlayer.paths.cone_derivative import Term, entries_bar
from convlayer.paths.cone_program import entries_of
from convlayer.paths.conflict import conflicts
from convlayer.paths.evaluation import evaluate
from convlayer.report.check import Check, ConstraintCheck
from convlayer.solution import Solution, Status, batch_index

# a K up to this size has all its eigenvalues found; of a larger one Lanczos' method finds the
# extreme ones
DIRECT = 800
NEAREST = 16  # eigenvalues about zero that it looks for at first
TOUCHED = 1e-7  # share of a unit null vector from which an entry takes part in it
VANISHING = 1e-10  # share of the largest below which an entry of an adjoint is rounding
SEED = 0


def checked(
    declared: Declaration,
    values: Sequence[Tensor],  # of each parameter, (B or 1, *shape)
    solve: Callable[[], Solution],  # by the cone program
    gap: Callable[[list[Tensor]], Tensor | None]
    | None = None,  # a structure's own, of the rows' values
) -> Check:
    """Solve, and look at what the derivative of the solution rests on, row by row. No row raises:
    one that failed says so.

    Whatever structure a layer runs, it is the cone program that is looked at. Equalities with
    constant coefficients that depend on each other, as the marginals of a plan do, are named where
    parameters move them; the derivative is that along feasible parameters. Cost: beside the solve,
    the eigenvalues of K, row by row; the first call of a problem canonicalises it once more.
    """
    canonical, parameters, sources = (
        declared.canonical,
        declared.parameters,
        sources_of(declared),
    )
    with torch.no_grad(), warnings.catch_warnings(), one_thread():
        warnings.simplefilter("ignore")
        solution = solve()
        batch = tuple(solution.status.shape)
        size = math.prod(batch)
        status = solution.status.flatten()
        good = torch.nonzero(status < Status.INFEASIBLE).flatten()
        thetas = [
            value.detach().to("cpu", torch.float64).expand(size, *value.shape[1:])[good]
            for value in values
        ]
        entries = entries_of(declared, thetas)
        assert solution.iterate is not None
        point = [part.cpu()[good] for part in solution.iterate]
        found = _examined_in_pieces(canonical, sources, entries, point)
        own = gap(thetas) if gap is not None and len(good) else None
        if own is not None:
            found["eigenvalue_gap"] = own

    infeasible = torch.nonzero(status == Status.INFEASIBLE).flatten().tolist()
    contradictions = conflicts(declared, values, infeasible)

    def spread(part: Tensor) -> Tensor:
        blank = torch.nan if part.is_floating_point() else 0
        return part.new_full((size,), blank).index_copy_(0, good, part).reshape(batch)

    names = ("margin", "active", "weakly_active", "redundant", "entry")
    checks = [
        ConstraintCheck(source.name, *(spread(found[name][:, k]) for name in names))
        for k, source in enumerate(sources)
    ]
    rest = (
        "rank",
        "size",
        "condition",
        "unique",
        "unique_duals",
        "ambiguous",
        "eigenvalue_gap",
        "tie",
    )
    return Check(
        status=solution.status,
        margin=spread(found["least"]),
        constraints=tuple(checks),
        adjoint_residual=spread(found["adjoint"]),
        zero_gradient={p.name(): spread(found["zero"][:, k]) for k, p in enumerate(parameters)},
        conflicts={batch_index(row, batch): conflict for row, conflict in contradictions.items()},
        _degenerate=solution.degenerate,
        _batch=batch,
        **{name: spread(found[name]) for name in rest},
    )


# One row after the other
# ------------------------------------------------------------------------------------------------


def _examined_in_pieces(
    canonical: Canonical, sources: list[Source], entries: list[Tensor], point: list[Tensor]
) -> dict[str, Tensor]:
    """(rows, ...) each; see `_examined`."""
    program, rows = canonical.program, len(point[0])
    if not rows:  # one row of zeros lends its shapes
        entries, point = (
            [part.new_zeros(1, part.shape[1]) for part in group] for group in (entries, point)
        )
    at_once = max(1, DENSE_ENTRIES // ((program.n + program.m) * program.n))
    parts = [
        _examined(
            canonical,
            sources,
            *([part[lo : lo + at_once] for part in group] for group in (entries, point)),
        )
        for lo in range(0, len(point[0]), at_once)
    ]
    return {name: torch.cat([part[name] for part in parts])[:rows] for name in parts[0]}


def _examined(
    canonical: Canonical, sources: list[Source], entries: list[Tensor], point: list[Tensor]
) -> dict[str, Tensor]:
    program, rows = canonical.program, len(point[0])
    like = torch.zeros((), dtype=torch.float64)
    values, _ = evaluate(canonical, entries, False, like)
    data, outer = normalise(values.widen(rows))
    entered = outer.enter(*point)
    data, scaling = recentre(data, outer, entered[0], entered[2])
    x, s, y = scaling.enter(*point)
    v = y - s
    y, s, spectrum = program.cones.linearise_dual(v, KINK)

    margins, gap = _margins(canonical, v, s)
    held = _active_rows(canonical, spectrum)
    systems = [_system(data, spectrum, scaling.c, row) for row in range(rows)]
    free, dependent = (
        torch.from_numpy(np.array([getattr(system, name) for system in systems]).reshape(rows, k))
        for name, k in (("free", program.n), ("dependent", program.m))
    )
    returned = torch.zeros(program.n, dtype=torch.bool)
    own = torch.zeros(program.m, dtype=torch.bool)
    for recovery in canonical.variables:
        if not recovery.dual:
            returned[recovery.position] = True
    for source in sources:
        own[source.rows[source.own]] = True
    visible = canonical.visible
    adjoint, singular, zero = _adjoint(canonical, data, scaling, spectrum, entries, x, y)

    found: dict[str, list[Tensor]] = {
        name: [] for name in ("margin", "active", "weakly_active", "redundant", "entry")
    }
    for source in sources:
        near = torch.cat([margins.new_full((rows, 1), torch.inf), margins[:, source.rows]], 1)
        least, place = near.min(1)
        entry = torch.cat([torch.tensor([-1]), source.entries])[place]
        weak = least < MARGIN
        for name, part in (
            ("margin", least),
            ("active", held[:, source.rows].any(1) | weak),
            ("weakly_active", weak),
            ("redundant", dependent[:, source.rows].any(1)),
            ("entry", entry),
        ):
            found[name].append(part)
    ambiguous = free[:, visible.x].any(1) | dependent[:, visible.y].any(1) | singular
    alone = margins[:, program.inequalities]
    return {
        **{
            name: torch.stack(parts, 1) if parts else torch.zeros(rows, 0, dtype=torch.float64)
            for name, parts in found.items()
        },
        "least": _least(margins),
        "tie": _least(alone),
        "eigenvalue_gap": gap,
        **{
            name: torch.tensor([getattr(system, name) for system in systems], dtype=dtype)
            for name, dtype in (
                ("rank", torch.int64),
                ("size", torch.int64),
                ("condition", torch.float64),
            )
        },
        "unique": ~free[:, returned].any(1),
        "unique_duals": ~dependent[:, own].any(1),
        "ambiguous": ambiguous,
        "adjoint": adjoint,
        "zero": zero,
    }


def _least(margins: Tensor) -> Tensor:
    """(rows, k) -> (rows,), infinite where k is zero."""
    return margins.amin(1) if margins.shape[1] else margins.new_full((len(margins),), torch.inf)


def _margins(canonical: Canonical, v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, m) the distance to a kink of each row's cone, and (rows,) the gap about zero of the
    psd cones' eigenvalues."""
    margins, gap = torch.full_like(v, torch.inf), v.new_full((len(v),), torch.inf)
    cones = canonical.program.cones
    for block, cone in zip(cones.blocks, cones.cones, strict=True):
        rows = slice(block.start, block.start + block.size)
        if block.name == "nonnegative":
            margins[:, rows] = v[:, rows].abs()
        elif block.name != "zero":
            margins[:, rows] = cone.margin(-v[:, rows], s[:, rows]).unsqueeze(1)
        if block.name == "psd" and len(v):
            eigenvalues = torch.linalg.eigvalsh(smat(v[:, rows]))
            above = torch.where(eigenvalues >= 0, eigenvalues, torch.inf).amin(1)
            below = torch.where(eigenvalues < 0, eigenvalues, -torch.inf).amax(1)
            gap = torch.minimum(gap, above - below)
    return margins, gap


def _active_rows(canonical: Canonical, spectrum: ProductSpectrum) -> Tensor:
    """(rows, m) whether the row, or the cone that it is part of, takes part in K."""
    group = canonical.program.scale_group.expand_as(spectrum.values)
    return (
        torch.zeros_like(spectrum.values)
        .scatter_reduce(1, group, spectrum.values, "amax")
        .gather(1, group)
        > 0
    )


class _System(NamedTuple):
    """What K of one row tells."""

    size: int
    rank: int
    condition: float
    free: np.ndarray  # (n,) bool, variables that its null space moves
    dependent: np.ndarray  # (m,) bool, constraints that it does


def _system(data: Data, spectrum: ProductSpectrum, units: Tensor | None, row: int) -> _System:
    """K in the scale in which its largest entries are one, as the factor has it."""
    program = data.program
    n, m = program.n, program.m
    P, A = (part[min(row, len(part) - 1)].numpy() for part in (data.P, data.A))
    d = spectrum.values[row].numpy()
    U = _rotation(spectrum, row)
    root, active = np.sqrt(d.clip(min=0.0)), np.flatnonzero(d > 0)
    B = sp.csr_array(
        (root * (U.T @ sp.csr_array((A, (program.A_rows, program.A_cols)), shape=(m, n))).T).T
    )[active]
    B = sp.coo_array(B)
    size, off = n + len(active), program.P_rows != program.P_cols
    i = [
        program.P_rows,
        program.P_cols[off],
        n + B.coords[0],
        B.coords[1],
        n + np.arange(len(active)),
    ]
    j = [
        program.P_cols,
        program.P_rows[off],
        B.coords[1],
        n + B.coords[0],
        n + np.arange(len(active)),
    ]
    values = [P, P[off], B.data, B.data, d[active] - 1.0]
    K = sp.csr_array(
        (np.concatenate(values), (np.concatenate(i), np.concatenate(j))), shape=(size, size)
    )
    largest = abs(K).max(axis=1).toarray().ravel()
    scale = 1 / np.sqrt(np.where(largest > 0, largest, 1.0))
    eigenvalues, vectors = _spectrum_of(sp.csr_array(K * scale[:, None] * scale[None, :]))

    sizes = np.abs(eigenvalues)
    null = sizes <= NULL * size**0.5
    rank = size - int(null.sum())
    condition = float(sizes.max() / sizes[~null].min()) if rank else 1.0
    z = scale[:, None] * vectors[:, null]
    if units is not None:
        z[:n] *= units[min(row, len(units) - 1)].numpy()[:, None]
    z /= np.linalg.norm(z, axis=0).clip(min=1e-300)
    multipliers = U[:, active] @ (root[active, None] * z[n:])
    return _System(
        size,
        rank,
        condition,
        *((np.abs(part) > TOUCHED).any(axis=1) for part in (z[:n], multipliers)),
    )


def _rotation(spectrum: ProductSpectrum, row: int) -> sp.csr_array:
    """U of one row."""
    m = spectrum.values.shape[1]
    plain = np.ones(m, dtype=bool)
    i: list[np.ndarray] = []
    j: list[np.ndarray] = []
    values: list[np.ndarray] = []
    for where, basis in spectrum.bases:
        count, k = basis.shape[1:3]
        index = np.arange(m)[where] if isinstance(where, slice) else where.numpy()
        index = index.reshape(count, k)
        plain[index] = False
        i.append(np.broadcast_to(index[:, :, None], (count, k, k)).ravel())
        j.append(np.broadcast_to(index[:, None, :], (count, k, k)).ravel())
        values.append(from_basis(basis[row], torch.eye(k, dtype=basis.dtype)).numpy().ravel())
    rest = np.flatnonzero(plain)
    place = tuple(np.concatenate([*part, rest]) for part in (i, j))
    return sp.csr_array((np.concatenate([*values, np.ones(len(rest))]), place), shape=(m, m))


def _spectrum_of(K: sp.csr_array) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and vectors: all of a small K; of a large one the largest and those about zero,
    all null ones among them.

    Source: Lehoucq, Sorensen and Yang (1998), by shift and invert.
    """
    size, count = K.shape[0], NEAREST
    if size <= DIRECT:
        return np.linalg.eigh(K.toarray())
    start = np.random.default_rng(SEED).standard_normal(size)
    ends, end_vectors = eigsh(K, k=1, which="LM", v0=start)
    while True:
        _, vectors = eigsh(sp.csc_array(K), k=count, sigma=NULL**0.75, which="LM", v0=start)
        values = np.linalg.norm(K @ vectors, axis=0)
        if (values > NULL * size**0.5).any() or 4 * count >= size:
            return np.concatenate([ends, values]), np.hstack([end_vectors, vectors])
        count *= 4


def _adjoint(
    canonical: Canonical,
    data: Data,
    scaling: Scaling,
    spectrum: ProductSpectrum,
    entries: list[Tensor],
    x: Tensor,
    y: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """J'(w, u) = (g_x, D g_y) for random cotangents of the outputs.

    Returns its residual (rows,), where the factor took J for singular (rows,), and parameters
    without a gradient (rows, .).
    """
    generator = torch.Generator().manual_seed(SEED)
    bars = [
        torch.randn(k, dtype=torch.float64, generator=generator)
        for k in (data.program.n, data.program.m)
    ]
    seen = [torch.zeros(len(bar)) for bar in bars]
    for recovery in canonical.variables:
        seen[recovery.dual][recovery.position] = 1.0
    x_bar, y_bar = ((bar * mask).expand(len(x), -1) for bar, mask in zip(bars, seen, strict=True))

    operators = Operators(data, prefers_dense(data.program))
    d, right = spectrum.values, spectrum.to_basis(y_bar)
    system = factorise(operators, spectrum, canonical.visible, scaling.c)
    w, e = system.solve(x_bar, right)
    u = spectrum.from_basis(e)
    first = operators.P(w) + operators.At(u) - x_bar
    second = d * (spectrum.to_basis(operators.A(w)) - right) - (1 - d) * e
    goal = torch.cat([x_bar, d * right], 1).abs().amax(1).clamp(min=1e-300)
    residual = torch.cat([first, second], 1).abs().amax(1) / goal

    # What is rounding beside the rest is zero: a gradient that is made of zeros alone is one.
    w, u = _without_rounding(w, u)
    x, y = _without_rounding(x, y)
    w, u = scaling.leave_adjoint(w, u)
    vectors = {"q": -w, "b": u, "d": w.new_zeros(len(w), 1)}
    everything = range(len(entries))
    found = entries_bar(canonical, [len(x)] * len(entries), everything, [Term(x, y, w, u)], vectors)
    zero = [
        (found[k] == 0).all(1) if k in found else torch.ones(len(x), dtype=torch.bool)
        for k in everything
    ]
    none = torch.zeros(len(x), 0, dtype=torch.bool)
    return residual, system.singular, torch.stack(zero, 1) if zero else none


def _without_rounding(a: Tensor, b: Tensor) -> list[Tensor]:
    size = torch.cat([a, b], 1).abs().amax(1, keepdim=True)
    return [torch.where(part.abs() <= VANISHING * size, 0.0, part) for part in (a, b)]
