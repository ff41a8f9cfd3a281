"""Which of the user's constraints contradict each other, where a row is infeasible, and by how
much.

With e inside the cone and d the size of each row's numbers, one more variable measures how far
constraints are from holding together,

    tau*(T) = min over x, tau >= 0   of  tau   subject to   Ax + s = b + tau D e on the rows of T,   Ax + s = b on auxiliary rows,  s in K

(an equation becomes two inequalities), which always has a solution. T contradicts itself where tau*
> 0, and then the multipliers y say

    A'y = 0,   -b'y = tau* (e'Dy = 1):   those with y = 0 take no part.

So T shrinks to where y is not zero, and then a constraint at a time is left out: what still
contradicts itself without it goes on without it. At last no constraint of T can be spared. Its
amount is the tau* with that constraint alone giving way, in the user's units.

Source: Chinneck and Dravnieks (1991), elastic and deletion filters for irreducible infeasible sets.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from convlayer.cones import Cone, Nonnegative, Product, Zero
from convlayer.conic.program import Data, Program, take_rows
from convlayer.declaration.canonical import Canonical
from convlayer.declaration.declaration import Declaration
from convlayer.declaration.sources import Source, sources_of
from convlayer.paths.cone_program import entries_of
from convlayer.paths.evaluation import evaluate
from convlayer.solution import Status
from convlayer.solvers.clarabel import Clarabel
from convlayer.solvers.solver import Task

SOLVER = Clarabel()


@dataclass(frozen=True)
class Budget:
    """How much is spent on words."""

    # So many infeasible rows are looked into.
    rows: int = 3
    # So many solves are spent on a row to find its set, and as many on the amounts,
    solves: int = 24
    # and fewer, of fewer rows, where together they are expected to take longer than this, or do.
    seconds: float = 2.0
    # A row for which fewer solves than these are left is not begun.
    least: int = 3


@dataclass(frozen=True)
class ConflictShares:
    """What counts as a contradiction, relative to the numbers of a row's constraints."""

    # The accuracy to which the elastic programs are solved.
    tolerance: float = 1e-10
    # A contradiction smaller than this is none.
    nothing: float = 1e-8
    # A smaller set must contradict itself by this share of what the larger one did.
    less: float = 1e-3
    # A constraint with less than this share of the multipliers takes no part.
    absent: float = 1e-5
    # A right-hand side larger than this is no bound.
    infinite: float = 1e20


BUDGET, SHARES = Budget(), ConflictShares()


class Member(NamedTuple):
    """A constraint of a contradiction."""

    name: str  # "constraint 2, `x <= cap`", or "`x >= 0`, declared"
    amount: (
        float | None
        # by which it alone would have to give way, each entry by at most so much; None: it cannot, or
        # not in these units
    )
    entries: tuple[int, ...]  # row-major, those that take part; none of a scalar's, or in a cone


@dataclass(frozen=True)
class Conflict:
    """Constraints that no point satisfies together, though any fewer of them some point does; as
    few solves find them."""

    members: tuple[Member, ...]
    factor: bool  # a geometric program: an amount is a factor

    def __str__(self) -> str:
        parts = [f"{_shown(member)}{self._by(member)}" for member in self.members]
        if len(parts) == 1:
            return f"No point satisfies {parts[0]}, whatever the others (in brackets, by how much it would have to give way)."
        return f"These contradict one another (in brackets, by how much each alone would have to give way): {'; '.join(parts)}."

    def _by(self, member: Member) -> str:
        if member.amount is None:
            return ""
        if self.factor:
            return f" (a factor of {math.exp(member.amount):.3g})"
        return f" ({member.amount:.3g}{' each' if len(member.entries) > 1 else ''})"


def conflicts(
    declared: Declaration, values: Sequence[Tensor], rows: Sequence[int]
) -> dict[int, Conflict]:
    """For the first few of these rows of a call's parameters, (B or 1, *shape) each: what
    contradicts itself, where that is found.

    Words about an error must not become another one: what goes wrong here is left unsaid.
    """
    try:
        return _found(declared, values, rows)
    except Exception:
        return {}


