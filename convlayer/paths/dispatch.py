"""Which path a problem takes: every structure is asked, and the cheaper of kernel and cone program
is taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cvxpy as cp
import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.csgraph import reverse_cuthill_mckee

from convlayer.autodiff.threads import cores
from convlayer.conic.costs import prefers_dense, system_seconds
from convlayer.conic.program import Program
from convlayer.core.rows import Plan
from convlayer.declaration.affine import Table, UnsupportedError
from convlayer.declaration.canonical import Canonical
from convlayer.declaration.diagnose import ProblemError
from convlayer.declaration.normal_form import NormalForm, normal_form
from convlayer.paths.specialised import outputs_of
from convlayer.solvers import DEFAULT, SOLVERS, Attempt, ConeSolver, clarabel, interior_point
from convlayer.solvers.solver import fits_densely
from convlayer.structures import STRUCTURES, Cost, Match, MismatchError

SMALL = 400  # unknowns up to which a kernel is taken without looking at the sparsity
SPARSE = 0.05  # density above which a matrix counts as dense
AN_ENTRY = 1e-7  # seconds that each of them spends on an entry, beside its flops
# factorisations of a row of the cone program, for an estimate before it is there
TYPICAL = clarabel.FACTORISATIONS
# What a call costs in torch's own operations around a solver, in seconds.
AROUND = 2e-3
CHOICES = ("auto", "generic", "cone_program", *STRUCTURES)


@dataclass(frozen=True, eq=False)
class Finding:
    """What a structure said of a problem: its match, or the first reason why it is another one."""

    name: str
    match: Match | None
    reason: str | None


@dataclass(frozen=True, eq=False)
class Recognition:
    """All that was found, and what was chosen: a finding with a match, or None for the cone
    program."""

    form: NormalForm | None
    findings: list[Finding]
    chosen: Finding | None
    generic: Cost | None
    why: str


def recognise(
    problem: cp.Problem,
    parameters: Sequence[cp.Parameter],
    variables: Sequence[cp.Variable],
    owners: dict,
    *,
    gp: bool,
    structure: str,
    reason: str | None,
) -> Recognition:
    """Ask every structure; with a `reason` the cone program is taken all the same. ProblemError:
    the structure asked for does not apply."""
    if structure in ("generic", "cone_program"):
        return Recognition(None, [], None, None, "as you asked")
    form = None if gp else normal_form(problem, parameters)
    findings = [_ask(name, form, variables, owners) for name in STRUCTURES]
    generic = None if form is None else generic_cost(form)
    if structure != "auto":
        finding = next(f for f in findings if f.name == structure)
        if finding.match is None:
            raise ProblemError(f"structure={structure!r} does not apply: {finding.reason}.")
        return Recognition(form, findings, finding, generic, "as you asked")
    matched = [f for f in findings if f.match is not None]
    if reason is not None:
        return Recognition(form, findings, None, generic, reason)
    if not matched:
        return Recognition(form, findings, None, generic, "no structure matched")
    best = matched[0]
    assert best.match is not None
    assert generic is not None
    if best.match.cost is not None and best.match.cost.seconds() > generic.seconds():
        return Recognition(
            form,
            findings,
            None,
            generic,
            f"it is sparse: cheaper than the dense kernel of {best.name}",
        )
    why = (
        "the cheapest solver at each batch"
        if best.match.cost is None
        else "cheaper than the cone program"
    )
    return Recognition(
        form, findings, best, generic, f"the most special structure that matched, and {why}"
    )


def attempts(program: Program, batch: int, tolerance: float, device: torch.device) -> list[Attempt]:
    """The cheapest solver for this program and batch first; the default one for the rows that it
    does not settle."""
    if device.type == "cpu":
        name = cheapest_solver(program, batch)
    else:
        # What fits stays on the device: the way to the host and back, and few cores there, cost
        # more.
        name = (
            "interior_point" if prefers_dense(program) and fits_densely(program, batch) else DEFAULT
        )
    sure = SOLVERS[DEFAULT].attempts(tolerance, {})
    first = Attempt(SOLVERS[name], tolerance, SOLVERS[name].quick)
    # What a sharper solve does not settle, the same tolerance again seldom does: it comes last.
    return [first, *(reversed(sure) if name == DEFAULT else sure)]


def cheaper_core(canonical: Canonical, solver: ConeSolver, batch: int) -> Plan | None:
    """The compiled core for this batch; None: there is none, or the solver is the cheaper way."""
    core = canonical.core
    if core is None or not canonical.program.is_polyhedral:
        return core
    eliminated = canonical.elimination
    program = canonical.program if eliminated is None else eliminated.program
    other = solver.seconds(program, batch) + 2 * batch * system_seconds(program) / cores()
    return core if core.seconds(batch) <= AROUND + other else None


def other_solver(program: Program, batch: int, taken: Sequence[Attempt]) -> str | None:
    """A solver that takes this program and has no part in these attempts; None if there is none."""
    used = {attempt.solver.name for attempt in taken}
    free = [
        solver
        for name, solver in SOLVERS.items()
        if name not in used and solver.fits(program, batch)
    ]
    free.sort(key=lambda solver: (not solver.precise, -len(solver.cones or ())))
    return next((solver.name for solver in free if solver.takes(program)), None)


def cheapest_solver(program: Program, batch: int) -> str:
    """Of those that say what they cost; rows on all cores."""
    if not program.is_polyhedral or not fits_densely(program, batch):
        return DEFAULT  # the others are for linear and quadratic programs, or dense
    most = batch * (clarabel.ROW + TYPICAL * (program.n + program.m) ** 3 / clarabel.ROW_RATE)
    if most < interior_point.STEPS * interior_point.STEP:
        return "daqp"  # whatever the fill: the pattern need not be looked at
    return min(SOLVERS, key=lambda name: SOLVERS[name].seconds(program, batch))


def _ask(
    name: str, form: NormalForm | None, variables: Sequence[cp.Variable], owners: dict
) -> Finding:
    if form is None:
        return Finding(name, None, "the problem is log-log convex")
    try:
        match = STRUCTURES[name].match(form)
        if match.build is not None:
            outputs_of(form, match, variables, owners)
    except (MismatchError, UnsupportedError) as reason:
        return Finding(name, None, str(reason))
    return Finding(name, match, None)


def generic_cost(form: NormalForm) -> Cost:
    """An estimate for the cone program, without canonicalising: from the pattern of its KKT matrix,
    reordered to a band."""
    tables = [term.argument for _, term in form.present] + [c.table for c in form.constraints]
    rows = sum(t.size for t in tables)
    entries = sum(int((t.variable >= 0).sum()) for t in tables)
    entries += sum(atom.matrix_entries(term) for atom, term in form.present)
    unknowns = form.n + rows
    if unknowns <= SMALL or entries > SPARSE * form.n * max(rows, 1):
        flops = unknowns**3 / 6.0
    else:
        flops = _band_flops(form, tables, unknowns)
    return Cost(
        flops=TYPICAL * flops,
        bytes=16.0 * TYPICAL * entries,
        fixed=3e-3,
        a_row=1e-3 + TYPICAL * AN_ENTRY * (entries + unknowns),
        rate=1e9,
    )


def _band_flops(form: NormalForm, tables: list[Table], unknowns: int) -> float:
    """Of a factorisation of [0 F'; F -I] within its profile."""
    start, lower, upper = form.n, [], []
    for table in tables:
        linear = table.linear()
        lower.append(start + linear.row)
        upper.append(linear.variable)
        start += table.size
    for atom, term in form.present:
        joined = atom.joined(term)
        lower.append(joined[:-1])
        upper.append(joined[1:])
    i, j = np.concatenate(lower), np.concatenate(upper)
    pattern = sp.csr_array((np.ones(len(i)), (i, j)), shape=(unknowns, unknowns))
    pattern = sp.csr_array(pattern + pattern.T)
    order = reverse_cuthill_mckee(sp.csr_matrix(pattern), symmetric_mode=True)
    rank = np.empty(unknowns, dtype=np.int64)
    rank[order] = np.arange(unknowns)
    first = np.arange(unknowns)
    np.minimum.at(first, np.maximum(rank[i], rank[j]), np.minimum(rank[i], rank[j]))
    return float(((np.arange(unknowns) - first + 1.0) ** 2).sum())