def _found(
    declared: Declaration, values: Sequence[Tensor], rows: Sequence[int]
) -> dict[int, Conflict]:
    canonical = declared.canonical
    affordable = int(BUDGET.seconds / SOLVER.row_seconds(canonical.program)) if rows else 0
    rows = list(rows)[: min(BUDGET.rows, affordable // BUDGET.least)]
    if not rows:
        return {}
    solves = min(BUDGET.solves, affordable // len(rows))
    sources = sources_of(declared)
    with torch.no_grad():
        index = torch.tensor(rows)
        part = [take_rows(value.detach(), index) for value in values]
        entries = entries_of(declared, part)
        data, _ = evaluate(canonical, entries, False, torch.zeros((), dtype=torch.float64))
    found, until = {}, time.monotonic() + BUDGET.seconds
    for k, row in enumerate(rows):
        if time.monotonic() > until:
            break
        conflict = _Row(canonical, sources, data.widen(len(rows)), k).conflict(solves, until)
        if conflict is not None:
            found[row] = conflict
    return found


def _shown(member: Member) -> str:
    if not member.entries:
        return member.name
    listed = ", ".join(map(str, member.entries[:6])) + (", ..." if len(member.entries) > 6 else "")
    return f"{member.name} at entr{'y' if len(member.entries) == 1 else 'ies'} {listed}"


class _Row:
    """The constraints of one row."""

    def __init__(self, canonical: Canonical, sources: list[Source], data: Data, row: int) -> None:
        program = canonical.program
        values = data.A_entries[min(row, len(data.A) - 1)].numpy()
        self.A = sp.csr_array(
            (values, (program.A_rows, program.A_cols)), shape=(program.m, program.n)
        )
        self.b = data.b[min(row, len(data.b) - 1)].numpy()
        self.program, self.sources, self.gp = program, sources, canonical.gp
        sizes = np.maximum(
            abs(self.A).max(axis=1).toarray().ravel(),
            np.where(abs(self.b) < SHARES.infinite, abs(self.b), 0),
        )
        group = program.scale_group.numpy()
        largest = np.zeros(program.m)
        np.maximum.at(largest, group, sizes)
        self.sizes = np.where(largest[group] > 0, largest[group], 1.0)
        self.inside = program.cones.inside.numpy()
        self.owner = np.full(program.m, -1)
        for k, source in enumerate(sources):
            self.owner[source.rows.numpy()] = k
        self.own = np.zeros(program.m, dtype=bool)
        for source in sources:
            self.own[source.rows[source.own].numpy()] = True

    def conflict(self, solves: int, until: float) -> Conflict | None:
        shares = self.shares(set(range(len(self.sources))))
        if shares is None:
            return None
        least = max(SHARES.nothing, SHARES.less * self.gap)
        members, solves = set(shares), solves - 1
        for candidate in sorted(shares, key=shares.__getitem__):
            if (
                candidate not in members
                or len(members) == 1
                or solves <= 0
                or time.monotonic() > until
            ):
                continue
            fewer, solves = self.shares(members - {candidate}, least), solves - 1
            if fewer is not None:
                members, shares = set(fewer), fewer
        last = self.shares(members, least)
        if last is None:
            return None
        y, budget = self.y, BUDGET.solves if solves > 0 else BUDGET.least
        told = [
            self.member(k, members, y, place < budget and time.monotonic() < until)
            for place, k in enumerate(sorted(members))
        ]
        return Conflict(tuple(told), self.gp)

    def shares(self, among: set[int], least: float = SHARES.nothing) -> dict[int, float] | None:
        """The part of each source in the contradiction among these; None where there is none."""
        kept = (self.owner < 0) | np.isin(self.owner, list(among))
        found = self.elastic(kept, np.where(self.owner >= 0, self.sizes, 0.0))
        if found is None or found[0] <= least:
            return None
        self.gap, self.y = found
        weight = np.abs(self.y) * self.sizes
        total = {k: float(weight[self.owner == k].sum()) for k in among}
        return {k: part for k, part in total.items() if part > SHARES.absent * max(total.values())}

    def member(self, k: int, members: set[int], y: np.ndarray, with_amount: bool) -> Member:
        source = self.sources[k]
        kept = (self.owner < 0) | np.isin(self.owner, list(members))
        alone = np.where((self.owner == k) & self.own, 1.0, 0.0)
        found = self.elastic(kept, alone) if with_amount and alone.any() else None
        rows, entries = source.rows.numpy(), source.entries.numpy()
        weight = np.abs(y[rows]) * self.sizes[rows]
        part = entries[(entries >= 0) & (weight > SHARES.absent * weight.max(initial=0.0))]
        several = (entries >= 0).sum() > 1
        return Member(
            source.name,
            None if found is None else found[0],
            tuple(sorted(part.tolist())) if several else (),
        )

    def elastic(self, kept: np.ndarray, give: np.ndarray) -> tuple[float, np.ndarray] | None:
        """(tau*, y (m,)) of the kept rows, each giving way by `give` times tau along its cone's
        inside."""
        n = self.program.n
        parts: list[tuple[np.ndarray, np.ndarray, Cone]] = []  # rows, signs, cone
        for block, cone in zip(self.program.cones.blocks, self.program.cones.cones, strict=True):
            rows = np.arange(block.start, block.start + block.size)
            if block.name in ("zero", "nonnegative"):
                rows = rows[kept[rows] & (np.abs(self.b[rows]) < SHARES.infinite)]
                fixed = rows[give[rows] == 0] if block.name == "zero" else rows[:0]
                loose = np.setdiff1d(rows, fixed)
                both = np.concatenate([loose, loose]) if block.name == "zero" else loose
                signs = (
                    np.repeat([1.0, -1.0], len(loose))
                    if block.name == "zero"
                    else np.ones(len(loose))
                )
                parts += [
                    (fixed, np.ones(len(fixed)), Zero(len(fixed))),
                    (both, signs, Nonnegative(len(both))),
                ]
            elif kept[rows].all():
                parts.append((rows, np.ones(len(rows)), cone))
        rows, signs = (np.concatenate([part[k] for part in parts]) for k in (0, 1))
        A = sp.diags_array(signs) @ self.A[rows]
        column = sp.csr_array(-(give * self.inside)[rows][:, None])
        last = sp.csr_array(([-1.0], ([0], [n])), shape=(1, n + 1))  # tau >= 0
        whole = sp.csc_array(sp.vstack([sp.hstack([A, column]), last]))
        whole.eliminate_zeros()
        whole.sort_indices()
        at = whole.tocoo()
        empty = np.zeros(0, dtype=np.int64)
        cones = Product([*(cone for _, _, cone in parts if cone.size), Nonnegative(1)])
        program = Program(
            n + 1,
            len(rows) + 1,
            cones,
            empty,
            empty,
            at.row.astype(np.int64),
            at.col.astype(np.int64),
        )
        q, b = np.zeros(n + 1), np.append(signs * self.b[rows], 0.0)
        q[n] = 1.0
        task = Task(program, np.zeros((1, 0)), q[None], whole.data[None], b[None], SHARES.tolerance)
        (point,) = SOLVER.solve(task)
        if point.status not in (Status.SOLVED, Status.INACCURATE):
            return None
        y = np.zeros(self.program.m)
        np.add.at(y, rows, signs * point.y[:-1])
        return float(point.x[n]), y
